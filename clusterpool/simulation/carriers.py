"""Locks, queues and cells as a simulated process uses them: what client/semaphore.py, cell.py and channel.py do.

thin: in the memory of the home's host        moved, once and for ever: in the control store
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from clusterpool.core import coordination_messages as c
from clusterpool.core.messages import Message
from clusterpool.simulation.coordination import ThinCarrier
from clusterpool.simulation.programs import Outcome
from clusterpool.simulation.threads import Disconnected, Steps

if TYPE_CHECKING:
    from clusterpool.simulation.client import Client
    from clusterpool.simulation.node import SimulatedNode

SLICE_S = 0.25
STUCK_S = 1.0
TOKENS_MAX = 1000


class CarrierPart(msgspec.Struct, frozen=True, array_like=True):
    """What a task needs to know of one."""

    name: str
    kind: str
    home: str
    total: int = -1


class Token(NamedTuple):
    """A token that somebody holds. `request`: that brought it; 0 of a thin one."""

    carrier: CarrierPart
    request: int
    number: int


class CoordinationError(Exception):
    """What the node answered instead. `outcome.kind` names the error."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.text)
        self.outcome = outcome


_KINDS = {"LockLost": "lock_lost", "ObjectLost": "carrier_lost", "NotConnected": "not_connected"}


class Carriers:
    """Those that one process uses."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._moved: set[str] = set()
        self._unmoved: dict[str, int] = {}  # by name, the page when it had not moved
        self.held: dict[str, int] = {}  # thin tokens
        self.given: dict[str, int] = {}
        self._stuck_s: dict[str, float] = {}  # by name, when somebody last said that the dead may hold it

    # --- making, moving

    def make(self, kind: str, tokens: int = 0, content: bytes = b"") -> CarrierPart:
        """A new one, at home."""
        client = self._client
        name = f"{client.job.job_id}-{client.name}-{client.world.next_number()}"
        self._node.coordination.thin[name] = ThinCarrier(kind, tokens, content)
        return CarrierPart(name, kind, client.address.node_id, -1 if kind == "semaphore" else tokens)

    @property
    def _node(self) -> SimulatedNode:
        node: SimulatedNode = self._client.node_party
        return node

    def _is_moved(self, carrier: CarrierPart) -> Steps:
        """Whether it is in the control store; one that is elsewhere at home is moved first."""
        name = carrier.name
        if name in self._moved:
            return True
        if carrier.home != self._client.address.node_id:
            maximum = carrier.total if carrier.total > 0 else TOKENS_MAX
            yield from self._ask(
                lambda request: c.AdoptCarrier(request, carrier.kind, name, carrier.home, maximum, carrier.total)
            )
            self._moved.add(name)
            return True
        while True:
            page = self._node.coordination.page
            if page == 0 or self._unmoved.get(name) == page:
                return False
            answer = yield from self._ask(lambda request: c.IsMoved(request, name))
            if answer.number:
                self._moved.add(name)
                return True
            self._unmoved[name] = page

    def _thin(self, carrier: CarrierPart) -> ThinCarrier:
        thin = self._node.coordination.thin.get(carrier.name)
        if thin is None:
            raise CoordinationError(Outcome("carrier_lost", 0, text=f"{carrier.name} is gone"))
        return thin

    def _is_changed(self, thin: ThinCarrier, page: int) -> bool:
        return thin.tokens > 0 or bool(thin.items) or self._node.coordination.page != page

    def _woken(self) -> None:
        self._node.coordination._wake()

    # --- semaphores

    def acquire(self, carrier: CarrierPart, patience_s: float) -> Steps:
        """A Token, or None after so long; at once if that is 0."""
        client, name = self._client, carrier.name
        deadline_s = client.now_s() + patience_s
        reported_s = client.now_s()
        while not (yield from self._is_moved(carrier)):
            thin = self._thin(carrier)
            if thin.tokens > 0:
                return self._taken_thin(carrier, thin)
            if client.now_s() >= deadline_s:
                return None
            page = self._node.coordination.page
            slice_s = min(SLICE_S, deadline_s - client.now_s())
            yield from client.wait_for(partial(self._is_changed, thin, page), slice_s)
            if thin.tokens > 0:
                return self._taken_thin(carrier, thin)
            if carrier.total >= 0 and client.now_s() - reported_s >= STUCK_S:
                reported_s = client.now_s()
                client.send(client.node, c.ReportStuck(name, carrier.total))
        if carrier.home == client.address.node_id:
            thin = self._thin(carrier)
            if thin.tokens > 0:  # posted after the move: whoever takes it gives it to the store in the end
                return self._taken_thin(carrier, thin)
        requests: list[int] = []

        def make(request: int) -> Message:
            requests.append(request)
            return c.AcquireToken(request, name, patience_s > 0)

        def give_back(_answer: c.CoordinationDone) -> None:
            client.send(client.node, c.ReturnToken(requests[0], name))

        left_s = max(0.0, deadline_s - client.now_s()) if patience_s > 0 else None
        answer = yield from self._wait(make, left_s, give_back)
        return Token(carrier, requests[0], answer.number) if answer.number else None

    def _taken_thin(self, carrier: CarrierPart, thin: ThinCarrier) -> Token:
        thin.tokens -= 1
        self.held[carrier.name] = self.held.get(carrier.name, 0) + 1
        return Token(carrier, 0, 0)

    def release(self, token: Token) -> Steps:
        """Give it back.

        Raises: CoordinationError, `lock_lost` when it was taken from us.
        """
        carrier, name = token.carrier, token.carrier.name
        maximum = carrier.total if carrier.total > 0 else TOKENS_MAX
        if token.request:
            yield from self._ask(lambda request: c.ReleaseToken(request, name, maximum, token.request))
            return
        thin = self._thin(carrier)
        self.held[name] -= 1
        self.given[name] = self.given.get(name, 0) + 1
        thin.tokens += 1
        self._woken()
        if (yield from self._is_moved(carrier)) and thin.tokens > 0:
            thin.tokens -= 1
            yield from self._ask(lambda request: c.ReleaseToken(request, name, maximum, 0, True))

    def post(self, carrier: CarrierPart) -> Steps:
        """One token more, of a semaphore whose tokens belong to nobody."""
        name = carrier.name
        is_home = carrier.home == self._client.address.node_id
        if is_home:
            thin = self._thin(carrier)
            if not (yield from self._is_moved(carrier)):
                thin.tokens += 1
                self._woken()
                if not (yield from self._is_moved(carrier)) or thin.tokens == 0:
                    return
                thin.tokens -= 1
        else:
            yield from self._is_moved(carrier)
        yield from self._ask(lambda request: c.ReleaseToken(request, name, TOKENS_MAX))

    def value(self, carrier: CarrierPart) -> Steps:
        """How many tokens nobody has, or items nobody has got."""
        if (yield from self._is_moved(carrier)):
            kind = c.CountItems if carrier.kind == "channel" else c.ReadValue
            answer = yield from self._ask(lambda request: kind(request, carrier.name))
            return answer.number
        thin = self._thin(carrier)
        return len(thin.items) if carrier.kind == "channel" else thin.tokens

    def look_for_dead(self, carrier: CarrierPart) -> Steps:
        """Somebody waits for tokens that others hold, otherwise than by `acquire`."""
        client, name = self._client, carrier.name
        if (yield from self._is_moved(carrier)):
            return  # the control store hears of the end of its holders without being asked
        if client.now_s() - self._stuck_s.setdefault(name, client.now_s()) >= STUCK_S:
            self._stuck_s[name] = client.now_s()
            client.send(client.node, c.ReportStuck(name, carrier.total))

    def count_held(self, message: c.CountHeld) -> None:
        """The node counts the tokens of a thin semaphore."""
        name = message.name
        held, given = self.held.get(name, 0), self.given.get(name, 0)
        self._client.send(self._client.node, c.HeldCounted(message.request, name, held, given))

    # --- cells

    def read_cell(self, carrier: CarrierPart) -> Steps:
        """Its bytes."""
        if (yield from self._is_moved(carrier)):
            answer = yield from self._ask(lambda request: c.ReadCell(request, carrier.name, 0))
            return answer.content
        return self._thin(carrier).content

    def write_cell(self, carrier: CarrierPart, content: bytes, token: Token) -> Steps:
        """New bytes, under the lock that guards it.

        Raises: CoordinationError, `lock_lost`.
        """
        guard = token.carrier.name
        if (yield from self._is_moved(carrier)):
            yield from self._ask(
                lambda request: c.WriteCell(request, carrier.name, content, guard, token.request, token.request == 0)
            )
            return
        thin = self._thin(carrier)
        self._client.world.locks.written(carrier.name, thin.content, content)
        thin.content = content

    # --- channels

    def put(self, carrier: CarrierPart, item: bytes) -> Steps:
        """Append an item."""
        if (yield from self._is_moved(carrier)):
            yield from self._ask(lambda request: c.PutItem(request, carrier.name, item))
            return
        self._thin(carrier).items.append(item)
        self._woken()

    def get(self, carrier: CarrierPart, patience_s: float) -> Steps:
        """The first item, or None after so long; at once if that is 0."""
        client = self._client
        deadline_s = client.now_s() + patience_s
        while not (yield from self._is_moved(carrier)):
            thin = self._thin(carrier)
            if thin.items:
                return thin.items.popleft()
            if client.now_s() >= deadline_s:
                return None
            page = self._node.coordination.page
            slice_s = min(SLICE_S, deadline_s - client.now_s())
            yield from client.wait_for(partial(self._is_changed, thin, page), slice_s)

        def give_back(answer: c.CoordinationDone) -> None:
            client.send(client.node, c.ReturnItem(carrier.name, answer.content))

        waits = patience_s > 0
        left_s = max(0.0, deadline_s - client.now_s()) if waits else None
        answer = yield from self._wait(lambda request: c.GetItem(request, carrier.name, waits), left_s, give_back)
        return answer.content if answer.number else None

    # --- questions

    def _ask(self, make: Callable[[int], Message]) -> Steps:
        return self._checked((yield from self._client.ask(make, lambda: None)))

    def _wait(
        self, make: Callable[[int], Message], patience_s: float | None, give_back: Callable[[c.CoordinationDone], None]
    ) -> Steps:
        client = self._client
        answers: list[Any] = []
        is_abandoned = False

        def answered(answer: Any) -> None:
            answers.append(answer)
            if is_abandoned and isinstance(answer, c.CoordinationDone) and answer.number:
                give_back(answer)

        request = client.request_nowait(make, answered)
        try:
            yield from client.wait_for(lambda: bool(answers), patience_s)
            if not answers and not client.is_closed:
                client.send(client.node, c.CancelWait(request))
                yield from client.wait_for(lambda: bool(answers), None)
        except BaseException:
            is_abandoned = True
            if not answers:
                client.send(client.node, c.CancelWait(request))
            elif isinstance(answers[0], c.CoordinationDone) and answers[0].number:
                give_back(answers[0])
            raise
        if not answers:
            raise Disconnected(client.closed_text)
        return self._checked(answers[0])

    def _checked(self, answer: Any) -> c.CoordinationDone:
        if isinstance(answer, c.CoordinationFailed):
            kind, client = _KINDS.get(answer.kind, answer.kind), self._client
            text = f"{answer.text} (said to {client.name} on node {client.address.node_id})"
            raise CoordinationError(Outcome(kind, 0, text=text))
        assert isinstance(answer, c.CoordinationDone)
        return answer
