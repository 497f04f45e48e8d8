"""A generator pauses when too much of what it has made is not taken, and nobody waits for it in vain."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clusterpool
from clusterpool.core.stream_pace import BYTES_MAX, ITEMS_MAX
from tests.client.engine import MIB, wait_for

pytestmark = pytest.mark.usefixtures("cluster", "nothing_left")


def count_to(path: Path, stop: int, size: int = 0) -> Iterator[Any]:
    """Items, whose count is the size of a file."""
    with path.open("ab", buffering=0) as made:
        for number in range(stop):
            made.write(b".")
            yield np.full(size, number % 256, np.uint8) if size else number


def made(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def has_paused_at(path: Path, count: int) -> bool:
    """Whether there come that many items, and for a while no more."""
    wait_for(lambda: made(path) >= count)
    time.sleep(0.3)
    return made(path) == count


@pytest.mark.parametrize(("buffer", "ahead"), [(1, 1), (5, 5), ("default", ITEMS_MAX)])
def test_a_generator_pauses_until_its_items_are_taken(tmp_path: Path, buffer: Any, ahead: int) -> None:
    options = {} if buffer == "default" else {"stream_buffer": buffer}
    task = clusterpool.remote(num_returns="streaming", **options)(count_to)
    stream = task.remote(tmp_path / "made", 3 * ahead)
    assert has_paused_at(tmp_path / "made", ahead)
    assert [clusterpool.get(ref, timeout=30) for ref in stream] == list(range(3 * ahead))


def test_large_items_are_bounded_in_bytes(tmp_path: Path) -> None:
    task = clusterpool.remote(num_returns="streaming")(count_to)
    stream = task.remote(tmp_path / "made", 40, 10 * MIB)
    assert has_paused_at(tmp_path / "made", BYTES_MAX // (10 * MIB) + 1)
    for number, ref in enumerate(stream):
        assert clusterpool.get(ref, timeout=30)[0] == number


def test_without_a_bound_it_runs_to_its_end(tmp_path: Path) -> None:
    task = clusterpool.remote(num_returns="streaming", stream_buffer=None)(count_to)
    stream = task.remote(tmp_path / "made", 3 * ITEMS_MAX)
    assert wait_for(lambda: made(tmp_path / "made") == 3 * ITEMS_MAX)
    assert len(list(stream)) == 3 * ITEMS_MAX


def test_who_keeps_references_does_not_hold_up_the_generator(tmp_path: Path) -> None:
    task = clusterpool.remote(num_returns="streaming", stream_buffer=2)(count_to)
    refs = list(task.remote(tmp_path / "made", 50))
    assert clusterpool.get(refs, timeout=30) == list(range(50))


def test_a_paused_generator_lends_its_cpu_to_whoever_takes_its_items(tmp_path: Path) -> None:
    """More generators than CPUs, and each item goes through a task that needs a CPU itself."""
    task = clusterpool.remote(num_returns="streaming", stream_buffer=1)(count_to)
    double = clusterpool.remote(lambda number: 2 * number)
    streams = [task.remote(tmp_path / f"made{number}", 10) for number in range(4)]
    assert wait_for(lambda: all(made(tmp_path / f"made{number}") for number in range(4)))
    results = [[clusterpool.get(double.remote(ref), timeout=20) for ref in stream] for stream in reversed(streams)]
    assert results == [list(range(0, 20, 2))] * 4


def test_a_task_takes_the_items_of_its_own_generator(tmp_path: Path) -> None:
    @clusterpool.remote
    def total(path: Path) -> int:
        task = clusterpool.remote(num_returns="streaming", stream_buffer=2)(count_to)
        return sum(clusterpool.get(ref, timeout=20) for ref in task.remote(path, 20))

    assert clusterpool.get(total.remote(tmp_path / "made"), timeout=30) == 190


def test_closing_a_paused_stream_ends_its_generator(tmp_path: Path) -> None:
    @clusterpool.remote(num_returns="streaming", stream_buffer=2)
    def endless(folder: Path) -> Iterator[int]:
        try:
            yield from count_to(folder / "made", 10**9)
        finally:
            (folder / "ended").touch()

    stream = endless.remote(tmp_path)
    assert has_paused_at(tmp_path / "made", 2)
    stream.close()
    assert wait_for((tmp_path / "ended").exists)


def test_a_retry_repeats_what_was_taken_without_pausing(tmp_path: Path) -> None:
    @clusterpool.remote(num_returns="streaming", stream_buffer=3)
    def die_once(folder: Path) -> Iterator[int]:
        for number in range(20):
            if number == 12 and not (folder / "died").exists():
                (folder / "died").touch()
                time.sleep(0.05)
                os._exit(1)
            yield number

    assert [clusterpool.get(ref, timeout=20) for ref in die_once.remote(tmp_path)] == list(range(20))


class Source:
    """A generator method."""

    def numbers(self, path: Path, stop: int) -> Iterator[int]:
        return count_to(path, stop)

    def hello(self) -> str:
        return "hello"


def test_a_method_pauses_as_well(tmp_path: Path) -> None:
    source = clusterpool.remote(Source).remote()
    method = source.numbers.options(num_returns="streaming", stream_buffer=4)
    stream = method.remote(tmp_path / "made", 20)
    assert has_paused_at(tmp_path / "made", 4)
    assert [clusterpool.get(ref, timeout=30) for ref in stream] == list(range(20))


def test_a_method_does_not_pause_when_calls_wait_behind_it(tmp_path: Path) -> None:
    """Else who waits for those calls, and takes no items meanwhile, would wait for ever."""
    source = clusterpool.remote(Source).remote()
    method = source.numbers.options(num_returns="streaming", stream_buffer=2)
    first, second = method.remote(tmp_path / "first", 20), method.remote(tmp_path / "second", 20)
    pairs = [
        (clusterpool.get(left, timeout=30), clusterpool.get(right, timeout=30)) for left, right in zip(first, second)
    ]
    assert pairs == [(number, number) for number in range(20)]
    stream = method.remote(tmp_path / "third", 20)
    assert has_paused_at(tmp_path / "third", 2)
    assert clusterpool.get(source.hello.remote(), timeout=30) == "hello"
    assert len(list(stream)) == 20


def test_a_paused_coroutine_does_not_hold_up_the_others(tmp_path: Path) -> None:
    class AsyncSource:
        async def numbers(self, path: Path, stop: int) -> AsyncIterator[int]:
            for number in count_to(path, stop):
                yield number

        async def hello(self) -> str:
            return "hello"

    source = clusterpool.remote(AsyncSource).remote()
    stream = source.numbers.options(num_returns="streaming", stream_buffer=3).remote(tmp_path / "made", 12)
    assert has_paused_at(tmp_path / "made", 3)
    assert clusterpool.get(source.hello.remote(), timeout=30) == "hello"
    assert [clusterpool.get(ref, timeout=30) for ref in stream] == list(range(12))


@pytest.mark.parametrize("buffer", [0, -1, 2.5, "all"])
def test_buffers_that_cannot_be(buffer: Any) -> None:
    with pytest.raises(ValueError, match="stream_buffer must be"):
        clusterpool.remote(num_returns="streaming", stream_buffer=buffer)(count_to)
