"""The way of messages to other nodes: sent, held until the node is known, or handed back.

    send --in the view--> Peers
      |---not heard of yet--> [held] --joined--> Peers
      |                          +----HOLD_S----> handed back
      +---known to be over--> handed back

A node may be heard of before the control store has told us of it: another node passes on a request of a process there.
Nothing that comes from a node whose end is known is let in, so that its news cannot arrive after the news of its end.
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
    """Used by the node's only thread. `hand_back` gets what cannot be delivered; it must not send at once."""

    def __init__(self, peers: Peers, membership: Membership, hand_back: Callable[[Relay], None]) -> None:
        self._peers = peers
        self._membership = membership
        self._hand_back = hand_back
        self._held: dict[str, list[tuple[float, Relay]]] = {}  # by node id, each with the time it came
        self._held_count = 0

    def send(self, relay: Relay, now_s: float) -> None:
        """Send a message on its way to another node."""
        node_id = relay.destination.node_id
        view = self._membership.view.get(node_id)
        if view is not None:
            self._release(node_id, view.address)
            self._peers.send(node_id, view.address, wire.encode(relay))
        elif self._membership.has_ended(node_id) or self._held_count >= HELD_MAX:
            self._hand_back(relay)
        else:
            self._held.setdefault(node_id, []).append((now_s, relay))
            self._held_count += 1

    def joined(self, node_id: str) -> None:
        """The node is in the view now."""
        view = self._membership.view.get(node_id)
        if view is not None:
            self._release(node_id, view.address)

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

    def is_from_the_dead(self, node_id: str) -> bool:
        """Whether a frame of this node must be dropped."""
        return node_id not in self._membership.view and self._membership.has_ended(node_id)

    def _release(self, node_id: str, address: tuple[str, int]) -> None:
        for _, relay in self._take(node_id):
            self._peers.send(node_id, address, wire.encode(relay))

    def _take(self, node_id: str) -> list[tuple[float, Relay]]:
        held = self._held.pop(node_id, [])
        self._held_count -= len(held)
        return held
