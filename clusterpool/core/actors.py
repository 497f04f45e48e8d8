"""Calls to one actor from one process: in order, as fast as the actor takes them.

    pending (no address yet) --> alive --> dead
       calls queue                | ^ calls are sent at once, in the order of submission; a call that waits for an
                                  v | argument holds back those behind it, and so do OUTSTANDING_MAX without a result
                              restarting: calls queue; of those under way, the ones that may be sent again stand first

The creator also holds the lease of the actor's worker and sends the creation task ahead of every call. Each life of an
actor has a process of its own, so that what a former life says is known by its source, and is not heard.
"""

from __future__ import annotations

from collections import deque

import msgspec

from clusterpool.core.dispatch import Task
from clusterpool.core.messages import (
    ActorPart,
    Address,
    CancelTasks,
    FunctionPart,
    JobPart,
    Reference,
    StartTasks,
    TaskResult,
    WorkerDemand,
)
from clusterpool.core.owner_events import Command, FailTasks, Send, SetupPlan

# What one message holds at most: the actor's results come back at least this often.
BATCH_MAX = 1000
# What an actor that does not keep up has to hold of one caller; the rest waits here. More calls than run at once in any
# actor in sight, so that calls which wait for one another are all there.
OUTSTANDING_MAX = 10_000
# The same in bytes, beyond what runs at once by default in an actor with coroutines (1000).
OUTSTANDING_BYTES_MAX = 64 * 1024 * 1024
_ALWAYS_SENT = 1000


class ActorChannel:
    """The calls of this process to one actor."""

    def __init__(self, actor: ActorPart) -> None:
        self.actor = actor
        self.queue: deque[Task] = deque()
        self.outstanding: dict[int, Task] = {}
        self.waiting: set[int] = set()  # numbers of queued calls whose arguments are not known yet
        self.is_creator = False
        self.request = 0  # the creator's request for a worker, or anybody's for news
        self.is_worker_asked = False  # the creator: it is for a worker
        self.wish: tuple[WorkerDemand, JobPart] | None = None  # what it asked for
        self.lease = 0
        self.creation: Task | None = None
        self.is_creation_sent = False
        self.class_payload = b""  # the creator's, from the first creation on
        self.setup = SetupPlan()
        self.error = b""  # the exception of its constructor, when that was its end
        self.lifetime: Reference | None = None  # of somebody else's actor: what its handles are counted by
        self.is_held = False  # our calls keep it alive
        self.is_released = False  # the creator: nobody has a handle any more
        self.is_retiring = False
        self._outstanding_bytes = 0
        self.streams: set[int] = set()  # numbers of unfinished calls that are generators
        self.undelivered: set[int] = set()  # numbers of calls under way that surely never got to the actor's process

    @property
    def address(self) -> Address | None:
        """Where the actor's worker is, once known."""
        return self.actor.address

    def submit(self, tasks: list[Task]) -> None:
        """Queue calls; `send_ready` sends them."""
        self.queue.extend(tasks)

    def unsent(self) -> list[Task]:
        """What the actor's worker has not been sent: the creation, if it is ours, and calls."""
        if self.actor.state == "dead":
            return []
        creation = [self.creation] if self.creation is not None and not self.is_creation_sent else []
        return [*creation, *(task for task in self.queue if not task.is_cancelled)]

    def send_ready(self, functions: dict[int, bytes]) -> list[tuple[list[Task], Send]]:
        """Batches to send now: everything up to the first call that waits for an argument."""
        address = self.actor.address
        if self.actor.state == "dead" or address is None:
            return []
        batches: list[tuple[list[Task], Send]] = []
        if self.is_creator and not self.is_creation_sent:
            creation = self.creation
            assert creation is not None
            if creation.spec.number in self.waiting:
                return []
            self.is_creation_sent = True
            self.outstanding[creation.spec.number] = creation
            self._outstanding_bytes += len(creation.spec.payload)
            # For a later life too: the user may have let go of the class by then.
            self.class_payload = self.class_payload or functions[creation.spec.function]
            parts = [FunctionPart(creation.spec.function, self.class_payload)]
            extras = creation.spec.extras
            if extras is not None and extras.actor is not None:
                plan = msgspec.structs.replace(extras.actor, life=self.actor.life)
                creation.spec = msgspec.structs.replace(
                    creation.spec, extras=msgspec.structs.replace(extras, actor=plan)
                )
            batches.append(([creation], Send(address, StartTasks(parts, [creation.spec]))))
        queue = self.queue
        while queue:
            tasks: list[Task] = []
            while queue and len(tasks) < BATCH_MAX and queue[0].spec.number not in self.waiting and self._has_room():
                task = queue.popleft()
                if not task.is_cancelled:
                    tasks.append(task)
                    task.worker = address.process_id
                    self.outstanding[task.spec.number] = task
                    self._outstanding_bytes += len(task.spec.payload)
            if not tasks:
                break
            batches.append((tasks, Send(address, StartTasks([], [task.spec for task in tasks]))))
        return batches

    def _has_room(self) -> bool:
        count = len(self.outstanding)
        if not count:
            self._outstanding_bytes = 0
        is_small = count < _ALWAYS_SENT or self._outstanding_bytes < OUTSTANDING_BYTES_MAX
        return count < OUTSTANDING_MAX and is_small

    def finished(self, results: list[TaskResult]) -> list[tuple[Task, TaskResult]]:
        """Match results with their calls."""
        finished: list[tuple[Task, TaskResult]] = []
        for result in results:
            task = self.outstanding.pop(result.number, None)
            if task is not None:
                self._outstanding_bytes -= len(task.spec.payload)
                finished.append((task, result))
        return finished

    def life_ended(self, text: str) -> list[Command]:
        """The worker is gone, but the actor may come again: calls under way wait for that, or fail."""
        self.actor = msgspec.structs.replace(self.actor, state="restarting", text=text, address=None)
        self.is_creation_sent = self.is_retiring = False
        self.streams.clear()
        failed: list[Task] = []
        again: list[Task] = []
        # Behind a constructor that has not returned no call has started.
        was_made = self.creation is None or self.creation.spec.number not in self.outstanding
        for task in self.outstanding.values():
            if task is self.creation:
                continue
            may_have_begun = was_made and task.spec.number not in self.undelivered
            if task.is_cancelled or (may_have_begun and task.retries_left == 0):
                failed.append(task)
                continue
            task.retries_left -= may_have_begun  # below 0 without limit: how many there were is told from it
            task.worker = ""
            again.append(task)
        self.outstanding.clear()
        self.undelivered.clear()
        self._outstanding_bytes = 0
        self.queue.extendleft(reversed(again))
        if not self.actor.retries:
            text = f"{text}; max_task_retries= would send the call to the actor's next life"
        return [FailTasks([task], "actor_unavailable", self._why(task, text)) for task in failed]

    def died(self, text: str, error: bytes = b"") -> list[Command]:
        """The actor is no more: its calls fail, and so will all later ones."""
        self.actor = msgspec.structs.replace(self.actor, state="dead", text=text, address=None)
        self.error = error
        begun = [task for task in self.outstanding.values() if task is not self.creation]
        waiting = list(self.queue)
        self.outstanding.clear()
        self.queue.clear()
        commands: list[Command] = [
            FailTasks([task], "actor_died", self._why(task, text), None, error) for task in begun
        ]
        return commands + self.refused(waiting)

    def refused(self, tasks: list[Task]) -> list[Command]:
        """Calls that the dead actor has not been sent fail."""
        text, error = self.actor.text, self.error
        return [
            FailTasks(
                [task], "actor_died", f"{self.label(task)}, was not begun: its actor has ended: {text}", None, error
            )
            for task in tasks
        ]

    def label(self, task: Task) -> str:
        """A call as errors name it."""
        extras, actor = task.spec.extras, self.actor
        if task is self.creation:
            return f"task {task.spec.number} ({actor.class_name}), attempt {actor.life + 1}"
        method = f".{extras.method}" if extras is not None and extras.method else ""
        attempts = f"attempt {actor.retries - task.retries_left + 1}"
        if actor.retries >= 0:
            attempts += f" of {actor.retries + 1}"
        return f"task {task.spec.number} ({actor.class_name}{method}), {attempts}"

    def _why(self, task: Task, text: str) -> str:
        return f"{self.label(task)}, ended with its actor: {text}"

    def interrupt(self, task: Task) -> list[Command]:
        """Ask the actor to drop or interrupt one call."""
        if self.actor.address is None:
            return []
        return [Send(self.actor.address, CancelTasks([task.spec.number], True))]
