"""A worker group of threads in this process: what the facades' unit tests run on instead of the engine.

It keeps the promises of `clusterpool.client.worker_group.WorkerGroup` that a facade depends on: `task_done`
once for each task, from another thread; copies of arguments and results (a pickle round trip); the order of
submission; the errors. Workers can be made to die and initializers to fail.
"""

from __future__ import annotations

import pickle
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any

from clusterpool.client.worker_group import GroupWorker, TaskKind
from clusterpool.errors import SerializationFailed, TaskCancelled

_changed = threading.Condition()


def wait_until(predicate: Callable[[], bool], timeout: float | None = None) -> bool:
    """Takes the place of the engine's wait."""
    with _changed:
        return _changed.wait_for(predicate, timeout)


def wake_waiters() -> None:
    with _changed:
        _changed.notify_all()


class FakeGroup:
    instances: list[FakeGroup] = []

    def __init__(
        self,
        size: int,
        *,
        name: str = "group",
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] = (),
        tasks_per_worker_max: int | None = None,
        retries: int = 0,
        resources: dict[str, float] | None = None,
        env: dict[str, str] | None = None,
        follows_cluster: bool = False,
        on_worker_died: Callable[[GroupWorker, str], None] | None = None,
        on_setup_failed: Callable[[BaseException], None] | None = None,
        client: Any = None,
    ) -> None:
        self.size = size
        self.retries = retries
        self.resources = resources
        self.submitted_chunks: list[Sequence[Any]] = []
        self.submit_calls = 0
        self.pending_max = 0
        self.state = "open"
        self._on_setup_failed = on_setup_failed
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._numbers = count()
        self._lock = threading.Lock()
        self._pending: dict[int, tuple[Any, int]] = {}
        FakeGroup.instances.append(self)
        self._threads = [
            threading.Thread(target=self._work, args=(n, initializer, tuple(initargs)), daemon=True)
            for n in range(size)
        ]
        self._living = dict.fromkeys(range(size), True)
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        sink: Any,
        index: int = 0,
        *,
        retries: int | None = None,
    ) -> int:
        return self._add(function, (args, kwargs), sink, index, TaskKind.CALL)

    def submit_chunks(
        self,
        function: Any,
        chunks: Iterable[Sequence[Any]],
        sink: Any,
        *,
        kind: TaskKind,
        first_index: int = 0,
        retries: int | None = None,
    ) -> range:
        self.submit_calls += 1
        first = last = None
        for index, chunk in enumerate(chunks, first_index):
            self.submitted_chunks.append(chunk)
            last = self._add(function, chunk, sink, index, kind)
            first = last if first is None else first
        return range(0) if first is None or last is None else range(first, last + 1)

    def _add(self, function: Any, payload: Any, sink: Any, index: int, kind: TaskKind) -> int:
        if self.state != "open":
            raise RuntimeError("the group is closed")
        with self._lock:
            number = next(self._numbers)
            self._pending[number] = (sink, index)
            self.pending_max = max(self.pending_max, len(self._pending))
        self._tasks.put((number, function, payload, kind))
        return number

    def _work(self, worker_number: int, initializer: Any, initargs: tuple[Any, ...]) -> None:
        worker = GroupWorker(f"w{worker_number}", "n0", 1000 + worker_number, "localhost", None)
        while initializer is not None and self.state != "terminated":
            try:
                initializer(*initargs)
                break
            except Exception as error:
                assert self._on_setup_failed is not None
                self._on_setup_failed(error)
                wake_waiters()
                time.sleep(0.001)
        while self.state != "terminated":
            task = self._tasks.get()
            if task is None:
                break
            self._run(worker, *task)
            del task
        self._living.pop(worker_number)
        wake_waiters()

    def _run(self, worker: GroupWorker, number: int, function: Any, payload: Any, kind: TaskKind) -> None:
        value = error = None
        try:
            payload = pickle.loads(pickle.dumps(payload))
            if kind == TaskKind.CALL:
                value = function(*payload[0], **payload[1])
            elif kind == TaskKind.MAP:
                value = [function(item) for item in payload]
            else:
                value = [function(*item) for item in payload]
            try:
                value = pickle.loads(pickle.dumps(value))
            except Exception as reason:
                error = SerializationFailed("no pickle")
                error.reason = repr(reason)
                error.value_repr = repr(value)
                value = None
        except Exception as raised:
            error, value = raised, None
        self._end(number, value, error, worker)

    def _end(self, number: int, value: Any, error: BaseException | None, worker: GroupWorker | None) -> None:
        with self._lock:
            sink, index = self._pending.pop(number, (None, 0))
        if sink is not None:
            sink.task_done(index, value, error, worker)
        wake_waiters()

    def workers(self) -> list[GroupWorker]:
        return [GroupWorker(f"w{n}", "n0", 1000 + n, "localhost", None) for n in list(self._living)]

    def pending(self) -> int:
        return len(self._pending)

    def close(self) -> None:
        if self.state == "open":
            self.state = "closed"
            for _ in self._threads:
                self._tasks.put(None)

    def join(self, timeout: float | None = None) -> bool:
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout)
        return True

    def terminate(self) -> None:
        self.state = "terminated"
        for _ in self._threads:
            self._tasks.put(None)
        for number in list(self._pending):
            self._end(number, None, TaskCancelled("terminated"), None)
