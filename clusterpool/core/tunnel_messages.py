"""What two nodes tell each other about a tunnel: a stream of bytes each way between a descriptor here and one there."""

from __future__ import annotations

from clusterpool.core.descriptor_messages import Name
from clusterpool.core.messages import Message


class TunnelMessage(Message, frozen=True):
    """Base of these; `tunnel` is a number of the node that opened it, with that node's id."""

    tunnel: str


class OpenTunnel(TunnelMessage, frozen=True):
    """Join a new tunnel to a parked descriptor, or to a listener. `kind`: "fetch" or "connect"."""

    kind: str
    name: Name


class TunnelOpened(TunnelMessage, frozen=True):
    """Answer to OpenTunnel."""


class TunnelRefused(TunnelMessage, frozen=True):
    """Answer to OpenTunnel: there is none. `error_number`: an `errno`."""

    error_number: int
    text: str


class TunnelData(TunnelMessage, frozen=True):
    """Bytes that were read at the sender's end, never more than it has credit for."""

    data: bytes


class TunnelCredit(TunnelMessage, frozen=True):
    """So many more bytes were written at this end: as many more may come."""

    size_bytes: int


class TunnelEnd(TunnelMessage, frozen=True):
    """No more bytes will come from this end (end of file, half-close); the other way goes on."""


class TunnelStop(TunnelMessage, frozen=True):
    """Nobody reads at this end any more: whoever writes at yours must get an error."""
