"""What a drop-in executor must get right because others do not (lines 10 to 12, 20 to 23 of that list)."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from clusterpool.futures import ProcessPoolExecutor
from tests.waiting import wait_for

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def executor() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2) as executor:
        yield executor


def echo(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


# 10. Every keyword is the function's


@pytest.mark.parametrize("name", ["resources", "timeout", "key", "retries", "name", "self", "fn", "args", "workers"])
def test_submit_takes_no_keyword_for_itself(executor: ProcessPoolExecutor, name: str) -> None:
    future: Any = executor.submit(echo, 1, **{name: 2})  # type: ignore[arg-type]
    assert future.result(20) == ((1,), {name: 2})


def test_calls_that_look_alike_are_all_made(executor: ProcessPoolExecutor, tmp_path: Path) -> None:
    def append() -> None:
        with (tmp_path / "calls").open("a") as file:
            file.write("x")

    concurrent.futures.wait([executor.submit(append) for _ in range(5)], timeout=20)
    assert (tmp_path / "calls").read_text() == "xxxxx"


def test_options_go_through_options(executor: ProcessPoolExecutor) -> None:
    assert executor.options(retries=1).submit(echo, retries=5).result(20) == ((), {"retries": 5})


# 11. The whole interface


def test_shutdown_cancels_what_waits_and_refuses_more() -> None:
    executor = ProcessPoolExecutor(1)
    running = executor.submit(time.sleep, 2)
    waiting = [executor.submit(time.sleep, 600) for _ in range(20)]
    while not running.running() and not running.done():
        time.sleep(0.001)
    executor.shutdown(wait=True, cancel_futures=True)
    assert running.result(0) is None
    assert all(future.cancelled() for future in waiting[5:])
    with pytest.raises(RuntimeError):
        executor.submit(abs, 1)


def test_map_has_chunksize_timeout_and_buffersize(executor: ProcessPoolExecutor) -> None:
    assert list(executor.map(pow, range(5), range(5), chunksize=2)) == [1, 1, 4, 27, 256]
    with pytest.raises(concurrent.futures.TimeoutError):
        list(executor.map(time.sleep, [0.5], timeout=0.01))
    read: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(1000):
            read.append(number)
            yield number

    results = executor.map(abs, numbers(), buffersize=4)
    assert next(results) == 0
    assert len(read) <= 6


def test_workers_end_after_their_number_of_tasks() -> None:
    with ProcessPoolExecutor(1, max_tasks_per_child=2) as executor:
        pids = [executor.submit(os.getpid).result(20) for _ in range(4)]
    assert pids[0] == pids[1] != pids[2] == pids[3]


def fail_to_load(kind: type[BaseException]) -> None:
    raise kind("cannot be loaded")


class Unloadable:
    def __init__(self, kind: type[BaseException] = ValueError) -> None:
        self.kind = kind

    def __reduce__(self) -> Any:
        return fail_to_load, (self.kind,)


@pytest.mark.parametrize("kind", [ValueError, SystemExit])
@pytest.mark.parametrize(("function", "arguments"), [(echo, (Unloadable,)), (Unloadable, ())])
def test_what_cannot_be_unpickled_breaks_its_own_call_and_no_other(
    executor: ProcessPoolExecutor, function: Any, arguments: tuple[Any, ...], kind: type[BaseException]
) -> None:
    future = executor.submit(function, *(make(kind) for make in arguments or [lambda kind: kind]))
    with pytest.raises(BrokenProcessPool, match="cannot be loaded") as caught:
        future.result(20)
    assert isinstance(caught.value.__cause__, kind)
    with pytest.raises(BrokenProcessPool, match="cannot be loaded"):
        list(executor.map(lambda _: Unloadable(kind), range(3)))
    assert executor.submit(abs, -1).result(20) == 1


def test_shutdown_lets_those_finish_that_a_worker_was_about_to_take() -> None:
    executor = ProcessPoolExecutor(2)
    futures = [executor.submit(pow, number, 2) for number in range(30)]
    executor.shutdown(cancel_futures=True)
    finished = [future for future in futures if not future.cancelled()]
    assert len(finished) >= 2
    assert [future.result(0) for future in finished] == [number**2 for number in range(len(finished))]


@pytest.mark.parametrize("name", ["terminate_workers", "kill_workers"])
def test_workers_can_be_ended_at_once(name: str) -> None:
    executor = ProcessPoolExecutor(2)
    future = executor.submit(time.sleep, 600)
    while not future.running():
        time.sleep(0.001)
    getattr(executor, name)()
    with pytest.raises(BrokenProcessPool):
        future.result(20)


# 12. cancel() and running() tell the truth


def test_no_future_says_cancelled_while_its_call_runs(tmp_path: Path) -> None:
    def work(number: int) -> int:
        (tmp_path / str(number)).touch()
        time.sleep(0.1)
        return number

    with ProcessPoolExecutor(2) as executor:
        futures = [executor.submit(work, number) for number in range(60)]
        wait_for(lambda: (tmp_path / "0").exists(), "the first call runs")
        cancelled = [number for number, future in enumerate(futures) if future.cancel()]
        running = futures[0]
        assert running.cancelled() is False
    for number, future in enumerate(futures):
        assert future.cancelled() is (number in cancelled)
        assert (tmp_path / str(number)).exists() is (number not in cancelled)
    assert cancelled


# 20. await


def test_results_are_awaitable_and_run_in_executor_works(executor: ProcessPoolExecutor) -> None:
    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        first = loop.run_in_executor(executor, abs, -1)
        second = asyncio.wrap_future(executor.submit(abs, -2))
        return [await first, await second]

    assert asyncio.run(main()) == [1, 2]


# 21, 23


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_that_cannot_be_right_is_a_value_error(size: int) -> None:
    with pytest.raises(ValueError):
        ProcessPoolExecutor(size)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"max_workers": 1.5}, TypeError),
        ({"resources": {"GPU": -1}}, ValueError),
        ({"resources": {"GPU": "1"}}, TypeError),
    ],
)
def test_arguments_that_cannot_be_are_refused_at_once(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        ProcessPoolExecutor(**arguments)


def test_programs_may_look_at_the_size(executor: ProcessPoolExecutor) -> None:
    assert executor._max_workers == 2


def test_a_callback_of_a_thread_may_submit_more(executor: ProcessPoolExecutor) -> None:
    done = threading.Event()
    executor.submit(abs, -1).add_done_callback(
        lambda _: executor.submit(abs, -2).add_done_callback(lambda _: done.set())
    )
    assert done.wait(20)
