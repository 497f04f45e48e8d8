"""A simulated node's part of locks, queues and cells: its kernel's objects, and its way to the control store.

As node/coordination.py: calls are made in order, one at a time, under numbers by which the store knows one that is sent
again; grants are read apart from them.
"""

from __future__ import annotations

import itertools
from collections import deque
from typing import TYPE_CHECKING, Any

from clusterpool.core import coordination_events as e
from clusterpool.errors import NotConnected

if TYPE_CHECKING:
    from clusterpool.simulation.node import SimulatedNode

PATIENCE_S = 90.0
_RETRY_S = 0.2
_LOOK_S = 1.0
_QUESTIONS = frozenset({"exists", "value", "length", "read_cell"})


class ThinCarrier:
    """A semaphore, channel or cell in the memory of one host."""

    def __init__(self, kind: str, tokens: int = 0, content: bytes = b"") -> None:
        self.kind = kind
        self.tokens = tokens
        self.items: deque[bytes] = deque()
        self.content = content


class NodeCoordination:
    """Of one node. `page`: counts up before anything of this node moves to the control store."""

    def __init__(self, node: SimulatedNode) -> None:
        self._node = node
        self._server = node.world.store
        self._client = self._server.coordination.client(node.node_id)
        self.page = 0
        self.thin: dict[str, ThinCarrier] = {}
        self._queue: deque[tuple[e.CallCoordination, float]] = deque()
        self._numbers = itertools.count(1)
        self._is_busy = False
        self._is_reading = False
        self._last_grant = "0"
        self._life = 0
        self._is_started = False

    def take(self, command: Any) -> None:
        """Carry out a command of the machine."""
        if isinstance(command, e.CallCoordination):
            self._put(command)
        elif isinstance(command, e.DrainCarrier):
            self._node.hear(self._drain(command))
        elif isinstance(command, e.ReadThinTokens):
            carrier = self.thin.get(command.name)
            missing = e.ThinTokensMissing(command.name)
            self._node.hear(missing if carrier is None else e.ThinTokensRead(command.name, carrier.tokens))
        elif isinstance(command, e.ReturnTokens):
            if command.name in self.thin:
                self.thin[command.name].tokens += command.count
                self._wake()
        elif isinstance(command, e.RemoveCarriers):
            for name in command.names:
                self.thin.pop(name, None)
        elif isinstance(command, e.RemoveJobCarriers):
            for name in [name for name in self.thin if name.startswith(f"{command.job_id}-")]:
                del self.thin[name]

    def _drain(self, command: e.DrainCarrier) -> Any:
        self.page += 1
        carrier = self.thin.get(command.name)
        if carrier is None:
            return e.CarrierMissing(command.name, f"{command.name} is not on this node")
        tokens, carrier.tokens = carrier.tokens, 0
        items, carrier.items = list(carrier.items), deque()
        self._wake()
        return e.CarrierDrained(command.name, e.Contents(tokens, items, carrier.content))

    def _wake(self) -> None:
        """Processes of this host look at its memory."""
        for party in list(self._node.host.parties):
            turn = getattr(party, "turn", None)
            if turn is not None and party.is_alive:
                party.after(0.00005, turn)

    # --- calls

    def _put(self, call: e.CallCoordination) -> None:
        if not self._is_started:
            self._is_started = True
            self._life = self._server.life
            self._server.follow_grants(self._read)
            self._look()
        self._queue.append((call, self._node.now_s() + PATIENCE_S))
        self._next()

    def _next(self) -> None:
        if self._is_busy or not self._queue:
            return
        self._is_busy = True
        call, deadline_s = self._queue.popleft()
        numbers = () if call.operation in _QUESTIONS else (next(self._numbers),)
        self._try(call, deadline_s, numbers)

    def _try(self, call: e.CallCoordination, deadline_s: float, numbers: tuple[int, ...]) -> None:
        node = self._node

        def operation(_fake: Any) -> Any:
            return self._server.coordinated(self._client, call.operation, (*numbers, *call.arguments))

        def answered(value: Any, error: BaseException | None) -> None:
            if isinstance(error, NotConnected) and (not call.tag or node.now_s() < deadline_s):
                node.after(_RETRY_S, self._try, call, deadline_s, numbers)
                return
            self._is_busy = False
            if call.tag and error is not None:
                node.event(e.OperationFailed(call.tag, type(error).__name__, str(error)))
            elif call.tag:
                node.event(e.OperationAnswered(call.tag, value))
            self._next()

        node.store.call(operation, answered)

    # --- grants

    def _look(self) -> None:
        """News of a grant may have got lost."""
        self._node.after(_LOOK_S, self._look)
        self._read()

    def _read(self) -> None:
        if self._is_reading or not self._node.is_alive:
            return
        self._is_reading = True
        self._node.store.call(
            lambda _: (self._server.coordinated(self._client, "read_grants", (self._last_grant,)), self._server.life),
            self._grants_read,
        )

    def _grants_read(self, value: Any, error: BaseException | None) -> None:
        self._is_reading = False
        if error is not None:
            return
        grants, life = value
        if life != self._life:
            self._life, self._last_grant = life, "0"
            self._node.event(e.StoreChanged())
            self._read()
            return
        for grant in grants:
            self._last_grant = grant.id
            self._node.event(e.GrantRead(grant.waiter, grant.name, grant.token))
        if grants:
            last = self._last_grant
            self._node.store.call(
                lambda _: self._server.coordinated(self._client, "drop_grants", (last,)), lambda *_: None
            )
            self._read()
