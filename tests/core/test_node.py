from __future__ import annotations

import itertools
from typing import Any

import pytest

from clusterpool.core import messages as m
from clusterpool.core import node_events as e
from clusterpool.core import recovery_messages as r
from clusterpool.core import store_messages as s
from clusterpool.core import transfer_messages as t
from clusterpool.core.cluster_view import NodeRecord
from clusterpool.core.messages import Address, StoredValue, WorkerKind
from clusterpool.core.node import NodeMachine
from tests.core.machines import DRIVER, JOB, NODE, T

W1 = Address("n1", "w1")
REMOTE = Address("n2", "d9")
THERE = REMOTE.node
NOW_S = 100.0


class Node:
    """A node's machine, and shorthands for what its processes do."""

    def __init__(self, *, is_embedded: bool = False) -> None:
        names = (f"w{number}" for number in itertools.count(1))
        record = NodeRecord("n1", "host", 0, "", {"CPU": 2.0, "memory": 1e9})
        self.machine = NodeMachine(
            record, arena_bytes=1 << 24, is_embedded=is_embedded, is_head=True, process_ids=names, driver_pid=4711
        )

    def handle(self, event: Any) -> list[Any]:
        return self.machine.handle(event, NOW_S)

    def hear(self, source: Address, message: m.Message) -> list[Any]:
        return self.handle(e.MessageArrived(source, message))

    def join(self, address: Address, kind: str = "worker") -> list[Any]:
        return self.handle(e.ProcessJoined(address, kind, 4711, JOB if kind == "driver" else None, False))

    def lease(self, count: int = 1, *, source: Address = DRIVER) -> list[Any]:
        demand = m.WorkerDemand(WorkerKind.TASK, {"CPU": 1.0})
        commands = self.hear(source, m.RequestWorkers(1, count, demand, JOB))
        for command in [command for command in commands if isinstance(command, e.ForkWorker)]:
            commands += self.join(Address("n1", command.process_id))
        return commands

    def worker_ends(self, name: str = "w1") -> list[Any]:
        return self.handle(e.ProcessLeft(Address("n1", name))) + self.handle(e.WorkerEnded(name, -9, "killed"))


@pytest.fixture
def node() -> Node:
    """A node of a cluster, with a driver."""
    node = Node()
    node.join(DRIVER, "driver")
    return node


def sent(commands: list[Any], kind: type[T], to: Address | None = None) -> list[T]:
    return [
        command.message
        for command in commands
        if isinstance(command, e.Send) and isinstance(command.message, kind) and to in (None, command.destination)
    ]


def of_type(commands: list[Any], kind: type[T]) -> list[T]:
    return [command for command in commands if isinstance(command, kind)]


def test_a_driver_is_registered_as_a_job() -> None:
    (call,) = of_type(Node().join(DRIVER, "driver"), e.CallStore)
    assert (call.operation, call.arguments["job"]) == ("register_job", JOB)


def test_those_who_watch_a_process_hear_of_its_end_once(node: Node) -> None:
    node.lease()
    node.hear(REMOTE, m.WatchProcess("w1"))
    node.hear(REMOTE, m.WatchProcess("w1"))
    commands = node.worker_ends()
    assert [message.address for message in sent(commands, m.ProcessEnded, REMOTE)] == [W1]


def test_watching_a_process_that_is_not_there_is_answered_at_once(node: Node) -> None:
    assert sent(node.hear(REMOTE, m.WatchProcess("w77")), m.ProcessEnded, REMOTE)


def test_watchers_that_ended_are_forgotten(node: Node) -> None:
    node.lease(2)
    node.hear(Address("n1", "w2"), m.WatchProcess("w1"))
    node.worker_ends("w2")
    assert not sent(node.worker_ends("w1"), m.ProcessEnded)


def test_the_end_of_a_worker_is_told_to_its_owner_with_the_cause(node: Node) -> None:
    node.lease()
    (exited,) = sent(node.worker_ends(), m.WorkerExited, DRIVER)
    assert (exited.exit_code, exited.text) == (-9, "killed")


def test_the_workers_that_a_worker_leased_end_with_it(node: Node) -> None:
    node.lease()
    node.lease(source=W1)
    commands = node.worker_ends("w1")
    assert [command.process_id for command in of_type(commands, e.EndWorker)] == ["w2"]


def test_a_leaving_driver_is_answered_after_its_last_worker(node: Node) -> None:
    node.lease(2)
    commands = node.hear(DRIVER, m.LeaveNode())
    assert [command.process_id for command in of_type(commands, e.EndWorker)] == ["w1", "w2"]
    assert not sent(commands + node.worker_ends("w1"), m.LeftNode)
    assert len(sent(node.worker_ends("w2"), m.LeftNode, DRIVER)) == 1


def test_a_leaving_driver_without_workers_is_answered_at_once(node: Node) -> None:
    assert sent(node.hear(DRIVER, m.LeaveNode()), m.LeftNode, DRIVER)
    assert node.hear(DRIVER, m.LeaveNode()) == [], "asked twice"


def test_a_leaving_driver_does_not_wait_for_a_worker_that_was_never_forked(node: Node) -> None:
    demand = m.WorkerDemand(WorkerKind.TASK, {"CPU": 1.0})
    node.hear(DRIVER, m.RequestWorkers(1, 1, demand, JOB))
    assert not sent(node.hear(DRIVER, m.LeaveNode()), m.LeftNode)
    assert sent(node.handle(e.ForkFailed("w1", "no memory")), m.LeftNode, DRIVER)


@pytest.mark.parametrize("is_embedded", [True, False])
def test_a_private_node_ends_with_its_driver(is_embedded: bool) -> None:
    node = Node(is_embedded=is_embedded)
    node.join(DRIVER, "driver")
    guest = Address("n1", "d2")
    node.handle(e.ProcessJoined(guest, "driver", 4712, JOB, False))
    assert not of_type(node.handle(e.ProcessLeft(guest)), e.StopNode), "it was not that driver's"
    assert bool(of_type(node.handle(e.ProcessLeft(DRIVER)), e.StopNode)) is is_embedded


def test_a_driver_that_dies_takes_its_workers_with_it(node: Node) -> None:
    node.lease()
    commands = node.handle(e.ProcessLeft(DRIVER))
    assert [command.process_id for command in of_type(commands, e.EndWorker)] == ["w1"]
    assert "finish_job" in [call.operation for call in of_type(commands, e.CallStore)]


@pytest.mark.parametrize("message", [m.ProcessEnded(REMOTE, "killed"), m.Undeliverable(REMOTE)])
def test_the_leases_of_an_owner_elsewhere_end_with_it(node: Node, message: m.Message) -> None:
    demand = m.WorkerDemand(WorkerKind.TASK, {"CPU": 1.0})
    commands = node.hear(NODE, m.RequestWorkers(1, 1, demand, JOB, 1, REMOTE))
    assert sent(commands, m.WatchProcess, Address("n2", "n2")) == [m.WatchProcess("d9")]
    node.join(W1)
    ended = node.hear(Address("n2", "n2"), message)
    assert [command.process_id for command in of_type(ended, e.EndWorker)] == ["w1"]


# --- objects


def reserved(node: Node, commands: list[Any]) -> list[Any]:
    """What follows when the arena has found the pages."""
    answers: list[Any] = []
    for command in of_type(commands, e.ReservePages):
        event = e.PagesReserved(command.client, command.request, command.object_id, command.offset, command.size_bytes)
        answers += node.handle(event)
    return answers


def test_an_object_is_created_sealed_pinned_and_freed(node: Node) -> None:
    created = reserved(node, node.hear(DRIVER, m.CreateObject(1, "d1.1", 4096)))
    (answer,) = sent(created, m.ObjectCreated, DRIVER)
    node.hear(DRIVER, m.SealObject("d1.1"))
    pinned = node.hear(W1, m.PinObject(2, StoredValue("d1.1", 4096, ["n1"])))
    (pin,) = sent(pinned, m.ObjectPinned, W1)
    assert (pin.request, pin.offset, pin.size_bytes) == (2, answer.offset, 4096)
    node.hear(W1, m.UnpinObjects(["d1.1"]))
    node.hear(DRIVER, m.FreeObjects(["d1.1"]))
    assert node.machine.load().arena_used_bytes == 0


@pytest.mark.parametrize("end", [m.ProcessEnded(REMOTE, "killed"), m.Undeliverable(REMOTE), m.Undeliverable(THERE)])
def test_a_copy_goes_with_the_process_elsewhere_that_owned_the_object(node: Node, end: m.Message) -> None:
    node.join(W1)
    asked = node.hear(W1, m.PinObject(1, StoredValue("d9.1", 4096, ["n3"], REMOTE)))
    assert sent(asked, m.WatchProcess, THERE) == [m.WatchProcess("d9")]
    n3 = Address("n3", "n3")
    (opened,) = sent(asked + reserved(node, asked), t.OpenTransfer, n3)
    (chunk,) = sent(node.hear(n3, t.TransferOpened(opened.transfer, 4096)), t.SendChunk, n3)
    done = node.hear(n3, t.ChunkData(opened.transfer, chunk.offset, bytes(4096)))
    assert sent(done, r.CopyMade, REMOTE) == [r.CopyMade("d9.1")]
    node.hear(W1, m.UnpinObjects(["d9.1"]))
    assert node.machine.load().arena_used_bytes == 4096
    # The node that it came from may be no more, and so cannot pass on that it is to go.
    node.hear(THERE, end)
    assert node.machine.load().arena_used_bytes == 0


def test_nothing_is_copied_here_for_an_owner_that_has_ended(node: Node) -> None:
    node.join(W1)
    # Their sizes must be asked first, so that there is nothing yet to let go when the owners end.
    asked = node.hear(W1, m.PinObject(1, StoredValue("d9.1", 0, ["n3"], REMOTE)))
    asked += node.hear(W1, m.PinObject(2, StoredValue("d1.1", 0, ["n3"], DRIVER)))
    far, near = [opened.transfer for opened in sent(asked, t.OpenTransfer)]
    node.hear(THERE, m.ProcessEnded(REMOTE, "killed"))
    node.handle(e.ProcessLeft(DRIVER))
    known = node.hear(Address("n3", "n3"), t.TransferOpened(near, 4096))
    (refusal,) = sent(known, m.StoreFailed, W1)
    assert (refusal.kind, refusal.text.partition(":")[0]) == ("freed", "object d1.1 is not copied here")
    known = node.hear(Address("n3", "n3"), t.TransferOpened(far, 4096))
    assert sent(known, m.WatchProcess, THERE) == [m.WatchProcess("d9")]
    node.hear(THERE, m.ProcessEnded(REMOTE, "no such process is on its node"))
    reserved(node, known)
    assert list(node.machine.objects.store.objects) == ["d9.1"]
    assert node.machine.objects.store.objects["d9.1"].is_freed, "and goes when it is here"


def test_what_only_the_dead_wanted_is_not_fetched(node: Node) -> None:
    node.join(W1)
    asked = node.hear(W1, m.PinObject(1, StoredValue("d9.1", 4096, ["n3"], REMOTE)))
    (opened,) = sent(asked + reserved(node, asked), t.OpenTransfer)
    ended = node.handle(e.ProcessLeft(W1))
    assert sent(ended, t.CloseTransfer) == [t.CloseTransfer(opened.transfer)]
    assert not node.machine.objects._owners
    assert node.machine.load().arena_used_bytes == 0


def spilled(node: Node, object_id: str, owner: Address) -> None:
    """Leave an object of `owner` on disk only, with no room to bring it back and the disk full."""
    reserved(node, node.hear(DRIVER, m.CreateObject(1, object_id, 1 << 23, owner)))
    node.hear(DRIVER, m.SealObject(object_id))
    node.hear(DRIVER, m.CreateObject(2, "d1.98", 1 << 24))
    reserved(node, node.handle(s.ObjectSpilled(object_id)))
    node.hear(DRIVER, m.SealObject("d1.98"))


def test_a_copy_whose_file_is_unreadable_is_lost_and_another_one_is_fetched(node: Node) -> None:
    spilled(node, "d1.1", DRIVER)
    stored = StoredValue("d1.1", 1 << 23, ["n1", "n3"], DRIVER)
    node.join(W1)
    assert of_type(node.hear(W1, m.PinObject(5, stored)), s.SpillObject)
    failed = node.handle(s.SpillFailed("d1.98", "the disk is full"))
    failed += node.handle(e.TimePassed())
    assert sent(failed, m.ObjectOnDisk, W1) == [m.ObjectOnDisk(5)]
    assert node.hear(Address("n3", "w3"), r.CopyUnreadable("d1.1", "who is not of this node cannot know")) == []
    lost = node.hear(W1, r.CopyUnreadable("d1.1", "input/output error"))
    assert of_type(lost, s.DeleteSpilled) == [s.DeleteSpilled("d1.1")]
    (told,) = sent(lost, r.CopyGone, DRIVER)
    assert "input/output error" in told.text
    assert not sent(lost, m.FreeObjects), "others keep their copies"
    assert node.machine.objects.pulls.pulls == {}
    node.hear(W1, m.PinObject(6, stored))
    assert list(node.machine.objects.pulls.pulls) == ["d1.1"]


def test_a_file_that_cannot_be_read_for_another_node_sends_that_one_elsewhere(node: Node) -> None:
    spilled(node, "d1.1", DRIVER)
    node.hear(DRIVER, m.FreeObjects(["d1.98"]))
    n3 = Address("n3", "n3")
    assert of_type(node.hear(n3, t.OpenTransfer(7, "d1.1")), s.RestoreObject)
    failed = node.handle(s.RestoreFailed("d1.1", "input/output error"))
    (refused,) = sent(failed, t.TransferRefused, n3)
    assert (refused.transfer, refused.is_gone) == (7, True)
    (told,) = sent(failed, r.CopyGone, DRIVER)
    assert "input/output error" in refused.text and "input/output error" in told.text


@pytest.mark.parametrize("end", [m.ProcessEnded(REMOTE, "killed"), m.Undeliverable(REMOTE), m.Undeliverable(THERE)])
def test_what_was_made_for_a_caller_elsewhere_goes_with_it(node: Node, end: m.Message) -> None:
    # It calls an actor here that is another's, say, and has no lease on this node.
    made = node.hear(W1, m.CreateObject(1, "d9.1", 4096, REMOTE))
    reserved(node, made)
    assert sent(made, m.WatchProcess, THERE) == [m.WatchProcess("d9")]
    node.hear(W1, m.SealObject("d9.1"))
    again = node.hear(W1, m.CreateObject(2, "d9.2", 4096, REMOTE))
    reserved(node, again)
    assert sent(again, m.WatchProcess) == [], "said once"
    node.hear(W1, m.SealObject("d9.2"))
    node.hear(THERE, end)
    assert node.machine.load().arena_used_bytes == 0


def test_what_was_let_go_is_refused_as_long_as_it_is_still_read(node: Node) -> None:
    reserved(node, node.hear(DRIVER, m.CreateObject(1, "d1.1", 4096)))
    node.hear(DRIVER, m.SealObject("d1.1"))
    stored = StoredValue("d1.1", 4096, ["n1", "n2"], REMOTE)
    node.join(W1)
    node.hear(W1, m.PinObject(2, stored))
    node.hear(DRIVER, m.FreeObjects(["d1.1"]))
    (refusal,) = sent(node.hear(W1, m.PinObject(3, stored)), m.StoreFailed, W1)
    assert (refusal.request, refusal.kind) == (3, "lost")
    assert not node.machine.objects._owners


def test_an_object_that_is_nowhere_is_refused(node: Node) -> None:
    (refusal,) = sent(node.hear(W1, m.PinObject(2, StoredValue("d1.9", 10, ["n1"]))), m.StoreFailed, W1)
    assert (refusal.request, refusal.kind) == (2, "lost")


def test_the_objects_of_a_process_go_with_it_once_nobody_reads_them(node: Node) -> None:
    reserved(node, node.hear(DRIVER, m.CreateObject(1, "d1.1", 4096)))
    node.hear(DRIVER, m.SealObject("d1.1"))
    node.join(W1)
    node.hear(W1, m.PinObject(2, StoredValue("d1.1", 4096, ["n1"])))
    node.handle(e.ProcessLeft(DRIVER))
    assert node.machine.load().arena_used_bytes > 0, "a reader has it mapped"
    node.handle(e.ProcessLeft(W1))
    assert node.machine.load().arena_used_bytes == 0


def test_a_worker_that_was_cut_off_for_its_rubbish_is_ended(node: Node) -> None:
    node.lease(2)
    assert not of_type(node.handle(e.ProcessLeft(W1)), e.EndWorker), "it may be on its way out"
    (end,) = of_type(node.handle(e.ProcessLeft(Address("n1", "w2"), True)), e.EndWorker)
    assert end.process_id == "w2"


# --- actors


def answer(node: Node, commands: list[Any], value: Any) -> list[Any]:
    """The control store answers the one call among the commands."""
    (call,) = of_type(commands, e.CallStore)
    return node.handle(e.StoreReturned(call.tag, value))


PENDING = m.ActorPart("a1", "Counter", {}, None, "pending", name="count", namespace="ns")
ALIVE = m.ActorPart("a1", "Counter", {}, W1, "alive")


def test_who_asks_for_a_pending_actor_is_answered_when_it_lives(node: Node) -> None:
    question = node.hear(DRIVER, m.LocateActor(5, "a1", "", ""))
    assert not sent(answer(node, question, PENDING), m.ActorLocated)
    (located,) = sent(answer(node, node.handle(e.ActorEventRead("a1")), ALIVE), m.ActorLocated, DRIVER)
    assert (located.request, located.actor) == (5, ALIVE)
    assert node.handle(e.ActorEventRead("a1")) == []


def test_who_has_ended_is_not_answered_and_not_remembered(node: Node) -> None:
    node.join(W1)
    answer(node, node.hear(W1, m.LocateActor(5, "a1", "", "")), PENDING)
    node.handle(e.ProcessLeft(W1))
    assert node.handle(e.ActorEventRead("a1")) == []
    assert node.machine.actors._waiting == {}


@pytest.mark.parametrize(("kind", "state"), [("NameTaken", "taken"), ("StoreUnavailable", "failed")])
def test_an_actor_that_cannot_be_registered_says_why(node: Node, kind: str, state: str) -> None:
    (call,) = of_type(node.hear(DRIVER, m.RegisterActor(5, PENDING)), e.CallStore)
    commands = node.handle(e.StoreRaised(call.tag, kind, "text"))
    (located,) = sent(commands, m.ActorLocated, DRIVER)
    assert (located.actor.state, located.actor.text) == (state, "text")


def test_the_actor_of_a_worker_that_ended_is_reported_dead(node: Node) -> None:
    demand = m.WorkerDemand(WorkerKind.ACTOR, {}, actor_id="a1")
    node.hear(DRIVER, m.RequestWorkers(1, 1, demand, JOB))
    node.join(W1)
    (call,) = [call for call in of_type(node.worker_ends(), e.CallStore) if call.operation == "end_life"]
    assert call.arguments == {"actor_id": "a1", "life": 0, "text": "killed", "teller": "host", "address": W1}


def test_only_workers_that_the_node_has_started_belong_to_it_and_each_once(node: Node) -> None:
    assert "not started by this node" in node.machine.registration_fault(W1, "worker")
    assert node.machine.registration_fault(Address("n1", "t1"), "tool") == ""
    demand = m.WorkerDemand(WorkerKind.TASK, {"CPU": 1.0})
    node.hear(DRIVER, m.RequestWorkers(1, 1, demand, JOB))
    assert node.machine.registration_fault(W1, "worker") == ""
    node.join(W1)
    assert "already" in node.machine.registration_fault(W1, "worker")
    node.worker_ends("w1")
    assert "has ended" in node.machine.registration_fault(W1, "worker")
