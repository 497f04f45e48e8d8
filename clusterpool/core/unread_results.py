"""Stored results that go to a sink: their tasks stay until the shell has read them, for they may have to run again.

    ended --> unread --ResultRead--> forgotten
                ^  |
                |  ResultUnreadable --> fails, if it may not run again
                |  v
               running

Such results are no objects: nobody has a reference, and nobody else will ask for them. The parts of a chunk that was
split are read one after another. A part that is lost runs again by itself, as a chunk whose items are its own, with
whoever gathers the parts for its sink; it may be split in its turn, hence a stack.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clusterpool.core import owner_events as e
from clusterpool.core.dispatch import NODE_LOSSES_ONLY, Task
from clusterpool.core.rescue import count_attempt, survives_node_loss
from clusterpool.core.worker_set import WorkerSet

if TYPE_CHECKING:
    from clusterpool.core.owner import OwnerMachine

Commands = list[e.Command]


class UnreadResults:
    """The part of an owner's machine between the end of such a task and the reading of its result."""

    def __init__(self, owner: OwnerMachine) -> None:
        self._owner = owner
        self._tasks: dict[int, tuple[Task, int]] = {}  # by number, with the numbers of their sets
        self._chunks: dict[int, list[e.DeliverChunk]] = {}  # by number, the innermost last
        self._with_arguments: set[int] = set()  # those of the chunks that cannot run without

    def __contains__(self, number: int) -> bool:
        return number in self._tasks

    def __bool__(self) -> bool:
        return bool(self._tasks or self._chunks or self._with_arguments)

    def clear(self) -> None:
        """There is no cluster any more."""
        self._tasks.clear()
        self._chunks.clear()
        self._with_arguments.clear()

    # --- ends

    def task_ended(self, task: Task, worker_set: WorkerSet) -> None:
        """A task has a stored result. Until that is read, a closed set stays."""
        self._tasks[task.spec.number] = task, worker_set.number
        worker_set.awaiting.add(task.spec.number)

    def chunk_ended(self, chunk: e.DeliverChunk) -> Commands:
        """The parts of a split chunk have all ended."""
        number = chunk.task.spec.number
        worker_set = self._owner.sets.get(chunk.set_number)
        if chunk.has_stored and worker_set is not None:
            if number not in self._chunks and self._owner.objects.has_arguments(number):
                self._with_arguments.add(number)
            self._chunks.setdefault(number, []).append(chunk)
        if number not in self._chunks:
            return self._owner.objects.release_arguments(chunk.task)
        if worker_set is not None:
            worker_set.awaiting.add(number)
        return []

    # --- what the shell says

    def read(self, event: e.ResultRead, now_s: float) -> Commands:
        """The shell has it."""
        task, set_number = self._tasks.pop(event.number, (None, 0))
        return [] if task is None else self._let_go(task, set_number, now_s)

    def chunk_read(self, event: e.ChunkRead, now_s: float) -> Commands:
        """The shell has all parts of the innermost chunk of this number."""
        chunks = self._chunks.get(event.number)
        if not chunks:
            return []
        chunk = chunks.pop()
        if chunks:
            return []
        del self._chunks[event.number]
        self._with_arguments.discard(event.number)
        return self._let_go(chunk.task, chunk.set_number, now_s)

    def _let_go(self, task: Task, set_number: int, now_s: float) -> Commands:
        commands = self._owner.objects.release_arguments(task)
        worker_set = self._owner.sets.get(set_number)
        if worker_set is None:
            return commands
        worker_set.awaiting.discard(task.spec.number)
        return commands + (self._owner.checked(worker_set.advance(now_s)) if worker_set.is_closing else [])

    def unreadable(self, event: e.ResultUnreadable, now_s: float) -> Commands:
        """The result went with its node before it was read: as if the worker had died while it ran the task."""
        number = event.task.spec.number
        if number in self._chunks:
            return self._part_unreadable(event, self._chunks[number][-1], now_s)
        task, set_number = self._tasks.pop(number, (None, 0))
        worker_set = self._owner.sets.get(set_number)
        if task is None or worker_set is None:  # of an actor, or of a set that has been terminated
            kind = "worker_died" if task is None else "cancelled"
            text = f"the result of task {number} was lost before it could be read: {event.text}"
            return self._owner.checked([e.FailTasks([task or event.task], kind, text)])
        worker_set.awaiting.discard(number)
        if worker_set.is_terminated or not (task.retries_left > 0 or survives_node_loss(task)):
            kind = "cancelled" if worker_set.is_terminated else "worker_died"
            failed = e.FailTasks([task], kind, _lost_text(worker_set, task, event.text))
            return self._owner.checked([failed]) + self._owner.checked(worker_set.advance(now_s))
        again = self._owner.tasks[number] = task_again(task)
        return self._owner.arguments.await_again(again, worker_set, now_s)

    def _part_unreadable(self, event: e.ResultUnreadable, chunk: e.DeliverChunk, now_s: float) -> Commands:
        owner, task, number = self._owner, chunk.task, chunk.task.spec.number
        worker_set = owner.sets.get(chunk.set_number)
        # Arguments go with the first part that fails: so does the chunk then, whatever becomes of the others.
        is_complete = number not in self._with_arguments or owner.objects.has_arguments(number)
        if worker_set is None or worker_set.is_terminated or task.retries_left <= 0 or not is_complete:
            kind = "worker_died" if worker_set is not None and not worker_set.is_terminated else "cancelled"
            text = f"the result of a part of task {number} was lost before it could be read: {event.text}"
            return [e.FailTasks([event.task], kind, text)]
        again = task_again(task)
        # The next one that is lost has a retry less, and stores under yet another name.
        task.retries_left, task.spec = again.retries_left, again.spec
        again.sink, again.index = event.task.sink, event.task.index
        part = chunk.parts[event.task.index]
        owner.chunks.resume(again, part.low, part.high)
        owner.tasks[number] = again
        return owner.arguments.await_again(again, worker_set, now_s)


def task_again(task: Task) -> Task:
    """The task, to be run once more; what it stores gets names of its own."""
    again = Task(task.spec, task.sink, task.index, max(task.retries_left - 1, NODE_LOSSES_ONLY))
    count_attempt(again)
    return again


def _lost_text(worker_set: WorkerSet, task: Task, text: str) -> str:
    return f"{worker_set.rescue.label(task)}, has ended, but its result was lost before it could be read: {text}"
