"""What the rest of the program may ask of a control store; `store.ControlStore` is the real one.

Every call may raise what is in `errors.STORE_CANNOT`: NotConnected (the store could not be reached; the call may or
may not have taken effect, and may be made again), StoreFull or AuthenticationFailed (worth another try only once
somebody has made room, or mended the password). Records are opaque bytes here, UTF-8 text because events carry them
too; see `records`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from clusterpool.core.cluster_view import NodeEntry, NodeLoad, NodeRecord, NodesSnapshot, SilenceReport
from clusterpool.core.membership import HeartbeatAnswer
from clusterpool.errors import ClusterpoolError

# The one state of an actor that the store knows: its name is free again and nothing brings it back.
DEAD = "dead"


class EventsLost(ClusterpoolError):
    """Events after the last one read are gone: read the snapshots, and go on from there."""


class Event(NamedTuple):
    """`id` counts up by one. Kinds: node_joined, node_died, node_left, job_started, job_finished,
    actor_created, actor_changed, and whatever is given to `publish_event`.
    """

    id: int
    kind: str
    fields: dict[str, str]


class ActorDefinition(NamedTuple):
    """What is the same in all lives of an actor.

    restarts: how often it may be started again; -1: without limit. creation: how to make it, kept until it is dead.
    """

    actor_id: str
    record: bytes
    name: str = ""  # "" for none
    namespace: str = ""
    restarts: int = 0
    is_detached: bool = False
    creation: bytes = b""


class ActorEntry(NamedTuple):
    """One actor as the control store has it."""

    actor_id: str
    state: str
    name: str  # "" for none
    namespace: str
    record: bytes
    fields: dict[str, str]  # the newest value of each field ever given to `update_actor`


class CallLog(NamedTuple):
    """What the next life of an actor with checkpoints starts from."""

    checkpoint: bytes  # empty: none was taken
    calls: int  # how many calls the checkpoint covers
    log: list[bytes]  # the calls after these, in order
    lost: str = ""  # what of this is there no more, and why; then none of it may be used


class ControlStorePort(Protocol):
    """Called by one thread. Each test of tests/contracts runs on the fake and on the real one."""

    # Nodes

    def register_node(self, record: NodeRecord, registration: int = 0, *, above: int = 0) -> int:
        """Enlist the node; the incarnation number is new and higher than any before in this cluster, and than `above`,
        should the store hold an older state than it did.

        registration: a number that the node counts up with each success. The same again, because the answer was
        lost, changes nothing and repeats the answer, unless that incarnation has ended meanwhile. 0: always a new one.
        """

    def restore_node(self, record: NodeRecord, incarnation: int) -> bool:
        """Enlist the node again under its own incarnation, after FORGOTTEN. False: it is fenced."""

    def heartbeat(self, node_id: str, incarnation: int, load: NodeLoad) -> HeartbeatAnswer: ...

    def declare_node_dead(self, node_id: str, incarnation: int, reason: str) -> bool:
        """True for the one caller who ended this incarnation, unless its answer got lost: act on events."""

    def remove_node(self, node_id: str, incarnation: int) -> bool:
        """The node leaves of its own will."""

    def list_nodes(self) -> NodesSnapshot: ...

    def find_node(self, node_id: str) -> NodeEntry | None:
        """The entry of one node, without its load."""

    def silent_nodes(self, silence_s: float) -> SilenceReport:
        """Who has sent no heartbeat for longer than that, longest first: quick however many nodes there are."""

    # Jobs

    def register_job(self, job_id: str, record: bytes) -> None: ...

    def finish_job(self, job_id: str, reason: str = "") -> bool:
        """False: it was not running."""

    def list_jobs(self) -> dict[str, bytes]:
        """The records of the running jobs."""

    # Actors

    def create_actor(self, actor: ActorDefinition, *, state: str = "pending", keeper: str = "") -> None:
        """`keeper`: the node that answers for it. Its field `life` is 0.

        Raises: NameTaken when a living actor has the name in this namespace.
        """

    def restore_actor(
        self, actor: ActorDefinition, *, keeper: tuple[str, int], life: int = 0, address: str = ""
    ) -> bool:
        """Tell a store that lost its memory of an actor that lives, or is being made (no `address`).

        False: it knew it. A name that is another's by now is lost. keeper: a node, and its incarnation.
        """

    def update_actor(
        self,
        actor_id: str,
        expected_states: Collection[str],
        new_state: str,
        fields: Mapping[str, str] | None = None,
    ) -> bool:
        """Compare and set; no expected states means any. False: another state, dead, or unknown.

        Going to "dead" frees the name; the entry can be read by its id for an hour more.
        """

    def get_actor(self, actor_id: str) -> ActorEntry | None: ...

    def find_actor(self, namespace: str, name: str) -> ActorEntry | None: ...

    def list_actors(self) -> list[ActorEntry]:
        """The living ones, by id."""

    # Lives of actors

    def start_life(self, actor_id: str, life: int, address: str, *, keeper: str = "") -> bool:
        """This life is there: the actor is "alive" at `address`. False: another life is the actor's, or none."""

    def end_life(self, actor_id: str, life: int, text: str, *, teller: str, keeper: str = "", address: str = "") -> str:
        """This life is over: "restart" for the one caller who is to start the next (the field `life` is one more, the
        state "restarting"), "dead" when no restart was left, else "none": it was known, or is not the teller's to say.

        `teller`: "creator"; "host", a node whose word counts unless the actor has a creator who starts it again;
        "orphan", anybody, which counts when the keeper's incarnation is over. `address`: only if it lives there.
        """

    def orphaned_actors(self, living: Collection[str] = ()) -> dict[str, str]:
        """The living actors whose keeper's incarnation is over, by id, each with that node.

        living: incarnations that go on though the store may have forgotten them, each as `node_id:incarnation`.
        """

    def get_creation(self, actor_id: str) -> bytes: ...

    # Checkpoints of actors, and the calls since. Answers: "ok"; "fenced", it is another life's now; "gone", it is
    # dead; "gap", something before is missing.

    def append_calls(self, actor_id: str, life: int, first: int, calls: Sequence[bytes]) -> str:
        """Calls, numbered from `first` on; those that are there already are left out."""

    def store_checkpoint(self, actor_id: str, life: int, calls: int, content: bytes) -> str:
        """The checkpoint after so many calls, in place of the one before and of the calls that it covers."""

    def load_calls(self, actor_id: str) -> CallLog: ...

    # Packages: blobs named by their content

    def put_package(self, digest: str, content: bytes) -> None:
        """Raises: ValueError unless `digest` is `package_digest(content)`."""

    def has_package(self, digest: str) -> bool: ...

    def get_package(self, digest: str) -> bytes | None: ...

    # Events

    def publish_event(self, kind: str, fields: Mapping[str, str]) -> int: ...

    def read_events(self, after_id: int, *, block_ms: int = 0, count: int = 1000) -> list[Event]:
        """The events after `after_id`, oldest first; waits up to `block_ms` for one if there is none.

        Raises: EventsLost when some of them are gone or the server is another one than at the last call. A
        reader starts with `last_event_id()` or `list_nodes().last_event_id`, then reads its snapshots, then
        the events.
        """

    def last_event_id(self) -> int:
        """0 before the first event."""

    def close(self) -> None: ...


def package_digest(content: bytes) -> str:
    """The name of a package: SHA-256, as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
