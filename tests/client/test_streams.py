"""Generators as tasks and as methods of actors: items come as they are made."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import clusterpool
from clusterpool import errors
from tests.client.engine import MIB, wait_for

pytestmark = pytest.mark.usefixtures("cluster", "nothing_left")


@clusterpool.remote(num_returns="streaming")
def count(stop: int, size: int = 0) -> Iterator[Any]:
    for number in range(stop):
        yield bytes([number % 256]) * size if size else number


def test_a_generator_streams_its_items() -> None:
    assert [clusterpool.get(ref, timeout=30) for ref in count.remote(20)] == list(range(20))
    assert list(count.remote(0)) == []


def test_items_come_before_the_generator_ends(tmp_path: Path) -> None:
    @clusterpool.remote(num_returns="streaming")
    def wait_between(path: str) -> Iterator[str]:
        yield "first"
        while not Path(path).exists():
            time.sleep(0.005)
        yield "second"

    stream = wait_between.remote(str(tmp_path / "go"))
    assert clusterpool.get(next(stream), timeout=30) == "first"
    (tmp_path / "go").touch()
    assert clusterpool.get(next(stream), timeout=30) == "second"
    with pytest.raises(StopIteration):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


def test_large_items() -> None:
    import numpy as np

    @clusterpool.remote(num_returns="streaming")
    def arrays(number: int) -> Iterator[Any]:
        for value in range(number):
            yield np.full(5 * MIB, value, np.uint8)

    for value, ref in enumerate(arrays.remote(6)):
        array = clusterpool.get(ref, timeout=30)
        assert array.nbytes == 5 * MIB and array[0] == array[-1] == value
        array[0] = 255  # writable


def test_an_error_in_the_middle_comes_after_the_items_before_it() -> None:
    @clusterpool.remote(num_returns="streaming")
    def fail_at(stop: int) -> Iterator[int]:
        yield from range(stop)
        raise KeyError("middle")

    stream = fail_at.remote(3)
    assert [clusterpool.get(next(stream), timeout=30) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="middle"):
        clusterpool.get(next(stream), timeout=30)
    with pytest.raises(StopIteration):
        next(stream)


def test_what_is_not_iterable_is_an_error() -> None:
    @clusterpool.remote(num_returns="streaming")
    def number() -> int:
        return 5

    with pytest.raises(TypeError, match="iterable"):
        clusterpool.get(next(number.remote()), timeout=30)


@pytest.mark.parametrize("size", [10, 2 * MIB])
def test_closing_a_stream_ends_its_generator(tmp_path: Path, size: int) -> None:
    @clusterpool.remote(num_returns="streaming")
    def endless(folder: str) -> Iterator[bytes]:
        try:
            while True:
                yield b"x" * size
                time.sleep(0.001)
        finally:
            Path(folder, "ended").touch()

    stream = endless.remote(str(tmp_path))
    assert len(clusterpool.get(next(stream), timeout=30)) == size
    stream.close()
    assert wait_for((tmp_path / "ended").exists)
    with pytest.raises(StopIteration):
        next(stream)


def test_a_dropped_stream_is_closed(tmp_path: Path) -> None:
    @clusterpool.remote(num_returns="streaming")
    def endless(folder: str) -> Iterator[int]:
        try:
            while True:
                yield 1
                time.sleep(0.001)
        finally:
            Path(folder, "ended").touch()

    for ref in endless.remote(str(tmp_path)):
        assert clusterpool.get(ref, timeout=30) == 1
        break
    del ref
    gc.collect()
    assert wait_for((tmp_path / "ended").exists)


def test_items_may_hold_references() -> None:
    @clusterpool.remote(num_returns="streaming")
    def references(number: int) -> Iterator[Any]:
        for value in range(number):
            yield [clusterpool.put(b"x" * (value * MIB))]

    lengths = []
    for ref in references.remote(4):
        lengths.append(len(clusterpool.get(clusterpool.get(ref, timeout=30)[0], timeout=30)))
    assert lengths == [0, MIB, 2 * MIB, 3 * MIB]


def test_items_are_arguments_of_other_tasks() -> None:
    @clusterpool.remote
    def double(x: int) -> int:
        return 2 * x

    assert clusterpool.get([double.remote(ref) for ref in count.remote(10)], timeout=20) == list(range(0, 20, 2))


def test_a_stream_is_iterated_asynchronously() -> None:
    async def main() -> list[int]:
        return [await ref async for ref in count.remote(10)]

    assert asyncio.run(asyncio.wait_for(main(), 20)) == list(range(10))


def test_a_coroutine_that_waits_for_an_item_takes_no_thread_and_can_be_cancelled(tmp_path: Path) -> None:
    @clusterpool.remote(num_cpus=0)
    def wait_for_file(path: str) -> Iterator[int]:
        while not Path(path).exists():
            time.sleep(0.005)
        yield 1

    file = tmp_path / "go"
    streams = [wait_for_file.remote(str(file)) for _ in range(3)]

    async def main() -> tuple[int, list[int]]:
        waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await asyncio.wait(waiting, timeout=0.1)
        threads = threading.active_count()
        waiting[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        streams[1].close()
        with pytest.raises(StopAsyncIteration):
            await waiting[1]
        file.touch()
        return threads, [await (await waiting[2]), *[await ref async for ref in streams[0]]]

    before = threading.active_count()
    threads, items = asyncio.run(asyncio.wait_for(main(), 50))
    assert items == [1, 1]
    assert threads <= before


def test_a_program_of_coroutines_ends_though_a_stream_has_not_moved() -> None:
    @clusterpool.remote
    def never() -> Iterator[int]:
        time.sleep(1000)
        yield 1

    stream = never.remote()

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(stream), 0.05)

    asyncio.run(main())
    assert clusterpool.cancel(stream, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_generator_is_cancelled_by_its_stream(force: bool) -> None:
    @clusterpool.remote
    def forever() -> Iterator[int]:
        while True:
            yield 1
            time.sleep(0.005)

    stream = forever.remote()
    assert clusterpool.get(next(stream), timeout=50) == 1
    clusterpool.cancel(stream, force=force)
    *_, last = stream
    with pytest.raises(errors.TaskCancelled):
        clusterpool.get(last, timeout=50)


def test_a_stream_says_that_it_cannot_be_passed_on() -> None:
    with pytest.raises(TypeError, match=r"pass on the references that it yields"):
        clusterpool.put(count.remote(1))


def test_a_stream_whose_worker_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    @clusterpool.remote(num_returns="streaming")
    def die_once(folder: str) -> Iterator[int]:
        for number in range(10):
            if number == 5 and not Path(folder, "died").exists():
                Path(folder, "died").touch()
                time.sleep(0.05)
                import os

                os._exit(1)
            yield number

    assert [clusterpool.get(ref, timeout=20) for ref in die_once.remote(str(tmp_path))] == list(range(10))


def test_a_stream_without_retries_ends_with_the_death() -> None:
    @clusterpool.remote(num_returns="streaming", retries=0)
    def die() -> Iterator[int]:
        yield 1
        time.sleep(0.05)
        import os

        os._exit(1)

    stream = die.remote()
    assert clusterpool.get(next(stream), timeout=30) == 1
    with pytest.raises(errors.WorkerDied):
        clusterpool.get(next(stream), timeout=30)
    with pytest.raises(StopIteration):
        next(stream)


# --- actors ---------------------------------------------------------------------------------------------------------


class Source:
    """A generator method."""

    def numbers(self, stop: int) -> Iterator[int]:
        yield from range(stop)

    def endless(self, folder: str) -> Iterator[int]:
        try:
            while True:
                yield 1
                time.sleep(0.001)
        finally:
            Path(folder, "ended").touch()

    def fail(self) -> Iterator[int]:
        yield 1
        raise KeyError("middle")

    def hello(self) -> str:
        return "hello"


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_generator_method_streams(concurrency: int) -> None:
    source = clusterpool.remote(max_concurrency=concurrency)(Source).remote()
    assert [clusterpool.get(ref, timeout=30) for ref in source.numbers.remote(20)] == list(range(20))
    stream = source.fail.remote()
    assert clusterpool.get(next(stream), timeout=30) == 1
    with pytest.raises(KeyError):
        clusterpool.get(next(stream), timeout=30)
    assert clusterpool.get(source.hello.remote(), timeout=30) == "hello"


def test_closing_the_stream_of_an_actor(tmp_path: Path) -> None:
    source = clusterpool.remote(Source).remote()
    stream = source.endless.remote(str(tmp_path))
    assert clusterpool.get(next(stream), timeout=30) == 1
    stream.close()
    assert wait_for((tmp_path / "ended").exists)
    assert clusterpool.get(source.hello.remote(), timeout=30) == "hello"


def test_an_asynchronous_generator_method_streams(tmp_path: Path) -> None:
    class AsyncSource:
        async def numbers(self, stop: int) -> AsyncIterator[int]:
            for number in range(stop):
                await asyncio.sleep(0)
                yield number

        async def endless(self, folder: str) -> AsyncIterator[int]:
            try:
                while True:
                    yield 1
                    await asyncio.sleep(0.001)
            finally:
                Path(folder, "ended").touch()

        def plain(self, stop: int) -> Iterator[int]:
            yield from range(stop)

    source = clusterpool.remote(AsyncSource).remote()
    assert [clusterpool.get(ref, timeout=30) for ref in source.numbers.remote(20)] == list(range(20))
    assert [clusterpool.get(ref, timeout=30) for ref in source.plain.remote(3)] == [0, 1, 2]
    stream = source.endless.remote(str(tmp_path))
    assert clusterpool.get(next(stream), timeout=30) == 1
    stream.close()
    assert wait_for((tmp_path / "ended").exists)


def test_a_stream_of_an_actor_ends_with_it() -> None:
    source = clusterpool.remote(Source).remote()
    stream = source.endless.remote("/nonexistent-folder-of-a-test")
    assert clusterpool.get(next(stream), timeout=30) == 1
    clusterpool.kill(source)
    with pytest.raises(errors.ActorDied):
        for ref in stream:
            clusterpool.get(ref, timeout=30)
