"""What simulated programs do with locks, cells and queues of the cluster."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from clusterpool.simulation.carriers import CarrierPart, CoordinationError, Token
from clusterpool.simulation.client import Client
from clusterpool.simulation.programs import Operation, Outcome, expected
from clusterpool.simulation.references import Ref
from clusterpool.simulation.threads import Pause, Steps

if TYPE_CHECKING:
    from clusterpool.simulation.workloads import Script
    from clusterpool.simulation.world import World

# Longer than any fault lasts, and than a dead node or process is found out.
PATIENCE_S = 60.0


class Turn(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What a task does with carriers: `rounds` times it adds one to the cell under the lock, or moves an item."""

    lock: CarrierPart
    cell: CarrierPart
    rounds: int
    hold_s: float
    dies_in: int = -1  # in this round it ends its process while it holds the lock


class LockLedger:
    """What guarded writes have done, in one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.acknowledged: Counter[str] = Counter()  # by cell
        self.lock_by_cell: dict[str, str] = {}

    def is_void(self, cell: str) -> bool:
        """Whether the control store has forgotten something of it, or of the lock that guards it."""
        return not self._world.evidence.void.isdisjoint((cell, self.lock_by_cell.get(cell, "")))

    def written(self, name: str, before: bytes, after: bytes) -> None:
        """A guarded cell has new content: it must have been made from what was there."""
        was, now = count_of(before), count_of(after)
        if name in self.lock_by_cell and not self.is_void(name):
            self._world.monitor.check(now == was + 1, f"cell {name} goes from {was} to {now}: two held its lock")


def count_of(content: bytes) -> int:
    """The number in a cell."""
    return int(content or b"0")


def locks(script: Script) -> Steps:
    """Tasks, and the driver, add to one cell in turns; some die while they hold the lock."""
    driver, random = script.driver, script.random
    lock = driver.carriers.make("lock", 1)
    cell = driver.carriers.make("cell", content=b"0")
    driver.world.locks.lock_by_cell[cell.name] = lock.name
    refs: list[tuple[Ref, Operation]] = []
    for _ in range(script.count(2, 8)):
        rounds = random.randint(1, 5)
        is_deadly = random.random() < 0.2
        turn = Turn(
            lock, cell, rounds, random.choice((0.0, 0.001, 0.05, 0.4)), random.randrange(rounds) if is_deadly else -1
        )
        operation = script.operation(
            fails=False, result_bytes=8, turn=msgspec.msgpack.encode(turn), deaths=0 if not is_deadly else 1
        )
        refs.append((script.submit(operation), operation))
        if random.random() < 0.2:
            yield Pause(0.05)
    own = Turn(lock, cell, random.randint(0, 3), 0.001)
    failure = yield from take_turns(driver, own)
    if failure is not None:
        driver.world.monitor.judge(driver, "turn of the driver", failure, Outcome("ok", 0))
    for ref, operation in refs:
        yield from script.settle(ref, expected(operation), "task with a lock")
    try:
        content = yield from driver.carriers.read_cell(cell)
    except CoordinationError as exc:
        driver.world.monitor.judge(driver, "cell", exc.outcome, Outcome("ok", 0))
        return
    if not driver.world.locks.is_void(cell.name):
        known = driver.world.locks.acknowledged[cell.name]
        driver.world.monitor.check(
            count_of(content) >= known, f"{cell.name} has {count_of(content)}, and {known} writes were acknowledged"
        )


def take_turns(client: Client, turn: Turn, operation: Operation | None = None) -> Steps:
    """Do what a Turn says; why it could not be done, or None."""
    carriers, world = client.carriers, client.world
    for number in range(turn.rounds):
        try:
            token = yield from carriers.acquire(turn.lock, PATIENCE_S)
            if token is None:
                world.monitor.check(
                    world.locks.is_void(turn.cell.name),
                    f"{client.name} has waited {PATIENCE_S:g} s for {turn.lock.name}: the dead left it free",
                )
                return Outcome("lock_lost", 0, text=f"nobody has given {turn.lock.name} back")
            yield from _turn(client, turn, token, operation if number == turn.dies_in else None)
        except CoordinationError as exc:
            return exc.outcome
    return None


def _turn(client: Client, turn: Turn, token: Token, operation: Operation | None) -> Steps:
    carriers = client.carriers
    content = yield from carriers.read_cell(turn.cell)
    if operation is not None:
        yield from client.maybe_die(operation)
    yield Pause(turn.hold_s)
    yield from carriers.write_cell(turn.cell, b"%d" % (count_of(content) + 1), token)
    client.world.locks.acknowledged[turn.cell.name] += 1
    yield from carriers.release(token)
