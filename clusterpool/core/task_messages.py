"""What owners, workers and borrowers tell one another, and what all messages are made of.

A message is a frozen msgspec struct, encoded as a msgpack array that starts with the name of its type; decoding checks
each field's type, so that malformed bytes are refused at the border and nothing is ever unpickled from a stranger.
`payload: bytes` fields are opaque here: only serialization/ knows what is inside.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, NamedTuple

import msgspec

PROTOCOL_VERSION = 7


# What a number may be is checked where messages are decoded, so that no machine has to doubt what it is told. The
# bounds are far above what anybody can have, and low enough for sums and loops over them to end.
SizeBytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
WorkerCount = Annotated[int, msgspec.Meta(ge=0, le=100_000)]


class Address(NamedTuple):
    """Where a process is: its node, and its name there. A node's own process has the node's id twice."""

    node_id: str
    process_id: str

    @property
    def node(self) -> Address:
        """Its node's own process."""
        return Address(self.node_id, self.node_id)

    @property
    def is_node(self) -> bool:
        """Whether it is a node's own process."""
        return self.process_id == self.node_id


class TaskKind(IntEnum):
    """What a worker does with a task's function and arguments."""

    CALL = 0  # function(*args, **kwargs)
    MAP = 1  # [function(item) for item in items]
    STARMAP = 2  # [function(*item) for item in items]
    CREATE_ACTOR = 3  # function is the class
    ACTOR_CALL = 4  # function is the number 0; the method's name is in the extras
    STREAM = 5  # function(*args, **kwargs) is a generator; each item is sent as it is made


class TaskStatus(IntEnum):
    """How a task ended, as its worker saw it."""

    OK = 0  # payload is the value
    ERROR = 1  # payload is the exception, as dump_exception wrote it
    STORED = 2  # the value lies in the arena of the worker's node
    CANCELLED = 3
    LOST = 4  # an argument's stored copy could not be had; the owner decides what to do
    MULTIPLE = 5  # several return values, each in the extras
    STREAM_END = 6  # a generator ended after `payload` (an integer in decimal digits) items
    RETURNED = 7  # never started: taken back, or the worker was about to retire
    UNLOADABLE = 8  # as ERROR, but of unpickling the function or the arguments: the user's call was never made


class WorkerKind(IntEnum):
    """What an owner wants a worker for."""

    TASK = 0  # bounded by resources; an idle worker of the job may be reused
    GROUP = 1  # a fresh process, not bounded by free resources
    ACTOR = 2  # a fresh process that holds its resources until it ends


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Base of everything that has a type of its own on the wire."""


class Part(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of the pieces that messages are made of."""


# --- values and references ------------------------------------------------------------------------------------------


class Reference(Part, frozen=True):
    """An object, as one process tells another of it."""

    owner: Address
    number: int


class StoredValue(Part, frozen=True):
    """A value that lies in one or more arenas."""

    object_id: str
    size_bytes: SizeBytes
    node_ids: list[str]  # the primary copy's first; empty: the last copy is lost, and its owner may rebuild it
    owner: Address | None = None  # told of copies; None: nobody keeps account of them


class ValuePart(Part, frozen=True):
    """A value on its way: `payload` when small, else where it is stored, else the error in its place."""

    payload: bytes = b""
    stored: StoredValue | None = None
    error: bytes = b""
    lost_kind: str = ""  # names the error class when there is no value and never will be; `lost` says why
    lost: str = ""
    references: list[Reference] = []  # refs inside the value; the sender has registered the receiver with their owners


# --- owner and worker: tasks ----------------------------------------------------------------------------------------


class TaskLimits(Part, frozen=True):
    """What a task asks of those who run it, where its user has said more than how often to try."""

    timeout_s: float = 0.0  # longer than this it may not run; 0: no limit
    travels_alone: bool = False  # its worker may be killed for it: nothing else is sent there meanwhile
    retries_timeout: bool = False  # having run for too long, it is tried again as after its worker's death
    retry_on: bytes = b""  # pickle of the exception classes after which it is tried again


class ChunkSpan(Part, frozen=True):
    """The items of a chunk that are to be run: `low` up to `high`. `part`: counts the spans of one chunk."""

    low: int
    high: int
    part: int


class LastTask(Part, frozen=True):
    """What a worker was at when it ended. Numbers of tasks: 0 for none, -1 when nobody knows."""

    running: int = -1
    started: int = -1  # the last that it began; it may have ended
    item: int = -1  # of a chunk: the index, in the chunk, of the item that it ran
    items: int = 0  # of a chunk: how many it has
    step: int = 1  # of a chunk: it ran one of so many items, from `item` on


class ActorPlan(Part, frozen=True):
    """Of an actor with checkpoints: which life the worker holds, and when its state is saved."""

    actor_id: str
    checkpoint_every: int = 0  # calls; 0: not by their number
    checkpoint_period_s: float = -1.0  # below 0: not by time
    life: int = 0


class TaskExtras(Part, frozen=True):
    """What only some tasks have."""

    attempt: int = 1
    name: str = ""
    returns: int = 1
    arguments: list[ValuePart] = []  # the values of the ObjectRefs among the arguments, by slot
    references: list[Reference] = []  # refs inside the payload
    stored: StoredValue | None = None  # the payload itself, when it is large
    method: str = ""  # ACTOR_CALL
    concurrency: int = 1  # CREATE_ACTOR: threads or coroutines at once
    limits: TaskLimits | None = None
    span: ChunkSpan | None = None  # MAP, STARMAP: only these items
    stream_buffer: int = 0  # a generator: untaken items at most; 0 for the default, -1 for any number
    actor: ActorPlan | None = None  # CREATE_ACTOR with checkpoints


class TaskSpec(Part, frozen=True):
    """A task as its worker gets it. The results are named after `number`, which is unique for the owner."""

    number: int
    function: int  # number of a function sent before or with it; 0: the callable is the payload's first item
    kind: int
    payload: bytes  # pickle of (args, kwargs), or of a list of items, or of (callable, args, kwargs)
    extras: TaskExtras | None = None


class UnreadablePart(Part, frozen=True):
    """A stored value could not be read. `gone`: nodes that have said themselves that they have no copy. `dead`: those
    that the reader's node takes for dead, which may be wrong; others only did not answer.
    """

    object_id: str
    gone: list[str]
    text: str
    dead: list[str] = []


class ResultExtras(Part, frozen=True):
    """What only some results have."""

    value: ValuePart | None = None
    values: list[ValuePart] = []
    is_retryable: bool = False  # ERROR: of a class that the task's `retry_on` names
    unreadable: UnreadablePart | None = None  # LOST


class TaskResult(Part, frozen=True):
    """How one task ended."""

    number: int
    status: int
    payload: bytes
    extras: ResultExtras | None = None


class FunctionPart(Part, frozen=True):
    """A function or class, shipped once to each worker that needs it."""

    number: int
    payload: bytes


class SetupWorker(Message, frozen=True):
    """First message of an owner to a worker: what to do before any task."""

    env: dict[str, str]
    payload: bytes  # pickle of (initializer, initargs), or empty
    name: str
    lease: int
    references: list[Reference] = []  # inside the payload
    is_process: bool = False  # the payload is all that the worker is for: it ends with the exit code of the call


class WorkerReady(Message, frozen=True):
    """The setup is done; a worker that is a process has loaded what it was given."""

    lease: int


class WorkerSetupFailed(Message, frozen=True):
    """The initializer raised; the worker ends."""

    lease: int
    error: bytes


class StartTasks(Message, frozen=True):
    """Run these in order."""

    functions: list[FunctionPart]
    tasks: list[TaskSpec]


class TasksUnsent(Message, frozen=True):
    """A message that was to start these tasks in a process got nowhere. The process has ended, as will be heard."""

    address: Address
    numbers: list[int]


class TasksFinished(Message, frozen=True):
    """Results, in the order in which the tasks ended.

    `run_ns`: time spent running them, all together. `is_blocked`: the task that runs waits for others, so the worker
    has given back what it had not started and wants nothing more for now.
    """

    results: list[TaskResult]
    run_ns: int
    is_blocked: bool = False


class TaskStarted(Message, frozen=True):
    """A task with a limit of time has its function and arguments loaded, and begins."""

    number: int


class StreamItem(Message, frozen=True):
    """One item of a generator task."""

    number: int
    index: int
    value: ValuePart


class StreamTaken(Message, frozen=True):
    """Of a generator task's items, so many have been taken: it may go on."""

    number: int
    taken: int


class ForgetFunctions(Message, frozen=True):
    """No task of mine will use these again."""

    numbers: list[int]


class TakeBackTasks(Message, frozen=True):
    """Give back up to `count` tasks that have not started, the last ones first; comes back as RETURNED results."""

    count: int


class CancelTasks(Message, frozen=True):
    """Drop these if they have not started; interrupt them if they run and `interrupt` says so.

    Without `interrupt`, those that are dropped are reported at once.
    """

    numbers: list[int]
    interrupt: bool


class RetireWorker(Message, frozen=True):
    """Finish what you have, then end with exit code 0.

    But not while others hold references to your objects, or tasks that you have started are not done (WorkerLingers).
    `is_awaited`: I wait for your end, however long your exit handlers take.
    """

    is_awaited: bool = True


class WorkerLingers(Message, frozen=True):
    """I have done all that I was leased for, and stay only for what others may need of me.

    To the node: what my lease holds is free. To whoever has retired me: go on as if I had ended.
    """


# --- owners and borrowers -------------------------------------------------------------------------------------------


class ResolveObject(Message, frozen=True):
    """Tell me the value (or where it is) once there is one. `unreadable`: I know where it was, and it is not there."""

    request: int
    number: int
    unreadable: UnreadablePart | None = None


class ObjectResolved(Message, frozen=True):
    """Answer to ResolveObject."""

    request: int
    value: ValuePart


class AddBorrower(Message, frozen=True):
    """`borrower` has been, or is about to be, handed `count` references to these objects of yours."""

    borrower: Address
    numbers: list[int]


class RemoveBorrower(Message, frozen=True):
    """I let go of objects of yours; `counts`: how often I had been handed each."""

    numbers: list[int]
    counts: list[int]


class WatchProcess(Message, frozen=True):
    """Tell me (ProcessEnded) when this process of your node is no more."""

    process_id: str


class ProcessEnded(Message, frozen=True):
    """The process will never send anything again."""

    address: Address
    text: str


class NodeLost(Message, frozen=True):
    """A node was declared dead, and all that ran on it."""

    node_id: str
    text: str
