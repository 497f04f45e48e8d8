from __future__ import annotations

import msgspec
import pytest

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.actors import BATCH_MAX, OUTSTANDING_BYTES_MAX, OUTSTANDING_MAX, ActorChannel
from clusterpool.core.dispatch import Task
from clusterpool.core.messages import Address, Reference, TaskStatus, WorkerKind
from tests.core.machines import DRIVER, NODE, Owner, make_result, make_task, make_worker, of_type, sent

HOME = Address("n1", "w1")
PENDING = m.ActorPart("a1", "Counter", {"add": 1}, None, "pending")
ALIVE = msgspec.structs.replace(PENDING, address=HOME, state="alive")


def batches(channel: ActorChannel) -> list[list[int]]:
    return [[task.spec.number for task in tasks] for tasks, _ in channel.send_ready({})]


def calls(*numbers: int) -> list[Task]:
    return [make_task(number, function=0, sink=None, method="add") for number in numbers]


# --- the channel


def test_calls_wait_for_the_address_and_go_in_order() -> None:
    channel = ActorChannel(PENDING)
    channel.submit(calls(1, 2))
    assert batches(channel) == []
    channel.actor = ALIVE
    channel.submit(calls(3))
    assert batches(channel) == [[1, 2, 3]]


def test_a_call_that_waits_for_an_argument_holds_back_those_behind_it() -> None:
    channel = ActorChannel(ALIVE)
    channel.waiting.add(2)
    channel.submit(calls(1, 2, 3))
    assert batches(channel) == [[1]]
    channel.waiting.discard(2)
    assert batches(channel) == [[2, 3]]


def test_many_calls_travel_in_bounded_batches() -> None:
    channel = ActorChannel(ALIVE)
    channel.submit(calls(*range(BATCH_MAX + 5)))
    assert [len(batch) for batch in batches(channel)] == [BATCH_MAX, 5]


@pytest.mark.parametrize(
    ("payload_bytes", "sent_count"),
    [(10, OUTSTANDING_MAX), (100_000, 1000), (50_000, OUTSTANDING_BYTES_MAX // 50_000 + 1)],
)
def test_an_actor_that_does_not_answer_gets_only_so_much(payload_bytes: int, sent_count: int) -> None:
    channel = ActorChannel(ALIVE)
    payload = b"x" * payload_bytes
    channel.submit([make_task(number, function=0, payload=payload) for number in range(OUTSTANDING_MAX + 5)])
    assert sum(map(len, batches(channel))) == sent_count
    assert batches(channel) == []
    channel.finished([make_result(number) for number in range(sent_count)])
    assert batches(channel)[0][0] == sent_count  # what is left goes on where it stopped


def test_results_of_an_actor_let_later_calls_go() -> None:
    owner = Creator()
    owner.create()
    owner.be_granted()
    owner.finish("w1", make_result(10))
    owner.call(*range(10_000, 10_000 + OUTSTANDING_MAX + 3))
    commands = owner.hear(HOME, m.TasksFinished([make_result(10_000), make_result(10_001)], 0))
    assert started(commands) == [10_000 + OUTSTANDING_MAX, 10_000 + OUTSTANDING_MAX + 1]


def test_cancelled_calls_are_left_out() -> None:
    channel = ActorChannel(ALIVE)
    tasks = calls(1, 2, 3)
    tasks[1].is_cancelled = True
    channel.submit(tasks)
    assert batches(channel) == [[1, 3]]


def test_the_death_of_an_actor_fails_the_sent_and_the_queued() -> None:
    channel = ActorChannel(ALIVE)
    channel.waiting.add(2)
    channel.submit(calls(1, 2))
    batches(channel)
    failures = of_type(channel.died("killed"), e.FailTasks)
    assert [([task.spec.number for task in failure.tasks], failure.kind) for failure in failures] == [
        ([1], "actor_died"),
        ([2], "actor_died"),
    ]
    assert [failure.text for failure in failures] == [
        "task 1 (Counter.add), attempt 1 of 1, ended with its actor: killed",
        "task 2 (Counter.add), attempt 1 of 1, was not begun: its actor has ended: killed",
    ]
    assert channel.died("again") == []


# --- in the owner


class Creator(Owner):
    """An owner that creates the actor."""

    def create(self, *dependencies: Reference, lifetime: int = 0) -> list[e.Command]:
        self.handle(e.FunctionAdded(1, b"class"))
        creation = make_task(10, sink=None, name="Counter")
        arguments = e.TaskArguments(list(dependencies), []) if dependencies else None
        demand = m.WorkerDemand(WorkerKind.ACTOR, {}, actor_id="a1")
        return self.handle(e.ActorOpened(PENDING, demand, e.SetupPlan(), creation, arguments, lifetime))

    def call(self, *numbers: int) -> list[e.Command]:
        return self.handle(e.ActorCallsSubmitted("a1", calls(*numbers)))

    def call_with(self, number: int, dependency: Reference) -> list[e.Command]:
        (task,) = calls(number)
        return self.handle(e.TaskWithArgumentsSubmitted(0, "a1", task, e.TaskArguments([dependency], [])))

    def be_granted(self) -> list[e.Command]:
        return self.hear(NODE, m.WorkerGranted(1, make_worker("w1")))

    def state(self) -> str:
        return self.machine.actors.channels["a1"].actor.state


def started(commands: list[e.Command]) -> list[int]:
    return [spec.number for message in sent(commands, m.StartTasks, HOME) for spec in message.tasks]


def lost(owner: Owner, *numbers: int) -> list[str]:
    values = [owner.value_of(Reference(DRIVER, number)) for number in numbers]
    return [value.lost_kind if value is not None else "pending" for value in values]


def test_the_creation_goes_ahead_of_every_call() -> None:
    owner = Creator()
    assert len(sent(owner.create(), m.RequestWorkers)) == 1
    assert started(owner.call(1, 2)) == []
    assert started(owner.be_granted()) == [10, 1, 2]
    commands = owner.finish("w1", make_result(10))
    assert [message.actor.state for message in sent(commands, m.ActorChanged, NODE)] == ["alive"]
    owner.finish("w1", make_result(1), make_result(2))
    assert lost(owner, 1, 2) == ["", ""]


def test_a_constructor_that_raises_fails_all_calls_and_ends_the_worker() -> None:
    owner = Creator()
    owner.create()
    owner.call(1)
    owner.be_granted()
    commands = owner.finish("w1", make_result(10, TaskStatus.ERROR, b"error"))
    assert sent(commands, m.KillWorker)
    assert owner.state() == "dead"
    owner.call(2)
    assert "pending" not in lost(owner, 1, 2)


@pytest.mark.parametrize("is_granted_first", [True, False])
def test_an_argument_of_the_constructor_that_fails_is_the_end_of_the_actor(is_granted_first: bool) -> None:
    owner = Creator()
    owner.open_set()
    owner.submit(make_task(500, sink=None))
    owner.create(Reference(DRIVER, 500))
    request = owner.machine.actors.channels["a1"].request
    if is_granted_first:
        assert started(owner.hear(NODE, m.WorkerGranted(request, make_worker("w1")))) == []
    owner.call(1)
    (lease_request,) = owner.machine.sets[1].requested
    owner.grant(lease_request, "w5", lease=5)
    commands = owner.finish("w5", make_result(500, TaskStatus.ERROR, b"error"))
    assert started(commands) == [], "the constructor must not run without its argument"
    assert owner.state() == "dead"
    assert lost(owner, 1) != ["pending"]
    if is_granted_first:
        assert sent(commands, m.ReleaseWorkers) == [m.ReleaseWorkers([1], True)]
    else:
        assert sent(commands, m.CancelRequest) == [m.CancelRequest(request, 1)]
        late = owner.hear(NODE, m.WorkerGranted(request, make_worker("w1")))
        assert sent(late, m.ReleaseWorkers) == [m.ReleaseWorkers([1], False)]


def test_a_cancelled_call_does_not_hold_back_those_behind_it() -> None:
    owner = Creator()
    owner.create()
    owner.be_granted()
    owner.finish("w1", make_result(10))
    owner.open_set()
    owner.submit(make_task(500, sink=None))
    assert started(owner.call_with(1, Reference(DRIVER, 500))) == []
    assert started(owner.call(2)) == []
    commands = owner.handle(e.TaskCancelAsked(1, False))
    assert owner.machine.cancelled
    assert started(commands) == [2]
    assert lost(owner, 1, 2) == ["cancelled", "pending"]


def test_a_failed_argument_fails_its_call_alone() -> None:
    owner = Creator()
    owner.create()
    owner.be_granted()
    owner.finish("w1", make_result(10))
    owner.open_set()
    owner.submit(make_task(500, sink=None))
    owner.call_with(1, Reference(DRIVER, 500))
    owner.call(2)
    (request,) = owner.machine.sets[1].requested
    owner.grant(request, "w5", lease=5)
    assert started(owner.finish("w5", make_result(500, TaskStatus.ERROR, b"error"))) == [2]


def test_a_request_that_a_lost_node_may_have_held_is_made_anew() -> None:
    owner = Creator()
    owner.create()
    commands = owner.hear(NODE, m.NodeLost("n2", "silent"))
    assert sent(commands, m.CancelRequest) == [m.CancelRequest(1, 1)]
    assert [message.request for message in sent(commands, m.RequestWorkers)] == [2]
    assert sent(owner.be_granted(), m.ReleaseWorkers), "the first comes nevertheless"
    assert started(owner.hear(NODE, m.WorkerGranted(2, make_worker("w1")))) == [10]


def test_calls_of_an_actor_whose_worker_exits_fail_with_the_cause() -> None:
    owner = Creator()
    owner.create()
    owner.be_granted()
    owner.finish("w1", make_result(10))
    owner.call(1)
    owner.hear(NODE, m.Undeliverable(HOME))  # says less
    owner.hear(NODE, m.WorkerExited(1, HOME, -9, "killed by signal 9"))
    value = owner.value_of(Reference(DRIVER, 1))
    assert value is not None
    assert (value.lost_kind, value.lost) == (
        "actor_died",
        "task 1 (Counter.add), attempt 1 of 1, ended with its actor: killed by signal 9",
    )


def test_calls_that_our_own_node_cannot_pass_on_fail_at_once() -> None:
    """Nobody will tell the cause: the actor's node is gone, or ours was, and the actor has ended with that."""
    there = make_worker("w1", node_id="n2")
    owner = Creator()
    owner.create()
    owner.hear(NODE, m.WorkerGranted(1, there))
    owner.hear(there.address, m.TasksFinished([make_result(10)], 1))
    owner.call(1)
    owner.hear(there.address.node, m.Undeliverable(there.address))
    assert owner.value_of(Reference(DRIVER, 1)) is None, "its node will tell the cause"
    owner.hear(NODE, m.Undeliverable(there.address))
    value = owner.value_of(Reference(DRIVER, 1))
    assert value is not None and value.lost_kind == "actor_died"


@pytest.mark.parametrize(
    ("answer", "is_sent"),
    [(ALIVE, True), (msgspec.structs.replace(PENDING, state="dead", text="gone"), False)],
)
def test_a_handle_of_somebody_elses_actor_finds_it_through_the_node(answer: m.ActorPart, is_sent: bool) -> None:
    owner = Owner()
    (question,) = sent(owner.handle(e.ActorMet(PENDING)), m.LocateActor, NODE)
    owner.handle(e.ActorCallsSubmitted("a1", calls(1)))
    commands = owner.hear(NODE, m.ActorLocated(question.request, answer))
    assert (started(commands) == [1]) is is_sent
    assert (lost(owner, 1) == ["pending"]) is is_sent


@pytest.mark.parametrize("is_borrowed", [False, True])
def test_an_actor_of_an_owner_that_retires_is_needed_only_if_others_have_handles_of_it(is_borrowed: bool) -> None:
    owner, other = Creator(), Address("n2", "w9")
    owner.put(7)
    owner.create(lifetime=7)
    owner.be_granted()
    if is_borrowed:
        owner.hear(other, m.AddBorrower(other, [7]))
    commands = owner.handle(e.Retiring())
    assert len(sent(commands, m.RetireWorker, HOME)) == (not is_borrowed) and owner.machine.is_needed()
    if is_borrowed:
        assert sent(owner.hear(other, m.RemoveBorrower([7], [1])), m.RetireWorker, HOME)
    owner.finish("w1", make_result(10))
    assert owner.machine.is_needed(), "the actor may have to stay for what it owns itself"
    owner.hear(NODE, m.WorkerExited(1, HOME, 0, "retired"))
    assert not owner.machine.is_needed()
    assert owner.handle(e.ReferencesDropped([(DRIVER, 7)])) == [], "the handle in a global of some module"
