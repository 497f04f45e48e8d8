"""What two nodes say to move an object, and the events and commands of the two machines that say it.

    puller                                   server
      | -- OpenTransfer ------------------------> |  pins the object, from disk if need be
      | <- TransferOpened (size) ---------------- |
      | -- SendChunk x 8 -----------------------> |
      | <- ChunkData, SendChunk, ChunkData ... -> |
      | -- CloseTransfer -----------------------> |  unpins it

`TransferRefused` may answer any of them. A transfer's number is the puller's own; with the puller's node it
names one attempt at one source, so that whatever arrives late from an earlier attempt is known for what it
is.
"""

from __future__ import annotations

import msgspec

from clusterpool.core.messages import Message, SizeBytes

# --- on the wire, node to node ----------------------------------------------------------------------------


class OpenTransfer(Message, frozen=True):
    """Hold this object ready for me."""

    transfer: int
    object_id: str


class TransferOpened(Message, frozen=True):
    """It is ready, and so large."""

    transfer: int
    size_bytes: SizeBytes


class TransferRefused(Message, frozen=True):
    """No. `is_gone`: I have no copy, so do not ask me again; else another try may work."""

    transfer: int
    is_gone: bool
    text: str


class SendChunk(Message, frozen=True):
    """Send me these bytes."""

    transfer: int
    offset: SizeBytes
    size_bytes: SizeBytes


class ChunkData(Message, frozen=True):
    """Here they are."""

    transfer: int
    offset: SizeBytes
    chunk: bytes


class CloseTransfer(Message, frozen=True):
    """I need no more of it, whether I have all of it or not."""

    transfer: int


class TransferEvent(msgspec.Struct, frozen=True, gc=False):
    """Base of what may happen to transfers."""


class TransferCommand(msgspec.Struct, frozen=True, gc=False):
    """Base of what the transfers want their node to do, in the order given."""


# --- events of both machines ------------------------------------------------------------------------------


class PeerSpoke(TransferEvent, frozen=True):
    """One of the wire messages above came from a node."""

    node_id: str
    message: Message


class PeerLost(TransferEvent, frozen=True):
    """A node is dead, or cannot be reached."""

    node_id: str


class TimePassed(TransferEvent, frozen=True):
    """A tick of the clock."""


# --- events of TransferTable ------------------------------------------------------------------------------


class PullRequested(TransferEvent, frozen=True):
    """`requester` wants a copy here; who asks twice is told once. `size_bytes` 0: not known."""

    requester: str
    object_id: str
    node_ids: list[str]
    size_bytes: int = 0


class PullCancelled(TransferEvent, frozen=True):
    """`requester` no longer wants this copy."""

    requester: str
    object_id: str


class RoomGranted(TransferEvent, frozen=True):
    """The store gave the room that AllocateForPull asked for."""

    object_id: str
    offset: int


class RoomRefused(TransferEvent, frozen=True):
    """The store gave no room; `kind` and `text` are the store's."""

    object_id: str
    kind: str
    text: str


class FoundHere(TransferEvent, frozen=True):
    """The store has the object already, or somebody else is writing it: no room was needed."""

    object_id: str


# --- events of ServingTable -------------------------------------------------------------------------------


class ServingPinned(TransferEvent, frozen=True):
    """The store did what PinForServing asked."""

    serving: int
    object_id: str
    offset: int
    size_bytes: int


class ServingRefused(TransferEvent, frozen=True):
    """The store has no copy (`is_gone`), or no room to bring it back from disk."""

    serving: int
    is_gone: bool
    text: str


# --- commands of both machines ----------------------------------------------------------------------------


class SendToNode(TransferCommand, frozen=True):
    """Send one of the wire messages above."""

    node_id: str
    message: Message


# --- commands of TransferTable ----------------------------------------------------------------------------


class AllocateForPull(TransferCommand, frozen=True):
    """Ask the store for room for a secondary copy; answer RoomGranted, RoomRefused or FoundHere."""

    object_id: str
    size_bytes: int


class WriteChunk(TransferCommand, frozen=True):
    """Copy these bytes into the arena, now: the room may be given away by a later command."""

    object_id: str
    arena_offset: int
    chunk: bytes


class SealPull(TransferCommand, frozen=True):
    """Tell the store that the copy is complete."""

    object_id: str


class AbortPull(TransferCommand, frozen=True):
    """Give the room back, or stop waiting for it."""

    object_id: str


class ReportPulled(TransferCommand, frozen=True):
    """The copy is here, or about to be sealed: pin it for the requesters now, a pin waits for the seal."""

    object_id: str
    requesters: list[str]


class ReportPullFailed(TransferCommand, frozen=True):
    """Tell the requesters that there is no copy; `kind` is the store's refusal, or `lost`.

    `gone`: the sources that said so. `dead`: those that are taken for dead; the others did not answer.
    """

    object_id: str
    requesters: list[str]
    kind: str
    text: str
    gone: list[str] = []
    dead: list[str] = []


# --- commands of ServingTable -----------------------------------------------------------------------------


class PinForServing(TransferCommand, frozen=True):
    """Ask the store for a pin; answer ServingPinned or ServingRefused."""

    serving: int
    object_id: str


class UnpinForServing(TransferCommand, frozen=True):
    """Give one such pin back."""

    object_id: str


class ReadChunk(TransferCommand, frozen=True):
    """Send ChunkData(transfer, offset, <size_bytes of the arena at arena_offset>) to the node, now."""

    node_id: str
    transfer: int
    offset: int
    arena_offset: int
    size_bytes: int
