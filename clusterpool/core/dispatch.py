"""Which worker gets which tasks, and how many at once: shared by task leases and worker groups.

    submitted --> queue --> [fill] --> outstanding at a worker --> finished
                    ^                        |
                    +------ [take back] -----+     (a worker is idle while another has a backlog)

Each worker's backlog is kept at about BACKLOG_S of measured work. Thousands of tiny tasks travel in one message; a task
of LONG_TASK_S or more travels alone, so that it is cancellable and goes to whichever worker is free. So `chunksize=1`
is as fast as chunking by hand and still balances. Source: shared design, section 3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from clusterpool.core.messages import Address, TaskLimits, TaskResult, TaskSpec, TaskStatus

# A longer backlog means fewer messages, and results and balance that come later. At 2 ms the cost of a message (about
# 50 us on both sides together) is some per cent of the work.
BACKLOG_S = 0.002
LONG_TASK_S = 0.010
# Less work than this is not split between workers: to wake another for it costs about as much as it takes, and where
# tasks are that tiny their owner is the slower side. With 0.1 ms, the four no-ops that `joblib.Parallel(n_jobs=2)` has
# under way were split or not from one moment to the next, which cost their owner a tenth more.
SPLIT_MIN_S = 0.00015
# Bounds what one message holds, and what is lost with a worker.
OUTSTANDING_MAX = 2000
# Bounds the same in bytes, whatever the arguments: far below the longest frame, and more saves no measurable time.
BATCH_BYTES_MAX = 8 * 1024 * 1024
# A backlog that is still there after this time was underestimated: a long task sits at its head.
TAKE_BACK_AFTER_S = 0.005


# In place of a number of retries: none, but the loss of a node, which no worker is to blame for, ends no attempt.
NODE_LOSSES_ONLY = -1


class Task(msgspec.Struct, gc=False, eq=False):
    """A task in its owner's hands. Mutable; belongs to one dispatcher at a time.

    `sink` and `index` are the submitter's: the core carries them and never looks inside. (`gc=False` is safe because no
    sink holds its task; tasks come by the million and would each slow the collector down.)
    """

    spec: TaskSpec
    sink: Any
    index: int
    retries_left: int = 0  # or NODE_LOSSES_ONLY
    worker: str = ""  # process id of the worker that has it; "" while it waits here
    is_cancelled: bool = False


def limits_of(spec: TaskSpec) -> TaskLimits | None:
    """What the task asks for beyond the usual."""
    return spec.extras.limits if spec.extras is not None else None


def is_alone(spec: TaskSpec) -> bool:
    """Whether nothing else may be at the worker of this task, which may be killed for it."""
    limits = limits_of(spec)
    return limits is not None and limits.travels_alone


class WorkerSlot:
    """One worker, as its dispatcher sees it."""

    __slots__ = (
        "address", "finished_s", "functions_sent", "idle_since_s", "is_blocked", "is_long", "is_retiring",
        "is_taking_back", "lease", "outstanding", "pid", "runs_left", "sent_s", "token",
    )  # fmt: skip

    def __init__(self, address: Address, *, lease: int, pid: int, runs_max: int | None, token: Any = None) -> None:
        self.address = address
        self.lease = lease
        self.pid = pid
        self.token = token  # what the shell knows of the worker
        self.outstanding: dict[int, Task] = {}  # by task number, in the order sent, which is the order run
        self.functions_sent: set[int] = set()
        self.runs_left = runs_max
        self.is_retiring = False
        self.is_blocked = False  # its task waits for other tasks
        self.is_taking_back = False
        self.is_long = False  # what was sent last takes long, or nobody knows how long
        self.idle_since_s = 0.0
        self.sent_s = 0.0
        self.finished_s = 0.0  # when it last reported that it had run something

    @property
    def is_open(self) -> bool:
        """Whether it may be sent tasks."""
        return not (self.is_retiring or self.is_blocked)


class Batch(msgspec.Struct, frozen=True, gc=False):
    """Tasks to send to a worker, with the numbers of the functions that it has not got yet."""

    slot: WorkerSlot
    tasks: list[Task]
    functions: list[int]


class Dispatcher:
    """Queue, workers and measured durations of one worker set."""

    def __init__(self, *, runs_max: int | None = None) -> None:
        self.queue: deque[Task] = deque()
        self.slots: dict[str, WorkerSlot] = {}
        self.runs_max = runs_max
        self.outstanding_count = 0  # Invariant: the sum of len(slot.outstanding)
        self.to_retry: list[Task] = []  # ended in an exception after which they are run again; the set takes them
        self._mean_s: dict[int, float] = {}  # by function number

    # --- workers

    def add_worker(self, address: Address, *, lease: int, pid: int, token: Any = None) -> WorkerSlot:
        """A worker is ready for tasks."""
        slot = WorkerSlot(address, lease=lease, pid=pid, runs_max=self.runs_max, token=token)
        self.slots[address.process_id] = slot
        return slot

    def remove_worker(self, process_id: str) -> list[Task]:
        """The worker is gone; its unfinished tasks, in the order it would have run them."""
        slot = self.slots.pop(process_id, None)
        if slot is None:
            return []
        tasks = list(slot.outstanding.values())
        slot.outstanding.clear()
        self.outstanding_count -= len(tasks)
        for task in tasks:
            task.worker = ""
        return tasks

    # --- tasks

    def submit(self, tasks: Iterable[Task]) -> None:
        """Queue tasks behind those that wait."""
        self.queue.extend(tasks)

    def forget(self, process_id: str, task: Task) -> None:
        """A task at a worker has ended for us, whatever the worker says of it later."""
        slot = self.slots.get(process_id)
        if slot is not None and slot.outstanding.pop(task.spec.number, None) is not None:
            self.outstanding_count -= 1
        task.worker = ""

    def requeue(self, tasks: list[Task]) -> None:
        """Queue tasks again, ahead of those that wait, in their old order."""
        for task in reversed(tasks):
            task.worker = ""
            self.queue.appendleft(task)

    def finish(self, process_id: str, results: list[TaskResult], run_ns: int) -> list[tuple[Task, TaskResult]]:
        """Note what a worker has finished; the tasks with their results. Tasks it gave back are queued again."""
        slot = self.slots.get(process_id)
        if slot is None:
            return []
        outstanding = slot.outstanding
        finished: list[tuple[Task, TaskResult]] = []
        returned: list[Task] = []
        retried = len(self.to_retry)
        for result in results:
            task = outstanding.pop(result.number, None)
            if task is None:
                continue  # taken from a worker that was believed dead
            if result.status == TaskStatus.RETURNED:
                returned.append(task)
            elif result.extras is not None and result.extras.is_retryable:
                self._failed(task, result, finished)
            else:
                finished.append((task, result))
        self.outstanding_count -= len(finished) + len(returned) + len(self.to_retry) - retried
        if returned or not results:
            slot.is_taking_back = False
            if slot.runs_left is not None:
                slot.runs_left += len(returned)
            self.requeue([task for task in returned if not task.is_cancelled])
            finished.extend(
                (task, TaskResult(task.spec.number, TaskStatus.CANCELLED, b""))
                for task in returned
                if task.is_cancelled
            )
        if run_ns and len(finished) > 0:
            self._measure(finished, run_ns)
        return finished

    def _failed(self, task: Task, result: TaskResult, finished: list[tuple[Task, TaskResult]]) -> None:
        """A task has raised what it may be run again after."""
        task.worker = ""
        if task.retries_left > 0 and not task.is_cancelled:
            self.to_retry.append(task)
        else:
            finished.append((task, msgspec.structs.replace(result, extras=None)))

    def _measure(self, finished: list[tuple[Task, TaskResult]], run_ns: int) -> None:
        sample_s = run_ns * 1e-9 / len(finished)
        function = finished[-1][0].spec.function
        old = self._mean_s.get(function)
        if old is None:
            self._mean_s[function] = sample_s
            if len(self._mean_s) > 1000:  # programs that submit a fresh lambda each time
                del self._mean_s[next(iter(self._mean_s))]
        else:
            # Half and half: durations drift, and the first run of a function also imports what it needs.
            self._mean_s[function] = (old + sample_s) / 2

    # --- decisions

    def fill(self, now_s: float) -> list[Batch]:
        """Send what should be sent now."""
        batches: list[Batch] = []
        # Without workers too: what is cancelled must not make a closed set wait, or an idle one ask for workers.
        if not self._drop_cancelled() or not self.slots:
            return batches
        open_slots = [slot for slot in self.slots.values() if slot.is_open]
        workers = len(open_slots)
        if workers > 1 and self._is_too_little_to_split():
            awake = self._awake_slot(open_slots, now_s)
            if awake is not None:
                count = self._room(awake, 1, refills_in_halves=False)
                if count > 0:
                    batches.append(self._take(awake, count, now_s))
                    if not (self.queue and self._drop_cancelled()):
                        return batches
        # Emptiest first, so that every worker has something before any has a backlog.
        for slot in sorted(open_slots, key=_backlog) if workers > 1 else open_slots:
            count = self._room(slot, workers)
            if count > 0:
                batches.append(self._take(slot, count, now_s))
                if not (self.queue and self._drop_cancelled()):
                    break
        return batches

    def _awake_slot(self, slots: list[WorkerSlot], now_s: float) -> WorkerSlot | None:
        """One that has just reported is awake, and has done little work before another has woken.

        (One that has not may be busy for long.) The fullest of these, so that the others fall asleep: messages become
        fewer and larger, and the owner has a CPU for itself.
        """
        found: WorkerSlot | None = None
        most = (-1, 0.0)
        for slot in slots:
            if now_s - slot.finished_s <= BACKLOG_S:
                wakefulness = (len(slot.outstanding), slot.finished_s)
                if wakefulness > most:
                    found, most = slot, wakefulness
        return found

    def _is_too_little_to_split(self) -> bool:
        mean_s = self._mean_s.get(self.queue[0].spec.function)
        return mean_s is not None and (len(self.queue) + self.outstanding_count) * mean_s <= SPLIT_MIN_S

    @property
    def is_idle(self) -> bool:
        """Whether no task waits, and none is at a worker."""
        return not (self.outstanding_count or self.queue)

    def idle_slot(self) -> WorkerSlot | None:
        """A worker with nothing to do, which may have a task."""
        for slot in self.slots.values():
            if not slot.outstanding and slot.is_open and (slot.runs_left is None or slot.runs_left > 0):
                return slot
        return None

    def send_one(self, slot: WorkerSlot, now_s: float) -> Batch:
        """Send the only task of the queue to an idle worker."""
        return self._take(slot, 1, now_s)

    def _drop_cancelled(self) -> bool:
        queue = self.queue
        while queue and queue[0].is_cancelled:
            queue.popleft()
        return bool(queue)

    def _room(self, slot: WorkerSlot, workers: int, *, refills_in_halves: bool = True) -> int:
        """How many of the queue's tasks `slot` should get, which shares them with so many workers."""
        held = len(slot.outstanding)
        spec = self.queue[0].spec
        if held and (slot.is_long or (spec.extras is not None and is_alone(spec))):
            return 0
        mean_s = self._mean_s.get(spec.function)
        if mean_s is None or mean_s >= LONG_TASK_S:
            limit = 1
        else:
            mean_s = max(mean_s, 1e-7)
            limit = 2 if mean_s >= BACKLOG_S else min(OUTSTANDING_MAX, int(BACKLOG_S / mean_s) + 1)
            # An equal share, so that a short queue of tiny tasks still uses every worker.
            share = -(-(len(self.queue) + self.outstanding_count) // workers)
            limit = min(limit, max(share, int(SPLIT_MIN_S / mean_s)))
        if refills_in_halves and limit > 2 and held * 2 > limit:
            return 0  # a message for every finished task would cost more than the tasks
        room = limit - held
        if slot.runs_left is not None:
            room = min(room, slot.runs_left)
        return room

    def _take(self, slot: WorkerSlot, count: int, now_s: float) -> Batch:
        queue, outstanding, sent = self.queue, slot.outstanding, slot.functions_sent
        process_id = slot.address.process_id
        tasks: list[Task] = []
        functions: list[int] = []
        first_mean_s = self._mean_s.get(queue[0].spec.function)
        first_function = queue[0].spec.function
        slot.is_long = first_mean_s is None or first_mean_s >= LONG_TASK_S
        size_bytes = 0
        while queue and count and size_bytes < BATCH_BYTES_MAX:
            task = queue[0]
            spec = task.spec
            function, extras = spec.function, spec.extras
            is_for_itself = extras is not None and extras.limits is not None and extras.limits.travels_alone
            if is_for_itself and tasks:
                break
            if function != first_function and self._mean_s.get(function, LONG_TASK_S) > (first_mean_s or 0) * 2:
                break  # of unknown or longer duration: it gets a decision of its own
            queue.popleft()
            if task.is_cancelled:
                continue
            count -= 1
            task.worker = process_id
            tasks.append(task)
            size_bytes += len(spec.payload)
            if extras is not None:
                size_bytes += sum(len(value.payload) for value in extras.arguments)
            outstanding[spec.number] = task
            if function and function not in sent:
                sent.add(function)
                functions.append(function)
            if is_for_itself:
                slot.is_long = True
                break
        self.outstanding_count += len(tasks)
        if slot.runs_left is not None:
            slot.runs_left -= len(tasks)
        slot.sent_s = now_s
        return Batch(slot, tasks, functions)

    def take_back(self, now_s: float) -> list[tuple[WorkerSlot, int]]:
        """Whom to ask for how many unstarted tasks, because another worker has nothing to do."""
        if self.outstanding_count < 2 or self.queue or len(self.slots) < 2 or not self.has_late(now_s):
            return []
        late = [
            slot
            for slot in self.slots.values()
            if now_s - slot.sent_s >= TAKE_BACK_AFTER_S and len(slot.outstanding) > 1 and not slot.is_taking_back
        ]
        if not late:
            return []
        idle = len([slot for slot in self.slots.values() if not slot.outstanding and slot.is_open])
        late.sort(key=_backlog, reverse=True)
        asked = [(slot, len(slot.outstanding) // 2) for slot in late[:idle]]
        for slot, _ in asked:
            slot.is_taking_back = True
        return asked

    def has_late(self, now_s: float) -> bool:
        """Whether some worker has had a backlog for longer than was expected; else `take_back` has nothing to do."""
        due_s = now_s - TAKE_BACK_AFTER_S
        for slot in self.slots.values():  # noqa: SIM110 (asked after each message, and `any` takes twice as long)
            if slot.sent_s <= due_s and len(slot.outstanding) > 1:
                return True
        return False

    def next_look_s(self, now_s: float) -> float | None:
        """When `take_back` is worth asking again, if ever; monotonic seconds."""
        if self.outstanding_count < 2 or self.queue:
            return None
        has_room, sent_s = False, None
        for slot in self.slots.values():
            if not slot.outstanding:
                has_room = has_room or slot.is_open
            elif len(slot.outstanding) > 1 and not slot.is_taking_back and (sent_s is None or slot.sent_s < sent_s):
                sent_s = slot.sent_s
        return max(sent_s + TAKE_BACK_AFTER_S, now_s) if has_room and sent_s is not None else None

    def stuck_since_s(self) -> list[float]:
        """For each worker that has unstarted tasks: since when it may be that a long one is in their way."""
        if self.outstanding_count <= len(self.slots):
            return []
        return [
            slot.sent_s + TAKE_BACK_AFTER_S
            for slot in self.slots.values()
            if len(slot.outstanding) > 1 and not slot.is_taking_back
        ]

    def mean_s(self, task: Task) -> float | None:
        """Measured duration of tasks of this function, in seconds; None while unknown."""
        return self._mean_s.get(task.spec.function)

    def mean_of_next_s(self) -> float | None:
        """Measured duration of the queue's first task, in seconds; None while unknown."""
        return self._mean_s.get(self.queue[0].spec.function) if self.queue else None

    def retire_due(self) -> list[WorkerSlot]:
        """Workers that have run as many tasks as they may, and have nothing left to do."""
        if self.runs_max is None:
            return []
        due = [
            slot
            for slot in self.slots.values()
            if slot.runs_left is not None and slot.runs_left <= 0 and not slot.outstanding and not slot.is_retiring
        ]
        for slot in due:
            slot.is_retiring = True
        return due

    def take_out(self, is_meant: Callable[[Task], bool]) -> list[Task]:
        """Take these tasks out of the queue; not those that are cancelled, which have ended, and go at their turn."""
        taken = [task for task in self.queue if not task.is_cancelled and is_meant(task)]
        if taken:
            numbers = {task.spec.number for task in taken}
            self.queue = deque(task for task in self.queue if task.spec.number not in numbers)
        return taken

    def clear(self) -> list[Task]:
        """Take everything out of the queue."""
        tasks = [task for task in self.queue if not task.is_cancelled]
        self.queue.clear()
        return tasks


def _backlog(slot: WorkerSlot) -> int:
    return len(slot.outstanding)
