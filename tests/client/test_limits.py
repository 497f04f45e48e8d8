"""Limits of time, retries after exceptions, and at-most-once, of remote functions on a real cluster."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import clusterpool
from clusterpool import errors
from tests.waiting import is_alive, wait_for

pytestmark = pytest.mark.usefixtures("cluster")


def note_attempt(folder: str) -> int:
    """The number of this attempt; each leaves a file with its pid."""
    attempt = len(os.listdir(folder)) + 1
    Path(folder, str(attempt)).write_text(str(os.getpid()))
    return attempt


def spin(how: str) -> None:
    while how == "loop":
        pass
    if how == "C":
        sum(iter(int, 1))  # endless, and the GIL is never let go
    time.sleep(1e6)


@pytest.mark.parametrize("how", ["sleep", "loop", "C"])
def test_a_task_beyond_its_limit_is_stopped_and_says_so(tmp_path: Path, how: str) -> None:
    @clusterpool.remote(timeout=1.0)
    def hang(folder: str) -> None:
        note_attempt(folder)
        spin(how)

    started_s = time.monotonic()
    with pytest.raises(errors.TaskTimeout) as info:
        clusterpool.get(hang.remote(str(tmp_path)), timeout=30)
    assert time.monotonic() - started_s >= 1.0
    assert isinstance(info.value, TimeoutError)
    pid = (tmp_path / "1").read_text()
    for part in ("hang", "attempt 1 of 4", "limit of 1 s", f"pid {pid}", clusterpool.node_id(), "timeout="):
        assert part in str(info.value)
    assert os.listdir(tmp_path) == ["1"], "it was tried again"
    wait_for(lambda: not is_alive(int(pid)))


def test_a_limit_does_not_count_the_time_in_the_queue() -> None:
    @clusterpool.remote(timeout=2)
    def nap() -> int:
        time.sleep(0.3)
        return 1

    # Twenty times 0.3 s on two CPUs: the last ones wait for longer than their limit.
    assert clusterpool.get([nap.remote() for _ in range(20)], timeout=50) == [1] * 20


def test_only_the_one_beyond_its_limit_fails() -> None:
    @clusterpool.remote(timeout=2)
    def nap(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    refs = [nap.remote(60 if number == 7 else 0.001) for number in range(20)]
    outcomes: list[Any] = []
    for ref in refs:
        try:
            outcomes.append(clusterpool.get(ref, timeout=30))
        except errors.TaskTimeout:
            outcomes.append("late")
    assert outcomes == [0.001] * 7 + ["late"] + [0.001] * 12


def test_a_task_that_waits_for_its_own_tasks_is_stopped_as_well() -> None:
    @clusterpool.remote
    def inner() -> None:
        time.sleep(2)

    @clusterpool.remote(timeout=0.3)
    def outer() -> None:
        clusterpool.get(inner.remote())

    with pytest.raises(errors.TaskTimeout):
        clusterpool.get(outer.remote(), timeout=30)


@pytest.mark.parametrize("retry_exceptions", [True, errors.TaskTimeout, [ValueError, TimeoutError]])
def test_a_timeout_is_retried_where_that_is_asked_for(tmp_path: Path, retry_exceptions: Any) -> None:
    @clusterpool.remote(timeout=2, retry_exceptions=retry_exceptions)
    def hang_once(folder: str) -> int:
        attempt = note_attempt(folder)
        if attempt == 1:
            time.sleep(60)
        return attempt

    assert clusterpool.get(hang_once.remote(str(tmp_path)), timeout=30) == 2


class Flaky(Exception):
    pass


@pytest.mark.parametrize(
    ("retry_exceptions", "attempts"),
    [(False, 1), (True, 4), ([Flaky], 4), (Flaky, 4), ([KeyError, Flaky], 4), ([KeyError], 1)],
)
def test_exceptions_are_retried_by_class(tmp_path: Path, retry_exceptions: Any, attempts: int) -> None:
    @clusterpool.remote(retry_exceptions=retry_exceptions)
    def fail(folder: str) -> None:
        note_attempt(folder)
        raise Flaky("again")

    with pytest.raises(Flaky, match="again"):
        clusterpool.get(fail.remote(str(tmp_path)), timeout=30)
    assert len(os.listdir(tmp_path)) == attempts


def test_a_class_of_the_program_itself_is_known_in_the_worker(tmp_path: Path) -> None:
    class Local(Exception):
        pass

    @clusterpool.remote(retry_exceptions=[Local], retries=2, num_returns=2)
    def fail_once(folder: str) -> tuple[int, int]:
        attempt = note_attempt(folder)
        if attempt == 1:
            raise Local
        return attempt, attempt

    assert clusterpool.get(fail_once.remote(str(tmp_path)), timeout=30) == [2, 2]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"timeout": 0}, ValueError),
        ({"timeout": -1}, ValueError),
        ({"timeout": float("nan")}, ValueError),
        ({"timeout": "5"}, TypeError),
        ({"retry_exceptions": [3]}, TypeError),
        ({"retry_exceptions": "ValueError"}, TypeError),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        clusterpool.remote(**options)(spin)


def test_without_retries_no_task_is_started_twice(tmp_path: Path) -> None:
    @clusterpool.remote(retries=0)
    def once(folder: str, number: int) -> int:
        with Path(folder, str(number)).open("x"):  # raises where there is such a file
            pass
        if number == 57:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    warm = tmp_path / "warm"
    warm.mkdir()
    clusterpool.get([once.remote(str(warm), number) for number in range(1000, 1500)], timeout=30)  # travel in batches
    folder = tmp_path / "folder"
    folder.mkdir()
    lost = []
    for number, ref in enumerate([once.remote(str(folder), number) for number in range(100)]):
        try:
            assert clusterpool.get(ref, timeout=30) == number
        except errors.WorkerDied as error:
            lost.append(number)
            assert "attempt 1 of 1" in str(error)
    assert 57 in lost
    assert sorted(int(name) for name in os.listdir(folder)) == list(range(100)), "an unstarted one was lost"
