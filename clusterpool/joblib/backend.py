"""The joblib backend: each `Parallel` call runs on a warm worker group of the cluster.

    Parallel ── submit(batch, callback) ──► Job (the engine's sink) ──► WorkerGroup
        ▲                                    │ task_done, in the thread that turns the client's loop
        └──── callback(job) ◄── Callbacks ◄──┘ joblib takes the result out and submits the next batch

Callbacks are a thread of their own, because joblib's wait for a lock that the caller holds while it submits;
a large argument is stored then, which needs the loop.

Nested calls follow joblib's own rule, as loky's do: inside a worker the first level runs in threads, deeper
ones one after another, so nesting neither multiplies processes nor waits for a worker that is busy waiting.
A call that names `backend="clusterpool"` inside a worker gets workers of its own.

Source: https://joblib.readthedocs.io/en/stable/custom_parallel_backend.html
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from joblib.parallel import AutoBatchingMixin, FallbackToBackend, ParallelBackendBase, SequentialBackend

from clusterpool import errors
from clusterpool.calls import engine
from clusterpool.client.resource_needs import checked_amounts
from clusterpool.joblib.batch import UniformBatch, run_batch, uniform_batch, uniform_function
from clusterpool.joblib.callbacks import Callbacks
from clusterpool.joblib.warm_groups import WarmGroup, WarmGroups
from clusterpool.serialization.versions import looks

if TYPE_CHECKING:
    from clusterpool.client.worker_group import GroupWorker

# Thread pools of numerical libraries, which joblib limits in its workers as well.
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
# loky's. Longer holds memory, shorter starts workers anew in a program that computes something between its
# calls.
_IDLE_TIMEOUT_S = 300.0

_warm_groups = WarmGroups()


class TerminatedWorkerError(errors.WorkerDied, BrokenProcessPool):
    """A worker of a `Parallel` call was killed or crashed; the call ends, and the next one has a fresh
    worker."""


class Job:
    """A batch in flight: the engine's sink, and the future-like object that joblib keeps."""

    __slots__ = ("_callback", "_callbacks", "_error", "_is_done", "_value")

    def __init__(self, callbacks: Callbacks, callback: Callable[[Job], object] | None) -> None:
        self._callbacks = callbacks
        self._callback = callback
        self._is_done = False
        self._value: Any = None
        self._error: BaseException | None = None

    def task_done(self, index: int, value: Any, error: BaseException | None, worker: GroupWorker | None) -> None:
        self._value, self._error = value, error
        self._is_done = True
        if self._callback is not None:
            self._callbacks.run(self._call_back)

    def _call_back(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None and not self._callbacks.is_ended:
            callback(self)

    def done(self) -> bool:
        return self._is_done

    def result(self, timeout: float | None = None) -> Any:
        if not self._is_done and not engine.wait_until(self.done, timeout):
            raise FutureTimeoutError()
        error = self._error
        if error is None:
            return self._value
        if isinstance(error, (errors.WorkerDied, errors.NodeDied)):
            raise TerminatedWorkerError(
                f"A worker process of joblib.Parallel ended while it ran a batch of tasks: {error} This can "
                "be a crash in compiled code or too little memory; a smaller n_jobs needs less of it."
            ) from error
        raise error

    get = result  # what joblib before 1.5 calls it


class ClusterpoolBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """`joblib.parallel_config(backend="clusterpool", ...)`.

    - `address`: the cluster, where the usual rule would not find it.
    - `resources`: what each worker needs, by name, such as `{"GPU": 1}`.
    - `retries`: how often a batch whose worker died is run again; without, the call raises
    TerminatedWorkerError, unless the worker's whole node was lost: then others run what it had. With 0 that raises,
    too, and no batch is started twice.
    - `safe_to_repeat`: batches may run twice, even at the same time: the last ones of a call, if they take much
    longer than the others, are started a second time on idle workers, and the first result counts.
    - `idle_worker_timeout`: seconds for which the workers are kept for the next call.
    """

    supports_retrieve_callback = True
    supports_inner_max_num_threads = True
    supports_sharedmem = False
    uses_threads = False

    def __init__(
        self,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        *,
        address: str | None = None,
        resources: dict[str, float] | None = None,
        retries: int | None = None,
        safe_to_repeat: bool = False,
        idle_worker_timeout: float | None = None,
    ) -> None:
        if retries is not None and (not isinstance(retries, int) or retries < 0):
            raise ValueError(f"retries must be an integer >= 0, or None: {retries!r}")
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        self._options: dict[str, Any] = {
            "address": address,
            "resources": checked_amounts(resources),
            "retries": retries,
            "safe_to_repeat": bool(safe_to_repeat),
            "idle_worker_timeout": idle_worker_timeout,
        }
        self._warm: WarmGroup | None = None
        # Parallel objects that are between `configure` and `terminate`: those of one `with parallel_config`
        # share this backend, and one that gives a generator may be followed by the next before it is read.
        self._users = 0
        self._follows_cluster = False  # the group that is in use, or was last, has a worker for each CPU
        self._lock = threading.Lock()
        self._idle_timeout_s = _IDLE_TIMEOUT_S
        self._batch_by_function: dict[Callable[..., Any], UniformBatch] = {}
        self._nested: Any = None  # what `get_nested_backend` said at this nesting level
        self._nested_level: int | None = None

    def __reduce__(self) -> Any:
        # Without the group: a backend that reaches a worker opens its own there.
        return _rebuild, (type(self), self.nesting_level, self.inner_max_num_threads, self._options)

    # ------------------------------------------------------------------ size

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """As loky's, with the CPUs of the cluster in place of the machine's."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        if n_jobs < 0:
            return max(engine.cluster_cpus(self._options["address"]) + 1 + n_jobs, 1)
        return n_jobs

    # ------------------------------------------------------------------ the life of a call

    def configure(
        self,
        n_jobs: int | None = 1,
        parallel: Any = None,
        prefer: str | None = None,
        require: str | None = None,
        idle_worker_timeout: float | None = None,
        **memmapping: Any,
    ) -> int:
        """Take a group of workers; the options for memory-mapped files are needless here."""
        size = self.effective_n_jobs(n_jobs)
        if size == 1:
            # As loky does: joblib then says that a timeout has no meaning, and whatever else goes with one job.
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self.parallel = parallel
        if idle_worker_timeout is None:
            idle_worker_timeout = self._options["idle_worker_timeout"]
        self._idle_timeout_s = _IDLE_TIMEOUT_S if idle_worker_timeout is None else idle_worker_timeout
        with self._lock:
            self._users += 1
            self._follows_cluster = n_jobs == -1
            self._take_group(size)
        return size

    def _take_group(self, size: int) -> None:
        if self._warm is not None:
            if self._warm.group.size < size:
                self._warm.group.resize(size, follows_cluster=self._follows_cluster)
            return
        address, resources, retries = (self._options[k] for k in ("address", "resources", "retries"))
        repeats = {"safe_to_repeat": True} if self._options["safe_to_repeat"] else {}
        client = engine.connect(address)
        env = self._thread_limits(size)
        key = (tuple(env.items()), tuple(sorted((resources or {}).items())), retries, address, bool(repeats))
        self._warm = _warm_groups.take(
            key,
            size,
            client,
            follows_cluster=self._follows_cluster,
            open_group=lambda: engine.open_exit_safe_group(
                size,
                client=client,
                name="joblib",
                resources=resources,
                retries=retries,
                env=env,
                follows_cluster=self._follows_cluster,
                **repeats,
            ),
        )

    def _thread_limits(self, n_jobs: int) -> dict[str, str]:
        """Environment of the workers, so that their libraries together do not run more threads than CPUs.

        As joblib documents it: `inner_max_num_threads`, else what the user's environment says, else an
        equal share.
        """
        limit = self.inner_max_num_threads
        share = max(engine.cluster_cpus(self._options["address"]) // n_jobs, 1)
        env = {name: str(limit if limit is not None else os.environ.get(name, share)) for name in _THREAD_VARIABLES}
        if "ENABLE_IPC" not in os.environ:
            env["ENABLE_IPC"] = "1"  # lets the TBB schedulers of the processes share the CPUs
        return env

    def start_call(self) -> None:
        # Shipped functions are for one call: the next may find their globals or closures changed.
        self._batch_by_function.clear()
        looks.look_anew()

    def terminate(self) -> None:
        """Let the workers wait for the next call."""
        self._batch_by_function.clear()
        self.reset_batch_stats()
        with self._lock:
            self._users = max(0, self._users - 1)
            if self._users:
                return
            warm, self._warm = self._warm, None
        if warm is not None:
            _warm_groups.give_back(warm, self._idle_timeout_s)

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Kill the workers, for nothing else stops a running task; new ones start in milliseconds."""
        self._batch_by_function.clear()
        with self._lock:
            warm, self._warm = self._warm, None
            if warm is None:
                return
            warm.callbacks.end()
            warm.group.terminate()
            if ensure_ready or self._users > 1:
                self._take_group(warm.group.size)
        warm.callbacks.wait_idle()

    # ------------------------------------------------------------------ batches

    def get_nested_backend(self) -> Any:
        """joblib's own answer; made once, for joblib asks for each batch."""
        if self._nested is None or self._nested_level != self.nesting_level:
            self._nested, self._nested_level = super().get_nested_backend(), self.nesting_level
        return self._nested

    def submit(self, func: Any, callback: Callable[[Any], object] | None = None) -> Job:
        warm = self._warm
        if warm is None:
            # The call was aborted while one of its callbacks was about to submit; nobody waits for the batch.
            return Job(Callbacks(), None)
        job = Job(warm.callbacks, callback)
        items: Any = getattr(func, "items", ())
        function = uniform_function(items)
        if function is None:
            warm.group.submit(run_batch, (func,), {}, job)
            return job
        batch = self._batch_by_function.get(function)
        if batch is None:
            nested_backend, nested_n_jobs = self.get_nested_backend()
            batch = uniform_batch(function, nested_backend, nested_n_jobs)
            self._batch_by_function[function] = batch
        if len(items) == 1:
            warm.group.submit(batch.one, items[0][1], items[0][2], job)
        else:
            warm.group.submit(*batch.call_for(items), job)
        return job

    apply_async = submit  # joblib before 1.5

    def retrieve_result_callback(self, out: Job) -> Any:
        return out.result()

    def retrieve_result(self, out: Job, timeout: float | None = None) -> Any:
        return out.result(timeout)


def _rebuild(
    kind: type[ClusterpoolBackend], level: int | None, threads_max: int | None, options: dict[str, Any]
) -> Any:
    return kind(level, threads_max, **options)
