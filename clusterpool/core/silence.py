"""For how long other nodes have been silent in the control store, and which node acts on it. Pure.

Silence is counted on a clock that runs only while the store answers: nobody can be heard while it is away, and nobody
may be declared dead for it. The server's clock alone is never believed either, since it may jump: it can make a silence
shorter than the time since we looked, and never longer.

In a small cluster every node reads all heartbeats. In a large one that would be n * n of them twice a second, so each
reads only who has been silent for a second, which is mostly nobody; whoever is not in that report has been heard within
that second. And only the oldest few that are not silent themselves, the *wardens*, ask silent nodes whether they live,
and declare them dead. All count, so that when wardens die the next oldest go on from the same count.
"""

from __future__ import annotations

import math

import msgspec

from clusterpool.core.cluster_view import SilenceReport

# Before suspicion, so that a node which answers is never suspected, only because it cannot reach the store. Sooner asks
# nodes whose heartbeat is merely late.
PROBE_AFTER_S = 1.0
# Two answers of the store further apart than this do not prove that it answered in between.
READ_GAP_MAX_S = 2.0
# More would ask a node that is late more often; with fewer, a hole in the network between them and a node kills it.
WARDENS = 8


class Watch(msgspec.Struct, gc=False):
    """What is known of the heartbeats of one life of a node; times on the clock of Silences."""

    node_id: str
    incarnation: int
    heard_s: float  # when it was heard last
    looked_s: float  # when we looked last
    heartbeat_us: int = -1
    absent_s: float | None = None  # since when it is not even listed
    is_suspect: bool = False
    was_heard: bool = False  # since we watch


class Silences:
    """The clock and the watches."""

    def __init__(self) -> None:
        self.watch_by_node: dict[str, Watch] = {}
        self.clock_s = 0.0
        self.silent: dict[str, Watch] = {}  # those of the last report
        self._answered_s: float | None = None  # by the node's clock; None: the store was away since
        self._fresh_s = -math.inf  # who is not in `silent` was heard after that
        self._oldest: list[Watch] | None = None  # by incarnation; None: to be sorted anew

    def failed(self) -> None:
        """The store did not answer."""
        self._answered_s = None

    def answered(self, now_s: float, silence_max_s: float) -> float:
        """The store has answered; for how long it has proven to be there. silence_max_s: what may be left of a silence
        from before an outage."""
        last_s, self._answered_s = self._answered_s, now_s
        if last_s is not None and now_s - last_s <= READ_GAP_MAX_S:
            self.clock_s += now_s - last_s
            return now_s - last_s
        for watch in self.watch_by_node.values():
            watch.heard_s = max(watch.heard_s, self.clock_s - silence_max_s)
        return 0.0

    def add(self, node_id: str, incarnation: int, *, since_s: float) -> Watch:
        """Watch a life of a node. since_s: how long ago it was not there yet."""
        watch = self.watch_by_node[node_id] = Watch(node_id, incarnation, self.clock_s, self.clock_s - since_s)
        self._oldest = None
        return watch

    def drop(self, node_id: str) -> None:
        """Watch it no more."""
        if self.watch_by_node.pop(node_id, None) is not None:
            self.silent.pop(node_id, None)
            self._oldest = None

    def silence_s(self, watch: Watch) -> float:
        """For how long the node has not been heard."""
        return self.clock_s - watch.heard_s

    def hear(self, watch: Watch) -> None:
        """The node has been heard."""
        watch.heard_s = self.clock_s
        watch.absent_s = None
        watch.was_heard = True

    def look(self, watch: Watch, heartbeat_us: int, silence_s: float) -> None:
        """This is the node's last heartbeat, and how old the server says it is."""
        if heartbeat_us != watch.heartbeat_us:
            watch.was_heard = watch.was_heard or watch.heartbeat_us >= 0
            watch.heartbeat_us = heartbeat_us
            known_s = watch.looked_s if watch.node_id in self.silent else max(watch.looked_s, self._fresh_s)
            watch.heard_s = self.clock_s - min(max(silence_s, 0.0), self.clock_s - known_s)
        watch.looked_s = self.clock_s

    def report(self, report: SilenceReport) -> list[Watch]:
        """Who is silent now; those of whom something may have changed, in order."""
        before = self.silent
        now: dict[str, Watch] = {}
        for each in report.silent:
            watch = self.watch_by_node.get(each.node_id)
            if watch is not None and watch.incarnation == each.incarnation:
                self.look(watch, each.heartbeat_us, each.silence_s)
                now[each.node_id] = watch
        heard = [watch for node_id, watch in before.items() if node_id not in now]
        for watch in heard:
            watch.heard_s = self.clock_s
        self.silent = now
        self._fresh_s = self.clock_s - PROBE_AFTER_S
        return [*now.values(), *heard]

    def forget_report(self) -> None:
        """All heartbeats are read again."""
        self.silent = {}
        self._fresh_s = -math.inf

    def is_for_elders(self, watch: Watch, incarnation: int) -> bool:
        """Whether whoever has this incarnation leaves it to older nodes to declare this one dead.

        A node that lost its way to the store before we joined does not know of us, and so cannot answer us: those who
        were there before us may hear it.
        """
        if watch.was_heard or watch.incarnation > incarnation:
            return False
        others = (other for other in self.watch_by_node.values() if other.incarnation < incarnation)
        return any(other is not watch and not other.is_suspect for other in others)

    def is_warden(self, incarnation: int) -> bool:
        """Whether the node with this incarnation is to act on silence."""
        if self._oldest is None:
            self._oldest = sorted(self.watch_by_node.values(), key=lambda watch: watch.incarnation)
        older = 0
        for watch in self._oldest:
            if older == WARDENS or watch.incarnation >= incarnation:
                break
            older += watch.node_id not in self.silent
        return older < WARDENS
