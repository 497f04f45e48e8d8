"""Tasks that take or return large arrays, and the arrays."""

from __future__ import annotations

from typing import Any

import numpy

# One read a page proves that the bytes have arrived, and costs little beside the transfer to be measured.
PAGE_ITEMS = 4096 // 8

_held: dict[int, Any] = {}
_calls = 0


def new_array(size_bytes: int, seed: int) -> Any:
    """An array of other content for every seed, so that no store can recognise it. shape: (n,) float64."""
    array: Any = numpy.arange(size_bytes // 8, dtype=numpy.float64)
    array += seed
    return array


def touch(array: Any) -> float:
    """Reads every page of the array."""
    return float(array[::PAGE_ITEMS].sum())


def give_back(argument: tuple[int, int]) -> Any:
    """Returns an array of `size_bytes`, held in the worker, that differs from what was returned before.

    The array is made at the first call, in the warm-up: making one costs as much as sending it.
    """
    global _calls
    index, size_bytes = argument
    _calls += 1
    array = _held.get(size_bytes)
    if array is None:
        array = _held[size_bytes] = new_array(size_bytes, index)
    array[::PAGE_ITEMS] = _calls * 1000.0 + index
    return array
