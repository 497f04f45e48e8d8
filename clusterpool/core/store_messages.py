"""What happens to one node's object store (events), and what it wants done (commands).

`client` names whoever asks: the id of a process, or a name that the node makes up for one of its own
transfers. `request` is the asker's own number, handed back with the answer. Nothing here crosses the wire by
itself.
"""

from __future__ import annotations

from enum import Enum

import msgspec

from clusterpool.core.task_messages import Address


class Refusal(str, Enum):
    """Why room or a pin was refused."""

    TOO_LARGE = "too_large"  # it could not fit into an empty store
    STORE_FULL = "store_full"  # what lies there stayed in use for the whole wait
    DISK_FULL = "disk_full"  # what lies there could not be written to disk
    FREED = "freed"  # the owner let the object go before there was room for it


class StoreEvent(msgspec.Struct, frozen=True, gc=False):
    """Base of what may happen to the store."""


class StoreCommand(msgspec.Struct, frozen=True, gc=False):
    """Base of what the store wants its node to do, in the order given."""


# --- events: from the clients ----------------------------------------------------------------------------


class ObjectCreateRequested(StoreEvent, frozen=True):
    """A client wants room. `wait_max_s` None: the store's own limit on waiting for it."""

    client: str
    request: int
    object_id: str
    size_bytes: int
    is_primary: bool
    wait_max_s: float | None = None
    owner: Address | None = None  # who keeps account of its copies


class ObjectSealed(StoreEvent, frozen=True):
    """The creator wrote all bytes; they never change again."""

    client: str
    object_id: str


class ObjectAborted(StoreEvent, frozen=True):
    """The creator will not finish, or no longer wants the room that it waits for."""

    client: str
    object_id: str


class PinRequested(StoreEvent, frozen=True):
    """A client wants to read an object that is here, on disk here, or being written here."""

    client: str
    request: int
    object_id: str
    wait_max_s: float | None = None


class Unpinned(StoreEvent, frozen=True):
    """A client reads these no more; one entry takes back one pin."""

    client: str
    object_ids: list[str]


class ClientGone(StoreEvent, frozen=True):
    """The client ended: its pins, unfinished objects and open requests go with it."""

    client: str


class ObjectFreed(StoreEvent, frozen=True):
    """The owner let the object go; nobody will ask for it again."""

    object_id: str


class CopyPromoted(StoreEvent, frozen=True):
    """The other copies are gone: the secondary copy here must be kept from now on."""

    object_id: str


# --- events: from the disk, the arena and the clock ------------------------------------------------------


class ObjectSpilled(StoreEvent, frozen=True):
    """The bytes are safe on disk."""

    object_id: str


class SpillFailed(StoreEvent, frozen=True):
    """The bytes could not be written to disk (full, or broken: `text` says)."""

    object_id: str
    text: str


class ObjectRestored(StoreEvent, frozen=True):
    """The bytes are back in the arena, at the offset that the command named."""

    object_id: str


class RestoreFailed(StoreEvent, frozen=True):
    """The spilled file is gone or damaged; `text` says."""

    object_id: str
    text: str


class FileUnreadable(StoreEvent, frozen=True):
    """A reader was told to read the spilled file itself (RefusePin), and could not; `text` says why."""

    object_id: str
    text: str


class ArenaExhausted(StoreEvent, frozen=True):
    """The file system refused the pages behind a GrantCreate or a RestoreObject, which was not carried out.

    `usable_bytes`: what the arena's file has for certain, from its start.
    """

    object_id: str
    usable_bytes: int


class Tick(StoreEvent, frozen=True):
    """Time passed."""


# --- commands: answers to the clients --------------------------------------------------------------------


class GrantCreate(StoreCommand, frozen=True):
    """The client may write the object at `offset`. Reserve the pages first (see ArenaExhausted)."""

    client: str
    request: int
    object_id: str
    offset: int
    size_bytes: int


class ReplyAlreadyExists(StoreCommand, frozen=True):
    """The object is here or on its way; to pin it works, and waits for the seal if need be."""

    client: str
    request: int
    object_id: str


class RefuseCreate(StoreCommand, frozen=True):
    """There is no room; `text` is what the user reads."""

    client: str
    request: int
    object_id: str
    kind: Refusal
    text: str


class GrantPin(StoreCommand, frozen=True):
    """The object stays at `offset` until the client unpins it.

    `is_scarce`: readers hold so much of the store that this one had better copy the bytes and unpin at once.
    """

    client: str
    request: int
    object_id: str
    offset: int
    size_bytes: int
    is_scarce: bool


class ReplyMissing(StoreCommand, frozen=True):
    """This node has no such object, or lost it; `text` says which."""

    client: str
    request: int
    object_id: str
    text: str


class RefusePin(StoreCommand, frozen=True):
    """The object is on disk and there is no room to bring it back; it is not lost."""

    client: str
    request: int
    object_id: str
    kind: Refusal
    text: str


# --- commands: to the disk and to the owner ---------------------------------------------------------------


class SpillObject(StoreCommand, frozen=True):
    """Write the bytes to disk; answer with ObjectSpilled or SpillFailed."""

    object_id: str
    offset: int
    size_bytes: int


class RestoreObject(StoreCommand, frozen=True):
    """Reserve the pages, read the bytes from disk; answer ObjectRestored, RestoreFailed or ArenaExhausted."""

    object_id: str
    offset: int
    size_bytes: int


class DeleteSpilled(StoreCommand, frozen=True):
    """Remove the file on disk; no answer."""

    object_id: str


class ReportGone(StoreCommand, frozen=True):
    """Tell the object's owner that this node has no copy of it any more (evicted, or lost: `text` says)."""

    object_id: str
    owner: Address | None
    text: str
