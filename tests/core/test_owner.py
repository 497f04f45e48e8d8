from __future__ import annotations

import pytest

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.messages import Address, Reference, TaskStatus, ValuePart
from tests.core.machines import DRIVER, NODE, Owner, make_result, make_task, make_worker, of_type, sent

W1 = Address("n1", "w1")


@pytest.fixture
def owner() -> Owner:
    """An owner with a lease set (number 1)."""
    owner = Owner()
    owner.open_set()
    return owner


def delivered(commands: list[e.Command]) -> list[int]:
    return [task.spec.number for command in of_type(commands, e.DeliverResults) for task, _ in command.results]


def failed(commands: list[e.Command]) -> list[tuple[str, list[int]]]:
    return [(command.kind, [task.spec.number for task in command.tasks]) for command in of_type(commands, e.FailTasks)]


def started(commands: list[e.Command]) -> list[int]:
    return [spec.number for message in sent(commands, m.StartTasks) for spec in message.tasks]


def test_a_task_is_leased_for_sent_and_its_result_delivered(owner: Owner) -> None:
    (request,) = sent(owner.submit(make_task(1)), m.RequestWorkers, NODE)
    granted = owner.grant(request.request, "w1")
    (start,) = sent(granted, m.StartTasks, W1)
    assert ([part.payload for part in start.functions], started(granted)) == ([b"function"], [1])
    assert owner.machine.is_sent(1)
    assert delivered(owner.finish("w1", make_result(1))) == [1]
    assert owner.machine.tasks == {}


def test_a_task_without_a_sink_gives_its_object_a_value(owner: Owner) -> None:
    owner.submit(make_task(1, sink=None))
    owner.grant(1, "w1")
    commands = owner.finish("w1", make_result(1, payload=b"42"))
    assert [command.keys for command in of_type(commands, e.ValuesKnown)] == [[(DRIVER, 1)]]
    assert owner.value_of(Reference(DRIVER, 1)) == ValuePart(payload=b"42")


def test_several_return_values_are_several_objects(owner: Owner) -> None:
    owner.submit(make_task(1, sink=None, returns=2))
    owner.grant(1, "w1")
    values = [ValuePart(payload=b"a"), ValuePart(payload=b"b")]
    result = m.TaskResult(1, TaskStatus.MULTIPLE, b"", m.ResultExtras(None, values))
    owner.finish("w1", result)
    assert [owner.value_of(Reference(DRIVER, number)) for number in (1, 2)] == values


# --- messages that cross


def test_a_grant_that_crosses_the_cancelling_of_its_request_is_given_back_for_reuse(owner: Owner) -> None:
    task = make_task(1)
    owner.submit(task)
    cancelled = owner.handle(e.TaskCancelAsked(1, False))
    assert owner.machine.cancelled
    assert failed(cancelled) == [("cancelled", [1])]
    commands = owner.handle(e.TimePassed())
    assert sent(commands, m.CancelRequest) == [m.CancelRequest(1, 1)]
    late = owner.hear(NODE, m.WorkerGranted(1, make_worker("w1")))
    assert sent(late, m.ReleaseWorkers, NODE) == [m.ReleaseWorkers([1], False)]


def test_results_that_come_before_the_news_of_an_exit_count(owner: Owner) -> None:
    owner.submit(make_task(1))
    owner.grant(1, "w1")
    assert delivered(owner.finish("w1", make_result(1))) == [1]
    assert failed(owner.hear(NODE, m.WorkerExited(1, W1, -9, "killed"))) == []


def test_results_that_come_after_the_news_of_an_exit_count_for_nothing(owner: Owner) -> None:
    owner.submit(make_task(1))
    owner.grant(1, "w1")
    assert failed(owner.hear(NODE, m.WorkerExited(1, W1, -9, "killed"))) == [("worker_died", [1])]
    assert delivered(owner.finish("w1", make_result(1))) == []


def test_a_broken_connection_alone_fails_nothing(owner: Owner) -> None:
    # The node reports the exit with its cause; that is what the user should see.
    owner.submit(make_task(1))
    owner.grant(1, "w1")
    assert failed(owner.handle(e.ProcessGone(W1, "closed"))) == []
    (failure,) = of_type(owner.hear(NODE, m.WorkerExited(1, W1, -9, "killed by signal 9")), e.FailTasks)
    assert failure.text.endswith("killed by signal 9")


def test_a_task_submitted_to_a_set_that_has_ended_is_cancelled() -> None:
    owner = Owner()
    owner.open_set(size=1)
    owner.handle(e.SetTerminated(1))
    assert failed(owner.submit(make_task(1))) == [("cancelled", [1])]
    assert owner.handle(e.SetClosed(1)) == owner.handle(e.SetResized(1, 5)) == owner.handle(e.SetTerminated(1)) == []


def test_the_loss_of_a_node_retries_its_tasks_and_renews_what_was_asked(owner: Owner) -> None:
    owner.submit(make_task(1, retries=1), make_task(2))
    owner.grant(1, "w1", node_id="n2")
    commands = owner.hear(NODE, m.NodeLost("n2", "silent for 5 s"))
    assert failed(commands) == []
    cancelled = sum(message.count for message in sent(commands, m.CancelRequest))
    asked = sum(message.count for message in sent(commands, m.RequestWorkers))
    assert asked - cancelled == 1, "one for the task that came back; the other request stands, or is made anew"


@pytest.mark.parametrize("status", [TaskStatus.OK, TaskStatus.CANCELLED])
def test_a_running_task_is_cancelled_only_by_force(owner: Owner, status: int) -> None:
    owner.submit(make_task(1))
    owner.grant(1, "w1")
    assert owner.handle(e.TaskCancelAsked(1, False)) == []
    assert not owner.machine.cancelled
    asked = owner.handle(e.TaskCancelAsked(1, False, interrupt=True))
    assert sent(asked, m.CancelTasks, W1) == [m.CancelTasks([1], True)]
    assert delivered(owner.finish("w1", make_result(1, status))) == [1]


def test_a_task_of_a_returned_lease_is_not_mistaken_for_one_of_the_next(owner: Owner) -> None:
    owner.submit(make_task(1))
    owner.grant(1, "w1")
    owner.finish("w1", make_result(1))
    owner.hear(NODE, m.ReclaimLeases())
    assert owner.machine._set_by_process == {}
    owner.submit(make_task(2))
    owner.grant(2, "w1", lease=2)
    assert delivered(owner.finish("w1", make_result(1))) == []
    assert delivered(owner.finish("w1", make_result(2))) == [2]


def test_an_owner_that_ends_of_itself_gives_back_its_workers(owner: Owner) -> None:
    owner.submit(make_task(1))
    owner.grant(1, "w1")
    owner.submit(make_task(2))
    owner.grant(2, "w2", lease=2)
    owner.finish("w1", make_result(1))
    assert sent(owner.handle(e.Retired()), m.ReleaseWorkers, NODE) == [m.ReleaseWorkers([1], False)], "the idle one"


def test_an_owner_is_needed_until_its_tasks_have_ended(owner: Owner) -> None:
    # The workers that are at them would be killed with it, with what they own for others.
    owner.submit(make_task(1))
    assert owner.machine.is_needed(), "also while they wait for a CPU"
    owner.grant(1, "w1")
    assert owner.machine.is_needed()
    owner.finish("w1", make_result(1))
    assert not owner.machine.is_needed()


# --- what is kept


def test_nothing_is_kept_of_what_is_over() -> None:
    owner = Owner()
    for number in range(1, 50):
        owner.open_set(number, size=1)
        request = sent(owner.submit(make_task(number), set_number=number), m.RequestWorkers)
        assert request == []
        (request_number,) = owner.machine.sets[number].requested
        owner.grant(request_number, f"w{number}", lease=number)
        owner.handle(e.SetClosed(number))
        owner.finish(f"w{number}", make_result(number))
        ended = owner.hear(NODE, m.WorkerExited(number, Address("n1", f"w{number}"), 0, "retired"))
        assert of_type(ended, e.SetEnded)
    machine = owner.machine
    assert (machine.sets, machine.tasks, machine.arguments.targets, machine._set_by_process) == ({}, {}, {}, {})
    assert machine.objects._watched == set()


def test_a_dropped_function_goes_everywhere_once_no_task_uses_it(owner: Owner) -> None:
    owner.handle(e.FunctionAdded(7, b"lambda"))
    owner.submit(make_task(1, function=7))
    owner.grant(1, "w1")
    assert not sent(owner.handle(e.FunctionsDropped([7])), m.ForgetFunctions)
    assert 7 in owner.machine.functions.payloads, "its task may have to be sent again"
    commands = owner.finish("w1", make_result(1))
    assert sent(commands, m.ForgetFunctions, W1) == [m.ForgetFunctions([7])]
    assert 7 not in owner.machine.functions.payloads


def test_fresh_functions_do_not_gather_while_tasks_are_always_unfinished(owner: Owner) -> None:
    owner.submit(make_task(10**6))
    owner.grant(1, "w0", lease=99)
    for number in range(10, 2000):
        owner.handle(e.FunctionAdded(number, b"lambda"))
        owner.submit(make_task(number, function=number))
        if number == 10:
            owner.grant(2, "w1")
        owner.handle(e.FunctionsDropped([number]))
        owner.finish("w1", make_result(number))
    assert len(owner.machine.functions.payloads) < 10
    assert len(owner.machine.sets[1].dispatcher.slots["w1"].functions_sent) < 10


def test_the_end_of_the_connection_tells_everybody_who_waits(owner: Owner) -> None:
    owner.open_set(2, size=1)
    owner.submit(make_task(1), make_task(2, sink=None))
    elsewhere = Reference(Address("n1", "w9"), 5)
    owner.handle(e.ReferencesHeld([elsewhere]))
    owner.grant(2, "w1")
    commands = owner.handle(e.ClientClosed("cancelled", "shut down"))
    assert failed(commands) == [("cancelled", [1])]
    (failure,) = of_type(commands, e.FailTasks)
    assert failure.text == "task 1, attempt 1 of 1, was at worker w1 of node n1: shut down"
    known = [key for command in of_type(commands, e.ValuesKnown) for key in command.keys]
    assert known == [(DRIVER, 2), (elsewhere.owner, 5)]
    assert {owner.value_of(ref).lost_kind for ref in (Reference(DRIVER, 2), elsewhere)} == {"not_connected"}  # type: ignore[union-attr]
    assert [command.set_number for command in of_type(commands, e.SetEnded)] == [1, 2]
    assert owner.machine.tasks == {}


# --- references in results


def test_a_result_may_hand_back_the_last_reference_to_an_argument(owner: Owner) -> None:
    reference = owner.put(500)
    arguments = e.TaskArguments([], [reference])
    owner.handle(e.TaskWithArgumentsSubmitted(1, "", make_task(1, sink=None, references=[reference]), arguments))
    owner.grant(1, "w1")
    owner.handle(e.ReferencesDropped([(DRIVER, 500)]))  # the user's own instance
    owner.hear(W1, m.RemoveBorrower([500], [1]))  # the worker let go before its result was sent
    value = ValuePart(payload=b"[ref]", references=[reference])
    owner.finish("w1", m.TaskResult(1, TaskStatus.STORED, b"", m.ResultExtras(value)))
    assert owner.value_of(reference) == ValuePart(payload=b"v")
    owner.handle(e.ReferencesDropped([(DRIVER, 1)]))
    assert owner.machine.objects.table.owned == {}, "with the result, its reference went"


def test_arguments_are_let_go_when_their_task_has_failed(owner: Owner) -> None:
    reference = owner.put(500)
    arguments = e.TaskArguments([reference], [])
    owner.handle(e.TaskWithArgumentsSubmitted(1, "", make_task(1, name="f"), arguments))
    owner.handle(e.ReferencesDropped([(DRIVER, 500)]))
    assert owner.machine.objects.table.owned
    owner.grant(1, "w1")
    owner.hear(NODE, m.WorkerExited(1, W1, -9, "killed"))
    assert owner.machine.objects.table.owned == {}


def test_a_closed_group_waits_for_tasks_whose_arguments_are_not_there_yet() -> None:
    owner = Owner()
    owner.open_set(1, size=1)
    owner.open_set(2, size=1)
    owner.grant(1, "w1")
    owner.grant(2, "w2", lease=2)
    owner.submit(make_task(1, sink=None))
    arguments = e.TaskArguments([Reference(DRIVER, 1)], [])
    owner.handle(e.TaskWithArgumentsSubmitted(2, "", make_task(2, name="f"), arguments))
    assert not sent(owner.handle(e.SetClosed(2)), m.RetireWorker)
    commands = owner.finish("w1", make_result(1))
    assert started(commands) == [2]
    assert sent(owner.finish("w2", make_result(2)), m.RetireWorker, Address("n1", "w2"))


def test_terminating_a_group_cancels_tasks_that_wait_for_arguments() -> None:
    owner = Owner()
    owner.open_set(1, size=1)
    owner.open_set(2, size=1)
    owner.submit(make_task(1, sink=None))
    arguments = e.TaskArguments([Reference(DRIVER, 1)], [])
    owner.handle(e.TaskWithArgumentsSubmitted(2, "", make_task(2, name="f"), arguments))
    assert ("cancelled", [2]) in failed(owner.handle(e.SetTerminated(2)))
    assert owner.machine.objects._arguments == {}


def test_the_clock_of_a_task_that_waited_for_an_argument_is_right(owner: Owner) -> None:
    owner.open_set(2)
    owner.submit(make_task(1, sink=None))
    arguments = e.TaskArguments([Reference(DRIVER, 1)], [])
    owner.handle(e.TaskWithArgumentsSubmitted(2, "", make_task(2, name="f"), arguments))
    owner.grant(1, "w1")
    owner.now_s += 30.0
    owner.finish("w1", make_result(1))
    (request,) = owner.machine.sets[2].requested
    owner.grant(request, "w2", lease=2)
    assert owner.machine.sets[2].dispatcher.slots["w2"].sent_s == owner.now_s
