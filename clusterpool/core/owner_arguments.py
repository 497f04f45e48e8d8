"""Tasks that wait for the values of their arguments, and where they go when they have them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.actors import ActorChannel
from clusterpool.core.dispatch import Task
from clusterpool.core.worker_set import WorkerSet

if TYPE_CHECKING:
    from clusterpool.core.owner import OwnerMachine

Commands = list[e.Command]


class OwnerArguments:
    """The part of an owner's machine between submission and dispatch."""

    def __init__(self, owner: OwnerMachine) -> None:
        self._owner = owner
        self._objects = owner.objects
        self.targets: dict[int, WorkerSet | ActorChannel] = {}  # by number of a task that waits for arguments

    def await_all(
        self, task: Task, arguments: e.TaskArguments, target: WorkerSet | ActorChannel, now_s: float
    ) -> Commands:
        """Send the task to `target` when all of its dependencies have values."""
        number = task.spec.number
        self._owner.tasks[number] = task
        self.targets[number] = target
        is_creation = isinstance(target, ActorChannel) and task is target.creation
        if task.sink is None and not is_creation:
            self._objects.expect_results(task)
        if isinstance(target, ActorChannel):
            target.waiting.add(number)
            if not is_creation:
                self._owner.actors.submit(target, [task])
        else:
            target.awaiting.add(number)
        commands, is_known = self._objects.expect_arguments(task, arguments, self._owner.requests)
        return commands + self.known(task, now_s) if is_known else commands

    def run_again(self, task: Task, arguments: e.TaskArguments, target: WorkerSet, now_s: float) -> Commands:
        """The same for a task whose objects exist already."""
        number = task.spec.number
        self._owner.tasks[number] = task
        self.targets[number] = target
        target.awaiting.add(number)
        commands, is_known = self._objects.expect_arguments(task, arguments, self._owner.requests)
        return commands + self.known(task, now_s) if is_known else commands

    def await_again(self, task: Task, target: WorkerSet | ActorChannel, now_s: float) -> Commands:
        """The same for a task whose arguments are still held, but whose values may have changed, or be lost."""
        if isinstance(target, ActorChannel):
            target.queue.appendleft(task)
        return self._await_in_place(task, target, now_s)

    def _await_in_place(self, task: Task, target: WorkerSet | ActorChannel, now_s: float) -> Commands:
        number = task.spec.number
        self.targets[number] = target
        (target.waiting if isinstance(target, ActorChannel) else target.awaiting).add(number)
        commands, is_known = self._objects.await_values(task, self._owner.requests)
        return commands + self.known(task, now_s) if is_known else commands

    def node_lost(self, target: WorkerSet | ActorChannel, node_id: str, text: str, now_s: float) -> Commands:
        """A node is gone. Tasks that would look for an argument there wait for another copy, or a rebuilt one.

        (A worker would notice, too, but only after it has tried, which takes a second.) A task that rests between two
        attempts runs as soon as it can: what made it rest may have been that node.
        """

        def is_meant(task: Task) -> bool:
            return bool(_stored_only_on(task, node_id))

        commands: Commands = []
        if isinstance(target, ActorChannel):
            tasks = [task for task in target.unsent() if task.spec.number not in target.waiting and is_meant(task)]
        else:
            tasks = target.dispatcher.take_out(is_meant) + target.rescue.take_out(is_meant)
        for task in tasks:
            names = _stored_only_on(task, node_id)
            for reference in self._objects.arguments_of(task).dependencies:
                value = self._objects.table.value_of(reference)
                if value is not None and value.stored is not None and value.stored.object_id in names:
                    # Of what is our own this is known already.
                    gone = m.UnreadablePart(value.stored.object_id, [], f"its node is gone: {text}", [node_id])
                    commands += self._owner.recovery.unreadable(reference, gone)[0]
            commands += self._await_in_place(task, target, now_s)
        return commands

    def known(self, task: Task, now_s: float) -> Commands:
        """The last of a task's arguments has a value."""
        target = self.targets.pop(task.spec.number, None)
        if target is None or task.is_cancelled:
            return []
        owner = self._owner
        if not self._objects.has_values(task):  # one is lost, while it waited for another
            self.targets[task.spec.number] = target
            commands, is_known = self._objects.await_values(task, owner.requests)
            if not is_known:
                return commands
            return commands + self.known(task, now_s)
        error = self._objects.put_arguments(task)
        if isinstance(target, ActorChannel):
            target.waiting.discard(task.spec.number)
            if error is not None and task is target.creation:
                return owner.actors.cannot_create(target, error)
            if error is not None:
                task.is_cancelled = True
                return owner.checked([error]) + owner.actors.send_ready(target)
            return owner.actors.send_ready(target)
        target.awaiting.discard(task.spec.number)
        commands = owner.checked([error]) if error is not None else []
        return commands + owner.checked(target.advance(now_s) if error is not None else target.submit([task], now_s))

    def hand_over(self, worker: m.Address, tasks: list[Task]) -> Commands:
        """Tasks go to a worker: account for the references in them."""
        commands: Commands = []
        for task in tasks:
            extras = task.spec.extras
            if extras is not None:
                commands += self._objects.hand_over(worker, extras.references)
                for value in extras.arguments:
                    commands += self._objects.hand_over(worker, value.references)
        return commands

    def ended(self, task: Task) -> ActorChannel | None:
        """A task will not be sent. Returns: the actor whose later calls it held up, if any."""
        target = self.targets.pop(task.spec.number, None)
        if isinstance(target, WorkerSet):
            target.awaiting.discard(task.spec.number)
        elif target is not None:
            target.waiting.discard(task.spec.number)
            return target
        return None


def _stored_only_on(task: Task, node_id: str) -> list[str]:
    """The names of those of a task's arguments that no other node has, as far as was known when it was queued."""
    values = task.spec.extras.arguments if task.spec.extras is not None else []
    return [v.stored.object_id for v in values if v.stored is not None and v.stored.node_ids == [node_id]]
