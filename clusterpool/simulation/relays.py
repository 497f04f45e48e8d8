"""A simulated node's way to the control store, direct or through a peer, and its help for peers that are cut off.

As node/store_route.py and node/tunnels.py; where they pass bytes on, the tunnel carries the numbers of operations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clusterpool.core import store_route as sr
from clusterpool.core import tunnels as t
from clusterpool.core.node_events import Send
from clusterpool.core.tunnel_messages import TunnelMessage
from clusterpool.errors import NotConnected

if TYPE_CHECKING:
    from clusterpool.simulation.node import SimulatedNode

# As in node/store_thread.py and node/store_route.py.
ANSWER_S = 2.0
PROBE_PERIOD_S = 1.0
_NUMBER_BYTES = 8
Answer = Callable[[Any, BaseException | None], None]


class NoAnswer(NotConnected):
    """Nothing came back."""


class StoreWay:
    """Of one node. `direct(operation, answer)`: a call that goes no detour."""

    def __init__(self, node: SimulatedNode, direct: Callable[[Any, Answer], None]) -> None:
        self.route = sr.StoreRoute()
        self.tunnels = t.Tunnels(node.node_id)
        self.answered_s = 0.0  # when the store last answered, by the world's clock
        self._node = node
        self._direct = direct
        self._askers = itertools.count(1)
        self._asker = 0  # of the tunnel that is being opened
        self._tunnel = ""  # the one in use
        self._asked: dict[int, Answer] = {}  # by number, what goes through it
        self._relayed: set[str] = set()  # tunnels of peers that end here; membership only
        self._is_probing = False

    def call(self, operation: Any, answer: Answer) -> None:
        """One operation by the way in use; exactly one answer."""

        way = self.route.peer

        def told(value: Any, error: BaseException | None) -> None:
            if isinstance(error, NotConnected):
                if way != self.route.peer:  # it says nothing of the way that is in use now
                    answer(value, error)
                    return
                peers = tuple(view.node_id for view in self._node.machine.membership.view if view.node_id != self._own)
                self._handle(sr.AttemptFailed(peers, isinstance(error, NoAnswer)))
            else:
                self.answered_s = self._node.world.timeline.now_s
                self._handle(sr.AttemptWorked())
            answer(value, error)

        if self.route.peer:
            self._call_through_peer(operation, told)
        else:
            self._direct(operation, told)

    @property
    def _own(self) -> str:
        return self._node.node_id

    def _handle(self, event: Any) -> None:
        for command in self.route.handle(event, self._node.now_s()):
            self._break()
            if command.peer and not self._is_probing:
                self._is_probing = True
                self._later(PROBE_PERIOD_S, self._probe)

    def _later(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        self._node.world.timeline.after(delay_s, self._node.act, action, *arguments)

    def _probe(self) -> None:
        def told(_value: Any, error: BaseException | None) -> None:
            if error is None and self.route.peer:
                self._handle(sr.DirectWorked())
            self._is_probing = bool(self.route.peer)
            if self._is_probing:
                self._later(PROBE_PERIOD_S, self._probe)

        self._direct(lambda _: None, told)

    # --- who is cut off

    def _call_through_peer(self, operation: Any, answer: Answer) -> None:
        number = self._node.world.next_number()
        self._node.world.store.relayed[number] = operation
        self._asked[number] = answer
        self._later(ANSWER_S, self._end, number, NoAnswer(f"no answer through {self.route.peer}"))
        if self._tunnel:
            self._write(self._tunnel, number)
        elif not self._asker:
            self._asker = next(self._askers)
            self._do(t.TunnelWanted(self._asker, self.route.peer, "connect", "store"))

    def _end(self, number: int, error: BaseException | None, value: Any = None) -> None:
        answer = self._asked.pop(number, None)
        # As a connection is killed in the server before its user makes another: what has not come yet never will.
        self._node.world.store.relayed.pop(number, None)
        if answer is not None:
            answer(value, error)

    def _break(self) -> None:
        """The connection is no more."""
        tunnel, self._tunnel, self._asker = self._tunnel, "", 0
        if tunnel:
            self._shut(tunnel)
        for number in list(self._asked):
            self._end(number, NotConnected("the connection through a peer has ended"))

    # --- tunnels

    def arrived(self, node_id: str, message: TunnelMessage) -> None:
        """Another node has something to say of a tunnel."""
        self._do(t.TunnelMessageArrived(node_id, message))

    def lost(self, node_id: str) -> None:
        """Another node is gone."""
        self._do(t.NodeGone(node_id))

    def _write(self, tunnel: str, number: int) -> None:
        if self.tunnels.credit_of(tunnel) >= _NUMBER_BYTES:
            self._do(t.BytesRead(tunnel, number.to_bytes(_NUMBER_BYTES, "little")))

    def _shut(self, tunnel: str) -> None:
        self._do(t.BytesEnded(tunnel))
        self._do(t.ReaderGone(tunnel))

    def _do(self, event: Any) -> None:
        for command in self.tunnels.handle(event, self._node.now_s()):
            self._carry_out(command)

    def _carry_out(self, command: Any) -> None:
        if isinstance(command, Send):
            self._node.tell(command)
        elif isinstance(command, t.OpenEnd):
            self._relayed.add(command.tunnel)
            self._do(t.EndOpened(command.tunnel, True, True))
        elif isinstance(command, t.MakeEnd):
            if command.asker != self._asker:
                self._shut(command.tunnel)
                return
            self._tunnel, self._asker = command.tunnel, 0
            for number in list(self._asked):
                self._write(self._tunnel, number)
        elif isinstance(command, t.RefuseAsker):
            if command.asker == self._asker:
                self._break()
        elif isinstance(command, t.WriteEnd):
            self._written(command)
        elif isinstance(command, (t.CloseEnd, t.FinishWriting, t.RefuseBytes)):
            self._relayed.discard(command.tunnel)
            if command.tunnel == self._tunnel:
                self._break()
            elif not isinstance(command, t.CloseEnd):
                self._shut(command.tunnel)

    def _written(self, command: t.WriteEnd) -> None:
        self._do(t.BytesWritten(command.tunnel, len(command.data)))
        number = int.from_bytes(command.data, "little")
        relayed = self._node.world.store.relayed
        if command.tunnel == self._tunnel:
            value, error = relayed.get(number, (None, None))
            self._end(number, error, value)
        elif command.tunnel in self._relayed:
            self._direct(
                lambda fake: relayed[number](fake) if number in relayed else None,
                lambda value, error: self._passed_on(command.tunnel, number, value, error),
            )

    def _passed_on(self, tunnel: str, number: int, value: Any, error: BaseException | None) -> None:
        if tunnel not in self._relayed or number not in self._node.world.store.relayed:
            return
        if isinstance(error, NotConnected):
            self._relayed.discard(tunnel)
            self._shut(tunnel)
            return
        self._node.world.store.relayed[number] = (value, error)
        self._write(tunnel, number)
