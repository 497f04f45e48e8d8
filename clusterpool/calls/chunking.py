"""How the items of a call are cut into chunks, each of which is one task. Pure.

Source: `multiprocessing.pool.Pool`: a chunk is the unit of work, of failure and of `maxtasksperchild`.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

CHUNKS_PER_WORKER = 4  # The standard library's number: fewer balance badly, more cost more messages.

# A slice of a range travels as three numbers whatever its length, but costs a microsecond to rebuild; the
# items of a shorter slice are cheaper as a tuple.
RANGE_SLICE_LENGTH_MIN = 16

# Iterating one of these runs no code of the user and cannot block, so items may be read ahead in batches.
NON_BLOCKING_TYPES = frozenset({list, tuple, range, str, bytes, dict, set, frozenset, deque})


def checked_chunksize(chunksize: Any) -> int:
    """Raises: ValueError when `chunksize` is no integer of at least 1."""
    try:
        number = operator.index(chunksize)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"Chunksize must be 1+, not {chunksize!r}: give a whole number of items a task")
    return number


def default_chunksize(length: int, workers: int) -> int:
    """The chunk size of `map` when the caller names none; 0 for no items."""
    chunksize, rest = divmod(length, workers * CHUNKS_PER_WORKER)
    return chunksize + bool(rest)


def as_items(iterable: Iterable[Any]) -> Sequence[Any]:
    """The items as something that can be sliced; a copy unless that is safe and cheap.

    A subclass of `list` may iterate otherwise than it slices, so only the exact types are taken as they are.
    """
    if type(iterable) in (list, tuple, range):
        return iterable  # type: ignore[return-value]
    return list(iterable)


def split(items: Sequence[Any], chunksize: int) -> list[Sequence[Any]]:
    """All chunks of `items`; the last may be shorter."""
    if chunksize == 1:
        return list(zip(items, strict=True))
    if type(items) is range and chunksize < RANGE_SLICE_LENGTH_MIN:
        items = tuple(items)
    return [items[start : start + chunksize] for start in range(0, len(items), chunksize)]


def read_chunks(iterable: Iterable[Any], chunksize: int) -> Iterator[Sequence[Any]]:
    """Chunks of an iterable of unknown length, read no further than the chunk that is asked for.

    An error of the iterable comes out at the start of the chunk that it spoils, as it does in the standard
    library.
    """
    if chunksize == 1:
        return zip(iterable, strict=True)
    iterator = iter(iterable)
    return iter(lambda: tuple(islice(iterator, chunksize)), ())


def is_non_blocking(iterable: Iterable[Any]) -> bool:
    """Whether the next item is surely there at once."""
    return type(iterable) in NON_BLOCKING_TYPES
