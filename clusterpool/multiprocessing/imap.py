"""The iterators that `Pool.imap` and `Pool.imap_unordered` return.

Unlike the standard library's, they are the same whatever the chunk size is: `next(timeout)` is always there,
and after an error the iteration may go on with the chunk that follows.
"""

from __future__ import annotations

import contextlib
from builtins import TimeoutError as _BuiltinTimeoutError
from collections import deque
from multiprocessing import TimeoutError
from typing import Any

from clusterpool.calls.lazy_call import LazyCall
from clusterpool.client.split_chunk import ItemFailure
from clusterpool.multiprocessing.results import to_stdlib_error


class IMapIterator:
    """Yields results in the order of their arguments. May be shared by threads."""

    def __init__(self, call: LazyCall) -> None:
        self._call = call
        self._items: deque[Any] = deque()  # the rest of the chunk taken last

    def __iter__(self) -> IMapIterator:
        return self

    def __next__(self, timeout: float | None = None) -> Any:
        """The next result.

        Raises: `multiprocessing.TimeoutError`; the error of the task, or of the iterable, whose turn it is.
        """
        if self._items:
            with contextlib.suppress(IndexError):  # another thread was quicker
                return _given(self._items.popleft())
        try:
            outcome = self._call.take(None if timeout is None else max(0.0, timeout))
        except _BuiltinTimeoutError:
            raise TimeoutError(f"no result within {timeout} s; next() may be called again") from None
        if outcome is None:
            raise StopIteration
        if outcome.error is not None:
            raise to_stdlib_error(outcome.error)
        assert outcome.results is not None, "neither results nor an error"
        if len(outcome.results) > 1:
            self._items.extend(outcome.results[1:])
        return _given(outcome.results[0])

    next = __next__

    def __del__(self) -> None:
        # Without its iterator nobody can take the results; the tasks go on, as in the standard library.
        call = getattr(self, "_call", None)
        if call is not None:
            call.abandon()


def _given(result: Any) -> Any:
    """Raises: the error of an item that failed where others of its chunk did not."""
    if type(result) is ItemFailure:
        raise to_stdlib_error(result.error)
    return result


class IMapUnorderedIterator(IMapIterator):
    """Yields results as they arrive."""
