"""Tasks that take much longer than their kind does: started a second time on an idle worker, the first result counts.

    original runs --much too long, a worker idle--> original and copy run
        one of them has a value  --> it is the task's; the other's worker is killed (and replaced)
        the copy fails           --> the original decides
        the original's worker dies, or it raises what is retried --> it is held: its copy decides
        the copy's worker dies   --> forgotten; a held original is saved in its place

Only where the user has said that calls are safe to repeat, and once a task at most. The copy has a number of its own,
so that stored results do not meet, and no sink: whatever becomes of it, nobody is told twice.
Source: "MapReduce" (OSDI '04), section 3.6, backup tasks.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from clusterpool.core.dispatch import Batch, Dispatcher, Task, WorkerSlot, limits_of
from clusterpool.core.messages import LastTask, TaskResult, TaskStatus

# A second start costs a worker's restart (some 10 ms, and the initializer's time) and a CPU: less than this is not
# worth it. Twice the usual time: below it the first attempt will most likely win.
LATE_MIN_S = 0.2
LATE_FACTOR = 2.0
_VALUES = (TaskStatus.OK, TaskStatus.STORED)

Finished = list[tuple[Task, TaskResult]]


def is_late(running_s: float, mean_s: float) -> bool:
    """Whether a task of a kind that usually takes `mean_s` has run for so long that it is worth a second start."""
    return running_s >= late_after_s(mean_s)


def late_after_s(mean_s: float) -> float:
    """How long a task of this kind may run before it is late."""
    return max(LATE_MIN_S, LATE_FACTOR * mean_s)


class Stragglers:
    """The second starts of one worker set. `tasks`: the owner's unfinished ones, which copies are among."""

    def __init__(self, dispatcher: Dispatcher, tasks: dict[int, Task], numbers: Iterator[int]) -> None:
        self._dispatcher = dispatcher
        self._tasks = tasks
        self._numbers = numbers
        self._original_by_copy: dict[int, Task] = {}  # by the copy's number
        self._copy_by_original: dict[int, Task] = {}  # by the original's number
        self._started_twice: set[int] = set()  # numbers of unfinished originals

    # --- when to start one

    def due(self, now_s: float) -> list[Batch]:
        """Second starts to send now."""
        batches: list[Batch] = []
        self._started_twice = {number for number in self._started_twice if number in self._tasks}
        if self._dispatcher.queue:
            return batches
        idle = [slot for slot in self._dispatcher.slots.values() if _is_idle(slot)]
        for slot, task, late_s in self._candidates():
            if not idle:
                break
            if late_s > now_s:
                continue
            # Its node may be what is slow.
            target = next((other for other in idle if other.address.node_id != slot.address.node_id), idle[0])
            idle.remove(target)
            self._dispatcher.submit([self._copy_of(task)])
            batches.append(self._dispatcher.send_one(target, now_s))
        return batches

    def next_look_s(self) -> float | None:
        """When the next one is due, if no task ends before."""
        if self._dispatcher.queue or not any(_is_idle(slot) for slot in self._dispatcher.slots.values()):
            return None
        return min((late_s for _, _, late_s in self._candidates()), default=None)

    def _candidates(self) -> list[tuple[WorkerSlot, Task, float]]:
        """Running tasks that may be started again, and when they are late."""
        found: list[tuple[WorkerSlot, Task, float]] = []
        for slot in self._dispatcher.slots.values():
            task = next(iter(slot.outstanding.values()), None)
            if task is None or task.is_cancelled or slot.is_blocked:
                continue  # one that waits for other tasks is not slow itself
            number, limits = task.spec.number, limits_of(task.spec)
            if number in self._original_by_copy or number in self._started_twice:
                continue
            mean_s = self._dispatcher.mean_s(task)
            if mean_s is None or (limits is not None and limits.timeout_s > 0):
                continue
            found.append((slot, task, max(slot.sent_s, slot.idle_since_s) + late_after_s(mean_s)))
        return found

    def _copy_of(self, task: Task) -> Task:
        number = task.spec.number
        copy = Task(msgspec.structs.replace(task.spec, number=next(self._numbers)), None, 0)
        self._tasks[copy.spec.number] = copy
        self._original_by_copy[copy.spec.number] = task
        self._copy_by_original[number] = copy
        self._started_twice.add(number)
        return copy

    # --- what becomes of them

    def __bool__(self) -> bool:
        """Whether any task has been started twice and not ended."""
        return bool(self._started_twice)

    def finished(self, finished: Finished) -> tuple[Finished, list[Task]]:
        """Tasks have ended: those that count, with their results, and the attempts that are to be stopped now."""
        counting: Finished = []
        losers: list[Task] = []
        for task, result in finished:
            number = task.spec.number
            original = self._original_by_copy.get(number)
            if original is None:
                copy = self._copy_by_original.get(number)
                if copy is not None:
                    self._part(task, copy)
                    copy.is_cancelled = True
                    losers.append(copy)
                counting.append((task, result))
                continue
            self._part(original, task)
            is_held = not original.worker
            if original.is_cancelled or not (is_held or result.status in _VALUES):
                self._tasks[number] = task
                counting.append((task, result))  # it has no sink: what is stored is freed
                continue
            # (One whose arguments were lost is run again by its owner, when they are there again.)
            original.is_cancelled = result.status != TaskStatus.LOST
            counting.append((original, result))
            if not is_held:
                losers.append(original)
        return counting, losers

    def holds(self, task: Task) -> bool:
        """Whether an attempt that has failed is to be left alone, because the other one goes on."""
        copy = self._copy_by_original.get(task.spec.number)
        return copy is not None and not task.is_cancelled

    def lost(self, tasks: list[Task], last: LastTask) -> tuple[list[Task], LastTask]:
        """A worker is gone: which of its tasks, and of those held, are to be saved, and what it was at in their
        numbers.
        """
        saved: list[Task] = []
        for task in tasks:
            number = task.spec.number
            original = self._original_by_copy.get(number)
            if original is not None:
                self._part(original, task)
                if not original.worker and not original.is_cancelled:
                    saved.append(original)
                    running = original.spec.number if last.running == number else last.running
                    started = original.spec.number if last.started == number else last.started
                    last = msgspec.structs.replace(last, running=running, started=started)
            elif not self.holds(task):
                saved.append(task)
        return saved, last

    def cancelled(self, task: Task) -> Task | None:
        """A task is being stopped: its copy, if there is one, which is to be stopped as well."""
        copy = self._copy_by_original.get(task.spec.number)
        if copy is not None:
            self._part(task, copy)
        return copy

    def held(self) -> list[Task]:
        """Originals that only their copies keep alive."""
        return [task for task in self._original_by_copy.values() if not task.worker and not task.is_cancelled]

    def _part(self, original: Task, copy: Task) -> None:
        self._original_by_copy.pop(copy.spec.number, None)
        self._copy_by_original.pop(original.spec.number, None)
        self._tasks.pop(copy.spec.number, None)


def _is_idle(slot: WorkerSlot) -> bool:
    return not slot.outstanding and slot.is_open and (slot.runs_left is None or slot.runs_left > 0)
