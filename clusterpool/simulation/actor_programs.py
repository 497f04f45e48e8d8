"""What simulated drivers do with actors that are started again: with checkpoints or without, detached, by tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.actor_messages import ActorCreation, encode_creation
from clusterpool.core.dispatch import Task
from clusterpool.core.messages import ActorPart, ActorPlan, Reference, TaskExtras, TaskKind, TaskSpec
from clusterpool.simulation.client import Client
from clusterpool.simulation.ledger import CallJudge, Promise
from clusterpool.simulation.programs import Operation, encode_operation, expected, mix
from clusterpool.simulation.references import Ref
from clusterpool.simulation.threads import Pause, Steps

if TYPE_CHECKING:
    from clusterpool.simulation.workloads import Script

_DURATIONS_S = (0.0, 0.0, 0.0002, 0.004, 0.03)


class SimulatedHandle:
    """An actor as its maker has it. `lifetime`: None if it is detached."""

    def __init__(self, part: ActorPart, promise: Promise, lifetime: Ref | None) -> None:
        self.part = part
        self.promise = promise
        self.lifetime = lifetime


def draw_promise(script: Script, *, is_detached: bool) -> Promise:
    """What the maker asks for."""
    random = script.random
    restarts = random.choice((-1, -1, 1, 3))
    return Promise(restarts, random.choice((-1, -1, 0, 2)), random.random() < 0.6, is_detached)


def make_actor(script: Script, promise: Promise) -> Steps:
    """Make an actor; its handle, or None if it could not be made."""
    driver, random = script.driver, script.random
    actor_id = f"a{driver.world.next_number()}"
    name = actor_id if promise.is_detached else ""
    part = ActorPart(
        actor_id, "Counter", {"call": 1}, None, "pending", name=name, detached=promise.is_detached,
        job_id=driver.job.job_id, restarts=promise.restarts, retries=promise.retries, is_logged=promise.is_logged,
    )  # fmt: skip
    driver.world.ledger.promised(actor_id, promise)
    plan = None
    if promise.is_logged:
        every, period_s = random.choice(((1, -1.0), (3, -1.0), (10, -1.0), (0, 0.0), (0, 0.05), (100, 5.0)))
        plan = ActorPlan(actor_id, every, period_s)
    # The constructor, too, may end its process; only with a last restart left is the actor sure to come.
    deaths = 1 if promise.restarts == -1 and random.random() < 0.1 else 0
    operation = Operation(
        mix(script.name, actor_id), random.choice(_DURATIONS_S), caller=actor_id, deaths=deaths, dies_late=deaths > 0
    )
    extras = TaskExtras(1, "Counter", 1, actor=plan)
    demand = m.WorkerDemand(m.WorkerKind.ACTOR, {}, "Counter", actor_id=actor_id)
    if promise.is_detached:
        spec = TaskSpec(1, 1, TaskKind.CREATE_ACTOR, encode_operation(operation), extras)
        job = msgspec.structs.replace(driver.job, detached=True)
        creation = encode_creation(ActorCreation(demand, job, {}, "Counter", b"class", spec))
        answer = yield from driver.ask(lambda request: m.RegisterActor(request, part, False, creation), lambda: None)
        if answer.actor.state != "pending":
            return None
        driver.event(e.ActorMet(part, None))
        return SimulatedHandle(part, promise, None)
    number = next(driver.numbers)
    function = driver.function_of(Operation(0, 0.0))
    task = Task(TaskSpec(number, function, TaskKind.CREATE_ACTOR, encode_operation(operation), extras), None, 0)
    driver.send(driver.node, m.RegisterActor(0, part))
    lifetime = yield from driver.put(0, 8)
    assert isinstance(lifetime, Ref)
    driver.event(e.ActorOpened(part, demand, e.SetupPlan("Counter"), task, None, lifetime.part.number))
    return SimulatedHandle(part, promise, lifetime)


class Calls:
    """Calls of one caller to one actor, and what has come of them."""

    def __init__(self, client: Client, handle: SimulatedHandle, caller: str) -> None:
        self._client = client
        self._handle = handle
        self._caller = caller
        self._calls: list[tuple[Ref, Operation]] = []
        self._judge = CallJudge(client, handle.part.actor_id, f"{caller} call")
        self._index = 0

    def call(self, salt: int, duration_s: float, *, deaths: int = 0, dies_late: bool = False) -> None:
        """One more."""
        operation = Operation(
            salt, duration_s, caller=self._caller, index=self._index, deaths=deaths, dies_late=dies_late
        )
        self._index += 1
        part, retries = self._handle.part, self._handle.promise.retries
        self._calls.append((self._client.call_actor(part.actor_id, operation, retries=retries), operation))

    def settle(self, count: int | None = None) -> Steps:
        """Get and judge the first `count` of those that are open, or all."""
        taken = self._calls[:count]
        del self._calls[: len(taken)]
        for ref, operation in taken:
            outcome = yield from self._client.get(ref)
            self._judge.judge(operation, outcome)
            ref.drop()


def restarting_actor(script: Script) -> Steps:
    """An actor that comes again when its process dies, also by what its calls do."""
    yield from _use_actor(script, draw_promise(script, is_detached=False))


def detached_actor(script: Script) -> Steps:
    """One that nodes make, and make again."""
    yield from _use_actor(script, draw_promise(script, is_detached=True))


def _use_actor(script: Script, promise: Promise) -> Steps:
    driver, random = script.driver, script.random
    handle = yield from make_actor(script, promise)
    if handle is None:
        return
    actor_id = handle.part.actor_id
    calls = Calls(driver, handle, driver.name + actor_id)
    for index in range(script.count(3, 25)):
        is_deadly = random.random() < 0.08
        deaths = random.choice((1, 1, 2)) if is_deadly else 0
        salt = mix(script.name, actor_id, index)
        calls.call(salt, random.choice(_DURATIONS_S), deaths=deaths, dies_late=random.random() < 0.5)
        if random.random() < 0.15:
            yield Pause(random.choice((0.005, 0.05, 0.5)))
        if random.random() < 0.2:
            yield from calls.settle(random.randint(1, 3))
        if random.random() < 0.03:
            channel = driver.machine.actors.channels.get(actor_id)
            if channel is not None and channel.address is not None:
                driver.world.ledger.killed.add(actor_id)
                driver.send(driver.node, m.KillActor(actor_id, channel.address, False, True))
    tasks = _callers(script, handle) if random.random() < 0.5 else []
    if handle.lifetime is not None and random.random() < 0.4:
        handle.lifetime.drop()  # it ends with its last call
    yield from calls.settle()
    for ref, operation in tasks:
        yield from script.settle(ref, expected(operation), "caller of an actor")
    if handle.lifetime is not None:
        handle.lifetime.drop()
    else:
        driver.world.ledger.killed.add(actor_id)
        driver.send(driver.node, m.KillActor(actor_id, None, True, True))
        driver.event(e.ActorKilled(actor_id, "killed"))


def _callers(script: Script, handle: SimulatedHandle) -> list[tuple[Ref, Operation]]:
    """Tasks that call the actor, each a caller of its own."""
    operations = [
        script.operation(fails=False, handle=msgspec.msgpack.encode(handle.part)) for _ in range(script.count(1, 4))
    ]
    inner = [handle.lifetime] if handle.lifetime is not None else []
    return [(script.submit(operation, [], inner), operation) for operation in operations]


def call_from_task(worker: Client, operation: Operation, references: list[Reference]) -> Steps:
    """In a task: call the actor whose handle it got; judge what comes."""
    part = msgspec.msgpack.decode(operation.handle, type=ActorPart)
    lifetime = Ref(worker, references[0], is_counted=False) if references else None
    try:
        worker.event(e.ActorMet(part, lifetime.part if lifetime is not None else None))
        promise = Promise(part.restarts, part.retries, part.is_logged, part.detached)
        caller = f"{worker.name}/{worker.world.next_number()}"
        calls = Calls(worker, SimulatedHandle(part, promise, lifetime), caller)
        for index in range(1 + operation.salt % 8):
            calls.call(mix(operation.salt, caller, index), _DURATIONS_S[index % len(_DURATIONS_S)])
        yield from calls.settle()
    finally:
        if lifetime is not None:
            lifetime.drop()
