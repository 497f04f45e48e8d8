"""What a node's coordination machine hears (past tense) and what it asks the node's shell to do (imperative)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from clusterpool.core.messages import Address
from clusterpool.core.node_events import Command, Event

# What the store answers to `acquire` and `get`.
REFUSED, GRANTED, WAITING, LIFE_OVER = 0, 1, 2, 3


class Contents(NamedTuple):
    """What is in a carrier when it moves: tokens of a semaphore, items of a channel, bytes of a cell."""

    tokens: int = 0
    items: Sequence[bytes] = ()
    content: bytes = b""


# --- events -----------------------------------------------------------------------------------------------------------


class CoordinationEvent(Event, frozen=True):
    """Base of the events."""


class ProcessGone(CoordinationEvent, frozen=True):
    """A process of this node has ended or left: it holds and waits for nothing any more."""

    address: Address


class JobGone(CoordinationEvent, frozen=True):
    """A job is over on this node: its driver and its processes here have ended.

    is_known: of the driver; else this node only supposes so, and the control store keeps what the job has there.
    home: the driver's node, if it is only known that this was declared dead: it may yet come back, with the driver.
    """

    job_id: str
    is_known: bool = True
    home: str = ""


class NodeGone(CoordinationEvent, frozen=True):
    """Another node has ended or was declared dead. incarnation: its last life that is known to be over."""

    node_id: str
    incarnation: int


class NodeUnreachable(CoordinationEvent, frozen=True):
    """A message to another node came back; it may yet be alive."""

    node_id: str


class SelfFenced(CoordinationEvent, frozen=True):
    """The others took this node for dead, and have given back what its processes held and waited for."""


class StoreChanged(CoordinationEvent, frozen=True):
    """Another control store answers than before, or it was restarted: it may have forgotten who waits."""


class OperationAnswered(CoordinationEvent, frozen=True):
    """Answer to CallCoordination."""

    tag: int
    value: Any


class OperationFailed(CoordinationEvent, frozen=True):
    """CallCoordination failed; `kind` is the name of the exception's class."""

    tag: int
    kind: str
    text: str


class GrantRead(CoordinationEvent, frozen=True):
    """The control store has handed a token to one who waited. `waiter`: as in `waiter_id`.

    Token 0: it has lost what it knew of this waiter (of all, if that is empty), which must ask again.
    """

    waiter: str
    name: str
    token: int


class CarrierDrained(CoordinationEvent, frozen=True):
    """Answer to DrainCarrier: what was in it. is_signal: the tokens of this semaphore are nobody's."""

    name: str
    contents: Contents
    is_signal: bool = False


class CarrierMissing(CoordinationEvent, frozen=True):
    """Answer to DrainCarrier: this node has no such carrier."""

    name: str
    text: str


class ThinRecord(NamedTuple):
    """What a process without a client has written down of one semaphore. `is_busy`: it is just taking or giving."""

    process: str
    held: int
    given: int
    is_busy: bool


class TimeToLook(CoordinationEvent, frozen=True):
    """Half a second has gone by: a fork that held something may have died, of which nobody tells."""


class ThinTokensRead(CoordinationEvent, frozen=True):
    """Answer to ReadThinTokens. `records`: of living processes; `registrations`: how many ever wrote any."""

    name: str
    free: int
    is_signal: bool = False
    registrations: int = 0
    records: tuple[ThinRecord, ...] = ()


class ThinTokensMissing(CoordinationEvent, frozen=True):
    """Answer to ReadThinTokens: there is no such thin semaphore (any more)."""

    name: str


# --- commands ---------------------------------------------------------------------------------------------------------


class CoordinationCommand(Command, frozen=True):
    """Base of the commands."""


class CallCoordination(CoordinationCommand, frozen=True):
    """Call this operation of the control store, after those before; answer OperationAnswered or OperationFailed.

    tag: 0 when nobody waits for the answer. starts: whether it is worth starting a control store that is not there yet.
    """

    tag: int
    operation: str
    arguments: tuple[Any, ...]
    starts: bool = True


class DrainCarrier(CoordinationCommand, frozen=True):
    """Bump the moved page, then empty this carrier; answer CarrierDrained or CarrierMissing, at once."""

    kind: str
    name: str


class RemoveCarriers(CoordinationCommand, frozen=True):
    """Remove these carriers of this node: nobody uses them any more."""

    names: list[str]


class RemoveJobCarriers(CoordinationCommand, frozen=True):
    """Remove all carriers of this node that belong to the job."""

    job_id: str


class ReadThinTokens(CoordinationCommand, frozen=True):
    """Look at a thin semaphore; answer ThinTokensRead or ThinTokensMissing, at once."""

    name: str


class ReturnTokens(CoordinationCommand, frozen=True):
    """Give so many tokens to a thin semaphore: dead processes held them."""

    name: str
    count: int
