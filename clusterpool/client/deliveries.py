"""What is handed out to the user's side: results to sinks, values to those who watch them, news of sets and actors.

Filled under the client's lock, emptied outside it by whoever has the loop's role, so that no sink is called by two
threads at once, and a callback may wait for other results.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from clusterpool.client.group_worker import GroupWorker, as_group_worker
from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.dispatch import Task
from clusterpool.core.messages import Address

Delivery = Callable[[], None]
_FACTS_MAX = 1000


class Deliveries:
    """The queue, and who takes what."""

    def __init__(self) -> None:
        self.queue: deque[Delivery] = deque()
        self.result_loader: Callable[[Task, m.TaskResult, Any], None] = _no_loader
        self.failure_loader: Callable[[Task, e.FailTasks], None] = _no_loader
        self.chunk_loader: Callable[[e.DeliverChunk, Any], None] = _no_loader
        self.watchers: dict[tuple[Address, int], list[Delivery]] = {}
        self.listeners: list[Callable[[list[tuple[Address, int]]], None]] = []  # to all that becomes known
        self.stream_watchers: dict[int, list[Delivery]] = {}  # coroutines that wait for an item, by task number
        self.set_sinks: dict[int, Any] = {}  # WorkerGroups, by set number
        self._worker_facts: dict[str, GroupWorker | None] = {}

    def run(self) -> None:
        """Hand out everything; the loop's `after_turn`."""
        queue = self.queue
        while queue:
            queue.popleft()()

    def take(self, command: e.Command) -> None:
        """Queue what a command of the machine is for."""
        kind = type(command)
        if kind is e.DeliverResults:
            self._results(command)  # type: ignore[arg-type]
        elif kind is e.ValuesKnown:
            if self.watchers:
                for key in command.keys:  # type: ignore[attr-defined]
                    self.queue.extend(self.watchers.pop(key, ()))
            for listener in self.listeners:
                listener(command.keys)  # type: ignore[attr-defined]
        elif kind is e.FailTasks:
            fail = self.failure_loader
            for task in command.tasks:  # type: ignore[attr-defined]
                self.queue.append(lambda task=task: fail(task, command))  # type: ignore[misc, arg-type]
        elif kind is e.DeliverChunk:
            load_chunk, facts = self.chunk_loader, self._facts_of(command.worker)  # type: ignore[attr-defined]
            self.queue.append(lambda: load_chunk(command, facts))  # type: ignore[arg-type]
        elif kind is e.StreamMoved:
            if self.stream_watchers:
                self.queue.extend(self.stream_watchers.pop(command.number, ()))  # type: ignore[attr-defined]
        elif kind is not e.ActorMoved:
            sink = self.set_sinks.get(command.set_number)  # type: ignore[attr-defined]
            if sink is not None:
                self.queue.append(lambda: sink.set_event(command))

    def _results(self, command: e.DeliverResults) -> None:
        load, worker = self.result_loader, self._facts_of(command.worker)
        results = deque(command.results)
        queue = self.queue

        def deliver() -> None:
            if len(results) > 1:
                # A callback may raise, or wait for another of these results: the rest must be found, and in order.
                queue.appendleft(deliver)
            while results:
                task, result = results.popleft()
                load(task, result, worker)

        queue.append(deliver)

    def _facts_of(self, worker: m.WorkerPart | None) -> GroupWorker | None:
        if worker is None:
            return None
        facts = self._worker_facts.get(worker.address.process_id)
        if facts is None:
            if len(self._worker_facts) > _FACTS_MAX:
                self._worker_facts.clear()
            facts = self._worker_facts[worker.address.process_id] = as_group_worker(worker)
        return facts


def _no_loader(*_: Any) -> None:
    raise AssertionError("the client has no loader for results yet")
