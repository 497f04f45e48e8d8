"""Every message that one process of the cluster sends another, in the order of a task's life.

A message is a frozen msgspec struct, encoded as a msgpack array that starts with the name of its type; decoding checks
each field's type, so that malformed bytes are refused at the border and nothing is ever unpickled from a stranger.
`payload: bytes` fields are opaque here: only serialization/ knows what is inside.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import msgspec

PROTOCOL_VERSION = 1


class Address(NamedTuple):
    """Where a process is: its node, and its name there. A node's own process has the node's id twice."""

    node_id: str
    process_id: str


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
    size_bytes: int
    node_ids: list[str]


class ValuePart(Part, frozen=True):
    """A value on its way: `payload` when small, else where it is stored, else the error in its place."""

    payload: bytes = b""
    stored: StoredValue | None = None
    error: bytes = b""
    lost_kind: str = ""  # names the error class when there is no value and never will be; `lost` says why
    lost: str = ""
    references: list[Reference] = []  # refs inside the value; the sender has registered the receiver with their owners


# --- owner and worker: tasks ----------------------------------------------------------------------------------------


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


class TaskSpec(Part, frozen=True):
    """A task as its worker gets it. The results are named after `number`, which is unique for the owner."""

    number: int
    function: int  # number of a function sent before or with it; 0: the callable is the payload's first item
    kind: int
    payload: bytes  # pickle of (args, kwargs), or of a list of items, or of (callable, args, kwargs)
    extras: TaskExtras | None = None


class ResultExtras(Part, frozen=True):
    """What only some results have."""

    value: ValuePart | None = None
    values: list[ValuePart] = []


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


class WorkerReady(Message, frozen=True):
    """The setup is done."""

    lease: int


class WorkerSetupFailed(Message, frozen=True):
    """The initializer raised; the worker ends."""

    lease: int
    error: bytes


class StartTasks(Message, frozen=True):
    """Run these in order."""

    functions: list[FunctionPart]
    tasks: list[TaskSpec]


class TasksFinished(Message, frozen=True):
    """Results, in the order in which the tasks ended.

    `run_ns`: time spent running them, all together. `is_blocked`: the task that runs waits for others, so the worker
    has given back what it had not started and wants nothing more for now.
    """

    results: list[TaskResult]
    run_ns: int
    is_blocked: bool = False


class TaskStarted(Message, frozen=True):
    """A long task has begun (sent only when the worker's message thread has to step in)."""

    number: int


class StreamItem(Message, frozen=True):
    """One item of a generator task."""

    number: int
    index: int
    value: ValuePart


class ForgetFunctions(Message, frozen=True):
    """No task of mine will use these again."""

    numbers: list[int]


class TakeBackTasks(Message, frozen=True):
    """Give back up to `count` tasks that have not started, the last ones first; comes back as RETURNED results."""

    count: int


class CancelTasks(Message, frozen=True):
    """Drop these if they have not started; interrupt them if they run."""

    numbers: list[int]
    interrupt: bool


class RetireWorker(Message, frozen=True):
    """Finish what you have, then end with exit code 0.

    `lingers`: but not while others hold references to your objects, or need the actors that you made.
    """

    lingers: bool = False


# --- owners and borrowers -------------------------------------------------------------------------------------------


class ResolveObject(Message, frozen=True):
    """Tell me the value (or where it is) once there is one."""

    request: int
    number: int


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


# --- processes and their node ---------------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """First message on every connection, both ways."""

    protocol: int
    address: Address
    kind: str  # "driver", "worker", "node", "tool"
    pid: int
    job_id: str
    python_version: str
    version: str = ""  # of clusterpool


class JobPart(Part, frozen=True):
    """What a worker must know of the job that it works for."""

    job_id: str
    namespace: str
    host: str
    cwd: str
    sys_path: list[str]
    main_path: str
    env: dict[str, str]
    runtime_env: str  # JSON
    owner: Address
    detached: bool = False
    authkey: bytes = b""  # of the driver's `multiprocessing`: workers need it to use proxies of its managers


class RegisterProcess(Message, frozen=True):
    """A driver or worker joins its node. A driver brings its job."""

    job: JobPart | None
    wants_logs: bool = False


class Registered(Message, frozen=True):
    """Answer to RegisterProcess."""

    node_id: str
    cluster_id: str
    host: str
    arena_path: str
    arena_bytes: int
    processes_folder: str
    num_cpus: float


class LeaveNode(Message, frozen=True):
    """A driver ends in good order: clean up, pass on the last lines that its workers printed, and answer LeftNode."""


class LeftNode(Message, frozen=True):
    """Answer to LeaveNode."""


class WorkerDemand(Part, frozen=True):
    """What kind of worker is wanted."""

    kind: int
    resources: dict[str, float]
    name: str = ""
    env: dict[str, str] = {}
    strategy: str = ""  # "", "spread", "node:<id>" (must be there), "near:<id>" (rather there)
    stored: list[StoredValue] = []  # large arguments of the first task: placed where their bytes are
    actor_id: str = ""


class RequestWorkers(Message, frozen=True):
    """Lease me `count` workers of this kind."""

    request: int
    count: int
    demand: WorkerDemand
    job: JobPart
    hops: int = 0
    origin: Address | None = None  # the owner, when a node passes the request on


class CancelRequest(Message, frozen=True):
    """I need `count` fewer of what I asked for with this request."""

    request: int
    count: int


class WorkerPart(Part, frozen=True):
    """A leased worker."""

    address: Address
    pid: int
    host: str
    lease: int
    gpu_ids: list[int] = []


class WorkerGranted(Message, frozen=True):
    """One of the workers that you asked for."""

    request: int
    worker: WorkerPart


class RequestFailed(Message, frozen=True):
    """These workers will never come. `kind`: `infeasible`, `start_failed`, `environment`."""

    request: int
    count: int
    kind: str
    text: str


class ReleaseWorkers(Message, frozen=True):
    """I need these leases no more. `ends`: the process retires by itself (do not hand it to anybody else)."""

    leases: list[int]
    ends: bool


class KillWorker(Message, frozen=True):
    """End this worker of mine at once, with this signal."""

    lease: int
    signal: int
    text: str


class ReclaimLeases(Message, frozen=True):
    """Others are waiting: give back leases that you do not use right now."""


class WorkerExited(Message, frozen=True):
    """A worker that you hold is no more. `exit_code`: negative for a signal, as in multiprocessing.

    `task`: the number of the task that it ran; 0 when it ran none, -1 when nobody knows.
    """

    lease: int
    address: Address
    exit_code: int
    text: str
    task: int = -1


class WorkerBlocked(Message, frozen=True):
    """I wait for other tasks: my CPU is free for them."""


class WorkerUnblocked(Message, frozen=True):
    """I go on."""


class LogLines(Message, frozen=True):
    """What a worker of your job printed. `stream`: 1 standard output, 2 standard error."""

    name: str
    pid: int
    node_id: str
    stream: int
    lines: list[str]


# --- the object store -----------------------------------------------------------------------------------------------


class CreateObject(Message, frozen=True):
    """Make room in the arena."""

    request: int
    object_id: str
    size_bytes: int


class ObjectCreated(Message, frozen=True):
    """Write it at `offset`, then seal it."""

    request: int
    offset: int


class StoreFailed(Message, frozen=True):
    """Answer to CreateObject or PinObject. `kind`: `too_large`, `store_full`, `disk_full`, `lost`, `exists`."""

    request: int
    kind: str
    text: str


class SealObject(Message, frozen=True):
    """The bytes are there; the object can be read from now on."""

    object_id: str


class AbortObject(Message, frozen=True):
    """I shall not finish writing this."""

    object_id: str


class PinObject(Message, frozen=True):
    """Bring the object to my node if it is not there, and keep it where it is while I read it."""

    request: int
    stored: StoredValue


class ObjectPinned(Message, frozen=True):
    """The object is at `offset` of the arena and stays there until you unpin it. `is_scarce`: copy it, and unpin now."""

    request: int
    offset: int
    size_bytes: int
    is_scarce: bool = False


class UnpinObjects(Message, frozen=True):
    """I read these no more."""

    object_ids: list[str]


class FreeObjects(Message, frozen=True):
    """From the owner: nobody will ask for these again."""

    object_ids: list[str]


# --- actors ---------------------------------------------------------------------------------------------------------


class ActorPart(Part, frozen=True):
    """What a handle needs to know of an actor."""

    actor_id: str
    class_name: str
    methods: dict[str, int]  # name to number of return values (-1: streaming)
    address: Address | None
    state: str  # "pending", "alive", "dead"
    text: str = ""
    name: str = ""
    namespace: str = ""
    detached: bool = False
    job_id: str = ""


class RegisterActor(Message, frozen=True):
    """Make the actor known to the cluster, and claim its name."""

    request: int
    actor: ActorPart
    get_if_exists: bool = False


class ActorChanged(Message, frozen=True):
    """From the creator: it runs at `address` now, or its constructor failed."""

    actor: ActorPart


class LocateActor(Message, frozen=True):
    """Tell me where this actor is (by id, or by name and namespace) once it is alive or dead."""

    request: int
    actor_id: str
    name: str
    namespace: str


class ActorLocated(Message, frozen=True):
    """Answer to RegisterActor (state `pending` or `taken`) and to LocateActor (`alive`, `dead`, `unknown`)."""

    request: int
    actor: ActorPart


class KillActor(Message, frozen=True):
    """End the actor, wherever it is."""

    actor_id: str
    address: Address | None


# --- questions about the cluster ------------------------------------------------------------------------------------


class DescribeCluster(Message, frozen=True):
    """What nodes are there, and what do they do?"""

    request: int


class NodePart(Part, frozen=True):
    """One node, as the command line and `nodes()` show it."""

    node_id: str
    host: str
    alive: bool
    is_head: bool
    total: dict[str, float]
    available: dict[str, float]
    workers: int
    queue_length: int
    store_bytes: int
    store_used_bytes: int
    spilled_bytes: int
    pid: int
    address: str
    details: dict[str, float] = {}


class ClusterDescribed(Message, frozen=True):
    """Answer to DescribeCluster."""

    request: int
    nodes: list[NodePart]


class StopNode(Message, frozen=True):
    """From the command line: end yourself in good order. `all_nodes`: and every other node first."""

    all_nodes: bool


# --- between nodes --------------------------------------------------------------------------------------------------


class Relay(Message, frozen=True):
    """A message between processes of two nodes, on its way through theirs. `body`: the encoded message."""

    destination: Address
    source: Address
    body: bytes


class Undeliverable(Message, frozen=True):
    """No process of this name is on the node (any more)."""

    address: Address
