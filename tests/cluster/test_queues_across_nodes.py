"""Queues between processes of several nodes: order, sizes, moves while they are in use, deaths."""

from __future__ import annotations

import gc
import os
import queue
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

import clusterpool
from clusterpool import errors
from clusterpool import multiprocessing as mp
from tests.cluster.clusters import Cluster
from tests.waiting import wait_for

pytestmark = pytest.mark.cluster

LARGE_BYTES = 3_000_000
ON_SECOND = {"resources": {"ssd": 1}}  # only the second node has it


def store_bytes() -> int:
    return sum(node["store_used_bytes"] + node["spilled_bytes"] for node in clusterpool.nodes())


def put_all(items: Any, values: Any) -> str:
    for value in values:
        items.put(value)
    return clusterpool.node_id()


def echo(inward: Any, outward: Any, count: int) -> str:
    for _ in range(count):
        outward.put(inward.get())
    return clusterpool.node_id()


@pytest.fixture
def on_second(three_nodes: Cluster, driver: None) -> Callable[..., Any]:
    """Run a function as a task on the second node."""
    return lambda function, *args: clusterpool.remote(**ON_SECOND)(function).remote(*args)


@pytest.mark.parametrize("make", [mp.Queue, mp.JoinableQueue, mp.SimpleQueue, lambda: mp.Queue(10)])
def test_items_of_another_node_come_in_order(
    three_nodes: Cluster, on_second: Callable[..., Any], make: Callable[[], Any]
) -> None:
    items = make()
    ref = on_second(put_all, items, range(300))
    assert [items.get() for _ in range(300)] == list(range(300))
    assert clusterpool.get(ref) == three_nodes.second
    assert items.empty()


def test_both_directions_and_any_size(three_nodes: Cluster, on_second: Callable[..., Any]) -> None:
    inward, outward = mp.Queue(), mp.SimpleQueue()
    values = [None, "text", b"l" * LARGE_BYTES, {"many": list(range(1000))}]
    ref = on_second(echo, inward, outward, len(values))
    for value in values:
        inward.put(value)
        assert outward.get() == value
    assert clusterpool.get(ref) == three_nodes.second
    gc.collect()
    wait_for(lambda: store_bytes() == 0)


def test_a_queue_moves_while_it_is_full_and_in_use(three_nodes: Cluster, on_second: Callable[..., Any]) -> None:
    items, results = mp.Queue(), mp.Queue()
    got: list[Any] = []
    count = 4_000  # more than the sockets hold; each costs a trip to the store once the queue has moved
    putter = threading.Thread(target=put_all, args=(items, ((0, number) for number in range(count))))
    getter = threading.Thread(target=lambda: got.extend(items.get(timeout=40) for _ in range(count // 2)))
    putter.start()
    getter.start()
    ref = on_second(echo, items, results, 100)
    far = [results.get(timeout=40) for _ in range(100)]
    getter.join()
    assert clusterpool.get(ref) == three_nodes.second
    putter.join()
    # Putting goes on by the control store, behind what waits in this process.
    rest = wait_until_empty(items, count - count // 2 - 100)
    for numbers in (got, far, rest):
        assert numbers == sorted(numbers)
    assert sorted(got + far + rest) == [(0, number) for number in range(count)]
    assert items.qsize() == 0


def wait_until_empty(items: Any, count: int) -> list[Any]:
    return [items.get(timeout=40) for _ in range(count)]


def test_sizes_hold_across_nodes(three_nodes: Cluster, on_second: Callable[..., Any]) -> None:
    bounded, unbounded = mp.Queue(3), mp.Queue()
    for items in (bounded, unbounded):
        items.put(0)
        clusterpool.get(on_second(put_all, items, [1]))
        items.put(2)
        assert items.qsize() == 3
    assert (bounded.full(), unbounded.full()) == (True, False)
    with pytest.raises(queue.Full):
        bounded.put(3, timeout=0.1)
    for items in (bounded, unbounded):
        assert [items.get(timeout=20) for _ in range(3)] == [0, 1, 2]
        assert items.qsize() == 0
        with pytest.raises(queue.Empty):
            items.get(timeout=0.1)
        with pytest.raises(queue.Empty):
            items.get_nowait()


def work(items: Any) -> int:
    count = 0
    for _ in iter(items.get, None):
        items.task_done()
        count += 1
    return count


def test_join_waits_for_the_work_of_other_nodes(three_nodes: Cluster, on_second: Callable[..., Any]) -> None:
    items = mp.JoinableQueue()
    ref = on_second(work, items)
    put_all(items, range(50))
    items.join()
    assert items.empty()
    items.put(None)
    assert clusterpool.get(ref) == 50


def put_and_die(items: Any) -> None:
    put_all(items, [1, b"l" * LARGE_BYTES, "two"])
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_was_put_survives_a_killed_putter_of_another_node(
    three_nodes: Cluster, on_second: Callable[..., Any]
) -> None:
    items = mp.Queue(10)
    ref = clusterpool.remote(retries=0, **ON_SECOND)(put_and_die).remote(items)
    with pytest.raises(errors.WorkerDied):
        clusterpool.get(ref)
    assert [items.get(timeout=20) for _ in range(3)] == [1, b"l" * LARGE_BYTES, "two"]
    assert items.qsize() == 0
    gc.collect()
    wait_for(lambda: store_bytes() == 0)


def test_large_items_that_nobody_got_go_with_their_job(three_nodes: Cluster) -> None:
    clusterpool.init()
    items = mp.Queue()
    items.put(b"l" * LARGE_BYTES)
    clusterpool.get(clusterpool.remote(**ON_SECOND)(lambda: items.put(b"m" * LARGE_BYTES)).remote())
    wait_for(lambda: store_bytes() >= 2 * LARGE_BYTES)  # the other node's figure comes with its next heartbeat
    clusterpool.shutdown()
    clusterpool.init()
    try:
        wait_for(lambda: store_bytes() == 0)
    finally:
        clusterpool.shutdown()
