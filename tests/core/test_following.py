"""Groups that have a worker for each CPU of the cluster, while nodes come and go."""

from __future__ import annotations

from typing import Any

import pytest

from clusterpool.core import membership as ms
from clusterpool.core import messages as m
from clusterpool.core import node_events
from clusterpool.core import owner_events as e
from clusterpool.core.cluster_view import NodeEntry, NodeLoad, NodeRecord, NodesSnapshot
from clusterpool.core.messages import Address
from tests.core.machines import DRIVER, NODE, Owner, make_task, of_type, sent
from tests.core.test_node import Node
from tests.core.test_node import sent as node_sent


class Followers(Owner):
    """With a group that was opened for two nodes of two CPUs each, and has its workers: w1, w2 on n1, w3, w4 on n2."""

    def __init__(self, *, size: int = 4) -> None:
        super().__init__()
        self.handle(e.FunctionAdded(1, b"function"))
        demand = m.WorkerDemand(m.WorkerKind.GROUP, {})
        commands = self.handle(e.SetOpened(1, demand, e.SetupPlan(), size, follows_cluster=True))
        assert sent(commands, m.WatchCapacity, NODE)
        commands += self.hear(NODE, m.CapacityChanged({"n1": 2.0, "n2": 2.0}))
        for number in range(1, 5):
            (request,) = list(self.worker_set.requested)[:1]
            self.grant(request, f"w{number}", lease=number, node_id="n1" if number <= 2 else "n2")

    @property
    def worker_set(self) -> Any:
        return self.machine.sets[1]

    def sizes(self, commands: list[Any]) -> list[int]:
        return [changed.size for changed in of_type(commands, e.SetSizeChanged)]


def asked(commands: list[Any]) -> int:
    return sum(request.count for request in sent(commands, m.RequestWorkers, NODE))


def test_a_node_that_joins_gets_as_many_workers_as_it_has_cpus() -> None:
    owner = Followers()
    commands = owner.hear(NODE, m.CapacityChanged({"n1": 2.0, "n2": 2.0, "n3": 3.0}))
    assert (asked(commands), owner.sizes(commands)) == (3, [7])


@pytest.mark.parametrize("size", [3, 5])
def test_a_size_that_is_out_of_date_is_mended(size: int) -> None:
    assert len(Followers(size=size).worker_set.held) == 4


def test_what_a_lost_node_held_is_not_replaced_and_its_tasks_run_on_the_others() -> None:
    owner = Followers()
    tasks = [make_task(number, retries=3) for number in range(1, 5)]
    owner.submit(*tasks)
    commands = owner.hear(NODE, m.NodeLost("n2", "silent"))
    commands += owner.hear(NODE, m.CapacityChanged({"n1": 2.0}))
    assert (asked(commands), owner.sizes(commands)) == (0, [2])
    assert not of_type(commands, e.FailTasks) and not sent(commands, m.RetireWorker)
    for name in ("w1", "w2"):
        (number,) = owner.worker_set.dispatcher.slots[name].outstanding
        commands += owner.finish(name, m.TaskResult(number, m.TaskStatus.OK, b""))
    assert len(sent(commands, m.StartTasks)) == 2
    assert not asked(commands)


def test_a_lost_node_is_no_accident_for_its_workers_that_had_nothing_to_do() -> None:
    """(An executor breaks when a worker has an accident.)"""
    owner = Followers()
    owner.submit(*(make_task(number, retries=3) for number in range(1, 4)))
    commands = owner.hear(NODE, m.NodeLost("n2", "silent"))
    busy = {task.worker for task in owner.machine.tasks.values()}
    left = {command.worker.address.process_id: command.was_expected for command in of_type(commands, e.SetWorkerLeft)}
    assert left == {"w3": False, "w4": True} and busy == {"w1", "w2", ""}


def test_workers_that_a_lost_node_leaves_over_go_when_they_have_nothing_to_do() -> None:
    """The last node of many CPUs is lost, where only one of the workers was."""
    owner = Followers()
    owner.hear(NODE, m.CapacityChanged({"n1": 2.0, "n2": 1.0, "n3": 1.0}))
    owner.submit(make_task(1))
    commands = owner.hear(NODE, m.CapacityChanged({"n1": 2.0, "n2": 1.0}))
    (retired,) = [send.destination for send in of_type(commands, e.Send) if isinstance(send.message, m.RetireWorker)]
    assert not owner.worker_set.dispatcher.slots[retired.process_id].outstanding


def test_a_worker_that_dies_by_itself_is_replaced() -> None:
    owner = Followers()
    exited = m.WorkerExited(1, Address("n1", "w1"), -9, "killed")
    assert asked(owner.hear(NODE, exited)) == 1


def test_a_size_of_its_own_ends_the_following() -> None:
    owner = Followers()
    owner.handle(e.SetResized(1, 3))
    assert owner.hear(NODE, m.CapacityChanged({"n1": 16.0})) == []
    assert owner.worker_set.size == 3
    owner.handle(e.SetResized(1, 16, follows_cluster=True))
    assert owner.sizes(owner.hear(NODE, m.CapacityChanged({"n1": 8.0}))) == [8]


def test_a_closed_group_follows_no_more() -> None:
    owner = Followers()
    owner.submit(make_task(1))
    owner.handle(e.SetClosed(1))
    assert owner.hear(NODE, m.CapacityChanged({"n1": 16.0})) == []


def test_groups_with_a_size_do_not_ask() -> None:
    owner = Owner()
    assert not sent(owner.open_set(size=2), m.WatchCapacity)
    assert owner.hear(NODE, m.CapacityChanged({"n1": 16.0})) == []
    assert owner.machine.sets[1].size == 2


# --- the node's side


def entry(node_id: str, cpus: float) -> NodeEntry:
    record = NodeRecord(node_id, "host", 0, "", {"CPU": cpus})
    return NodeEntry(record, 1, 10**6, 0.0, NodeLoad({"CPU": cpus}))


@pytest.fixture
def node() -> Node:
    node = Node()
    node.join(DRIVER, "driver")
    return node


def told(commands: list[Any]) -> list[dict[str, float]]:
    return [message.cpus_by_node for message in node_sent(commands, m.CapacityChanged, DRIVER)]


def test_whoever_asks_is_told_at_once_and_of_each_change(node: Node) -> None:
    assert told(node.hear(DRIVER, m.WatchCapacity())) == [{"n1": 2.0}]
    node.handle(ms.JoinRequested(node.machine.record))
    node.handle(ms.Registered(1))
    both = node.handle(ms.NodesRead(NodesSnapshot([entry("n1", 2.0), entry("n2", 4.0)])))
    assert told(both)[-1:] == [{"n1": 2.0, "n2": 4.0}]
    again = node.handle(ms.NodesRead(NodesSnapshot([entry("n1", 2.0), entry("n2", 4.0)])))
    assert told(again) == []


def test_who_has_ended_is_told_nothing(node: Node) -> None:
    node.hear(DRIVER, m.WatchCapacity())
    node.handle(ms.JoinRequested(node.machine.record))
    node.handle(ms.Registered(1))
    node.handle(node_events.ProcessLeft(DRIVER))
    assert told(node.handle(ms.NodesRead(NodesSnapshot([entry("n1", 2.0), entry("n2", 4.0)])))) == []
