"""`ProcessPoolExecutor`: the standard library's, on the workers of a cluster."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import operator
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from clusterpool.calls import engine
from clusterpool.calls.worker_setup import set_up_worker
from clusterpool.client.resource_needs import checked_amounts
from clusterpool.client.task_limits import checked_exceptions, checked_timeout
from clusterpool.futures.map_run import MapRun
from clusterpool.futures.pool_state import PoolState, TaskFuture, close_when_dropped
from clusterpool.futures.worker_process import WorkerProcess

T = TypeVar("T")
RetryExceptions = bool | type[BaseException] | Sequence[type[BaseException]]

# How long reading `_processes` waits for workers that are being started: they take milliseconds, a loaded
# machine a second; a worker that cannot start must not hang the reader.
_WORKERS_READY_S = 10.0
# How long the end of a `map` waits for the callbacks of its futures: they count and draw, in microseconds. One that
# blocks would else hold the program for ever, which the standard library's do not.
_CALLBACKS_END_S = 1.0


class ProcessPoolExecutor(concurrent.futures.Executor):
    """Runs calls in worker processes of a cluster, on this machine or on many.

    All arguments of the standard executor mean what they mean there. `max_workers` None takes a worker for
    each CPU of the cluster, as nodes come and go; workers start at the first call. Beyond the standard:

    - `address`: the cluster, where the usual rule would not find it.
    - `resources`: what each worker needs, by name, such as `{"GPU": 1}`.
    - `retries`: how often a call whose worker died is run again. None keeps the standard rule: the first
      worker that dies breaks the pool, and every pending call ends with BrokenProcessPool; but the loss of a whole
      node, for which that has no rule, is survived: its calls are run again on others. With 0 that breaks the pool,
      too, and no call is started twice.
    - `retry_exceptions`: True, or exception classes: a call that raises one is run again as well, as often as
      `retries` says.
    - `timeout`: seconds that a call may run (with `map`, for one item). Then its worker is killed and replaced, and
      the call raises TaskTimeout, a TimeoutError. `options(timeout=)` gives an executor on the same workers with
      another limit.
    - `cancel_running`: `Future.cancel()` also stops a call that runs, by killing its worker, which is replaced. Each
      call is then sent alone, when a worker is free: tiny ones take some 0.1 ms each.
    - `safe_to_repeat`: calls may run twice, even at the same time, with no harm done. Then, while no call waits and a
      worker is idle, one that takes more than twice as long as usual is started a second time, on another node if
      there is one; the first result counts, and the worker of the other attempt is killed and replaced.

    Source: https://docs.python.org/3/library/concurrent.futures.html#processpoolexecutor (up to 3.14)
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: Any = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        address: str | None = None,
        resources: dict[str, float] | None = None,
        retries: int | None = None,
        retry_exceptions: RetryExceptions = False,
        timeout: float | None = None,
        cancel_running: bool = False,
        safe_to_repeat: bool = False,
        name: str = "executor",
    ) -> None:
        if max_workers is not None and operator.index(max_workers) <= 0:
            raise ValueError("max_workers must be greater than 0")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        _check_tasks_per_child(max_tasks_per_child, mp_context)
        _check_retries(retries)
        checked_timeout(timeout)
        self._size = max_workers
        self._context = mp_context
        self._options: dict[str, Any] = {
            "address": address,
            "resources": checked_amounts(resources),
            "name": str(name),
            "tasks_per_worker_max": max_tasks_per_child,
        }
        self._options |= {"initializer": set_up_worker, "initargs": (initializer, tuple(initargs))}
        if retry_exceptions is not False:
            checked_exceptions(retry_exceptions)
            self._options["retry_exceptions"] = retry_exceptions
        if cancel_running:
            self._options["kills_cancelled"] = True
        if safe_to_repeat:
            self._options["safe_to_repeat"] = True
        if timeout is not None:
            self._options["timeout"] = timeout
        self._pool = PoolState(retries=retries, cancels_running=cancel_running)
        self._relatives: list[ProcessPoolExecutor] = []  # made by `options(resources=)`, shut down with this one
        close_when_dropped(self, self._pool)

    # ------------------------------------------------------------------ calls

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[T]:
        """Schedule `fn(*args, **kwargs)`; every keyword belongs to `fn`.

        Raises:
            RuntimeError: the executor was shut down, or the interpreter is ending.
            BrokenProcessPool: a worker died or could not run the initializer.
        """
        pool = self._pool
        future: TaskFuture = TaskFuture()
        future._handle = pool
        pool.pending.add(future)
        try:
            future._task_number = (pool.send or self._open())(fn, args, kwargs, future)
        except BaseException:
            pool.pending.discard(future)
            if pool.is_closed or pool.failure is not None:  # perhaps just now, by another thread
                pool.refuse()
            raise
        return future

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """As `map(fn, *iterables)`; values in order.

        `timeout`: seconds from this call on. `chunksize`: items a task; 1 is as fast as more, because small
        tasks travel together anyway. `buffersize`: read the iterables lazily, with so many tasks' results
        outstanding.

        Raises:
            TimeoutError: at `next`, when the value is not there in time.
        """
        if buffersize is None and chunksize >= 1 and self._has_other_submit():
            chunks = _chunks(zip(*iterables, strict=False), chunksize)
            return _with_callbacks(super().map(functools.partial(_run_chunk, fn), chunks, timeout=timeout), self._pool)
        return self._map(fn, iterables, timeout, chunksize, buffersize)

    def _has_other_submit(self) -> bool:
        """Whether a subclass or a caller has replaced `submit`, which the standard `map` calls for each chunk.

        tqdm's `process_map` does, and counts by the futures.
        """
        return getattr(self.submit, "__func__", None) is not ProcessPoolExecutor.submit

    def _map(
        self,
        fn: Callable[..., T],
        iterables: Sequence[Iterable[Any]],
        iteration_s: float | None,
        chunksize: int,
        buffersize: int | None,
        **options: Any,
    ) -> Iterator[T]:
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if "timeout" in options or "timeout" in self._options:
            chunksize = 1  # the limit is each item's
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        end_time = None if iteration_s is None else iteration_s + time.monotonic()
        if self._pool.send is None:
            self._open()
        items = iter(iterables[0]) if len(iterables) == 1 else zip(*iterables, strict=False)
        kind = engine.chunk_kind(is_star=len(iterables) != 1)
        run = MapRun(self._pool, fn, _chunks(items, chunksize), chunksize=chunksize, kind=kind, **options)
        run.send(buffersize)
        values = run.results(end_time, is_lazy=buffersize is not None)
        if buffersize is None:
            return values
        # A lazy map still needs its executor: were it collected, the rest of the items would be lost in
        # silence.
        return _keeping(self, values)

    def options(
        self,
        *,
        retries: int | None = None,
        timeout: float | None = None,
        resources: dict[str, float] | None = None,
        name: str | None = None,
    ) -> concurrent.futures.Executor:
        """An executor whose calls have other options.

        `retries` and `timeout`: the same workers. `resources` or `name`: workers of its own, as many, which are
        shut down with this executor's.
        """
        checked_timeout(timeout)
        checked_amounts(resources)
        _check_retries(retries)
        if resources is None and name is None:
            return ExecutorView(self, self._pool.retries if retries is None else retries, timeout)
        relative = ProcessPoolExecutor(self._size, retries=self._pool.retries if retries is None else retries)
        relative._context = self._context
        relative._pool.cancels_running = self._pool.cancels_running
        relative._options = dict(self._options)
        if timeout is not None:
            relative._options["timeout"] = timeout
        relative._options.update({k: v for k, v in (("resources", resources), ("name", name)) if v is not None})
        self._relatives.append(relative)
        return relative

    def _open(self) -> Callable[..., int]:
        return self._pool.open(self._size, **self._options)

    # ------------------------------------------------------------------ the end

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more calls; with `wait`, return when all are done and the workers have ended."""
        self._pool.close()
        if cancel_futures:
            self._pool.cancel_pending()
        for relative in self._relatives:
            relative.shutdown(wait=False, cancel_futures=cancel_futures)
        if wait:
            for executor in (self, *self._relatives):
                executor._pool.wait_ended()

    def terminate_workers(self) -> None:
        """Send SIGTERM to the workers; running calls end as broken, waiting ones are cancelled."""
        group = self._pool.group
        is_open = group is not None and not self._pool.is_closed
        workers = group.workers() if group is not None and is_open else []
        self.shutdown(wait=False, cancel_futures=True)
        here = socket.gethostname()
        if any(worker.host != here for worker in workers) or (is_open and len(workers) < self._max_workers):
            # A signal does not reach another machine, nor one that is just being started; the engine does.
            self._pool.break_pool("its workers were ended by terminate_workers()", RuntimeError("terminated"))
        for worker in workers:
            try:
                if worker.host == here:
                    os.kill(worker.pid, signal.SIGTERM)
            except ProcessLookupError:  # it ended by itself
                pass

    def kill_workers(self) -> None:
        """Kill the workers now; running calls end as broken, waiting ones are cancelled."""
        is_open = self._pool.group is not None and not self._pool.is_closed
        self.shutdown(wait=False, cancel_futures=True)
        if is_open:
            self._pool.break_pool("its workers were killed by kill_workers()", RuntimeError("killed"))

    def __getstate__(self) -> NoReturn:
        # Not `__reduce__`: a subclass may have a `__getstate__` of its own, as with the standard executor.
        raise TypeError(
            f"cannot pickle {type(self).__name__!r} object: an executor can be no argument of a task, nor belong "
            "to the object whose method is one; make one in the task, or leave it out by the object's `__getstate__`"
        )

    # ------------------------------------------------------------------ what programs read of the standard
    # executor

    @property
    def _max_workers(self) -> int:
        if self._size is not None:
            return self._size
        if self._pool.group is None:
            self._open()
        assert self._pool.group is not None
        return self._pool.group.size

    @property
    def _mp_context(self) -> Any:
        import multiprocessing

        return self._context or multiprocessing.get_context()

    @property
    def _broken(self) -> str | bool:
        return self._pool.failure or False

    @property
    def _shutdown_thread(self) -> bool:
        return self._pool.is_closed

    @property
    def _processes(self) -> dict[int, WorkerProcess] | None:
        """The workers by pid; None after `shutdown`, as there."""
        pool, group = self._pool, self._pool.group
        if pool.is_closed:
            return None
        if group is None:
            return {}
        engine.wait_until(lambda: len(group.workers()) >= group.size or pool.failure is not None, _WORKERS_READY_S)
        return {worker.pid: WorkerProcess(worker, pool) for worker in group.workers()}


class ExecutorView(concurrent.futures.Executor):
    """The same workers with another number of retries or limit of time; `shutdown` is the executor's."""

    def __init__(self, executor: ProcessPoolExecutor, retries: int | None, timeout: float | None = None) -> None:
        self._executor = executor
        self._options: dict[str, Any] = {"retries": retries}
        if timeout is not None:
            self._options["timeout"] = timeout
        if retries:
            executor._pool.is_tolerant = True

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[T]:
        pool = self._executor._pool
        future: TaskFuture = TaskFuture()
        future._handle = pool
        pool.pending.add(future)
        try:
            send = pool.send or self._executor._open()
            future._task_number = send(fn, args, kwargs, future, **self._options)
        except BaseException:
            pool.pending.discard(future)
            if pool.is_closed or pool.failure is not None:
                pool.refuse()
            raise
        return future

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        return self._executor._map(fn, iterables, timeout, chunksize, buffersize, **self._options)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._executor.shutdown(wait, cancel_futures=cancel_futures)


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    if size == 1:
        return ([item] for item in items)
    return iter(lambda: list(itertools.islice(items, size)), [])


def _run_chunk(fn: Callable[..., T], items: Sequence[tuple[Any, ...]]) -> list[T]:
    return [fn(*item) for item in items]


def _with_callbacks(results: Iterator[list[T]], pool: PoolState) -> Iterator[T]:
    yield from itertools.chain.from_iterable(results)
    # There, callbacks have nearly always run when their future's result is taken: a bar shows all that is done.
    pool.wait_callbacks(_CALLBACKS_END_S)


def _keeping(executor: ProcessPoolExecutor, values: Iterator[T]) -> Iterator[T]:
    try:
        yield from values
    finally:
        del executor


def _check_retries(retries: int | None) -> None:
    if retries is None:
        return
    if not isinstance(retries, int):
        raise TypeError(f"retries must be an integer: {retries!r}")
    if retries < 0:
        raise ValueError(f"retries must be >= 0: {retries}")


def _check_tasks_per_child(tasks_max: int | None, mp_context: Any) -> None:
    if tasks_max is None:
        return
    if not isinstance(tasks_max, int):
        raise TypeError("max_tasks_per_child must be an integer")
    if tasks_max <= 0:
        raise ValueError("max_tasks_per_child must be >= 1")
    # Our workers are always fresh, so there is no need for this; but a program that is told so there is
    # told so here.
    if mp_context is not None and mp_context.get_start_method(allow_none=False) == "fork":
        raise ValueError(
            "max_tasks_per_child is incompatible with the 'fork' multiprocessing start method; "
            "supply a different mp_context."
        )
