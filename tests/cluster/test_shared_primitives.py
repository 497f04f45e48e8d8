"""Locks, events, values and their kin among processes of two nodes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import clusterpool
from clusterpool.client import api
from clusterpool.multiprocessing.shared_memory import SharedMemory
from clusterpool.multiprocessing.sharedctypes import Array, RawArray, Value
from clusterpool.multiprocessing.synchronize import Barrier, BoundedSemaphore, Condition, Event, Lock, RLock, Semaphore
from tests.cluster.clusters import Cluster
from tests.conftest import segment_names
from tests.waiting import wait_for

pytestmark = pytest.mark.cluster


@pytest.fixture(autouse=True)
def _driver(three_nodes: Cluster, driver: None) -> Iterator[None]:
    """A job of its own for each test: what it pickled is gone when the test is over."""
    yield


@pytest.fixture
def there(three_nodes: Cluster) -> Callable[..., Any]:
    """Run a function on another node than this; a reference to its result."""
    assert clusterpool.node_id() == three_nodes.head

    def run(function: Callable[..., Any], *args: Any) -> Any:
        return clusterpool.remote(num_cpus=0, scheduling=f"node:{three_nodes.second}")(function).remote(*args)

    return run


@pytest.fixture
def here(three_nodes: Cluster) -> Callable[..., Any]:
    """Run a function in another process of this node."""

    def run(function: Callable[..., Any], *args: Any) -> Any:
        return clusterpool.remote(num_cpus=0, scheduling=f"node:{three_nodes.head}")(function).remote(*args)

    return run


def result(reference: Any) -> Any:
    return clusterpool.get(reference, timeout=30)


def test_a_lock_excludes_the_other_node(there: Any) -> None:
    lock = Lock()
    with lock:
        assert result(there(lambda: (lock.acquire(False), lock.acquire(timeout=0.05)))) == (False, False)
    assert result(there(lambda: (lock.acquire(), repr(lock)))) == (True, "<Lock(owner=MainProcess)>")
    # Whoever has it releases it, wherever it was acquired.
    assert lock.acquire(False) is False
    lock.release()
    assert lock.acquire(False) is True
    lock.release()
    with pytest.raises(ValueError, match="released too many times"):
        lock.release()


def test_a_waiter_here_gets_what_is_released_there(there: Any) -> None:
    semaphore = Semaphore(0)
    reference = there(lambda: (time.sleep(0.3), semaphore.release()))
    assert semaphore.acquire(timeout=20) is True  # it was thin when this began
    result(reference)
    assert semaphore.get_value() == 0


def test_a_recursive_lock_and_its_errors(there: Any) -> None:
    lock = RLock()

    def use() -> list[Any]:
        seen: list[Any] = [lock.acquire(), lock.acquire(), lock._semlock._count(), lock.release(), lock.release()]
        with pytest.raises(AssertionError, match="not owned"):
            lock.release()
        return seen

    assert result(there(use)) == [True, True, 2, None, None]
    assert use() == [True, True, 2, None, None]


def test_a_bounded_semaphore_is_bounded_everywhere(there: Any) -> None:
    semaphore = BoundedSemaphore(2)

    def use() -> tuple[int, str]:
        semaphore.acquire()
        value = semaphore.get_value()
        semaphore.release()
        with pytest.raises(ValueError, match="too many times"):
            semaphore.release()
        return value, repr(semaphore)

    for _ in range(2):
        assert result(there(use)) == use() == (1, "<BoundedSemaphore(value=2, maxvalue=2)>")


def count_up(counter: Any, seconds: float) -> int:
    """Each step reads and writes in two places, so that two who do it at once are found out."""
    times, end_s = 0, time.monotonic() + seconds
    while time.monotonic() < end_s:
        with counter.get_lock():
            seen = counter[0]
            counter[1] += 1
            counter[0] = seen + 1
        times += 1
    return times


def test_nothing_is_lost_while_a_value_moves_under_load(there: Any, here: Any) -> None:
    for _ in range(3):
        counter = Array("q", 2)
        references = [here(count_up, counter, 0.8) for _ in range(2)]
        time.sleep(0.2)
        references += [there(count_up, counter, 0.4) for _ in range(2)]
        times = count_up(counter, 0.5) + sum(result(references))
        assert list(counter) == [times, times]
        assert all(result(reference) > 0 for reference in references)


def test_tokens_are_conserved_while_a_semaphore_moves_under_load(there: Any, here: Any) -> None:
    semaphore = BoundedSemaphore(2)

    def use(seconds: float) -> int:
        times, end_s = 0, time.monotonic() + seconds
        while time.monotonic() < end_s:
            assert semaphore.acquire(timeout=20)
            times += 1
            semaphore.release()
        return times

    references = [here(use, 0.8) for _ in range(3)]
    time.sleep(0.2)
    references += [there(use, 0.4) for _ in range(2)]
    assert all(times > 0 for times in result(references))
    assert semaphore.get_value() == 2


def test_a_lock_whose_holder_dies_on_the_other_node_comes_back(there: Any) -> None:
    lock = Lock()

    def take_and_die() -> None:
        lock.acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    reference = clusterpool.remote(num_cpus=0, retries=0, scheduling=_node_of(there))(take_and_die).remote()
    with pytest.raises(clusterpool.errors.WorkerDied):
        result(reference)
    assert lock.acquire(timeout=20) is True


def _node_of(there: Any) -> str:
    return f"node:{result(there(clusterpool.node_id))}"


def test_a_condition(there: Any) -> None:
    condition, asleep = Condition(), Semaphore(0)

    def wait() -> bool:
        with condition:
            asleep.release()
            return condition.wait(20)

    references = [there(wait) for _ in range(2)]
    for _ in references:
        assert asleep.acquire(timeout=20)
    with condition:
        condition.notify()
    assert len(clusterpool.wait(references, num_returns=1, timeout=20)[0]) == 1
    with condition:
        condition.notify_all()
    assert result(references) == [True, True]
    with condition:
        assert condition.wait(0.05) is False


def test_an_event(there: Any) -> None:
    event = Event()
    reference = there(lambda: event.wait(20))
    event.set()
    assert result(reference) is True
    assert result(there(event.is_set)) is True
    result(there(event.clear))
    assert not event.is_set() and event.wait(0.05) is False


def test_a_barrier(there: Any) -> None:
    barrier = Barrier(3)

    def meet() -> list[int]:
        return [barrier.wait(20) for _ in range(3)]

    references = [there(meet) for _ in range(2)]
    rounds = [meet(), *result(references)]
    assert [sorted(positions) for positions in zip(*rounds)] == [[0, 1, 2]] * 3
    reference = there(lambda: barrier.wait(20))
    while barrier.n_waiting == 0:
        time.sleep(0.01)
    barrier.abort()
    with pytest.raises(threading.BrokenBarrierError):
        result(reference)
    assert result(there(lambda: barrier.broken)) is True


def test_values_follow_their_lock(there: Any) -> None:
    value = Value("d", 1.5)

    def add() -> float:
        with value.get_lock():
            value.value += 1
        return float(value.value)

    assert [result(there(add)), add(), result(there(add))] == [2.5, 3.5, 4.5]
    assert value.value == 4.5


def test_two_values_under_one_lock_of_the_users(there: Any) -> None:
    lock = Lock()
    first, second = Value("i", lock=lock), Value("i", lock=lock)

    def exchange() -> None:
        with lock:
            first.get_obj().value, second.get_obj().value = second.get_obj().value + 1, first.get_obj().value

    for _ in range(3):
        result(there(exchange))
        exchange()
    assert (first.value, second.value) == (3, 3)


def test_what_does_not_cross_hosts_says_so(there: Any, three_nodes: Cluster) -> None:
    nodes = f"node {three_nodes.head}, and this is node {three_nodes.second}"
    raw = RawArray("i", 3)
    with pytest.raises(TypeError, match=f"without a lock cannot leave its host: it was made on {nodes}"):
        result(there(len, raw))
    segment = SharedMemory(create=True, size=10)
    for argument in (segment, segment.name):
        with pytest.raises(FileNotFoundError, match=f"the shared memory is on {nodes}"):
            result(there(lambda it: it if isinstance(it, SharedMemory) else SharedMemory(it), argument))
    segment.close()


def test_a_job_leaves_nothing(there: Any) -> None:
    lock, value = Lock(), Value("i")
    job_id = api.connect().job.job_id
    result(there(lambda: (lock.acquire(), setattr(value, "value", 3))))
    assert value.value == 3
    assert [name for name in segment_names() if job_id in name]
    clusterpool.shutdown()
    wait_for(lambda: not any(job_id in name for name in segment_names()), "its files are gone")
