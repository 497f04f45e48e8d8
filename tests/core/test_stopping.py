from __future__ import annotations

import itertools
from typing import Any

import pytest

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.dispatch import Dispatcher, Task
from clusterpool.core.messages import Address, LastTask, TaskLimits, TaskStatus
from clusterpool.core.stopping import LOADING_S, SIGKILL
from tests.core.machines import NODE, Owner, make_result, make_task, of_type, sent

ALONE = TaskLimits(travels_alone=True)


def limited(number: int, timeout_s: float = 5.0, *, retries: int = 0, **options: Any) -> Task:
    return make_task(number, retries=retries, limits=TaskLimits(timeout_s, True, **options))


def owner_with_workers(count: int = 1) -> Owner:
    owner = Owner()
    owner.open_set(size=count)
    for number in range(1, count + 1):
        owner.grant(1, f"w{number}", lease=number)
    return owner


def started(commands: list[Any]) -> list[list[int]]:
    return [[spec.number for spec in message.tasks] for message in sent(commands, m.StartTasks)]


def failed(commands: list[Any]) -> list[tuple[str, list[int]]]:
    return [(command.kind, [task.spec.number for task in command.tasks]) for command in of_type(commands, e.FailTasks)]


def begin(owner: Owner, number: int, name: str = "w1") -> None:
    owner.hear(Address("n1", name), m.TaskStarted(number))


def pass_time(owner: Owner) -> list[Any]:
    """As the shell does: at the moment that the machine has named."""
    wakeup_s = owner.machine.next_wakeup_s(owner.now_s)
    assert wakeup_s is not None
    owner.now_s = max(owner.now_s, wakeup_s)
    return owner.handle(e.TimePassed())


def test_a_task_beyond_its_limit_is_killed_and_fails_at_once() -> None:
    owner = owner_with_workers()
    owner.submit(limited(1, 5.0))
    owner.now_s += 1
    begin(owner, 1)
    commands = pass_time(owner)
    assert owner.now_s == pytest.approx(106.0)
    (kill,) = sent(commands, m.KillWorker, NODE)
    assert (kill.lease, kill.signal) == (1, SIGKILL)
    (failure,) = of_type(commands, e.FailTasks)
    assert (failure.kind, [task.spec.number for task in failure.tasks]) == ("timeout", [1])
    for part in ("task 1", "attempt 1 of 1", "limit of 5 s", "worker w1", "node n1"):
        assert part in failure.text
    assert kill.text == failure.text, "whoever else asks how the worker ended is told the same"
    assert [message.count for message in sent(commands, m.RequestWorkers)] == [1], "it is replaced"
    (left,) = of_type(owner.hear(NODE, m.WorkerExited(1, Address("n1", "w1"), -9, "", LastTask(1, 1))), e.SetWorkerLeft)
    assert left.was_expected


def test_loading_does_not_count_but_has_an_end() -> None:
    owner = owner_with_workers()
    owner.submit(limited(1, 5.0))
    assert failed(pass_time(owner)) == [("timeout", [1])]
    assert owner.now_s == pytest.approx(105.0 + LOADING_S)


def test_a_task_that_ends_in_time_leaves_no_deadline() -> None:
    owner = owner_with_workers()
    owner.submit(limited(1))
    begin(owner, 1)
    owner.finish("w1", make_result(1))
    assert owner.machine.next_wakeup_s(owner.now_s) is None


def test_a_deadline_of_a_worker_that_died_is_forgotten() -> None:
    owner = owner_with_workers()
    owner.submit(limited(1, retries=0))
    assert failed(owner.hear(NODE, m.WorkerExited(1, Address("n1", "w1"), -11, "", LastTask(1, 1)))) == [
        ("worker_died", [1])
    ]
    assert owner.machine.next_wakeup_s(owner.now_s) is None


def test_the_result_of_a_task_that_was_given_up_is_dropped_and_freed() -> None:
    owner = owner_with_workers()
    owner.submit(limited(1))
    begin(owner, 1)
    pass_time(owner)
    stored = m.StoredValue("d1.1", 10**6, ["n1"])
    result = m.TaskResult(1, TaskStatus.STORED, b"", m.ResultExtras(m.ValuePart(stored=stored)))
    commands = owner.finish("w1", result)
    assert not of_type(commands, e.DeliverResults)
    assert sent(commands, m.FreeObjects) == [m.FreeObjects(["d1.1"])]


@pytest.mark.parametrize(
    ("retries_timeout", "retries", "runs_again"), [(False, 3, False), (True, 3, True), (True, 0, False)]
)
def test_a_timeout_is_retried_only_where_asked(retries_timeout: bool, retries: int, runs_again: bool) -> None:
    owner = owner_with_workers(2)
    owner.submit(limited(1, retries=retries, retries_timeout=retries_timeout))
    begin(owner, 1)
    commands = pass_time(owner)
    assert (started(commands) == [[1]], failed(commands) == [("timeout", [1])]) == (runs_again, not runs_again)


def test_a_late_begin_of_another_attempt_does_not_count() -> None:
    owner = owner_with_workers(2)
    owner.submit(limited(1, 5.0))
    begin(owner, 1, "w2")
    begin(owner, 7, "w1")
    assert owner.machine.next_wakeup_s(owner.now_s) == pytest.approx(105.0 + LOADING_S)


# --- alone


def dispatcher_with(*names: str) -> Dispatcher:
    dispatcher = Dispatcher()
    for lease, name in enumerate(names, 1):
        dispatcher.add_worker(Address("n1", name), lease=lease, pid=lease)
    dispatcher._mean_s[1] = 1e-6  # tiny: others travel by the thousand
    return dispatcher


def test_nothing_is_sent_with_behind_or_before_a_task_that_travels_alone() -> None:
    dispatcher = dispatcher_with("w1")
    tasks = [make_task(1), make_task(2), make_task(3, limits=ALONE), make_task(4), make_task(5)]
    dispatcher.submit(tasks)
    counter = itertools.count(50)
    sent_numbers: list[list[int]] = []
    while dispatcher.queue:
        (batch,) = dispatcher.fill(next(counter))
        assert not dispatcher.fill(next(counter)), "something was sent behind it"
        sent_numbers.append([task.spec.number for task in batch.tasks])
        dispatcher.finish("w1", [make_result(task.spec.number) for task in batch.tasks], 1000)
    assert sent_numbers == [[1, 2], [3], [4, 5]]


def test_the_shortcut_for_a_lone_call_keeps_others_away_as_well() -> None:
    owner = owner_with_workers()
    owner.machine.sets[1].dispatcher._mean_s[1] = 1e-6
    assert started(owner.submit(limited(1))) == [[1]]
    assert started(owner.submit(make_task(2), make_task(3))) == []
    assert started(owner.finish("w1", make_result(1), run_ns=1000)) == [[2, 3]]


# --- cancelling


def test_only_the_head_of_what_a_worker_has_is_running() -> None:
    owner = owner_with_workers()
    owner.machine.sets[1].dispatcher._mean_s[1] = 1e-6
    owner.submit(make_task(1), make_task(2))
    assert [owner.machine.is_running(number) for number in (1, 2, 3)] == [True, False, False]
    owner.finish("w1", make_result(1))
    assert [owner.machine.is_running(number) for number in (1, 2)] == [False, True]


@pytest.mark.parametrize(("number", "is_asked"), [(1, False), (2, True)])
def test_only_what_waits_behind_another_is_asked_back(number: int, is_asked: bool) -> None:
    owner = owner_with_workers()
    owner.machine.sets[1].dispatcher._mean_s[1] = 1e-6
    owner.submit(make_task(1), make_task(2))
    commands = owner.handle(e.TaskCancelAsked(number, False, False, True))
    assert not owner.machine.cancelled, "that is not certain yet"
    assert sent(commands, m.CancelTasks) == ([m.CancelTasks([2], False)] if is_asked else [])


def test_a_neighbour_is_run_again_when_a_running_task_is_stopped() -> None:
    owner = owner_with_workers()
    owner.machine.sets[1].dispatcher._mean_s[1] = 1e-6
    first, second = make_task(1), make_task(2, retries=1)
    owner.submit(first, second)
    assert sent(owner.handle(e.TaskCancelAsked(1, True)), m.KillWorker)
    assert owner.machine.cancelled
    # The first had just ended: the kill has hit the second.
    commands = owner.hear(NODE, m.WorkerExited(1, Address("n1", "w1"), -9, "", LastTask(2, 2)))
    assert failed(commands) == [("cancelled", [1])]
    assert started(owner.grant(2, "w2")) == [[2]]
    assert second.retries_left == 1


# --- retries


def test_an_exception_that_may_be_retried_is_retried_with_rests_until_none_is_left() -> None:
    owner = owner_with_workers()
    owner.submit(make_task(1, retries=2))
    failure = m.TaskResult(1, TaskStatus.ERROR, b"exception", m.ResultExtras(is_retryable=True))
    assert started(owner.finish("w1", failure)) == [[1]]
    assert started(owner.finish("w1", failure)) == []
    assert owner.machine.sets[1].tasks_left() == 1
    assert started(pass_time(owner)) == [[1]]
    assert owner.now_s == pytest.approx(100.1)
    (delivered,) = of_type(owner.finish("w1", failure), e.DeliverResults)
    assert [(task.spec.number, result.payload) for task, result in delivered.results] == [(1, b"exception")]


def test_a_closed_set_waits_for_a_task_that_rests() -> None:
    owner = owner_with_workers()
    owner.submit(make_task(1, retries=3))
    owner.handle(e.SetClosed(1))
    for request, name in ((2, "w1"), (3, "w2")):
        owner.hear(NODE, m.WorkerExited(1, Address("n1", name), -9, "", LastTask(1, 1)))
        owner.grant(request, f"w{request}")
    assert not owner.machine.is_running(1)
    assert started(pass_time(owner)) == [[1]]
    commands = owner.finish("w3", make_result(1))
    assert sent(commands, m.RetireWorker)


def test_a_task_that_is_cancelled_while_it_rests_keeps_nobody_waiting() -> None:
    owner = owner_with_workers()
    owner.submit(make_task(1, retries=3))
    owner.handle(e.SetClosed(1))
    for request, name in ((2, "w1"), (3, "w2")):
        owner.hear(NODE, m.WorkerExited(1, Address("n1", name), -9, "", LastTask(1, 1)))
        owner.grant(request, f"w{request}")
    commands = owner.handle(e.TaskCancelAsked(1, False))
    assert owner.machine.cancelled
    assert failed(commands) == [("cancelled", [1])]
    assert sent(commands, m.RetireWorker), "the set would have waited for the end of the rest"
