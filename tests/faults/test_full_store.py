"""Several producers of far more than the store holds, and a slow consumer: producers slow down, and nothing is lost."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import clusterpool
from tests.client.engine import MIB, check_nothing_left, wait_for

STORE_MIB = 64
ITEM_MIB = 10


@pytest.fixture
def small_store(fresh: None) -> None:
    clusterpool.init(num_cpus=4, object_store_bytes=STORE_MIB * MIB)


pytestmark = pytest.mark.usefixtures("small_store")


def make(number: int) -> Any:
    return np.full(ITEM_MIB * MIB, number % 256, np.uint8)


def check(array: Any, number: int) -> None:
    assert array.nbytes == ITEM_MIB * MIB
    assert array[0] == array[-1] == number % 256


def used_bytes() -> int:
    return int(clusterpool.nodes()[0]["store_used_bytes"])


def test_puts_of_several_tasks_and_a_slow_consumer() -> None:
    @clusterpool.remote
    def produce(first: int, count: int) -> list[Any]:
        return [clusterpool.put(make(first + number)) for number in range(count)]

    lists = [produce.remote(100 * number, 8) for number in range(4)]
    for number, ref in enumerate(lists):
        for position, inner in enumerate(clusterpool.get(ref, timeout=50)):
            check(clusterpool.get(inner, timeout=30), 100 * number + position)
            assert used_bytes() <= STORE_MIB * MIB
            time.sleep(0.02)
    del lists, ref, inner
    gc.collect()
    check_nothing_left()


def test_large_results_of_a_lazy_map_and_a_slow_consumer() -> None:
    with clusterpool.Pool(4) as pool:
        for number, array in enumerate(pool.imap(make, range(40))):
            check(array, number)
            time.sleep(0.02)
            assert used_bytes() <= STORE_MIB * MIB
        del array
    gc.collect()
    assert wait_for(lambda: used_bytes() == 0)


def test_several_streams_of_large_items_taken_in_turn() -> None:
    @clusterpool.remote(num_returns="streaming")
    def produce(first: int, count: int) -> Iterator[Any]:
        for number in range(count):
            yield make(first + number)

    streams = [produce.remote(100 * number, 10) for number in range(3)]
    for position in range(10):
        for number, stream in enumerate(streams):
            check(clusterpool.get(next(stream), timeout=30), 100 * number + position)
    del streams, stream
    gc.collect()
    check_nothing_left()


def test_results_that_are_passed_on_while_more_are_made() -> None:
    @clusterpool.remote
    def first(array: Any) -> int:
        time.sleep(0.05)
        return int(array[0])

    maker = clusterpool.remote(make)
    refs = [first.remote(maker.remote(number)) for number in range(40)]
    assert clusterpool.get(refs, timeout=50) == list(range(40))
    del refs
    gc.collect()
    check_nothing_left()
