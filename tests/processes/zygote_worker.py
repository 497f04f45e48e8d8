"""The worker's code in the tests of the zygote: `main(spec)` does what `spec["do"]` names."""

from __future__ import annotations

import atexit
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any


def main(spec: dict[str, Any]) -> Any:
    return globals()[f"do_{spec['do']}"](spec)


def do_exit(spec: dict[str, Any]) -> Any:
    return spec["value"]


def do_sys_exit(spec: dict[str, Any]) -> Any:
    sys.exit(spec["value"])


def do_raise(spec: dict[str, Any]) -> Any:
    raise LookupError("of the worker's own")


def do_segfault(spec: dict[str, Any]) -> Any:
    os.kill(os.getpid(), signal.SIGSEGV)


def do_print(spec: dict[str, Any]) -> Any:
    print("to stdout: ä")
    print("to stderr", file=sys.stderr)
    os.write(1, b"raw\n")


def do_sleep(spec: dict[str, Any]) -> Any:
    try:
        print("sleeping", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted")
        return 7


def do_exit_handlers(spec: dict[str, Any]) -> Any:
    def late() -> None:
        time.sleep(0.1)
        print("thread")

    atexit.register(print, "atexit")
    threading.Thread(target=late).start()
    sys.stdout.write("main ")  # without a line end: it must be flushed all the same


def do_allocate(spec: dict[str, Any]) -> Any:
    assert len(bytearray(spec["bytes"]).replace(b"\0", b"\1")) == spec["bytes"]


def do_describe(spec: dict[str, Any]) -> Any:
    """Prints what a worker finds itself in."""
    status = Path("/proc/self/status").read_text()
    description = {
        "fds": {name: os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if is_open(name)},
        "environment": {name: os.environ.get(name) for name in ("SET_HERE", "REMOVED_HERE")},
        "random": random.random(),
        "stdin": sys.stdin.read(),
        "session_id": os.getsid(0),
        "group_is_own": os.getpgid(0) == os.getpid(),
        "int_handler": str(signal.getsignal(signal.SIGINT)),
        "chld_handler": str(signal.getsignal(signal.SIGCHLD)),
        "wakeup_fd": signal.set_wakeup_fd(-1),
        "threads": [line for line in status.splitlines() if line.startswith("Threads:")],
        "line_buffering": sys.stdout.line_buffering,
        "preloaded": "colorsys" in sys.modules,
    }
    print(json.dumps(description))


def is_open(name: str) -> bool:
    try:
        os.fstat(int(name))
    except OSError:
        return False
    return True
