"""Who holds a reference, by the tables of four processes and by a model that simply knows.

Messages between two processes arrive in order, those of different pairs in any. At no time may an object be freed that
somebody holds, or that is on its way to somebody; once all have let go and all messages have come, none may be left.
"""

from __future__ import annotations

from collections import Counter, deque
from random import Random
from typing import Any

import pytest

from clusterpool.core.messages import Address, Reference, ValuePart
from clusterpool.core.ownership import Dropped, OwnershipTable
from tests.fuzz.searches import seeds

WORLDS = 150
STEPS = 120
NAMES = ["a", "b", "c", "d"]


class World:
    """`held`: how many references each process has to each object, as its user's program would know."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.processes = [Address("n1", name) for name in NAMES]
        self.tables = {address: OwnershipTable(address) for address in self.processes}
        self.held: dict[Address, Counter[Reference]] = {address: Counter() for address in self.processes}
        self.lines: dict[tuple[Address, Address], deque[tuple[Any, ...]]] = {}
        self.freed: set[Reference] = set()
        self.last_number = 0

    def living(self) -> list[Address]:
        return list(self.tables)

    def step(self) -> None:
        steps = [
            self.create,
            self.hand_over,
            self.hand_over,
            self.drop,
            self.drop,
            self.deliver,
            self.deliver,
            self.copy,
        ]
        self.random.choice(steps)()
        self.check_nothing_freed_early()

    # --- what programs do

    def create(self) -> None:
        owner = self.random.choice(self.living())
        self.last_number += 1
        table = self.tables[owner]
        table.create(self.last_number)
        table.set_value(self.last_number, ValuePart(payload=b"v"))
        self.held[owner][Reference(owner, self.last_number)] += 1

    def pick(self) -> tuple[Address, Reference] | None:
        pairs = [(holder, ref) for holder, held in self.held.items() for ref, count in held.items() if count > 0]
        return self.random.choice(pairs) if pairs else None

    def copy(self) -> None:
        picked = self.pick()
        if picked:
            holder, reference = picked
            self.tables[holder].hold(reference)
            self.held[holder][reference] += 1

    def hand_over(self) -> None:
        picked = self.pick()
        others = [address for address in self.living() if picked and address != picked[0]]
        if not picked or not others:
            return
        giver, reference = picked
        receiver = self.random.choice(others)
        for owner, numbers in self.tables[giver].hand_over(receiver, [reference]):
            self.send(giver, owner, ("add", receiver, numbers))
        self.send(giver, receiver, ("reference", reference))

    def drop(self) -> None:
        picked = self.pick()
        if picked:
            holder, reference = picked
            self.held[holder][reference] -= 1
            self.let_go(holder, self.tables[holder].drop(reference.owner, reference.number))

    def let_go(self, holder: Address, dropped: Dropped | None) -> None:
        if dropped is None:
            return
        if dropped.owner == holder:
            self.freed.add(Reference(holder, dropped.number))
        else:
            self.send(holder, dropped.owner, ("remove", [dropped.number], [dropped.handed]))

    def send(self, source: Address, destination: Address, message: tuple[Any, ...]) -> None:
        self.lines.setdefault((source, destination), deque()).append(message)

    def deliver(self) -> None:
        waiting = sorted(pair for pair, line in self.lines.items() if line)
        if waiting:
            source, destination = self.random.choice(waiting)
            self.arrived(source, destination, self.lines[(source, destination)].popleft())

    def arrived(self, source: Address, destination: Address, message: tuple[Any, ...]) -> None:
        table = self.tables.get(destination)
        if table is None:
            return
        kind, *arguments = message
        if kind == "reference":
            (reference,) = arguments
            table.hold(reference, was_handed=True)
            self.held[destination][reference] += 1
        elif kind == "add":
            borrower, numbers = arguments
            dropped = table.add_borrower(borrower, numbers)
            # Its node, asked to watch a process that is no more, says so.
            dropped += table.forget_process(borrower) if borrower not in self.tables else []
            for item in dropped:
                self.let_go(destination, item)
        else:
            for item in table.remove_borrower(source, *arguments):
                self.let_go(destination, item)

    def kill(self) -> None:
        """Its last words are heard, then of its end; what was on its way to it is lost."""
        victim = self.random.choice(self.living())
        del self.tables[victim], self.held[victim]
        for source, destination in list(self.lines):
            if source == victim:
                line = self.lines.pop((source, destination))
                while line:
                    self.arrived(source, destination, line.popleft())
        for address, table in self.tables.items():
            for item in table.forget_process(victim):
                self.let_go(address, item)

    # --- what must hold

    def check_nothing_freed_early(self) -> None:
        held = {reference for counts in self.held.values() for reference, count in counts.items() if count > 0}
        moving = {
            message[1]
            for (_, destination), line in self.lines.items()
            for message in line
            if message[0] == "reference" and destination in self.tables
        }
        early = {reference for reference in self.freed & (held | moving) if reference.owner in self.tables}
        assert not early, f"freed while in use: {early}"

    def end(self) -> None:
        while any(self.lines.values()) or self.pick():
            self.random.choice([self.drop, self.deliver])()
            self.check_nothing_freed_early()
        left = {address: list(table.owned) + list(table.borrowed) for address, table in self.tables.items()}
        assert not any(left.values()), f"never freed: {left}"


@pytest.mark.parametrize("deaths", [0, 1, 2])
@pytest.mark.parametrize("seed", seeds(1))
def test_nothing_is_freed_early_and_everything_at_last(seed: str, deaths: int) -> None:
    for number in range(WORLDS):
        world = World(Random(f"{seed}/{deaths}/{number}"))
        for step in range(STEPS):
            world.step()
            if deaths and step % (STEPS // (deaths + 1)) == STEPS // (deaths + 1) - 1 and len(world.tables) > 2:
                world.kill()
        world.end()
