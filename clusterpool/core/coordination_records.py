"""What the coordination machine of a node keeps of each carrier and of each process that waits for one."""

from __future__ import annotations

from clusterpool.core import coordination_events as e
from clusterpool.core import coordination_messages as c
from clusterpool.core.messages import Address


class Move:
    """A carrier of this node that moves, or has moved."""

    def __init__(self, message: c.MoveCarrier) -> None:
        self.kind = message.kind
        self.maximum = message.maximum
        self.total = 1 if message.kind == "lock" else message.total
        self.held = 0  # tokens that processes here had when it was drained, and have not given to the store
        self.drained: e.CarrierDrained | None = None
        self.is_creating = False
        self.is_done = False
        self.processes: list[tuple[Address, int]] = []  # who waits for it, with their requests
        self.nodes: list[Address] = []
        self.askers: list[tuple[Address, c.IsMoved]] = []  # processes of this node that want to know where it is


class Adoption:
    """A carrier of another node that processes of this one want."""

    def __init__(self, message: c.AdoptCarrier) -> None:
        self.message = message
        self.processes: list[tuple[Address, int]] = []
        self.is_home_asked = False
        self.is_last_try = False


class Wait:
    """A process that waits for a token, or for an item."""

    def __init__(self, source: Address, message: c.AcquireToken | c.GetItem) -> None:
        self.source = source
        self.message = message
        self.is_popping = False
        self.cancelled_ticks = 0  # from 1 on, since the process has given up
        self.ticks = 0  # half seconds since it began
        self.times_asked = 0
        self.calls = 0  # to the store about it that are not answered yet
        self.is_stale = False  # the store has changed since the first of these
        self.token = 0  # the one that the process was told

    @property
    def wants_item(self) -> bool:
        return isinstance(self.message, c.GetItem)
