"""What processes and nodes tell one another about semaphores, channels and cells (see coordination.py).

Each request of a process is answered once, with CoordinationDone or CoordinationFailed; what has no `request` is not
answered.
"""

from __future__ import annotations

from clusterpool.core.task_messages import Message


class CoordinationMessage(Message, frozen=True):
    """Base of what a process or another node asks this part of a node."""


# --- a process to its node --------------------------------------------------------------------------------------------


class IsMoved(CoordinationMessage, frozen=True):
    """Has this carrier of our node moved to the control store, or begun to? Answer: `number` 1 or 0."""

    request: int
    name: str


class AdoptCarrier(CoordinationMessage, frozen=True):
    """A carrier that was made on node `home` is wanted here: have it in the control store, then answer."""

    request: int
    kind: str  # "lock", "guard", "semaphore", "channel" or "cell"
    name: str
    home: str
    maximum: int
    total: int = -1  # of a guard: how many tokens it was made with


class AcquireToken(CoordinationMessage, frozen=True):
    """One token of a semaphore. Answer: `number` is the fencing token, or 0 when there is none and I would not wait."""

    request: int
    name: str
    waits: bool


class GetItem(CoordinationMessage, frozen=True):
    """The next item of a channel. Answer: `content` with `number` 1; or 0 as above."""

    request: int
    name: str
    waits: bool


class CancelWait(CoordinationMessage, frozen=True):
    """I wait no longer for what I asked with this request; it is answered with 0, unless its answer is on its way."""

    request: int


class ReleaseToken(CoordinationMessage, frozen=True):
    """One token more. Fails with ValueError when there are `maximum` already, with LockLost when it was taken from me.

    acquired: the request that brought it; 0 for none. is_thin: it was taken before the semaphore moved.
    """

    request: int
    name: str
    maximum: int
    acquired: int = 0
    is_thin: bool = False


class ReturnToken(CoordinationMessage, frozen=True):
    """What AcquireToken brought came too late: undo it. `acquired`: its request."""

    acquired: int
    name: str


class ReadValue(CoordinationMessage, frozen=True):
    """How many tokens are free?"""

    request: int
    name: str


class PutItem(CoordinationMessage, frozen=True):
    """One item more at a channel's end."""

    request: int
    name: str
    content: bytes


class ReturnItem(CoordinationMessage, frozen=True):
    """What GetItem brought came too late: put it back where it was, first."""

    name: str
    content: bytes


class CountItems(CoordinationMessage, frozen=True):
    """How many items are in a channel?"""

    request: int
    name: str


class ReadCell(CoordinationMessage, frozen=True):
    """A cell's bytes, if their version is another than mine. Answer: `number` is the version, or 0: you have it."""

    request: int
    name: str
    known_version: int


class WriteCell(CoordinationMessage, frozen=True):
    """New bytes for a cell. Answer: `number` is their version. Fails with LockLost when I hold `guard` no longer.

    acquired, is_thin: as above, of the guard.
    """

    request: int
    name: str
    content: bytes
    guard: str = ""
    acquired: int = 0
    is_thin: bool = False


class ForgetCarriers(CoordinationMessage, frozen=True):
    """These, made by me, never left my process, and nobody uses them any more."""

    names: list[str]


class ReportStuck(CoordinationMessage, frozen=True):
    """I have waited for a token of this thin semaphore for long. `total`: how many it was made with."""

    name: str
    total: int


class HeldCounted(CoordinationMessage, frozen=True):
    """Answer to CountHeld: I hold so many of its tokens, and have given back so many ever.

    is_busy: it changed while I looked.
    """

    request: int
    name: str
    held: int
    given: int
    is_busy: bool = False


# --- a node to another ------------------------------------------------------------------------------------------------


class MoveCarrier(CoordinationMessage, frozen=True):
    """To the home of a carrier: move it to the control store, for a process of mine wants it."""

    name: str
    kind: str
    maximum: int
    total: int = -1


class CarrierMoved(CoordinationMessage, frozen=True):
    """Answer to MoveCarrier: it is there; or it could not be moved, with the error's class and text."""

    name: str
    error_kind: str = ""
    error_text: str = ""


# --- a node to its process --------------------------------------------------------------------------------------------


class CountHeld(Message, frozen=True):
    """How many tokens of this thin semaphore do you hold? Whoever of you waits for one must have looked since."""

    request: int
    name: str


class CoordinationDone(Message, frozen=True):
    """Answer to a request."""

    request: int
    number: int = 0
    content: bytes = b""


class CoordinationFailed(Message, frozen=True):
    """Answer to a request that could not be met. `kind`: the class of the error to raise."""

    request: int
    kind: str
    text: str
