"""Queues between processes of one host; tests/cluster/test_queues_across_nodes.py has those of several."""

from __future__ import annotations

import gc
import multiprocessing.connection
import multiprocessing.queues
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import clusterpool
from clusterpool import errors
from clusterpool import multiprocessing as mp
from clusterpool.client.values import INLINE_BYTES_MAX
from tests.waiting import wait_for

LARGE_BYTES = 3_000_000
MANY = 20_000  # far more than a channel takes before its putters' items wait with them


def store_bytes() -> int:
    return sum(node["store_used_bytes"] + node["spilled_bytes"] for node in clusterpool.nodes())


def run_script(folder: Path, text: str, timeout_s: float = 40.0) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(text))
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=timeout_s)


# --- between processes


def put_all(items: Any, values: Any) -> int:
    for value in values:
        items.put(value)
    return os.getpid()


def echo(inward: Any, outward: Any, count: int) -> None:
    for _ in range(count):
        outward.put(inward.get())


def get_until_none(items: Any) -> list[Any]:
    return list(iter(items.get, None))


@pytest.mark.parametrize("make", [mp.Queue, mp.JoinableQueue, mp.SimpleQueue])
def test_what_a_worker_puts_comes_in_order(cluster: None, make: Callable[[], Any]) -> None:
    items = make()
    ref = clusterpool.remote(put_all).remote(items, range(MANY))
    assert [items.get() for _ in range(MANY)] == list(range(MANY))
    assert clusterpool.get(ref) != os.getpid()
    assert items.empty()


def test_many_putters_and_getters_each_get_their_part(cluster: None) -> None:
    items = mp.Queue()
    with mp.Pool(4) as pool:
        getters = [pool.apply_async(get_until_none, (items,)) for _ in range(2)]
        putters = [pool.apply_async(put_all, (items, range(start, 3000, 2))) for start in range(2)]
        for putter in putters:
            putter.get(30)
        put_all(items, [None, None])
        got = [getter.get(30) for getter in getters]
    assert sorted(value for values in got for value in values) == list(range(3000))
    for values in got:
        for start in range(2):
            of_one = [value for value in values if value % 2 == start]
            assert of_one == sorted(of_one)
    assert items.qsize() == 0


def test_queues_go_anywhere_arguments_go(cluster: None) -> None:
    items, queues, outward = mp.Queue(), mp.SimpleQueue(), mp.Queue(5)

    @clusterpool.remote
    def from_closure() -> None:
        items.put(type(queues.get()).__name__)

    queues.put(outward)
    ref = from_closure.remote()
    assert items.get(timeout=20) == "Queue"
    clusterpool.get(ref)
    queues.put(outward)
    clusterpool.remote(lambda: queues.get().put("through a queue in a queue")).remote()
    assert outward.get(timeout=20) == "through a queue in a queue"
    copy = pickle.loads(pickle.dumps(outward))
    copy.put(1)
    assert outward.qsize() == 1
    assert outward.get(timeout=20) == 1


def test_values_of_any_size_and_nothing_is_left_of_them(cluster: None) -> None:
    import numpy

    inward, outward = mp.Queue(), mp.Queue()
    ref = clusterpool.remote(echo).remote(inward, outward, 5)
    for size in (1, INLINE_BYTES_MAX, INLINE_BYTES_MAX + 1, LARGE_BYTES):
        inward.put(b"x" * size)
        assert outward.get(timeout=20) == b"x" * size
    inward.put({"array": numpy.arange(1_000_000)})
    array = outward.get(timeout=20)["array"]
    array[0] = 17  # writable, and nobody else's
    assert array.sum() == 17 + sum(range(1_000_000))
    clusterpool.get(ref)
    del array
    gc.collect()
    wait_for(lambda: store_bytes() == 0)


def test_an_item_may_be_changed_once_it_is_put(cluster: None) -> None:
    items = mp.Queue()
    value = [1, 2]
    items.put(value)
    value.append(3)
    assert items.get() == [1, 2]


# --- deaths


def put_and_die(items: Any, values: list[Any]) -> None:
    put_all(items, values)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_was_put_survives_a_killed_putter(cluster: None) -> None:
    items = mp.Queue()
    values = [1, b"l" * LARGE_BYTES, "two", b"m" * LARGE_BYTES]
    ref = clusterpool.remote(retries=0)(put_and_die).remote(items, values)
    with pytest.raises(errors.WorkerDied):
        clusterpool.get(ref)
    assert [items.get(timeout=20) for _ in values] == values
    assert items.qsize() == 0
    gc.collect()
    wait_for(lambda: store_bytes() == 0)


def get_blocked(items: Any, pids: Any) -> Any:
    pids.put(os.getpid())
    return items.get()


def test_a_killed_getter_takes_nothing_with_it(cluster: None) -> None:
    items, pids = mp.Queue(), mp.Queue()
    task = clusterpool.remote(retries=0)(get_blocked)
    refs = [task.remote(items, pids) for _ in range(2)]
    victim = pids.get(timeout=20)
    pids.get(timeout=20)
    time.sleep(0.05)  # so that it sleeps in `get`; else the test shows less
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{victim}").exists())
    put_all(items, ["one", "two"])
    results = []
    for ref in refs:
        try:
            results.append(clusterpool.get(ref, timeout=20))
        except errors.WorkerDied:
            results.append(items.get(timeout=20))
    assert sorted(results) == ["one", "two"]


def test_a_worker_that_ends_sends_first_what_waits(cluster: None) -> None:
    items = mp.Queue()
    pool = mp.Pool(1)
    result = pool.apply_async(put_all, (items, range(MANY)))
    pool.close()
    result.get(30)  # all is put, and most of it waits in the worker
    assert [items.get(timeout=20) for _ in range(MANY)] == list(range(MANY))
    pool.join()


def test_a_driver_that_ends_waits_for_nobody(tmp_path: Path) -> None:
    begun_s = time.monotonic()
    done = run_script(
        tmp_path,
        """
        import pickle
        from clusterpool import multiprocessing as mp
        items = mp.Queue()
        pickle.dumps(items)
        for number in range(20_000):
            items.put(number)
        """,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert time.monotonic() - begun_s < 20


def test_ctrl_c_ends_a_blocked_get_and_put(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        import os, signal, threading, time
        from clusterpool import multiprocessing as mp

        def interrupted(function, *args):
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            begun_s = time.monotonic()
            try:
                function(*args)
            except KeyboardInterrupt:
                assert time.monotonic() - begun_s < 1.5, time.monotonic() - begun_s
            else:
                raise AssertionError("not interrupted")

        if __name__ == "__main__":
            items, full, simple = mp.Queue(), mp.Queue(1), mp.SimpleQueue()
            full.put(1)
            interrupted(items.get)
            interrupted(items.get, True, 30)
            interrupted(simple.get)
            interrupted(full.put, 2)
            items.put(5)
            simple.put(6)
            assert (items.get(), simple.get(), full.get()) == (5, 6, 1)
            for number in range(20_000):
                items.put(number)
            items.close()
            interrupted(items.join_thread)
            print("fine")
        """,
    )
    assert done.stdout == "fine\n", done.stdout + done.stderr


def test_ctrl_c_at_the_moment_when_an_item_comes_loses_none(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        import os, random, signal, sys, threading
        from clusterpool import multiprocessing as mp

        sys.setswitchinterval(0.0005)  # the main thread spins until it is interrupted
        ROUNDS = 300

        def put_and_interrupt(items, go):
            chance = random.Random(1)
            for number in range(ROUNDS):
                go.acquire()
                items.put(number)
                for _ in range(chance.randrange(200)):
                    pass
                os.kill(os.getpid(), signal.SIGINT)

        if __name__ == "__main__":
            items, go, got, interrupts = mp.Queue(), threading.Semaphore(0), [], 0
            thread = threading.Thread(target=put_and_interrupt, args=(items, go), daemon=True)
            thread.start()
            for number in range(ROUNDS):
                try:
                    go.release()
                    # As in C, without a byte code between the call and the list.
                    got.extend(map(items.get, (True,)))
                    while True:
                        pass
                except KeyboardInterrupt:
                    interrupts += 1
            thread.join()
            while not items.empty():
                got.append(items.get())
            assert sorted(got) == list(range(ROUNDS)), sorted(set(range(ROUNDS)) - set(got))
            print(interrupts)
        """,
    )
    assert done.stdout == "300\n", done.stdout + done.stderr


# --- what may be in a queue


def test_what_the_standard_library_can_send_can_be_put(cluster: None) -> None:
    items = mp.Queue()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        items.put(theirs)
        with items.get(timeout=20) as received:
            received.sendall(b"through a descriptor")
            assert ours.recv(100) == b"through a descriptor"


def test_a_reference_may_be_put(cluster: None) -> None:
    items = mp.Queue()
    items.put(clusterpool.put("a value"))
    gc.collect()
    assert clusterpool.get(items.get(timeout=20)) == "a value"


def test_functions_and_classes_of_main(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        import clusterpool
        from clusterpool import multiprocessing as mp

        class Point:
            def __init__(self, x):
                self.x = x

        def work(inward, outward):
            function, point = inward.get()
            outward.put(Point(function(point.x)))

        inward, outward = mp.Queue(), mp.SimpleQueue()
        ref = clusterpool.remote(work).remote(inward, outward)
        inward.put((lambda x: x + 1, Point(41)))
        point = outward.get()
        assert type(point) is Point, type(point)
        print(point.x)
        """,
    )
    assert done.stdout == "42\n", done.stdout + done.stderr


class Unpicklable:
    def __reduce__(self) -> Any:
        raise AttributeError("this cannot be pickled")


def test_what_cannot_be_pickled_goes_to_the_hook_and_counts_for_nothing(cluster: None) -> None:
    seen: list[Any] = []

    class Watched(mp.queues.JoinableQueue):
        @staticmethod
        def _on_queue_feeder_error(e: Exception, obj: Any) -> None:
            seen.append((str(e), type(obj)))

    items = Watched(1, ctx=mp.get_context())
    items.put(Unpicklable(), timeout=5)
    items.put(1, timeout=5)
    assert seen == [("this cannot be pickled", Unpicklable)]
    assert (items.qsize(), items.get()) == (1, 1)
    items.task_done()
    items.join()
    with pytest.raises(AttributeError, match="this cannot be pickled"):
        mp.SimpleQueue().put(Unpicklable())


# --- the standard library's contract


def test_they_are_the_standard_librarys_classes(cluster: None) -> None:
    assert isinstance(mp.Queue(), multiprocessing.queues.Queue)
    assert isinstance(mp.JoinableQueue(), multiprocessing.queues.JoinableQueue)
    assert isinstance(mp.JoinableQueue(), mp.queues.Queue)
    assert isinstance(mp.SimpleQueue(), multiprocessing.queues.SimpleQueue)
    for made in (mp.Queue(), mp.JoinableQueue(), mp.SimpleQueue()):
        assert type(made)[int].__args__ == (int,)


def test_sizes(cluster: None) -> None:
    bounded, unbounded = mp.Queue(2), mp.Queue()
    assert (bounded.full(), unbounded.full(), bounded.empty()) == (False, False, True)
    for items in (bounded, unbounded):
        items.put(1)
        items.put(2)
        assert items.qsize() == 2
    assert (bounded.full(), unbounded.full(), bounded.empty()) == (True, False, False)
    with pytest.raises(queue.Full):
        bounded.put_nowait(3)
    with pytest.raises(queue.Full):
        bounded.put(3, timeout=0.05)
    assert bounded.get_nowait() == 1
    bounded.put(3)
    assert [bounded.get() for _ in range(2)] == [2, 3]
    with pytest.raises(queue.Empty):
        bounded.get_nowait()
    assert [unbounded.get() for _ in range(2)] == [1, 2]
    with pytest.raises(queue.Empty):
        unbounded.get(timeout=0.05)
    assert (bounded.qsize(), unbounded.qsize()) == (0, 0)


def test_a_put_that_waits_for_a_place_goes_on_at_once(cluster: None) -> None:
    items = mp.Queue(1)
    items.put(1)
    putter = threading.Thread(target=items.put, args=(2,))
    putter.start()
    assert [items.get(timeout=20) for _ in range(2)] == [1, 2]
    putter.join()


def test_closed(cluster: None) -> None:
    items, simple = mp.Queue(), mp.SimpleQueue()
    copy = pickle.loads(pickle.dumps(items))
    items.close()
    items.join_thread()
    for use in (items.get, lambda: items.put(1)):
        with pytest.raises(ValueError, match="is closed"):
            use()
    copy.put(1)  # another's object is not concerned
    assert copy.get(timeout=20) == 1
    simple.close()
    simple.close()
    for use in (simple.get, simple.empty, lambda: simple.put(1)):
        with pytest.raises(OSError, match="is closed"):
            use()


def work(items: Any) -> int:
    count = 0
    for _ in iter(items.get, None):
        time.sleep(0.002)
        items.task_done()
        count += 1
    return count


def test_join_waits_until_all_work_is_done(cluster: None) -> None:
    items = mp.JoinableQueue()
    task = clusterpool.remote(work)
    refs = [task.remote(items) for _ in range(2)]
    for number in range(100):
        items.put(number)
    items.join()
    assert items.qsize() == 0
    put_all(items, [None, None])
    assert sum(clusterpool.get(refs)) == 100
    for _ in range(2):
        items.task_done()
    items.join()
    with pytest.raises(ValueError, match="too many times"):
        items.task_done()


def test_the_reading_end_can_be_waited_for(cluster: None) -> None:
    items, simple = mp.Queue(), mp.SimpleQueue()
    ends = [items._reader, simple._reader]
    assert multiprocessing.connection.wait(ends, timeout=0.05) == []
    simple.put("x")
    assert multiprocessing.connection.wait(ends, timeout=20) == [simple._reader]
    assert not items._reader.poll()
    assert simple._reader.poll(20)
    assert simple._reader.recv() == "x"
    items._writer.send("y")
    assert items._reader.poll(None)
    assert items._reader.recv() == "y"
    items.put("z")
    assert items.get(timeout=20) == "z"
