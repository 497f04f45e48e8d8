"""`WorkerGroup`: a set of workers held for one owner, with a common initializer. Pools and executors run on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from clusterpool import errors
from clusterpool.client import api
from clusterpool.client.bootstrap import renewed
from clusterpool.client.group_worker import GroupWorker, as_group_worker
from clusterpool.client.resource_needs import checked_amounts
from clusterpool.client.submission import FunctionTable, Held
from clusterpool.client.task_limits import extras_with, limits_for
from clusterpool.core import owner_events as e
from clusterpool.core.dispatch import NODE_LOSSES_ONLY, Task
from clusterpool.core.messages import TaskKind, WorkerDemand, WorkerKind
from clusterpool.serialization.exceptions import load_exception
from clusterpool.serialization.versions import looks

if TYPE_CHECKING:
    from clusterpool.client.client import Client

__all__ = ["GroupWorker", "TaskKind", "TaskSink", "WorkerGroup"]

# Tasks of one call are handed to the machine in slices: the first are at work while the rest are pickled.
_SLICE_TASKS = 500


class TaskSink(Protocol):
    """Takes the results of tasks.

    A sink that also has `load_failed(index, error, worker)` is called by that, instead of by `task_done`, when the call
    could not be unpickled in the worker, or its result here. One that has `item_index(index, position)` says which item
    of the user's the chunk `index` has at `position`, for errors. One that has `chunk_done(index, values, worker)` gets
    by that a chunk some of whose items failed: the values, with an `ItemFailure` in the place of each that did.
    """

    def task_done(self, index: int, value: Any, error: BaseException | None, worker: GroupWorker | None) -> None:
        """Called once for each task, by whichever thread turns the client's loop; must not block.

        `worker`: the one that ran it; None if none had it.
        """


class WorkerGroup:
    """Workers for one owner, started at once in the background; whoever dies is replaced while the group is open.

    `size`: processes, not bounded by CPUs. `follows_cluster`: one for each CPU, as nodes come and go; `size` is how
    many that are now. `tasks_per_worker_max`: a worker ends after so many tasks. `retries`: how often a task is run
    again whose worker died; None: only where its node was lost, for which `on_worker_died` is not called.
    `resources`: what each worker holds. `env`: environment variables of
    the workers. `timeout`: seconds that a task may run. `retry_exceptions`: True, or the exception classes after which
    a task is run again as after its worker's death. `kills_cancelled`: tasks travel alone, so that each can be stopped
    while it runs (`cancel(force=True)`) with no other harmed. `on_worker_died(worker, text)`: an unexpected end.
    `safe_to_repeat`: one that takes much longer than the others may be started a second time meanwhile.
    `on_setup_failed(error)`: the initializer raised, or (WorkerSetupFailed) has ended its workers again and again.
    """

    def __init__(
        self,
        size: int,
        *,
        name: str = "group",
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        tasks_per_worker_max: int | None = None,
        retries: int | None = 0,
        resources: dict[str, float] | None = None,
        env: dict[str, str] | None = None,
        timeout: float | None = None,
        retry_exceptions: Any = False,
        kills_cancelled: bool = False,
        safe_to_repeat: bool = False,
        follows_cluster: bool = False,
        on_worker_died: Callable[[GroupWorker, str], None] | None = None,
        on_setup_failed: Callable[[BaseException], None] | None = None,
        client: Client | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"a worker group needs at least 1 worker: {size=}")
        amounts = checked_amounts(resources)
        runtime = api.runtime()
        self._runtime = runtime
        self._client = client or runtime.client
        self.size = size
        self.retries = NODE_LOSSES_ONLY if retries is None else retries
        self._limits = limits_for(timeout, retry_exceptions, travels_alone=kills_cancelled)
        self._extras = extras_with(self._limits)
        self._number = next(runtime.set_numbers)
        self._functions = FunctionTable(self._client, runtime.values)
        self._workers: dict[str, GroupWorker] = {}
        self._on_worker_died = on_worker_died
        self._on_setup_failed = on_setup_failed
        self._is_closed = False
        self._is_ended = False
        looks.look_anew()  # new workers see the program as it is now
        demand = WorkerDemand(WorkerKind.GROUP, amounts, name, is_retriable=self.retries > 0)
        setup = e.SetupPlan(name, dict(env or {}))
        # What the initializer and its arguments need must live until the last worker has run it.
        self._setup_held: Held | None = None
        if initializer is not None:
            payload, self._setup_held = runtime.maker.setup(initializer, initargs)
            parts = [reference.part for reference in self._setup_held.references]
            setup = e.SetupPlan(setup.name, setup.env, payload, parts)
        self._client.deliveries.set_sinks[self._number] = self
        if self._client.kind == "driver":
            self._client.machine.job = renewed(self._client.machine.job)
        opened = e.SetOpened(self._number, demand, setup, size, tasks_per_worker_max, safe_to_repeat, follows_cluster)
        self._client.handle_event(opened)

    # --- tasks

    def submit(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        sink: TaskSink,
        index: int = 0,
        *,
        retries: int | None = None,
        timeout: float | None = None,
    ) -> int:
        """Run `function(*args, **kwargs)`; the task's number. What cannot be pickled is reported to the sink.

        Raises: RuntimeError when the group is closed.
        """
        if self._is_closed or self._client.is_closed:
            self._check_open()  # only then: this is the way of each single task
        runtime = self._runtime
        extras = self._extras if timeout is None else extras_with(self._limits, timeout)
        try:
            made = runtime.maker.call(
                self._functions, function, args, kwargs, sink, index,
                retries=self.retries if retries is None else retries,
                extras=extras,
            )  # fmt: skip
        except Exception as exc:
            return self._fail(sink, index, exc)
        return runtime.submit(self._number, made)

    def submit_chunks(
        self,
        function: Callable[..., Any],
        chunks: Iterable[Sequence[Any]],
        sink: TaskSink,
        *,
        kind: TaskKind,
        first_index: int = 0,
        retries: int | None = None,
        timeout: float | None = None,
    ) -> list[int]:
        """Run one task a chunk; task i reports as `first_index + i`, with the list of its results. Their numbers.

        `timeout`: of a whole chunk.
        """
        self._check_open()
        extras = self._extras if timeout is None else extras_with(self._limits, timeout)
        retries = self.retries if retries is None else retries
        index = first_index
        numbers: list[int] = []
        functions = self._functions
        try:
            function_number = functions.number_of(function)
        except Exception as exc:
            return [self._fail(sink, first_index + offset, exc) for offset, _ in enumerate(chunks)]
        maker, client = self._runtime.maker, self._client
        batch: list[Task] = []
        with maker.stored.one_call():
            for chunk in chunks:
                items = chunk if type(chunk) in (list, tuple) else list(chunk)
                try:
                    task, arguments = maker.chunk(
                        functions, function_number, items, sink, index, kind=kind, retries=retries, extras=extras
                    )
                except Exception as exc:
                    numbers.append(self._fail(sink, index, exc))
                else:
                    numbers.append(task.spec.number)
                    if arguments is None:
                        batch.append(task)
                    else:
                        client.handle_event(e.TaskWithArgumentsSubmitted(self._number, "", task, arguments))
                index += 1
                if len(batch) >= _SLICE_TASKS:
                    client.submit_tasks(self._number, batch)
                    client.loop.turn_nowait()
                    batch = []
        if len(batch) == 1:
            client.submit_task(self._number, batch[0])  # a lazy iterable gives one at a time: gather them
        elif batch:
            client.submit_tasks(self._number, batch)
        functions.done_with(function_number)
        return numbers

    def _fail(self, sink: TaskSink, index: int, error: BaseException) -> int:
        self._client.call_later(lambda: sink.task_done(index, None, error, None))
        return 0

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the worker group is closed: no new tasks are taken")
        self._client.check_open()

    def cancel(self, task_number: int, *, force: bool = False) -> bool:
        """Whether the task will not run, or (`force`) is being stopped and its worker replaced.

        False, too, for one that waits behind others in a worker; but that is asked to drop it, and when it could the
        sink is told so soon.
        """
        return api.cancel_task(self._client, task_number, force=force, interrupt=False, recall=not force)

    def is_running(self, task_number: int) -> bool:
        """Whether a worker is at the task."""
        return self._client.machine.is_running(task_number)

    def pending(self) -> int:
        """Tasks submitted and not done."""

        def count(machine: Any) -> int:
            worker_set = machine.sets.get(self._number)
            if worker_set is None:
                return 0
            return int(worker_set.tasks_left())

        return int(self._client.ask_machine(count))

    # --- workers

    def workers(self) -> list[GroupWorker]:
        """The living ones, oldest first."""
        return [worker for worker in self._workers.values() if worker.exit_code is None]

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until all workers are ready for tasks; whether they were within `timeout` seconds."""
        return self._client.wait_until(lambda: len(self._workers) >= self.size or self._is_ended, timeout)

    def resize(self, size: int, *, follows_cluster: bool = False) -> None:
        """Grow, or shrink by letting the least busy workers finish; `follows_cluster` as for a new group."""
        if size < 1:
            raise ValueError(f"a worker group needs at least 1 worker: {size=}")
        self.size = size
        self._client.handle_event(e.SetResized(self._number, size, follows_cluster))

    def close(self) -> None:
        """Take no more tasks; the workers end, with exit code 0, once all tasks are done."""
        if not self._is_closed:
            self._is_closed = True
            self._client.handle_event(e.SetClosed(self._number))

    def terminate(self) -> None:
        """Kill the workers; pending tasks end with TaskCancelled."""
        self._is_closed = True
        if not self._is_ended and not self._client.is_closed:
            self._client.handle_event(e.SetTerminated(self._number))

    def join(self, timeout: float | None = None) -> bool:
        """After `close` or `terminate`: wait until all workers have ended."""
        try:
            return self._client.wait_until(lambda: self._is_ended, timeout)
        except errors.NotConnected:
            return True  # they ended with the cluster

    def set_event(self, command: Any) -> None:
        """News of the set, from the client's loop."""
        if isinstance(command, e.SetWorkerJoined):
            worker = as_group_worker(command.worker)
            assert worker is not None
            self._workers[worker.process_id] = worker
        elif isinstance(command, e.SetWorkerLeft):
            self._worker_left(command)
        elif isinstance(command, e.SetSizeChanged):
            self.size = command.size
        elif isinstance(command, e.SetSetupFailed):
            if self._on_setup_failed is not None:
                error = load_exception(command.error) if command.error else errors.WorkerSetupFailed(command.text)
                self._on_setup_failed(error)
        elif isinstance(command, e.SetEnded):
            self._is_ended = True
            self._functions.clear()
            self._setup_held = None
            self._client.deliveries.set_sinks.pop(self._number, None)

    def _worker_left(self, command: e.SetWorkerLeft) -> None:
        worker = as_group_worker(command.worker, command.exit_code)
        assert worker is not None
        self._workers.pop(worker.process_id, None)
        is_survived = command.is_node_lost and self.retries == NODE_LOSSES_ONLY
        if not (command.was_expected or is_survived) and self._on_worker_died is not None:
            self._on_worker_died(worker, command.text)
