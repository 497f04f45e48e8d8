"""What happens to a node's membership, and what is to be done about it: the events and commands of membership.py."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from clusterpool.core.cluster_view import NodeEntry, NodeLoad, NodeRecord, NodesSnapshot, NodeView, SilenceReport


class HeartbeatAnswer(Enum):
    """What the store says to a heartbeat."""

    ACCEPTED = "accepted"
    FENCED = "fenced"  # another node declared this incarnation dead, or a newer incarnation registered
    FORGOTTEN = "forgotten"  # the store itself lost the registration (restarted empty, an old replica took over)


class JoinRequested(NamedTuple):
    """This node is up and wants to belong."""

    record: NodeRecord


class Registered(NamedTuple):
    """The store gave this node an incarnation number (the answer to `RegisterNode`)."""

    incarnation: int


class Restored(NamedTuple):
    """The answer to `RestoreNode`."""

    is_accepted: bool


class HeartbeatDue(NamedTuple):
    """Comes from the shell's timer every HEARTBEAT_PERIOD_S."""

    load: NodeLoad


class HeartbeatAnswered(NamedTuple):
    """The answer to `SendHeartbeat`."""

    answer: HeartbeatAnswer
    incarnation: int


class NodesRead(NamedTuple):
    """The answer to `ReadNodes`."""

    snapshot: NodesSnapshot


class SilentRead(NamedTuple):
    """The answer to `ReadSilent`."""

    report: SilenceReport


class NodeEventRead(NamedTuple):
    """An event about a node came from the event stream; `kind` is the stream's."""

    kind: str  # "node_joined" | "node_left" | "node_died"
    node_id: str
    incarnation: int
    reason: str = ""
    record: NodeRecord | None = None  # of one that joined


class NodeEventsRead(NamedTuple):
    """Several, in their order: a thousand nodes that start together make a thousand events at each of them."""

    events: list[NodeEventRead]


class EventsMissed(NamedTuple):
    """The event stream was trimmed past this reader, or another server took over."""


class NodeSought(NamedTuple):
    """Something is to be sent to a node that is known to have ended; somebody seems to know of a new life of it."""

    node_id: str


class NodeFound(NamedTuple):
    """The answer to `FindNode`; None: the store does not list it."""

    node_id: str
    entry: NodeEntry | None


class NodeHeard(NamedTuple):
    """A peer has answered us itself: this life of it goes on (the answer to `ProbeNode`)."""

    node_id: str
    incarnation: int


class StoreFailed(NamedTuple):
    """A command of this machine failed because the store could not be reached."""

    reason: str = ""


class WorkEnded(NamedTuple):
    """The fenced node has ended its workers and dropped its objects (the answer to `FenceSelf`)."""


class LeaveRequested(NamedTuple):
    """This node goes in good order: its work is done or given away."""


Event = (
    JoinRequested
    | Registered
    | Restored
    | HeartbeatDue
    | HeartbeatAnswered
    | NodesRead
    | SilentRead
    | NodeEventRead
    | NodeEventsRead
    | EventsMissed
    | NodeSought
    | NodeFound
    | NodeHeard
    | StoreFailed
    | WorkEnded
    | LeaveRequested
)


class RegisterNode(NamedTuple):
    """Get a new incarnation number from the store. above: the highest of any node that we know of."""

    record: NodeRecord
    above: int = 0


class RestoreNode(NamedTuple):
    """Register again under the same incarnation: the store forgot us, our work goes on."""

    record: NodeRecord
    incarnation: int


class SendHeartbeat(NamedTuple):
    """Tell the store that this node lives, and how busy it is."""

    incarnation: int
    load: NodeLoad


class ReadNodes(NamedTuple):
    """Read the snapshot of all living nodes."""


class ReadSilent(NamedTuple):
    """Read which nodes have sent no heartbeat for so long, and how many there are in all."""

    silence_s: float


class FindNode(NamedTuple):
    """Read the entry of one node."""

    node_id: str


class NodeAbsent(NamedTuple):
    """For the routes: the store did not list the node, after it was last sought."""

    node_id: str


class ProbeNode(NamedTuple):
    """Ask a peer that is silent in the store whether it lives; `NodeHeard` if it answers."""

    node_id: str
    incarnation: int


class DeclareNodeDead(NamedTuple):
    """Ask the store to end this incarnation of a silent peer."""

    node_id: str
    incarnation: int
    reason: str


class RemoveNode(NamedTuple):
    """Take this node off the list."""

    incarnation: int


class FenceSelf(NamedTuple):
    """End all workers, drop all objects, then report `WorkEnded`."""

    reason: str


class RefuseSelf(NamedTuple):
    """This node cannot work with those that were there before it: it has left, and is to end."""

    reason: str


class NodeJoined(NamedTuple):
    """For the other machines: a peer may be given work."""

    view: NodeView


class NodeLeft(NamedTuple):
    """For the other machines: a peer went in good order."""

    node_id: str
    incarnation: int


class NodeDied(NamedTuple):
    """For the other machines: what ran there, and what only it held, is lost."""

    node_id: str
    incarnation: int
    reason: str


class NodeSuspected(NamedTuple):
    """For the other machines: give the peer no new work."""

    node_id: str


class NodeTrusted(NamedTuple):
    """A suspected node was heard again."""

    node_id: str


Command = (
    RegisterNode
    | RestoreNode
    | SendHeartbeat
    | ReadNodes
    | ReadSilent
    | FindNode
    | NodeAbsent
    | ProbeNode
    | DeclareNodeDead
    | RemoveNode
    | FenceSelf
    | RefuseSelf
    | NodeJoined
    | NodeLeft
    | NodeDied
    | NodeSuspected
    | NodeTrusted
)
