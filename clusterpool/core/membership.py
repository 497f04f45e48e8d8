"""Which nodes the cluster has, and whether this one still belongs to it. Pure: the caller passes the time.

    OUTSIDE --JoinRequested--> JOINING --Registered--> MEMBER --LeaveRequested--> LEFT
                                  ^                      |  (refused by the store, or declared dead)
                                  +----WorkEnded---- FENCED

Every node sends a heartbeat to the control store twice a second, and reads there who is silent: in a small cluster from
the list of all nodes with their loads, in a large one from a short report, and the list only now and then (silence.py).
Silence is counted here, between two reads that both succeeded, and never taken from the server's clock
alone: while the store is away nobody can be heard, and nobody may be declared dead for it. Any member (of a large
cluster, one of its oldest) may declare a silent node dead; the store accepts the first (compare and set on the
incarnation) and refuses that incarnation's heartbeats from then on. Before, it asks the node itself: one that only
the store does not hear is not dead.

Who joins, leaves and dies is told by the event stream. The report says how many nodes are listed, so that a reader from
whom an event was lost finds out, and reads the list.
"""

from __future__ import annotations

import math
from enum import Enum

from clusterpool.core.cluster_view import (
    ClusterView,
    NodeEntry,
    NodeLoad,
    NodeRecord,
    NodesSnapshot,
    SilenceReport,
    view_of_entry,
)
from clusterpool.core.joining import node_mismatch
from clusterpool.core.membership_events import *  # noqa: F403
from clusterpool.core.membership_events import (
    Command,
    DeclareNodeDead,
    Event,
    EventsMissed,
    FenceSelf,
    FindNode,
    HeartbeatAnswer,
    HeartbeatAnswered,
    HeartbeatDue,
    JoinRequested,
    LeaveRequested,
    NodeAbsent,
    NodeDied,
    NodeEventRead,
    NodeEventsRead,
    NodeFound,
    NodeHeard,
    NodeJoined,
    NodeLeft,
    NodeSought,
    NodesRead,
    NodeSuspected,
    NodeTrusted,
    ProbeNode,
    ReadNodes,
    ReadSilent,
    RefuseSelf,
    Registered,
    RegisterNode,
    RemoveNode,
    Restored,
    RestoreNode,
    SendHeartbeat,
    SilentRead,
    StoreFailed,
    WorkEnded,
)
from clusterpool.core.silence import PROBE_AFTER_S, Silences, Watch
from clusterpool.errors import InvalidTransition

HEARTBEAT_PERIOD_S = 0.5
# Shorter suspects nodes whose host is only busy; longer sends work to a node that will not answer.
SUSPECT_AFTER_S = 2.0
# With one period to notice the last heartbeat and one to notice the limit, death is known within 4.75 s:
# the promise is 5 s. Shorter kills nodes that a long pause of the host (swap, a suspended virtual machine)
# would have given back.
DEAD_AFTER_S = 3.75
# After the store was away each node has at least this long to reconnect. It must exceed the store client's
# backoff.
GRACE_S = 2.0
# The largest cluster in which every node reads the whole list twice a second. All of them together read n * n entries
# each time: 2,000 a second here, which is nothing; two million with a thousand nodes, which no server gives.
SMALL_MAX = 32
# In a larger one, how many entries of the list a node reads a second when it has work that waits for a place, and when
# it has none. With a thousand nodes the loads of the others are 8 s old at most, or 31 s; more would be a burden on the
# server, which gives some half a million a second. (Nodes to which one sends requests tell it their loads themselves.)
LISTED_S_BUSY, LISTED_S_IDLE = 128, 32
# A report that says for so long, unchanged, that there are others than we know means that we have missed an event.
DIFFERS_MAX_S = 3.0
# After a break of the event stream, all nodes of a large cluster would read the list at once.
MISSED_S_PER_NODE = 0.002
_GOLDEN = 0.6180339887498949  # multiples of it, less their whole part, are spread evenly
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
        self.small_max = SMALL_MAX
        self._silences = Silences()
        self._watch_by_node = self._silences.watch_by_node
        self._ended_by_node: dict[str, int] = {}  # newest incarnation of each node that is known to be over
        # At most one heartbeat (or registration) and one read of each kind are under way: a slow store must not grow a
        # queue.
        self._is_beat_pending = False
        self._is_read_pending = False
        self._is_report_pending = False
        self._sought: dict[str, bool] = {}  # nodes that the store is asked for, and whether it must be asked once more
        self._listed_s = 0.0  # when the list was read last, and when it must be again; by the clock of the silences
        self._list_due_s = math.inf
        self._differing: tuple[int, int] | None = None  # what reports say of the cluster while we know another one
        self._differs_since_s = 0.0

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """`now_s`: monotonic seconds of this node."""
        match event:
            case NodesRead(snapshot):
                return self._read(snapshot, now_s)
            case SilentRead(report):
                return self._report_read(report, now_s)
            case HeartbeatDue(load):
                return self._tick(load)
            case HeartbeatAnswered(answer, incarnation):
                return self._answered(answer, incarnation)
            case NodeEventRead():
                return self._event_read(event)
            case NodeEventsRead(events):
                return [command for each in events for command in self._event_read(each)]
            case EventsMissed():
                return self._events_missed()
            case NodeSought(node_id):
                return self._seek(node_id)
            case NodeFound(node_id, entry):
                return self._found(node_id, entry)
            case NodeHeard(node_id, incarnation):
                self._heard(node_id, incarnation)
                return []
            case StoreFailed():
                self._is_beat_pending = self._is_read_pending = self._is_report_pending = False
                self._sought.clear()
                self._silences.failed()
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
        # A store that holds an older state than it did (restored from a backup) must not give a number a second time.
        lives = [watch.incarnation for watch in self._watch_by_node.values()]
        return [RegisterNode(self._record, max([self.incarnation, *self._ended_by_node.values(), *lives]))]

    def _tick(self, load: NodeLoad) -> list[Command]:
        if self.state not in (State.JOINING, State.MEMBER):
            return []
        commands: list[Command] = []
        if not self._is_beat_pending:
            if self.state is State.JOINING:  # the store was away when we asked
                return self._register()
            self._is_beat_pending = True
            commands.append(SendHeartbeat(self.incarnation, load))
        return commands + self._look_around(is_busy=load.queue_length > 0)

    def _look_around(self, *, is_busy: bool) -> list[Command]:
        count = len(self._watch_by_node)
        if count <= self.small_max:
            self._silences.forget_report()
            return self._ask_for_nodes()
        commands: list[Command] = []
        if not self._is_report_pending:
            self._is_report_pending = True
            commands.append(ReadSilent(PROBE_AFTER_S))
        # Not all at the same time, though many may have joined together.
        period_s = count / (LISTED_S_BUSY if is_busy else LISTED_S_IDLE) * (0.5 + self._phase / 2)
        if self._silences.clock_s >= min(self._list_due_s, self._listed_s + period_s):
            commands += self._ask_for_nodes()
        return commands

    @property
    def _phase(self) -> float:
        """Between 0 and 1, another for each node."""
        return self.incarnation * _GOLDEN % 1.0

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

    def _seek(self, node_id: str) -> list[Command]:
        if self.state is not State.MEMBER or node_id in self.view:
            return []
        if node_id in self._sought:
            self._sought[node_id] = True  # the store may have answered before
            return []
        self._sought[node_id] = False
        return [FindNode(node_id)]

    def _found(self, node_id: str, entry: NodeEntry | None) -> list[Command]:
        is_sought_again = self._sought.pop(node_id, False)
        commands = self._seen(entry, 0.0) if entry is not None and self.state is State.MEMBER else []
        if node_id in self.view:
            return commands
        return [*commands, *(self._seek(node_id) if is_sought_again else [NodeAbsent(node_id)])]

    def _events_missed(self) -> list[Command]:
        count = len(self._watch_by_node)
        if count <= self.small_max:
            return self._ask_for_nodes()
        self._list_in(count * MISSED_S_PER_NODE * self._phase)
        return []

    def _list_in(self, delay_s: float) -> None:
        self._list_due_s = min(self._list_due_s, self._silences.clock_s + delay_s)

    def _fence(self, reason: str) -> list[Command]:
        self.state = State.FENCED
        self._is_beat_pending = False
        self._forget_self()
        return [FenceSelf(f"node {self.node_id} (incarnation {self.incarnation}): {reason}")]

    def _forget_self(self) -> None:
        self._remember_end(self.node_id, self.incarnation)
        self._silences.drop(self.node_id)
        self.view.drop(self.node_id)

    def _event_read(self, event: NodeEventRead) -> list[Command]:
        if event.kind == "node_joined":
            watch = self._watch_by_node.get(event.node_id)
            if watch is not None and watch.incarnation >= event.incarnation:
                return []
            if event.record is None or event.node_id == self.node_id:
                return self._ask_for_nodes()
            return self._seen(NodeEntry(event.record, event.incarnation, -1, 0.0), 0.0)
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
        elapsed_s = self._answered_at(now_s)
        self._listed_s, self._list_due_s = self._silences.clock_s, math.inf
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

    def _answered_at(self, now_s: float) -> float:
        """The time for which silence counts: none if the store, or we, were away since the last read."""
        return self._silences.answered(now_s, max(0.0, self._dead_after_s - self._grace_s))

    def _report_read(self, report: SilenceReport, now_s: float) -> list[Command]:
        self._is_report_pending = False
        self._answered_at(now_s)
        self._compare(report)
        commands: list[Command] = []
        for watch in self._silences.report(report):
            commands += self._judge(watch)
            self.view.suspect(watch.node_id, watch.is_suspect)
        return commands

    def _compare(self, report: SilenceReport) -> None:
        """Read the list if the store has others than we know, and not only because our events are late."""
        said = (report.nodes, report.incarnation)
        clock_s = self._silences.clock_s
        if said != self._differing:
            self._differing, self._differs_since_s = said, clock_s
        elif report.nodes == len(self._watch_by_node):
            self._differs_since_s = clock_s
        elif clock_s - self._differs_since_s >= DIFFERS_MAX_S:
            self._differs_since_s = clock_s
            self._list_in(0.0)

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
        if watch is not None and watch.incarnation == entry.incarnation:
            return self._seen_again(watch, entry)
        if watch is not None and watch.incarnation > entry.incarnation:
            return []
        if watch is not None and node_id != self.node_id:
            commands += self._end(node_id, watch.incarnation, "it was started anew", has_left=False)
        watch = self._silences.add(node_id, entry.incarnation, since_s=elapsed_s)
        self._silences.look(watch, entry.heartbeat_us, entry.silence_s)
        changes = self._judge(watch)
        view = view_of_entry(entry, is_suspect=watch.is_suspect)
        self.view.put(view)
        if node_id != self.node_id:
            commands.append(NodeJoined(view))
        return commands + changes

    def _seen_again(self, watch: Watch, entry: NodeEntry) -> list[Command]:
        self._silences.look(watch, entry.heartbeat_us, entry.silence_s)
        watch.absent_s = None
        if entry.load is not None:
            self.view.hear(watch.node_id, entry.load)
        commands = self._judge(watch)
        if commands:
            self.view.suspect(watch.node_id, watch.is_suspect)
        return commands

    def _judge(self, watch: Watch) -> list[Command]:
        """Suspect, trust or declare dead; our own heartbeats are the store's to judge."""
        if watch.node_id == self.node_id:
            return []
        silence_s = self._silences.silence_s(watch)
        if silence_s < PROBE_AFTER_S and not watch.is_suspect and silence_s < self._suspect_after_s:
            return []
        commands: list[Command] = []
        is_suspect = silence_s >= self._suspect_after_s
        if is_suspect is not watch.is_suspect:
            watch.is_suspect = is_suspect
            commands.append(NodeSuspected(watch.node_id) if is_suspect else NodeTrusted(watch.node_id))
        if len(self._watch_by_node) > self.small_max and not self._silences.is_warden(self.incarnation):
            return commands
        if silence_s >= min(PROBE_AFTER_S, self._suspect_after_s):
            commands.append(ProbeNode(watch.node_id, watch.incarnation))
        # Said again at each read until the node is gone from the list: the store takes the first and
        # ignores the rest.
        is_ours = self._may_declare(watch.node_id) and not self._silences.is_for_elders(watch, self.incarnation)
        if silence_s >= self._dead_after_s and is_ours:
            reason = f"it sent no heartbeat for {silence_s:.1f} s"
            commands.append(DeclareNodeDead(watch.node_id, watch.incarnation, reason))
        return commands

    def _heard(self, node_id: str, incarnation: int) -> None:
        watch = self._watch_by_node.get(node_id)
        if watch is not None and watch.incarnation == incarnation:
            self._silences.hear(watch)

    def _may_declare(self, node_id: str) -> bool:
        return self.state is State.MEMBER and node_id != self.node_id

    def _not_listed(self, watch: Watch, elapsed_s: float) -> list[Command]:
        """The stream says how a node ended, and usually first; this is for when that event was lost.

        A store that came back without its memory lists nobody until the nodes have restored themselves,
        which takes them a heartbeat: hence the wait.
        """
        if watch.node_id == self.node_id:
            return []  # the answer to our next heartbeat tells why
        clock_s = self._silences.clock_s
        if watch.absent_s is None:
            watch.absent_s = clock_s - elapsed_s
        # A small cluster reads and asks all the time. In a large one, each asks once, whom the next list lacks as well.
        is_large = len(self._watch_by_node) > self.small_max
        ask_s = self._suspect_after_s if is_large else 0.0
        end_s = ask_s + PROBE_AFTER_S if is_large else self._suspect_after_s
        absence_s = clock_s - watch.absent_s
        if absence_s < ask_s:
            self._list_in(ask_s - absence_s)
            return []
        if absence_s < end_s:
            self._list_in(end_s - absence_s)
            return [ProbeNode(watch.node_id, watch.incarnation)]
        reason = "it is no longer registered in the control store"
        return self._end(watch.node_id, watch.incarnation, reason, has_left=False)

    def _end(self, node_id: str, incarnation: int, reason: str, *, has_left: bool) -> list[Command]:
        self._remember_end(node_id, incarnation)
        watch = self._watch_by_node.get(node_id)
        if watch is None or watch.incarnation > incarnation:
            return []
        self._silences.drop(node_id)
        self.view.drop(node_id)
        if has_left:
            return [NodeLeft(node_id, watch.incarnation)]
        return [NodeDied(node_id, watch.incarnation, reason)]

    @property
    def living(self) -> list[tuple[str, int]]:
        """This node and those in its view, with their incarnations."""
        return [(self.node_id, self.incarnation), *((view.node_id, view.incarnation) for view in self.view)]

    def _remember_end(self, node_id: str, incarnation: int) -> None:
        newest = max(incarnation, self._ended_by_node.pop(node_id, 0))
        self._ended_by_node[node_id] = newest
        if len(self._ended_by_node) > ENDED_MAX:
            del self._ended_by_node[next(iter(self._ended_by_node))]
