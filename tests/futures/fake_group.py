"""A worker group whose workers are threads, with the interface and the reports of the real one."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from clusterpool import errors


class Killed(BaseException):
    """Raised by a task, it ends the worker as SIGKILL would."""


@dataclass(frozen=True)
class FakeWorker:
    process_id: str
    node_id: str
    pid: int
    host: str
    exit_code: int | None


@dataclass
class Task:
    number: int
    run: Callable[[], Any]
    sink: Any
    index: int
    retries: int
    state: str = "waiting"


class FakeWorkerGroup:
    """`hold()` keeps tasks from starting until `release()`, so that a test can look in between."""

    opened: list[FakeWorkerGroup] = []
    changed = threading.Condition()

    def __init__(
        self,
        size: int,
        *,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        retries: int | None = 0,
        on_worker_died: Any = None,
        on_setup_failed: Any = None,
        **options: Any,
    ) -> None:
        self.size = size
        self.retries = retries
        self.options = options
        self.initializer, self.initargs = initializer, initargs
        self.on_worker_died, self.on_setup_failed = on_worker_died, on_setup_failed
        self.closed = self.terminated = False
        self.held = False
        self.tasks: dict[int, Task] = {}
        self.queue: deque[Task] = deque()
        self.numbers = itertools.count()
        self.pids = itertools.count(1000)
        self.living: list[FakeWorker] = []
        # As with the real one, ends of tasks are reported by another thread than the one that ran them.
        self.reports: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._report, daemon=True).start()
        self.opened.append(self)
        for _ in range(size):
            self._start_worker()

    # ---------------------------------------------------------------- the interface

    def submit(self, function, args, kwargs, sink, index=0, *, retries=None) -> int:
        return self._add(lambda: function(*args, **kwargs), sink, index, retries)

    def submit_chunks(
        self, function, chunks: Iterable[Sequence[Any]], sink, *, kind, first_index=0, retries=None
    ) -> range:
        numbers = [
            self._add(_chunk_call(function, chunk, int(kind)), sink, first_index + i, retries)
            for i, chunk in enumerate(chunks)
        ]
        return range(numbers[0], numbers[-1] + 1) if numbers else range(0)

    def cancel(self, task_number: int, *, force: bool = False) -> bool:
        with self.changed:
            task = self.tasks.get(task_number)
            if task is None or task.state != "waiting":
                return False
            self.queue.remove(task)
            del self.tasks[task_number]
        task.sink.task_done(task.index, None, errors.TaskCancelled("cancelled"), None)
        self._notify()
        return True

    def is_running(self, task_number: int) -> bool:
        task = self.tasks.get(task_number)
        return task is not None and task.state == "running"

    def workers(self) -> list[FakeWorker]:
        return list(self.living)

    def resize(self, size: int, *, follows_cluster: bool = False) -> None:
        self.size = size
        self.options["follows_cluster"] = follows_cluster
        while len(self.living) < size:
            self._start_worker()

    def pending(self) -> int:
        return len(self.tasks)

    def close(self) -> None:
        self.closed = True
        self._notify()

    def join(self, timeout: float | None = None) -> bool:
        return wait_until(lambda: not self.living, timeout)

    def terminate(self) -> None:
        self.closed = self.terminated = True
        with self.changed:
            tasks, self.tasks = list(self.tasks.values()), {}
            self.queue.clear()
            self.living.clear()
        for task in tasks:
            task.sink.task_done(task.index, None, errors.TaskCancelled("terminated"), None)
        self._notify()

    # ---------------------------------------------------------------- for tests

    def hold(self) -> None:
        self.held = True

    def release(self) -> None:
        self.held = False
        self._notify()

    # ---------------------------------------------------------------- inside

    def _add(self, run, sink, index, retries) -> int:
        if self.closed:
            raise RuntimeError("the worker group is closed")
        task = Task(next(self.numbers), run, sink, index, (self.retries or 0) if retries is None else retries)
        with self.changed:
            self.tasks[task.number] = task
            self.queue.append(task)
            self.changed.notify_all()
        return task.number

    def _start_worker(self) -> None:
        pid = next(self.pids)
        worker = FakeWorker(f"w{pid}", "n1", pid, "fakehost", None)
        self.living.append(worker)
        threading.Thread(target=self._work, args=(worker,), daemon=True).start()

    def _work(self, worker: FakeWorker) -> None:
        try:
            if self.initializer is not None:
                self.initializer(*self.initargs)
        except Exception as error:
            self._remove(worker)
            self.on_setup_failed(error)
            return
        while worker in self.living:
            with self.changed:
                while not self.queue or self.held:
                    if worker not in self.living or (self.closed and not self.queue):
                        if worker in self.living:
                            self.living.remove(worker)
                        self.changed.notify_all()
                        return
                    self.changed.wait(1)
                task = self.queue.popleft()
                task.state = "running"
            if not self._run(task, worker):
                return

    def _run(self, task: Task, worker: FakeWorker) -> bool:
        """Whether the worker survived."""
        value: Any = None
        error: BaseException | None = None
        alive = True
        try:
            value = task.run()
        except Killed:
            alive = False
            died = FakeWorker(worker.process_id, worker.node_id, worker.pid, worker.host, -9)
            text = f"worker {worker.process_id} on node n1 was killed by signal 9 (SIGKILL)"
            self._remove(worker)
            if not self.closed:
                self._start_worker()
            self.on_worker_died(died, text)
            if task.retries > 0 and task.number in self.tasks:
                task.retries -= 1
                with self.changed:
                    task.state = "waiting"
                    self.queue.append(task)
                    self.changed.notify_all()
                return False
            error = errors.WorkerDied(text)
        except BaseException as raised:
            error = raised
        with self.changed:
            known = self.tasks.pop(task.number, None) is not None
        if known:
            self.reports.put((task.sink, task.index, value, error, worker))
        self._notify()
        return alive

    def _report(self) -> None:
        while True:
            sink, *end = self.reports.get()
            sink.task_done(*end)
            del sink, end
            self._notify()

    def _remove(self, worker: FakeWorker) -> None:
        with self.changed:
            if worker in self.living:
                self.living.remove(worker)
            self.changed.notify_all()

    def _notify(self) -> None:
        with self.changed:
            self.changed.notify_all()


def _chunk_call(function, chunk, kind: int) -> Callable[[], list[Any]]:
    if kind == 1:
        return lambda: [function(x) for x in chunk]
    return lambda: [function(*x) for x in chunk]


def wait_until(predicate: Callable[[], bool], timeout: float | None) -> bool:
    """The client's wait, on the condition that every fake group notifies."""
    end = None if timeout is None else time.monotonic() + timeout
    with FakeWorkerGroup.changed:
        while not predicate():
            rest = 0.05 if end is None else min(0.05, end - time.monotonic())
            if rest <= 0:
                return False
            FakeWorkerGroup.changed.wait(rest)
    return True
