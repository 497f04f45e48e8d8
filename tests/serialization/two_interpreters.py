"""Two clean interpreters: a script of the user's, and a worker that loads what the script ships."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Speaks frames on its standard streams, and loads, calls and answers as a worker does.
WORKER = """
import pickle, struct, sys
sys.path.insert(0, {root!r})
from clusterpool.serialization import exceptions, functions, packing

functions.install_main_module()
stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
while header := stdin.read(4):
    function, arguments = pickle.loads(stdin.read(*struct.unpack("<I", header)))
    try:
        args, kwargs = packing.loads(arguments)
        value = functions.loads_function(function)(*args, **kwargs)
        reply = (True, packing.dumps_value(value).to_bytes())
    except BaseException as exc:
        reply = (False, exceptions.dump_exception(exc, node_id="n1", pid=7, task_name="t"))
    reply = pickle.dumps(reply)
    stdout.write(struct.pack("<I", len(reply)) + reply)
    stdout.flush()
"""

DRIVER = """
import os, pickle, struct, subprocess, sys
sys.path.insert(0, {root!r})
from clusterpool.serialization import exceptions, functions, packing


class Worker:
    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", {worker!r}],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
        )

    def call(self, function, *args, **kwargs):
        arguments = packing.dumps_arguments(args, kwargs).to_bytes()
        return self.send(functions.dumps_function(function), arguments)

    def send(self, function, arguments):
        request = pickle.dumps((function, arguments))
        self.process.stdin.write(struct.pack("<I", len(request)) + request)
        self.process.stdin.flush()
        size = struct.unpack("<I", self.process.stdout.read(4))
        is_value, reply = pickle.loads(self.process.stdout.read(*size))
        if is_value:
            return packing.loads(reply)
        raise exceptions.load_exception(reply)


worker = Worker()
"""


class ScriptRunner:
    """Runs a script as a program; in it, `worker.call(function, *args)` calls in the other interpreter."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(self, body: str, *, guarded: bool = False) -> None:
        """Runs `body`, which asserts; `guarded`: as it is, with DRIVER available as the module `driver`."""
        worker = WORKER.format(root=str(ROOT))
        preamble = DRIVER.format(root=str(ROOT), worker=worker)
        script = self._folder / "script.py"
        if guarded:
            (self._folder / "driver_of_test.py").write_text(preamble)
            script.write_text(body)
        else:
            script.write_text(preamble + body)
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=50)
        assert done.returncode == 0, done.stderr
