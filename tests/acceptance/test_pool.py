"""What a drop-in Pool must get right because others do not: tests for each line of that list (1 to 9)."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import multiprocessing.pool
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import clusterpool
import clusterpool.multiprocessing as mp
from clusterpool import errors
from tests.waiting import pid_at_meeting, wait_for

pytestmark = pytest.mark.usefixtures("cluster")

seen_by_initializer: list[int] = []


@pytest.fixture
def pool() -> Iterator[Any]:
    with mp.Pool(2) as pool:
        yield pool


# 1. The standard names and order


@pytest.mark.parametrize(
    "name", ["apply", "apply_async", "map", "map_async", "starmap", "starmap_async", "imap", "imap_unordered"]
)
def test_arguments_have_the_standard_names_and_order(name: str) -> None:
    standard = list(inspect.signature(getattr(multiprocessing.pool.Pool, name)).parameters)
    ours = list(inspect.signature(getattr(mp.Pool, name)).parameters)
    assert ours[: len(standard)] == standard


def test_keywords_and_positions_reach_the_function(pool: Any) -> None:
    results: list[Any] = []
    assert pool.apply(dict, (), {"a": 1}) == {"a": 1}
    assert pool.apply(args=(2, 5), func=pow) == 32
    done = pool.starmap_async(pow, [(2, 3), (3, 2)], 1, results.append, results.append)
    assert done.get(20) == [8, 9]
    assert results == [[8, 9]]


# 2. imap


def reciprocal(number: int) -> float:
    return 1 / number


def broken_input() -> Iterator[int]:
    yield 1
    raise KeyError("the input is broken")


@pytest.mark.parametrize("name", ["imap", "imap_unordered"])
def test_imap_raises_errors_of_tasks_at_their_turn_and_goes_on(pool: Any, name: str) -> None:
    iterator = getattr(pool, name)(reciprocal, [1, 0, 2])
    outcomes: list[Any] = []
    for _ in range(3):
        try:
            outcomes.append(iterator.next(timeout=20))
        except ZeroDivisionError:
            outcomes.append("error")
    with pytest.raises(StopIteration):
        next(iterator)
    if name == "imap":
        assert outcomes == [1.0, "error", 0.5]
    assert sorted(map(str, outcomes)) == ["0.5", "1.0", "error"]


def test_imap_raises_the_error_of_its_input_at_its_turn(pool: Any) -> None:
    iterator = pool.imap(abs, broken_input())
    assert next(iterator) == 1
    with pytest.raises(KeyError, match="the input is broken"):
        next(iterator)


def test_imap_gives_none_and_times_out(pool: Any) -> None:
    assert list(pool.imap(print_nothing, range(3))) == [None, None, None]
    iterator = pool.imap(time.sleep, [0.5])
    with pytest.raises(mp.TimeoutError):
        iterator.next(timeout=0.01)
    assert iterator.next(timeout=20) is None


def print_nothing(_: object) -> None: ...


def test_imap_reads_an_endless_input_within_a_window(pool: Any) -> None:
    read = itertools.count()
    iterator = pool.imap(abs, iter(lambda: next(read), None), buffersize=8)
    assert [next(iterator) for _ in range(100)] == list(range(100))
    assert next(read) <= 100 + 8 + 1


# 3. Exceptions


class Rejection(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


def reject(_: object = None) -> None:
    raise Rejection(7, "no")


def return_a_lock(_: object = None) -> Any:
    return threading.Lock()


def test_an_exception_has_its_type_its_arguments_and_its_place(pool: Any) -> None:
    with pytest.raises(Rejection) as caught:
        pool.apply(reject)
    assert (caught.value.code, caught.value.reason) == (7, "no")
    cause = caught.value.__cause__
    assert type(cause).__name__ == "RemoteTraceback"
    for part in ("in reject", "(in process ", f"on node {clusterpool.nodes()[0]['node_id']}"):
        assert part in str(cause)


def test_what_cannot_be_pickled_is_a_maybe_encoding_error_and_hangs_nobody(pool: Any) -> None:
    with pytest.raises(multiprocessing.pool.MaybeEncodingError):  # type: ignore[attr-defined]
        pool.map_async(return_a_lock, range(4)).get(20)
    assert pool.apply(abs, (-1,)) == 1


def test_the_error_callback_gets_that_exception_once(pool: Any) -> None:
    got: list[BaseException] = []
    result = pool.apply_async(reject, error_callback=got.append)
    with pytest.raises(Rejection) as caught:
        result.get(20)
    assert got == [caught.value]


# 4. Initializers and one namespace for a job


def set_up(number: int) -> None:
    global set_up_with
    set_up_with = number
    seen_by_initializer.append(number)


def what_was_set_up(_: object = None) -> tuple[int, int, int]:
    return os.getpid(), set_up_with, len(seen_by_initializer)


def test_an_initializer_runs_once_in_each_worker_and_each_replacement() -> None:
    with mp.Pool(2, set_up, (5,), maxtasksperchild=3) as pool:
        seen = pool.map(what_was_set_up, range(24), chunksize=1)
    assert {number for _, number, _ in seen} == {5}
    assert {times for _, _, times in seen} == {1}
    assert len({pid for pid, _, _ in seen}) >= 4, "workers were replaced"


# 5. maxtasksperchild


def test_maxtasksperchild_counts_tasks_and_replaces_in_milliseconds() -> None:
    with mp.Pool(1, maxtasksperchild=2) as pool:
        pids = [pool.apply(os.getpid) for _ in range(6)]
    assert [len(list(group)) for _, group in itertools.groupby(pids)] == [2, 2, 2]


# 6. Work goes to whoever is free


def sleep_then_pid(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def pid_when_let_go(path: Path) -> int:
    wait_for(path.exists)
    return os.getpid()


def test_work_goes_to_whichever_worker_is_free(tmp_path: Path) -> None:
    with mp.Pool(2) as pool:
        slow = pool.apply_async(pid_when_let_go, (tmp_path / "go",))
        pids = pool.map(sleep_then_pid, [0.01] * 20, chunksize=1)
        assert not slow.ready(), "the quick ones did not wait for the slow one"
        (tmp_path / "go").touch()
        assert slow.get(20) not in pids[5:]


def test_more_processes_than_cpus(tmp_path: Path) -> None:
    with mp.Pool(7) as pool:
        assert len(set(pool.starmap(pid_at_meeting, [(tmp_path, 7)] * 7, chunksize=1))) == 7


# 7. Death


def die_once(how: str, marker: str) -> str:
    with contextlib.suppress(FileExistsError):
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        if how == "signal":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(3)
    return "alive"


@pytest.mark.parametrize("how", ["signal", "exit"])
def test_a_worker_that_dies_is_replaced_and_its_task_tried_again(pool: Any, how: str, tmp_path: Any) -> None:
    assert pool.apply_async(die_once, (how, str(tmp_path / "marker"))).get(30) == "alive"
    assert pool.map(abs, [-1, -2]) == [1, 2]


def test_a_task_that_always_kills_its_worker_is_an_error(pool: Any) -> None:
    with pytest.raises(errors.WorkerDied):
        pool.apply_async(os._exit, (3,)).get(30)
    assert pool.apply(abs, (-1,)) == 1


def test_sys_exit_in_a_task_ends_the_call_and_not_the_pool(pool: Any) -> None:
    with pytest.raises(SystemExit):
        pool.apply_async(exit, (3,)).get(20)
    assert pool.apply(abs, (-1,)) == 1


# 8. Leaving


def test_a_pool_left_open_warns_and_its_workers_end() -> None:
    pool = mp.Pool(1)
    pool.apply(abs, (1,))
    with pytest.warns(ResourceWarning):
        del pool


def test_the_context_manager_terminates() -> None:
    with mp.Pool(1) as pool:
        result = pool.apply_async(time.sleep, (600,))
        workers = [worker.pid for worker in pool._pool]
    with pytest.raises(errors.TaskCancelled):
        result.get(20)
    pool.join()
    assert workers
    for pid in workers:
        assert not os.path.exists(f"/proc/{pid}")


def test_get_with_a_timeout_works_in_any_thread(pool: Any) -> None:
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            pool.apply_async(time.sleep, (0.5,)).get(timeout=0.01)
        except mp.TimeoutError as exc:
            caught.append(exc)

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join(20)
    assert len(caught) == 1


# 9. Locks, queues, events and proxies are plain arguments


def use_them(lock: Any, queue: Any, event: Any, shared: Any) -> int:
    with lock:
        shared["count"] = shared.get("count", 0) + 1
    queue.put(os.getpid())
    event.set()
    return os.getpid()


def test_locks_queues_events_and_proxies_may_be_arguments_of_tasks(pool: Any) -> None:
    lock, queue, event = mp.Lock(), mp.Queue(), mp.Event()
    with mp.Manager() as manager:
        shared = manager.dict()
        pids = pool.starmap(use_them, [(lock, queue, event, shared)] * 20, chunksize=1)
        assert shared["count"] == 20
    assert sorted(queue.get(timeout=20) for _ in range(20)) == sorted(pids)
    assert event.is_set()


# 21, 23: seen while running other projects' programs


@pytest.mark.parametrize("arguments", [{"processes": 0}, {"processes": -1}, {"maxtasksperchild": -1}])
def test_sizes_that_cannot_be_right_are_value_errors(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        mp.Pool(**arguments)


def test_a_closed_pool_cannot_be_entered(pool: Any) -> None:
    pool.close()
    with pytest.raises(ValueError), pool:
        pass


def test_programs_may_look_at_the_workers(pool: Any) -> None:
    assert pool._processes == 2
    pool.map(abs, range(4))
    assert {worker.pid for worker in pool._pool} >= {pool.apply(os.getpid)}
