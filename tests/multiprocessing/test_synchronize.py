"""Locks and their kin as programs use them, on one host: the standard library's semantics, names and speed."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.synchronize as standard
import os
import pickle
import signal
import threading
import time
from typing import Any

import cloudpickle
import pytest

import clusterpool
from clusterpool.multiprocessing import synchronize
from clusterpool.multiprocessing.synchronize import Barrier, BoundedSemaphore, Condition, Event, Lock, RLock, Semaphore
from tests.conftest import segment_names


@pytest.fixture(scope="module", autouse=True)
def _cluster(cluster: None) -> None:
    """Of this module; what a test pickles lives until it ends, so that the test removes it itself."""


def names_of_primitives() -> set[str]:
    node_id = clusterpool.node_id()
    return {name for name in segment_names() if f"clusterpool-{node_id}-" in name}


MAKERS: list[Any] = [Lock, RLock, Semaphore, BoundedSemaphore, Condition, Event, lambda: Barrier(2)]


@pytest.mark.parametrize("maker", MAKERS)
def test_nothing_is_left_of_what_was_never_pickled(maker: Any) -> None:
    made = maker()
    assert names_of_primitives()
    del made
    gc.collect()
    assert names_of_primitives() == set()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Lock, standard.Lock),
        (RLock, standard.RLock),
        (Semaphore, standard.Semaphore),
        (BoundedSemaphore, standard.BoundedSemaphore),
        (Condition, standard.Condition),
        (Event, standard.Event),
        (Barrier, standard.Barrier),
    ],
)
def test_it_is_an_instance_of_the_standard_class(ours: type, theirs: type) -> None:
    assert issubclass(ours, theirs)
    assert ours.__name__ == theirs.__name__


def test_reprs_are_the_standard_ones() -> None:
    lock, recursive = Lock(), RLock()
    assert [repr(lock), repr(recursive)] == ["<Lock(owner=None)>", "<RLock(None, 0)>"]
    with lock, recursive, recursive:
        assert [repr(lock), repr(recursive)] == ["<Lock(owner=MainProcess)>", "<RLock(MainProcess, 2)>"]
        seen: list[str] = []
        thread = threading.Thread(target=lambda: seen.extend([repr(lock), repr(recursive)]))
        thread.start()
        thread.join()
        assert seen == ["<Lock(owner=SomeOtherThread)>", "<RLock(SomeOtherThread, nonzero)>"]
    assert repr(Semaphore(3)) == "<Semaphore(value=3)>"
    assert repr(BoundedSemaphore(3)) == "<BoundedSemaphore(value=3, maxvalue=3)>"
    assert repr(Condition()) == "<Condition(<RLock(None, 0)>, 0)>"


def test_errors_are_the_standard_ones() -> None:
    context = multiprocessing.get_context("spawn")
    for ours, theirs in [(Lock(), context.Lock()), (BoundedSemaphore(1), context.BoundedSemaphore(1))]:
        messages = []
        for lock in (ours, theirs):
            with pytest.raises(ValueError) as raised:
                lock.release()
            messages.append(str(raised.value))
        assert messages[0] == messages[1]
    for recursive in (RLock(), context.RLock()):
        with pytest.raises(AssertionError, match="attempt to release recursive lock not owned by thread"):
            recursive.release()
    for kind in (Semaphore, context.Semaphore):
        with pytest.raises(OSError, match="Invalid argument"):
            kind(-1)
    with pytest.raises(AssertionError, match="must acquire"):
        Condition().wait()


def test_bool_of_acquire_and_of_the_context_manager() -> None:
    for lock in (Lock(), RLock(), Semaphore(1), Condition()):
        with lock as entered:
            assert entered is True
        assert lock.acquire() is True
        assert lock.release() is None


def test_a_timeout_is_kept() -> None:
    lock = Lock()
    lock.acquire()
    started_s = time.monotonic()
    assert lock.acquire(timeout=0.4) is False, "longer than a slice"
    assert 0.4 <= time.monotonic() - started_s < 5


def test_a_lock_may_be_released_by_another_thread() -> None:
    lock = Lock()
    lock.acquire()
    timer = threading.Timer(0.05, lock.release)
    timer.start()
    assert lock.acquire(timeout=10)
    timer.join()


def test_ctrl_c_ends_a_wait_for_a_lock() -> None:
    lock = Lock()
    lock.acquire()
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        lock.acquire(timeout=20)
    timer.join()
    lock.release()
    assert lock.acquire(False)


def test_a_barrier_of_threads() -> None:
    barrier = Barrier(3, action=lambda: called.append(barrier.n_waiting), timeout=20)
    called: list[int] = []
    positions: list[int] = []
    threads = [threading.Thread(target=lambda: positions.append(barrier.wait())) for _ in range(2)]
    for thread in threads:
        thread.start()
    positions.append(barrier.wait())
    for thread in threads:
        thread.join()
    assert sorted(positions) == [0, 1, 2] and len(called) == 1
    assert not barrier.broken
    barrier.abort()
    assert barrier.broken
    with pytest.raises(threading.BrokenBarrierError):
        barrier.wait()


def test_a_condition_with_a_lock_of_the_users() -> None:
    lock = Lock()
    condition = Condition(lock)
    notified: list[bool] = []
    thread = threading.Thread(target=lambda: condition.acquire() and notified.append(condition.wait(20)))
    with condition:
        thread.start()
    while not condition._sleeping_count.get_value():
        time.sleep(0.001)
    with lock:
        condition.notify()
    thread.join(30)
    assert notified == [True]


# --- with processes


def add(counter: Any, lock: Any, times: int) -> int:
    for _ in range(times):
        with lock:
            counter[0] += 1
    return os.getpid()


def wait_for(event: Any) -> bool:
    return event.wait(20)


def meet(barrier: Any) -> int:
    position: int = barrier.wait(20)
    return position


def waits_in_condition(condition: Any, waiting: Any) -> bool:
    with condition:
        waiting.release()
        return bool(condition.wait(20))


def test_the_standard_librarys_own_processes_take_them() -> None:
    """They belong to no cluster; they find what is on this host by its name."""
    context = multiprocessing.get_context("spawn")
    barrier, event, semaphore, before = Barrier(2), Event(), Semaphore(0), names_of_primitives()
    assert before
    process = context.Process(target=meet, args=(barrier,))
    process.start()
    other = context.Process(target=waits_in_condition, args=(Condition(), semaphore), daemon=True)
    other.start()
    try:
        assert barrier.wait(20) in (0, 1)
        assert semaphore.acquire(timeout=20)
        process.join(20)
        assert process.exitcode == 0
        assert not event.is_set()
    finally:
        other.kill()
        other.join()
        remove_all()


def remove_all() -> None:
    """What was pickled stays until the job ends, which is the module's."""
    from clusterpool.processes.thin_files import remove_thin_files

    gc.collect()
    remove_thin_files(clusterpool.node_id())


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
@pytest.mark.parametrize("maker", MAKERS)
def test_they_pickle_at_any_time(maker: Any, dumps: Any) -> None:
    made = maker()
    copy = pickle.loads(dumps(made))
    assert type(copy) is type(made)
    if isinstance(made, Event):
        made.set()
        assert copy.is_set()
    elif isinstance(made, synchronize.SemLock):
        made.acquire()
        assert copy._semlock._is_mine()
    del made, copy
    remove_all()


def test_tasks_share_a_lock_a_barrier_and_an_event() -> None:
    from clusterpool.multiprocessing.sharedctypes import RawArray

    lock, counter, event, barrier = Lock(), RawArray("q", 1), Event(), Barrier(3)
    with clusterpool.Pool(2) as pool:
        results = [pool.apply_async(add, (counter, lock, 2000)) for _ in range(2)]
        add(counter, lock, 2000)
        pids = {result.get(30) for result in results}
        assert counter[0] == 6000
        assert os.getpid() not in pids
        waiting = pool.apply_async(wait_for, (event,))
        event.set()
        assert waiting.get(30) is True
        positions = [pool.apply_async(meet, (barrier,)) for _ in range(2)]
        assert sorted([barrier.wait(20), *(position.get(30) for position in positions)]) == [0, 1, 2]
        # In a closure, and in a container.
        assert pool.apply(lambda: lock.acquire(timeout=5) and not lock.release()) is True
        assert pool.apply(lambda things: len(things["locks"]), ({"locks": [lock, RLock()]},)) == 2
    del results, waiting, positions
    remove_all()
