"""Ctrl-C at a terminal: KeyboardInterrupt comes at once, the work stops, and the cluster and the session go on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.clusters import is_alive, wait_for
from tests.faults.terminal import Terminal

# The work itself would take 100 s. It stops within a second or so, where nothing else is done on the machine.
AT_ONCE_S = 15.0

# The calls that a person interrupts, and what must work at the same prompt afterwards. Each call has items of its own:
# a worker may just begin with one when Ctrl-C is pressed, and that must not be taken for the next call's.
CALLS = {
    "Pool.map": ("pool.map(work, range(0, 8), chunksize=1)", "pool.map(abs, [-1, 2])"),
    "Pool.imap": ("list(pool.imap(work, range(10, 18)))", "list(pool.imap(abs, [-1, 2]))"),
    "apply_async.get": ("pool.apply_async(work, (20,)).get()", "[pool.apply(abs, (-1,)), 2]"),
    "Executor.map": ("list(executor.map(work, range(30, 38)))", "list(executor.map(abs, [-1, 2]))"),
    "Future.result": ("executor.submit(work, 40).result()", "[executor.submit(abs, -1).result(), 2]"),
    "get": ("clusterpool.get([remote_work.remote(n) for n in range(50, 58)])", "clusterpool.get(absolutes())"),
    "wait": ("clusterpool.wait([remote_work.remote(60)])", "clusterpool.get(absolutes())"),
    "joblib": ("Parallel(2)(delayed(work)(n) for n in range(70, 78))", "Parallel(2)(delayed(abs)(n) for n in (-1, 2))"),
    "nested pool": ("pool.map(nest, (80, 82), chunksize=1)", "pool.map(abs, [-1, 2])"),
    "actor": ("clusterpool.get(actor.work.remote(90))", "[clusterpool.get(clusterpool.remote(abs).remote(-1)), 2]"),
}  # fmt: skip

PRELUDE = """
import os, time
from pathlib import Path
import joblib
from joblib import Parallel, delayed
import clusterpool
from clusterpool import Executor, Pool

HERE = Path({folder!r})

def work(n):
    (HERE / f"began-{{n}}-{{os.getpid()}}").touch()
    time.sleep(100)

def nest(n):
    with Pool(2) as inner:
        return inner.map(work, (n, n + 1), chunksize=1)

def finish(n):
    time.sleep(0.5)
    return n

def absolutes():
    return [clusterpool.remote(abs).remote(n) for n in (-1, 2)]

class Working:
    def work(self, n):
        work(n)

remote_work = clusterpool.remote(work)
clusterpool.init(num_cpus=2)
pool, executor = Pool(2), Executor(2)
actor = clusterpool.remote(Working).options(num_cpus=0).remote()
joblib.parallel_backend("clusterpool")
pool.map(abs, range(4)), list(executor.map(abs, range(4)))
"""


def test_ctrl_c_at_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "prelude.py").write_text(PRELUDE.format(folder=str(tmp_path)))
    with Terminal("-i", "prelude.py", folder=tmp_path) as terminal:
        at = terminal.wait_said(">>> ")
        for number, (call, after) in enumerate(CALLS.values()):
            terminal.type(call)
            wait_for_work(tmp_path, range(10 * number, 10 * number + 10))
            pressed_s = time.monotonic()
            terminal.press_ctrl_c()
            at = terminal.wait_said("KeyboardInterrupt", after=at)
            at = terminal.wait_said(">>> ", after=at)
            assert time.monotonic() - pressed_s < AT_ONCE_S
            terminal.type(after)
            at = terminal.wait_said("[1, 2]", after=at)
            at = terminal.wait_said(">>> ", after=at)
        terminal.type("exit()")
        assert terminal.wait_ended() == 0
        assert terminal.text.count("KeyboardInterrupt\n") == len(CALLS), terminal.text


SCRIPT = """
pool.map(work, range(8), chunksize=1)
"""
SIGNALLED = """
import signal
result = pool.map_async(finish, range(2), chunksize=1)
try:
    signal.raise_signal(signal.SIGINT)
    time.sleep(10)
except KeyboardInterrupt:
    print(result.get())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_script_at_a_terminal_ends_with_all_its_work(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(PRELUDE.format(folder=str(tmp_path)) + SCRIPT)
    with Terminal("script.py", folder=tmp_path) as terminal:
        pids = wait_for_work(tmp_path, range(8))
        if number == signal.SIGINT:
            terminal.press_ctrl_c()
        else:
            terminal.process.send_signal(number)
        assert terminal.wait_ended() == -number
        assert ("KeyboardInterrupt" in terminal.text) is (number == signal.SIGINT), terminal.text
        wait_for(lambda: not any(is_alive(pid) for pid in pids), what="the workers are gone")


def test_a_signal_to_the_driver_alone_leaves_its_work_alone(tmp_path: Path) -> None:
    """As with the standard library: `kill -INT` of one process is no Ctrl-C."""
    (tmp_path / "script.py").write_text(PRELUDE.format(folder=str(tmp_path)) + SIGNALLED)
    command = [sys.executable, "script.py"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=40,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert (done.stdout, done.returncode) == ("[0, 1]\n", 0), done.stderr


def wait_for_work(folder: Path, items: range) -> list[int]:
    """The processes that have begun to work on one of `items`."""
    began: list[int] = []

    def find() -> bool:
        for path in folder.glob("began-*"):
            _, item, pid = path.name.split("-")
            if int(item) in items:
                began.append(int(pid))
        return bool(began)

    wait_for(find, what="the work begins")
    return began
