"""What becomes of the tasks of a worker that is gone: they are run again, at once or after a while, or they fail.

    not started --------------------------------------------> queued again
    ended, but the result was still in the worker --+-------> queued again
                                                    +-------> fails, where it may be started once only (no retries)
    lost its node, and has no retries, but NODE_LOSSES_ONLY -> queued again, a few times
    ran --+-- a chunk, and the item is known ---------------> the chunk goes on in spans (chunks.py)
          +-- retries left --> [rests] ---------------------> queued again
          +-- none -----------------------------------------> fails
    ended last, and none ran since -------------------------> as one that ran: its worker may have died of it

Whoever ran beside a task for whose sake we ended the worker (a limit of time, `cancel`) is not to blame: its attempt
does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import msgspec

from clusterpool.core.chunks import ChunkTable
from clusterpool.core.dispatch import NODE_LOSSES_ONLY, Task
from clusterpool.core.messages import LastTask, TaskExtras, TaskResult, TaskStatus, WorkerPart
from clusterpool.core.owner_events import Command, FailTasks

# A worker may die by chance once, so the first retry comes at once. What kills its workers again and again would else
# keep a node busy with forking. (Doubling from 0.1 s to 10 s: ten retries take half a minute.)
BACK_OFF_FIRST_S = 0.1
BACK_OFF_MAX_S = 10.0
# A task that takes its machine down must not go from one to the next until none is left.
NODE_LOSSES_MAX = 3


def back_off_s(attempts: int) -> float:
    """How long a task rests that has failed in so many attempts, 1 or more."""
    return 0.0 if attempts <= 1 else min(BACK_OFF_MAX_S, BACK_OFF_FIRST_S * 2.0 ** min(attempts - 2, 30))


def lost_text(process_id: str, node_id: str, text: str) -> str:
    """What became of a process whose node is gone: nobody is left there who could say."""
    return (
        f"worker {process_id} was on node {node_id}, which is gone: {text}; the machine, its network or the node's "
        "process failed, or somebody ended it"
    )


class GoneWorker(NamedTuple):
    """A worker that is no more. `target`: the number of the task for whose sake we ended it, 0 for none.
    `is_node_lost`: it went with its node.
    """

    worker: WorkerPart
    text: str
    last: LastTask
    target: int = 0
    is_node_lost: bool = False


class Rescue:
    """The tasks of one worker set that are between two attempts. `names`: of functions, by number."""

    def __init__(self, names: Mapping[int, str], chunks: ChunkTable, set_number: int = 0) -> None:
        self.chunks = chunks
        self._set_number = set_number
        self._names = names
        self.resting: list[tuple[float, int, Task]] = []  # a heap: when due, in which order they came, what
        self._count = 0

    def save(self, tasks: list[Task], gone: GoneWorker, now_s: float) -> tuple[list[Task], list[Command]]:
        """What a gone worker had, in the order sent, which is the order run: what to queue again now, what else."""
        again: list[Task] = []
        failed: list[Task] = []
        cancelled: list[Task] = []
        commands: list[Command] = []
        blamed = gone.target or _to_blame(tasks, gone.last)
        first_unstarted = _first_unstarted(tasks, gone.last)
        for position, task in enumerate(tasks):
            number = task.spec.number
            if task.is_cancelled:
                cancelled.append(task)
            elif position >= first_unstarted and number != blamed:
                again.append(task)
            elif gone.is_node_lost and survives_node_loss(task):
                count_attempt(task)
                again.append(task)
            elif task.retries_left <= 0 and number not in self.chunks:
                failed.append(task)
            elif number != blamed:
                again.append(task)  # its result was lost, or it was not its fault
            elif not self.chunks.is_split(task, gone.last):
                self.retry(task, now_s, again)
            else:
                commands += self._continue_chunk(task, gone, now_s, again)
        for task in failed:
            last = gone.last if task.spec.number == blamed and self.chunks.is_split(task, gone.last) else None
            why = self._why(task, gone, blamed)
            commands.append(FailTasks([task], "worker_died", why, gone.worker, last=last))
        if cancelled:
            commands.append(FailTasks(cancelled, "cancelled", "the task was cancelled", gone.worker))
        return again, commands

    def continue_chunks(
        self, finished: list[tuple[Task, TaskResult]], worker: WorkerPart
    ) -> tuple[list[tuple[Task, TaskResult]], list[Task], list[Command]]:
        """Spans of split chunks have ended: what is left of `finished`, what goes on, and what else to do."""
        others: list[tuple[Task, TaskResult]] = []
        again: list[Task] = []
        commands: list[Command] = []
        for task, result in finished:
            if task.spec.number not in self.chunks or result.status == TaskStatus.LOST:
                others.append((task, result))
                continue
            goes_on, discarded = self.chunks.finished(task, result)
            commands += discarded
            ended = None if goes_on else self.chunks.end_if_done(task, worker, self._set_number)
            if goes_on:
                again.append(task)
            elif ended is not None:
                commands.append(ended)
            else:
                others.append((task, result))
        return others, again, commands

    def _continue_chunk(self, task: Task, gone: GoneWorker, now_s: float, again: list[Task]) -> list[Command]:
        text = f"{self.label(task)}, ended with its worker: {gone.text}"
        attempts = self.chunks.died(task, gone.last, text)
        ended = self.chunks.end_if_done(task, gone.worker, self._set_number)
        if ended is not None:
            return [ended]
        self._rest(task, now_s + back_off_s(attempts), now_s, again)
        return []

    def retry(self, task: Task, now_s: float, again: list[Task]) -> None:
        """An attempt has failed and counts: the task goes to `again`, or rests first. It must have retries left."""
        assert task.retries_left > 0, f"task {task.spec.number} has no retries left"
        task.retries_left -= 1
        self._rest(task, now_s + back_off_s(count_attempt(task) - 1), now_s, again)

    def _rest(self, task: Task, due_s: float, now_s: float, again: list[Task]) -> None:
        if due_s <= now_s:
            again.append(task)
            return
        self._count += 1
        heappush(self.resting, (due_s, self._count, task))

    # --- those that rest

    def __bool__(self) -> bool:
        """Whether any task rests."""
        return bool(self.resting)

    def count(self) -> int:
        """How many rest that shall still run."""
        return sum(1 for _, _, task in self.resting if not task.is_cancelled)

    def next_due_s(self) -> float | None:
        """When the first of them is due."""
        return self.resting[0][0] if self.resting else None

    def due(self, now_s: float) -> list[Task]:
        """Those that have rested long enough."""
        tasks: list[Task] = []
        while self.resting and (self.resting[0][0] <= now_s or self.resting[0][2].is_cancelled):
            task = heappop(self.resting)[2]
            if not task.is_cancelled:
                tasks.append(task)
        return tasks

    def take_out(self, is_meant: Callable[[Task], bool]) -> list[Task]:
        """Those of the resting that are meant: they will come by another way."""
        taken = [item for item in self.resting if not item[2].is_cancelled and is_meant(item[2])]
        if taken:
            places = {place for _, place, _ in taken}
            self.resting = [item for item in self.resting if item[1] not in places]
            heapify(self.resting)
        return [task for _, _, task in taken]

    def clear(self) -> list[Task]:
        """All of them: they shall not run."""
        tasks = [task for _, _, task in sorted(self.resting, key=lambda item: item[1]) if not task.is_cancelled]
        self.resting.clear()
        return tasks

    # --- what people read

    def label(self, task: Task) -> str:
        """A task as errors name it."""
        extras = task.spec.extras
        name = extras.name if extras is not None and extras.name else self._names.get(task.spec.function, "")
        attempt = extras.attempt if extras is not None else 1
        span = extras.span if extras is not None else None
        if span is not None:
            attempt, attempts_max = self.chunks.attempts_of(task)
        else:
            attempts_max = attempt + max(0, task.retries_left)
        named = f"task {task.spec.number} ({name})" if name else f"task {task.spec.number}"
        return f"{named}, attempt {attempt} of {attempts_max}"

    def _why(self, task: Task, gone: GoneWorker, blamed: int) -> str:
        if task.spec.number == blamed:
            return f"{self.label(task)}, ended with its worker: {gone.text}"
        return (
            f"{self.label(task)}, may have been started in a worker that ended before it had sent the result, and "
            f"without retries no task is started twice (retries=1 would run it again): {gone.text}"
        )


def survives_node_loss(task: Task) -> bool:
    """Whether a task without retries is run again because its node was lost, or its result with one."""
    attempt = task.spec.extras.attempt if task.spec.extras is not None else 1
    return task.retries_left == NODE_LOSSES_ONLY and attempt <= NODE_LOSSES_MAX


def count_attempt(task: Task) -> int:
    """The task will run again, and what it stores has a name of its own; which attempt that is."""
    extras = task.spec.extras or TaskExtras()
    attempt = extras.attempt + 1
    task.spec = msgspec.structs.replace(task.spec, extras=msgspec.structs.replace(extras, attempt=attempt))
    return attempt


def _to_blame(tasks: list[Task], last: LastTask) -> int:
    """The number of the task that ran; where none did, of the one before: what it has broken may show only then, and a
    task whose worker always ends before its result is sent must not run for ever.
    """
    if last.running == 0:
        return max(0, last.started)
    if last.running > 0:
        return last.running
    return tasks[0].spec.number if tasks else 0  # they are run in order


def _first_unstarted(tasks: list[Task], last: LastTask) -> int:
    """The position of the first task that was surely never begun."""
    if last.started < 0:
        return len(tasks)
    for position, task in enumerate(tasks):
        if task.spec.number == last.started:
            return position + 1
    return 0  # the last that it began has ended, and its result is here: results come in order
