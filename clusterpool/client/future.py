"""`LeanFuture`: a real `concurrent.futures.Future` that costs almost nothing until somebody watches it.

The standard Future makes a Condition, an RLock and two lists in its constructor: more work than sending the
task. Here they come into being when they are first asked for; most futures are only asked for their result.

    lock      `_LOCK`, one re-entrant lock for all futures; each future's Condition is built on it
    watcher   takes `_LOCK`; enters `_state = PENDING` in the instance unless it has a state; goes on by that
    finisher  writes the result; enters `_state = FINISHED` unless it has a state; if it had, takes `_LOCK`

A new future has no `_state` of its own (PENDING is the class's), and `dict.setdefault` with a string as key
is one atomic step, with a GIL and in a free-threaded build. So either the finisher's entry is first: nobody
had looked, there is nobody to tell, and every later watcher sees a finished future. Or a watcher's is first:
then the finisher, as everyone else, works under the lock, exactly as the standard Future does under its own.
(Tried: a flag "somebody watches" beside the state, in the manner of Dekker. It misses nobody, but
`concurrent.futures.wait` may then see a future as finished *and* be told of its end, and counts it twice.)
- The result is written before the state, so `done()` and the first look of `result()` need no lock.
- Only the owner of a task calls `finish` on its future, once, and only that may skip the lock. All the other
  ways to end a future (`finish_locked`, `set_result`, `cancel`) take it, which costs as much again. Should
  `finish` come second, it may leave its result or error behind, but the state and the outcome stand.

The price of one lock is that futures contend with one another, but it is held for a few attribute writes
and never while a callback or other code of a user runs. (The names that come from `_base` are the protocol
by which the standard library's `wait` and `as_completed` watch a future.)
"""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Callable, Generator
from concurrent.futures._base import (
    CANCELLED,
    CANCELLED_AND_NOTIFIED,
    FINISHED,
    LOGGER,
    PENDING,
    RUNNING,
)
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

# How `result()` of a future with a task handle waits: `wait_hook(is_done, timeout) -> is_done()`. The
# client sets it to its own loop-turning wait, which needs no other thread to wake up; without it the
# Condition is used.
wait_hook: Callable[[Callable[[], bool], float | None], bool] | None = None
# Makes waits inside `wait_hook` look at their predicates again after a change that no message caused.
wake_hook: Callable[[], None] | None = None

_LOCK = threading.RLock()
# A fork while another thread holds the lock would leave it locked for ever in the child.
os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)

_DONE_STATES = frozenset({CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED})
_CANCELLED_STATES = frozenset({CANCELLED, CANCELLED_AND_NOTIFIED})


class TaskHandle(Protocol):
    """What a future asks about its task; a `WorkerGroup` is one."""

    def cancel(self, task_number: int, /) -> bool: ...

    def is_running(self, task_number: int, /) -> bool: ...


class _MadeOnFirstUse:
    """An attribute that `make()` creates when it is first read; later reads find it in the instance.

    It has no `__set__`, so the instance's own entry, once there, wins without this code being called.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, future: LeanFuture[Any] | None, owner: type) -> Any:
        if future is None:
            return self
        with _LOCK:
            attributes = future.__dict__
            attributes.setdefault("_state", PENDING)
            # Two threads may both have missed the instance's entry; the second must find the first one's.
            if self._name not in attributes:
                attributes[self._name] = self._make()
            return attributes[self._name]


class LeanFuture(concurrent.futures.Future[T]):
    """A future whose constructor does nothing; finish it with `finish(value, error)`."""

    _state = PENDING
    _result = None
    _exception = None
    _condition = _MadeOnFirstUse(lambda: threading.Condition(_LOCK))
    _waiters = _MadeOnFirstUse(list)
    _done_callbacks = _MadeOnFirstUse(list)

    # Both set by the code that submitted the task, before anyone else has the future.
    _handle: TaskHandle | None = None
    _task_number = -1

    # Not even an empty Python function: `object`'s own takes half the time.
    __init__ = object.__init__

    # ------------------------------------------------------------------ finishing

    def finish(self, value: T | None, error: BaseException | None) -> bool:
        """Set the result, or the exception if `error` is given; False if the future was already done.

        Of a future with a task handle, only the owner of the task may call this.
        """
        if self._handle is None:
            return self.finish_locked(value, error)
        attributes = self.__dict__
        if error is None:
            attributes["_result"] = value
        else:
            attributes["_exception"] = error
        if attributes.setdefault("_state", FINISHED) is FINISHED:
            return True
        return self.finish_locked(value, error)

    def finish_locked(self, value: T | None, error: BaseException | None) -> bool:
        with _LOCK:
            attributes = self.__dict__
            if attributes.setdefault("_state", PENDING) in _DONE_STATES:
                return False
            attributes["_result"], attributes["_exception"] = value, error
            attributes["_state"] = FINISHED
            self._tell_waiters("add_result" if error is None else "add_exception")
        self._run_callbacks()
        return True

    def set_result(self, result: T) -> None:
        if not self.finish_locked(result, None):
            raise concurrent.futures.InvalidStateError(f"{self._state}: {self!r}")

    def set_exception(self, exception: BaseException | None) -> None:
        if not self.finish_locked(None, exception):
            raise concurrent.futures.InvalidStateError(f"{self._state}: {self!r}")

    def finish_cancelled(self) -> bool:
        """End as cancelled, waiters told; False if the future was already done."""
        with _LOCK:
            attributes = self.__dict__
            if attributes.setdefault("_state", PENDING) in _DONE_STATES:
                return False
            attributes["_state"] = CANCELLED_AND_NOTIFIED
            self._tell_waiters("add_cancelled")
        self._run_callbacks()
        if wake_hook is not None:
            wake_hook()
        return True

    def _tell_waiters(self, method: str) -> None:
        attributes = self.__dict__
        for waiter in attributes.get("_waiters", ()):
            getattr(waiter, method)(self)
        if "_condition" in attributes:
            attributes["_condition"].notify_all()

    def _run_callbacks(self) -> None:
        if "_done_callbacks" in self.__dict__:
            self._invoke_callbacks()  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ asking

    def done(self) -> bool:
        return self._state in _DONE_STATES

    def cancelled(self) -> bool:
        return self._state in _CANCELLED_STATES

    def running(self) -> bool:
        """Whether the task is in a worker at this moment."""
        if self._handle is None or self._state != PENDING:
            return self._state == RUNNING
        return self._handle.is_running(self._task_number) and self._state == PENDING

    def cancel(self) -> bool:
        """Cancel the task if it has not started; True only if it never will."""
        handle = self._handle
        if handle is None:
            return super().cancel()
        if self._state == PENDING and handle.cancel(self._task_number):
            # The engine reports the cancelled task as well, inside the call or later; that finds this done.
            self.finish_cancelled()
        return self._state in _CANCELLED_STATES

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[T]], object]) -> None:
        with _LOCK:
            callbacks = self._done_callbacks  # being watched comes before looking at the state
            if self._state not in _DONE_STATES:
                callbacks.append(fn)
                return
        try:
            fn(self)
        except Exception:  # as the standard Future: a callback's error is logged, never raised
            LOGGER.exception("exception calling callback for %r", self)

    def result(self, timeout: float | None = None) -> T:
        try:
            if self._state not in _DONE_STATES:
                self._wait_done(timeout)
            if self._state != FINISHED:
                raise concurrent.futures.CancelledError()
            if self._exception is not None:
                raise self._exception
            return self._result  # type: ignore[return-value]
        finally:
            # The exception's traceback holds this frame: with `self` in it, they and the future were a cycle.
            del self

    def exception(self, timeout: float | None = None) -> BaseException | None:
        if self._state not in _DONE_STATES:
            self._wait_done(timeout)
        if self._state != FINISHED:
            raise concurrent.futures.CancelledError()
        return self._exception

    def _wait_done(self, timeout: float | None) -> None:
        if timeout is not None and timeout < 0:
            timeout = 0
        if self._handle is not None and wait_hook is not None:
            is_done = wait_hook(self.done, timeout)
        else:
            condition = self._condition
            with condition:
                is_done = condition.wait_for(self.done, timeout)
        if not is_done:
            raise concurrent.futures.TimeoutError()

    def __await__(self) -> Generator[Any, None, T]:
        import asyncio

        return asyncio.wrap_future(self).__await__()

    def __reduce_ex__(self, protocol: object) -> Any:
        # The standard Future cannot be pickled either, because of its lock; this one may not have a lock yet.
        raise TypeError(f"cannot pickle {type(self).__name__!r} object: pass its result() instead")
