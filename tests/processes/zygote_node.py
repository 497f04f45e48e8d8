"""Runs as a process of its own and plays the node: `python zygote_node.py <scenario>` prints its findings
as JSON.

pytest cannot be the zygote's parent: it has threads, and hundreds of modules.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clusterpool.processes.zygote import (
    ForkFailed,
    Preloaded,
    WorkerExited,
    WorkerForked,
    Zygote,
    ZygoteDied,
    ZygoteEvent,
)

TIMEOUT_S = 20.0


class Node:
    """A zygote, and everything that it said."""

    def __init__(self, worker_module: str = "zygote_worker") -> None:
        self.zygote = Zygote.start(worker_module)
        self.events: list[ZygoteEvent] = []

    def wait(self, is_done: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + TIMEOUT_S
        while not is_done():
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"timed out; events: {self.events}"
            select.select([self.zygote], [], [], left_s)
            self.events += self.zygote.read_events()

    def of(self, kind: type, worker_id: str | None = None) -> list[Any]:
        return [
            event
            for event in self.events
            if isinstance(event, kind) and (worker_id is None or getattr(event, "worker_id", None) == worker_id)
        ]

    def fork(self, worker_id: str, **spec: Any) -> WorkerForked:
        self.zygote.fork_worker(worker_id, spec)
        self.wait(lambda: bool(self.of(WorkerForked, worker_id)))
        return self.of(WorkerForked, worker_id)[0]

    def run(self, worker_id: str, **spec: Any) -> dict[str, Any]:
        forked = self.fork(worker_id, **spec)
        stdout, stderr = read_all(forked.stdout_fd), read_all(forked.stderr_fd)
        self.wait(lambda: bool(self.of(WorkerExited, worker_id)))
        exited = self.of(WorkerExited, worker_id)[0]
        assert exited.pid == forked.pid
        return {
            "code": exited.exit_code,
            "stdout": stdout,
            "stderr": stderr,
            "peak_rss_bytes": exited.peak_rss_bytes,
        }


def read_all(descriptor: int) -> str:
    with os.fdopen(descriptor, "rb") as pipe:
        return pipe.read().decode()


def open_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def exits() -> Any:
    node = Node()
    results = {
        "none": node.run("w1", do="exit", value=None),
        "zero": node.run("w2", do="exit", value=0),
        "three": node.run("w3", do="exit", value=3),
        "sys_exit": node.run("w4", do="sys_exit", value=4),
        "sys_exit_text": node.run("w5", do="sys_exit", value="text of sys.exit"),
        "raise": node.run("w6", do="raise"),
        "segfault": node.run("w7", do="segfault"),
        "handlers": node.run("w8", do="exit_handlers"),
        "print": node.run("w9", do="print"),
        "allocate": node.run("w10", do="allocate", bytes=150 << 20),
    }
    results["zygote"] = node.zygote.close()
    return results


def describe() -> Any:
    os.environ["REMOVED_HERE"] = "1"
    secret = os.open(__file__, os.O_RDONLY)  # stands for the node's locks
    os.set_inheritable(secret, True)
    node = Node()
    env = {"SET_HERE": "yes", "REMOVED_HERE": None}
    runs = [json.loads(node.run(f"w{i}", do="describe", env=env)["stdout"]) for i in range(2)]
    node.zygote.close()
    return {"runs": runs, "own_session_id": os.getsid(0), "zygote_pid": node.zygote.pid}


def kills() -> Any:
    node = Node()
    forked = node.fork("w1", do="sleep")
    node.zygote.kill_worker("w1", signal.SIGKILL)
    node.wait(lambda: bool(node.of(WorkerExited, "w1")))
    node.zygote.kill_worker("w1", signal.SIGKILL)  # too late: nothing happens
    node.zygote.kill_worker("never", signal.SIGKILL)
    interrupted = node.fork("w2", do="sleep")
    assert os.read(interrupted.stdout_fd, 100) == b"sleeping\n"
    node.zygote.kill_worker("w2", signal.SIGINT)
    node.wait(lambda: bool(node.of(WorkerExited, "w2")))
    output = os.read(interrupted.stdout_fd, 100).decode()
    node.zygote.close()
    codes = [event.exit_code for event in node.of(WorkerExited)]
    return {"codes": codes, "output": output, "is_gone": not Path(f"/proc/{forked.pid}").exists()}


def many() -> Any:
    """Far more requests at once than a socket's buffer holds, many times over."""
    node = Node()
    node.run("w-first", do="exit", value=0)
    node.events = [event for event in node.events if not isinstance(event, WorkerForked)]
    before = open_descriptors(os.getpid()), open_descriptors(node.zygote.pid)
    number = 0
    for _ in range(4):
        for _ in range(300):
            number += 1
            node.zygote.fork_worker(f"w{number}", {"do": "exit", "value": 0, "padding": b"x" * 2000})
            for _ in range(3):
                node.zygote.kill_worker("never", 9)
        while len(node.of(WorkerExited)) <= number:
            node.wait(lambda: bool(node.of(WorkerForked)) or len(node.of(WorkerExited)) > number)
            for forked in node.of(WorkerForked):
                os.close(forked.stdout_fd)
                os.close(forked.stderr_fd)
            node.events = [event for event in node.events if not isinstance(event, WorkerForked)]
    after = open_descriptors(os.getpid()), open_descriptors(node.zygote.pid)
    codes = {event.exit_code for event in node.of(WorkerExited)}
    children = Path(f"/proc/{node.zygote.pid}/task/{node.zygote.pid}/children").read_text()
    node.zygote.close()
    return {
        "before": before,
        "after": after,
        "codes": sorted(codes),
        "children": children,
        "failed": len(node.of(ForkFailed)),
    }


def fork_fails() -> Any:
    """The zygote has no room for the pipes; once it has, it forks again."""
    import resource

    node = Node()
    node.run("w1", do="exit", value=0)
    resource.prlimit(node.zygote.pid, resource.RLIMIT_NOFILE, (6, 1024))
    node.zygote.fork_worker("w2", {"do": "exit", "value": 0})
    node.wait(lambda: bool(node.of(ForkFailed)))
    resource.prlimit(node.zygote.pid, resource.RLIMIT_NOFILE, (1024, 1024))
    again = node.run("w3", do="exit", value=0)
    node.zygote.close()
    return {"reason": node.of(ForkFailed)[0].reason, "again": again["code"]}


def no_room_for_pipes() -> Any:
    """The node itself cannot take the pipes over: it hears of a failed fork, and of nothing else."""
    import resource

    node = Node()
    node.run("w1", do="exit", value=0)
    limit = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 1024))
    node.zygote.fork_worker("w2", {"do": "sleep"})
    node.wait(lambda: bool(node.of(ForkFailed)))
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    again = node.run("w3", do="exit", value=0)
    exited = [event.worker_id for event in node.of(WorkerExited)]
    node.zygote.close()
    return {"reason": node.of(ForkFailed)[0].reason, "again": again["code"], "exited": exited}


def zygote_dies() -> Any:
    node = Node()
    pids = [node.fork(f"w{i}", do="sleep").pid for i in range(3)]
    os.kill(node.zygote.pid, signal.SIGKILL)
    node.wait(lambda: bool(node.of(ZygoteDied)))
    died = node.of(ZygoteDied)[0]
    try:
        node.zygote.fork_worker("w9", {"do": "sleep"})
        error = ""
    except RuntimeError as refused:
        error = str(refused)
    return {"code": died.exit_code, "pids": pids, "error": error, "fileno": node.zygote.fileno()}


def zygote_stopped() -> Any:
    """What shows that it does not answer; it goes on, and is stopped again and ended."""
    node = Node()
    forked = node.fork("w1", do="sleep")
    asked = [node.zygote.is_asked]
    os.kill(node.zygote.pid, signal.SIGSTOP)
    node.zygote.kill_worker("w1", signal.SIGKILL)
    heard = node.zygote.heard
    node.zygote.probe()
    node.events += node.zygote.read_events()
    asked.append(node.zygote.is_asked)
    is_silent = node.zygote.heard == heard
    os.kill(node.zygote.pid, signal.SIGCONT)
    node.wait(lambda: bool(node.of(WorkerExited)) and not node.zygote.is_asked)
    answers = node.zygote.heard - heard
    second = node.fork("w2", do="sleep")
    os.kill(node.zygote.pid, signal.SIGSTOP)
    node.zygote.end_stuck("it did not answer")
    node.wait(lambda: bool(node.of(ZygoteDied)))
    died = node.of(ZygoteDied)[0]
    pids = [forked.pid, second.pid, node.zygote.pid]
    return {"asked": asked, "is_silent": is_silent, "answers": answers, "reason": died.reason, "pids": pids}


def node_dies() -> Any:
    node = Node()
    pids = [node.zygote.pid] + [node.fork(f"w{i}", do="sleep").pid for i in range(3)]
    print(json.dumps(pids), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def close_ends_all() -> Any:
    node = Node()
    pids = [node.zygote.pid] + [node.fork(f"w{i}", do="sleep").pid for i in range(3)]
    code = node.zygote.close()
    return {"code": code, "alive": [pid for pid in pids if Path(f"/proc/{pid}").exists()]}


def bad_module() -> Any:
    node = Node("module_that_is_not_there")
    node.zygote.fork_worker("w1", {})
    node.wait(lambda: bool(node.of(ZygoteDied)))
    died = node.of(ZygoteDied)[0]
    return {"code": died.exit_code, "reason": died.reason}


def preloads() -> Any:
    node = Node()
    before = json.loads(node.run("w1", do="describe")["stdout"])["preloaded"]
    node.zygote.preload(("colorsys",))
    node.wait(lambda: len(node.of(Preloaded)) == 1)
    after = json.loads(node.run("w2", do="describe")["stdout"])["preloaded"]
    node.zygote.preload(("zygote_threaded_module",))
    node.zygote.preload(("module_that_is_not_there",))
    node.wait(lambda: len(node.of(Preloaded)) == 3)
    threads = len(os.listdir(f"/proc/{node.zygote.pid}/task"))
    still_forks = node.run("w3", do="exit", value=0)["code"]
    node.zygote.close()
    reasons = {event.modules[0]: event.reason for event in node.of(Preloaded)}
    return {
        "before": before,
        "after": after,
        "reasons": reasons,
        "threads": threads,
        "still_forks": still_forks,
    }


def refuses() -> Any:
    node = Node()
    errors = []
    for spec in ({"large": b"x" * (1 << 20)}, {"object": object()}):
        try:
            node.zygote.fork_worker("w1", spec)
        except ValueError as error:
            errors.append(str(error))
    still_forks = node.run("w2", do="exit", value=0)["code"]
    node.zygote.close()
    return {"errors": errors, "still_forks": still_forks}


def measure() -> Any:
    """Time from the request to the news of the fork, and memory of an idle worker."""
    node = Node()
    for descriptor in _pipes(node.fork("w-first", do="sleep")):
        os.close(descriptor)
    times_ms = []
    for number in range(50):
        started_s = time.perf_counter()
        forked = node.fork(f"w{number}", do="sleep")
        times_ms.append((time.perf_counter() - started_s) * 1000)
        os.read(forked.stdout_fd, 100)
    rollup = Path(f"/proc/{forked.pid}/smaps_rollup").read_text()
    sizes_kib = {line.split()[0]: int(line.split()[1]) for line in rollup.splitlines() if line.endswith("kB")}
    node.zygote.close()
    return {"times_ms": sorted(times_ms), "sizes_kib": sizes_kib}


def _pipes(forked: WorkerForked) -> tuple[int, int]:
    return forked.stdout_fd, forked.stderr_fd


if __name__ == "__main__":
    found = globals()[sys.argv[1]]()
    print(json.dumps(found))
