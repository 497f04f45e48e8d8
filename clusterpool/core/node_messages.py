"""What processes and their node tell one another: about workers, objects, actors and the cluster."""

from __future__ import annotations

from clusterpool.core.task_messages import Address, Amount, LastTask, Message, Part, SizeBytes, StoredValue, WorkerCount

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
    spill_folder: str = ""


class LeaveNode(Message, frozen=True):
    """A driver ends in good order: clean up, pass on the last lines that its workers printed, and answer LeftNode."""


class LeftNode(Message, frozen=True):
    """Answer to LeaveNode."""


class WorkerDemand(Part, frozen=True):
    """What kind of worker is wanted."""

    kind: int
    resources: dict[str, Amount]
    name: str = ""
    env: dict[str, str] = {}
    strategy: str = ""  # "", "spread", "node:<id>" (must be there), "near:<id>" (rather there)
    stored: list[StoredValue] = []  # large arguments of the first task: placed where their bytes are
    actor_id: str = ""
    actor_life: int = 0
    outlives_owner: bool = False  # it goes on when its owner dies, until the job ends: a child process does
    is_retriable: bool = True  # its tasks are run again when it dies: it is ended first when memory runs out


class RequestWorkers(Message, frozen=True):
    """Lease me `count` workers of this kind."""

    request: int
    count: WorkerCount
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


SIGKILL, SIGTERM = 9, 15  # the core imports no signal module


class KillWorker(Message, frozen=True):
    """End this worker of mine at once, with this signal."""

    lease: int
    signal: int
    text: str


class ReclaimLeases(Message, frozen=True):
    """Others are waiting: give back leases that you do not use right now."""


class EndCause:
    """Why a worker ended, where its node knows, or can tell from what it left behind."""

    UNKNOWN = ""
    OUT_OF_MEMORY = "out_of_memory"  # its node ended it because memory was about to run out
    STACK_OVERFLOW = "stack_overflow"  # it crashed in a recursion


class WorkerExited(Message, frozen=True):
    """A worker that you hold is no more. `exit_code`: negative for a signal, as in multiprocessing.

    `task`: what it was at. `peak_bytes`: the most memory that it ever had, what it read in the store included; 0 when
    nobody knows. `cause`: one of `EndCause`.
    """

    lease: int
    address: Address
    exit_code: int
    text: str
    task: LastTask = LastTask()
    peak_bytes: int = 0
    cause: str = ""


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
    """Make room in the arena. owner: who keeps account of the object, if that is another process than the sender."""

    request: int
    object_id: str
    size_bytes: SizeBytes
    owner: Address | None = None


class ObjectCreated(Message, frozen=True):
    """Write it at `offset`, then seal it."""

    request: int
    offset: int


class StoreFailed(Message, frozen=True):
    """Answer to CreateObject or PinObject. `kind`: `too_large`, `store_full`, `disk_full`, `lost`, `exists`.

    `gone`, `dead`: when lost, as in UnreadablePart.
    """

    request: int
    kind: str
    text: str
    gone: list[str] = []
    dead: list[str] = []


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
    """The object is at `offset` of the arena and stays there until you unpin it. `is_scarce`: copy, and unpin now."""

    request: int
    offset: int
    size_bytes: int
    is_scarce: bool = False


class ObjectOnDisk(Message, frozen=True):
    """The object is on disk and there is no room to bring it back, nor will there be soon: read its file yourself."""

    request: int


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
    state: str  # "pending", "alive", "restarting", "dead"
    text: str = ""
    name: str = ""
    namespace: str = ""
    detached: bool = False
    job_id: str = ""
    life: int = 0  # how often it was started again
    restarts: int = 0  # how often it may be (-1: without limit)
    retries: int = 0  # how often a call is sent again to a next life (-1: without limit)
    is_logged: bool = False  # it has checkpoints: results are kept until their callers say that they have them
    error: bytes = b""  # the exception of its constructor, when that was its end

    @property
    def may_return(self) -> bool:
        """Whether the end of its process need not be its own."""
        return self.restarts != 0 or self.detached


class RegisterActor(Message, frozen=True):
    """Make the actor known to the cluster, and claim its name.

    `creation`: of a detached actor, an encoded ActorCreation. Nodes create such an actor, its creator does not.
    """

    request: int
    actor: ActorPart
    get_if_exists: bool = False
    creation: bytes = b""


class ActorChanged(Message, frozen=True):
    """From the creator: it runs at `address` now, or its constructor failed."""

    actor: ActorPart


class LifeEnded(Message, frozen=True):
    """From the creator of an actor that may be started again: this life is over. May I? (Answer: ActorLocated.)"""

    request: int
    actor_id: str
    life: int
    text: str


class LocateActor(Message, frozen=True):
    """Tell me where this actor is (by id, or by name and namespace) once it is dead, or alive in this or a later life.

    By name the answer comes at once, whatever its state.
    """

    request: int
    actor_id: str
    name: str
    namespace: str
    life: int = 0


class ActorLocated(Message, frozen=True):
    """Answer to RegisterActor (state `pending`, `taken` or `failed`), to LocateActor (`alive`, `dead`, `unknown`) and
    to LifeEnded (`restarting`: start its next life; `dead`). Request 0: it was killed, tells its creator's node.
    """

    request: int
    actor: ActorPart


class KillActor(Message, frozen=True):
    """End the actor, wherever it is. `no_restart`: for good."""

    actor_id: str
    address: Address | None
    no_restart: bool = True
    may_return: bool = False  # as in ActorPart


# --- questions about the cluster ------------------------------------------------------------------------------------


class WatchCapacity(Message, frozen=True):
    """How many CPUs has the cluster? Tell me again whenever that changes."""


class CapacityChanged(Message, frozen=True):
    """Answer to WatchCapacity, again and again. Of a node that is lost, NodeLost tells first."""

    cpus_by_node: dict[str, Amount]


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
    labels: dict[str, str] = {}


class ClusterDescribed(Message, frozen=True):
    """Answer to DescribeCluster."""

    request: int
    nodes: list[NodePart]


class StopNode(Message, frozen=True):
    """From the command line: end yourself in good order. `all_nodes`: and every other node first."""

    all_nodes: bool


# --- between nodes --------------------------------------------------------------------------------------------------


class Relay(Message, frozen=True):
    """A message between processes of two nodes, on its way through theirs. `body`: the encoded message.

    `from_life`, `to_life`: incarnations of the two nodes that it goes between, set by the one that sends it.
    """

    destination: Address
    source: Address
    body: bytes
    from_life: int = 0
    to_life: int = 0


class Undeliverable(Message, frozen=True):
    """No process of this name is on the node (any more)."""

    address: Address
