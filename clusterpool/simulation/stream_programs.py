"""Generator tasks: how a simulated worker runs one, and what programs do with what it yields.

The worker's side is as worker/calls.py and worker/streams.py, the taker's as client/remote_function.py; how far a
generator may run ahead of its taker the very machine of the core decides.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import msgspec

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.dispatch import Task
from clusterpool.core.messages import Address, TaskExtras, TaskKind, TaskResult, TaskSpec, TaskStatus
from clusterpool.core.object_names import object_id
from clusterpool.core.stream_pace import ProducerPace
from clusterpool.simulation.programs import Failed, Operation, Outcome, encode_operation, expected, mix, put_number
from clusterpool.simulation.references import Ref
from clusterpool.simulation.threads import Pause, Steps

if TYPE_CHECKING:
    from clusterpool.simulation.client import Client
    from clusterpool.simulation.worker import Worker
    from clusterpool.simulation.workloads import Script
    from clusterpool.simulation.world import World

PACES_MAX = 10_000


class StreamPlan(msgspec.Struct, frozen=True, array_like=True):
    """What a generator does: items of these sizes, each after `gap_s`."""

    sizes_bytes: list[int]
    gap_s: float = 0.0
    buffer: int = 0  # as TaskExtras.stream_buffer
    dies_at: int = -1  # before this item it ends its process, as often as the operation says
    fails_at: int = -1  # instead of this item it raises
    is_boxed: bool = False  # each item has a reference in it


class Reading(msgspec.Struct, frozen=True, array_like=True):
    """How somebody takes a stream: with which pauses, when each item's value is read, and where they stop."""

    pause_s: float = 0.0
    keeps: bool = False  # references are gathered, and read at the end
    rest_s: float = 0.0  # before those are read
    stops_at: int = -1  # the stream is closed after so many items
    is_forgotten: bool = False  # what was gathered is let go without a look


class StreamLedger:
    """How far takers are, in one world: a generator may only be so far ahead."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._begun: dict[int, int] = {}  # by salt
        self._taken: dict[int, int] = {}

    def begun(self, salt: int) -> None:
        """A generator starts."""
        self._begun[salt] = self._begun.get(salt, 0) + 1

    def taken(self, salt: int, count: int) -> None:
        """Somebody has taken so many of its items."""
        self._taken[salt] = count

    def closed(self, salt: int) -> None:
        """Nobody takes any more: its owner asks for all that still comes."""
        self._taken[salt] = 1 << 62

    def sends(self, salt: int, index: int, buffer: int) -> None:
        """It sends an item. Of a second run, the owner asks for the first items at once."""
        if buffer > 0 and self._begun[salt] == 1:
            ahead = index + 1 - self._taken.get(salt, 0)
            self._world.monitor.check(ahead <= buffer, f"a generator is {ahead} items ahead of a buffer of {buffer}")


# --- the worker


class StreamPaces:
    """By task: as worker/streams.py."""

    def __init__(self) -> None:
        self._paces: dict[tuple[Address, int], ProducerPace] = {}

    def taken(self, source: Address, message: m.StreamTaken) -> None:
        """The owner has taken so many items."""
        self.pace((source, message.number)).taken(message.taken)

    def pace(self, key: tuple[Address, int]) -> ProducerPace:
        """That of a task, from now on."""
        pace = self._paces.get(key)
        if pace is None:
            pace = self._paces[key] = ProducerPace()
            if len(self._paces) > PACES_MAX:
                del self._paces[next(iter(self._paces))]
        return pace

    def close(self, key: tuple[Address, int]) -> None:
        """The generator has ended."""
        self._paces.pop(key, None)


def generate(worker: Worker, owner: Address, spec: TaskSpec, operation: Operation, arguments: list[int]) -> Steps:
    """Run a generator task; its result.

    Raises: Failed.
    """
    plan = msgspec.msgpack.decode(operation.stream, type=StreamPlan)
    assert spec.extras is not None
    key = (owner, spec.number)
    pace = worker.paces.pace(key)
    pace.bound(spec.extras.stream_buffer)
    ledger = worker.world.streams
    ledger.begun(operation.salt)
    is_paced = spec.kind == TaskKind.STREAM  # calls of an actor are let go on where another call waits
    try:
        for index in range(len(plan.sizes_bytes)):
            yield Pause(plan.gap_s)
            if index == plan.dies_at:
                yield from worker.maybe_die(operation)
            if index == plan.fails_at:
                raise Failed(Outcome("error", operation.salt))
            part = yield from _item(worker, owner, spec, plan, (operation.salt, index, arguments))
            ledger.sends(operation.salt, index, spec.extras.stream_buffer if is_paced else 0)
            worker.send(owner, m.StreamItem(spec.number, index, part))
            worker.released.extend((reference.owner, reference.number) for reference in part.references)
            pace.sent(part.stored.size_bytes if part.stored is not None else len(part.payload))
            if not pace.has_room:
                yield from worker.wait_until(lambda: pace.has_room)
    finally:
        worker.paces.close(key)
    return TaskResult(spec.number, TaskStatus.STREAM_END, str(len(plan.sizes_bytes)).encode())


def _item(worker: Worker, owner: Address, spec: TaskSpec, plan: StreamPlan, what: tuple[int, int, list[int]]) -> Steps:
    salt, index, arguments = what
    references = []
    if plan.is_boxed:
        put = yield from worker.put(put_number(salt, index), 64)
        if isinstance(put, Outcome):
            raise Failed(put)
        references = [put.part]
        worker.event(e.ReferencesMade(references))
        put.drop()
    attempt = spec.extras.attempt if spec.extras is not None else 1
    name = f"{object_id(owner.process_id, spec.number, attempt)}s{index}"
    number = item_number(salt, index, arguments)
    return (yield from worker.part_for(owner, name, number, plan.sizes_bytes[index], references))


def item_number(salt: int, index: int, arguments: list[int]) -> int:
    """What an item must be."""
    return mix(salt, "item", index, *arguments)


# --- the taker


class Taker:
    """Takes the items of one generator, as client/remote_function.py's ObjectRefStream."""

    def __init__(self, client: Client, number: int, salt: int, buffer: int) -> None:
        self._client = client
        self._number = number
        self._salt = salt
        self._stream = client.machine.objects.open_stream(number, buffer)
        self._position = 0
        self._told = 0
        self._is_closed = False

    @property
    def count(self) -> int | None:
        """How many items there are, once the generator has ended well."""
        return self._stream.count

    def take(self) -> Steps:
        """A Ref of the next item, or None at the end."""
        stream, position = self._stream, self._position
        if self._is_closed:
            return None
        yield from self._client.wait_until(lambda: len(stream.items) > position or stream.is_ended)
        if len(stream.items) <= position:
            self.close()
            return None
        self._position += 1
        self._client.world.streams.taken(self._salt, self._position)
        if self._position - self._told >= stream.step:
            self._told = self._position
            self._client.event(e.ItemsTaken(self._number, self._position))
        return Ref(self._client, m.Reference(self._client.address, stream.items[position]), is_counted=True)

    def close(self) -> None:
        """Take no more."""
        if not self._is_closed:
            self._is_closed = True
            self._client.world.streams.closed(self._salt)
            self._client.event(e.StreamClosed(self._number, self._position))


def draw_plan(random: Random, count: int, large_bytes: int) -> StreamPlan:
    """A generator."""
    is_large = random.random() < 0.4
    sizes_bytes = [random.randint(5000, large_bytes) if is_large and random.random() < 0.7 else 8 for _ in range(count)]
    return StreamPlan(
        sizes_bytes, random.choice((0.0, 0.0, 0.0005, 0.02)), random.choice((0, 0, 1, 1, 2, 5, -1)),
        dies_at=random.randrange(count) if random.random() < 0.2 else -1,
        fails_at=random.randrange(count) if random.random() < 0.1 else -1,
        is_boxed=random.random() < 0.2,
    )  # fmt: skip


def draw_reading(random: Random, count: int) -> Reading:
    """A taker."""
    return Reading(
        random.choice((0.0, 0.0, 0.001, 0.05)), random.random() < 0.4, random.choice((0.0, 0.3, 3.0)),
        stops_at=random.randint(0, count) if random.random() < 0.25 else -1,
        is_forgotten=random.random() < 0.15,
    )  # fmt: skip


class Source:
    """A generator that was asked for, and what it must give."""

    def __init__(self, client: Client, operation: Operation, what: str) -> None:
        self.operation = operation
        self.plan = msgspec.msgpack.decode(operation.stream, type=StreamPlan)
        self.number = next(client.numbers)
        self.taker = Taker(client, self.number, operation.salt, self.plan.buffer)
        self.what = what
        self.arguments: list[int] = []
        self._client = client

    def start(self, set_number: int, arguments: list[tuple[Ref, int]], retries: int) -> None:
        """As a task of a set."""
        self.arguments = [number for _, number in arguments]
        self._submit(self._client.function_of(self.operation), TaskKind.STREAM, retries, set_number, arguments)

    def call(self, actor_id: str) -> None:
        """As a call of an actor."""
        self._submit(0, TaskKind.ACTOR_CALL, 0, 0, [], actor_id)

    def _submit(
        self, function: int, kind: TaskKind, retries: int, set_number: int, arguments: list[tuple[Ref, int]],
        actor_id: str = "",
    ) -> None:  # fmt: skip
        extras = TaskExtras(1, "stream", -1, stream_buffer=self.plan.buffer, method="stream" if actor_id else "")
        spec = TaskSpec(self.number, function, kind, encode_operation(self.operation), extras)
        self._client.submit_task(Task(spec, None, 0, retries), set_number, actor_id, [ref for ref, _ in arguments], [])

    def judge(self, index: int, outcome: Outcome) -> bool:
        """What the item at `index` has given; whether the generator must end with it."""
        monitor, plan = self._client.world.monitor, self.plan
        monitor.check(index < len(plan.sizes_bytes) or outcome.is_lost, f"{self.what} has given item {index}")
        wanted = Outcome("ok", item_number(self.operation.salt, index, self.arguments))
        if index == plan.fails_at:
            wanted = Outcome("error", self.operation.salt)
        monitor.judge(self._client, f"{self.what} item {index}", outcome, wanted)
        return outcome.kind == "error"


def read_stream(client: Client, source: Source, reading: Reading) -> Steps:
    """Take and judge all items, or the first ones; the numbers of those that were read."""
    numbers: list[int] = []
    kept: list[Ref] = []
    taker, plan = source.taker, source.plan
    count = 0
    is_over = False
    try:
        while count != reading.stops_at:
            ref = yield from taker.take()
            if ref is None:
                break
            client.world.monitor.check(not is_over, f"{source.what} goes on after it has raised")
            kept.append(ref)
            count += 1
            if not reading.keeps:
                is_over = yield from _read(client, source, kept.pop(), count - 1, numbers)
            yield Pause(reading.pause_s)
        if taker.count is not None:
            client.world.monitor.check(
                taker.count == len(plan.sizes_bytes) and (count == taker.count or count == reading.stops_at),
                f"{source.what} ended with {taker.count} items, of which {count} came",
            )
        taker.close()
        if kept and not reading.is_forgotten:
            yield Pause(reading.rest_s)
            while kept:
                yield from _read(client, source, kept.pop(0), count - len(kept) - 1, numbers)
    finally:
        taker.close()
        for ref in kept:
            ref.drop()
    return numbers


def _read(client: Client, source: Source, ref: Ref, index: int, numbers: list[int]) -> Steps:
    try:
        outcome = yield from client.get(ref)
        is_over = source.judge(index, outcome)
        inside = [Ref(client, reference, is_counted=False) for reference in outcome.references]
    finally:
        ref.drop()
    for box in inside:
        try:
            wanted = Outcome("ok", put_number(source.operation.salt, index))
            client.world.monitor.judge(client, f"{source.what}: in item {index}", (yield from client.get(box)), wanted)
        finally:
            box.drop()
    if outcome.kind == "ok":
        numbers.append(outcome.number)
    return is_over


# --- programs


class TakingPlan(msgspec.Struct, frozen=True, array_like=True):
    """What a task does that takes a stream of its own."""

    source: Operation
    reading: Reading


def streams(script: Script) -> Steps:
    """Generators whose items the driver takes: one after the other, or two side by side; and tasks that take some."""
    driver, random = script.driver, script.random
    takers = [_task_that_takes(script) for _ in range(random.choice((0, 0, 1, 3)))]
    sources = []
    puts: list[tuple[Ref, int]] = []
    if random.random() < 0.3:
        number = mix(script.name, "argument", driver.world.next_number())
        put = yield from driver.put(number, random.choice((64, 6000)))
        if isinstance(put, Outcome):
            driver.world.monitor.judge(driver, "put", put, Outcome("ok", number))
        else:
            puts.append((put, number))
    for _ in range(random.choice((1, 1, 2, 3))):
        source = Source(driver, _generator(script), f"{script.name} generator")
        source.start(driver.task_set({"CPU": 1.0}), puts, random.choice((0, 1, 3, 3)))
        sources.append(source)
    for put, _ in puts:
        put.drop()
    yield from _read_all(script, sources)
    for ref, operation in takers:
        yield from script.settle(ref, expected(operation), "taker of a stream")


def _read_all(script: Script, sources: list[Source]) -> Steps:
    """Side by side."""
    driver, random = script.driver, script.random
    ended: list[Source] = []

    def read(source: Source) -> Steps:
        yield from read_stream(driver, source, draw_reading(random, len(source.plan.sizes_bytes)))
        ended.append(source)

    for source in sources:
        driver.run_quietly(read(source))
        if random.random() < 0.5:
            yield Pause(random.choice((0.0, 0.1)))
    yield from driver.wait_until(lambda: len(ended) == len(sources))


def _generator(script: Script) -> Operation:
    plan = draw_plan(script.random, script.count(1, 30), script.large_bytes)
    deaths = script.random.choice((1, 1, 2)) if plan.dies_at >= 0 else 0
    return script.operation(fails=False, result_bytes=8, stream=msgspec.msgpack.encode(plan), deaths=deaths)


def _task_that_takes(script: Script) -> tuple[Ref, Operation]:
    source = _generator(script)
    count = len(msgspec.msgpack.decode(source.stream, type=StreamPlan).sizes_bytes)
    plan = TakingPlan(source, draw_reading(script.random, count))
    operation = script.operation(fails=False, result_bytes=8, taking=msgspec.msgpack.encode(plan))
    return script.submit(operation), operation


def take_in_task(worker: Client, operation: Operation) -> Steps:
    """In a task: start a generator, and take what it yields."""
    plan = msgspec.msgpack.decode(operation.taking, type=TakingPlan)
    # Tasks that are tried again start another one: its salt says which.
    salt = mix(plan.source.salt, worker.name, worker.world.next_number())
    source = Source(worker, msgspec.structs.replace(plan.source, salt=salt), f"a generator of {worker.name}")
    source.start(worker.task_set({"CPU": 1.0}), [], 3)
    yield from read_stream(worker, source, plan.reading)


def streaming_actor(script: Script) -> Steps:
    """An actor whose calls are generators, some of them under way at the same time."""
    driver, random = script.driver, script.random
    actor_id, lifetime = yield from script.open_actor()
    sources: list[Source] = []
    for _ in range(script.count(1, 4)):
        operation = _generator(script)
        operation = msgspec.structs.replace(operation, deaths=0, caller=driver.name + actor_id, index=len(sources))
        source = Source(driver, operation, f"{script.name} generator of an actor")
        source.call(actor_id)
        sources.append(source)
    if random.random() < 0.5:
        lifetime.drop()  # it ends with its last call
    yield from _read_all(script, sources)
    lifetime.drop()
