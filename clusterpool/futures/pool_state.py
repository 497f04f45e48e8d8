"""What an executor shares with its futures: the worker group, what is pending, and whether it is broken.

It is an object of its own, so that an executor which the program has dropped can be collected while its
tasks go on, as the standard library's can.

    executor ──► PoolState ◄── TaskFuture (the engine holds it as the sink of its task)
        ▲            │  ▲
        └─ finalizer │  └── MapRun (likewise)
                     ▼
                 WorkerGroup ── worker_died, setup_failed ──► PoolState

At the interpreter's exit all pending work is awaited, as the standard library does. That one does it before
the remaining non-daemon threads are joined, by a private hook of `threading`, and so before the program's own
`atexit` handlers (which remove what the calls read, or sum up what they did). So do we; but we go on taking
calls, and await those after the threads, by `atexit`: a thread that outlives the main thread may still submit.
That second hook must run before the client's own end: `atexit` runs what was registered last first, and each
executor moves the hook to the top when it starts, which is after the client did.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FuturesTimeoutError
from concurrent.futures._base import PENDING
from pickle import PicklingError
from typing import TYPE_CHECKING, Any, NoReturn

from clusterpool import errors
from clusterpool.calls import engine
from clusterpool.calls.callbacks import CallbackThread
from clusterpool.client.future import LeanFuture

if TYPE_CHECKING:
    from clusterpool.client.worker_group import GroupWorker, WorkerGroup
    from clusterpool.futures.map_run import MapRun


# For so long `cancel` waits for a worker that may be deaf: user code in C that keeps the GIL.
RECALL_PATIENCE_S = 0.05


class NotPicklable(errors.SerializationFailed, PicklingError):
    """A result that cannot be pickled: a TypeError and a PicklingError, since the standard executor raises
    either."""


class FutureTaskTimeout(errors.TaskTimeout, FuturesTimeoutError):
    """A call of an executor ran for longer than its limit: also a `concurrent.futures.TimeoutError`."""


class TaskFuture(LeanFuture[Any]):
    """The future of one call, and the sink that the engine reports its end to."""

    _handle: PoolState

    def task_done(self, index: int, value: Any, error: BaseException | None, worker: GroupWorker | None) -> None:
        pool = self._handle
        if error is not None:
            error = pool.translated(error)
        if isinstance(error, CancelledError):
            self.finish_cancelled()
        else:
            self.finish(value, error)
        pool.pending.discard(self)

    def load_failed(self, index: int, error: BaseException, worker: GroupWorker | None) -> None:
        self.task_done(index, None, load_error(error), worker)

    def cancel(self) -> bool:
        """Cancel the call if it has not started; True only if it never will.

        One that waits in a worker, behind a call that runs, is asked back; that takes microseconds, unless the worker
        is deaf: then the answer is no, though the call may still be dropped later.
        """
        if super().cancel():
            return True
        pool = self._handle
        if self._state == PENDING and not self.running():
            engine.wait_until(self.done, pool.recall_patience_s)
            if not self.done():
                pool.recall_patience_s /= 2  # else a thousand calls behind a deaf worker would take a minute
        return self.cancelled()

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        if not self.done():
            self._handle.prepare_callbacks()
        super().add_done_callback(fn)

    def _run_callbacks(self) -> None:
        if "_done_callbacks" in self.__dict__:
            self._handle.run_callbacks(self)


class PoolState:
    """The part of an executor that lives until its last task is done."""

    def __init__(self, *, retries: int | None, cancels_running: bool = False) -> None:
        self.retries = retries
        self.cancels_running = cancels_running
        self.recall_patience_s = RECALL_PATIENCE_S
        # A view with retries of its own was made: a worker's death alone no longer says that a call failed.
        self.is_tolerant = False
        self.group: WorkerGroup | None = None
        # The group's `submit` while calls are accepted. None: not started yet, closed, or broken.
        self.send: Callable[..., int] | None = None
        self.is_closed = False
        self.failure: str | None = None
        self.failure_cause: BaseException | None = None
        # Single operations on a set are atomic; it needs no lock.
        self.pending: set[TaskFuture] = set()
        self.runs: weakref.WeakSet[MapRun] = weakref.WeakSet()
        self.exit_code_by_process_id: dict[str, int | None] = {}
        # For done-callbacks, which the standard library runs in a thread of its own, too. In the thread that
        # turns the client's loop, one that waits for a lock would keep everybody from the loop, also the
        # thread that has the lock and submits a large argument.
        self._callbacks = CallbackThread("clusterpool-callbacks")
        self._callback_ident = 0
        self._lock = threading.Lock()
        self._process = os.getpid()

    def open(self, size: int | None, **options: Any) -> Callable[..., int]:
        """Start the workers, unless another thread just did; the function that sends a call."""
        with self._lock:
            if self.send is None:
                if self.is_closed or self.failure is not None or _exiting:
                    self.refuse()
                self.group = engine.open_group(
                    size,
                    retries=self.retries,
                    on_worker_died=self.worker_died,
                    on_setup_failed=self.setup_failed,
                    **options,
                )
                self.send = self.group.submit
                _watch_exit(self)
            return self.send

    def refuse(self) -> NoReturn:
        if self.failure is not None:
            raise self.broken_error()
        if self.is_closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    # ------------------------------------------------------------------ the futures' task handle

    def cancel(self, task_number: int) -> bool:
        if self.group is None:
            return False
        if self.cancels_running:
            return self.group.cancel(task_number, force=True)
        return self.group.cancel(task_number)

    def is_running(self, task_number: int) -> bool:
        return self.group is not None and self.group.is_running(task_number)

    # ------------------------------------------------------------------ ends of tasks

    def prepare_callbacks(self) -> None:
        """Start the thread of the callbacks now: at the interpreter's exit, when the call may end, none can start."""
        self._callbacks.start()

    def run_callbacks(self, future: TaskFuture) -> None:
        """Run the callbacks of a finished future in their thread, in the order of the futures' ends."""

        def run() -> None:
            self._callback_ident = threading.get_ident()
            future._invoke_callbacks()  # type: ignore[attr-defined]

        self._callbacks.run(run)

    def wait_callbacks(self, timeout_s: float) -> None:
        """Wait until the callbacks of all futures that are done have run."""
        self._callbacks.join(timeout_s)

    def translated(self, error: BaseException) -> BaseException:
        """What the standard library promises in place of the engine's errors; others unchanged."""
        if isinstance(error, errors.TaskCancelled):
            return CancelledError() if self.failure is None else self.broken_error()
        if isinstance(error, (errors.WorkerDied, errors.NodeDied)):
            if not self.retries and not self.is_tolerant:
                self.break_pool(_sentence(error), error)
                return self.broken_error()
            return _broken_process_pool(
                f"A process was terminated abruptly in every attempt at the call: {error}", error
            )
        if isinstance(error, errors.TaskTimeout):
            return _as_future_timeout(error)
        if isinstance(error, errors.SerializationFailed) and not isinstance(error, PicklingError):
            wrapped = NotPicklable(*error.args)
            wrapped.__cause__ = error
            return wrapped
        return error

    def worker_died(self, worker: GroupWorker, text: str) -> None:
        self.exit_code_by_process_id[worker.process_id] = worker.exit_code
        if not self.retries and not self.is_tolerant and not self.is_finished():
            self.break_pool(text, errors.WorkerDied(text))

    def setup_failed(self, error: BaseException) -> None:
        text = f"the initializer of a worker raised {type(error).__name__}: {error}"
        self.break_pool(str(error) if isinstance(error, errors.WorkerSetupFailed) else text, error)

    def break_pool(self, text: str, cause: BaseException) -> None:
        """End every pending call with BrokenProcessPool, refuse new ones, kill the workers."""
        with self._lock:
            if self.failure is not None:
                return
            self.failure, self.failure_cause = text, cause
            self.send = None
            runs = list(self.runs)
        for future in list(self.pending):
            future.finish_locked(None, self.broken_error())
            self.pending.discard(future)
        for run in runs:
            run.fail(self.broken_error())
        if self.group is not None:
            self.group.terminate()

    def broken_error(self) -> BaseException:
        return _broken_process_pool(
            "A process in the process pool was terminated abruptly while the future was running or "
            f"pending, and the pool is not usable anymore: {self.failure}. Make a new executor; with "
            "retries= it would replace such a worker and run its calls again.",
            self.failure_cause,
        )

    # ------------------------------------------------------------------ the end

    def close(self) -> None:
        """Accept no more calls; the workers end when the pending ones are done. Any number of times."""
        with self._lock:
            self.is_closed = True
            self.send = None
            group = self.group
        if group is not None and self._process == os.getpid():
            group.close()

    def cancel_pending(self) -> None:
        """Cancel what no worker has, nor was about to have: there, as many calls are in a queue of the workers' own."""
        waiting = sorted(
            (future for future in list(self.pending) if not future.running()), key=lambda future: future._task_number
        )
        idle = 0 if self.group is None else self.group.size - (len(self.pending) - len(waiting))
        for future in waiting[max(0, idle) :]:
            future.cancel()
        with self._lock:
            runs = list(self.runs)
        for run in runs:
            run.cancel_from(0)

    def wait_ended(self) -> None:
        """Wait for all calls, their callbacks and the workers.

        Raises:
            RuntimeError: called from a callback of one of these calls, which would wait for itself.
        """
        if self.group is None or self._process != os.getpid():
            return
        if threading.get_ident() == self._callback_ident:
            raise RuntimeError("cannot join current thread: shutdown(wait=True) was called by a future's callback")
        try:
            engine.wait_until(self.is_idle, None)
        except errors.NotConnected:
            pass  # the cluster has ended before, and the calls with it
        self.group.join()
        self._callbacks.join()

    def wait_submitted(self) -> None:
        """Wait for the calls that were submitted so far, and their callbacks; others may come meanwhile."""
        if self.group is None or self._process != os.getpid():
            return
        waiting: list[TaskFuture | MapRun] = [*self.pending, *self.runs]

        def are_done() -> bool:
            while waiting and waiting[-1].done():
                waiting.pop()
            return not waiting

        try:
            engine.wait_until(are_done, None)
        except errors.NotConnected:
            return
        self._callbacks.join()

    def is_idle(self) -> bool:
        return not self.pending

    def is_finished(self) -> bool:
        """Whether the executor was shut down and all of its calls are done: a death then is no failure."""
        return self.is_closed and not self.pending and self.group is not None and not self.group.pending()


def load_error(error: BaseException) -> BaseException:
    """What a call or a result that cannot be unpickled is to its caller: there, the pool would be broken."""
    if isinstance(error, errors.VersionMismatch):
        return error
    return _broken_process_pool(
        f"The call could not be unpickled in a worker, or its result here: {type(error).__name__}: {error}. "
        "Only this call fails; the executor goes on.",
        error,
    )


def _as_future_timeout(error: errors.TaskTimeout) -> BaseException:
    """Before Python 3.11 `concurrent.futures.TimeoutError` is no builtin TimeoutError."""
    return error if isinstance(error, FuturesTimeoutError) else FutureTaskTimeout(*error.args)


def _sentence(error: BaseException) -> str:
    return str(error).rstrip(". ") or type(error).__name__


def _broken_process_pool(text: str, cause: BaseException | None) -> BaseException:
    # Late, because the import takes some 20 ms and nearly no program needs it.
    from concurrent.futures.process import BrokenProcessPool

    error = BrokenProcessPool(text)
    error.__cause__ = cause
    return error


# ---------------------------------------------------------------------- executors that the program dropped

_dropped: queue.SimpleQueue[PoolState] = queue.SimpleQueue()
_closer: threading.Thread | None = None


def close_when_dropped(executor: object, pool: PoolState) -> None:
    """Close `pool` some time after `executor` was collected, if it was not shut down before."""
    finalizer = weakref.finalize(executor, _dropped.put, pool)
    finalizer.atexit = False


def _close_dropped() -> None:
    # A finalizer may run anywhere, also inside the client while it holds its lock; so it only puts the pool
    # into this queue, which is safe there, and a thread closes it.
    while True:
        _dropped.get().close()


# ---------------------------------------------------------------------- the interpreter's exit

_live: weakref.WeakSet[PoolState] = weakref.WeakSet()
_exiting = False
_awaits_early = False


def _watch_exit(pool: PoolState) -> None:
    global _closer, _awaits_early
    _live.add(pool)
    if not _awaits_early:
        _awaits_early = True
        with contextlib.suppress(RuntimeError):  # this is a thread that outlives the main thread
            threading._register_atexit(await_submitted_before_exit_handlers)  # type: ignore[attr-defined]
    atexit.unregister(await_pending_at_exit)
    atexit.register(await_pending_at_exit)
    if _closer is None:
        _closer = threading.Thread(target=_close_dropped, name="clusterpool-closer", daemon=True)
        _closer.start()


def await_submitted_before_exit_handlers() -> None:
    """The main thread has ended: let finish what was submitted until now."""
    for pool in list(_live):
        pool.wait_submitted()


def await_pending_at_exit() -> None:
    """As the standard executor does: let what was submitted finish before the interpreter ends."""
    global _exiting
    _exiting = True
    pools = list(_live)
    for pool in pools:
        pool.close()
    for pool in pools:
        pool.wait_ended()
