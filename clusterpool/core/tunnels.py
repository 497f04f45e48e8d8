"""Tunnels between nodes: which bytes may go, and how the ends of a stream pass through. Pure.

    process --socket-- [end] node ==TunnelData==> node [end] --socket, pipe-- process
                              <==TunnelCredit==

Each way is open or closed by itself. It closes at its source by the end of the bytes (TunnelEnd goes across, and the
other side shuts its socket down for writing) or at its sink because nobody reads there (TunnelStop goes across, and
the other side shuts its socket down for reading, so that its writer gets EPIPE). A tunnel with both ways closed is
forgotten by both sides without a further word, and their ends are closed. The source reads no more than the sink has
credited, so a slow reader slows the writer down and neither node holds more than WINDOW_BYTES.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from typing import Any

import msgspec

from clusterpool.core import tunnel_messages as t
from clusterpool.core.messages import Address
from clusterpool.core.node_events import Send

# Less than bandwidth times delay between two nodes (1 GB/s, 1 ms) slows a tunnel down; more is memory of the node that
# a reader who has stopped reading keeps for good.
WINDOW_BYTES = 1024 * 1024
# Telling the source of each write would double the messages; waiting for the whole window would stop it each time.
_CREDIT_BYTES = WINDOW_BYTES // 4


class TunnelEvent(msgspec.Struct, frozen=True, gc=False):
    """Base of the events and of the commands, except messages."""


# --- events ---------------------------------------------------------------------------------------------------------


class TunnelWanted(TunnelEvent, frozen=True):
    """A process wants what lies on another node; `asker` comes back with MakeEnd or RefuseAsker."""

    asker: int
    node_id: str
    kind: str
    name: str


class TunnelMessageArrived(TunnelEvent, frozen=True):
    """From another node."""

    node_id: str
    message: t.TunnelMessage


class EndOpened(TunnelEvent, frozen=True):
    """OpenEnd succeeded; of a pipe there is only one way."""

    tunnel: str
    is_readable: bool
    is_writable: bool


class EndRefused(TunnelEvent, frozen=True):
    """OpenEnd failed."""

    tunnel: str
    error_number: int
    text: str


class BytesRead(TunnelEvent, frozen=True):
    """At the end of this node; no more than `credit_of` the tunnel."""

    tunnel: str
    data: bytes


class BytesEnded(TunnelEvent, frozen=True):
    """There is nothing more to read at the end of this node, for good."""

    tunnel: str


class BytesWritten(TunnelEvent, frozen=True):
    """To the end of this node."""

    tunnel: str
    size_bytes: int


class ReaderGone(TunnelEvent, frozen=True):
    """Nobody reads what is written to the end of this node."""

    tunnel: str


class NodeGone(TunnelEvent, frozen=True):
    """Another node is gone, or cannot be reached."""

    node_id: str


class TunnelJobOver(TunnelEvent, frozen=True):
    """The job is over here."""

    job_id: str


# --- commands -------------------------------------------------------------------------------------------------------


class MakeEnd(TunnelEvent, frozen=True):
    """The tunnel is open: make a pair of sockets, give one to the asker, keep the other as the end."""

    tunnel: str
    asker: int


class RefuseAsker(TunnelEvent, frozen=True):
    """There will be no tunnel."""

    asker: int
    error_number: int
    text: str


class OpenEnd(TunnelEvent, frozen=True):
    """Take the parked descriptor, or connect to the listener; answer EndOpened or EndRefused."""

    tunnel: str
    kind: str
    name: str


class StartReading(TunnelEvent, frozen=True):
    """There is credit: read at the end."""

    tunnel: str


class PauseReading(TunnelEvent, frozen=True):
    """There is no credit: do not read until StartReading."""

    tunnel: str


class WriteEnd(TunnelEvent, frozen=True):
    """Write behind what waits already."""

    tunnel: str
    data: bytes


class FinishWriting(TunnelEvent, frozen=True):
    """Once all is written, shut the end down for writing: its reader shall see the end. Reading at it goes on."""

    tunnel: str


class RefuseBytes(TunnelEvent, frozen=True):
    """Never read again, and let whoever writes to the end know; writing to it goes on."""

    tunnel: str


class CloseEnd(TunnelEvent, frozen=True):
    """Close the end once all is written."""

    tunnel: str


class _Tunnel:
    """One tunnel, as one of its two nodes sees it."""

    __slots__ = ("asker", "credit_bytes", "is_open", "is_sending", "is_taking", "job_id", "node_id", "owed_bytes",
                 "unwritten_bytes")  # fmt: skip

    def __init__(self, node_id: str, name: str, asker: int) -> None:
        self.node_id = node_id  # the other one
        self.job_id = name.replace(".", "-").partition("-")[0]  # of a parked descriptor `job-n`, a listener `job.x`
        self.asker = asker  # of whoever opened it here; -1 at the other node
        self.is_open = False
        self.is_sending = True  # bytes may go from here
        self.is_taking = True  # bytes may come
        self.credit_bytes = WINDOW_BYTES
        # Invariant: unwritten_bytes + owed_bytes + the other side's credit + what is on its way <= WINDOW_BYTES.
        self.unwritten_bytes = 0  # handed to the end, not reported as written
        self.owed_bytes = 0  # written, not credited yet


Commands = list[Any]


class Tunnels:
    """All tunnels of one node."""

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id
        self._tunnels: dict[str, _Tunnel] = {}
        self._numbers = itertools.count(1)
        self._handlers: dict[type, Callable[[Any], Commands]] = {
            TunnelWanted: self._wanted,
            TunnelMessageArrived: self._message_arrived,
            EndOpened: self._end_opened,
            EndRefused: self._end_refused,
            BytesRead: self._bytes_read,
            BytesEnded: self._bytes_ended,
            BytesWritten: self._bytes_written,
            ReaderGone: self._reader_gone,
            NodeGone: self._node_gone,
            TunnelJobOver: self._job_over,
        }
        self._message_handlers: dict[type, Callable[[str, _Tunnel, Any], Commands]] = {
            t.TunnelOpened: self._opened,
            t.TunnelRefused: self._refused,
            t.TunnelData: self._data,
            t.TunnelCredit: self._credit,
            t.TunnelEnd: lambda tunnel, state, _: self._stop_taking(tunnel, state),
            t.TunnelStop: lambda tunnel, state, _: self._stop_sending(tunnel, state),
        }

    def __len__(self) -> int:
        return len(self._tunnels)

    def handle(self, event: TunnelEvent, _now_s: float) -> Commands:
        """Take note of an event; what to do about it, in order. Events of a tunnel that is forgotten do nothing."""
        return self._handlers[type(event)](event)

    def credit_of(self, tunnel: str) -> int:
        """How many bytes may be read at the end now."""
        state = self._tunnels.get(tunnel)
        return state.credit_bytes if state is not None and state.is_open and state.is_sending else 0

    # --- opening

    def _wanted(self, event: TunnelWanted) -> Commands:
        tunnel = f"{self._node_id}-{next(self._numbers)}"
        self._tunnels[tunnel] = _Tunnel(event.node_id, event.name, event.asker)
        return [_send(event.node_id, t.OpenTunnel(tunnel, event.kind, event.name))]

    def _message_arrived(self, event: TunnelMessageArrived) -> Commands:
        message = event.message
        if isinstance(message, t.OpenTunnel):
            # The other node names it: nobody may take the names of another, ours for instance.
            if message.tunnel in self._tunnels or not message.tunnel.startswith(f"{event.node_id}-"):
                return []
            self._tunnels[message.tunnel] = _Tunnel(event.node_id, message.name, -1)
            return [OpenEnd(message.tunnel, message.kind, message.name)]
        state = self._tunnels.get(message.tunnel)
        if state is None or state.node_id != event.node_id:
            if isinstance(message, t.TunnelOpened):  # its job was over here before
                return [_send(event.node_id, t.TunnelEnd(message.tunnel)),
                        _send(event.node_id, t.TunnelStop(message.tunnel))]  # fmt: skip
            return []
        return self._message_handlers[type(message)](message.tunnel, state, message)

    def _end_opened(self, event: EndOpened) -> Commands:
        state = self._tunnels.get(event.tunnel)
        if state is None:
            return [CloseEnd(event.tunnel)]
        state.is_open = True
        commands: Commands = [_send(state.node_id, t.TunnelOpened(event.tunnel))]
        if event.is_readable:
            commands.append(StartReading(event.tunnel))
        else:
            commands += self._bytes_ended(BytesEnded(event.tunnel))
        if not event.is_writable:
            commands += self._reader_gone(ReaderGone(event.tunnel))
        return commands

    def _end_refused(self, event: EndRefused) -> Commands:
        state = self._tunnels.pop(event.tunnel, None)
        if state is None:
            return []
        return [_send(state.node_id, t.TunnelRefused(event.tunnel, event.error_number, event.text))]

    def _opened(self, tunnel: str, state: _Tunnel, _message: t.TunnelOpened) -> Commands:
        if state.is_open:
            return []
        state.is_open = True
        return [MakeEnd(tunnel, state.asker), StartReading(tunnel)]

    def _refused(self, tunnel: str, state: _Tunnel, message: t.TunnelRefused) -> Commands:
        if state.is_open:
            return []
        del self._tunnels[tunnel]
        return [RefuseAsker(state.asker, message.error_number, message.text)]

    # --- bytes

    def _bytes_read(self, event: BytesRead) -> Commands:
        state = self._tunnels.get(event.tunnel)
        if state is None or not state.is_sending:
            return []
        assert len(event.data) <= state.credit_bytes, "the shell read more than there was credit for"
        state.credit_bytes -= len(event.data)
        commands: Commands = [_send(state.node_id, t.TunnelData(event.tunnel, event.data))]
        if not state.credit_bytes:
            commands.append(PauseReading(event.tunnel))
        return commands

    def _data(self, tunnel: str, state: _Tunnel, message: t.TunnelData) -> Commands:
        if not state.is_taking:  # it had not heard of our stop
            return []
        state.unwritten_bytes += len(message.data)
        if not state.is_open or state.unwritten_bytes + state.owed_bytes > WINDOW_BYTES:
            # No node of ours does that, and memory is not its to fill.
            return self._both_closed(tunnel, state)
        return [WriteEnd(tunnel, message.data)]

    def _bytes_written(self, event: BytesWritten) -> Commands:
        state = self._tunnels.get(event.tunnel)
        if state is None or not state.is_taking:
            return []
        state.unwritten_bytes -= event.size_bytes
        state.owed_bytes += event.size_bytes
        if state.owed_bytes < _CREDIT_BYTES:
            return []
        owed_bytes, state.owed_bytes = state.owed_bytes, 0
        return [_send(state.node_id, t.TunnelCredit(event.tunnel, owed_bytes))]

    def _credit(self, tunnel: str, state: _Tunnel, message: t.TunnelCredit) -> Commands:
        was_paused = not state.credit_bytes
        state.credit_bytes = min(WINDOW_BYTES, state.credit_bytes + max(0, message.size_bytes))
        return [StartReading(tunnel)] if was_paused and state.credit_bytes and state.is_sending else []

    # --- ends

    def _bytes_ended(self, event: BytesEnded) -> Commands:
        state = self._tunnels.get(event.tunnel)
        if state is None or not state.is_sending:
            return []
        state.is_sending = False
        commands: Commands = [PauseReading(event.tunnel), _send(state.node_id, t.TunnelEnd(event.tunnel))]
        return commands + self._maybe_forget(event.tunnel, state)

    def _reader_gone(self, event: ReaderGone) -> Commands:
        state = self._tunnels.get(event.tunnel)
        if state is None or not state.is_taking:
            return []
        state.is_taking = False
        commands: Commands = [_send(state.node_id, t.TunnelStop(event.tunnel))]
        return commands + self._maybe_forget(event.tunnel, state)

    def _stop_taking(self, tunnel: str, state: _Tunnel) -> Commands:
        if not state.is_taking:
            return []
        state.is_taking = False
        return self._maybe_forget(tunnel, state) or [FinishWriting(tunnel)]

    def _stop_sending(self, tunnel: str, state: _Tunnel) -> Commands:
        if not state.is_sending:
            return []
        state.is_sending = False
        return self._maybe_forget(tunnel, state) or [RefuseBytes(tunnel)]

    def _maybe_forget(self, tunnel: str, state: _Tunnel) -> Commands:
        if state.is_sending or state.is_taking:
            return []
        del self._tunnels[tunnel]
        return [CloseEnd(tunnel)]

    def _both_closed(self, tunnel: str, state: _Tunnel) -> Commands:
        """End it from this side."""
        del self._tunnels[tunnel]
        commands: Commands = [_send(state.node_id, t.TunnelEnd(tunnel)), _send(state.node_id, t.TunnelStop(tunnel))]
        return [*commands, CloseEnd(tunnel)] if state.is_open else commands

    def _node_gone(self, event: NodeGone) -> Commands:
        commands: Commands = []
        for tunnel, state in list(self._tunnels.items()):
            if state.node_id != event.node_id:
                continue
            del self._tunnels[tunnel]
            if state.is_open:
                commands.append(CloseEnd(tunnel))
            elif state.asker >= 0:
                commands.append(RefuseAsker(state.asker, errno.ECONNRESET, f"the node {event.node_id} is gone"))
        return commands

    def _job_over(self, event: TunnelJobOver) -> Commands:
        commands: Commands = []
        for tunnel, state in list(self._tunnels.items()):
            if state.job_id == event.job_id:
                if not state.is_open and state.asker >= 0:
                    commands.append(RefuseAsker(state.asker, errno.ECONNRESET, f"the job {event.job_id} has ended"))
                commands += self._both_closed(tunnel, state)
        return commands


def _send(node_id: str, message: t.TunnelMessage) -> Send:
    return Send(Address(node_id, node_id), message)
