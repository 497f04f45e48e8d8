"""The facade `Pool` alone: what it makes of calls, on a fake worker group (the engine has its own tests)."""

from __future__ import annotations

import asyncio
import gc
import itertools
import multiprocessing.pool
import queue
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from group_of_threads import FakeGroup, wait_until, wake_waiters

from clusterpool.calls import waiting
from clusterpool.client import api
from clusterpool.errors import TaskCancelled, WorkerSetupFailed
from clusterpool.multiprocessing import pool as pool_module
from clusterpool.multiprocessing.pool import AsyncResult, IMapIterator, IMapUnorderedIterator, MapResult, Pool
from tests.waiting import wait_for


class FakePool(Pool):
    _group_class = FakeGroup  # type: ignore[assignment]

    @property
    def group(self) -> FakeGroup:
        return self._group  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def fake_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "wait_until", wait_until)
    monkeypatch.setattr(waiting, "wake_waiters", wake_waiters)
    monkeypatch.setattr(api, "wait_until", wait_until)


@pytest.fixture
def pool() -> Iterator[FakePool]:
    with FakePool(2) as pool:
        yield pool


def square(x: int) -> int:
    return x * x


def fail_at_three(x: int) -> int:
    if x == 3:
        raise LookupError(x)
    return x


def numbers_then_error(length: int) -> Iterator[int]:
    yield from range(length)
    raise OSError("the iterable broke")


# --- apply and map


def test_map_default_chunks_are_four_a_worker(pool: FakePool) -> None:
    assert pool.map(square, range(1000)) == [x * x for x in range(1000)]
    assert len(pool.group.submitted_chunks) == 8
    assert pool.group.submit_calls == 1


def test_map_by_single_items_is_one_submission(pool: FakePool) -> None:
    assert pool.map(square, range(500), chunksize=1) == [x * x for x in range(500)]
    assert len(pool.group.submitted_chunks) == 500
    assert pool.group.submit_calls == 1


def test_map_error_comes_once_all_chunks_are_done(pool: FakePool) -> None:
    gate = threading.Event()

    def wait_or_fail(x: int) -> int:
        if x == 0:
            raise LookupError(x)
        gate.wait(30)
        return x

    result = pool.map_async(wait_or_fail, [0, 1], chunksize=1)
    wait_for(lambda: pool.group.pending() == 1)
    assert not result.ready()
    assert result._number_left == 1
    gate.set()
    with pytest.raises(LookupError):
        result.get(30)
    assert not result.successful()


def test_map_of_sized_iterable_that_fails_gives_the_error_by_get(pool: FakePool) -> None:
    class Broken:
        def __len__(self) -> int:
            return 1

        def __iter__(self) -> Iterator[int]:
            raise OSError("broken")

    result = pool.map_async(square, Broken())
    with pytest.raises(OSError, match="broken"):
        result.get(30)
    with pytest.raises(OSError, match="broke"):
        pool.map_async(square, numbers_then_error(3))
    assert len(pool._cache) == 0


def test_callbacks_run_before_the_result_is_ready_and_in_another_thread(pool: FakePool) -> None:
    seen: list[Any] = []
    release = threading.Event()

    def callback(value: int) -> None:
        release.wait(30)
        seen.append((value, threading.current_thread()))

    result = pool.apply_async(square, (3,), callback=callback, error_callback=seen.append)
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(0.05)
    release.set()
    assert result.get(30) == 9
    assert seen[0][0] == 9
    assert seen[0][1] is not threading.main_thread()


def test_error_callback_gets_the_error_that_get_raises_once(pool: FakePool) -> None:
    seen: list[BaseException] = []
    result = pool.starmap_async(fail_at_three, [(3,), (4,), (3,)], 1, seen.append, seen.append)
    with pytest.raises(LookupError) as caught:
        result.get(30)
    assert seen == [caught.value]


def test_callback_that_raises_does_not_hang_the_result(pool: FakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    assert pool.apply_async(square, (3,), callback=lambda value: 1 / 0).get(30) == 9
    assert pool.apply_async(square, (4,), callback=lambda value: None).get(30) == 16


def test_callback_may_submit_and_wait(pool: FakePool) -> None:
    seen: list[int] = []
    result = pool.apply_async(square, (2,), callback=lambda x: seen.append(pool.apply(square, (x,))))
    result.get(30)
    assert seen == [16]


def test_result_that_cannot_be_pickled_is_the_standard_maybe_encoding_error(pool: FakePool) -> None:
    seen: list[BaseException] = []
    result = pool.apply_async(threading.Lock, error_callback=seen.append)
    message = "Error sending result: '<unlocked"
    with pytest.raises(multiprocessing.pool.MaybeEncodingError, match=message) as caught:
        result.get(30)
    assert seen == [caught.value]
    assert "cannot pickle" in caught.value.exc


def test_result_can_be_awaited_before_and_after_it_is_ready(pool: FakePool) -> None:
    async def main() -> list[Any]:
        ready = pool.apply_async(square, (2,))
        ready.wait(30)
        return [await pool.apply_async(square, (3,)), await ready, await pool.map_async(square, [1, 2])]

    assert asyncio.run(main()) == [9, 4, [1, 4]]


def test_result_as_future(pool: FakePool) -> None:
    gate = threading.Event()
    result = pool.apply_async(gate.wait, (10,))
    future = result.future()
    assert not future.done()
    gate.set()
    assert future.result(30) is True
    assert result.future() is future
    with pytest.raises(LookupError):
        pool.apply_async(fail_at_three, (3,)).future().result(30)


def test_types_of_results(pool: FakePool) -> None:
    assert type(pool.apply_async(square, (1,))) is AsyncResult
    assert type(pool.map_async(square, [1])) is MapResult
    assert type(pool.imap(square, [1])) is IMapIterator
    assert type(pool.imap_unordered(square, [1], 5)) is IMapUnorderedIterator
    assert pool_module.ApplyResult is AsyncResult
    assert AsyncResult[int].__origin__ is AsyncResult
    assert pool_module.ThreadPool is multiprocessing.pool.ThreadPool


def test_successful_of_a_result_not_ready_is_a_value_error(pool: FakePool) -> None:
    gate = threading.Event()
    result = pool.apply_async(gate.wait, (10,))
    with pytest.raises(ValueError, match=r"ApplyResult object at .* not ready"):
        result.successful()
    gate.set()
    result.wait(30)
    assert result.successful()


def test_cache_holds_what_is_pending_and_nothing_else(pool: FakePool) -> None:
    gate = threading.Event()
    results = [pool.apply_async(gate.wait, (10,)), pool.map_async(square, [1])]
    assert len(pool._cache) >= 1
    gate.set()
    for result in results:
        result.wait(30)
    assert list(pool.imap(square, [1, 2])) == [1, 4]
    wait_for(lambda: len(pool._cache) == 0)


def test_arguments_and_results_are_let_go() -> None:
    class Value:
        pass

    with FakePool(1) as pool:
        result = pool.map_async(square, [1, 2])
        result.get(30)
        gone = weakref.ref(result)
        del result
        gc.collect()
        assert gone() is None


# --- imap


@pytest.mark.parametrize("chunksize", [1, 2, 7, 100])
def test_imap_in_order(pool: FakePool, chunksize: int) -> None:
    assert list(pool.imap(square, range(50), chunksize)) == [x * x for x in range(50)]
    assert list(pool.imap(square, iter(range(50)), chunksize)) == [x * x for x in range(50)]
    assert sorted(pool.imap_unordered(square, iter(range(50)), chunksize)) == [x * x for x in range(50)]


def test_imap_error_of_a_task_takes_its_turn_and_the_iteration_goes_on(pool: FakePool) -> None:
    results = pool.imap(fail_at_three, range(6))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(LookupError):
        next(results)
    assert list(results) == [4, 5]


@pytest.mark.parametrize(("chunksize", "before"), [(1, 7), (2, 6), (4, 4)])
def test_imap_error_of_the_iterable_takes_its_turn(pool: FakePool, chunksize: int, before: int) -> None:
    results = pool.imap(square, numbers_then_error(7), chunksize)
    assert [next(results) for _ in range(before)] == [x * x for x in range(before)]
    with pytest.raises(OSError, match="the iterable broke"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_imap_unordered_error_of_the_iterable(pool: FakePool) -> None:
    results = pool.imap_unordered(square, numbers_then_error(5))
    values = []
    with pytest.raises(OSError, match="the iterable broke"):
        for value in results:
            values.append(value)
    assert sorted(values) == [0, 1, 4, 9, 16]
    with pytest.raises(StopIteration):
        next(results)


def test_imap_begins_before_next_is_called(pool: FakePool) -> None:
    ran: list[int] = []
    results = pool.imap(ran.append, (x for x in range(3)))
    wait_for(lambda: len(ran) == 3)
    assert list(results) == [None, None, None]


def test_imap_submits_an_item_before_it_asks_for_the_next(pool: FakePool) -> None:
    """The iterable waits for the result of the item before: a lookahead would be a deadlock."""
    answers: queue.SimpleQueue[int] = queue.SimpleQueue()

    def questions() -> Iterator[int]:
        for _ in range(5):
            yield answers.get(timeout=30)

    answers.put(2)
    seen = []
    for value in pool.imap(square, questions()):
        seen.append(value)
        answers.put(value % 1000)
    assert seen == [4, 16, 256, 65536, 536**2]


def test_imap_of_an_endless_generator_reads_only_the_window(pool: FakePool) -> None:
    read = itertools.count()
    results = pool.imap(square, read)
    assert list(itertools.islice(results, 1000)) == [x * x for x in range(1000)]
    wait_for(lambda: pool.group.pending() == 0)
    time.sleep(0.02)  # if it read on without a bound, it would be far away by now
    assert next(read) < 1000 + pool_module.FeedWindow(workers=2)._tasks_max + 1


@pytest.mark.parametrize("name", ["imap", "imap_unordered"])
def test_imap_buffersize_bounds_what_is_read(pool: FakePool, name: str) -> None:
    read: list[int] = []

    def numbers() -> Iterator[int]:
        for number in itertools.count():
            read.append(number)
            yield number

    results = getattr(pool, name)(square, numbers(), buffersize=3)
    for taken in range(20):
        wait_for(lambda taken=taken: len(read) == taken + 3)  # type: ignore[misc]
        next(results)
    assert pool.group.pending_max <= 3


def test_imap_next_with_timeout(pool: FakePool) -> None:
    gate = threading.Event()
    results = pool.imap(gate.wait, [10])
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(timeout=0.01)
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(0)
    gate.set()
    assert results.next(timeout=10) is True
    with pytest.raises(StopIteration):
        results.next(timeout=10)


def test_imap_none_results(pool: FakePool) -> None:
    assert list(pool.imap(lambda x: None, range(3), 2)) == [None] * 3


def test_imap_shared_by_threads_gives_each_result_once(pool: FakePool) -> None:
    results = pool.imap(square, (x for x in range(400)))
    seen: list[int] = []
    threads = [threading.Thread(target=lambda: seen.extend(results)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(seen) == [x * x for x in range(400)]


def test_imap_that_nobody_holds_still_runs_to_its_end(pool: FakePool) -> None:
    ran: list[int] = []
    pool.imap_unordered(ran.append, (x for x in range(5000)))
    wait_for(lambda: len(ran) == 5000)
    wait_for(lambda: len(pool._cache) == 0)


def test_join_runs_an_imap_that_nobody_consumes_to_its_end() -> None:
    pool = FakePool(2)
    results = pool.imap(square, (x for x in range(5000)), buffersize=4)
    pool.close()
    pool.join()
    assert list(results) == [x * x for x in range(5000)]


# --- the end of a pool


def test_close_lets_an_imap_that_has_begun_read_on() -> None:
    pool = FakePool(2)
    results = pool.imap(square, (x for x in range(3000)), buffersize=2)
    pool.close()
    assert list(results) == [x * x for x in range(3000)]
    pool.join()
    assert pool.group.state == "closed"


@pytest.mark.parametrize("end", ["close", "terminate"])
def test_calls_after_the_end_are_value_errors(end: str) -> None:
    pool = FakePool(1)
    getattr(pool, end)()
    calls: list[Callable[[], Any]] = [
        lambda: pool.apply(square, (1,)),
        lambda: pool.apply_async(square, (1,)),
        lambda: pool.map(square, [1]),
        lambda: pool.starmap_async(square, [(1,)]),
        lambda: pool.imap(square, [1]),
        lambda: pool.imap_unordered(square, [1]),
        lambda: pool.__enter__(),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="Pool not running"):
            call()
    pool.join()
    pool.terminate()


def test_join_of_a_running_pool_is_a_value_error(pool: FakePool) -> None:
    with pytest.raises(ValueError, match="Pool is still running"):
        pool.join()


def test_terminate_ends_what_waits_and_calls_nobody_back() -> None:
    gate = threading.Event()
    called: list[Any] = []
    pool = FakePool(1)
    result = pool.apply_async(gate.wait, (10,), callback=called.append, error_callback=called.append)
    results = pool.imap(gate.wait, itertools.repeat(10))
    threading.Timer(0.05, gate.set).start()
    pool.terminate()
    with pytest.raises(TaskCancelled):
        result.get(30)
    with pytest.raises(TaskCancelled):
        list(results)
    pool.join()
    assert called == []


def test_terminate_does_not_wait_for_an_iterable_that_blocks() -> None:
    release = threading.Event()

    def blocks() -> Iterator[int]:
        release.wait(30)
        yield 1

    pool = FakePool(1)
    results = pool.imap(square, blocks())
    pool.terminate()
    pool.join()
    with pytest.raises(TaskCancelled):
        results.next(10)
    release.set()


def test_pool_left_open_gives_a_resource_warning_and_ends_its_group() -> None:
    pool = FakePool(1)
    group = pool.group
    with pytest.warns(ResourceWarning, match="unclosed running multiprocessing pool <.*state=RUN"):
        del pool
        gc.collect()
    wait_for(lambda: group.state == "terminated")


def test_pool_that_was_terminated_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with FakePool(1) as pool:
            pool.map(square, [1, 2])
        del pool
        gc.collect()


def test_pool_that_is_dropped_while_it_works_gives_its_results() -> None:
    with pytest.warns(ResourceWarning):
        assert FakePool(1).map_async(square, range(20)).get(30) == [x * x for x in range(20)]
        gc.collect()


def test_initializer_that_always_fails_is_an_error_not_a_hang() -> None:
    def setup() -> None:
        raise RuntimeError("no licence")

    pool = FakePool(2, initializer=setup)
    with pytest.raises(WorkerSetupFailed, match=r"setup failed .* RuntimeError: no licence") as caught:
        pool.map(square, range(10))
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(WorkerSetupFailed):
        list(pool.imap(square, range(10)))
    pool.terminate()


def test_initializer_that_fails_now_and_then_is_tried_again() -> None:
    attempts = itertools.count()

    def setup() -> None:
        if next(attempts) < 3:
            raise RuntimeError("not yet")

    with FakePool(2, initializer=setup) as pool:
        assert pool.map(square, range(10)) == [x * x for x in range(10)]


# --- arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"processes": 0}, ValueError, "Number of processes must be at least 1"),
        ({"processes": -2}, ValueError, "Number of processes must be at least 1"),
        ({"processes": 1.5}, TypeError, "integer"),
        ({"maxtasksperchild": 0}, ValueError, "maxtasksperchild must be a positive int or None"),
        ({"maxtasksperchild": -1}, ValueError, "maxtasksperchild must be a positive int or None"),
        ({"maxtasksperchild": 0.5}, ValueError, "maxtasksperchild must be a positive int or None"),
        ({"maxtasksperchild": "12"}, ValueError, "maxtasksperchild must be a positive int or None"),
        ({"initializer": 3}, TypeError, "initializer must be a callable"),
        ({"retries": -1}, ValueError, "retries must be 0 or more"),
        ({"progress": "yes"}, TypeError, "progress must be"),
    ],
)
def test_constructor_arguments_that_cannot_be(options: dict[str, Any], error: type[Exception], message: str) -> None:
    groups = len(FakeGroup.instances)
    with pytest.raises(error, match=message):
        FakePool(**{"processes": 1, **options})
    assert len(FakeGroup.instances) == groups


def test_call_arguments_that_cannot_be(pool: FakePool) -> None:
    with pytest.raises(TypeError, match="'int' object is not callable"):
        pool.map(3, [1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="args must be a sequence of arguments"):
        pool.apply(square, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'int' object is not iterable"):
        pool.map(square, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'int' object is not iterable"):
        pool.imap(square, 3)  # type: ignore[arg-type]
    for call in (pool.imap, pool.imap_unordered, pool.map):
        with pytest.raises(ValueError, match=r"Chunksize must be 1\+, not 0"):
            call(square, [1, 2], chunksize=0)
    with pytest.raises(ValueError, match="buffersize must be"):
        pool.imap(square, [1], buffersize=0)


def test_arguments_reach_the_group() -> None:
    with FakePool(1, retries=5, resources={"GPU": 1}) as pool:
        assert (pool.group.retries, pool.group.resources) == (5, {"GPU": 1})
        assert pool.apply(dict, [[("a", 1)]], {"b": 2}) == {"a": 1, "b": 2}


def test_map_of_nothing(pool: FakePool) -> None:
    result = pool.map_async(square, [])
    assert result.ready()
    assert result.get() == []
    assert list(pool.imap(square, [])) == []
    assert pool.starmap(pow, iter([])) == []


def test_pool_cannot_be_pickled(pool: FakePool) -> None:
    with pytest.raises(NotImplementedError, match="cannot be passed between processes or pickled"):
        pool.__reduce__()


def test_progress_bar_counts_items(monkeypatch: pytest.MonkeyPatch) -> None:
    import tqdm.auto

    bars: list[Any] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            self.options, self.n, self.closed = options, 0, False
            bars.append(self)

        def update(self, n: int) -> None:
            self.n += n

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    with FakePool(2, progress={"desc": "squares"}) as pool:
        pool.map(square, range(100))
        list(pool.imap(square, (x for x in range(10)), 3))
        wait_for(lambda: all(bar.closed for bar in bars))
    assert [(bar.n, bar.options["total"], bar.options["desc"]) for bar in bars] == [
        (100, 100, "squares"),
        (10, None, "squares"),
    ]
