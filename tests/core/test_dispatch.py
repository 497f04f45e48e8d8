from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterpool.core.dispatch import (
    BACKLOG_S,
    BATCH_BYTES_MAX,
    LONG_TASK_S,
    OUTSTANDING_MAX,
    SPLIT_MIN_S,
    TAKE_BACK_AFTER_S,
    Batch,
    Dispatcher,
    Task,
)
from clusterpool.core.messages import Address, TaskStatus
from tests.core.machines import make_result, make_task

NOW_S = 50.0


def dispatcher_with(*names: str, mean_s: float | None = None, runs_max: int | None = None) -> Dispatcher:
    """A dispatcher with these workers, and a known duration of function 1 if one is given."""
    dispatcher = Dispatcher(runs_max=runs_max)
    for lease, name in enumerate(names, 1):
        dispatcher.add_worker(Address("n1", name), lease=lease, pid=lease)
    if mean_s is not None:
        dispatcher._mean_s[1] = mean_s
    return dispatcher


def numbers(batches: list[Batch]) -> dict[str, list[int]]:
    return {batch.slot.address.process_id: [task.spec.number for task in batch.tasks] for batch in batches}


def tasks_of(*wanted: int) -> list[Task]:
    return [make_task(number) for number in wanted]


@pytest.mark.parametrize(
    ("mean_s", "tasks", "shares"),
    [
        (None, 5, [1, 1]),  # of unknown duration: one each, to measure
        (LONG_TASK_S, 5, [1, 1]),
        (BACKLOG_S, 5, [2, 2]),
        (BACKLOG_S, 2, [1, 1]),  # no backlog while another worker has nothing
        (BACKLOG_S / 10, 4, [2, 2]),  # equal shares of a short queue
        (BACKLOG_S / 10, 100, [11, 11]),
        (SPLIT_MIN_S / 4, 4, [4]),  # too little work to wake a second worker for
        (SPLIT_MIN_S / 4, 6, [4, 2]),
        (1e-9, 10_000, [OUTSTANDING_MAX, OUTSTANDING_MAX]),
    ],
)
def test_a_backlog_is_worth_about_two_milliseconds(mean_s: float | None, tasks: int, shares: list[int]) -> None:
    dispatcher = dispatcher_with("w1", "w2", mean_s=mean_s)
    dispatcher.submit(tasks_of(*range(tasks)))
    assert [len(batch.tasks) for batch in dispatcher.fill(NOW_S)] == shares


@pytest.mark.parametrize(
    ("mean_s", "silent_s", "worker"),
    [
        (SPLIT_MIN_S / 10, BACKLOG_S / 2, "w1"),  # it is awake, and has done so little before another has woken
        (SPLIT_MIN_S / 10, BACKLOG_S * 2, "w2"),  # it may be busy for long
        (SPLIT_MIN_S, BACKLOG_S / 2, "w2"),  # worth two workers
    ],
)
def test_tiny_work_goes_to_a_worker_that_has_just_reported(mean_s: float, silent_s: float, worker: str) -> None:
    dispatcher = dispatcher_with("w1", "w2", mean_s=mean_s)
    dispatcher.submit(tasks_of(1))
    assert numbers(dispatcher.fill(NOW_S)) == {"w1": [1]}
    dispatcher.slots["w1"].finished_s = NOW_S
    dispatcher.submit(tasks_of(2))
    assert numbers(dispatcher.fill(NOW_S + silent_s)) == {worker: [2]}


def test_tiny_work_goes_to_the_fullest_of_those_awake_so_that_the_others_sleep() -> None:
    dispatcher = dispatcher_with("w1", "w2", "w3", mean_s=SPLIT_MIN_S / 10)
    for name, held in (("w1", (1,)), ("w2", (2, 3)), ("w3", ())):
        slot = dispatcher.slots[name]
        slot.finished_s = NOW_S
        for task in tasks_of(*held):
            slot.outstanding[task.spec.number] = task
    dispatcher.outstanding_count = 3
    dispatcher.submit(tasks_of(4, 5))
    assert numbers(dispatcher.fill(NOW_S)) == {"w2": [4, 5]}


def test_it_goes_there_however_full_that_one_is() -> None:
    dispatcher = dispatcher_with("w1", "w2", mean_s=SPLIT_MIN_S / 5)
    dispatcher.slots["w1"].finished_s = NOW_S
    dispatcher.submit(tasks_of(1, 2, 3))
    assert numbers(dispatcher.fill(NOW_S)) == {"w1": [1, 2, 3]}
    dispatcher.submit(tasks_of(4))
    assert numbers(dispatcher.fill(NOW_S)) == {"w1": [4]}


def test_among_idle_ones_tiny_work_goes_to_the_one_that_reported_last() -> None:
    dispatcher = dispatcher_with("w1", "w2", mean_s=SPLIT_MIN_S / 10)
    dispatcher.slots["w1"].finished_s, dispatcher.slots["w2"].finished_s = NOW_S - BACKLOG_S / 2, NOW_S
    dispatcher.submit(tasks_of(1, 2))
    assert numbers(dispatcher.fill(NOW_S)) == {"w2": [1, 2]}


def test_tiny_tasks_are_refilled_in_halves() -> None:
    dispatcher = dispatcher_with("w1", mean_s=BACKLOG_S / 10)
    dispatcher.submit(tasks_of(*range(40)))
    assert numbers(dispatcher.fill(NOW_S)) == {"w1": list(range(11))}
    for number in range(5):
        dispatcher.finish("w1", [make_result(number)], 200_000)
        assert not dispatcher.fill(NOW_S), "refilled before half was done"
    dispatcher.finish("w1", [make_result(5)], 200_000)
    assert numbers(dispatcher.fill(NOW_S)) == {"w1": [11, 12, 13, 14, 15, 16]}


def test_a_batch_is_bounded_in_bytes() -> None:
    dispatcher = dispatcher_with("w1", mean_s=1e-6)
    megabytes = 100
    dispatcher.submit([make_task(number, payload=bytes(1024 * 1024)) for number in range(megabytes)])
    (batch,) = dispatcher.fill(NOW_S)
    size_bytes = sum(len(task.spec.payload) for task in batch.tasks)
    assert BATCH_BYTES_MAX <= size_bytes < BATCH_BYTES_MAX + 2 * 1024 * 1024


def test_a_function_travels_once_to_each_worker() -> None:
    dispatcher = dispatcher_with("w1", "w2")
    dispatcher.submit(tasks_of(1, 2, 3))
    assert [batch.functions for batch in dispatcher.fill(NOW_S)] == [[1], [1]]
    dispatcher.finish("w1", [make_result(1)], 10**9)
    (batch,) = dispatcher.fill(NOW_S)
    assert (batch.slot.address.process_id, batch.functions) == ("w1", [])


def test_a_task_of_unknown_duration_is_not_hidden_behind_tiny_ones() -> None:
    dispatcher = dispatcher_with("w1", mean_s=1e-5)
    dispatcher.submit([make_task(1), make_task(2), make_task(3, function=9), make_task(4)])
    assert numbers(dispatcher.fill(NOW_S)) == {"w1": [1, 2]}


def test_a_worker_gets_no_more_tasks_than_it_may_run_and_then_retires_once() -> None:
    dispatcher = dispatcher_with("w1", mean_s=1e-6, runs_max=3)
    dispatcher.submit(tasks_of(1, 2, 3, 4))
    assert numbers(dispatcher.fill(NOW_S)) == {"w1": [1, 2, 3]}
    assert dispatcher.retire_due() == []
    dispatcher.finish("w1", [make_result(number) for number in (1, 2, 3)], 1000)
    assert [slot.address.process_id for slot in dispatcher.retire_due()] == ["w1"]
    assert dispatcher.retire_due() == []
    assert dispatcher.fill(NOW_S) == []


def test_a_task_that_was_given_back_does_not_count_as_run() -> None:
    dispatcher = dispatcher_with("w1", mean_s=1e-6, runs_max=3)
    dispatcher.submit(tasks_of(1, 2, 3))
    dispatcher.fill(NOW_S)
    dispatcher.finish("w1", [make_result(1), make_result(2)], 1000)
    dispatcher.finish("w1", [make_result(3, TaskStatus.RETURNED)], 0)
    assert dispatcher.retire_due() == []
    assert numbers(dispatcher.fill(NOW_S)) == {"w1": [3]}


def test_tasks_that_were_given_back_go_first_in_their_old_order() -> None:
    dispatcher = dispatcher_with("w1", mean_s=1e-6)
    dispatcher.submit(tasks_of(1, 2, 3))
    dispatcher.fill(NOW_S)
    dispatcher.submit(tasks_of(4))
    dispatcher.finish("w1", [make_result(number, TaskStatus.RETURNED) for number in (2, 3)], 0)
    assert [task.spec.number for task in dispatcher.queue] == [2, 3, 4]


def test_a_cancelled_task_that_comes_back_ends_as_cancelled() -> None:
    dispatcher = dispatcher_with("w1", mean_s=1e-6)
    tasks = tasks_of(1, 2)
    dispatcher.submit(tasks)
    dispatcher.fill(NOW_S)
    tasks[1].is_cancelled = True
    finished = dispatcher.finish("w1", [make_result(2, TaskStatus.RETURNED)], 0)
    assert [(task.spec.number, result.status) for task, result in finished] == [(2, TaskStatus.CANCELLED)]
    assert not dispatcher.queue


@pytest.mark.parametrize("workers", [[], ["w1"]])
def test_cancelled_tasks_at_the_head_leave_the_queue_with_or_without_workers(workers: list[str]) -> None:
    dispatcher = dispatcher_with(*workers)
    tasks = tasks_of(1, 2)
    dispatcher.submit(tasks)
    for task in tasks:
        task.is_cancelled = True
    assert dispatcher.fill(NOW_S) == []
    assert not dispatcher.queue


def test_results_of_a_worker_that_is_gone_count_for_nothing() -> None:
    dispatcher = dispatcher_with("w1", mean_s=1e-6)
    dispatcher.submit(tasks_of(1, 2))
    dispatcher.fill(NOW_S)
    assert [task.spec.number for task in dispatcher.remove_worker("w1")] == [1, 2]
    assert dispatcher.finish("w1", [make_result(1)], 1000) == []
    assert dispatcher.outstanding_count == 0


def test_half_of_a_backlog_is_taken_back_for_an_idle_worker() -> None:
    dispatcher = dispatcher_with("w1", mean_s=BACKLOG_S / 10)
    dispatcher.submit(tasks_of(*range(6)))
    dispatcher.fill(NOW_S)
    dispatcher.add_worker(Address("n1", "w2"), lease=2, pid=2)
    assert dispatcher.take_back(NOW_S) == [], "too soon: it may have been measured well"
    assert dispatcher.next_look_s(NOW_S) == NOW_S + TAKE_BACK_AFTER_S
    later_s = NOW_S + 2 * TAKE_BACK_AFTER_S
    ((slot, count),) = dispatcher.take_back(later_s)
    assert (slot.address.process_id, count) == ("w1", 3)
    assert dispatcher.take_back(later_s) == [], "asked twice"
    assert dispatcher.next_look_s(later_s) is None


@pytest.mark.parametrize("answer", [[], [make_result(5, TaskStatus.RETURNED)]])
def test_a_worker_that_has_answered_may_be_asked_again(answer: list[object]) -> None:
    dispatcher = dispatcher_with("w1", "w2", mean_s=BACKLOG_S / 10)
    dispatcher.slots["w2"].is_blocked = True
    dispatcher.submit(tasks_of(*range(6)))
    dispatcher.fill(NOW_S)
    dispatcher.slots["w2"].is_blocked = False
    later_s = NOW_S + 2 * TAKE_BACK_AFTER_S
    assert dispatcher.take_back(later_s)
    dispatcher.finish("w1", answer, 0)  # type: ignore[arg-type]
    dispatcher.queue.clear()
    assert dispatcher.take_back(later_s)


@pytest.mark.parametrize("attribute", ["is_blocked", "is_retiring"])
def test_a_blocked_or_retiring_worker_gets_nothing(attribute: str) -> None:
    dispatcher = dispatcher_with("w1", "w2")
    setattr(dispatcher.slots["w1"], attribute, True)
    dispatcher.submit(tasks_of(1, 2))
    assert numbers(dispatcher.fill(NOW_S)) == {"w2": [1]}


def test_durations_of_fresh_functions_do_not_gather_for_ever() -> None:
    dispatcher = dispatcher_with("w1")
    for number in range(1, 3000):
        dispatcher.submit([make_task(number, function=number)])
        dispatcher.fill(NOW_S)
        dispatcher.finish("w1", [make_result(number)], 1000)
    assert len(dispatcher._mean_s) <= 1001


STEP = st.tuples(
    st.sampled_from(["submit", "fill", "finish", "return", "cancel", "join", "die", "take_back"]),
    st.integers(0, 7),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(STEP, max_size=60))
def test_every_task_is_in_one_place_and_ends_once(steps: list[tuple[str, int]]) -> None:
    dispatcher = Dispatcher()
    tasks: list[Task] = []
    ended: list[int] = []
    workers = 0
    for now_s, (step, argument) in enumerate(steps):
        slots = list(dispatcher.slots.values())
        slot = slots[argument % len(slots)] if slots else None
        if step == "submit":
            new = [make_task(len(tasks) + offset) for offset in range(argument)]
            tasks += new
            dispatcher.submit(new)
        elif step == "fill":
            dispatcher.fill(now_s)
        elif step == "join":
            workers += 1
            dispatcher.add_worker(Address("n1", f"w{workers}"), lease=workers, pid=workers)
        elif step == "cancel" and tasks:
            task = tasks[argument % len(tasks)]
            if task.spec.number not in ended and not task.worker and not task.is_cancelled:
                task.is_cancelled = True
                ended.append(task.spec.number)
        elif step == "take_back":
            dispatcher.take_back(now_s)
        elif slot is not None and step == "die":
            dispatcher.requeue(dispatcher.remove_worker(slot.address.process_id))
        elif slot is not None and slot.outstanding:
            held = list(slot.outstanding)
            is_return = step == "return"
            chosen = held[-argument:] if is_return and argument else held[: argument + 1]
            status = TaskStatus.RETURNED if is_return else TaskStatus.OK
            results = [make_result(number, status) for number in chosen]
            finished = dispatcher.finish(slot.address.process_id, results, 1000)
            ended += [task.spec.number for task, _ in finished]
        places = [task.spec.number for task in dispatcher.queue if not task.is_cancelled]
        places += [number for slot in dispatcher.slots.values() for number in slot.outstanding]
        assert sorted(places + ended) == list(range(len(tasks)))
        assert dispatcher.outstanding_count == sum(len(s.outstanding) for s in dispatcher.slots.values())
