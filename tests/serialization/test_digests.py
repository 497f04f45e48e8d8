"""Equal contents have equal digests, different ones do not, and sizes are told."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from clusterpool.serialization.digests import content_digest, is_immutable


def test_different_contents_have_different_digests() -> None:
    values: list[Any] = [
        np.arange(6),
        np.arange(6).reshape(2, 3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(6).astype("i4"),
        np.arange(6).view("M8[s]"),
        np.arange(6).view("u1"),
        np.zeros(6, "f2"),
        np.zeros(2, [("a", "i8"), ("b", "f8")]),
        np.zeros(2, [("a", "i8"), ("c", "f8")]),
        np.arange(6).tobytes(),
        bytearray(np.arange(6).tobytes()),
        b"",
    ]
    digests = [content_digest(value) for value in values]
    assert None not in digests
    for (index, one), (other_index, other) in itertools.combinations(enumerate(digests), 2):
        assert one != other, (values[index], values[other_index])


def test_equal_contents_have_equal_digests() -> None:
    array = np.random.default_rng(0).random((100, 30))
    assert content_digest(array) == content_digest(array.copy())
    assert content_digest(array.T) == content_digest(np.asfortranarray(array.T))
    before = content_digest(array)
    array[3, 4] += 1
    assert content_digest(array) != before


@pytest.mark.parametrize("value", [np.array([{}]), np.zeros((4, 4))[:, ::2], [1], pd.DataFrame({"a": [1]}), 3])
def test_what_has_no_plain_content_has_no_digest(value: Any) -> None:
    assert content_digest(value) is None


def test_what_can_change_is_not_immutable() -> None:
    array = np.zeros(10)
    view = array[:]
    view.flags.writeable = False
    frozen = np.zeros(10)
    frozen.flags.writeable = False
    cases = [
        (b"", True),
        ("", True),
        (pa.table({"a": [1]}), True),
        (array, False),
        (view, False),  # its base can be written to
        (frozen, True),
        (frozen[2:], True),
        (np.frombuffer(b"12345678"), True),
        (np.frombuffer(bytearray(8)), False),
        (bytearray(), False),
        ([], False),
        (pd.Series([1]), False),
    ]
    for value, expected in cases:
        assert is_immutable(value) is expected, value
