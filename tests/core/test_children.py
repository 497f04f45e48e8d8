"""Child processes of an owner: asked for once, told what they run, never replaced."""

from __future__ import annotations

from typing import Any

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.messages import Address, WorkerKind
from tests.core.machines import DRIVER, JOB, NODE, Owner, make_worker, of_type, sent

DEMAND = m.WorkerDemand(WorkerKind.GROUP, {}, "P", outlives_owner=True)
OTHER_NODE = Address("n2", "n2")


class Parent(Owner):
    """An owner that has opened child number 7, by request 1."""

    def __init__(self, payload: bytes = b"process") -> None:
        super().__init__()
        setup = e.SetupPlan("P", {}, payload, [m.Reference(DRIVER, 5)])
        self.opened = self.handle(e.ChildOpened(7, DEMAND, setup, JOB))

    def granted(self, *, node_id: str = "n1", request: int = 1) -> list[Any]:
        return self.hear(Address(node_id, node_id), m.WorkerGranted(request, make_worker("w1", node_id=node_id)))

    def exited(self, exit_code: int, *, node_id: str = "n1") -> list[Any]:
        message = m.WorkerExited(1, Address(node_id, "w1"), exit_code, "it ended")
        return self.hear(Address(node_id, node_id), message)


def test_a_child_is_a_worker_of_its_own_that_is_told_what_it_runs() -> None:
    parent = Parent()
    assert [(message.count, message.demand) for message in sent(parent.opened, m.RequestWorkers, NODE)] == [(1, DEMAND)]
    commands = parent.granted()
    [setup] = sent(commands, m.SetupWorker, Address("n1", "w1"))
    assert (setup.payload, setup.is_process, setup.lease) == (b"process", True, 1)
    assert [(one.set_number, one.worker.pid) for one in of_type(commands, e.ChildStarted)] == [(7, 101)]


def test_its_end_is_told_with_the_exit_code_and_nobody_takes_its_place() -> None:
    parent = Parent()
    parent.granted()
    commands = parent.exited(-15)
    assert of_type(commands, e.ChildEnded) == [e.ChildEnded(7, -15)]
    assert not sent(commands, m.RequestWorkers)
    assert of_type(parent.exited(-15), e.ChildEnded) == []  # said once


def test_signals_go_to_the_node_where_it_runs_until_it_has_ended() -> None:
    parent = Parent()
    assert parent.handle(e.ChildSignalled(7, 15)) == []  # it does not run yet
    parent.granted(node_id="n2")
    [kill] = sent(parent.handle(e.ChildSignalled(7, 15)), m.KillWorker, OTHER_NODE)
    assert (kill.lease, kill.signal) == (1, 15)
    parent.exited(0, node_id="n2")
    assert parent.handle(e.ChildSignalled(7, 15)) == []


def test_what_it_was_given_is_needed_until_it_has_loaded_it() -> None:
    parent = Parent()
    assert parent.hear(Address("n1", "w1"), m.WorkerReady(1)) == []  # not a child's yet
    parent.granted()
    assert parent.hear(Address("n1", "w1"), m.WorkerReady(1)) == [e.ChildLoaded(7)]


def test_a_start_that_fails_is_told_and_not_tried_again() -> None:
    parent = Parent()
    commands = parent.hear(NODE, m.RequestFailed(1, 1, "start_failed", "no memory"))
    assert commands == [e.ChildFailed(7, "start_failed", "no memory")]
    assert sent(parent.granted(), m.ReleaseWorkers)  # and a worker that comes nevertheless goes back


def test_a_dropped_child_is_not_started_and_one_that_runs_is_killed() -> None:
    parent = Parent()
    assert [message.request for message in sent(parent.handle(e.ChildDropped(7)), m.CancelRequest)] == [1]
    assert sent(parent.granted(), m.ReleaseWorkers)
    other = Parent()
    other.granted()
    assert [message.signal for message in sent(other.handle(e.ChildDropped(7)), m.KillWorker)] == [9]


def test_a_lost_node_ends_its_children_and_those_that_were_on_their_way_are_asked_for_again() -> None:
    parent = Parent()
    parent.granted(node_id="n2")
    parent.handle(e.ChildOpened(8, DEMAND, e.SetupPlan("Q"), JOB))
    commands = parent.hear(NODE, m.NodeLost("n2", "silent"))
    assert of_type(commands, e.ChildEnded) == [e.ChildEnded(7, -9)]
    assert [message.request for message in sent(commands, m.CancelRequest)] == [2]
    assert [message.request for message in sent(commands, m.RequestWorkers)] == [3]


def test_a_broken_connection_is_not_yet_an_end() -> None:
    parent = Parent()
    parent.granted()
    assert of_type(parent.handle(e.ProcessGone(Address("n1", "w1"), "closed")), e.ChildEnded) == []
    assert of_type(parent.exited(3), e.ChildEnded) == [e.ChildEnded(7, 3)]


def test_without_a_cluster_every_child_has_ended_or_failed() -> None:
    parent = Parent()
    parent.granted()
    parent.handle(e.ChildOpened(8, DEMAND, e.SetupPlan("Q"), JOB))
    commands = parent.handle(e.ClientClosed("cancelled", "shut down"))
    assert of_type(commands, e.ChildEnded) == [e.ChildEnded(7, -9)]
    assert [one.set_number for one in of_type(commands, e.ChildFailed)] == [8]


def test_the_end_of_a_watched_process_is_told_once() -> None:
    parent = Parent()
    address = Address("n2", "d9")
    assert sent(parent.handle(e.ProcessWatched(4, address)), m.WatchProcess, OTHER_NODE) == [m.WatchProcess("d9")]
    assert of_type(parent.hear(OTHER_NODE, m.ProcessEnded(address, "ended")), e.WatchedEnded) == [e.WatchedEnded(4)]
    assert of_type(parent.hear(OTHER_NODE, m.ProcessEnded(address, "ended")), e.WatchedEnded) == []
    parent.handle(e.ProcessWatched(5, address))
    assert of_type(parent.hear(NODE, m.NodeLost("n2", "silent")), e.WatchedEnded) == [e.WatchedEnded(5)]
