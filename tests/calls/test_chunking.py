"""Cutting items into chunks as `multiprocessing.pool` does."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterpool.calls.chunking import (
    as_items,
    checked_chunksize,
    default_chunksize,
    is_non_blocking,
    read_chunks,
    split,
)


@pytest.mark.parametrize(
    ("length", "workers", "chunksize"),
    [(0, 4, 0), (1, 4, 1), (16, 4, 1), (17, 4, 2), (1_000_000, 2, 125_000), (7, 1, 2)],
)
def test_default_chunksize_is_the_standard_librarys(length: int, workers: int, chunksize: int) -> None:
    assert default_chunksize(length, workers) == chunksize


@given(st.lists(st.integers()), st.integers(min_value=1, max_value=40), st.sampled_from([list, tuple, iter]))
def test_chunks_put_together_are_the_items(values: list[int], chunksize: int, kind: Any) -> None:
    chunks = split(as_items(kind(values)), chunksize)
    assert [item for chunk in chunks for item in chunk] == values
    assert all(len(chunk) == chunksize for chunk in chunks[:-1])
    assert list(map(list, read_chunks(iter(values), chunksize))) == list(map(list, chunks))


@given(st.integers(min_value=0, max_value=200), st.integers(min_value=1, max_value=40))
def test_chunks_of_a_range_are_its_numbers(length: int, chunksize: int) -> None:
    chunks = split(as_items(range(length)), chunksize)
    assert [item for chunk in chunks for item in chunk] == list(range(length))
    assert len(chunks) == -(-length // chunksize)


def test_long_chunk_of_a_range_is_not_written_out() -> None:
    (chunk,) = split(as_items(range(1_000_000)), 1_000_000)
    assert len(pickle.dumps(chunk)) < 100


def test_subclass_of_list_is_iterated_not_sliced() -> None:
    class Doubled(list):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[int]:
            return (2 * value for value in list.__iter__(self))

    assert split(as_items(Doubled([1, 2, 3])), 2) == [[2, 4], [6]]


def test_chunks_do_not_follow_later_changes_of_the_list() -> None:
    items = [1, 2, 3]
    chunks = split(as_items(items), 2)
    items[0] = 99
    assert chunks == [[1, 2], [3]]


def test_error_of_the_iterable_comes_at_the_start_of_the_chunk_it_spoils() -> None:
    def numbers() -> Iterator[int]:
        yield from range(5)
        raise OSError("no more")

    chunks = read_chunks(numbers(), 2)
    assert [next(chunks), next(chunks)] == [(0, 1), (2, 3)]
    with pytest.raises(OSError, match="no more"):
        next(chunks)


@pytest.mark.parametrize("chunksize", [1, 3])
def test_chunks_are_read_no_further_than_asked(chunksize: int) -> None:
    read: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(100):
            read.append(number)
            yield number

    chunks = read_chunks(numbers(), chunksize)
    next(chunks)
    assert len(read) == chunksize


@pytest.mark.parametrize("chunksize", [0, -1, 2.5, "3", None])
def test_chunksize_that_cannot_be_is_a_value_error_that_names_it(chunksize: Any) -> None:
    with pytest.raises(ValueError, match=r"Chunksize must be 1\+, not " + repr(chunksize).replace(".", r"\.")):
        checked_chunksize(chunksize)


def test_only_containers_of_the_standard_library_are_surely_non_blocking() -> None:
    class Slow(list):  # type: ignore[type-arg]
        pass

    assert all(map(is_non_blocking, ([], (), range(3), {}, set(), "ab")))
    assert not any(map(is_non_blocking, (iter([]), Slow(), (x for x in ()), open(__file__))))
