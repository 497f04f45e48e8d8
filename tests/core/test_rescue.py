from __future__ import annotations

from typing import Any

import pytest

from clusterpool.core import owner_events as e
from clusterpool.core.chunks import ChunkTable
from clusterpool.core.dispatch import Task
from clusterpool.core.messages import LastTask
from clusterpool.core.rescue import BACK_OFF_MAX_S, GoneWorker, Rescue, back_off_s
from tests.core.machines import make_task, make_worker, of_type

NOW_S = 100.0


def make_rescue() -> Rescue:
    return Rescue({1: "work"}, ChunkTable(lambda _: None, lambda _: []))


def gone(last: LastTask, *, target: int = 0) -> GoneWorker:
    return GoneWorker(make_worker("w1"), "it was killed", last, target)


def tasks_with(retries: int, *numbers: int) -> list[Task]:
    return [make_task(number, retries=retries) for number in numbers]


def outcome(again: list[Task], commands: list[Any]) -> tuple[list[int], list[int]]:
    """The numbers of the tasks that run again, and of those that fail."""
    failed = [task.spec.number for command in of_type(commands, e.FailTasks) for task in command.tasks]
    return [task.spec.number for task in again], failed


@pytest.mark.parametrize(
    ("last", "retries", "again", "failed"),
    [
        (LastTask(4, 4), 1, [2, 4, 6], []),
        (LastTask(4, 4), 0, [6], [2, 4]),  # 2 had run: without retries it may not be started twice
        (LastTask(0, 2), 0, [4, 6], [2]),  # between two tasks
        (LastTask(0, 8), 0, [2, 4, 6], []),  # the result of the last that it began has come: these had not begun
        (LastTask(), 0, [], [2, 4, 6]),  # nobody knows: any of them may have begun
        (LastTask(), 1, [2, 4, 6], []),
    ],
)
def test_at_most_once_without_retries(last: LastTask, retries: int, again: list[int], failed: list[int]) -> None:
    rescue = make_rescue()
    assert outcome(*rescue.save(tasks_with(retries, 2, 4, 6), gone(last), NOW_S)) == (again, failed)


def test_only_the_task_that_ran_pays_with_a_retry() -> None:
    tasks = tasks_with(2, 2, 4, 6)
    make_rescue().save(tasks, gone(LastTask(4, 4)), NOW_S)
    assert [task.retries_left for task in tasks] == [2, 1, 2]


def test_between_two_tasks_the_one_before_pays_lest_it_runs_for_ever() -> None:
    tasks = tasks_with(1, 2, 4, 6)
    rescue = make_rescue()
    again, _ = rescue.save(tasks, gone(LastTask(0, 4)), NOW_S)
    assert [task.retries_left for task in tasks] == [1, 0, 1]
    assert outcome(*rescue.save(again, gone(LastTask(0, 4)), NOW_S)) == ([2, 6], [4])


def test_a_neighbour_of_the_task_for_whose_sake_the_worker_was_killed_does_not_pay() -> None:
    tasks = tasks_with(1, 4, 6)
    tasks[0].is_cancelled = True
    again, commands = make_rescue().save(tasks, gone(LastTask(6, 6), target=4), NOW_S)
    assert ([task.spec.number for task in again], tasks[1].retries_left) == ([6], 1)
    assert [command.kind for command in of_type(commands, e.FailTasks)] == ["cancelled"]


def test_the_error_names_task_function_attempt_and_worker() -> None:
    (task,) = tasks_with(1, 4)
    rescue = make_rescue()
    rescue.save([task], gone(LastTask(4, 4)), NOW_S)
    _, commands = rescue.save([task], gone(LastTask(4, 4)), NOW_S)
    (failure,) = of_type(commands, e.FailTasks)
    assert failure.text == "task 4 (work), attempt 2 of 2, ended with its worker: it was killed"


def test_the_error_of_one_that_had_ended_says_why_it_is_not_run_again() -> None:
    _, commands = make_rescue().save(tasks_with(0, 2, 4), gone(LastTask(4, 4)), NOW_S)
    texts = [failure.text for failure in of_type(commands, e.FailTasks)]
    assert "may have been started" in texts[0] and "it was killed" in texts[0]
    assert "may have been started" not in texts[1]


@pytest.mark.parametrize(
    ("attempts", "rest_s"), [(1, 0.0), (2, 0.1), (3, 0.2), (8, 6.4), (9, BACK_OFF_MAX_S), (5000, BACK_OFF_MAX_S)]
)
def test_back_off_doubles_from_the_second_retry_on(attempts: int, rest_s: float) -> None:
    assert back_off_s(attempts) == pytest.approx(rest_s)


def test_a_task_rests_before_its_second_retry() -> None:
    (task,) = tasks_with(3, 4)
    rescue = make_rescue()
    assert rescue.save([task], gone(LastTask(4, 4)), NOW_S)[0] == [task]
    assert rescue.save([task], gone(LastTask(4, 4)), NOW_S)[0] == []
    assert (rescue.count(), rescue.next_due_s()) == (1, pytest.approx(NOW_S + 0.1))
    assert rescue.due(NOW_S + 0.09) == []
    assert rescue.due(NOW_S + 0.11) == [task]
    assert not rescue


def test_a_cancelled_task_does_not_come_back_from_its_rest() -> None:
    first, second = tasks_with(3, 4, 6)
    rescue = make_rescue()
    for task in (first, second):
        rescue.save([task], gone(LastTask()), NOW_S)
        rescue.save([task], gone(LastTask()), NOW_S)
    first.is_cancelled = True
    assert rescue.count() == 1
    assert rescue.due(NOW_S + 60) == [second]
