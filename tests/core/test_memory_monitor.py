from __future__ import annotations

import itertools
from typing import Any

import pytest

from clusterpool.core import messages as m
from clusterpool.core.memory_monitor import (
    INTERVAL_MAX_S,
    INTERVAL_MIN_S,
    PATIENCE_S,
    WARNING_INTERVAL_S,
    MemoryMonitor,
)
from clusterpool.core.messages import SIGKILL, EndCause, WorkerKind
from clusterpool.core.node_events import EndWorker, ForkWorker, MemoryRead, ReadMemory, Send, WarnOfMemory, WorkerEnded
from clusterpool.core.scheduler import Scheduler
from tests.core.machines import DRIVER, JOB

GB = 10**9
LIMIT = 10 * GB


class Node:
    """A scheduler with workers, its monitor, and a clock."""

    def __init__(self) -> None:
        names = (f"w{number}" for number in itertools.count(1))
        self.scheduler = Scheduler("n1", "h1", {"CPU": 8.0}, process_ids=names)
        self.monitor = MemoryMonitor(self.scheduler)
        self.requests = itertools.count(1)
        self.now_s = 100.0

    def lease(self, kind: int = WorkerKind.TASK, **demand: Any) -> str:
        """The process id of a new worker, whose name is that of its kind."""
        wanted = m.WorkerDemand(kind, {} if kind == WorkerKind.GROUP else {"CPU": 1.0}, WorkerKind(kind).name, **demand)
        commands = self.scheduler.requested(DRIVER, m.RequestWorkers(next(self.requests), 1, wanted, JOB))
        (fork,) = [command for command in commands if isinstance(command, ForkWorker)]
        self.scheduler.worker_joined(fork.process_id, 4711)
        return fork.process_id

    def release(self, process_id: str) -> None:
        lease = self.scheduler.workers[process_id].lease
        assert lease is not None
        self.scheduler.released(DRIVER, m.ReleaseWorkers([lease.number], False))

    def read(self, used: float, **gb_by_worker: float) -> list[Any]:
        sizes = {name: int(size * GB) for name, size in gb_by_worker.items()} or None
        return self.monitor.handle(MemoryRead(int(used * GB), LIMIT, "the machine's memory", GB, sizes), self.now_s)

    def end(self, process_id: str) -> None:
        self.scheduler.worker_ended(WorkerEnded(process_id, -SIGKILL, "killed"))


@pytest.fixture
def node() -> Node:
    return Node()


def ended(commands: list[Any]) -> list[str]:
    return [command.process_id for command in commands if isinstance(command, EndWorker)]


@pytest.mark.parametrize(
    ("used", "wait_s"),
    [
        (0.0, INTERVAL_MAX_S),
        (8.9, INTERVAL_MAX_S),  # 0.6 GB of room: at 2 GB/s that lasts for 0.3 s
        (9.3, 0.1),
        (9.49, INTERVAL_MIN_S),
    ],
)
def test_readings_come_sooner_as_room_gets_scarce(used: float, wait_s: float, node: Node) -> None:
    (command,) = node.read(used)
    assert command.after_s == pytest.approx(wait_s)
    assert not command.with_workers


def test_what_workers_have_is_asked_for_only_at_the_threshold(node: Node) -> None:
    node.lease()
    assert node.read(9.6) == [ReadMemory(0.0, True)]


@pytest.mark.parametrize(
    ("kinds", "sizes", "victim"),
    [
        (["task", "task"], [4, 4], "w2"),  # the newest of those that are alike
        (["task", "task"], [4, 1], "w1"),  # the newest gives back little
        (["task", "task"], [4, 2.5], "w2"),  # both are large
        (["task", "idle"], [4, 1], "w2"),  # nobody loses an idle one
        (["task", "idle"], [4, 0.1], "w1"),  # which gives back next to nothing
        (["task", "actor"], [1, 6], "w1"),  # an actor's state cannot be made again
        (["actor", "task"], [6, 0.1], "w1"),  # but if only its end helps
        (["retried", "once"], [3, 3], "w1"),
        (["once", "actor", "process"], [2, 3, 3], "w1"),
        (["process"], [9], "w1"),
        (["actor", "process"], [3, 3], "w2"),
    ],
)
def test_who_goes(kinds: list[str], sizes: list[float], victim: str, node: Node) -> None:
    for kind in kinds:
        if kind == "process":
            node.lease(WorkerKind.GROUP, outlives_owner=True)
        elif kind in ("retried", "once"):
            node.lease(WorkerKind.GROUP, is_retriable=kind == "retried")
        else:
            process_id = node.lease(WorkerKind.ACTOR if kind == "actor" else WorkerKind.TASK)
            if kind == "idle":
                node.release(process_id)
    assert ended(node.read(9.9, **{f"w{number}": size for number, size in enumerate(sizes, 1)})) == [victim]


def test_one_reading_ends_one_worker_and_nothing_more_until_it_is_gone(node: Node) -> None:
    for _ in range(3):
        node.lease()
    sizes = {"w1": 3.0, "w2": 3.0, "w3": 3.0}
    assert ended(node.read(9.9, **sizes)) == ["w3"]
    node.now_s += 0.1
    assert ended(node.read(9.9, **sizes)) == []  # it is still being torn down
    node.end("w3")
    del sizes["w3"]
    assert ended(node.read(6.9, **sizes)) == []
    assert ended(node.read(9.9, **sizes)) == ["w2"]


def test_a_worker_that_cannot_die_is_not_waited_for_without_end(node: Node) -> None:
    node.lease()
    node.lease()
    assert ended(node.read(9.9, w1=3, w2=3)) == ["w2"]
    node.now_s += PATIENCE_S
    assert ended(node.read(9.9, w1=3, w2=3)) == ["w1"]


def test_when_others_use_the_memory_no_worker_is_ended_and_that_is_said_once(node: Node) -> None:
    node.lease()
    commands = node.read(9.9, w1=0.02)
    assert ended(commands) == []
    (warning,) = [command for command in commands if isinstance(command, WarnOfMemory)]
    assert "something else on this machine uses it" in warning.text
    assert node.read(9.9, w1=0.02) == [ReadMemory(INTERVAL_MAX_S, False)]
    node.now_s += WARNING_INTERVAL_S
    assert len(node.read(9.9, w1=0.02)) == 2


def test_the_owner_is_told_how_it_came_to_it(node: Node) -> None:
    node.lease()
    node.lease()
    commands = node.read(9.9, w1=1, w2=5)
    (lines,) = [command.message for command in commands if isinstance(command, Send)]
    assert isinstance(lines, m.LogLines)
    (text,) = lines.lines
    for words in (
        "worker w2 (TASK, pid 4711) on node n1 was ended by its node because memory was about to run out",
        "9.9 GB of 10.0 GB of the machine's memory were in use (99 %; 95 % are allowed), 5.0 GB of them by this worker",
        "the most memory had TASK (pid 4711) 5.0 GB, TASK (pid 4711) 1.0 GB, the object store 1.0 GB",
        "memory=",
    ):
        assert words in text
    (gone,) = node.scheduler.worker_ended(WorkerEnded("w2", -SIGKILL, "killed by signal 9", 7, 6 * GB))[:1]
    assert isinstance(gone, Send)
    exited = gone.message
    assert isinstance(exited, m.WorkerExited)
    assert (exited.text, exited.cause, exited.peak_bytes) == (text, EndCause.OUT_OF_MEMORY, 6 * GB)


def test_no_workers_no_victim(node: Node) -> None:
    assert ended(node.read(9.9)) == []
    assert ended(node.monitor.handle(MemoryRead(LIMIT, LIMIT, "the machine's memory", 0, {}), 1.0)) == []


def test_a_process_that_lives_on_after_a_signal_can_still_be_ended(node: Node) -> None:
    process_id = node.lease(WorkerKind.GROUP, outlives_owner=True)
    lease = node.scheduler.workers[process_id].lease
    assert lease is not None
    sigint = 2
    node.scheduler.kill(DRIVER, m.KillWorker(lease.number, sigint, "its parent has sent it the signal"), 0.0)
    assert ended(node.read(9.6, **{process_id: 8})) == [process_id]
