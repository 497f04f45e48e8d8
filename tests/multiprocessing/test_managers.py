"""Managers and their proxies in tasks and processes."""

from __future__ import annotations

import multiprocessing.managers as standard
import operator
import os
import pickle
from typing import Any

import pytest

import clusterpool
from clusterpool.multiprocessing import connection, managers
from tests.client.engine import wait_for

pytestmark = pytest.mark.usefixtures("cluster")


class Tally:
    """A type of the program's own."""

    def __init__(self, start: int = 0) -> None:
        self._count = start

    def add(self, number: int) -> int:
        self._count += number
        return self._count

    def fail(self) -> None:
        raise KeyError("of the program's own")


class TallyManager(managers.BaseManager):
    """Knows one type."""


TallyManager.register("Tally", Tally)


def set_mark(name: str) -> None:
    os.environ[name] = "set"


def test_proxies_work_in_tasks() -> None:
    def work(number: int, shared: Any, items: Any, lock: Any) -> int:
        with lock:
            shared["total"] = shared.get("total", 0) + number
        items.append(number)
        return os.getpid()

    with managers.SyncManager() as manager:
        shared, items, lock = manager.dict(), manager.list(), manager.Lock()
        with clusterpool.Pool(2) as pool:
            pids = pool.starmap(work, [(number, shared, items, lock) for number in range(20)])
        assert shared["total"] == sum(range(20))
        assert sorted(items) == list(range(20))
        assert os.getpid() not in pids
        assert isinstance(manager, standard.SyncManager)
        assert isinstance(shared, standard.DictProxy)


def test_every_type_of_the_standard_manager() -> None:
    with managers.SyncManager() as manager:
        queue = manager.Queue(1)
        queue.put("x")
        assert (queue.get(), queue.empty()) == ("x", True)
        event, barrier, condition = manager.Event(), manager.Barrier(1), manager.Condition()
        event.set()
        assert event.wait(30)
        assert barrier.wait(30) == 0
        with condition:
            condition.notify_all()
        for kind in (manager.Semaphore, manager.BoundedSemaphore):
            assert kind(1).acquire()
        lock = manager.RLock()
        assert lock.acquire()
        assert lock.acquire()
        value, array = manager.Value("i", 3), manager.Array("i", [1, 2])
        value.value += 1
        array[1] = 5
        assert (value.value, list(array)) == (4, [1, 5])
        namespace = manager.Namespace(a=1)
        namespace.b = 2
        assert (namespace.a, namespace.b) == (1, 2)
        nested = manager.list([manager.dict(x=1)])
        assert nested[0]["x"] == 1
        joinable = manager.JoinableQueue()
        joinable.put(1)
        joinable.get()
        joinable.task_done()
        joinable.join()
        pool = manager.Pool(1)
        assert pool.map(abs, [-1, 2]) == [1, 2]
        assert pool.apply_async(operator.add, (1, 2)).get(20) == 3
        pool.terminate()


def test_a_type_of_the_programs_own_and_its_errors() -> None:
    with TallyManager() as manager:
        tally = manager.Tally(10)  # type: ignore[attr-defined]
        add = clusterpool.remote(lambda proxy, number: proxy.add(number))
        assert sorted(clusterpool.get([add.remote(tally, 1) for _ in range(3)], timeout=20)) == [11, 12, 13]
        with pytest.raises(KeyError, match="of the program's own"):
            tally.fail()


def test_a_manager_in_this_process_is_connected_to_from_a_task() -> None:
    """`get_server`, in a thread, as a program does that is the server itself."""

    def count(address: str, authkey: bytes) -> int:
        manager = TallyManager(address, authkey)
        manager.connect()
        tally = manager.Tally(5)  # type: ignore[attr-defined]
        return int(tally.add(2))

    with TallyManager(authkey=b"secret") as manager:
        assert str(manager.address).startswith(connection.ADDRESS_PREFIX)
        assert clusterpool.get(clusterpool.remote(count).remote(manager.address, b"secret"), timeout=20) == 7
        with pytest.raises(clusterpool.multiprocessing.AuthenticationError):
            TallyManager(manager.address, b"wrong").connect()


def test_the_initializer_runs_in_the_server() -> None:
    manager = TallyManager()
    manager.register("environ", lambda: dict(os.environ))
    manager.start(set_mark, ("CLUSTERPOOL_TEST_MARK",))
    assert manager.environ().get("CLUSTERPOOL_TEST_MARK") == "set"  # type: ignore[attr-defined]
    manager.shutdown()
    assert "CLUSTERPOOL_TEST_MARK" not in os.environ


def test_a_manager_is_reached_by_xml_rpc() -> None:
    with TallyManager(serializer="xmlrpclib") as manager:
        # Its proxies are not pickled: XML-RPC knows lists, numbers and texts.
        tally = manager.Tally(1)  # type: ignore[attr-defined]
        assert tally.add(1) == 2


def test_a_proxy_that_is_unpickled_after_the_end_says_so() -> None:
    with managers.SyncManager() as manager:
        items = manager.list()
        pickled = pickle.dumps(items)
        del items
    with pytest.raises(OSError):
        pickle.loads(pickled)


def test_the_server_goes_with_its_manager() -> None:
    manager = managers.SyncManager()
    manager.start()
    process = manager._process  # type: ignore[attr-defined]
    assert process.is_alive()
    manager.shutdown()
    assert wait_for(lambda: not process.is_alive())


def test_shared_memory_of_a_manager_is_seen_by_tasks_and_goes_with_it() -> None:
    from clusterpool.multiprocessing.shared_memory import SharedMemory

    with managers.SharedMemoryManager() as manager:
        segment = manager.SharedMemory(100)
        segment.buf[:5] = b"hello"
        items = manager.ShareableList([1, "two"])

        def look(name: str) -> bytes:
            other = SharedMemory(name)
            try:
                return bytes(other.buf[:5])
            finally:
                other.close()

        assert clusterpool.get(clusterpool.remote(look).remote(segment.name), timeout=20) == b"hello"
        assert list(items) == [1, "two"]
        names = [segment.name, items.shm.name]
        segment.close()
        items.shm.close()
    for name in names:
        with pytest.raises(FileNotFoundError):
            SharedMemory(name)
