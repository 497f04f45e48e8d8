"""Which nodes the cluster has, and whether this one still belongs to it. Pure: the caller passes the time.

    OUTSIDE --JoinRequested--> JOINING --Registered--> MEMBER --LeaveRequested--> LEFT
                                  ^                      |  (refused by the store, or declared dead)
                                  +----WorkEnded---- FENCED

Every node sends a heartbeat to the control store and reads all nodes' heartbeats there, twice a second.
Silence is counted here, between two reads that both succeeded, and never taken from the server's clock
alone: while the store is away nobody can be heard, and nobody may be declared dead for it. Any member may
declare a silent node dead; the store accepts the first (compare and set on the incarnation) and refuses
that incarnation's heartbeats from then on. Before, it asks the node itself: one that only the store
does not hear is not dead.
"""

from __future__ import annotations

from enum import Enum

from clusterpool.core.cluster_view import ClusterView, NodeEntry, NodeLoad, NodeRecord, NodesSnapshot, view_of_entry
from clusterpool.core.joining import node_mismatch
from clusterpool.core.membership_events import *  # noqa: F403
from clusterpool.core.membership_events import (
    Command,
    DeclareNodeDead,
    Event,
    EventsMissed,
    FenceSelf,
    HeartbeatAnswer,
    HeartbeatAnswered,
    HeartbeatDue,
    JoinRequested,
    LeaveRequested,
    NodeDied,
    NodeEventRead,
    NodeHeard,
    NodeJoined,
    NodeLeft,
    NodesRead,
    NodeSuspected,
    NodeTrusted,
    ProbeNode,
    ReadNodes,
    RefuseSelf,
    Registered,
    RegisterNode,
    RemoveNode,
    Restored,
    RestoreNode,
    SendHeartbeat,
    StoreFailed,
    WorkEnded,
)
from clusterpool.errors import InvalidTransition

HEARTBEAT_PERIOD_S = 0.5
# Shorter suspects nodes whose host is only busy; longer sends work to a node that will not answer.
SUSPECT_AFTER_S = 2.0
# Before suspicion, so that a node which answers is never suspected, only because it cannot reach the store. Sooner asks
# nodes whose heartbeat is merely late.
PROBE_AFTER_S = 1.0
# With one period to notice the last heartbeat and one to notice the limit, death is known within 4.75 s:
# the promise is 5 s. Shorter kills nodes that a long pause of the host (swap, a suspended virtual machine)
# would have given back.
DEAD_AFTER_S = 3.75
# After the store was away each node has at least this long to reconnect. It must exceed the store client's
# backoff.
GRACE_S = 2.0
# Two reads further apart than this do not prove that the store answered in between.
READ_GAP_MAX_S = 2.0
# Ended incarnations that are remembered, so that a late snapshot cannot bring one back.
ENDED_MAX = 4096


class State(Enum):
    """Where this node stands; the picture is above."""

    OUTSIDE = "outside"
    JOINING = "joining"
    MEMBER = "member"
    FENCED = "fenced"
    LEFT = "left"


class Membership:
    """Joins, keeps alive and fences this node; watches the others."""

    def __init__(
        self,
        node_id: str,
        *,
        suspect_after_s: float = SUSPECT_AFTER_S,
        dead_after_s: float = DEAD_AFTER_S,
        grace_s: float = GRACE_S,
    ) -> None:
        if not 0 < suspect_after_s < dead_after_s:
            raise ValueError(f"need 0 < suspect_after_s < dead_after_s: {suspect_after_s=}, {dead_after_s=}")
        self.node_id = node_id
        self.view = ClusterView(node_id)
        self.state = State.OUTSIDE
        self.incarnation = 0  # 0: never registered
        self.is_settled = False  # a member that has seen that it can work with the others
        self._suspect_after_s = suspect_after_s
        self._dead_after_s = dead_after_s
        self._grace_s = grace_s
        self._record: NodeRecord | None = None
        self._watch_by_node: dict[str, _Watch] = {}
        self._ended_by_node: dict[str, int] = {}  # newest incarnation of each node that is known to be over
        self._last_read_s: float | None = None  # None: the store was away since
        # At most one heartbeat (or registration) and one read are under way: a slow store must not grow a
        # queue.
        self._is_beat_pending = False
        self._is_read_pending = False

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """`now_s`: monotonic seconds of this node."""
        match event:
            case NodesRead(snapshot):
                return self._read(snapshot, now_s)
            case HeartbeatDue(load):
                return self._tick(load)
            case HeartbeatAnswered(answer, incarnation):
                return self._answered(answer, incarnation)
            case NodeEventRead():
                return self._event_read(event)
            case EventsMissed():
                return self._ask_for_nodes()
            case NodeHeard(node_id, incarnation):
                self._heard(node_id, incarnation)
                return []
            case StoreFailed():
                self._is_beat_pending = self._is_read_pending = False
                self._last_read_s = None
                return []
            case _:
                return self._change_state(event)

    def has_ended(self, node_id: str) -> bool:
        """Whether a life of this node is known to be over; it may have come back, and be in the view again."""
        return node_id in self._ended_by_node

    def ended_incarnation(self, node_id: str) -> int:
        """The last life of this node that is known to be over; 0 when there is none."""
        return self._ended_by_node.get(node_id, 0)

    def _change_state(self, event: Event) -> list[Command]:
        match event, self.state:
            case JoinRequested(record), State.OUTSIDE | State.LEFT:
                assert record.node_id == self.node_id, "the record of another node"
                self._record = record
                return self._register()
            case WorkEnded(), State.FENCED:
                return self._register()
            case Registered(incarnation), State.JOINING:
                self.state, self.incarnation, self._is_beat_pending = State.MEMBER, incarnation, False
                return self._ask_for_nodes()
            case Registered(incarnation), State.MEMBER:
                # We asked twice, because another command's failure hid that the first question was under way.
                self.incarnation = max(self.incarnation, incarnation)
                return []
            case Registered(incarnation), State.LEFT:
                return [RemoveNode(incarnation)]  # the answer crossed our leaving
            case Registered(), State.FENCED:
                return []
            case Restored() | WorkEnded(), State.LEFT:
                return []
            case Restored(is_accepted), State.MEMBER:
                self._is_beat_pending = False
                return [] if is_accepted else self._fence("the control store refused to take it back")
            case Restored(), State.FENCED | State.JOINING:
                return []
            case LeaveRequested(), _:
                was_member = self.state is State.MEMBER
                self.state = State.LEFT
                self._forget_self()
                # If this command fails we are declared dead a few seconds later, which costs the others
                # nothing more.
                return [RemoveNode(self.incarnation)] if was_member else []
        raise InvalidTransition(f"node {self.node_id}: {event!r} in state {self.state.value}")

    def _register(self) -> list[Command]:
        assert self._record is not None
        self.state = State.JOINING
        self._is_beat_pending = True
        return [RegisterNode(self._record)]

    def _tick(self, load: NodeLoad) -> list[Command]:
        if self.state not in (State.JOINING, State.MEMBER):
            return []
        commands: list[Command] = []
        if not self._is_beat_pending:
            if self.state is State.JOINING:  # the store was away when we asked
                return self._register()
            self._is_beat_pending = True
            commands.append(SendHeartbeat(self.incarnation, load))
        return commands + self._ask_for_nodes()

    def _answered(self, answer: HeartbeatAnswer, incarnation: int) -> list[Command]:
        if self.state is not State.MEMBER or incarnation != self.incarnation:
            return []  # about a life that is over
        self._is_beat_pending = False
        if answer is HeartbeatAnswer.FENCED:
            return self._fence("the control store refused its heartbeat: it had been declared dead")
        if answer is HeartbeatAnswer.FORGOTTEN:
            assert self._record is not None
            self._is_beat_pending = True
            return [RestoreNode(self._record, incarnation)]
        return []

    def _ask_for_nodes(self) -> list[Command]:
        if self._is_read_pending:
            return []
        self._is_read_pending = True
        return [ReadNodes()]

    def _fence(self, reason: str) -> list[Command]:
        self.state = State.FENCED
        self._is_beat_pending = False
        self._forget_self()
        return [FenceSelf(f"node {self.node_id} (incarnation {self.incarnation}): {reason}")]

    def _forget_self(self) -> None:
        self._remember_end(self.node_id, self.incarnation)
        self._watch_by_node.pop(self.node_id, None)
        self.view.drop(self.node_id)

    def _event_read(self, event: NodeEventRead) -> list[Command]:
        if event.kind == "node_joined":
            watch = self._watch_by_node.get(event.node_id)
            is_known = watch is not None and watch.incarnation >= event.incarnation
            return [] if is_known else self._ask_for_nodes()
        if event.node_id == self.node_id:
            is_about_us = self.state is State.MEMBER and event.incarnation == self.incarnation
            return self._fence(f"it was declared dead: {event.reason}") if is_about_us else []
        return self._end(event.node_id, event.incarnation, event.reason, has_left=event.kind == "node_left")

    def _read(self, snapshot: NodesSnapshot, now_s: float) -> list[Command]:
        self._is_read_pending = False
        if self.state is State.MEMBER and not self.is_settled:
            refusal = self._refusal(snapshot)
            if refusal:
                self.state = State.LEFT
                self._forget_self()
                return [RemoveNode(self.incarnation), RefuseSelf(refusal)]
            self.is_settled = True
        elapsed_s = self._elapsed(now_s)
        commands: list[Command] = []
        listed = set()
        for entry in snapshot.nodes:
            listed.add(entry.record.node_id)
            commands += self._seen(entry, elapsed_s)
        for node_id in [node_id for node_id in self._watch_by_node if node_id not in listed]:
            commands += self._not_listed(self._watch_by_node[node_id], elapsed_s)
        return commands

    def _refusal(self, snapshot: NodesSnapshot) -> str:
        """Why this node cannot work with those that came before it: of two that differ the later one goes."""
        assert self._record is not None
        for entry in snapshot.nodes:
            if entry.incarnation < self.incarnation:
                reason = node_mismatch(entry.record, self._record)
                if reason:
                    return reason
        return ""

    def _elapsed(self, now_s: float) -> float:
        """The time for which silence counts: none if the store, or we, were away since the last read."""
        last_s, self._last_read_s = self._last_read_s, now_s
        if last_s is not None and now_s - last_s <= READ_GAP_MAX_S:
            return now_s - last_s
        for watch in self._watch_by_node.values():
            watch.silence_s = min(watch.silence_s, max(0.0, self._dead_after_s - self._grace_s))
        return 0.0

    def _seen(self, entry: NodeEntry, elapsed_s: float) -> list[Command]:
        node_id = entry.record.node_id
        if entry.incarnation <= self._ended_by_node.get(node_id, 0):
            # The snapshot is older than the death (the store then ignores us), or a store that lost its
            # memory took back a node whose work has been given to others (it must be told).
            reason = "it came back after it had been declared dead"
            return [DeclareNodeDead(node_id, entry.incarnation, reason)] if self._may_declare(node_id) else []
        if node_id == self.node_id and self.state is State.MEMBER and entry.incarnation > self.incarnation:
            return self._fence("another process registered under its name")
        commands: list[Command] = []
        watch = self._watch_by_node.get(node_id)
        if watch is not None and watch.incarnation > entry.incarnation:
            return []
        if watch is not None and watch.incarnation < entry.incarnation:
            if node_id != self.node_id:
                commands += self._end(node_id, watch.incarnation, "it was started anew", has_left=False)
            watch = None
        is_new = watch is None
        if watch is None:
            watch = self._watch_by_node[node_id] = _Watch(node_id, entry.incarnation)
        if entry.heartbeat_us != watch.heartbeat_us:
            watch.heartbeat_us = entry.heartbeat_us
            watch.silence_s = min(max(entry.silence_s, 0.0), elapsed_s)
        else:
            watch.silence_s += elapsed_s
        watch.absence_s = 0.0
        changes = self._judge(watch)
        view = view_of_entry(entry, is_suspect=watch.is_suspect)
        self.view.put(view)
        if is_new and node_id != self.node_id:
            commands.append(NodeJoined(view))
        return commands + changes

    def _judge(self, watch: _Watch) -> list[Command]:
        """Suspect, trust or declare dead; our own heartbeats are the store's to judge."""
        if watch.node_id == self.node_id:
            return []
        commands: list[Command] = []
        is_suspect = watch.silence_s >= self._suspect_after_s
        if is_suspect is not watch.is_suspect:
            watch.is_suspect = is_suspect
            commands.append(NodeSuspected(watch.node_id) if is_suspect else NodeTrusted(watch.node_id))
        if watch.silence_s >= min(PROBE_AFTER_S, self._suspect_after_s):
            commands.append(ProbeNode(watch.node_id, watch.incarnation))
        # Said again at each read until the node is gone from the list: the store takes the first and
        # ignores the rest.
        if watch.silence_s >= self._dead_after_s and self._may_declare(watch.node_id):
            reason = f"it sent no heartbeat for {watch.silence_s:.1f} s"
            commands.append(DeclareNodeDead(watch.node_id, watch.incarnation, reason))
        return commands

    def _heard(self, node_id: str, incarnation: int) -> None:
        watch = self._watch_by_node.get(node_id)
        if watch is not None and watch.incarnation == incarnation:
            watch.silence_s = watch.absence_s = 0.0

    def _may_declare(self, node_id: str) -> bool:
        return self.state is State.MEMBER and node_id != self.node_id

    def _not_listed(self, watch: _Watch, elapsed_s: float) -> list[Command]:
        """The stream says how a node ended, and usually first; this is for when that event was lost.

        A store that came back without its memory lists nobody until the nodes have restored themselves,
        which takes them a heartbeat: hence the wait.
        """
        if watch.node_id == self.node_id:
            return []  # the answer to our next heartbeat tells why
        watch.absence_s += elapsed_s
        if watch.absence_s < self._suspect_after_s:
            return [ProbeNode(watch.node_id, watch.incarnation)]
        reason = "it is no longer registered in the control store"
        return self._end(watch.node_id, watch.incarnation, reason, has_left=False)

    def _end(self, node_id: str, incarnation: int, reason: str, *, has_left: bool) -> list[Command]:
        self._remember_end(node_id, incarnation)
        watch = self._watch_by_node.get(node_id)
        if watch is None or watch.incarnation > incarnation:
            return []
        del self._watch_by_node[node_id]
        self.view.drop(node_id)
        if has_left:
            return [NodeLeft(node_id, watch.incarnation)]
        return [NodeDied(node_id, watch.incarnation, reason)]

    def _remember_end(self, node_id: str, incarnation: int) -> None:
        newest = max(incarnation, self._ended_by_node.pop(node_id, 0))
        self._ended_by_node[node_id] = newest
        if len(self._ended_by_node) > ENDED_MAX:
            del self._ended_by_node[next(iter(self._ended_by_node))]


class _Watch:
    __slots__ = ("absence_s", "heartbeat_us", "incarnation", "is_suspect", "node_id", "silence_s")

    def __init__(self, node_id: str, incarnation: int) -> None:
        self.node_id = node_id
        self.incarnation = incarnation
        self.heartbeat_us = -1
        self.silence_s = 0.0  # counted while the store answered
        self.absence_s = 0.0  # likewise, without even being listed
        self.is_suspect = False
