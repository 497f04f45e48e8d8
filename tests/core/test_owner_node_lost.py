"""What an owner had asked for may have been passed on to a node that is lost: it asks anew, and wants nothing twice."""

from __future__ import annotations

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.messages import Address, WorkerKind
from clusterpool.core.recovery_messages import RequestsLost
from tests.core.machines import NODE, Owner, make_task, make_worker, of_type, sent

LOST = m.NodeLost("n2", "silent")


def test_a_group_asks_again_for_the_workers_that_have_not_come() -> None:
    owner = Owner()
    (request,) = sent(owner.open_set(size=3), m.RequestWorkers)
    owner.grant(request.request, "w1", lease=1)
    commands = owner.hear(NODE, LOST)
    assert sent(commands, m.CancelRequest, NODE) == [m.CancelRequest(request.request, 2)]
    (again,) = sent(commands, m.RequestWorkers, NODE)
    assert (again.count, again.request == request.request) == (2, False)


def test_a_group_gives_back_what_comes_for_the_old_request() -> None:
    owner = Owner()
    (request,) = sent(owner.open_set(size=1), m.RequestWorkers)
    owner.hear(NODE, LOST)
    late = make_worker("w9", lease=9, node_id="n3")
    commands = owner.hear(NODE, m.WorkerGranted(request.request, late))
    assert [release.leases for release in sent(commands, m.ReleaseWorkers, Address("n3", "n3"))] == [[9]]


def test_the_workers_of_the_lost_node_are_replaced_and_their_tasks_tried_again() -> None:
    owner = Owner()
    (request,) = sent(owner.open_set(size=2), m.RequestWorkers)
    owner.grant(request.request, "w1", lease=1, node_id="n1")
    owner.grant(request.request, "w2", lease=2, node_id="n2")
    for name, node_id in (("w1", "n1"), ("w2", "n2")):
        owner.hear(Address(node_id, name), m.WorkerReady(1))
    tasks = [make_task(number, retries=1) for number in (1, 2)]
    owner.submit(*tasks)
    commands = owner.hear(NODE, LOST)
    (again,) = sent(commands, m.RequestWorkers, NODE)
    assert again.count == 1
    assert not of_type(commands, e.FailTasks)
    (left,) = of_type(commands, e.SetWorkerLeft)
    assert left.worker.address == Address("n2", "w2")
    assert "n2" in left.text and "silent" in left.text


def test_a_node_that_dies_with_several_workers_is_one_attempt() -> None:
    owner = Owner()
    (request,) = sent(owner.open_set(size=3), m.RequestWorkers)
    for lease in (1, 2, 3):
        owner.grant(request.request, f"w{lease}", lease=lease, node_id="n2")
    task = make_task(1, retries=1)
    owner.submit(task)
    assert not of_type(owner.hear(NODE, LOST), e.FailTasks)
    assert (task.retries_left, task.worker) == (0, "")


def test_the_error_of_a_task_that_went_with_its_node_names_task_attempt_worker_and_node() -> None:
    owner = Owner()
    (request,) = sent(owner.open_set(size=1), m.RequestWorkers)
    owner.handle(e.FunctionAdded(1, b"function", "work"))
    owner.grant(request.request, "w2", lease=2, node_id="n2")
    owner.submit(make_task(1))
    commands = owner.hear(NODE, LOST)
    (failed,) = of_type(commands, e.FailTasks)
    for words in ("task 1 (work), attempt 1 of 1", "worker w2", "node n2", "silent"):
        assert words in failed.text
    # Before the news of the worker, at which an executor breaks with less to say.
    assert commands.index(failed) < commands.index(of_type(commands, e.SetWorkerLeft)[0])


def test_tasks_ask_again_for_their_leases() -> None:
    owner = Owner()
    owner.open_set()
    (request,) = sent(owner.submit(make_task(1)), m.RequestWorkers)
    commands = owner.hear(NODE, LOST)
    assert sent(commands, m.CancelRequest, NODE) == [m.CancelRequest(request.request, 1)]
    assert [again.count for again in sent(commands, m.RequestWorkers, NODE)] == [1]


def test_a_set_that_waits_for_nothing_asks_for_nothing() -> None:
    owner = Owner()
    owner.open_set()
    assert sent(owner.hear(NODE, LOST), m.RequestWorkers) == []


def test_an_actor_that_has_no_worker_yet_asks_again_and_gives_back_what_comes_late() -> None:
    owner = Owner()
    owner.handle(e.FunctionAdded(1, b"class"))
    actor = m.ActorPart("a1", "Counter", {}, None, "pending")
    demand = m.WorkerDemand(WorkerKind.ACTOR, {}, actor_id="a1")
    creation = make_task(1)
    (request,) = sent(owner.handle(e.ActorOpened(actor, demand, e.SetupPlan(), creation, None)), m.RequestWorkers)
    commands = owner.hear(NODE, LOST)
    assert sent(commands, m.CancelRequest, NODE) == [m.CancelRequest(request.request, 1)]
    (again,) = sent(commands, m.RequestWorkers, NODE)
    assert again.demand == demand
    late = owner.hear(NODE, m.WorkerGranted(request.request, make_worker("w9", lease=9)))
    assert [release.leases for release in sent(late, m.ReleaseWorkers, NODE)] == [[9]]
    granted = owner.hear(NODE, m.WorkerGranted(again.request, make_worker("w1", lease=1)))
    assert sent(granted, m.StartTasks, Address("n1", "w1"))


def test_what_was_lost_with_a_node_that_another_had_passed_it_on_to_is_asked_for_again() -> None:
    owner = Owner()
    owner.open_set()
    (request,) = sent(owner.submit(make_task(1)), m.RequestWorkers)
    commands = owner.hear(Address("n5", "n5"), RequestsLost("n2"))
    assert sent(commands, m.CancelRequest, NODE) == [m.CancelRequest(request.request, 1)]
    assert [again.count for again in sent(commands, m.RequestWorkers, NODE)] == [1]
