"""What simulated programs do with child processes: as client/child_process.py and worker/child.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.simulation.client import Client
from clusterpool.simulation.programs import Operation, Outcome, expected
from clusterpool.simulation.references import Ref
from clusterpool.simulation.threads import Pause, Steps

if TYPE_CHECKING:
    from clusterpool.simulation.worker import Worker
    from clusterpool.simulation.workloads import Script

SIGTERM, SIGKILL = 15, 9


class ChildPlan(msgspec.Struct, frozen=True, array_like=True):
    """What a child does: runs for so long, then ends with this code. `outlives_us`: its parent does not wait for it."""

    runs_s: float
    exit_code: int
    signal: int = 0  # that its parent sends it, when half of the time is over
    size_bytes: int = 8  # of what it is given
    outlives_us: bool = False


class FamilyPlan(msgspec.Struct, frozen=True, array_like=True):
    """What a task does that is a parent."""

    children: list[ChildPlan]


class SimulatedChild:
    """One child, as its parent sees it."""

    def __init__(self, parent: Client, plan: ChildPlan) -> None:
        self.plan = plan
        self.process_id = ""
        self.is_loaded = False
        self.exit_code: int | None = None
        self.failure: Outcome | None = None
        self._parent = parent
        self.number = _open_sink(parent, self._told)
        demand = m.WorkerDemand(m.WorkerKind.GROUP, {}, "child", outlives_owner=True)
        setup = e.SetupPlan("child", {}, msgspec.msgpack.encode(plan), [])
        parent.event(e.ChildOpened(self.number, demand, setup, parent.job))

    def _told(self, command: Any) -> None:
        monitor, who = self._parent.world.monitor, f"child {self.number} of {self._parent.name}"
        monitor.check(self.exit_code is None and self.failure is None, f"{who} has ended, and then: {command}")
        if isinstance(command, e.ChildStarted):
            monitor.check(not self.process_id, f"{who} was started twice")
            self.process_id = command.worker.address.process_id
        elif isinstance(command, e.ChildLoaded):
            monitor.check(bool(self.process_id), f"{who} has what it was given before it was started")
            self.is_loaded = True
        elif isinstance(command, e.ChildEnded):
            monitor.check(bool(self.process_id), f"{who} has ended and was never started")
            self.exit_code = command.exit_code
        elif isinstance(command, e.ChildFailed):
            monitor.check(not self.process_id, f"{who} could not be started, and was")
            self.failure = Outcome(command.kind, 0, text=command.text)

    def run(self) -> Steps:
        """From the start to the end."""
        parent, plan = self._parent, self.plan
        yield from parent.wait_until(lambda: bool(self.process_id) or self.failure is not None)
        if plan.signal:
            yield Pause(plan.runs_s / 2)
            parent.event(e.ChildSignalled(self.number, plan.signal))
            parent.turn()
        if not plan.outlives_us:
            yield from parent.wait_until(lambda: self.exit_code is not None or self.failure is not None)
            self.judge()

    def judge(self) -> None:
        """Its exit code must be its own."""
        world, plan = self._parent.world, self.plan
        who = f"child {self.number} of {self._parent.name} ({self.process_id})"
        if self.failure is not None:
            world.monitor.judge(self._parent, who, self.failure, Outcome("ok", 0))
            return
        world.monitor.outcomes += 1
        wanted = {-plan.signal} if plan.signal else {plan.exit_code}
        if plan.signal:
            wanted.add(plan.exit_code)  # it may have ended before
        child: Any = world.clients[self.process_id]
        is_lost = world.evidence.has_ended_by_fault(child.address)
        if child.address.node_id not in world.evidence.over:
            world.monitor.check(not child.is_alive, f"{who} is said to have ended with {self.exit_code}, and lives")
            own = child.exit_code
            world.monitor.check(self.exit_code == own, f"{who} ended with {own}, its parent was told {self.exit_code}")
        world.monitor.check(
            is_lost or self.exit_code in wanted,
            f"{who} ended with {self.exit_code}, not {wanted}; of: {world.evidence.cause_of(self.process_id)}",
        )


def _open_sink(client: Client, sink: Any) -> int:
    number = next(client.set_numbers)
    client.set_sinks[number] = sink
    return number


def run_child(worker: Worker, parent: m.Address, setup: m.SetupWorker) -> Steps:
    """In a child: what it is for; the exit code."""
    plan = msgspec.msgpack.decode(setup.payload, type=ChildPlan)
    seen: list[Any] = []
    number = _open_sink(worker, seen.append)
    worker.event(e.ProcessWatched(number, parent))
    worker.send(parent, m.WorkerReady(setup.lease))
    yield Pause(plan.runs_s)
    world = worker.world
    world.monitor.check(len(seen) <= 1, f"{worker.name} was told {len(seen)} times that its parent has ended")
    if seen:
        is_over = world.evidence.has_gone(parent)
        world.monitor.check(is_over, f"{worker.name} was told that its parent {parent} has ended, and it lives")
    return plan.exit_code


def children(script: Script) -> Steps:
    """The driver, and tasks of its, start processes, wait for them, send them signals, or leave them behind."""
    driver, random = script.driver, script.random
    refs: list[tuple[Ref, Operation]] = []
    for _ in range(random.choice((0, 1, 3))):
        plan = FamilyPlan([_draw(script) for _ in range(random.randint(1, 2))])
        operation = script.operation(
            fails=False, result_bytes=8, family=msgspec.msgpack.encode(plan), deaths=random.choice((0, 0, 0, 1))
        )
        refs.append((script.submit(operation), operation))
    own = [SimulatedChild(driver, _draw(script)) for _ in range(script.count(1, 5))]
    ended: list[SimulatedChild] = []

    def attend(child: SimulatedChild) -> Steps:
        yield from child.run()
        ended.append(child)

    for child in own:
        driver.run_quietly(attend(child))
    yield from driver.wait_until(lambda: len(ended) == len(own))
    for ref, operation in refs:
        yield from script.settle(ref, expected(operation), "parent")
    # Those that nobody has waited for.
    yield from driver.wait_until(lambda: all(child.exit_code is not None or child.failure for child in own))
    for child in own:
        if child.plan.outlives_us:
            child.judge()


def _draw(script: Script) -> ChildPlan:
    random = script.random
    return ChildPlan(
        random.choice((0.0, 0.002, 0.05, 0.5, 3.0)), random.choice((0, 0, 1, 3)),
        signal=random.choice((SIGTERM, SIGKILL)) if random.random() < 0.2 else 0,
        outlives_us=random.random() < 0.15,
    )  # fmt: skip


def be_parent(worker: Worker, operation: Operation) -> Steps:
    """In a task: start children, and wait for most of them; some parents die meanwhile."""
    plan = msgspec.msgpack.decode(operation.family, type=FamilyPlan)
    family = [SimulatedChild(worker, child) for child in plan.children]
    yield from worker.maybe_die(operation)
    for child in family:
        yield from child.run()
