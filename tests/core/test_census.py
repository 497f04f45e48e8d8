"""The count of a thin semaphore's tokens: what the dead held comes back, what the living hold never does."""

from __future__ import annotations

import random
from typing import Any

import pytest

from clusterpool.core import coordination_events as e
from clusterpool.core import coordination_messages as c
from clusterpool.core.census import TokenCensus
from clusterpool.core.messages import Address
from tests.core.machines import of_type

A, B, C = (Address("na", name) for name in ("wa", "wb", "wc"))
LOCK = "j1-d1-1"


class Counted:
    """A census, and shorthands for what it hears."""

    def __init__(self, *processes: Address) -> None:
        self.processes = list(processes)
        self.census = TokenCensus(lambda: self.processes)
        self.commands: list[Any] = []

    def report(self, total: int = 1) -> list[Any]:
        return self._hear(self.census.reported(c.ReportStuck(LOCK, total)))

    def look(self, free: int = 0, **more: Any) -> list[Any]:
        assert of_type(self.commands, e.ReadThinTokens) == [e.ReadThinTokens(LOCK)]
        return self._hear(self.census.read(e.ThinTokensRead(LOCK, free, **more)))

    def answer(self, process: Address, held: int = 0, given: int = 5, *, is_busy: bool = False) -> list[Any]:
        number = self.census._running[LOCK].number if LOCK in self.census._running else 0
        return self._hear(self.census.answered(process, c.HeldCounted(number, LOCK, held, given, is_busy)))

    def end(self, process: Address) -> list[Any]:
        self.processes.remove(process)
        return self._hear(self.census.process_gone(process))

    def _hear(self, commands: list[Any]) -> list[Any]:
        self.commands = commands
        return commands

    @property
    def asked(self) -> list[Address]:
        return [command.destination for command in self.commands if not isinstance(command, e.ReadThinTokens)]

    @property
    def is_over(self) -> bool:
        return LOCK not in self.census._running


def test_a_token_that_no_living_process_holds_is_given_back() -> None:
    counted = Counted(A, B)
    counted.report()
    counted.look()
    assert counted.asked == [A, B]
    counted.answer(A)
    counted.answer(B, given=7)
    counted.look()
    assert counted.asked == [A, B]
    counted.answer(B, given=7)
    counted.answer(A)
    assert counted.look() == [e.ReturnTokens(LOCK, 1)]
    assert counted.is_over


def test_only_what_is_lost_of_several_tokens_is_given_back() -> None:
    counted = Counted(A, B)
    counted.report(total=6)
    counted.look(free=1)
    for _ in range(2):
        counted.answer(A, held=2)
        counted.answer(B, held=1)
        if _ == 0:
            counted.look(free=1)
    assert counted.look(free=1) == [e.ReturnTokens(LOCK, 2)]


def test_whoever_holds_the_lock_ends_the_census_and_is_asked_first_the_next_time() -> None:
    counted = Counted(A, B, C)
    counted.report()
    counted.look()
    counted.answer(B, held=1)
    assert counted.is_over
    counted.report()
    counted.look()
    assert counted.asked == [B]
    counted.answer(B)  # it has released it meanwhile: the others are asked as well
    assert counted.asked == [A, C]


@pytest.mark.parametrize(
    "second",
    [
        {"held": 1},  # it has taken the token since
        {"given": 6},  # it has had the token in between, perhaps at the instant that counts
        {"is_busy": True},
        {"held": -1},
    ],
)
def test_another_answer_than_before_gives_nothing_back(second: dict[str, Any]) -> None:
    counted = Counted(A, B)
    counted.report()
    counted.look()
    counted.answer(A)
    counted.answer(B)
    counted.look()
    counted.answer(A)
    assert counted.answer(B, **second) == []
    assert counted.is_over


def test_one_that_does_not_answer_may_be_the_holder() -> None:
    counted = Counted(A, B)
    counted.report()
    counted.look()
    assert counted.answer(A) == []
    assert counted.report() == [], "one count at a time"
    assert not counted.is_over


def test_the_end_of_a_process_begins_the_count_anew() -> None:
    counted = Counted(A, B)
    counted.report()
    counted.look()
    counted.answer(A)
    counted.answer(B)
    counted.look()
    old = counted.census._running[LOCK].number
    counted.end(B)
    assert counted.census.answered(A, c.HeldCounted(old, LOCK, 0, 5)) == [], "an answer to the old question"
    for _ in range(2):
        counted.look()
        counted.answer(A)
    assert counted.look() == [e.ReturnTokens(LOCK, 1)]


def test_one_that_joins_meanwhile_counts_from_nothing() -> None:
    counted = Counted(A)
    counted.report()
    counted.look()
    counted.answer(A)
    counted.processes.append(B)
    counted.look()
    counted.answer(A)
    assert counted.answer(B, given=1) == [], "it has had the token and given it back"
    assert counted.is_over


@pytest.mark.parametrize(
    ("looks", "is_given_back"),
    [
        ([{}, {}, {}], True),
        ([{"free": 1}], False),
        ([{}, {"free": 1}], False),
        ([{}, {}, {"free": 1}], False),
        ([{"is_signal": True}], False),
        ([{}, {}, {"is_signal": True}], False),
        ([{}, {}, {"registrations": 1}], False),  # a fork was here, and has ended
        ([{"records": (e.ThinRecord("7 1", 1, 0, False),)}], False),  # a fork holds it
        ([{"records": (e.ThinRecord("7 1", 0, 0, True),)}], False),
        ([{"records": (e.ThinRecord("7 1", 0, 4, False),)}] * 3, True),
        (
            [{"records": (e.ThinRecord("7 1", 0, 4, False),)}] * 2 + [{"records": (e.ThinRecord("7 1", 0, 5, False),)}],
            False,
        ),
    ],
)
def test_what_the_looks_show_decides(looks: list[dict[str, Any]], is_given_back: bool) -> None:
    counted = Counted()
    commands = counted.report()
    for look in looks:
        commands = counted.look(**look)
    assert (commands == [e.ReturnTokens(LOCK, 1)]) is is_given_back
    assert counted.is_over


class Thread:
    """Of a process in the random world: it goes in steps, as the real one does, and can be killed between any two."""

    def __init__(self) -> None:
        self.state = "idle"  # -> "taken" (C has the token, not counted) -> "holds" -> "told" (given counted) -> "idle"


class World:
    """Processes that take and give tokens, die and are born, while a census goes on, with messages that take time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.total = self.random.choice([1, 1, 2, 3])
        self.free = self.total
        self.held: dict[Address, int] = {}
        self.given: dict[Address, int] = {}
        self.threads: dict[Address, list[Thread]] = {}
        self.mail: list[tuple[Address, c.CountHeld]] = []  # questions under way
        self.answers: list[tuple[Address, c.HeldCounted]] = []
        self.waits: list[tuple[Address, c.CountHeld, list[Thread]]] = []  # answered when these have come out of C
        self.deaths: list[Address] = []  # not known to the node yet
        self.joined: list[Address] = []
        self.census = TokenCensus(lambda: self.joined)
        self.returned = 0
        for _ in range(3):
            self.be_born()

    def be_born(self) -> None:
        process = Address("na", f"w{len(self.held)}")
        self.held[process] = self.given[process] = 0
        self.threads[process] = [Thread(), Thread()]
        self.joined.append(process)

    def in_use(self) -> int:
        return sum(thread.state != "idle" for threads in self.threads.values() for thread in threads)

    def step(self) -> None:
        process = self.random.choice(sorted(self.threads))
        thread = self.random.choice(self.threads[process])
        if thread.state == "idle" and self.free:
            self.free -= 1
            thread.state = "taken"
        elif thread.state != "idle":
            self.go_on(process, thread)

    def go_on(self, process: Address, thread: Thread) -> None:
        if thread.state == "taken":
            self.held[process] += 1
            thread.state = "holds"
        elif thread.state == "holds":
            self.given[process] += 1
            thread.state = "told"
        else:
            self.free += 1
            self.held[process] -= 1
            thread.state = "idle"
        self.answer_due()

    def kill(self) -> None:
        if len(self.threads) > 1:
            process = self.random.choice(sorted(self.threads))
            del self.threads[process]
            self.deaths.append(process)

    def hear_of_a_death(self) -> None:
        if self.deaths:
            process = self.deaths.pop(0)
            self.joined.remove(process)
            self.do(self.census.process_gone(process))

    def deliver(self) -> None:
        if self.mail:
            process, question = self.mail.pop(self.random.randrange(len(self.mail)))
            if process in self.threads:
                inside = [thread for thread in self.threads[process] if thread.state == "taken"]
                self.waits.append((process, question, inside))
                self.answer_due()
        if self.answers:
            self.do(self.census.answered(*self.answers.pop(0)))

    def answer_due(self) -> None:
        for wait in list(self.waits):
            process, question, inside = wait
            if not any(thread.state == "taken" for thread in inside):
                self.waits.remove(wait)
                if process in self.threads:
                    counts = self.held[process], self.given[process]
                    self.answers.append((process, c.HeldCounted(question.request, LOCK, *counts)))

    def do(self, commands: list[Any]) -> None:
        for command in commands:
            if isinstance(command, e.ReadThinTokens):
                self.do(self.census.read(e.ThinTokensRead(LOCK, self.free)))
            elif isinstance(command, e.ReturnTokens):
                self.free += command.count
                self.returned += command.count
            else:
                self.mail.append((command.destination, command.message))
        assert self.free + self.in_use() <= self.total, "more tokens than there are: two hold one lock"


@pytest.mark.parametrize("block", range(10))
def test_kills_at_any_moment_neither_double_nor_lose_a_token(block: int) -> None:
    returned = 0
    for seed in range(block * 60, block * 60 + 60):
        world = World(seed)
        for _ in range(400):
            chance = world.random.random()
            if chance < 0.5:
                world.step()
            elif chance < 0.85:
                world.deliver()
            elif chance < 0.92:
                world.do(world.census.reported(c.ReportStuck(LOCK, world.total)))
            elif chance < 0.95:
                world.hear_of_a_death()
            elif chance < 0.97:
                world.be_born()
            else:
                world.kill()
        # Then all is quiet: what the dead held must be there again.
        for process in list(world.threads):
            for thread in world.threads[process]:
                while thread.state != "idle":
                    world.go_on(process, thread)
        for _ in range(3):
            while world.deaths or world.mail or world.answers:
                world.hear_of_a_death()
                world.deliver()
            world.do(world.census.reported(c.ReportStuck(LOCK, world.total)))
        while world.mail or world.answers:
            world.deliver()
        assert world.free == world.total, f"seed {seed}"
        returned += world.returned
    assert returned > 0, "nobody died with a token"
