"""The part of an owner that cancels tasks: those that wait here, those at workers, calls of actors, streams."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clusterpool.core import owner_events as e
from clusterpool.core.worker_set import WorkerSet

if TYPE_CHECKING:
    from clusterpool.core.actors import ActorChannel
    from clusterpool.core.owner import OwnerMachine

Commands = list[e.Command]


class OwnerCancels:
    """Cancels. `targets` and `set_by_process` are the owner's."""

    def __init__(
        self, owner: OwnerMachine, targets: dict[int, WorkerSet | ActorChannel], set_by_process: dict[str, WorkerSet]
    ) -> None:
        self._owner = owner
        self._targets = targets
        self._set_by_process = set_by_process

    def stream_closed(self, event: e.StreamClosed, now_s: float) -> Commands:
        """Nobody takes more of a stream."""
        commands = self._owner.objects.close_stream(event.number, event.taken)
        return commands + self.asked(e.TaskCancelAsked(event.number, False, True), now_s)

    def asked(self, event: e.TaskCancelAsked, now_s: float) -> Commands:
        """The user wants a task not to run, or to stop."""
        owner = self._owner
        task = owner.tasks.get(event.number)
        owner.cancelled = False
        if task is None or task.is_cancelled:
            return []
        if not task.worker:
            owner.cancelled = task.is_cancelled = True
            target = self._targets.get(event.number)
            commands = owner.checked([e.FailTasks([task], "cancelled", "the task was cancelled before it started")])
            # It may have been all that a closed set waited for.
            if isinstance(target, WorkerSet):
                commands += owner.checked(target.advance(now_s))
            elif any(worker_set.rescue for worker_set in owner.sets.values()):
                commands += owner.advance_all(now_s)
            return commands
        channel = owner.actors.channel_of_process.get(task.worker)
        if channel is not None:
            return channel.interrupt(task) if event.interrupt else []
        worker_set = self._set_by_process.get(task.worker)
        if worker_set is None:
            return []
        if event.force:
            owner.cancelled = True
            return worker_set.stop(task)
        if event.recall:
            return worker_set.stopping.recall(task)
        return worker_set.stopping.interrupt(task) if event.interrupt else []

    def interrupted(self, _event: e.WorkInterrupted, now_s: float) -> Commands:
        """Ctrl-C in the program: what waits is cancelled at once, what runs is asked to stop. All workers stay."""
        owner = self._owner
        tasks = [task for task in owner.tasks.values() if not task.is_cancelled]
        running = [task for task in tasks if task.worker]
        waiting = [task for task in tasks if not task.worker]
        for task in waiting:
            task.is_cancelled = True
        text = "the program was interrupted before the task started"
        commands = owner.checked([e.FailTasks(waiting, "cancelled", text)])
        for task in running:
            commands += self.asked(e.TaskCancelAsked(task.spec.number, False, True), now_s)
        return commands + owner.advance_all(now_s)
