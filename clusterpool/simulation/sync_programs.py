"""What simulated programs do with conditions and barriers, composed of tokens as in multiprocessing/synchronize.py.

condition   who waits is woken by a notification that comes later; who notifies is not held up by the dead
barrier     all parties go on together, each with an index of its own; when one has died, the others hear of it in time
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from clusterpool.simulation.carriers import CarrierPart, CoordinationError, Token
from clusterpool.simulation.client import Client
from clusterpool.simulation.lock_programs import count_of
from clusterpool.simulation.programs import Operation, Outcome, expected
from clusterpool.simulation.references import Ref
from clusterpool.simulation.threads import Pause, Steps

if TYPE_CHECKING:
    from clusterpool.simulation.workloads import Script

SLEEPERS_MAX = 64
# Longer than any fault lasts, and than a dead node or process is found out; but a slow host waits five times longer,
# and the world for no longer than END_S.
PATIENCE_S = 30.0
# As in multiprocessing/synchronize.py.
WOKEN_PATIENCE_S = 0.02
LEAVING_PATIENCE_S = 0.3
# What is promised of one that is held up by a dead waiter: found out in a second or two where all is thin, within five
# once it has moved; and what a frozen one or a store that is away may add. A slow host's timers take five times longer.
NOTIFY_S = 7.0
DELAYED_S = 40.0
SLOWNESS = 5.0
# The states of a barrier, as in `threading.Barrier`, in a cell.
_BROKEN, _RESETTING, _FILLING, _DRAINING = b"-2", b"-1", b"0", b"1"


class ConditionPart(msgspec.Struct, frozen=True, array_like=True):
    """What a task needs to know of one. `cell`: what it guards."""

    lock: CarrierPart
    sleepers: CarrierPart
    woken: CarrierPart
    signals: CarrierPart
    cell: CarrierPart

    @property
    def names(self) -> set[str]:
        """Of its carriers."""
        return {part.name for part in (self.lock, self.sleepers, self.woken, self.signals, self.cell)}


class Gate(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What a task does: waits until the cell says `until`; dies once it has begun to, if its operation says so."""

    condition: ConditionPart
    until: int


class Meeting(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What a task does: comes to a barrier so many times; dies before the round `dies_in`."""

    condition: ConditionPart
    inside: CarrierPart
    parties: int
    rounds: int
    patience_s: float
    dies_in: int = -1


class Condition:
    """One, as one process has it: `enter` before anything else, and `leave`."""

    def __init__(self, client: Client, part: ConditionPart) -> None:
        self.client = client
        self.part = part
        self._token: Token | None = None

    @property
    def is_void(self) -> bool:
        """Whether the control store has forgotten something of it."""
        return not self.client.world.evidence.void.isdisjoint(self.part.names)

    def enter(self) -> Steps:
        """Acquire its lock. Raises: CoordinationError."""
        self._token = yield from self._acquire(self.part.lock)

    def leave(self) -> Steps:
        """Release its lock."""
        token, self._token = self._token, None
        if token is not None:
            yield from self.client.carriers.release(token)

    def _acquire(self, carrier: CarrierPart) -> Steps:
        token = yield from self.client.carriers.acquire(carrier, PATIENCE_S)
        if token is None:
            text = f"{self.client.name} has waited {PATIENCE_S:g} s for {carrier.name}: the dead left it free"
            self.client.world.monitor.check(self.is_void, text)
            raise CoordinationError(Outcome("lock_lost", 0, text=text))
        return token

    def wait(self, patience_s: float, operation: Operation | None = None) -> Steps:
        """Give up the lock until notified; whether it was. `operation`: may end the process now."""
        carriers = self.client.carriers
        sleeper = yield from self._acquire(self.part.sleepers)
        yield from self.leave()
        if operation is not None:
            yield from self.client.maybe_die(operation)
        is_woken = (yield from carriers.acquire(self.part.signals, patience_s)) is not None
        yield from carriers.release(sleeper)
        if is_woken:
            yield from carriers.post(self.part.woken)
        yield from self.enter()
        return is_woken

    def sleeping(self) -> Steps:
        """How many wait."""
        return self.part.sleepers.total - (yield from self.client.carriers.value(self.part.sleepers))

    def notify(self, count: int = SLEEPERS_MAX) -> Steps:
        """Wake so many of those who wait."""
        client, carriers = self.client, self.client.carriers
        started_s = client.world.timeline.now_s
        number = yield from self.sleeping()
        left = max(0, number - count)
        for _ in range(min(count, number)):
            yield from carriers.post(self.part.signals)
        while number and (yield from self.sleeping()) > left:
            if (yield from carriers.acquire(self.part.woken, WOKEN_PATIENCE_S)) is None:
                yield from carriers.look_for_dead(self.part.sleepers)
            took_s, limit_s = client.world.timeline.now_s - started_s, DELAYED_S if client.world.faults else NOTIFY_S
            text = f"{client.name} has notified {number} of {self.part.signals.name} for {took_s:.1f} s"
            client.world.monitor.check(took_s < limit_s or self.is_void, text)
            if took_s >= limit_s:
                raise CoordinationError(Outcome("lock_lost", 0, text=f"{text}: {', '.join(sorted(self.part.names))}"))
        for carrier in (self.part.signals, self.part.woken) if number else ():
            while (yield from carriers.acquire(carrier, 0.0)) is not None:
                pass

    def read(self) -> Steps:
        """What it guards."""
        return (yield from self.client.carriers.read_cell(self.part.cell))

    def write(self, content: bytes) -> Steps:
        """Other content; the lock is held."""
        assert self._token is not None
        yield from self.client.carriers.write_cell(self.part.cell, content, self._token)


class Barrier:
    """One, as one process has it: `threading.Barrier`, with tokens in the place of its count."""

    def __init__(self, client: Client, meeting: Meeting) -> None:
        self._client = client
        self._meeting = meeting
        self._condition = Condition(client, meeting.condition)

    def wait(self) -> Steps:
        """The index of this party, or None if the barrier is broken. Raises: CoordinationError."""
        condition, carriers, inside = self._condition, self._client.carriers, self._meeting.inside
        yield from condition.enter()
        while (yield from condition.read()) in (_RESETTING, _DRAINING):
            if not (yield from condition.wait(LEAVING_PATIENCE_S)):
                yield from carriers.look_for_dead(inside)
                yield from self._exit()
        if (yield from condition.read()) == _BROKEN:
            yield from condition.leave()
            return None
        index = yield from self.inside()
        token = yield from carriers.acquire(inside, PATIENCE_S)
        is_met = True
        if index + 1 == self._meeting.parties:
            yield from self._change(_DRAINING)
        else:
            is_met = yield from self._wait()
        yield from carriers.release(token)
        yield from self._exit()
        yield from condition.leave()
        return index if is_met else None

    def _wait(self) -> Steps:
        client, condition = self._client, self._condition
        end_s = client.now_s() + self._meeting.patience_s
        while (state := (yield from condition.read())) == _FILLING:
            left_s = end_s - client.now_s()
            if left_s <= 0:
                yield from self._change(_BROKEN)
                return False
            yield from condition.wait(left_s)
        return state == _DRAINING

    def _exit(self) -> Steps:
        if (yield from self.inside()) == 0 and (yield from self._condition.read()) in (_RESETTING, _DRAINING):
            yield from self._change(_FILLING)

    def _change(self, state: bytes) -> Steps:
        yield from self._condition.write(state)
        yield from self._condition.notify()

    def inside(self) -> Steps:
        """How many parties are in `wait`."""
        carrier = self._meeting.inside
        return carrier.total - (yield from self._client.carriers.value(carrier))


# --- in a task


def pass_gate(client: Client, gate: Gate, operation: Operation | None = None) -> Steps:
    """Do what a Gate says; why it could not be done, or None."""
    condition = Condition(client, gate.condition)
    try:
        yield from condition.enter()
        while count_of((yield from condition.read())) < gate.until:
            if not (yield from condition.wait(PATIENCE_S, operation)):
                text = f"{client.name} has waited {PATIENCE_S:g} s for {gate.condition.signals.name}: nobody woke it"
                client.world.monitor.check(condition.is_void, text)
                return Outcome("lock_lost", 0, text=text)
        yield from condition.leave()
    except CoordinationError as exc:
        return exc.outcome
    return None


def meet(client: Client, meeting: Meeting, operation: Operation | None = None) -> Steps:
    """Do what a Meeting says; why it could not be done, or None."""
    barrier, world = Barrier(client, meeting), client.world
    try:
        for number in range(meeting.rounds):
            if operation is not None and number == meeting.dies_in:
                yield from client.maybe_die(operation)
            started_s = world.timeline.now_s
            index = yield from barrier.wait()
            took_s = world.timeline.now_s - started_s
            limit_s = SLOWNESS * meeting.patience_s + (2 * DELAYED_S if world.faults else 3 * NOTIFY_S)
            world.monitor.check(took_s < limit_s, f"{client.name} was {took_s:.1f} s at {meeting.inside.name}")
            if index is None:
                return Outcome("broken", 0, text=f"the barrier of {meeting.inside.name} is broken")
            world.meetings.met(meeting, number, index, client)
    except CoordinationError as exc:
        return exc.outcome
    return None


class MeetingLedger:
    """Who has met whom, in one world."""

    def __init__(self) -> None:
        self._indexes: dict[tuple[str, int], list[int]] = {}

    def met(self, meeting: Meeting, number: int, index: int, client: Client) -> None:
        """A party has passed the barrier in a round."""
        name = meeting.inside.name
        indexes = self._indexes.setdefault((name, number), [])
        indexes.append(index)
        if not client.world.evidence.has_deaths and not client.world.faults:
            text = f"round {number} of {name} has given the indexes {indexes} to {meeting.parties} parties"
            client.world.monitor.check(len(set(indexes)) == len(indexes) and index < meeting.parties, text)


# --- programs


def _make(driver: Client) -> ConditionPart:
    carriers = driver.carriers
    return ConditionPart(
        carriers.make("lock", 1), carriers.make("guard", SLEEPERS_MAX), carriers.make("semaphore"),
        carriers.make("semaphore"), carriers.make("cell", content=b"0"),
    )  # fmt: skip


def conditions(script: Script) -> Steps:
    """Tasks wait until the driver has counted far enough; some die while they wait."""
    driver, random = script.driver, script.random
    part = _make(driver)
    rounds = random.randint(1, 3)
    refs: list[tuple[Ref, Operation]] = []
    for _ in range(script.count(1, 6)):
        turn = msgspec.msgpack.encode(Gate(part, random.randint(1, rounds)))
        operation = script.operation(
            fails=False, result_bytes=8, turn=turn, deaths=int(random.random() < 0.2), dies_late=random.random() < 0.6
        )
        refs.append((script.submit(operation), operation))
    condition = Condition(driver, part)
    failure = None
    try:
        for number in range(1, rounds + 1):
            yield Pause(random.choice((0.0, 0.02, 0.3, 2.0)))
            yield from condition.enter()
            yield from condition.write(b"%d" % number)
            yield from condition.notify()
            yield from condition.leave()
    except CoordinationError as exc:
        failure = exc.outcome
        driver.world.evidence.void.update(part.names)  # nobody counts any further
        driver.world.monitor.judge(driver, "condition", failure, Outcome("ok", 0), subject=part.lock.name)
    for ref, operation in refs:
        yield from script.settle(ref, expected(operation), "task at a condition")


def barriers(script: Script) -> Steps:
    """Tasks meet at a barrier; when one of them has died, the others do not wait for ever."""
    driver, random = script.driver, script.random
    part, parties = _make(driver), random.randint(1, 4)
    inside = driver.carriers.make("guard", parties + SLEEPERS_MAX)
    rounds = random.randint(1, 3)
    is_deadly = random.random() < 0.3
    refs: list[tuple[Ref, Operation]] = []
    for number in range(parties):
        dies_in = random.randrange(rounds) if is_deadly and number == 0 else -1
        meeting = Meeting(part, inside, parties, rounds, 2.0 if is_deadly else 20.0, dies_in)
        operation = script.operation(
            fails=False, result_bytes=8, turn=msgspec.msgpack.encode(meeting), deaths=int(dies_in >= 0),
            dies_late=random.random() < 0.5,
        )  # fmt: skip
        refs.append((script.submit(operation), operation))
    for ref, operation in refs:
        outcome = yield from driver.get(ref)
        ref.drop()
        if outcome.kind == "broken":
            # Who has met the others may have to come again, since its result went with its worker.
            text = f"{script.name}: {outcome}, and nothing has disturbed it"
            driver.world.monitor.check(driver.world.evidence.has_deaths or bool(driver.world.faults), text)
        else:
            driver.world.monitor.judge(driver, f"{script.name} party", outcome, expected(operation))
