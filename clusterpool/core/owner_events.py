"""What an owner's machine hears (past tense) and what it asks its shell to do (imperative)."""

from __future__ import annotations

from typing import Any

import msgspec

from clusterpool.core.dispatch import Task
from clusterpool.core.messages import (
    ActorPart,
    Address,
    JobPart,
    LastTask,
    Message,
    Reference,
    TaskResult,
    UnreadablePart,
    ValuePart,
    WorkerDemand,
    WorkerPart,
)


class Event(msgspec.Struct, frozen=True, gc=False):
    """Base of the events."""


class Command(msgspec.Struct, frozen=True, gc=False):
    """Base of the commands."""


class SetupPlan(msgspec.Struct, frozen=True, gc=False):
    """What each worker of a set is told before its first task."""

    name: str = ""
    env: dict[str, str] = {}
    payload: bytes = b""  # pickle of (initializer, initargs), or empty
    references: list[Reference] = []  # inside the payload; the shell keeps them alive


class TaskArguments(msgspec.Struct, frozen=True, gc=False):
    """The references that a task carries, apart from its payload."""

    dependencies: list[Reference]  # replaced by their values before the task starts, by slot
    references: list[Reference]  # inside the payload, passed on as references
    payload_object: Reference | None = None  # the payload itself, when it is large
    holders: Any = None  # the shell's: keeps all of them alive until the machine counts them itself
    kept: Any = None  # the shell's: what else the payload needs, each time that it is loaded


# --- events ---------------------------------------------------------------------------------------------------------


class SetOpened(Event, frozen=True):
    """A worker set is wanted. `size` None: as many leases as the queue needs."""

    set_number: int
    demand: WorkerDemand
    setup: SetupPlan
    size: int | None
    runs_max: int | None = None
    safe_to_repeat: bool = False  # a task may be started a second time while it runs
    follows_cluster: bool = False  # it shall have a worker for each CPU, as nodes come and go; `size`: how many now


class SetResized(Event, frozen=True):
    """A group shall have another size."""

    set_number: int
    size: int
    follows_cluster: bool = False  # it shall have a worker for each CPU; `size`: how many that are now


class SetClosed(Event, frozen=True):
    """No more tasks will come; the workers end when all is done."""

    set_number: int


class SetTerminated(Event, frozen=True):
    """End the set's workers at once; its tasks are cancelled."""

    set_number: int


class FunctionAdded(Event, frozen=True):
    """A function was pickled under this number."""

    number: int
    payload: bytes
    name: str = ""


class FunctionsDropped(Event, frozen=True):
    """No more tasks of these functions will be submitted."""

    numbers: list[int]


class ClientClosed(Event, frozen=True):
    """The connection to the cluster is gone for good. `kind`: names the error class for tasks with a sink."""

    kind: str
    text: str


class TasksSubmitted(Event, frozen=True):
    """Tasks without references."""

    set_number: int
    tasks: list[Task]


class TaskWithArgumentsSubmitted(Event, frozen=True):
    """A task with references among its arguments. `actor_id`: for a call of an actor."""

    set_number: int
    actor_id: str
    task: Task
    arguments: TaskArguments


class ActorOpened(Event, frozen=True):
    """This process creates an actor: lease a worker and make it there."""

    actor: ActorPart
    demand: WorkerDemand
    setup: SetupPlan
    creation: Task
    arguments: TaskArguments | None
    lifetime: int = 0  # number of the object whose end is the actor's


class ChildOpened(Event, frozen=True):
    """A `Process` is started: `setup` is what it runs. `job`: with the environment that it shall have."""

    set_number: int
    demand: WorkerDemand
    setup: SetupPlan
    job: JobPart


class ChildSignalled(Event, frozen=True):
    """A child shall get this signal."""

    set_number: int
    signal: int


class ChildDropped(Event, frozen=True):
    """Nobody waits for a child's start any more."""

    set_number: int


class ProcessWatched(Event, frozen=True):
    """Somebody here wants to know when this process ends."""

    set_number: int
    address: Address


class ActorMet(Event, frozen=True):
    """This process got a handle of somebody else's actor. `lifetime`: the object that its handles are counted by."""

    actor: ActorPart
    lifetime: Reference | None = None


class ActorKilled(Event, frozen=True):
    """The user has ended an actor for good."""

    actor_id: str
    text: str


class StreamClosed(Event, frozen=True):
    """Nobody will take more items of a generator task than the first `taken`."""

    number: int
    taken: int


class ItemsTaken(Event, frozen=True):
    """Of a generator task's items, so many have been taken."""

    number: int
    taken: int


class ActorCallsSubmitted(Event, frozen=True):
    """Calls without references, in order."""

    actor_id: str
    tasks: list[Task]


class TaskCancelAsked(Event, frozen=True):
    """The user wants this task not to run, or (force) to stop. The answer is `OwnerMachine.cancelled`."""

    number: int
    force: bool
    interrupt: bool = False
    recall: bool = False  # if it waits behind others in a worker, ask for it; it will be reported as cancelled


class WorkInterrupted(Event, frozen=True):
    """Ctrl-C in the program: none of its tasks and calls shall go on."""


class ReferencesHeld(Event, frozen=True):
    """References arrived in a message."""

    references: list[Reference]


class ReferencesMade(Event, frozen=True):
    """Python references were made here of objects that this process knows already, or is about to ask for."""

    references: list[Reference]


class ReferencesDropped(Event, frozen=True):
    """Local references went: (owner, number) pairs, one an instance."""

    keys: list[tuple[Address, int]]


class ValuePut(Event, frozen=True):
    """The user put a value: a new object of this process."""

    number: int
    value: ValuePart


class ValueWanted(Event, frozen=True):
    """Somebody here waits for this object."""

    reference: Reference


class ValueUnreadable(Event, frozen=True):
    """A stored value could not be read here."""

    reference: Reference
    unreadable: UnreadablePart


class ResultRead(Event, frozen=True):
    """The stored result of a task with a sink has been read: the task need not run again."""

    number: int


class ChunkRead(Event, frozen=True):
    """All parts of a split chunk, some of which had been stored, have been read."""

    number: int


class ResultUnreadable(Event, frozen=True):
    """The stored result of a task with a sink is lost."""

    task: Task
    text: str


class MessageArrived(Event, frozen=True):
    """From another process."""

    source: Address
    message: Message


class ProcessGone(Event, frozen=True):
    """A connection broke, or the node says so."""

    address: Address
    text: str


class Retiring(Event, frozen=True):
    """This process has done its work, and ends as soon as nobody needs it any more."""


class Retired(Event, frozen=True):
    """This process ends now, of itself: nobody needs it any more."""


class TimePassed(Event, frozen=True):
    """`next_wakeup_s` has come."""


# --- commands -------------------------------------------------------------------------------------------------------


class Send(Command, frozen=True):
    """Send a message to a process, in order with all others to it."""

    destination: Address
    message: Message


class DeliverResults(Command, frozen=True):
    """Tasks with a sink have ended."""

    results: list[tuple[Task, TaskResult]]
    worker: Any  # WorkerPart of the worker that ran them


class ChunkPart(msgspec.Struct, frozen=True, gc=False):
    """What became of the items of a chunk from `low` up to `high`: a result, or why there will be none."""

    low: int
    high: int
    result: TaskResult | None
    text: str

    @property
    def is_stored(self) -> bool:
        """Whether its result lies in a store."""
        value = self.result.extras.value if self.result is not None and self.result.extras is not None else None
        return value is not None and value.stored is not None


class DeliverChunk(Command, frozen=True):
    """A chunk that was run in parts has ended; `parts` in order, all items in exactly one."""

    task: Task
    parts: list[ChunkPart]
    worker: Any
    set_number: int = 0

    @property
    def has_stored(self) -> bool:
        """Whether any part lies in a store: then ChunkRead is to follow."""
        return any(part.is_stored for part in self.parts)


class FailTasks(Command, frozen=True):
    """Tasks with a sink will never have a result. `kind` names the error class."""

    tasks: list[Task]
    kind: str
    text: str
    worker: Any = None
    error: bytes = b""  # the exception to raise instead, when there is one
    last: LastTask | None = None  # of a chunk that may not be started again: at which item its worker ended


class ValuesKnown(Command, frozen=True):
    """These objects have values now."""

    keys: list[tuple[Address, int]]


class SetWorkerJoined(Command, frozen=True):
    """A worker of a group is ready."""

    set_number: int
    worker: WorkerPart


class SetWorkerLeft(Command, frozen=True):
    """A worker of a group is gone."""

    set_number: int
    worker: WorkerPart
    exit_code: int
    text: str
    was_expected: bool
    is_node_lost: bool = False


class SetSizeChanged(Command, frozen=True):
    """A group that follows the cluster has another size from now on."""

    set_number: int
    size: int


class SetSetupFailed(Command, frozen=True):
    """A worker's initializer raised `error`; without one, workers ended in it until no other was tried."""

    set_number: int
    error: bytes
    text: str


class SetEnded(Command, frozen=True):
    """A closed or terminated set has no worker left."""

    set_number: int


class ChildStarted(Command, frozen=True):
    """A child runs in this worker."""

    set_number: int
    worker: WorkerPart


class ChildLoaded(Command, frozen=True):
    """A child has what it was given."""

    set_number: int


class ChildEnded(Command, frozen=True):
    """A child has ended."""

    set_number: int
    exit_code: int


class ChildFailed(Command, frozen=True):
    """A child never ran. `kind` names the error class."""

    set_number: int
    kind: str
    text: str


class WatchedEnded(Command, frozen=True):
    """A watched process has ended, or is not to be seen any more."""

    set_number: int


class StreamMoved(Command, frozen=True):
    """A generator task has a new item, or an end."""

    number: int


class ActorMoved(Command, frozen=True):
    """An actor's state changed."""

    actor: ActorPart


class Stream:
    """What a generator task has yielded so far."""

    __slots__ = ("count", "is_ended", "items", "source", "step", "taken")

    def __init__(self, step: int) -> None:
        self.items: list[int] = []  # object numbers, by index
        self.count: int | None = None  # known once it has ended well
        self.is_ended = False
        self.source: Address | None = None  # the process that runs the generator
        self.step = step  # the taker tells each time it has taken so many
        self.taken = 0  # as the generator was told
