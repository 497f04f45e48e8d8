"""Objects of this node that other nodes are copying: pinned while they do, and no longer."""

from __future__ import annotations

from dataclasses import dataclass, field

from clusterpool.core.transfer_messages import (
    CloseTransfer,
    OpenTransfer,
    PeerLost,
    PeerSpoke,
    PinForServing,
    ReadChunk,
    SendChunk,
    SendToNode,
    ServingPinned,
    ServingRefused,
    TimePassed,
    TransferCommand,
    TransferEvent,
    TransferOpened,
    TransferRefused,
    UnpinForServing,
)

# A puller that asks for nothing during so long has forgotten us: its pin must not hold up the store for
# ever. Longer than any wait of a puller between two requests, which it makes one after the other.
IDLE_MAX_S = 60.0
# The most that one request may take from the arena into a message.
CHUNK_BYTES_MAX = 16 << 20


@dataclass(slots=True)
class Serving:
    """One transfer of one puller."""

    number: int
    node_id: str
    transfer: int
    object_id: str
    offset: int = -1  # -1: not pinned yet
    size_bytes: int = 0
    heard_s: float = field(default=0.0)


class ServingTable:
    """The server's half of every transfer out of one node. `handle` is the only way in."""

    def __init__(self) -> None:
        self.serving_by_number: dict[int, Serving] = {}
        self._number_by_transfer: dict[tuple[str, int], int] = {}
        self._last_number = 0

    def handle(self, event: TransferEvent, now_s: float) -> list[TransferCommand]:
        """Take in one event at `now_s` (monotonic seconds); say what to do. Foreign messages are ignored."""
        if isinstance(event, PeerSpoke):
            return self._on_peer_spoke(event, now_s)
        if isinstance(event, ServingPinned):
            return self._on_pinned(event, now_s)
        if isinstance(event, ServingRefused):
            return self._on_refused(event)
        if isinstance(event, PeerLost):
            return self._close_all([one for one in self._all() if one.node_id == event.node_id])
        if isinstance(event, TimePassed):
            # A pin that is still pending is the store's to answer, however long its disk takes.
            idle = [one for one in self._all() if one.offset >= 0 and now_s - one.heard_s >= IDLE_MAX_S]
            return self._close_all(idle)
        raise TypeError(f"not an event of a server of transfers: {event!r}")

    def _on_peer_spoke(self, event: PeerSpoke, now_s: float) -> list[TransferCommand]:
        message = event.message
        if isinstance(message, OpenTransfer):
            return self._open(event.node_id, message, now_s)
        if not isinstance(message, (SendChunk, CloseTransfer)):
            return []
        number = self._number_by_transfer.get((event.node_id, message.transfer))
        serving = None if number is None else self.serving_by_number[number]
        if isinstance(message, CloseTransfer):
            return [] if serving is None else self._close(serving)
        if serving is None or serving.offset < 0:
            text = "the transfer is not open (it may have been idle for too long)"
            return [SendToNode(event.node_id, TransferRefused(message.transfer, False, text))]
        serving.heard_s = now_s
        end = message.offset + message.size_bytes
        if message.offset < 0 or not 0 < message.size_bytes <= CHUNK_BYTES_MAX or end > serving.size_bytes:
            text = f"no such chunk: {message.size_bytes} bytes at {message.offset} of {serving.size_bytes}"
            return [SendToNode(event.node_id, TransferRefused(message.transfer, False, text))]
        arena_offset = serving.offset + message.offset
        return [
            ReadChunk(event.node_id, message.transfer, message.offset, arena_offset, message.size_bytes),
        ]

    def _open(self, node_id: str, message: OpenTransfer, now_s: float) -> list[TransferCommand]:
        if (node_id, message.transfer) in self._number_by_transfer:
            return []  # said twice
        self._last_number += 1
        serving = Serving(self._last_number, node_id, message.transfer, message.object_id, heard_s=now_s)
        self.serving_by_number[serving.number] = serving
        self._number_by_transfer[(node_id, message.transfer)] = serving.number
        return [PinForServing(serving.number, message.object_id)]

    def _on_pinned(self, event: ServingPinned, now_s: float) -> list[TransferCommand]:
        serving = self.serving_by_number.get(event.serving)
        if serving is None:
            return [UnpinForServing(event.object_id)]  # closed while the store was busy
        serving.offset, serving.size_bytes, serving.heard_s = event.offset, event.size_bytes, now_s
        return [SendToNode(serving.node_id, TransferOpened(serving.transfer, event.size_bytes))]

    def _on_refused(self, event: ServingRefused) -> list[TransferCommand]:
        serving = self.serving_by_number.get(event.serving)
        if serving is None:
            return []
        self._close(serving)
        refusal = TransferRefused(serving.transfer, event.is_gone, event.text)
        return [SendToNode(serving.node_id, refusal)]

    def _close_all(self, servings: list[Serving]) -> list[TransferCommand]:
        return [command for serving in servings for command in self._close(serving)]

    def _close(self, serving: Serving) -> list[TransferCommand]:
        del self.serving_by_number[serving.number]
        del self._number_by_transfer[(serving.node_id, serving.transfer)]
        return [] if serving.offset < 0 else [UnpinForServing(serving.object_id)]

    def _all(self) -> list[Serving]:
        return list(self.serving_by_number.values())
