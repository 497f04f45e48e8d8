"""Workers that crash in C code: the error says what probably happened, and where."""

from __future__ import annotations

import ctypes
import resource
import sys
from typing import Any

import pytest

import clusterpool
from clusterpool import errors

pytestmark = pytest.mark.usefixtures("cluster")


def sort_deeper(item: Any) -> Any:
    """Python calls C calls Python, and so on: unlike plain recursion, that uses the C stack on every version of it."""
    return sorted([item], key=sort_deeper)


def overflow_the_stack() -> Any:
    sys.setrecursionlimit(10**9)
    # From 3.12 on Python counts calls of this kind by itself, and raises long before an ordinary stack is full.
    resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    return sort_deeper(1)


def read_address_zero() -> bytes:
    return ctypes.string_at(0)


def test_a_stack_overflow_is_named_with_its_calls() -> None:
    task = clusterpool.remote(retries=0)(overflow_the_stack)
    with pytest.raises(errors.WorkerDied) as caught:
        clusterpool.get(task.remote(), timeout=50)
    text = str(caught.value)
    assert "SIGSEGV" in text
    assert "probably a stack overflow" in text
    assert "sort_deeper (test_crashes_in_c.py:" in text
    assert "peak memory" in text
    assert clusterpool.get(clusterpool.remote(len).remote("abc"), timeout=20) == 3


def test_a_crash_is_named_with_its_calls() -> None:
    task = clusterpool.remote(retries=0)(read_address_zero)
    with pytest.raises(errors.WorkerDied, match=r"SIGSEGV.*string_at .*read_address_zero \(test_crashes_in_c.py:"):
        clusterpool.get(task.remote(), timeout=50)
