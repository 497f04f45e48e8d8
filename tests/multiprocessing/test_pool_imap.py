"""`imap` and `imap_unordered` on a real embedded cluster."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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


def nothing(_: Any) -> None:
    return None


def fail_at_three(x: int) -> int:
    if x == 3:
        raise LookupError(x)
    return x


def wait_for_file(path: Path) -> str:
    wait_for(path.exists)
    return path.name


def make_array(size_bytes: int) -> np.ndarray:
    return np.zeros(size_bytes, dtype=np.uint8)


def leave_mark(path: Path) -> None:
    path.touch()


def numbers_then_error(length: int) -> Iterator[int]:
    yield from range(length)
    raise OSError("the iterable broke")


@pytest.mark.parametrize("chunksize", [1, 2, 64])
@pytest.mark.parametrize("make", [range, lambda n: iter(range(n))], ids=["range", "iterator"])
def test_all_results(pool: Any, chunksize: int, make: Any) -> None:
    assert list(pool.imap(square, make(1000), chunksize)) == [x * x for x in range(1000)]
    assert sorted(pool.imap_unordered(square, make(1000), chunksize)) == [x * x for x in range(1000)]


def test_none_results_and_no_items(pool: Any) -> None:
    assert list(pool.imap(nothing, range(5))) == [None] * 5
    assert list(pool.imap_unordered(nothing, [])) == []


def test_error_of_a_task_takes_its_turn(pool: Any) -> None:
    results = pool.imap(fail_at_three, range(6))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(LookupError):
        next(results)
    assert list(results) == [4, 5]


@pytest.mark.parametrize(("chunksize", "before"), [(1, 7), (2, 6), (4, 4)])
def test_error_of_the_iterable_takes_its_turn(pool: Any, chunksize: int, before: int) -> None:
    results = pool.imap(square, numbers_then_error(7), chunksize)
    assert [next(results) for _ in range(before)] == [x * x for x in range(before)]
    with pytest.raises(OSError, match="the iterable broke"):
        next(results)


def test_error_of_the_iterable_comes_last_unordered(pool: Any) -> None:
    results = pool.imap_unordered(square, numbers_then_error(4))
    assert sorted(next(results) for _ in range(4)) == [0, 1, 4, 9]
    with pytest.raises(OSError, match="the iterable broke"):
        next(results)


def test_next_with_timeout(pool: Any, tmp_path: Path) -> None:
    results = pool.imap(wait_for_file, [tmp_path / "go"])
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(timeout=0.05)
    (tmp_path / "go").touch()
    assert results.next(timeout=30) == "go"
    with pytest.raises(StopIteration):
        results.next(timeout=30)


def test_unordered_gives_what_is_done_first(pool: Any, tmp_path: Path) -> None:
    (tmp_path / "now").touch()
    results = pool.imap_unordered(wait_for_file, [tmp_path / "later", tmp_path / "now"])
    assert results.next(30) == "now"
    (tmp_path / "later").touch()
    assert results.next(30) == "later"


@pytest.mark.parametrize("name", ["imap", "imap_unordered"])
def test_endless_generator_is_read_only_as_far_as_the_window(pool: Any, name: str) -> None:
    read = itertools.count()
    results = getattr(pool, name)(square, read)
    taken = list(itertools.islice(results, 20_000))
    assert len(taken) == 20_000
    ahead = []
    for _ in range(3):  # the reading stops although nobody takes results
        time.sleep(0.05)
        ahead.append(next(read) - 20_000)
    assert max(ahead) < 5000


def test_large_results_bound_the_reading_by_bytes(pool: Any) -> None:
    read = itertools.count()
    results = pool.imap(make_array, (next(read) * 0 + 2**23 for _ in itertools.repeat(0)))
    for _ in range(10):
        assert results.next(30).nbytes == 2**23
    time.sleep(0.2)
    assert next(read) < 10 + 30  # 64 MiB are 8 results of 8 MiB; a bound on items alone would be 2048


def test_large_inputs_bound_the_reading_by_bytes(pool: Any) -> None:
    read = itertools.count()

    def arrays() -> Iterator[np.ndarray]:
        while True:
            next(read)
            yield np.zeros(2**23, dtype=np.uint8)

    results = pool.imap(len, arrays())
    for _ in range(10):
        assert results.next(30) == 2**23


def test_buffersize_bounds_what_is_read(pool: Any) -> None:
    read: list[int] = []

    def numbers() -> Iterator[int]:
        for number in itertools.count():
            read.append(number)
            yield number

    results = pool.imap(square, numbers(), buffersize=4)
    for taken in range(10):
        wait_for(lambda taken=taken: len(read) == taken + 4)
        assert next(results) == taken * taken
    with pytest.raises(ValueError):
        pool.imap(square, [1], buffersize=0)
    with pytest.raises(TypeError):
        pool.imap_unordered(square, [1], buffersize=1.5)


def test_iterable_may_wait_for_the_results(pool: Any) -> None:
    questions: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    questions.put(2)
    seen = []
    for value in pool.imap(square, iter(questions.get, None)):
        seen.append(value)
        questions.put(value if value < 1000 else None)
    assert seen == [4, 16, 256, 65536]


def test_iterable_that_blocks_holds_up_nothing_else(pool: Any) -> None:
    release = threading.Event()

    def blocks() -> Iterator[int]:
        yield 1
        release.wait(30)
        yield 2

    results = pool.imap(square, blocks())
    assert results.next(30) == 1
    assert pool.map(square, range(10)) == [x * x for x in range(10)]
    release.set()
    assert list(results) == [4]


def test_work_begins_without_next(pool: Any, tmp_path: Path) -> None:
    results = pool.imap(leave_mark, (tmp_path / str(n) for n in range(5)))
    wait_for(lambda: len(os.listdir(tmp_path)) == 5)
    assert list(results) == [None] * 5


def test_imap_that_nobody_holds_runs_to_its_end(pool: Any, tmp_path: Path) -> None:
    pool.imap_unordered(leave_mark, (tmp_path / str(n) for n in range(200)))
    wait_for(lambda: len(os.listdir(tmp_path)) == 200)


def test_close_and_join_finish_an_imap(tmp_path: Path) -> None:
    pool = Pool(2)
    results = pool.imap(leave_mark, (tmp_path / str(n) for n in range(200)), buffersize=2)
    pool.close()
    pool.join()
    assert len(os.listdir(tmp_path)) == 200
    assert list(results) == [None] * 200


def test_two_at_once(pool: Any) -> None:
    first = pool.imap(square, itertools.count())
    second = pool.imap(square, itertools.count(100))
    pairs = list(itertools.islice(zip(first, second), 200))
    assert pairs == [(x * x, (x + 100) ** 2) for x in range(200)]
