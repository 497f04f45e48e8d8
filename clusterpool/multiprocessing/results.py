"""What the asynchronous calls of a pool return: `ApplyResult` (= `AsyncResult`) and `MapResult`.

Each is a sink of the worker group. Without callbacks a result becomes ready in the client's loop, which a
waiting thread turns itself: no other thread stands between the worker's answer and `get`. With callbacks it
becomes ready in the pool's callback thread, after the callback has run, as in the standard library.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from multiprocessing import TimeoutError
from typing import TYPE_CHECKING, Any, ClassVar

from clusterpool.calls import waiting
from clusterpool.calls.callbacks import report_callback_error
from clusterpool.client.future import LeanFuture
from clusterpool.client.worker_group import GroupWorker
from clusterpool.errors import NotConnected, SerializationFailed, TaskCancelled, TaskTimeout

if TYPE_CHECKING:
    from clusterpool.multiprocessing.pool import Pool

Callback = Callable[[Any], Any]


class CallTimeout(TaskTimeout, TimeoutError):
    """A call of a pool ran for longer than its `timeout=`: also a `multiprocessing.TimeoutError`."""


# Guards the making of futures, which is rare: a lock for each result would cost more than the result.
_future_lock = threading.Lock()


class ApplyResult:
    """The result of one call, as `multiprocessing.pool.AsyncResult`; it can also be awaited."""

    # Defaults of the class, because each attribute set in __init__ costs time in every call.
    _callback: Callback | None = None
    _error_callback: Callback | None = None
    _value: Any = None
    _error: BaseException | None = None
    _has_ended = False  # the outcome is here; the callback may still run
    _is_ready = False
    _future: LeanFuture[Any] | None = None
    _task_number = 0
    _is_cancelled = False

    def __init__(self, pool: Pool, callback: Callback | None = None, error_callback: Callback | None = None) -> None:
        self._pool: Pool | None = pool  # kept until the result is ready: it must not be collected before
        if callback is not None:
            self._callback = callback
        if error_callback is not None:
            self._error_callback = error_callback
        self._job = job = next(pool._job_counter)
        pool._cache[job] = self

    def ready(self) -> bool:
        return self._is_ready

    def successful(self) -> bool:
        """Raises: ValueError when the result is not there yet."""
        if not self._is_ready:
            raise ValueError(f"{self!r} not ready")
        return self._error is None

    def wait(self, timeout: float | None = None) -> None:
        if not self._is_ready:
            waiting.wait_until(self.ready, None if timeout is None else max(0.0, timeout))

    def get(self, timeout: float | None = None) -> Any:
        """Raises: `multiprocessing.TimeoutError`; the error of the call."""
        if not self._is_ready:
            self.wait(timeout)
            if not self._is_ready:
                if timeout is None:
                    raise NotConnected("the client was shut down while a result was waited for")
                raise TimeoutError(f"no result within {timeout} s; the call goes on, get() may be called again")
        if self._error is None:
            return self._value
        raise self._error

    def cancel(self) -> bool:
        """Stop the call: it is dropped if it has not started, else its worker is killed and replaced.

        Returns: whether it will certainly not run to its end; then `get` raises `TaskCancelled`. A `map` is stopped as
        far as it is not done.
        """
        pool = self._pool
        if pool is None or self._has_ended:
            return self.cancelled()
        for number in self._numbers():
            if pool._group.cancel(number, force=True):
                self._is_cancelled = True
        return self._is_cancelled

    def cancelled(self) -> bool:
        """Whether the call was stopped before it was done."""
        return self._is_cancelled or isinstance(self._error, TaskCancelled)

    def _numbers(self) -> Sequence[int]:
        return [self._task_number]

    def future(self) -> Future[Any]:
        """The same result as a `concurrent.futures.Future`."""
        with _future_lock:
            if self._future is None:
                self._future = LeanFuture()
            future = self._future
        if self._is_ready:
            future.finish(self._value, self._error)
        return future

    def __await__(self) -> Generator[Any, None, Any]:
        import asyncio

        return asyncio.wrap_future(self.future()).__await__()

    def task_done(self, index: int, value: Any, error: BaseException | None, worker: GroupWorker | None) -> None:
        """Called by the group."""
        self._end(value, error)

    def _end(self, value: Any, error: BaseException | None) -> None:
        """Take the outcome; only the first counts (a broken pool ends its results before the group does)."""
        if self._has_ended:
            return
        self._has_ended = True
        if error is None and self._is_cancelled:
            error = TaskCancelled("the call was cancelled while it ran")
        if error is None:
            self._value = value
            callback = self._callback
        else:
            self._error = error = to_stdlib_error(error)
            # A pool that is terminated calls nobody back, as in the standard library.
            callback = None if isinstance(error, TaskCancelled) else self._error_callback
        if callback is None:
            self._become_ready()
            return
        assert self._pool is not None, "ready before it ended"
        outcome = value if error is None else error
        self._pool._callbacks.run(lambda: self._call_back(callback, outcome))

    def _call_back(self, callback: Callback, outcome: Any) -> None:
        try:
            callback(outcome)
        except BaseException:  # The border to user code: whatever it raises, `get` must not hang.
            report_callback_error()
        self._become_ready()
        waiting.wake_waiters()

    def _become_ready(self) -> None:
        pool = self._pool
        if pool is None:
            return
        self._pool = None
        pool._cache.pop(self._job, None)
        self._is_ready = True
        # Either this sees the future or `future` sees `_is_ready`, for each writes before it reads. When both
        # do, the second finish changes nothing.
        if self._future is not None:
            self._future.finish(self._value, self._error)

    __class_getitem__: ClassVar[Any] = classmethod(types.GenericAlias)


AsyncResult = ApplyResult


class MapResult(ApplyResult):
    """The results of a `map`, in order; ready when all chunks are, even when one failed.

    With errors, `get` raises the one that came first.
    """

    def __init__(
        self,
        pool: Pool,
        chunksize: int,
        length: int,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
        progress_bar: Any | None = None,
    ) -> None:
        super().__init__(pool, callback, error_callback)
        self._value = [None] * length
        self._chunksize = chunksize
        self._progress_bar = progress_bar
        # Guards `_number_left`: two threads may hand over results of different messages at once.
        self._lock = threading.Lock()
        self._number_left = -(-length // chunksize) if length else 0
        self._task_numbers: Sequence[int] = ()
        if not length:
            # As in the standard library, the callback is not called: there was nothing to wait for.
            self._become_ready()

    def task_done(self, index: int, value: Any, error: BaseException | None, worker: GroupWorker | None) -> None:
        """Called by the group. What it costs, each chunk of `map(chunksize=1)` costs."""
        if error is not None:
            if self._error is None:
                self._error = error
        elif self._chunksize == 1:
            self._value[index] = value[0]
        else:
            start = index * self._chunksize
            self._value[start : start + len(value)] = value
        if self._progress_bar is not None and value is not None:
            self._progress_bar.update(len(value))
        with self._lock:
            self._number_left -= 1
            is_last = not self._number_left
        if is_last:
            self._end(self._value, self._error)

    def item_index(self, index: int, position: int) -> int:
        """Called by the group."""
        return index * self._chunksize + position

    def _numbers(self) -> Sequence[int]:
        return self._task_numbers

    def _become_ready(self) -> None:
        if self._error is not None:
            self._value = None
        if self._progress_bar is not None:
            self._progress_bar.close()
            self._progress_bar = None
        super()._become_ready()


class _Text:
    """Something whose representation is a text made elsewhere."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def to_stdlib_error(error: BaseException) -> BaseException:
    """`MaybeEncodingError`, as in the standard library, for a result that could not be pickled; `CallTimeout`."""
    if isinstance(error, TaskTimeout):
        return CallTimeout(*error.args)
    if not isinstance(error, SerializationFailed):
        return error
    if not error.value_repr:
        return error  # something other than a result could not be pickled
    from multiprocessing.pool import MaybeEncodingError  # type: ignore[attr-defined]

    converted: BaseException = MaybeEncodingError(_Text(error.reason), _Text(error.value_repr))
    converted.__cause__ = error.__cause__
    return converted
