"""Plays the node in the tests of launch and sweep: `main()` does what the label `do` of its config says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from clusterpool.processes.death import record_process
from clusterpool.processes.launch import NodeStart, receive_start


def main() -> None:
    start = receive_start(sys.argv)
    globals()[f"do_{start.config.labels['do']}"](start)


def do_serve(start: NodeStart) -> None:
    """Ready until SIGTERM, then an orderly end."""

    def end(_signal_number: int, _frame: object) -> None:
        start.remove_files()
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
    start.report_ready(
        pid=os.getpid(),
        session=os.environ["CLUSTERPOOL_SESSION"],
        session_leader=os.getsid(0) == os.getpid(),
        fds={name: os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if is_open(name)},
        inheritable=[name for name in os.listdir("/proc/self/fd") if int(name) > 2 and is_inheritable(name)],
        path=sys.path,
        stdin=sys.stdin.read(),
    )
    while True:
        time.sleep(60)


def do_serve_with_child(start: NodeStart) -> None:
    """As a node with a control store: its child outlives it when it is killed."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=True)
    record_process(start.config.paths.pid_file("valkey"), child.pid)
    start.config.paths.arena_file.touch()
    (start.config.spill_path / "spilled").touch()
    start.report_ready(child_pid=child.pid)
    while True:
        time.sleep(60)


def do_stubborn(start: NodeStart) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    start.report_ready()
    while True:
        time.sleep(60)


def do_fail(start: NodeStart) -> None:
    print("a line of the log", flush=True)
    start.report_failure("no port is free")
    sys.exit(3)


def do_crash(start: NodeStart) -> None:
    raise LookupError("of the node's own")


def do_hang(start: NodeStart) -> None:
    print("hanging", flush=True)
    time.sleep(60)


def is_open(name: str) -> bool:
    return Path(f"/proc/self/fd/{name}").exists() or Path(f"/proc/self/fd/{name}").is_symlink()


def is_inheritable(name: str) -> bool:
    try:
        return os.get_inheritable(int(name))
    except OSError:
        return False  # the listing's own descriptor
