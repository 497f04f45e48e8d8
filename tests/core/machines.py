"""Values and small drivers that the tests of the core's machines share."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, TypeVar

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.dispatch import Task
from clusterpool.core.messages import Address, Reference, TaskResult, TaskSpec, TaskStatus, WorkerKind
from clusterpool.core.owner import OwnerMachine

T = TypeVar("T")

NODE = Address("n1", "n1")
DRIVER = Address("n1", "d1")
JOB = m.JobPart(
    job_id="j1", namespace="", host="h1", cwd="/", sys_path=[], main_path="", env={}, runtime_env="", owner=DRIVER
)


def make_task(
    number: int, *, function: int = 1, retries: int = 0, sink: Any = "sink", payload: bytes = b"", **extras: Any
) -> Task:
    """A task; with extras when some are given."""
    spec = TaskSpec(number, function, m.TaskKind.CALL, payload, m.TaskExtras(**extras) if extras else None)
    return Task(spec, sink, 0, retries)


def make_result(number: int, status: int = TaskStatus.OK, payload: bytes = b"value") -> TaskResult:
    return TaskResult(number, status, payload)


def make_worker(name: str, *, lease: int = 1, node_id: str = "n1") -> m.WorkerPart:
    return m.WorkerPart(Address(node_id, name), 100 + lease, "h1", lease)


def sent(commands: Iterable[Any], kind: type[T], to: Address | None = None) -> list[T]:
    """The messages of this type that the commands send (to one process)."""
    return [
        command.message
        for command in commands
        if isinstance(command, e.Send)
        and isinstance(command.message, kind)
        and (to is None or command.destination == to)
    ]


def of_type(commands: Iterable[Any], kind: type[T]) -> list[T]:
    return [command for command in commands if isinstance(command, kind)]


class Owner:
    """An owner's machine with a clock, and shorthands for what usually happens to it."""

    def __init__(self, address: Address = DRIVER) -> None:
        self.now_s = 100.0
        self.numbers = itertools.count(1000, 1000)
        self.machine = OwnerMachine(address, job=JOB, numbers=self.numbers, requests=itertools.count(1))

    def handle(self, event: e.Event) -> list[Any]:
        return self.machine.handle(event, self.now_s)

    def hear(self, source: Address, message: m.Message) -> list[Any]:
        return self.handle(e.MessageArrived(source, message))

    def open_set(self, number: int = 1, *, size: int | None = None, runs_max: int | None = None) -> list[Any]:
        kind = WorkerKind.TASK if size is None else WorkerKind.GROUP
        resources = {"CPU": 1.0} if size is None else {}
        self.handle(e.FunctionAdded(1, b"function"))
        demand = m.WorkerDemand(kind, resources)
        return self.handle(e.SetOpened(number, demand, e.SetupPlan(), size, runs_max))

    def submit(self, *tasks: Task, set_number: int = 1) -> list[Any]:
        return self.handle(e.TasksSubmitted(set_number, list(tasks)))

    def grant(self, request: int, name: str, *, lease: int = 1, node_id: str = "n1") -> list[Any]:
        worker = make_worker(name, lease=lease, node_id=node_id)
        commands = self.hear(NODE, m.WorkerGranted(request, worker))
        if sent(commands, m.SetupWorker):
            commands += self.hear(worker.address, m.WorkerReady(lease))
        return commands

    def finish(self, name: str, *results: TaskResult, node_id: str = "n1", run_ns: int = 10**8) -> list[Any]:
        return self.hear(Address(node_id, name), m.TasksFinished(list(results), run_ns))

    def put(self, number: int, value: m.ValuePart | None = None) -> Reference:
        self.handle(e.ValuePut(number, value or m.ValuePart(payload=b"v")))
        return Reference(self.machine.address, number)

    def value_of(self, reference: Reference) -> m.ValuePart | None:
        return self.machine.objects.table.value_of(reference)
