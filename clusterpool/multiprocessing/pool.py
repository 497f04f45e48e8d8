"""`Pool`: `multiprocessing.pool.Pool` on a cluster.

Every method, argument and exception is the standard library's. Where that one hurts, this one is better:
- a worker that dies never hangs the pool: its chunk is tried again, then fails with `WorkerDied`;
- an initializer that always fails ends the pending calls with an error instead of starting workers for ever;
- `imap` and `imap_unordered` read their iterable lazily, in a thread of its own, with a bounded window of
  tasks and bytes (`buffersize=`: exactly so many); why a thread is needed is told in `calls/lazy_call.py`;
- callbacks run in a thread of their own, so one that blocks or raises does not stop the pool;
- results can be awaited, a pool may be used inside a task of a pool, and `terminate` fails what waits for
  results.

    apply, map, starmap (+ _async)     chunks -> group.submit_chunks -> MapResult.task_done
    imap, imap_unordered               LazyCall (feeder thread, window) -> IMapIterator

Source: https://docs.python.org/3/library/multiprocessing.html#module-multiprocessing.pool
"""

from __future__ import annotations

import importlib
import operator
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from itertools import count
from typing import Any, NoReturn

from clusterpool.calls import engine
from clusterpool.calls.callbacks import CallbackThread
from clusterpool.calls.chunking import as_items, checked_chunksize, default_chunksize, split
from clusterpool.calls.lazy_call import LazyCall
from clusterpool.calls.progress import ProgressOption, checked_progress, new_progress_bar
from clusterpool.calls.window import FeedWindow, checked_buffersize
from clusterpool.calls.worker_setup import set_up_pool_worker
from clusterpool.client.resource_needs import checked_amounts
from clusterpool.client.task_limits import checked_timeout
from clusterpool.client.worker_group import GroupWorker, TaskKind, WorkerGroup
from clusterpool.errors import TaskCancelled, WorkerSetupFailed
from clusterpool.multiprocessing.imap import IMapIterator, IMapUnorderedIterator
from clusterpool.multiprocessing.results import ApplyResult, Callback, MapResult
from clusterpool.multiprocessing.workers import PoolWorker, WorkerTable
from clusterpool.serialization.exceptions import RemoteTraceback  # noqa: F401 (a name of the standard module, too)

__all__ = ["Pool", "ThreadPool"]  # noqa: F822 (ThreadPool comes through __getattr__)

INIT = "INIT"
RUN = "RUN"
CLOSE = "CLOSE"
TERMINATE = "TERMINATE"

AsyncResult = ApplyResult
RetryExceptions = bool | type[BaseException] | Sequence[type[BaseException]]

# How often a chunk whose worker died is tried again. Lower gives up on a node that goes down with several of
# its workers; higher lets a chunk that kills its worker each time kill more of them.
RETRIES_DEFAULT = 3

# How long `_pool` waits for workers that are being started, which takes milliseconds.
START_TIMEOUT_S = 10.0


class Pool:
    """A pool of worker processes on the cluster.

    `processes`: None means as many as the cluster has CPUs at any time: more when nodes join, fewer when nodes are
    lost; `_processes` says how many. `context` is accepted and not needed.
    `address`: the cluster to use, if none is in use yet. `resources`: what each worker takes of its node, as
    in `{"GPU": 1}`. `retries`: how often a chunk is tried again when its worker dies; the chunk is split then, so
    that only the item that kills its workers is lost in the end. `retry_exceptions`: True, or exception classes: a
    call that raises one is tried again as well. `safe_to_repeat`: True says that calls may run twice, even at the same
    time, with no harm done. Then, while no call waits and a worker is idle, one that takes more than twice as long as
    usual is started a second time, on another node if there is one; the first result counts, and the worker of the
    other attempt is killed and replaced. `progress`: True shows a tqdm bar for each map and imap; a dict
    gives tqdm's options.

    All calls take `timeout=`: seconds that the function may run for one item. Then its worker is killed and replaced,
    and the call, or the item's turn of an `imap`, raises `CallTimeout`. Items with a limit travel one by one, whatever
    the `chunksize`.

    Raises: ValueError or TypeError for an argument that cannot be right.
    """

    _group_class = WorkerGroup  # tests put a fake here

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any = None,
        *,
        address: str | None = None,
        resources: Mapping[str, float] | None = None,
        retries: int = RETRIES_DEFAULT,
        retry_exceptions: RetryExceptions = False,
        safe_to_repeat: bool = False,
        progress: bool | Mapping[str, Any] = False,
    ) -> None:
        self._state = INIT  # first, because __del__ runs even when the rest fails
        self._ctx = context
        self._maxtasksperchild = _checked_maxtasksperchild(maxtasksperchild)
        if initializer is not None and not callable(initializer):
            raise TypeError(f"initializer must be a callable, not {initializer!r}")
        self._initializer = initializer
        self._initargs = tuple(initargs)
        self._progress: ProgressOption = checked_progress(progress)
        if processes is not None:
            processes = _checked_processes(processes)
        if operator.index(retries) < 0:
            raise ValueError(f"retries must be 0 or more, not {retries}")
        if address is not None:
            engine.connect(address)
        self._job_counter = count()
        # What has not ended, by job number; keeps the results that the caller does not hold.
        self._cache: dict[int, ApplyResult | LazyCall] = {}
        self._callbacks = CallbackThread("clusterpool-callbacks")
        self._lock = threading.Lock()  # guards the closing of the group
        self._is_group_closed = False
        self._broken: WorkerSetupFailed | None = None
        size = processes if processes is not None else engine.cluster_cpus()
        self._setup_failures = _SetupFailures(failures_max=max(3, 2 * size))
        self._workers = WorkerTable()
        options: dict[str, Any] = {"resources": checked_amounts(resources), "retries": retries}
        if retry_exceptions is not False:
            options["retry_exceptions"] = retry_exceptions
        if safe_to_repeat:
            options["safe_to_repeat"] = True
        if processes is None:
            options["follows_cluster"] = True
        self._group = self._start_group(size, options)
        self._workers.watch(self._group)
        self._state = RUN

    def _start_group(self, size: int, options: dict[str, Any]) -> WorkerGroup:
        # The group must not keep the pool alive: a pool that nobody holds ends its workers.
        weak_self = weakref.ref(self)
        workers = self._workers

        def worker_died(worker: GroupWorker, reason: str) -> None:
            workers.worker_died(worker)

        def setup_failed(error: BaseException) -> None:
            pool = weak_self()
            # The first worker may fail before this constructor is done; its replacement will fail again.
            if pool is not None and pool._state != INIT:
                pool._handle_setup_failure(error)

        return self._group_class(
            size,
            name="pool",
            initializer=set_up_pool_worker,
            initargs=(self._initializer, self._initargs),
            tasks_per_worker_max=self._maxtasksperchild,
            on_worker_died=worker_died,
            on_setup_failed=setup_failed,
            **options,
        )

    # --- calls

    def apply(
        self,
        func: Callable[..., Any],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] = {},
        *,
        timeout: float | None = None,
    ) -> Any:
        """`func(*args, **kwds)` in a worker."""
        return self.apply_async(func, args, kwds, timeout=timeout).get()

    def apply_async(
        self,
        func: Callable[..., Any],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] = {},
        callback: Callback | None = None,
        error_callback: Callback | None = None,
        *,
        timeout: float | None = None,
    ) -> ApplyResult:
        """Start `func(*args, **kwds)` in a worker."""
        self._check_call(func)
        if type(args) is not tuple:
            args = _checked_args(args)
        result = ApplyResult(self, callback, error_callback)
        try:
            if timeout is None:
                result._task_number = self._group.submit(func, args, dict(kwds), result)
            else:
                result._task_number = self._group.submit(func, args, dict(kwds), result, timeout=timeout)
        except BaseException as error:
            self._drop(result)
            self._raise_if_closed(error)
            raise
        return result

    def map(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        *,
        timeout: float | None = None,
    ) -> list[Any]:
        """`[func(item) for item in iterable]`, in the workers."""
        result = self._map_async(func, iterable, TaskKind.MAP, chunksize, timeout=timeout)
        return result.get()  # type: ignore[no-any-return]

    def map_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
        *,
        timeout: float | None = None,
    ) -> MapResult:
        """Start a `map`; `callback` gets the list of all results."""
        return self._map_async(func, iterable, TaskKind.MAP, chunksize, callback, error_callback, timeout=timeout)

    def starmap(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        *,
        timeout: float | None = None,
    ) -> list[Any]:
        """`[func(*item) for item in iterable]`, in the workers."""
        result = self._map_async(func, iterable, TaskKind.STARMAP, chunksize, timeout=timeout)
        return result.get()  # type: ignore[no-any-return]

    def starmap_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
        *,
        timeout: float | None = None,
    ) -> MapResult:
        """Start a `starmap`; `callback` gets the list of all results."""
        return self._map_async(func, iterable, TaskKind.STARMAP, chunksize, callback, error_callback, timeout=timeout)

    def imap(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int = 1,
        *,
        buffersize: int | None = None,
        timeout: float | None = None,
    ) -> IMapIterator:
        """Results one by one, in order, from an iterable read lazily.

        `buffersize`: how many chunks may have been submitted and not yet yielded; None: a bound by items and
        bytes.
        """
        call = self._start_lazy_call(func, iterable, chunksize, buffersize, is_ordered=True, timeout=timeout)
        return IMapIterator(call)

    def imap_unordered(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int = 1,
        *,
        buffersize: int | None = None,
        timeout: float | None = None,
    ) -> IMapUnorderedIterator:
        """As `imap`, results in the order in which they arrive."""
        call = self._start_lazy_call(func, iterable, chunksize, buffersize, is_ordered=False, timeout=timeout)
        return IMapUnorderedIterator(call)

    # --- the end of a pool

    def close(self) -> None:
        """Take no more calls; the workers end when all that was begun is done."""
        if self._state == RUN:
            self._state = CLOSE
            self._close_group_when_idle()

    def terminate(self) -> None:
        """Kill the workers; calls that are not done fail with `TaskCancelled`."""
        if self._state == INIT:
            return
        self._state = TERMINATE
        self._workers.living()
        self._workers.pool_ended(exit_code=-9)
        self._stop_lazy_calls(TaskCancelled("the pool was terminated before this call was done"))
        self._group.terminate()
        self._group.join()
        self._callbacks.stop()

    def join(self) -> None:
        """Wait until all workers have ended.

        An `imap` whose results nobody takes meanwhile runs to its end, and keeps them.

        Raises: ValueError when the pool was neither closed nor terminated.
        """
        if self._state == RUN:
            raise ValueError("Pool is still running: call close() or terminate() before join()")
        if self._state not in (CLOSE, TERMINATE):
            raise ValueError("In unknown state")
        for call in list(self._cache.values()):
            if isinstance(call, LazyCall):
                call.lift_window()
                call.has_ended.wait()
        self._workers.living()
        if self._state == CLOSE:
            self._workers.pool_ended(exit_code=0)
        self._group.join()
        self._callbacks.join()

    def __enter__(self) -> Pool:
        self._check_running()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.terminate()

    def __del__(self, _warn: Any = warnings.warn, _run: str = RUN) -> None:
        if getattr(self, "_state", INIT) != _run:
            return
        _warn(f"unclosed running multiprocessing pool {self!r}", ResourceWarning, source=self)
        # A finalizer runs in any thread at any moment, also in one that holds the client's lock: `terminate` only
        # leaves a note then. (Tried: a thread for it. At the interpreter's end `Thread.start` waits for ever.)
        if not sys.is_finalizing():
            self._group.terminate()

    def __reduce__(self) -> NoReturn:
        raise NotImplementedError("pool objects cannot be passed between processes or pickled")

    def __repr__(self) -> str:
        cls = type(self)
        return f"<{cls.__module__}.{cls.__qualname__} state={self._state} pool_size={self._processes}>"

    # --- what programs read though its name begins with an underscore

    @property
    def _processes(self) -> int:
        """How many workers the pool has, or will soon have."""
        return self._group.size

    @property
    def _pool(self) -> list[PoolWorker]:
        """The worker processes, oldest first; waits for those that are being started."""
        if self._state == RUN and self._broken is None:
            engine.wait_until(lambda: len(self._group.workers()) >= self._processes, START_TIMEOUT_S)
        return self._workers.living()

    def _repopulate_pool(self) -> None:
        """Does nothing: workers are replaced as soon as they end."""

    def _check_running(self) -> None:
        if self._state != RUN:
            raise ValueError("Pool not running: it was closed or terminated; make a new one")

    # --- inside

    def _check_call(self, func: Any) -> None:
        if self._state != RUN:
            self._check_running()
        if not callable(func):
            raise TypeError(f"{type(func).__name__!r} object is not callable: func is {func!r}")
        if self._broken is not None:
            raise self._broken

    def _map_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        kind: TaskKind,
        chunksize: int | None = None,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
        *,
        timeout: float | None = None,
    ) -> MapResult:
        self._check_call(func)
        if chunksize is not None:
            chunksize = checked_chunksize(chunksize)
        if timeout is not None:
            chunksize = 1
        try:
            items = as_items(iterable)
        except Exception as error:  # The border to the user's iterable.
            if not hasattr(iterable, "__len__"):
                raise
            # The standard library copies only what has no length at once; other errors come with the result.
            failed = MapResult(self, 1, 1, callback, error_callback)
            failed.task_done(0, None, error, None)
            return failed
        if chunksize is None:
            chunksize = default_chunksize(len(items), self._processes)
        name = getattr(func, "__name__", "map")
        bar = new_progress_bar(self._progress, total=len(items), name=name) if self._progress else None
        result = MapResult(self, chunksize, len(items), callback, error_callback, bar)
        if items:
            options = {} if timeout is None else {"timeout": timeout}
            self._submit_chunks(func, split(items, chunksize), result, kind, **options)
        return result

    def _submit_chunks(
        self, func: Callable[..., Any], chunks: list[Sequence[Any]], result: MapResult, kind: TaskKind, **options: Any
    ) -> None:
        try:
            result._task_numbers = self._group.submit_chunks(func, chunks, result, kind=kind, **options)
        except BaseException as error:
            self._drop(result)
            self._raise_if_closed(error)
            raise

    def _start_lazy_call(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int,
        buffersize: int | None,
        *,
        is_ordered: bool,
        timeout: float | None = None,
    ) -> LazyCall:
        self._check_call(func)
        chunksize = checked_chunksize(chunksize)
        if timeout is not None:
            checked_timeout(timeout)
            chunksize = 1
        buffersize = checked_buffersize(buffersize)
        if not hasattr(iterable, "__iter__") and not hasattr(iterable, "__getitem__"):
            raise TypeError(f"{type(iterable).__name__!r} object is not iterable")
        bar = None
        if self._progress:
            total = len(iterable) if isinstance(iterable, Sized) else None
            bar = new_progress_bar(self._progress, total=total, name=getattr(func, "__name__", "imap"))
        job = next(self._job_counter)
        call = LazyCall(
            self._group,
            func,
            window=FeedWindow(workers=self._processes, chunksize=chunksize, buffersize=buffersize),
            is_ordered=is_ordered,
            # Holds the pool until the call has ended, as a result does.
            on_ended=lambda: self._lazy_call_ended(job),
            progress_bar=bar,
            timeout=timeout,
        )
        self._cache[job] = call
        call.start(iterable, chunksize)
        return call

    def _lazy_call_ended(self, job: int) -> None:
        self._cache.pop(job, None)
        if self._state == CLOSE:
            self._close_group_when_idle()

    def _close_group_when_idle(self) -> None:
        """A closed group takes no tasks, and a lazy call that began before `close` has more to submit."""
        with self._lock:
            if self._is_group_closed or any(isinstance(call, LazyCall) for call in list(self._cache.values())):
                return
            self._is_group_closed = True
        self._group.close()

    def _stop_lazy_calls(self, error: BaseException) -> None:
        for call in list(self._cache.values()):
            if isinstance(call, LazyCall):
                call.stop(error)

    def _handle_setup_failure(self, error: BaseException) -> None:
        """Called by the group, which starts another worker; give up when that cannot help."""
        if self._broken is not None or not self._setup_failures.is_hopeless_after(self._group.pending()):
            return
        name = getattr(self._initializer, "__qualname__", repr(self._initializer))
        broken = WorkerSetupFailed(
            f"the initializer {name} failed in {self._setup_failures.failures} workers one after another "
            f"with {type(error).__name__}: {error}; no task was done meanwhile; "
            "mend the initializer and make a new pool"
        )
        broken.__cause__ = error
        self._broken = broken
        self._stop_lazy_calls(broken)
        for result in list(self._cache.values()):
            if isinstance(result, ApplyResult):
                result._end(None, broken)
        self._group.terminate()

    def _drop(self, result: ApplyResult) -> None:
        result._pool = None
        self._cache.pop(result._job, None)

    def _raise_if_closed(self, error: BaseException) -> None:
        """Another thread may close the pool between the check and the submission, or its initializer fail."""
        if self._broken is not None:
            raise self._broken
        if isinstance(error, RuntimeError) and self._state != RUN:
            raise ValueError("Pool not running: it was closed or terminated; make a new one") from error


class _SetupFailures:
    """Counts failures of the initializer with no task done between them."""

    def __init__(self, *, failures_max: int) -> None:
        self._failures_max = failures_max
        self._pending_before = 0
        self.failures = 0

    def is_hopeless_after(self, pending: int) -> bool:
        """Record a failure; `pending`: the tasks not done now."""
        if pending < self._pending_before:
            self.failures = 0
        self._pending_before = pending
        self.failures += 1
        return self.failures >= self._failures_max


def _checked_processes(processes: Any) -> int:
    number = operator.index(processes)
    if number < 1:
        raise ValueError(
            f"Number of processes must be at least 1, not {number}; leave it out to use every CPU of the cluster"
        )
    return number


def _checked_maxtasksperchild(maxtasksperchild: Any) -> int | None:
    if maxtasksperchild is None:
        return None
    if not isinstance(maxtasksperchild, int) or maxtasksperchild <= 0:
        raise ValueError(f"maxtasksperchild must be a positive int or None, not {maxtasksperchild!r}")
    return maxtasksperchild


def _checked_args(args: Any) -> tuple[Any, ...]:
    try:
        return tuple(args)
    except TypeError:
        raise TypeError(f"args must be a sequence of arguments: args=({args!r},), not {args!r}") from None


def __getattr__(name: str) -> Any:
    """Every other name is the standard library's, imported when asked for, to start up quickly."""
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    standard = importlib.import_module("multiprocessing.pool")
    if standard is sys.modules[__name__]:  # `run --patch` has put this module there, with all names of the standard one
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(standard, name)
