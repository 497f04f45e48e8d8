"""The ownership protocol between real machines, whatever the order in which their messages arrive."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict, deque
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.messages import Address, Reference, ValuePart
from clusterpool.core.owner import OwnerMachine
from clusterpool.core.ownership import OwnershipTable
from tests.core.machines import DRIVER, JOB

PROCESSES = [Address("n1", "p0"), Address("n1", "p1"), Address("n2", "p2"), Address("n2", "p3")]


class Network:
    """Processes that pass references on, drop them, read values and die; each channel is first in, first out."""

    def __init__(self) -> None:
        self.numbers = itertools.count(1)
        requests = itertools.count(1)
        self.machines = {
            address: OwnerMachine(address, job=JOB, numbers=self.numbers, requests=requests) for address in PROCESSES
        }
        self.channels: dict[tuple[Address, Address], deque[Any]] = defaultdict(deque)
        self.watchers: dict[Address, list[Address]] = defaultdict(list)
        self.instances: dict[Address, Counter[Reference]] = {address: Counter() for address in PROCESSES}
        self.content: dict[Reference, list[Reference]] = {}

    # --- what the shells do

    def handle(self, address: Address, event: e.Event) -> None:
        if address not in self.machines:
            return
        for command in self.machines[address].handle(event, 0.0):
            if not isinstance(command, e.Send):
                continue
            message = command.message
            if isinstance(message, m.WatchProcess):
                self.watch(address, Address(command.destination.node_id, message.process_id))
            elif not isinstance(message, m.FreeObjects):
                self.channels[(address, command.destination)].append(message)

    def watch(self, watcher: Address, watched: Address) -> None:
        if watched in self.machines:
            self.watchers[watched].append(watcher)
        else:
            self.channels[(watched, watcher)].append(m.ProcessEnded(watched, "it has ended"))

    def put(self, address: Address, inner: list[Reference]) -> None:
        reference = Reference(address, next(self.numbers))
        if inner:
            self.handle(address, e.ReferencesMade(inner))
        self.handle(address, e.ValuePut(reference.number, ValuePart(payload=b"v", references=inner)))
        self.instances[address][reference] += 1
        self.content[reference] = inner

    def hand(self, giver: Address, receiver: Address, reference: Reference) -> None:
        commands = self.machines[giver].objects.hand_over(receiver, [reference])
        for command in commands:
            assert isinstance(command, e.Send)
            if isinstance(command.message, m.WatchProcess):
                self.watch(giver, Address(command.destination.node_id, command.message.process_id))
            else:
                self.channels[(giver, command.destination)].append(command.message)
        self.channels[(giver, receiver)].append(reference)

    def drop(self, address: Address, reference: Reference) -> None:
        self.instances[address][reference] -= 1
        self.instances[address] += Counter()  # leaves out the zeros
        self.handle(address, e.ReferencesDropped([(reference.owner, reference.number)]))

    def load(self, address: Address, reference: Reference) -> None:
        """Read a value: instances of the references inside come into being."""
        machine = self.machines[address]
        value = machine.objects.table.value_of(reference)
        if value is None:
            self.handle(address, e.ValueWanted(reference))
        else:
            for inner in value.references:
                self.handle(address, e.ReferencesMade([inner]))
                self.instances[address][inner] += 1

    def deliver(self, channel: tuple[Address, Address]) -> None:
        sender, receiver = channel
        message = self.channels[channel].popleft()
        if receiver not in self.machines:
            return
        if isinstance(message, Reference):
            self.handle(receiver, e.ReferencesHeld([message]))
            self.instances[receiver][message] += 1
        else:
            self.handle(receiver, e.MessageArrived(sender, message))

    def die(self, address: Address) -> None:
        del self.machines[address]
        self.instances[address].clear()
        # On the same channel: what the dead had sent is read before the news of its end.
        for watcher in dict.fromkeys(self.watchers.pop(address, [])):
            self.channels[(address, watcher)].append(m.ProcessEnded(address, "it has ended"))

    # --- what must hold

    def waiting(self) -> list[tuple[Address, Address]]:
        return [channel for channel, queue in self.channels.items() if queue]

    def check_held_objects_exist(self) -> None:
        held = {ref for address in self.machines for ref in self.instances[address]}
        for (_, receiver), queue in self.channels.items():
            if receiver in self.machines:
                held.update(item for item in queue if isinstance(item, Reference))
        for reference in held:
            owner = self.machines.get(reference.owner)
            if owner is not None:
                assert reference.number in owner.objects.table.owned, f"{reference} was freed, but is held"

    def settle(self) -> None:
        while waiting := self.waiting():
            self.deliver(waiting[0])
            self.check_held_objects_exist()

    def check_all_is_freed(self) -> None:
        self.settle()
        for address in list(self.machines):
            for reference in list(self.instances[address].elements()):
                self.drop(address, reference)
        self.settle()
        for address, machine in self.machines.items():
            table = machine.objects.table
            left = {number: (record.local, record.borrowers) for number, record in table.owned.items()}
            assert left == {}, f"{address} still owns {left}"
            assert table.borrowed == {}, f"{address} still borrows"


STEP = st.tuples(
    st.sampled_from(
        ["put", "put_with", "hand", "hand", "hand", "drop", "drop", "load", "deliver", "deliver", "deliver"]
    ),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(0, 11),
)


def run_step(network: Network, step: tuple[str, int, int, int]) -> None:
    action, first, second, choice = step
    address, other = PROCESSES[first], PROCESSES[second]
    if action == "deliver":
        waiting = network.waiting()
        if waiting:
            network.deliver(waiting[choice % len(waiting)])
        return
    if address not in network.machines:
        return
    held = list(network.instances[address])
    reference = held[choice % len(held)] if held else None
    if action == "put":
        network.put(address, [])
    elif action == "die":
        network.die(address)
    elif reference is None:
        return
    elif action == "put_with":
        network.put(address, [reference])
    elif action == "hand" and other != address:
        network.hand(address, other, reference)
    elif action == "drop":
        network.drop(address, reference)
    elif action == "load":
        network.load(address, reference)
    elif action == "read":
        network.load(address, reference)
        network.settle()
        network.load(address, reference)


def run_history(steps: list[tuple[str, int, int, int]]) -> None:
    network = Network()
    for step in steps:
        run_step(network, step)
        network.check_held_objects_exist()
    network.check_all_is_freed()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEP, max_size=60))
def test_no_object_is_freed_while_somebody_holds_it_and_all_are_in_the_end(
    steps: list[tuple[str, int, int, int]],
) -> None:
    run_history(steps)


DYING_STEP = st.one_of(STEP, st.tuples(st.just("die"), st.integers(0, 3), st.just(0), st.just(0)))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(DYING_STEP, max_size=60))
def test_what_the_dead_held_is_freed_and_what_the_living_hold_is_not(
    steps: list[tuple[str, int, int, int]],
) -> None:
    run_history(steps)


ACTIONS = [*["put"] * 3, *["put_with"] * 2, *["hand"] * 12, *["drop"] * 6, "read", *["deliver"] * 16]


@pytest.mark.parametrize("seed", range(60))
def test_long_histories_free_what_nobody_holds_and_nothing_else(seed: int) -> None:
    random = Random(seed)
    network = Network()
    actions = ACTIONS if seed % 2 else [*ACTIONS, "die"]
    for _ in range(300):
        action = random.choice(actions)
        if action == "die" and random.random() < 0.9:
            continue
        run_step(network, (action, random.randrange(4), random.randrange(4), random.randrange(12)))
        network.check_held_objects_exist()
    network.check_all_is_freed()


# --- the table alone

OWNER, BORROWER, GIVER = DRIVER, Address("n1", "w1"), Address("n1", "w2")


def owned(number: int = 1) -> OwnershipTable:
    table = OwnershipTable(OWNER)
    table.create(number)
    table.set_value(number, ValuePart(payload=b"v"))
    return table


def test_an_object_goes_with_its_last_local_reference() -> None:
    table = owned()
    table.hold(Reference(OWNER, 1))
    assert table.drop(OWNER, 1) is None
    assert table.drop(OWNER, 1) is not None
    assert table.owned == {}


def test_a_pending_object_stays_until_its_task_has_ended() -> None:
    table = OwnershipTable(OWNER)
    table.create(1)
    assert table.drop(OWNER, 1) is None
    record, _ = table.set_value(1, ValuePart(payload=b"v"))
    assert record is not None
    assert table.settle(record) is not None


def test_letting_go_may_overtake_the_news_of_the_handing_over() -> None:
    table = owned()
    table.add_borrower(GIVER, [1])
    table.drop(OWNER, 1)
    assert table.remove_borrower(BORROWER, [1], [1]) == []
    assert table.remove_borrower(GIVER, [1], [1]) == [], "BORROWER's account is not balanced yet"
    assert len(table.add_borrower(BORROWER, [1])) == 1


def test_a_task_in_flight_keeps_its_argument() -> None:
    table = owned()
    table.pin(Reference(OWNER, 1))
    assert table.drop(OWNER, 1) is None
    assert table.unpin(Reference(OWNER, 1)) is not None


def test_a_borrower_gives_back_as_often_as_it_was_handed() -> None:
    table = OwnershipTable(BORROWER)
    for was_handed in (True, True, False):
        table.hold(Reference(OWNER, 1), was_handed=was_handed)
    assert table.drop(OWNER, 1) is table.drop(OWNER, 1) is None
    dropped = table.drop(OWNER, 1)
    assert dropped is not None
    assert dropped.handed == 2


def test_an_object_gets_one_value_only() -> None:
    with pytest.raises(AssertionError, match="second value"):
        owned().set_value(1, ValuePart(payload=b"other"))
