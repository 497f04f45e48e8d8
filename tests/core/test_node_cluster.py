"""What a node does as one of several: requests passed on, drivers that leave, nodes that are lost, and being fenced."""

from __future__ import annotations

import itertools
from typing import Any

from clusterpool.core import membership as ms
from clusterpool.core import messages as m
from clusterpool.core import node_events as e
from clusterpool.core.cluster_view import NodeEntry, NodeLoad, NodeRecord, NodesSnapshot
from clusterpool.core.coordination_events import CallCoordination
from clusterpool.core.messages import Address, WorkerKind
from clusterpool.core.node import NodeMachine
from clusterpool.core.peer_messages import EndJob, JobEnded, LoadChanged
from tests.core.machines import JOB, of_type

HERE = Address("n1", "n1")
THERE = Address("n2", "n2")
DRIVER_HERE = Address("n1", "d1")
DRIVER_THERE = Address("n2", "d2")
JOB_THERE = m.JobPart("j2", "", "h2", "/", [], "", {}, "", DRIVER_THERE)


def record(node_id: str, cpus: float = 2.0) -> NodeRecord:
    return NodeRecord(node_id, "127.0.0.1", 7, "", {"CPU": cpus}, host_name=f"h{node_id[1:]}")


class Node:
    """Node n1 with 2 CPUs, a member of a cluster with n2 (4 CPUs) and n3 (2 CPUs), all of which are idle."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.machine = NodeMachine(
            record("n1"),
            arena_bytes=1 << 20,
            is_embedded=False,
            is_head=True,
            process_ids=(f"w{number}" for number in itertools.count(1)),
        )
        self.handle(ms.JoinRequested(record("n1")))
        self.handle(ms.Registered(1))
        self.joined = self.list_nodes("n1", "n2", "n3")

    def handle(self, event: Any) -> list[Any]:
        return self.machine.handle(event, self.now_s)

    def hear(self, source: Address, message: m.Message) -> list[Any]:
        return self.handle(e.MessageArrived(source, message))

    def list_nodes(self, *node_ids: str) -> list[Any]:
        cpus = {"n1": 2.0, "n2": 4.0, "n3": 2.0}
        nodes = [NodeEntry(record(node_id, cpus[node_id]), 1, 1, 0.0) for node_id in node_ids]
        return self.handle(ms.NodesRead(NodesSnapshot(nodes)))

    def join_driver(self) -> list[Any]:
        return self.handle(e.ProcessJoined(DRIVER_HERE, "driver", 1, JOB, False))

    def request(
        self, source: Address, job: m.JobPart, *, count: int = 1, kind: int = WorkerKind.TASK, hops: int = 0,
        strategy: str = "", origin: Address | None = None, cpus: float = 1.0,
    ) -> list[Any]:  # fmt: skip
        resources = {"CPU": cpus} if kind == WorkerKind.TASK else {}
        demand = m.WorkerDemand(kind, resources, strategy=strategy)
        return self.hear(source, m.RequestWorkers(1, count, demand, job, hops, origin))

    def request_from_there(self, *, count: int = 1, strategy: str = "") -> list[Any]:
        return self.request(THERE, JOB_THERE, count=count, hops=1, strategy=strategy, origin=DRIVER_THERE)

    def join_workers(self, commands: list[Any]) -> list[Any]:
        """All workers that the commands fork say hello."""
        joined = []
        for fork in of_type(commands, e.ForkWorker):
            joined += self.handle(e.ProcessJoined(Address("n1", fork.process_id), "worker", 9, None, False))
        return joined


def passed_on(commands: list[Any]) -> dict[str, int]:
    """How many workers are asked for, by node."""
    counts: dict[str, int] = {}
    for command in commands:
        if isinstance(command, e.Send) and isinstance(command.message, m.RequestWorkers):
            node_id = command.destination.node_id
            counts[node_id] = counts.get(node_id, 0) + command.message.count
    return counts


def sent(commands: list[Any], kind: type, to: Address | None = None) -> list[Any]:
    """The messages of this type that the commands send (to one process)."""
    return [
        command.message
        for command in commands
        if isinstance(command, e.Send)
        and isinstance(command.message, kind)
        and (to is None or command.destination == to)
    ]


# --- placement


def test_other_nodes_are_told_of_as_they_join() -> None:
    assert [command.node_id for command in of_type(Node().joined, e.PeerJoined)] == ["n2", "n3"]


def test_a_group_is_spread_by_cpus() -> None:
    node = Node()
    node.join_driver()
    commands = node.request(DRIVER_HERE, JOB, count=8, kind=WorkerKind.GROUP)
    assert passed_on(commands) == {"n2": 4, "n3": 2}
    assert len(of_type(commands, e.ForkWorker)) == 2


def test_what_does_not_fit_here_goes_where_there_is_room() -> None:
    node = Node()
    node.join_driver()
    commands = node.request(DRIVER_HERE, JOB, count=5)
    assert len(of_type(commands, e.ForkWorker)) == 2
    assert sum(passed_on(commands).values()) == 3


def test_a_request_that_was_passed_on_does_not_go_in_circles() -> None:
    # Where it came from looked at the whole cluster already; here n2 and n3 look emptier still.
    node = Node()
    commands = node.request_from_there(count=2, strategy="spread")
    assert len(of_type(commands, e.ForkWorker)) == 2
    assert passed_on(commands) == {}


def test_a_node_that_told_its_load_is_believed_over_an_older_heartbeat() -> None:
    node = Node()
    node.join_driver()
    busy = NodeLoad(available={"CPU": 0.0}, leases=4, number=5)
    node.hear(THERE, LoadChanged("n2", busy))
    node.list_nodes("n1", "n2", "n3")  # what the store has of n2 is from before
    assert passed_on(node.request(DRIVER_HERE, JOB, count=4)) == {"n3": 2}


def test_who_sends_requests_hears_of_each_change() -> None:
    node = Node()
    assert sent(node.handle(e.TimePassed()), LoadChanged) == []
    commands = node.request_from_there()
    (told,) = sent(commands, LoadChanged, THERE)
    assert told.load.available["CPU"] == 1.0 and told.load.leases == 1
    assert sent(node.handle(e.TimePassed()), LoadChanged) == []


# --- the end of drivers


def test_idle_workers_end_with_a_driver_on_another_node() -> None:
    node = Node()
    commands = node.request_from_there()
    assert sent(commands, m.WatchProcess, THERE) == [m.WatchProcess("d2")]
    node.join_workers(commands)
    (lease,) = node.machine.scheduler.leases
    node.hear(DRIVER_THERE, m.ReleaseWorkers([lease], False))
    ended = node.hear(THERE, m.ProcessEnded(DRIVER_THERE, "it has ended"))
    assert [command.process_id for command in of_type(ended, e.EndWorker)] == ["w1"]


def test_a_driver_leaves_once_its_workers_everywhere_have_ended() -> None:
    node = Node()
    node.join_driver()
    node.hear(THERE, m.WatchProcess("d1"))
    commands = node.hear(DRIVER_HERE, m.LeaveNode())
    assert sent(commands, EndJob, THERE) == [EndJob(DRIVER_HERE)]
    assert sent(commands, m.LeftNode) == []
    commands = node.hear(THERE, JobEnded(DRIVER_HERE))
    assert sent(commands, m.LeftNode, DRIVER_HERE) == [m.LeftNode()]


def test_a_driver_does_not_wait_for_a_node_that_is_lost() -> None:
    node = Node()
    node.join_driver()
    node.hear(THERE, m.WatchProcess("d1"))
    node.hear(DRIVER_HERE, m.LeaveNode())
    commands = node.handle(ms.NodeEventRead("node_died", "n2", 1, "it was silent"))
    assert sent(commands, m.LeftNode, DRIVER_HERE) == [m.LeftNode()]


def test_a_driver_that_leaves_later_does_not_ask_a_lost_node() -> None:
    node = Node()
    node.join_driver()
    node.hear(THERE, m.WatchProcess("d1"))
    node.handle(ms.NodeEventRead("node_died", "n2", 1, "it was silent"))
    commands = node.hear(DRIVER_HERE, m.LeaveNode())
    assert sent(commands, EndJob) == []
    assert sent(commands, m.LeftNode, DRIVER_HERE) == [m.LeftNode()]


def test_the_end_of_a_job_is_told_when_its_last_worker_here_has_ended() -> None:
    node = Node()
    node.join_workers(node.request_from_there(count=2))
    commands = node.hear(THERE, EndJob(DRIVER_THERE))
    assert {command.process_id for command in of_type(commands, e.EndWorker)} == {"w1", "w2"}
    assert sent(commands, JobEnded) == []
    assert sent(node.handle(e.WorkerEnded("w1", -9, "")), JobEnded) == []
    assert sent(node.handle(e.WorkerEnded("w2", -9, "")), JobEnded, THERE) == [JobEnded(DRIVER_THERE)]
    assert sent(node.hear(THERE, EndJob(DRIVER_THERE)), JobEnded, THERE) == [JobEnded(DRIVER_THERE)]


# --- the end of nodes


def test_the_workers_and_requests_of_a_lost_node_go() -> None:
    node = Node()
    node.join_driver()
    node.join_workers(node.request_from_there(count=2))
    node.request_from_there(count=3)
    commands = node.handle(ms.NodeEventRead("node_died", "n2", 1, "it was silent"))
    assert {command.process_id for command in of_type(commands, e.EndWorker)} == {"w1", "w2"}
    assert node.machine.scheduler.pending == []
    assert [command.node_id for command in of_type(commands, e.PeerLost)] == ["n2"]
    assert sent(commands, m.NodeLost, DRIVER_HERE) == [m.NodeLost("n2", "it was silent")]


def test_what_the_drivers_of_a_lost_node_have_in_the_store_goes_with_their_jobs() -> None:
    # Also of drivers of whom nobody here has heard: their node was lost before, and came back with them.
    node = Node()
    commands = node.handle(ms.NodeEventRead("node_died", "n2", 1, "it was silent"))
    (call,) = [call for call in of_type(commands, e.CallStore) if call.operation == "reconcile_jobs"]
    commands = node.handle(e.StoreReturned(call.tag, {"j2": "n2", "j3": ""}))
    assert of_type(commands, CallCoordination) == [
        CallCoordination(0, "delete_job", ("j2", "n2"), False),
        CallCoordination(0, "delete_job", ("j3", ""), False),
    ]


def test_a_fenced_node_ends_its_workers_before_it_joins_anew() -> None:
    node = Node()
    node.join_driver()
    node.join_workers(node.request(DRIVER_HERE, JOB) + node.request_from_there())
    commands = node.handle(ms.NodeEventRead("node_died", "n1", 1, "it was silent"))
    assert {command.process_id for command in of_type(commands, e.EndWorker)} == {"w1", "w2"}
    assert {lost.node_id for lost in sent(commands, m.NodeLost, DRIVER_HERE)} == {"n2", "n3"}
    assert not of_type(commands, ms.FenceSelf)
    assert not of_type(node.handle(e.TimePassed()), ms.RegisterNode)
    for name in ("w1", "w2"):
        node.handle(e.WorkerEnded(name, -9, ""))
    assert of_type(node.handle(e.TimePassed()), ms.RegisterNode)


def test_stopping_all_nodes_tells_the_others_first() -> None:
    node = Node()
    tool = Address("n1", "t1")
    commands = node.hear(tool, m.StopNode(True))
    assert [command.destination.node_id for command in commands if isinstance(command, e.Send)] == ["n2", "n3"]
    assert isinstance(commands[-1], e.StopNode)
    assert sent(node.hear(tool, m.StopNode(False)), m.StopNode) == []


def test_a_request_that_comes_home_after_the_end_of_its_owner_is_dropped() -> None:
    node = Node()
    node.join_driver()
    worker = Address("n1", "w9")
    node.handle(e.ProcessJoined(worker, "worker", 9, None, False))
    node.handle(e.ProcessLeft(worker))
    commands = node.request(THERE, JOB, hops=2, origin=worker)
    assert of_type(commands, e.ForkWorker) == []
    assert node.machine.scheduler.leases == {}


def test_a_driver_is_watched_anew_after_its_node_has_come_back() -> None:
    node = Node()
    commands = node.request_from_there()
    (watch,) = sent(commands, m.WatchProcess, THERE)
    (fork,) = of_type(commands, e.ForkWorker)
    node.handle(e.ForkFailed(fork.process_id, "no memory"))  # nothing is left of it here but that it is watched
    node.handle(ms.NodeEventRead("node_died", "n2", 1, "silent"))
    assert sent(node.request_from_there(), m.WatchProcess, THERE) == [watch]


def test_a_node_that_is_fenced_hears_no_request_of_a_worker_that_it_has_killed() -> None:
    node = Node()
    node.join_workers(node.request_from_there())
    node.handle(ms.HeartbeatAnswered(ms.HeartbeatAnswer.FENCED, 1))
    assert not node.request(Address("n1", "w1"), JOB_THERE), "nor watches the driver: nobody would hear that"
    node.handle(e.ProcessLeft(Address("n1", "w1")))
    node.handle(e.WorkerEnded("w1", -9, "killed"))
    node.handle(e.TimePassed())
    node.handle(ms.Registered(2))
    (watch,) = sent(node.request_from_there(), m.WatchProcess, THERE)
    assert watch.process_id == "d2"


def test_a_node_that_is_fenced_passes_nothing_on() -> None:
    node = Node()
    node.join_driver()
    node.handle(ms.NodeEventRead("node_died", "n1", 1, "silent"))
    assert passed_on(node.request(DRIVER_HERE, JOB, count=5)) == {}
