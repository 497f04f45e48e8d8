"""The log of an actor with checkpoints: what may be released when, and what a next life makes of it."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from clusterpool.core import actor_log as log
from clusterpool.core.actor_log import (
    ActorLog,
    AppendCalls,
    CallEnded,
    EndLife,
    ReleaseResults,
    ResultsArrived,
    SaveState,
    StateSaved,
    StoreAnswered,
    StoreCheckpoint,
)
from clusterpool.core.actor_messages import ActorCheckpoint
from clusterpool.core.messages import ActorPlan, Address, Reference, ResultExtras, TaskResult, TaskStatus, ValuePart

ONE, TWO = Address("n1", "d1"), Address("n2", "d2")
NOW_S = 100.0


def result(number: int) -> TaskResult:
    return TaskResult(number, TaskStatus.OK, b"value")


def ended(machine: ActorLog, number: int, *, entry: bytes | None = b"entry", state: bytes | None = None) -> list[Any]:
    return machine.handle(CallEnded(ONE, entry, result(number), state), NOW_S)


def released(commands: list[Any]) -> list[int]:
    return [item.number for command in commands if isinstance(command, ReleaseResults) for _, item in command.results]


def machine_of(*, every: int = 0, period_s: float = -1.0) -> ActorLog:
    return ActorLog(ActorPlan("a1", every, period_s), NOW_S)


def test_a_result_is_released_when_its_call_is_logged_and_calls_gather_meanwhile() -> None:
    machine = machine_of()
    assert ended(machine, 1) == [AppendCalls(1, [b"entry"])]
    assert ended(machine, 2, entry=b"two") == []
    assert ended(machine, 3, entry=b"three") == []
    commands = machine.handle(StoreAnswered("ok"), NOW_S)
    assert released(commands) == [1]
    assert commands[-1] == AppendCalls(2, [b"two", b"three"])
    assert released(machine.handle(StoreAnswered("ok"), NOW_S)) == [2, 3]


def test_a_checkpoint_takes_the_place_of_calls_that_were_not_sent_yet() -> None:
    machine = machine_of()
    ended(machine, 1)
    ended(machine, 2)
    ended(machine, 3, entry=None, state=b"state")  # it could not be logged
    commands = machine.handle(StoreAnswered("ok"), NOW_S)
    assert released(commands) == [1]
    (store,) = [command for command in commands if isinstance(command, StoreCheckpoint)]
    checkpoint = msgspec.msgpack.decode(store.content, type=ActorCheckpoint)
    assert (store.calls, checkpoint.state) == (3, b"state")
    assert [answer.result.number for answer in checkpoint.answers] == [1, 2, 3]
    assert ended(machine, 4) == []
    commands = machine.handle(StoreAnswered("ok"), NOW_S)
    assert released(commands) == [2, 3]
    assert commands[-1] == AppendCalls(4, [b"entry"])


@pytest.mark.parametrize("is_idle", [True, False])
def test_when_the_store_has_lost_calls_a_checkpoint_takes_the_place_of_all(is_idle: bool) -> None:
    machine = machine_of()
    ended(machine, 1)
    ended(machine, 2)
    assert machine.handle(StoreAnswered("gap"), NOW_S) == [SaveState()]
    assert machine.is_checkpoint_due(True, NOW_S), "whichever comes first: the end of a call, or that none runs"
    if is_idle:
        (store,) = machine.handle(StateSaved(b"state"), NOW_S)
    else:
        (store,) = ended(machine, 3, state=b"state")
        assert machine.handle(StateSaved(b"state"), NOW_S) == []
    calls = 2 if is_idle else 3
    assert isinstance(store, StoreCheckpoint) and store.calls == calls
    assert released(machine.handle(StoreAnswered("ok"), NOW_S)) == list(range(1, calls + 1))
    assert ended(machine, calls + 1) == [AppendCalls(calls + 1, [b"entry"])]


def test_a_checkpoint_that_waits_already_makes_up_for_lost_calls() -> None:
    machine = machine_of()
    ended(machine, 1)
    ended(machine, 2, state=b"state")
    ended(machine, 3)
    (store,) = machine.handle(StoreAnswered("gap"), NOW_S)
    assert store.calls == 2
    commands = machine.handle(StoreAnswered("ok"), NOW_S)
    assert released(commands) == [1, 2] and commands[-1] == AppendCalls(3, [b"entry"])


def test_a_checkpoint_that_cannot_be_kept_is_the_end_of_a_life() -> None:
    machine = machine_of()
    ended(machine, 1, state=b"state")
    (end,) = machine.handle(StoreAnswered("gap"), NOW_S)
    assert isinstance(end, EndLife)


@pytest.mark.parametrize("kind", ["fenced", "gone"])
def test_a_life_that_is_over_releases_nothing(kind: str) -> None:
    machine = machine_of()
    ended(machine, 1)
    (end,) = machine.handle(StoreAnswered(kind), NOW_S)
    assert isinstance(end, EndLife)
    assert ended(machine, 2) == []


def test_when_a_checkpoint_is_due() -> None:
    machine = machine_of(every=3, period_s=10)
    due = []
    for number in range(1, 8):
        due.append(machine.is_checkpoint_due(True, NOW_S))
        ended(machine, number, state=b"state" if due[-1] else None)
    assert due == [False, False, True, False, False, True, False]
    assert machine.is_checkpoint_due(False, NOW_S)
    assert machine.is_checkpoint_due(True, NOW_S + 10)
    full = machine_of()
    ended(full, 1, entry=bytes(log.LOG_BYTES_MAX))
    assert full.is_checkpoint_due(True, NOW_S)


def test_results_are_kept_for_those_who_may_not_have_them() -> None:
    machine = machine_of()
    for number in (1, 2, 3):
        ended(machine, number)
    machine.handle(CallEnded(TWO, b"entry", result(1), None), NOW_S)
    machine.handle(ResultsArrived(ONE, [1], False), NOW_S)
    assert machine.answer_to(ONE, 1) is None
    assert machine.answer_to(ONE, 2) == result(2)
    machine.handle(ResultsArrived(ONE, [3, 9], True), NOW_S)
    assert machine.answer_to(ONE, 2) is None
    assert machine.answer_to(ONE, 3) == result(3)
    assert machine.answer_to(TWO, 1) == result(1)


def test_references_of_a_former_life_are_told_to_be_lost() -> None:
    machine = machine_of()
    extras = ResultExtras(ValuePart(payload=b"v", references=[Reference(ONE, 5)]))
    commands = machine.handle(CallEnded(ONE, None, TaskResult(1, TaskStatus.STORED, b"", extras), b"state"), NOW_S)
    checkpoint = msgspec.msgpack.decode(commands[0].content, type=ActorCheckpoint)
    assert checkpoint.answers[0].result.status == TaskStatus.LOST


class World:
    """Callers, an actor that appends each call's number to a list, a store; crashes and answers at random."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.plan = ActorPlan("a1", self.chance.choice([0, 1, 3, 10]))
        self.stored: tuple[bytes, int, list[bytes]] = (b"", 0, [])
        self.waiting: dict[Address, list[int]] = {ONE: [], TWO: []}  # sent, in order, without a result
        self.got: set[tuple[Address, int]] = set()
        self.next_number = 1
        self.begin()

    def begin(self) -> None:
        """A next life: it loads, replays, hears what callers wait for, and gets their calls again."""
        self.machine = ActorLog(self.plan, NOW_S)
        self.under_way: Any = None
        self.inbox: list[tuple[Address, int]] = []
        content, covered, entries = self.stored
        checkpoint = msgspec.msgpack.decode(content, type=ActorCheckpoint) if content else None
        self.machine.load(checkpoint, covered)
        self.state: list[list[Any]] = msgspec.json.decode(checkpoint.state) if checkpoint is not None else []
        for entry in entries:
            owner, number = msgspec.json.decode(entry, type=tuple[Address, int])
            self.state.append([owner, number])
            self.machine.replayed(owner, entry, result(number))
        for owner, numbers in self.waiting.items():
            self.machine.handle(ResultsArrived(owner, list(numbers), True), NOW_S)
            self.inbox += [(owner, number) for number in numbers]

    def call(self) -> None:
        owner = self.chance.choice([ONE, TWO])
        self.waiting[owner].append(self.next_number)
        self.inbox.append((owner, self.next_number))
        self.next_number += 1

    def run_one(self) -> None:
        if not self.inbox:
            return
        owner, number = self.inbox.pop(0)
        if self.machine.answer_to(owner, number) is not None:
            self.deliver(owner, number)
            return
        self.state.append([owner, number])
        is_loggable = self.chance.random() < 0.8
        entry = msgspec.json.encode((owner, number)) if is_loggable else None
        is_due = self.machine.is_checkpoint_due(is_loggable, NOW_S)
        state = msgspec.json.encode(self.state) if is_due else None
        self.carry_out(self.machine.handle(CallEnded(owner, entry, result(number), state), NOW_S))

    def carry_out(self, commands: list[Any]) -> None:
        for command in commands:
            if isinstance(command, ReleaseResults):
                for owner, item in command.results:
                    self.deliver(owner, item.number)
            else:
                assert self.under_way is None
                self.under_way = command

    def deliver(self, owner: Address, number: int) -> None:
        """The result goes out; it arrives, or its sender's death takes it along."""
        if self.chance.random() < 0.9:
            self.got.add((owner, number))
            if number in self.waiting[owner]:
                self.waiting[owner].remove(number)
            if self.chance.random() < 0.7:
                self.machine.handle(ResultsArrived(owner, [number], False), NOW_S)

    def store(self) -> None:
        if self.under_way is None:
            return
        command, self.under_way = self.under_way, None
        content, covered, entries = self.stored
        if isinstance(command, AppendCalls):
            assert command.first == covered + len(entries) + 1, "calls are logged without a gap"
            self.stored = (content, covered, entries + command.entries)
        else:
            assert command.calls >= covered + len(entries), "a checkpoint covers all that was logged"
            self.stored = (command.content, command.calls, [])
        if self.chance.random() < 0.95:
            self.carry_out(self.machine.handle(StoreAnswered("ok"), NOW_S))
        else:
            self.begin()  # it died before it heard


@pytest.mark.parametrize("seed", range(200))
def test_each_call_counts_once_in_the_order_of_its_caller(seed: int) -> None:
    world = World(seed)
    steps = [world.call, world.run_one, world.run_one, world.store, world.store]
    for _ in range(300):
        if world.chance.random() < 0.02:
            world.begin()
        else:
            world.chance.choice(steps)()
    world.begin()  # what got no result is sent again
    for _ in range(10_000):
        if not any(world.waiting.values()):
            break
        world.run_one()
        world.store()
        if not world.inbox and world.under_way is None:
            world.begin()
    assert not any(world.waiting.values()), "every call has a result"
    numbers = [number for _, number in world.state]
    assert sorted(numbers) == list(range(1, world.next_number)), "each counts once"
    for owner in (ONE, TWO):
        mine = [number for each, number in world.state if tuple(each) == owner]
        assert mine == sorted(mine), "in order"
