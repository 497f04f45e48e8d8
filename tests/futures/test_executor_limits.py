"""Limits of time, retries and the stopping of running calls, through the standard futures, on a real cluster."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from clusterpool.errors import TaskTimeout
from clusterpool.futures import ProcessPoolExecutor
from tests.waiting import is_alive, wait_for

pytestmark = pytest.mark.usefixtures("cluster")


def touch_and_sleep(path: str, seconds: float = 1e6) -> str:
    Path(path).write_text(str(os.getpid()))
    time.sleep(seconds)
    return "slept"


def hang_at_three(x: int) -> int:
    if x == 3:
        time.sleep(1e6)
    return 2 * x


def die_at_three(x: int) -> int:
    if x == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * x


def nap(path: str, seconds: float) -> float:
    """Unless it is to take no time: until somebody removes the file."""
    Path(path).touch()
    if seconds:
        wait_for(lambda: not Path(path).exists())
    return seconds


def fail_twice(folder: str) -> int:
    attempt = len(os.listdir(folder)) + 1
    Path(folder, str(attempt)).touch()
    if attempt < 3:
        raise ConnectionError("try again")
    return attempt


def test_a_call_beyond_its_limit_raises_and_the_executor_goes_on() -> None:
    with ProcessPoolExecutor(2, timeout=1) as executor:
        future = executor.submit(hang_at_three, 3)
        with pytest.raises(concurrent.futures.TimeoutError, match="limit of 1 s") as info:
            future.result(30)
        assert isinstance(info.value, TaskTimeout)
        assert not future.cancelled()
        assert executor.submit(hang_at_three, 4).result(30) == 8


def test_the_timeout_keyword_of_submit_belongs_to_the_function() -> None:
    with ProcessPoolExecutor(1, timeout=30) as executor:
        assert executor.submit(dict, timeout=5).result(30) == {"timeout": 5}


def test_a_view_has_a_limit_of_its_own() -> None:
    with ProcessPoolExecutor(2) as executor:
        executor.submit(hang_at_three, 1).result(30)
        limited = executor.options(timeout=1)
        with pytest.raises(TaskTimeout):
            limited.submit(hang_at_three, 3).result(30)
        values = limited.map(hang_at_three, range(5), chunksize=5)
        assert [next(values) for _ in range(3)] == [0, 2, 4]
        with pytest.raises(TaskTimeout, match="item 3 of the iterable"):
            next(values)
        assert executor.submit(hang_at_three, 5).result(30) == 10


def test_the_timeout_of_map_is_still_the_whole_iterations() -> None:
    with ProcessPoolExecutor(1, cancel_running=True) as executor:
        with pytest.raises(concurrent.futures.TimeoutError):
            list(executor.map(hang_at_three, [3], timeout=0.2))


def test_exceptions_are_retried_where_the_executor_is_told_so(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, retries=2, retry_exceptions=[OSError]) as executor:
        assert executor.submit(fail_twice, str(tmp_path)).result(30) == 3
    with ProcessPoolExecutor(1, retry_exceptions=True) as executor, pytest.raises(ConnectionError):
        (tmp_path / "0").mkdir()
        executor.submit(fail_twice, str(tmp_path / "0")).result(30)


def test_with_retries_a_map_gives_the_good_items_before_the_bad_one() -> None:
    with ProcessPoolExecutor(2, retries=1) as executor:
        values = executor.map(die_at_three, range(6), chunksize=6)
        assert [next(values) for _ in range(3)] == [0, 2, 4]
        with pytest.raises(BrokenProcessPool, match="item 3 of the iterable"):
            next(values)
        assert executor.submit(die_at_three, 4).result(30) == 8


# --- cancelling


def test_a_running_call_is_stopped_where_the_executor_is_told_so(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, cancel_running=True) as executor:
        path = tmp_path / "started"
        future = executor.submit(touch_and_sleep, str(path))
        other = executor.submit(touch_and_sleep, str(tmp_path / "other"), 1.0)
        wait_for(lambda: path.exists() and path.read_text() != "")
        pid = int(path.read_text())
        assert future.running() and not future.cancelled()
        assert future.cancel()
        assert future.cancelled() and not future.running() and future.done()
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(30)
        wait_for(lambda: not is_alive(pid))
        assert other.result(30) == "slept"
        assert executor.submit(hang_at_three, 4).result(30) == 8, "the executor is not broken"


def test_without_that_a_running_call_is_not_cancelled(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1) as executor:
        future = executor.submit(nap, str(tmp_path / "started"), 1.0)
        wait_for((tmp_path / "started").exists)
        assert future.running()
        assert not future.cancel()
        (tmp_path / "started").unlink()
        assert future.result(30) == 1.0
        assert not future.running() and not future.cancelled()


def test_a_call_that_waits_behind_another_in_a_worker_is_not_running_and_can_be_cancelled(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1) as executor:
        paths = [str(tmp_path / str(number)) for number in range(300)]
        for path in paths[:200]:
            executor.submit(nap, path, 0).result(30)
        group = executor._pool.group
        assert group is not None
        mean_s = group._client.machine.sets[group._number].dispatcher._mean_s
        mean_s.update(dict.fromkeys(mean_s, 1e-6))  # as on a quick machine: calls travel in batches
        first = executor.submit(nap, paths[200], 1.0)
        others = [executor.submit(nap, path, 0.0) for path in paths[201:]]
        wait_for(Path(paths[200]).exists)
        assert first.running()
        assert not any(future.running() for future in others)
        group._client.settle()  # what was submitted just now is taken in by another thread, soon
        sent = group._client.machine.is_sent
        assert sent(others[1]._task_number), "the test is about calls that are in the worker"
        cancelled = [number for number, future in enumerate(others) if number % 2 and future.cancel()]
        assert cancelled == list(range(1, 99, 2))
        Path(paths[200]).unlink()
        assert first.result(30) == 1.0
        assert [future.result(30) for future in others[::2]] == [0.0] * 50
    assert [Path(path).exists() for path in paths[201:]] == [True, False] * 49 + [True]


def test_truth_at_all_times(tmp_path: Path) -> None:
    """Every call either ran and gave its value, or was cancelled and never ran."""
    with ProcessPoolExecutor(2) as executor:
        futures: list[concurrent.futures.Future[Any]] = []
        for number in range(1500):
            futures.append(executor.submit(nap, str(tmp_path / str(number)), 0.0))
            if number % 3 == 0:
                futures[number // 2].cancel()
        concurrent.futures.wait(futures, timeout=40)
        for number, future in enumerate(futures):
            assert future.done()
            assert Path(tmp_path, str(number)).exists() is not future.cancelled()


# --- stragglers


def slow_first_time(folder: str, x: int) -> int:
    try:
        Path(folder, str(x)).touch(exist_ok=False)
    except FileExistsError:
        return 2 * x
    time.sleep(600 if x == 5 else 0.05)
    return 2 * x


def test_the_last_slow_call_is_started_again_where_that_is_safe(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, safe_to_repeat=True) as executor:
        futures = [executor.submit(slow_first_time, str(tmp_path), x) for x in range(8)]
        assert [future.result(30) for future in futures] == [2 * x for x in range(8)]
        assert executor.submit(hang_at_three, 4).result(30) == 8, "the executor is not broken"
