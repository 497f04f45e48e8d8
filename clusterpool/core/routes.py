"""The way of messages to other nodes: sent, held until the node is known, or handed back.

    send --in the view--> Peers
      |---not heard of yet--> [held] --joined--> Peers
      |                          +----HOLD_S----> handed back
      +---known to be over--> handed back

A node may be heard of before the control store has told us of it: another node passes on a request of a process there.

    frame --of the life in the view, or of a node never heard of--> let in
      |---of a life that is over--> dropped: a node's news must not arrive after the news of its end
      +---of a later life--> [early] --joined--> let in: what it sends before we know of it is not lost, nor ended with
                                |                the life before, of whose end we have still to hear
                                +----HOLD_S----> dropped
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from clusterpool.core import wire
from clusterpool.core.membership import Membership
from clusterpool.core.messages import Relay

# The change feed tells of a new node within milliseconds, the periodic read within half a second. Longer keeps the
# senders to a node that will never be there waiting.
HOLD_S = 5.0
HELD_MAX = 10_000


class Peers(Protocol):
    """Connections to the other nodes; each keeps its frames in order."""

    def send(self, node_id: str, address: tuple[str, int], frame: bytes) -> None:
        """Send a frame to a node; lost if the node is gone."""

    def forget(self, node_id: str) -> None:
        """The node is gone: drop what was still to be sent to it."""


class Routes:
    """Used by the node's only thread. `hand_back` gets what cannot be delivered; it must not send at once.

    `let_in` gets what had come early; it must put it off until the news of the join have been carried out.
    """

    def __init__(
        self,
        peers: Peers,
        membership: Membership,
        hand_back: Callable[[Relay], None],
        let_in: Callable[[Relay], None],
    ) -> None:
        self._peers = peers
        self._membership = membership
        self._hand_back = hand_back
        self._let_in = let_in
        self._early: dict[str, list[tuple[float, Relay]]] = {}  # by node id, each with the time it came
        self._early_count = 0
        self._held: dict[str, list[tuple[float, Relay]]] = {}  # by node id, each with the time it came
        self._held_count = 0

    def send(self, relay: Relay, now_s: float) -> None:
        """Send a message on its way to another node."""
        node_id = relay.destination.node_id
        view = self._membership.view.get(node_id)
        if view is not None:
            self._release(node_id, view.address)
            self._peers.send(node_id, view.address, self._frame(relay))
        elif self._membership.has_ended(node_id) or self._held_count >= HELD_MAX:
            self._hand_back(relay)
        else:
            self._held.setdefault(node_id, []).append((now_s, relay))
            self._held_count += 1

    def joined(self, node_id: str) -> None:
        """The node is in the view now."""
        view = self._membership.view.get(node_id)
        if view is None:
            return
        self._release(node_id, view.address)
        for _, relay in self._take_early(node_id):
            if relay.incarnation == view.incarnation:
                self._let_in(relay)

    def lost(self, node_id: str) -> None:
        """The node is gone."""
        self._peers.forget(node_id)
        for _, relay in self._take(node_id):
            self._hand_back(relay)

    def time_passed(self, now_s: float) -> None:
        """Hand back what has been held for too long."""
        for node_id, held in list(self._held.items()):
            if now_s - held[0][0] >= HOLD_S:
                for _, relay in self._take(node_id):
                    self._hand_back(relay)

        for node_id, early in list(self._early.items()):
            if now_s - early[0][0] >= HOLD_S:
                self._take_early(node_id)

    def admits(self, node_id: str, relay: Relay, now_s: float) -> bool:
        """Whether a frame of this node may be let in now; if not, it was kept, or dropped."""
        view = self._membership.view.get(node_id)
        known = view.incarnation if view is not None else self._membership.ended_incarnation(node_id)
        if relay.incarnation == known:
            return view is not None
        if relay.incarnation < known:
            return False
        if not known:
            return True  # nothing that it says can be mistaken for news of another life
        if self._early_count < HELD_MAX:
            self._early.setdefault(node_id, []).append((now_s, relay))
            self._early_count += 1
        return False

    def _take_early(self, node_id: str) -> list[tuple[float, Relay]]:
        early = self._early.pop(node_id, [])
        self._early_count -= len(early)
        return early

    def _frame(self, relay: Relay) -> bytes:
        return wire.encode(Relay(relay.destination, relay.source, relay.body, self._membership.incarnation))

    def _release(self, node_id: str, address: tuple[str, int]) -> None:
        for _, relay in self._take(node_id):
            self._peers.send(node_id, address, self._frame(relay))

    def _take(self, node_id: str) -> list[tuple[float, Relay]]:
        held = self._held.pop(node_id, [])
        self._held_count -= len(held)
        return held
