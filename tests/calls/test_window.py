"""How far a lazy call reads ahead."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from clusterpool.calls.window import (
    BYTES_MAX,
    ITEMS_MAX,
    TASKS_MAX,
    TASKS_PER_WORKER_FIRST,
    FeedWindow,
    approximate_size_bytes,
    checked_buffersize,
)


def fill(window: FeedWindow, size_bytes: float = 32) -> int:
    submitted = 0
    while window.room() > 0:
        window.submitted(size_bytes)
        submitted += 1
    return submitted


def test_before_the_first_result_only_a_few_tasks_are_at_risk() -> None:
    assert fill(FeedWindow(workers=2)) == 2 * TASKS_PER_WORKER_FIRST


def test_small_results_open_the_window() -> None:
    window = FeedWindow(workers=2)
    submitted = fill(window)
    window.arrived(32, 32)
    assert submitted + fill(window) == TASKS_MAX
    window.taken(32)
    assert window.room() == 1


@pytest.mark.parametrize("workers", [1, 4])
def test_large_results_keep_it_at_one_a_worker(workers: int) -> None:
    window = FeedWindow(workers=workers)
    submitted = fill(window)
    for _ in range(submitted):
        window.arrived(32, BYTES_MAX)
    assert window.room() == 0
    for _ in range(submitted):
        window.taken(BYTES_MAX)
    assert fill(window) == workers


def test_large_inputs_count_as_well() -> None:
    window = FeedWindow(workers=1)
    window.submitted(32)
    window.arrived(32, 32)
    window.taken(32)
    assert fill(window, BYTES_MAX / 4) <= 5


def test_large_chunks_need_no_long_queue_of_chunks() -> None:
    window = FeedWindow(workers=1, chunksize=ITEMS_MAX // 8)
    window.submitted(32)
    window.arrived(32, 32)
    window.taken(32)
    assert fill(window) == 8


def test_results_nobody_takes_close_the_window() -> None:
    window = FeedWindow(workers=2)
    total = 0
    for _ in range(10):
        submitted = fill(window)
        total += submitted
        for _ in range(submitted):
            window.arrived(32, 32)
    assert total == TASKS_MAX


def test_buffersize_is_exact() -> None:
    window = FeedWindow(workers=8, buffersize=3)
    assert fill(window, BYTES_MAX * 10) == 3
    window.arrived(BYTES_MAX * 10, BYTES_MAX * 10)
    assert window.room() == 0
    window.taken(BYTES_MAX * 10)
    assert window.room() == 1
    assert window.wants_more()


def test_lifted_window_waits_for_no_consumer_but_bounds_what_runs() -> None:
    window = FeedWindow(workers=1, buffersize=2)
    fill(window)
    window.lift()
    assert window.room() == 0
    window.arrived(32, 32)
    assert window.room() == 1


def test_feeder_is_not_woken_for_each_item_but_before_workers_starve() -> None:
    window = FeedWindow(workers=2)
    window.submitted(32)
    window.arrived(32, 32)
    window.taken(32)
    fill(window)
    window.arrived(32, 32)
    window.taken(32)
    assert window.room() == 1
    assert not window.wants_more()
    for _ in range(TASKS_MAX - 5):
        window.arrived(32, 32)
        window.taken(32)
    assert window.wants_more()


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_the_feeder_is_woken_again(seed: int) -> None:
    """When nothing runs and nothing waits to be taken, there is room: no state can hang."""
    chance = random.Random(seed)
    window = FeedWindow(
        workers=chance.randint(1, 9),
        chunksize=chance.choice([1, 100, 10**6]),
        buffersize=chance.choice([None, 1, 7]),
    )
    running: list[float] = []
    waiting: list[float] = []
    for _ in range(500):
        step = chance.random()
        if step < 0.4 and window.wants_more():
            running.append(chance.choice([32.0, 1e6, 1e9]))
            window.submitted(running[-1])
        elif step < 0.7 and running:
            waiting.append(chance.choice([32.0, 1e6, 1e9]))
            window.arrived(running.pop(), waiting[-1])
        elif waiting:
            window.taken(waiting.pop())
        if not running and not waiting:
            assert window.wants_more()
    for size_bytes in running:
        window.arrived(size_bytes, 32)
        window.taken(32)
    for size_bytes in waiting:
        window.taken(size_bytes)
    assert window.wants_more()


@pytest.mark.parametrize(
    ("buffersize", "error"), [(0, ValueError), (-3, ValueError), (2.5, TypeError), ("2", TypeError)]
)
def test_buffersize_is_checked_as_executor_map_does(buffersize: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="buffersize must be"):
        checked_buffersize(buffersize)


class Record:
    def __init__(self) -> None:
        self.pixels = np.zeros(10**6)


@pytest.mark.parametrize(
    ("value", "size_bytes"),
    [
        (b"x" * 10**6, 1e6),
        (np.zeros(10**6), 8e6),
        ([np.zeros(10**5)] * 20, 16e6),
        ({"a": "x" * 10**6}, 1e6),
        (Record(), 8e6),
        ((b"x" * 10**6,), 1e6),
    ],
)
def test_sizes_have_the_right_order_of_magnitude(value: Any, size_bytes: float) -> None:
    assert size_bytes / 2 < approximate_size_bytes(value) < size_bytes * 2


@pytest.mark.parametrize("value", [None, 1, 1.5, True, "abc", [], {}, range(10**9), object()])
def test_small_values_count_as_small(value: Any) -> None:
    assert 0 < approximate_size_bytes(value) < 200


def test_size_of_a_value_that_holds_itself_is_finite() -> None:
    value: list[Any] = []
    value.append(value)
    assert approximate_size_bytes(value) < 1000
