"""An owner that loses nodes, and the objects on them, while its tasks run and are run again; a model has the arenas.

Results are what their task's number says, so that a mixed-up one shows. At no time may anything be freed that the owner
counts on. Once nothing is lost any more, whoever asks for an object gets it, or is told why not, which must not happen
where every task may be run often enough; and when nobody holds anything, nothing is left, neither with the owner nor in
an arena.
"""

from __future__ import annotations

from collections import deque
from random import Random
from typing import Any

import pytest

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core import recovery_messages as r
from clusterpool.core.messages import Address, Reference, ResultExtras, StoredValue, TaskResult, TaskStatus, ValuePart
from clusterpool.core.object_names import object_id
from tests.core.machines import DRIVER, NODE, make_task
from tests.core.test_lineage import Lineages
from tests.fuzz.searches import seeds

WORLDS = 60
STEPS = 150
NODES = 3
RICH = 1000  # retries that no world uses up


class World:
    """`arenas`: by node that lives, which object lies there under which name. `held`: objects that the program has."""

    def __init__(self, random: Random, *, is_rich: bool) -> None:
        self.random = random
        self.is_rich = is_rich
        self.owner = Lineages()
        self.nodes_made = 1
        self.arenas: dict[str, dict[str, int]] = {}
        self.queues: dict[Address, deque[m.TaskSpec]] = {}
        self.lines: dict[Address, deque[m.Message]] = {}  # from nodes to the owner, each in its order
        self.orders: dict[str, deque[m.Message]] = {}  # from the owner to nodes
        self.freed: set[tuple[str, str]] = set()  # node and name
        self.held: dict[int, int] = {}  # by object, its task
        self.last_number = 0
        for _ in range(NODES):
            self.add_node()

    def step(self) -> None:
        steps = [
            self.submit, self.submit, self.grant, self.run, self.run, self.run, self.drop, self.copy, self.evict,
            self.lose_node, self.read, self.want, self.deliver, self.deliver, self.obey, self.obey, self.pass_time,
        ]  # fmt: skip
        self.random.choice(steps)()
        self.check()

    def carry_out(self, commands: list[Any]) -> None:
        for command in commands:
            if not isinstance(command, e.Send):
                continue
            message, destination = command.message, command.destination
            if isinstance(message, m.StartTasks):
                if destination.node_id in self.arenas:
                    self.queues.setdefault(destination, deque()).extend(message.tasks)
            elif isinstance(message, m.FreeObjects) and destination.node_id in self.arenas:
                self.freed.update((destination.node_id, name) for name in message.object_ids)
                self.orders[destination.node_id].append(message)

    # --- the program

    def submit(self) -> None:
        if len(self.held) > 40:
            return
        count = min(len(self.held), self.random.choice([0, 0, 1, 1, 2, 3]))
        chosen = self.random.sample(sorted(self.held), count)
        split = self.random.randint(0, count)
        dependencies, references = ([Reference(DRIVER, n) for n in part] for part in (chosen[split:], chosen[:split]))
        returns = self.random.choice([1, 1, 2])
        number = self.last_number + 1
        self.last_number += returns
        retries = RICH if self.is_rich else self.random.choice([0, 1, 3])
        self.held.update((number + offset, number) for offset in range(returns))
        if not chosen:
            task = make_task(number, sink=None, retries=retries, returns=returns)
            self.carry_out(self.owner.submit(task))
            return
        self.carry_out(
            self.owner.submit_with(number, *dependencies, retries=retries, references=references, returns=returns)
        )

    def drop(self) -> None:
        if self.held:
            number = self.random.choice(sorted(self.held))
            del self.held[number]
            self.carry_out(self.owner.drop(number))

    def want(self) -> None:
        if self.held:
            self.carry_out(self.owner.want(self.random.choice(sorted(self.held))))

    def read(self) -> None:
        """Who finds it nowhere says so."""
        stored = [part for number in self.held if (part := self.stored_value(number)) is not None and part.node_ids]
        if stored:
            part = self.random.choice(stored)
            number = next(number for number in self.held if self.stored_value(number) == part)
            if not self.find(part, number):
                self.carry_out(self.owner.handle(e.ValueUnreadable(Reference(DRIVER, number), self.complaint(part))))

    def stored_value(self, number: int) -> StoredValue | None:
        value = self.owner.value_of(Reference(DRIVER, number))
        return value.stored if value is not None else None

    def find(self, part: StoredValue, number: int | None) -> bool:
        """Whether it is where it is said to be; what lies there is what it should be."""
        for node_id in part.node_ids:
            found = self.arenas.get(node_id, {}).get(part.object_id)
            if found is not None:
                assert number is None or found == number, f"{part.object_id} is object {found}, not {number}"
                return True
        return False

    def complaint(self, part: StoredValue) -> m.UnreadablePart:
        dead = [node_id for node_id in part.node_ids if node_id not in self.arenas]
        return m.UnreadablePart(part.object_id, [n for n in part.node_ids if n not in dead], "nobody has it", dead)

    # --- workers

    def grant(self) -> None:
        requested = self.owner.machine.sets[1].requested
        if requested:
            self.owner.leases += 1
            name, node_id = f"w{self.owner.leases}", self.random.choice(sorted(self.arenas))
            request = next(iter(requested))
            self.carry_out(self.owner.grant(request, name, lease=self.owner.leases, node_id=node_id))

    def run(self) -> None:
        busy = sorted(address for address, queue in self.queues.items() if queue)
        if not busy:
            return
        worker = self.random.choice(busy)
        spec = self.queues[worker].popleft()
        result = self.result_of(spec, worker.node_id)
        self.carry_out(self.owner.finish(worker.process_id, result, node_id=worker.node_id))
        for reference in spec.extras.references if spec.extras is not None else []:
            self.carry_out(self.owner.hear(worker, m.RemoveBorrower([reference.number], [1])))

    def result_of(self, spec: m.TaskSpec, node_id: str) -> TaskResult:
        extras = spec.extras or m.TaskExtras()
        for argument in extras.arguments:
            part = argument.stored
            if part is None:
                continue
            if not self.find(part, None):
                return TaskResult(spec.number, TaskStatus.LOST, b"", ResultExtras(unreadable=self.complaint(part)))
            if part.object_id not in self.arenas[node_id] and self.random.random() < 0.5:
                self.copy_to(node_id, part)
        values = [self.made(spec.number + offset, extras.attempt, node_id) for offset in range(extras.returns)]
        if len(values) > 1:
            return TaskResult(spec.number, TaskStatus.MULTIPLE, b"", ResultExtras(None, values))
        if values[0].stored is None:
            return TaskResult(spec.number, TaskStatus.OK, values[0].payload)
        return TaskResult(spec.number, TaskStatus.STORED, b"", ResultExtras(values[0]))

    def made(self, number: int, attempt: int, node_id: str) -> ValuePart:
        if self.random.random() < 0.2:
            return ValuePart(payload=b"%d" % number)
        name = object_id(DRIVER.process_id, number, attempt)
        self.arenas[node_id][name] = number
        self.freed.discard((node_id, name))
        return ValuePart(stored=StoredValue(name, 10**6, [node_id], DRIVER))

    # --- nodes

    def add_node(self) -> None:
        self.nodes_made += 1
        node_id = f"n{self.nodes_made}"
        self.arenas[node_id] = {}
        self.orders[node_id] = deque()

    def lose_node(self) -> None:
        if self.random.random() < 0.5:
            return
        node_id = self.random.choice(sorted(self.arenas))
        del self.arenas[node_id], self.orders[node_id]
        self.queues = {address: queue for address, queue in self.queues.items() if address.node_id != node_id}
        self.lines.pop(Address(node_id, node_id), None)
        self.carry_out(self.owner.hear(NODE, m.NodeLost(node_id, "silent")))
        self.add_node()

    def copy(self) -> None:
        """A node fetches what another has."""
        parts = [part for number in self.held if (part := self.stored_value(number)) is not None]
        if parts:
            part = self.random.choice(parts)
            node_id = self.random.choice(sorted(self.arenas))
            if part.object_id not in self.arenas[node_id] and self.find(part, None):
                self.copy_to(node_id, part)

    def copy_to(self, node_id: str, part: StoredValue) -> None:
        source = next(n for n in part.node_ids if part.object_id in self.arenas.get(n, {}))
        self.arenas[node_id][part.object_id] = self.arenas[source][part.object_id]
        self.freed.discard((node_id, part.object_id))
        self.tell(node_id, r.CopyMade(part.object_id))

    def evict(self) -> None:
        """A node loses one, be it the last."""
        node_id = self.random.choice(sorted(self.arenas))
        if self.arenas[node_id]:
            name = self.random.choice(sorted(self.arenas[node_id]))
            del self.arenas[node_id][name]
            self.tell(node_id, r.CopyGone(name))

    def tell(self, node_id: str, message: m.Message) -> None:
        self.lines.setdefault(Address(node_id, node_id), deque()).append(message)

    def deliver(self) -> None:
        waiting = sorted(address for address, line in self.lines.items() if line)
        if waiting:
            source = self.random.choice(waiting)
            self.carry_out(self.owner.hear(source, self.lines[source].popleft()))

    def obey(self) -> None:
        """A node does what the owner has told it."""
        waiting = sorted(node_id for node_id, orders in self.orders.items() if orders)
        if waiting:
            node_id = self.random.choice(waiting)
            message = self.orders[node_id].popleft()
            assert isinstance(message, m.FreeObjects)
            for name in message.object_ids:
                if (node_id, name) in self.freed:
                    self.arenas[node_id].pop(name, None)

    def pass_time(self) -> None:
        self.owner.now_s += self.random.choice([0.01, 0.2, 11.0])
        self.carry_out(self.owner.handle(e.TimePassed()))

    # --- what must hold

    def check(self) -> None:
        lineage, owned = self.owner.lineage, self.owner.machine.objects.table.owned
        assert lineage.size_bytes == sum(record.cost_bytes for record in lineage.by_task.values())
        for number, record in lineage.by_object.items():
            assert lineage.by_task.get(record.task.spec.number) is record and record.is_needed, f"object {number}"
        assert self.held.keys() <= owned.keys(), "an object that the program holds is not there"
        for number, entry in owned.items():
            stored = entry.value.stored if entry.value is not None else None
            if stored is not None:
                early = [node_id for node_id in stored.node_ids if (node_id, stored.object_id) in self.freed]
                assert not early, f"object {number} was freed on {early}, and is counted on"

    def end(self) -> None:
        """Nothing is lost any more: who asks gets what there is to get."""
        for _ in range(3000):
            for step in (self.grant, self.run, self.deliver, self.obey, self.read):
                step()
            for number in list(self.held):
                self.carry_out(self.owner.want(number))
            self.check()
            if not any(self.lines.values()) and all(self.is_answered(number) for number in self.held):
                break
            self.pass_time()
        else:
            raise AssertionError(f"never answered: {[n for n in self.held if not self.is_answered(n)]}")
        for number in list(self.held):
            self.check_value(number)
            del self.held[number]
            self.carry_out(self.owner.drop(number))
        machine = self.owner.machine
        while machine.tasks or any(self.lines.values()) or any(self.orders.values()) or any(self.queues.values()):
            for step in (self.grant, self.run, self.deliver, self.obey, self.pass_time):
                step()
        assert self.owner.is_clean(), "something is left with the owner"
        assert not any(self.arenas.values()), f"never freed: {self.arenas}"

    def is_answered(self, number: int) -> bool:
        value = self.owner.value_of(Reference(DRIVER, number))
        return value is not None and (value.stored is None or self.find(value.stored, number))

    def check_value(self, number: int) -> None:
        value = self.owner.value(number)
        if value.lost_kind:
            assert not self.is_rich, f"object {number} was given up: {value.lost}"
        elif value.stored is None:
            assert value.payload == b"%d" % number


@pytest.mark.parametrize("is_rich", [True, False])
@pytest.mark.parametrize("seed", seeds(1))
def test_what_is_lost_is_made_again_and_nothing_is_left(seed: str, is_rich: bool) -> None:
    for number in range(WORLDS):
        world = World(Random(f"{seed}/{is_rich}/{number}"), is_rich=is_rich)
        for _ in range(STEPS):
            world.step()
        world.end()
