"""The way of messages to and from other nodes: sent, held until the node is known, or handed back; let in, or not.

    send --in the view--> Peers                       arrived --of the lives that both sides know--> let in
      |---not heard of yet--> [held] --joined--> Peers   |---of a life not heard of yet--> [early] --joined--> delivered
      |                          +----HOLD_S----> handed back   (or our own answer from the store is on its way)
      +---known to be over--> [held] --joined--> Peers   +---of a life that is over, theirs or ours--> dropped
                                 +--not listed, or ENDED_HOLD_S--> handed back

A node may be heard of before the control store has told us of it: another node passes on a request of a process there.
A node that was fenced and has joined anew is another node under the same name: whatever was between it and others has
been given up on both sides, each when it heard of the end. So each message names the lives (incarnations) of the two
nodes that it goes between, and one of a life that is over on either side is dropped, even if it was under way for long.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from clusterpool.core import wire
from clusterpool.core.membership import Membership, State
from clusterpool.core.messages import Relay

# The change feed tells of a new node within milliseconds, the periodic read within half a second. Longer keeps the
# senders to a node that will never be there waiting.
HOLD_S = 5.0
HELD_MAX = 10_000
# Of what came early. We hear of a life that another node knows already as soon as the store answers, if it is a real
# one; whoever has the keys of the cluster must not fill its nodes with lives of its own making.
EARLY_BYTES_MAX = 256 << 20
EARLY_HOLD_S = 90.0
# A node that joins anew after its end may be heard of by way of another that knows it already: the control store is
# asked, and mostly answers in milliseconds. If it does not, what is meant for that node comes back after this time; for
# as long after that, what follows comes back at once. (Else tasks that were queued with arguments in the arena of a
# dead node would each wait this long, one behind the other, when their workers ask for them.)
ENDED_HOLD_S = 1.0


class Peers(Protocol):
    """Connections to the other nodes; each keeps its frames in order."""

    def send(self, node_id: str, address: tuple[str, int], frame: bytes) -> None:
        """Send a frame to a node; lost if the node is gone."""

    def forget(self, node_id: str) -> None:
        """The node is gone: drop what was still to be sent to it."""


class Routes:
    """Used by the node's only thread. `hand_back` gets what cannot be sent, `deliver` what was early; both must put off
    what they do, since the node's machine may be in the middle of its commands.
    """

    def __init__(
        self,
        peers: Peers,
        membership: Membership,
        hand_back: Callable[[Relay], None],
        deliver: Callable[[Relay], None],
        *,
        seek: Callable[[str], None] = lambda node_id: None,
        refuse: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._peers = peers
        self._membership = membership
        self._hand_back = hand_back
        self._deliver = deliver
        self._seek = seek  # has the control store asked for a node that has ended; `absent` if it does not list it
        self._sought_s: dict[str, float] = {}  # by node id, when it was sought
        self._refuse = refuse  # told why a message is dropped
        self._early: dict[str, list[tuple[float, Relay]]] = {}  # by node id, in order, each with the time it came
        self._early_count = self._early_bytes = 0
        self._now_s = 0.0  # when anything came last, or at the last tick
        self._held: dict[str, list[tuple[float, Relay]]] = {}  # by node id, each with the time it came
        self._held_count = 0
        self._returned_s: dict[str, float] = {}  # by node id, when what was held for one that had ended was handed back

    def send(self, relay: Relay, now_s: float) -> None:
        """Send a message on its way to another node."""
        node_id = relay.destination.node_id
        membership = self._membership
        view = membership.view.get(node_id)
        if membership.state is State.FENCED or (membership.state is State.JOINING and membership.incarnation):
            self._hand_back(relay)  # this life is over; what belongs to the next one cannot have begun
        elif view is not None and membership.state is State.MEMBER:
            if node_id in self._held:
                self._release(node_id, view.address, view.incarnation)
            self._put(relay, view.address, view.incarnation)
        elif self._held_count >= HELD_MAX or now_s - self._returned_s.get(node_id, -math.inf) < ENDED_HOLD_S:
            self._hand_back(relay)
        else:
            self._held.setdefault(node_id, []).append((now_s, relay))
            self._held_count += 1
            if membership.has_ended(node_id) and node_id not in self._sought_s:
                self._sought_s[node_id] = now_s
                self._seek(node_id)

    def absent(self, node_id: str) -> None:
        """The control store did not list the node when it was asked for it."""
        asked_s = self._sought_s.pop(node_id, -math.inf)
        if not self._membership.has_ended(node_id):
            return
        for came_s, relay in self._take(node_id):
            if came_s <= asked_s:
                self._hand_back(relay)
            else:
                self.send(relay, came_s)  # it is asked once more

    def _put(self, relay: Relay, address: tuple[str, int], life: int) -> None:
        stamped = Relay(relay.destination, relay.source, relay.body, self._membership.incarnation, life)
        self._peers.send(relay.destination.node_id, address, wire.encode(stamped))

    def arrived(self, node_id: str, relay: Relay, now_s: float) -> bool:
        """Whether to let in what a node has sent, now. What is early is delivered later; the rest is dropped."""
        # A node hears others before its first tick.
        self._now_s = max(self._now_s, now_s)
        early = self._early.get(node_id)
        is_let_in = None if early else self._is_let_in(node_id, relay)
        if is_let_in is None and relay.from_life > self._membership.ended_incarnation(node_id):
            self._returned_s.pop(node_id, None)  # it lives again: what is meant for it is held until we know where
        if is_let_in is None and self._has_room(relay):
            self._early.setdefault(node_id, []).append((self._now_s, relay))
            self._early_count += 1
            self._early_bytes += len(relay.body)
        elif not is_let_in:
            self._drop(node_id, relay)
        return is_let_in is True

    def _has_room(self, relay: Relay) -> bool:
        return self._early_count < HELD_MAX and self._early_bytes + len(relay.body) <= EARLY_BYTES_MAX

    def _drop(self, node_id: str, relay: Relay) -> None:
        self._refuse(
            f"dropped a message of node {node_id!r}: it goes from its life {relay.from_life} to our life "
            f"{relay.to_life}, and we are in life {self._membership.incarnation}; one of them is over, or never was"
        )

    def _is_let_in(self, node_id: str, relay: Relay) -> bool | None:
        """None: not yet."""
        membership = self._membership
        own = membership.incarnation
        if relay.to_life != own:
            return None if relay.to_life > own else False
        if membership.state is not State.MEMBER or relay.from_life <= membership.ended_incarnation(node_id):
            return False
        view = membership.view.get(node_id)
        if view is None or view.incarnation < relay.from_life:
            return None
        return view.incarnation == relay.from_life

    def _look_at_early(self) -> None:
        for node_id, early in list(self._early.items()):
            waiting: list[tuple[float, Relay]] = []
            for came_s, relay in early:
                is_let_in = None if waiting else self._is_let_in(node_id, relay)
                if is_let_in is None and self._now_s - came_s < EARLY_HOLD_S:
                    waiting.append((came_s, relay))
                    continue
                self._early_bytes -= len(relay.body)
                if is_let_in:
                    self._deliver(relay)
                else:
                    self._drop(node_id, relay)
            self._early_count -= len(early) - len(waiting)
            if waiting:
                self._early[node_id] = waiting
            else:
                del self._early[node_id]

    def joined(self, node_id: str) -> None:
        """The node is in the view now."""
        self._returned_s.pop(node_id, None)
        self._sought_s.pop(node_id, None)
        view = self._membership.view.get(node_id)
        if view is not None and node_id in self._held:
            self._release(node_id, view.address, view.incarnation)
        if self._early:
            self._look_at_early()

    def lost(self, node_id: str) -> None:
        """The node is gone."""
        self._peers.forget(node_id)
        for _, relay in self._take(node_id):
            self._hand_back(relay)

    def time_passed(self, now_s: float) -> None:
        """Hand back what has been held for too long; look whether what was early is due."""
        self._now_s = now_s
        if self._early:
            self._look_at_early()
        for node_id, held in list(self._held.items()):
            self.joined(node_id)  # it may have been known before we were a member ourselves
            has_ended = self._membership.has_ended(node_id)
            hold_s = ENDED_HOLD_S if has_ended else HOLD_S
            if node_id in self._held and now_s - held[0][0] >= hold_s:
                if has_ended:
                    self._returned_s[node_id] = now_s
                    self._sought_s.pop(node_id, None)
                for _, relay in self._take(node_id):
                    self._hand_back(relay)

    def _release(self, node_id: str, address: tuple[str, int], life: int) -> None:
        if self._membership.state is State.MEMBER:
            for _, relay in self._take(node_id):
                self._put(relay, address, life)

    def _take(self, node_id: str) -> list[tuple[float, Relay]]:
        held = self._held.pop(node_id, [])
        self._held_count -= len(held)
        return held
