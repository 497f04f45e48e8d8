"""What the unfinished tasks of an owner say when there is no cluster for them any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clusterpool.core import owner_events as e
from clusterpool.core.actors import ActorChannel
from clusterpool.core.dispatch import Task
from clusterpool.core.rescue import Rescue

if TYPE_CHECKING:
    from clusterpool.core.owner import OwnerMachine

# So many say which task they are of; a text for each of a million that wait would take more memory than the tasks.
NAMED_MAX = 1000


def failures_at_close(owner: OwnerMachine, event: e.ClientClosed) -> list[e.FailTasks]:
    """All unfinished tasks fail. The oldest of them, which are those that run, tell which they are and where."""
    tasks = list(owner.tasks.values())
    channels = {
        number: channel
        for channel in owner.actors.channels.values()
        for number in (*channel.outstanding, *(task.spec.number for task in channel.queue))
    }
    rescue = Rescue(owner.functions.names, owner.chunks)
    failures: list[e.FailTasks] = []
    for task in tasks[:NAMED_MAX]:
        text = f"{_named(owner, rescue, channels.get(task.spec.number), task)}: {event.text}"
        failures.append(e.FailTasks([task], _kind_of(task, event), text))
    unnamed = tasks[NAMED_MAX:]
    for with_sink in (True, False):
        rest = [task for task in unnamed if (task.sink is not None) == with_sink]
        if rest:
            failures.append(e.FailTasks(rest, _kind_of(rest[0], event), event.text))
    return failures


def _kind_of(task: Task, event: e.ClientClosed) -> str:
    return event.kind if task.sink is not None else "not_connected"


def _named(owner: OwnerMachine, rescue: Rescue, channel: ActorChannel | None, task: Task) -> str:
    label = channel.label(task) if channel is not None else rescue.label(task)
    if not task.worker:
        return f"{label}, had not begun"
    where = channel.address if channel is not None else owner.address_of(task.worker)
    on_node = f" of node {where.node_id}" if where is not None else ""
    return f"{label}, was at worker {task.worker}{on_node}"
