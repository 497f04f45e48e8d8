"""What the store knows of one object, in which order objects may go, and how it words a refusal."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum

from clusterpool.core.allocator import round_up
from clusterpool.core.store_messages import Refusal
from clusterpool.core.task_messages import Address


class State(Enum):
    """Where an object's bytes are; see the diagram."""

    QUEUED = "queued"  # its creator waits for room
    CREATING = "creating"
    SEALED = "sealed"
    SPILLING = "spilling"
    SPILLED = "spilled"  # on disk only
    RECALLED = "recalled"  # on disk only; readers wait for room
    RESTORING = "restoring"


@dataclass(slots=True)
class StoredObject:
    """One object that the node knows of."""

    object_id: str
    size_bytes: int
    is_primary: bool
    state: State
    creator: str = ""
    request: int = 0
    owner: Address | None = None
    offset: int = -1  # -1: no room in the arena
    pin_count: int = 0
    waiters: list[tuple[str, int]] = field(default_factory=list)  # (client, request) that want it pinned
    is_on_disk: bool = False
    is_freed: bool = False
    queued_s: float = 0.0
    deadline_s: float = 0.0

    @property
    def room_bytes(self) -> int:
        """What it takes in the arena, whole pages."""
        return round_up(max(self.size_bytes, 1))


@dataclass(frozen=True)
class StoreStats:
    """One store's, for `status` and for whoever is refused room. `used_bytes` includes what is being written, in whole
    pages. `missing_bytes`: of its size, what its file system has no room for.
    """

    capacity_bytes: int
    used_bytes: int
    pinned_bytes: int
    spilled_bytes: int
    queued_count: int
    missing_bytes: int = 0


class LeastRecentlyUsed:
    """Objects that may be dropped or spilled, the one to go first in front, and their bytes."""

    def __init__(self) -> None:
        self.room_by_id: OrderedDict[str, int] = OrderedDict()
        self.total_bytes = 0

    def add(self, item: StoredObject) -> None:
        assert item.object_id not in self.room_by_id, f"{item.object_id} is there already"
        self.room_by_id[item.object_id] = item.room_bytes
        self.total_bytes += item.room_bytes

    def discard(self, object_id: str) -> None:
        self.total_bytes -= self.room_by_id.pop(object_id, 0)

    def first(self) -> str | None:
        return next(iter(self.room_by_id), None)


def refusal_text(item: StoredObject, kind: Refusal, stats: StoreStats, now_s: float, disk_text: str) -> str:
    """What the user reads: what happened, the figures, what to do."""
    capacity, used = _mb(stats.capacity_bytes), _mb(stats.used_bytes)
    if kind is Refusal.TOO_LARGE and stats.missing_bytes:
        return (
            f"object {item.object_id} of {_mb(item.size_bytes)} MB is larger than what is left of this node's store, "
            f"{capacity} MB: {_mb(stats.missing_bytes)} MB of it are missing, because the file system of the shared "
            "memory is full (`df /dev/shm`); end or remove what fills it: some seconds later the store has its size "
            "again"
        )
    if kind is Refusal.TOO_LARGE:
        return (
            f"object {item.object_id} of {_mb(item.size_bytes)} MB is larger than this node's whole store of "
            f"{capacity} MB, so it could never be read; split it into parts or give the node a larger store"
        )
    start = (
        f"no room for object {item.object_id} of {_mb(item.size_bytes)} MB within "
        f"{now_s - item.queued_s:.1f} s: {used} of {capacity} MB of the store are in use"
    )
    if kind is Refusal.DISK_FULL:
        return (
            f"{start}, and objects could not be moved to disk ({disk_text}; {_mb(stats.spilled_bytes)} MB "
            "are there); make room on that disk, choose another folder to spill to, or keep fewer results"
        )
    return (
        f"{start}, {_mb(stats.pinned_bytes)} MB of them held by readers, and {stats.queued_count} requests "
        "wait; drop arrays and results that are no longer needed, or give the node a larger store"
    )


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f}"
