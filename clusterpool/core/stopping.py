r"""Tasks that are ended while they run, because their time is up or because the user wants it: their worker is killed.

    sent (alone, to an idle worker) --TaskStarted--> running --its time is up--> killed, replaced
         \--not loaded within its limit and LOADING_S---------------------------/

A task with a limit travels alone, so that its worker can be killed for it with nobody else harmed. Its time runs from
when its function and arguments are loaded: modules may take a second to import. What it waits for then counts.
"""

from __future__ import annotations

from clusterpool.core.dispatch import Batch, Dispatcher, Task, is_alone, limits_of
from clusterpool.core.messages import SIGKILL, CancelTasks, KillWorker, WorkerPart
from clusterpool.core.owner_events import Command, FailTasks, Send
from clusterpool.core.rescue import Rescue

# For loading function and arguments a task has this long beside its limit. It may fetch gigabytes from another node;
# but unpickling may also hang.
LOADING_S = 60.0


class Stopping:
    """The part of a worker set that ends running tasks. `held` and `expected` are the set's."""

    def __init__(
        self, dispatcher: Dispatcher, rescue: Rescue, *, held: dict[str, WorkerPart], expected: set[str]
    ) -> None:
        self._dispatcher = dispatcher
        self._rescue = rescue
        self._held = held
        self._expected = expected
        self.deadlines: dict[str, tuple[float, Task]] = {}  # by process id, which has at most one such task
        self._targets: dict[str, int] = {}  # by process id: the number of the task for whose sake we end it

    # --- limits of time

    def sent(self, batch: Batch) -> None:
        """A batch goes out that holds a task which may take long."""
        if is_alone(batch.tasks[0].spec):
            limits = limits_of(batch.tasks[0].spec)
            if limits is not None and limits.timeout_s > 0:
                deadline_s = batch.slot.sent_s + limits.timeout_s + LOADING_S
                self.deadlines[batch.slot.address.process_id] = (deadline_s, batch.tasks[0])

    def started(self, process_id: str, number: int, now_s: float) -> None:
        """The task has been loaded: from now on its time runs."""
        deadline = self.deadlines.get(process_id)
        if deadline is not None and deadline[1].spec.number == number:
            limits = limits_of(deadline[1].spec)
            assert limits is not None, f"task {number} has no limit"
            self.deadlines[process_id] = (now_s + limits.timeout_s, deadline[1])

    def is_idle(self, process_id: str) -> None:
        """The worker has nothing to do any more."""
        self.deadlines.pop(process_id, None)

    def next_due_s(self) -> float | None:
        """When the next task's time is up."""
        return min((deadline_s for deadline_s, _ in self.deadlines.values()), default=None)

    def stop_overdue(self, now_s: float) -> list[Command]:
        """Tasks have run for longer than they may: their workers are killed, and they fail now.

        Not when the worker is gone: one that hangs in the kernel, on a dead file server for instance, never goes.
        """
        commands: list[Command] = []
        due = [process_id for process_id, (deadline_s, _) in self.deadlines.items() if deadline_s <= now_s]
        for process_id in due:
            task = self.deadlines.pop(process_id)[1]
            worker, limits = self._held.get(process_id), limits_of(task.spec)
            if worker is None or limits is None or task.worker != process_id:
                continue
            text = (
                f"{self._rescue.label(task)}, ran for longer than its limit of {limits.timeout_s:g} s on worker "
                f"{process_id} (pid {worker.pid}) of node {worker.address.node_id}, which was killed for it; if it "
                "needs more, raise timeout=; if it hangs, `py-spy dump` shows where"
            )
            commands.append(self._kill(task, worker, text))
            self._dispatcher.forget(process_id, task)
            if task.is_cancelled:
                commands.append(FailTasks([task], "cancelled", "the task was cancelled", worker))
            elif limits.retries_timeout and task.retries_left > 0:
                again: list[Task] = []
                self._rescue.retry(task, now_s, again)
                self._dispatcher.requeue(again)
            else:
                commands.append(FailTasks([task], "timeout", text, worker))
        return commands

    # --- the user's wish

    def kill_running(self, task: Task) -> list[Command]:
        """Stop a task that runs, by ending its worker."""
        worker = self._held.get(task.worker)
        if worker is None:
            return []
        task.is_cancelled = True
        slot = self._dispatcher.slots.get(task.worker)
        if slot is not None and next(iter(slot.outstanding), None) != task.spec.number:
            return self.interrupt(task)  # it has not started: whichever runs there must not die for it
        return [self._kill(task, worker, "a task of it was cancelled")]

    def discard(self, task: Task) -> list[Command]:
        """Nobody waits for this attempt any more: end it if it runs, and let its worker do something else."""
        task.is_cancelled = True
        process_id = task.worker
        worker, slot = self._held.get(process_id), self._dispatcher.slots.get(process_id)
        if worker is None or slot is None:
            return []
        is_running = next(iter(slot.outstanding), None) == task.spec.number
        text = "another attempt at its task was quicker"
        commands = [self._kill(task, worker, text)] if is_running else self.interrupt(task)
        self._dispatcher.forget(process_id, task)
        return commands

    def recall(self, task: Task) -> list[Command]:
        """Ask a worker to drop a task, if it is behind others there and has not started. It reports that it has."""
        slot = self._dispatcher.slots.get(task.worker)
        if slot is None or next(iter(slot.outstanding), None) == task.spec.number:
            return []
        return [Send(slot.address, CancelTasks([task.spec.number], False))]

    def interrupt(self, task: Task) -> list[Command]:
        """Ask a worker to drop or interrupt a task."""
        slot = self._dispatcher.slots.get(task.worker)
        if slot is None:
            return []
        return [Send(slot.address, CancelTasks([task.spec.number], True))]

    def _kill(self, task: Task, worker: WorkerPart, text: str) -> Command:
        process_id = worker.address.process_id
        self._expected.add(process_id)
        self._targets[process_id] = task.spec.number
        slot = self._dispatcher.slots.get(process_id)
        if slot is not None:
            slot.is_retiring = True
        return Send(worker.address.node, KillWorker(worker.lease, SIGKILL, text))

    def expect_loss(self, node_id: str) -> None:
        """A node is gone, and the group shrinks with it: those of its workers that have nothing to do just leave."""
        for process_id, slot in self._dispatcher.slots.items():
            if slot.address.node_id == node_id and not slot.outstanding:
                self._expected.add(process_id)

    def gone(self, process_id: str) -> int:
        """The worker is no more, or not ours; the number of the task for whose sake we ended it, 0 for none."""
        self.deadlines.pop(process_id, None)
        return self._targets.pop(process_id, 0)
