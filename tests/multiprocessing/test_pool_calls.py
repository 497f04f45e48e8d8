"""`clusterpool.Pool` on a real embedded cluster: apply, map and starmap, results, errors, copies."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import multiprocessing
import multiprocessing.pool
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clusterpool
import clusterpool.multiprocessing
from clusterpool.multiprocessing import Pool
from tests.waiting import wait_for

# All on one cluster of the module: only its last test waits for the end of a cluster.
pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def pool(cluster: None) -> Iterator[Any]:
    with Pool(2) as pool:
        yield pool


def square(x: int) -> int:
    return x * x


def collect(*args: Any, **kwds: Any) -> tuple[Any, Any]:
    return args, kwds


class CodedError(Exception):
    """Its `args` do not fit its constructor, so pickle alone cannot rebuild it."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def fail(kind: str) -> None:
    if kind == "coded":
        raise CodedError(7, "seven")
    if kind == "local":

        class LocalError(Exception):
            pass

        raise LocalError("made in the task")
    if kind == "unpicklable":
        raise ValueError("holds a lock", threading.Lock())
    raise LookupError(kind)


def wait_for_file(path: Path) -> int:
    wait_for(path.exists, f"{path} comes")
    return os.getpid()


def unpicklable(_: Any) -> Any:
    return threading.Lock()


def fill(array: np.ndarray, value: float) -> tuple[float, np.ndarray]:
    before = float(array[0])
    array[:] = value
    return before, array


def nested(x: int) -> list[int]:
    with Pool(2) as inner:
        return inner.map(square, range(x))


# --- 1: the standard library's names and order


def test_one_class_under_all_its_names() -> None:
    import clusterpool.multiprocessing.pool

    assert clusterpool.Pool is clusterpool.multiprocessing.Pool is clusterpool.multiprocessing.pool.Pool


@pytest.mark.parametrize(
    "name",
    [
        "__init__", "apply", "apply_async", "map", "map_async", "starmap", "starmap_async", "imap",
        "imap_unordered", "close", "terminate", "join",
    ],
)  # fmt: skip
def test_arguments_are_the_standard_ones_in_their_order(name: str) -> None:
    ours = inspect.signature(getattr(Pool, name)).parameters
    theirs = inspect.signature(getattr(multiprocessing.pool.Pool, name)).parameters
    positional = [p for p in ours.values() if p.kind is not p.KEYWORD_ONLY]
    assert [p.name for p in positional] == list(theirs)
    assert [p.default for p in positional] == [p.default for p in theirs.values()]


def test_apply(pool: Any) -> None:
    assert pool.apply(square, (3,)) == 9
    assert pool.apply(collect, [1, 2], {"retries": 3, "func": 4}) == ((1, 2), {"retries": 3, "func": 4})
    assert pool.apply(func=collect, args=(1,), kwds={"a": 2}) == ((1,), {"a": 2})
    assert pool.apply_async(collect, (), {"timeout": 1}).get(30) == ((), {"timeout": 1})


@pytest.mark.parametrize("chunksize", [None, 1, 3, 1000])
def test_map_and_starmap(pool: Any, chunksize: int | None) -> None:
    assert pool.map(square, range(100), chunksize) == [x * x for x in range(100)]
    assert pool.map(square, (x for x in range(10)), chunksize) == [x * x for x in range(10)]
    assert pool.starmap(pow, [(2, 3), (3, 2)], chunksize) == [8, 9]
    assert pool.starmap(pow, zip(range(5), itertools.repeat(2)), chunksize) == [0, 1, 4, 9, 16]
    assert pool.map(str, {"a": 1, "b": 2}, chunksize) == ["a", "b"]
    assert pool.map(square, [], chunksize) == []


def test_many_tiny_tasks(pool: Any) -> None:
    assert pool.map(square, range(20_000), chunksize=1) == [x * x for x in range(20_000)]
    assert pool.map(square, range(300_000)) == [x * x for x in range(300_000)]


def test_callbacks(pool: Any) -> None:
    values: list[Any] = []
    errors: list[BaseException] = []
    results = [
        pool.apply_async(square, (3,), {}, values.append, errors.append),
        pool.map_async(square, [1, 2], 1, values.append, errors.append),
        pool.starmap_async(pow, [(2, 3)], None, values.append, errors.append),
    ]
    for result in results:
        result.wait(30)
    assert sorted(values, key=str) == [9, [1, 4], [8]]
    assert errors == []
    assert all(result.successful() for result in results)


def test_results_are_asked_for_from_any_thread(pool: Any) -> None:
    result = pool.map_async(square, range(1000), 1)
    seen: list[Any] = []
    threads = [threading.Thread(target=lambda: seen.append(result.get(30))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == [[x * x for x in range(1000)]] * 4


def test_get_with_timeout(pool: Any, tmp_path: Path) -> None:
    result = pool.apply_async(wait_for_file, (tmp_path / "go",))
    assert not result.ready()
    result.wait(0.01)
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(timeout=0.05)
    with pytest.raises(ValueError, match="not ready"):
        result.successful()
    (tmp_path / "go").touch()
    assert result.get(30) in [worker.pid for worker in pool._pool]


# --- 3: errors


def test_error_has_its_own_type_and_a_remote_traceback_with_node_and_pid(pool: Any) -> None:
    pids = [worker.pid for worker in pool._pool]
    with pytest.raises(LookupError, match="plain") as caught:
        pool.apply(fail, ("plain",))
    cause = caught.value.__cause__
    assert type(cause).__name__ == "RemoteTraceback"
    assert "raise LookupError(kind)" in str(cause)
    assert any(str(pid) in str(cause) for pid in pids)
    assert clusterpool.nodes()[0]["node_id"] in str(cause)


def test_error_keeps_arguments_and_attributes(pool: Any) -> None:
    with pytest.raises(CodedError, match="seven") as caught:
        pool.map(fail, ["coded"] * 3)
    assert caught.value.code == 7


@pytest.mark.parametrize("kind", ["local", "unpicklable"])
def test_error_that_pickles_badly_is_still_an_error(pool: Any, kind: str) -> None:
    with pytest.raises(Exception, match=r"made in the task|holds a lock"):
        pool.apply_async(fail, (kind,)).get(30)
    assert pool.apply(square, (2,)) == 4


@pytest.mark.parametrize("call", ["apply_async", "map_async", "imap"])
def test_result_that_cannot_be_pickled_is_a_maybe_encoding_error(pool: Any, call: str) -> None:
    with pytest.raises(multiprocessing.pool.MaybeEncodingError, match="Error sending result"):
        if call == "imap":
            pool.imap(unpicklable, [1]).next(30)
        else:
            getattr(pool, call)(unpicklable, (1,)).get(30)
    assert pool.apply(square, (2,)) == 4


def test_argument_that_cannot_be_pickled_is_the_pickling_error(pool: Any) -> None:
    errors: list[BaseException] = []
    result = pool.apply_async(square, (threading.Lock(),), error_callback=errors.append)
    with pytest.raises((TypeError, pickle.PicklingError), match="lock") as caught:
        result.get(30)
    assert errors == [caught.value]
    assert pool.map(square, [1, 2]) == [1, 4]


def test_error_callback_gets_what_get_raises_once(pool: Any) -> None:
    errors: list[BaseException] = []
    result = pool.map_async(fail, ["a", "b", "c"], 1, errors.append, errors.append)
    with pytest.raises(LookupError) as caught:
        result.get(30)
    assert errors == [caught.value]
    assert not result.successful()


# --- 16: copies


@pytest.mark.parametrize("length", [10, 300_000])
def test_arrays_are_writable_copies(pool: Any, length: int) -> None:
    array = np.zeros(length)
    results = pool.starmap(fill, [(array, value) for value in (1.0, 2.0, 3.0, 4.0)], 1)
    assert [before for before, _ in results] == [0.0] * 4  # no task saw what another wrote
    assert array[0] == 0.0
    for (_, filled), value in zip(results, (1.0, 2.0, 3.0, 4.0)):
        assert filled[0] == filled[-1] == value
        filled[0] = 99.0
    assert results[0][1][-1] == 1.0


def test_list_argument_is_a_copy(pool: Any) -> None:
    items = [3, 1, 2]
    assert pool.apply(list.sort, (items,)) is None
    assert items == [3, 1, 2]


# --- 9: shared things of the standard library as arguments


def put_square(queue: Any, lock: Any, x: int) -> None:
    with lock:
        queue.put(x * x)


def test_proxies_of_a_manager_may_be_arguments(pool: Any) -> None:
    with multiprocessing.Manager() as manager:
        queue, lock, event = manager.Queue(), manager.Lock(), manager.Event()
        pool.starmap(put_square, [(queue, lock, x) for x in range(5)], 1)
        assert sorted(queue.get(timeout=30) for _ in range(5)) == [0, 1, 4, 9, 16]
        pool.apply(event.set)
        assert event.is_set()


# --- 17: functions from anywhere


def test_functions_may_be_results(pool: Any) -> None:
    assert [function(5) for function in pool.map(lambda x: lambda y: x + y, range(3))] == [5, 6, 7]


def test_lambdas_closures_and_bound_methods(pool: Any) -> None:
    offset = 10
    assert pool.map(lambda x: x + offset, range(3)) == [10, 11, 12]
    assert pool.apply("a-b".split, ("-",)) == ["a", "b"]

    class Local:
        def __init__(self, value: int) -> None:
            self.value = value

        def times(self, x: int) -> int:
            return self.value * x

    assert pool.map(Local(3).times, range(3)) == [0, 3, 6]


def test_pool_in_a_pool(pool: Any) -> None:
    assert pool.map(nested, [2, 3], 1) == [[0, 1], [0, 1, 4]]


# --- 20: await


def test_results_can_be_awaited(pool: Any) -> None:
    async def main() -> list[Any]:
        async def awaited(result: Any) -> Any:
            return await result

        with pytest.raises(LookupError):
            await pool.apply_async(fail, ("x",))
        return await asyncio.gather(*(awaited(pool.apply_async(square, (x,))) for x in range(50)))

    assert asyncio.run(main()) == [x * x for x in range(50)]


def test_results_as_standard_futures(pool: Any) -> None:
    from concurrent.futures import as_completed

    futures = [pool.apply_async(square, (x,)).future() for x in range(10)]
    assert sorted(future.result() for future in as_completed(futures, timeout=30)) == [x * x for x in range(10)]


# --- 21: bad arguments


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"processes": 0}, ValueError),
        ({"processes": -1}, ValueError),
        ({"maxtasksperchild": -1}, ValueError),
        ({"maxtasksperchild": 0}, ValueError),
        ({"maxtasksperchild": 1.5}, ValueError),
        ({"initializer": 5}, TypeError),
        ({"resources": {"GPU": -1}}, ValueError),
        ({"resources": {"GPU": "1"}}, TypeError),
        ({"resources": {0: 1}}, TypeError),
        ({"resources": ["GPU"]}, TypeError),
    ],
)
def test_constructor_arguments_that_cannot_be(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        Pool(**{"processes": 1, **options})


def test_calls_that_cannot_be(pool: Any) -> None:
    with pytest.raises(TypeError):
        pool.map(5, [1])
    with pytest.raises(TypeError):
        pool.map(square, 5)
    with pytest.raises(ValueError):
        pool.imap(square, [1], chunksize=0)
    with pytest.raises(NotImplementedError):
        pickle.dumps(pool)


# --- the module


def test_every_name_of_the_standard_module_is_there() -> None:
    module = clusterpool.multiprocessing
    for name in multiprocessing.__all__:
        assert hasattr(module, name), name
    assert module.TimeoutError is multiprocessing.TimeoutError
    assert module.current_process() is multiprocessing.current_process()
    assert module.pool.ThreadPool is multiprocessing.pool.ThreadPool
    assert module.pool.MaybeEncodingError is multiprocessing.pool.MaybeEncodingError
    assert issubclass(module.Process, multiprocessing.Process)
    with pytest.raises(AttributeError, match=r"clusterpool.multiprocessing.*no_such_name"):
        module.no_such_name
    with pytest.raises(AttributeError, match="no_such_name"):
        module.pool.no_such_name


def test_star_import_gives_the_clusters_pool() -> None:
    names: dict[str, Any] = {}
    exec("from clusterpool.multiprocessing import *", names)
    assert names["Pool"] is Pool
    assert names["Queue"] is not None


def test_context_has_the_clusters_pool_and_cpus() -> None:
    context = clusterpool.multiprocessing.get_context("spawn")
    assert context.get_start_method() == "spawn"
    assert context.cpu_count() == clusterpool.multiprocessing.cpu_count()
    assert context.cpu_count() == int(clusterpool.cluster_resources()["CPU"])
    with context.Pool(1) as pool:
        assert type(pool) is Pool
        assert pool.apply(square, (3,)) == 9
    with Pool(1, None, (), None, context) as pool:
        assert pool.apply(square, (3,)) == 9
    with pytest.raises(ValueError):
        clusterpool.multiprocessing.get_context("teleport")


def test_pool_without_a_size_has_the_clusters_cpus() -> None:
    with Pool() as pool:
        assert pool._processes == int(clusterpool.cluster_resources()["CPU"])
