"""What the job computes: every result can be told from its input, so that a wrong or mixed-up one shows."""

from __future__ import annotations

from typing import Any

# About 2 ms of pure Python on the machines that we have.
ROUNDS = 25_000
BIG_ITEMS = 12_500_000  # float64: 100 MB
ACTORS = 50


def mix(number: int) -> int:
    """A few milliseconds of work on `number`."""
    value = number
    for _ in range(ROUNDS):
        value = (value * 1_103_515_245 + 12_345) & 0x7FFFFFFF
    return value


def mixed(number: int) -> tuple[int, int]:
    """The number with what `mix` makes of it."""
    return number, mix(number)


def expected(number: int) -> int:
    """What `mix` must give, in a microsecond: the rounds of the generator folded into one."""
    return (number * _FACTOR + _OFFSET) & 0x7FFFFFFF


def _folded() -> tuple[int, int]:
    factor, offset = 1, 0
    for _ in range(ROUNDS):
        factor, offset = (factor * 1_103_515_245) & 0x7FFFFFFF, (offset * 1_103_515_245 + 12_345) & 0x7FFFFFFF
    return factor, offset


_FACTOR, _OFFSET = _folded()


def make_big(number: int) -> Any:
    """An array of 100 MB."""
    import numpy as np

    return np.full(BIG_ITEMS, float(number))


def shift(array: Any) -> Any:
    """Another one."""
    return array + 1.0


def summary(array: Any) -> tuple[float, float, int]:
    """First item, last item and length."""
    return float(array[0]), float(array[-1]), len(array)


def expected_summary(number: int) -> tuple[float, float, int]:
    """What `summary(shift(make_big(number)))` must give."""
    return number + 1.0, number + 1.0, BIG_ITEMS
