"""What this process needs to use a cluster: its client, its store, its worker sets. One per process (current.py)."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clusterpool import errors
from clusterpool.client.client import Client
from clusterpool.client.coordination import Coordination
from clusterpool.client.group_worker import GroupWorker, as_group_worker
from clusterpool.client.split_chunk import CHUNK_KINDS, ChunkGatherer, chunk_text
from clusterpool.client.submission import FunctionTable, TaskMaker
from clusterpool.client.values import NONE_PAYLOAD, ObjectUnreadable, Values, make_error
from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.dispatch import Task
from clusterpool.core.messages import Address, Reference, TaskResult, TaskStatus, WorkerDemand
from clusterpool.serialization.exceptions import load_exception
from clusterpool.serialization.packing import loads

if TYPE_CHECKING:
    from clusterpool.client.channel import ChannelTable


class Runtime:
    """A client with what belongs to it. `on_shutdown` functions are called first when it ends."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.values = Values(client)
        self.maker = TaskMaker(client, self.values)
        self.functions = FunctionTable(client, self.values)
        self.on_shutdown: list[Callable[[], None]] = []
        self.after_shutdown: list[Callable[[], None]] = []
        self.set_numbers = itertools.count(1)
        self.returns_exits = False  # in a worker: a task's SystemExit is its result and does not end the worker
        self.refuses_unnamed_results = False  # in a worker: a lambda as a result is an error, as in the standard Pool
        self._task_sets: dict[Any, int] = {}
        self._lock = threading.Lock()
        self._coordination: Coordination | None = None
        self.channels: ChannelTable | None = None  # made by channel.py when there is a first one
        client.deliveries.result_loader = self.load_result
        client.deliveries.failure_loader = self.load_failure
        client.deliveries.chunk_loader = self.load_chunk

    @property
    def coordination(self) -> Coordination:
        """Semaphores, channels and cells of the cluster."""
        if self._coordination is None:
            with self._lock:
                if self._coordination is None:
                    self._coordination = Coordination(self.client)
        return self._coordination

    # --- worker sets of remote functions

    def task_set(self, demand: WorkerDemand, env: dict[str, str]) -> int:
        """The number of the lease set for tasks of this shape."""
        key = (tuple(sorted(demand.resources.items())), demand.strategy, tuple(sorted(env.items())))
        number = self._task_sets.get(key)
        if number is not None:
            return number
        with self._lock:
            if key not in self._task_sets:
                number = next(self.set_numbers)
                self.client.handle_event(e.SetOpened(number, demand, e.SetupPlan(demand.name, env), None))
                self._task_sets[key] = number
            return self._task_sets[key]

    def submit(self, set_number: int, made: tuple[Task, e.TaskArguments | None]) -> int:
        """Send a task on its way; its number."""
        task, arguments = made
        if arguments is None:
            self.client.submit_task(set_number, task)
        else:
            self.client.handle_event(e.TaskWithArgumentsSubmitted(set_number, "", task, arguments))
        return task.spec.number

    # --- results for sinks

    def load_result(self, task: Task, result: TaskResult, worker: GroupWorker | None) -> None:
        """Load a result and give it to the task's sink."""
        status = result.status
        if status == TaskStatus.OK:
            payload = result.payload
            if payload == NONE_PAYLOAD:
                task.sink.task_done(task.index, None, None, worker)
                return
            try:
                value = loads(payload)
            except BaseException as exc:
                _load_failed(task, exc, worker)
            else:
                task.sink.task_done(task.index, value, None, worker)
                if result.extras is not None and result.extras.value is not None:
                    self._drop(result.extras.value.references)
        elif status == TaskStatus.ERROR:
            task.sink.task_done(task.index, None, load_exception(result.payload), worker)
        elif status == TaskStatus.UNLOADABLE:
            _load_failed(task, load_exception(result.payload), worker)
        elif status == TaskStatus.STORED:
            self._load_stored(task, result, worker)
        elif status == TaskStatus.CANCELLED:
            task.sink.task_done(task.index, None, errors.TaskCancelled("the task was cancelled"), worker)
        else:
            text = result.payload.decode(errors="replace")
            task.sink.task_done(task.index, None, errors.ObjectLost(text), worker)

    def _load_stored(self, task: Task, result: TaskResult, worker: GroupWorker | None) -> None:
        assert result.extras is not None
        part = result.extras.value
        assert part is not None
        stored = part.stored
        if stored is None:  # small, with references inside
            inline = TaskResult(result.number, TaskStatus.OK, part.payload, result.extras)
            self.load_result(task, inline, worker)
            return

        def on_loaded(value: Any, error: BaseException | None) -> None:
            self._drop(part.references)
            if isinstance(error, ObjectUnreadable):
                text = error.unreadable.text
                self.client.handle_event(e.ResultUnreadable(task, text))
                return
            # Nobody else will ask for it: once our pin goes, its room is free.
            for node_id in stored.node_ids:
                self.client.send(Address(node_id, node_id), m.FreeObjects([stored.object_id]))
            self.client.handle_event(e.ResultRead(task.spec.number))
            task.sink.task_done(task.index, value, error, worker)

        self.values.load_stored_nowait(stored, on_loaded)

    def _drop(self, references: list[Reference]) -> None:
        for reference in references:
            self.client.release_reference(reference.owner, reference.number)

    def load_chunk(self, chunk: e.DeliverChunk, worker: GroupWorker | None) -> None:
        """Load the results of a chunk that was run in parts, and give them to its sink together."""
        ChunkGatherer(self, chunk, worker).start()

    def load_failure(self, task: Task, failure: e.FailTasks) -> None:
        """Tell a sink that its task will never have a result."""
        text = failure.text
        if task.spec.kind in CHUNK_KINDS and failure.kind in ("worker_died", "timeout"):
            text = chunk_text(task, text, failure.last)
        error = make_error(failure.kind, text, failure.error)
        task.sink.task_done(task.index, None, error, as_group_worker(failure.worker))

    # --- the end

    def shutdown(self) -> None:
        """Leave the cluster in good order: workers of this job end, and what they printed is shown."""
        for function in reversed(self.on_shutdown):
            function()
        client = self.client
        if not client.is_closed and client.kind == "driver":
            client.send(client.node, m.LeaveNode())
            client.loop.wait_until(lambda: client.is_closed, 10.0)
            client.loop.wait_until(lambda: not client.has_deliveries, 1.0)
        client.close()
        self.values.close()
        for function in self.after_shutdown:
            function()


def _load_failed(task: Task, error: BaseException, worker: GroupWorker | None) -> None:
    """The call could not be unpickled in its worker, or its result here; some sinks tell that from the call's error."""
    load_failed = getattr(task.sink, "load_failed", None)
    if load_failed is None:
        task.sink.task_done(task.index, None, error, worker)
    else:
        load_failed(task.index, error, worker)
