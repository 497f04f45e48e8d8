"""Nothing is stored for an owner that has ended, even by a worker that does not know of it yet."""

from __future__ import annotations

from typing import Any

import pytest

from clusterpool.core import membership as ms
from clusterpool.core import messages as m
from clusterpool.core import node_events as e
from clusterpool.core.cluster_view import NodeEntry, NodeRecord, NodesSnapshot
from clusterpool.core.messages import Address
from tests.core.machines import DRIVER
from tests.core.test_node import NOW_S, W1, Node, of_type, sent

REMOTE = Address("n2", "d9")
THERE = REMOTE.node


@pytest.fixture
def node() -> Node:
    """A node with a driver and a worker of that."""
    node = Node()
    node.join(DRIVER, "driver")
    node.lease()
    return node


def create(node: Node, object_id: str, owner: Address = DRIVER) -> list[Any]:
    commands = node.hear(W1, m.CreateObject(7, object_id, 1000, owner))
    for command in of_type(commands, e.ReservePages):
        commands += node.handle(
            e.PagesReserved(command.client, command.request, command.object_id, command.offset, command.size_bytes)
        )
    return commands


def store(node: Node, object_id: str, owner: Address = DRIVER) -> list[Any]:
    return create(node, object_id, owner) + node.hear(W1, m.SealObject(object_id))


def stored(node: Node) -> set[str]:
    return set(node.machine.objects.store.objects)


def test_a_worker_that_is_being_killed_leaves_no_result_of_its_dead_owner(node: Node) -> None:
    store(node, "d1.1024")
    commands = node.handle(e.ProcessLeft(DRIVER))
    assert [command.process_id for command in of_type(commands, e.EndWorker)] == ["w1"]
    # Sent before the signal reached it.
    commands = store(node, "d1.2048")
    assert [failed.kind for failed in sent(commands, m.StoreFailed, W1)] == ["freed"]
    node.worker_ends()
    assert stored(node) == set()


def test_what_was_being_written_when_its_owner_ended_goes_when_it_is_sealed(node: Node) -> None:
    create(node, "d1.1024")
    node.handle(e.ProcessLeft(DRIVER))
    node.hear(W1, m.SealObject("d1.1024"))
    assert stored(node) == set()


def test_an_owner_of_another_node_that_has_ended_is_asked_for_again(node: Node) -> None:
    node.lease(source=REMOTE)
    node.hear(THERE, m.ProcessEnded(REMOTE, "killed"))
    # By a worker that is not its own: an actor that it had called, say.
    assert sent(store(node, "d9.1024", REMOTE), m.WatchProcess, THERE) == [m.WatchProcess("d9")]
    assert stored(node) == {"d9.1024"}
    node.hear(THERE, m.ProcessEnded(REMOTE, "no such process is on its node"))
    assert stored(node) == set()


def test_an_owner_that_could_not_be_reached_once_may_still_have_results(node: Node) -> None:
    node.hear(Address("n1", "n1"), m.Undeliverable(REMOTE))
    store(node, "d9.1024", REMOTE)
    assert stored(node) == {"d9.1024"}


def listed(incarnation: int) -> ms.NodesRead:
    entries = [
        NodeEntry(NodeRecord(name, "h", 7000, "", {"CPU": 2.0}), number, 1, 0.0)
        for name, number in (("n1", 1), ("n2", incarnation))
    ]
    return ms.NodesRead(NodesSnapshot(entries))


def test_owners_of_a_node_that_was_taken_for_dead_are_asked_for_when_it_is_back() -> None:
    node = Node()
    machine = node.machine
    machine.handle(ms.JoinRequested(machine.record), NOW_S)
    machine.handle(ms.Registered(1), NOW_S)
    node.handle(listed(incarnation=2))
    node.join(DRIVER, "driver")
    node.lease()
    store(node, "d9.1024", REMOTE)
    node.handle(ms.NodeEventRead("node_died", "n2", 2, "silent"))
    assert stored(node) == set()
    store(node, "d9.2048", REMOTE)
    assert sent(node.handle(listed(incarnation=3)), m.WatchProcess, THERE) == [m.WatchProcess("d9")]
    assert stored(node) == {"d9.2048"}
    node.hear(THERE, m.ProcessEnded(REMOTE, "no such process is on its node"))
    assert stored(node) == set()
