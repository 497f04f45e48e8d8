"""Which objects are in one node's arena or on its disk, who uses them, and who waits for room.

    create --> QUEUED --room--> CREATING --seal--> SEALED <------------------+
                                                    |   \\ spill              | done
                                                    |    +--> SPILLING -----+     SEALED and on disk
                                        drop memory |
                                                    v        pin            room             done
                                                 SPILLED --------> RECALLED -----> RESTORING -----> SEALED

Room is given first come, first served: a request that does not fit holds up those behind it, which is the
back-pressure that slows producers down. While it waits, copies that can be had again are dropped, least
recently used first, then primary copies are spilled. What is pinned never moves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from clusterpool.core.allocator import PAGE_BYTES, Allocator
from clusterpool.core.store_messages import (
    ArenaExhausted,
    ClientGone,
    CopyPromoted,
    DeleteSpilled,
    FileUnreadable,
    GrantCreate,
    GrantPin,
    ObjectAborted,
    ObjectCreateRequested,
    ObjectFreed,
    ObjectRestored,
    ObjectSealed,
    ObjectSpilled,
    PinRequested,
    Refusal,
    RefuseCreate,
    RefusePin,
    ReplyAlreadyExists,
    ReplyMissing,
    ReportGone,
    RestoreFailed,
    RestoreObject,
    SpillFailed,
    SpillObject,
    StoreCommand,
    StoreEvent,
    Tick,
    Unpinned,
)
from clusterpool.core.store_objects import LeastRecentlyUsed, State, StoredObject, StoreStats, refusal_text

# How long a producer is held back before it is told that the store is full. Shorter fails programs whose
# consumers are merely slow; longer looks like a hang.
CREATE_WAIT_S = 60.0
# How long a full disk may stay full: long enough for freed objects' files to go, short enough to read as an
# error.
DISK_WAIT_S = 5.0
# After a failed spill the disk is left alone for so long; each try writes a whole object.
DISK_RETRY_S = 1.0
# The file system of the arena may be full because of others (a program's own shared memory), who go again: after so
# long the store tries to have its whole size. That costs one reservation that fails; longer leaves it small for longer.
REGROW_S = 10.0
# Above this part of the store held by readers, new readers are asked to copy: below, zero copy costs nobody
# anything; above, a program that keeps its results would starve its own producers.
SCARCE_FRACTION = 0.5


class StoreIndex:
    """One node's store. `handle` is the only way in; commands come back in the order to carry them out.

    Messages of an owner or a client that come too late (a seal after an abort, a second free) change nothing.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        create_wait_s: float = CREATE_WAIT_S,
        disk_wait_s: float = DISK_WAIT_S,
        disk_retry_s: float = DISK_RETRY_S,
        reads_files: Callable[[str], bool] = lambda client: True,
    ) -> None:
        """`reads_files`: whether a client whose pin is refused reads the object's file itself."""
        self.allocator = Allocator(capacity_bytes)
        self.create_wait_s = create_wait_s
        self.disk_wait_s = disk_wait_s
        self.disk_retry_s = disk_retry_s
        self._reads_files = reads_files
        self.objects: dict[str, StoredObject] = {}
        self.queue: OrderedDict[str, None] = OrderedDict()  # QUEUED and RECALLED objects, first come first
        self.pins_by_client: dict[str, dict[str, int]] = {}
        # Invariant: SEALED objects that nobody pins or waits for are in exactly one of the two.
        self.droppable = LeastRecentlyUsed()  # a copy exists elsewhere, or on this node's disk
        self.spillable = LeastRecentlyUsed()  # the only copy
        self.pinned_bytes = 0
        self.spilling_bytes = 0
        self.spilled_bytes = 0
        self.usable_bytes = capacity_bytes  # of the arena's file, as far as is known
        self._promised_bytes = self.allocator.capacity_bytes
        self._shrunk_s: float | None = None  # when the file system was full last; None: we have the whole arena
        self._disk_failed_s: float | None = None  # since when no spill has succeeded
        self._disk_text = ""
        self._disk_retry_at_s = 0.0
        self._commands: list[StoreCommand] = []
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            ObjectCreateRequested: self._on_create_requested,
            ObjectSealed: self._on_sealed,
            ObjectAborted: self._on_aborted,
            PinRequested: self._on_pin_requested,
            Unpinned: self._on_unpinned,
            ClientGone: self._on_client_gone,
            ObjectFreed: self._on_freed,
            CopyPromoted: self._on_promoted,
            ObjectSpilled: self._on_spilled,
            SpillFailed: self._on_spill_failed,
            ObjectRestored: self._on_restored,
            RestoreFailed: self._on_restore_failed,
            FileUnreadable: self._on_file_unreadable,
            ArenaExhausted: self._on_arena_exhausted,
            Tick: self._on_tick,
        }

    def handle(self, event: StoreEvent, now_s: float) -> list[StoreCommand]:
        """Take in one event at `now_s` (monotonic seconds); say what to do."""
        self._handlers[type(event)](event, now_s)
        self._admit(now_s)
        commands, self._commands = self._commands, []
        return commands

    def stats(self) -> StoreStats:
        """The figures of this moment."""
        return StoreStats(
            capacity_bytes=self.allocator.capacity_bytes,
            used_bytes=self.allocator.used_bytes,
            pinned_bytes=self.pinned_bytes,
            spilled_bytes=self.spilled_bytes,
            queued_count=len(self.queue),
            missing_bytes=self._promised_bytes - self.allocator.capacity_bytes,
        )

    # --- clients -------------------------------------------------------------------------------------------

    def _on_create_requested(self, event: ObjectCreateRequested, now_s: float) -> None:
        if event.object_id in self.objects:
            self._do(ReplyAlreadyExists(event.client, event.request, event.object_id))
            return
        item = StoredObject(
            event.object_id, event.size_bytes, event.is_primary, State.QUEUED, event.client, event.request, event.owner
        )
        if item.room_bytes > self.allocator.capacity_bytes:
            text = refusal_text(item, Refusal.TOO_LARGE, self.stats(), now_s, "")
            self._do(RefuseCreate(event.client, event.request, event.object_id, Refusal.TOO_LARGE, text))
            return
        self.objects[item.object_id] = item
        self._enqueue(item, event.wait_max_s, now_s)

    def _on_sealed(self, event: ObjectSealed, now_s: float) -> None:
        item = self.objects.get(event.object_id)
        if item is not None and item.state is State.CREATING and item.creator == event.client:
            item.state = State.SEALED
            self._serve_waiters(item)
            self._settle(item)

    def _on_aborted(self, event: ObjectAborted, now_s: float) -> None:
        item = self.objects.get(event.object_id)
        if item is not None and item.creator == event.client and item.state in (State.QUEUED, State.CREATING):
            self._disappoint_waiters(item, "its creator gave up before it was complete")
            self._remove(item)

    def _on_pin_requested(self, event: PinRequested, now_s: float) -> None:
        item = self.objects.get(event.object_id)
        if item is None or item.is_freed:
            text = "this node has no copy of it" if item is None else "its owner has let it go"
            self._do(ReplyMissing(event.client, event.request, event.object_id, text))
            return
        item.waiters.append((event.client, event.request))
        if item.state in (State.SEALED, State.SPILLING):
            self._serve_waiters(item)
            self._settle(item)
        elif item.state is State.SPILLED:
            item.state = State.RECALLED
            self._enqueue(item, event.wait_max_s, now_s)

    def _on_unpinned(self, event: Unpinned, now_s: float) -> None:
        for object_id in event.object_ids:
            self._unpin(event.client, object_id, 1)

    def _on_client_gone(self, event: ClientGone, now_s: float) -> None:
        for object_id, count in list(self.pins_by_client.get(event.client, {}).items()):
            self._unpin(event.client, object_id, count)
        for item in list(self.objects.values()):
            if item.waiters:
                item.waiters = [waiter for waiter in item.waiters if waiter[0] != event.client]
                if item.state is State.RECALLED and not item.waiters:
                    del self.queue[item.object_id]
                    item.state = State.SPILLED
            self._on_aborted(ObjectAborted(event.client, item.object_id), now_s)

    def _on_freed(self, event: ObjectFreed, now_s: float) -> None:
        item = self.objects.get(event.object_id)
        if item is None or item.is_freed:
            return
        item.is_freed = True
        self._disappoint_waiters(item, "its owner has let it go")
        if item.state is State.QUEUED:
            text = f"object {item.object_id} was let go by its owner before there was room for it"
            self._do(RefuseCreate(item.creator, item.request, item.object_id, Refusal.FREED, text))
            self._remove(item)
        elif item.state in (State.SPILLED, State.RECALLED):
            self._remove(item)
        else:
            self._settle(item)

    def _on_promoted(self, event: CopyPromoted, now_s: float) -> None:
        item = self.objects.get(event.object_id)
        if item is not None:
            item.is_primary = True
            self._settle(item)

    # --- the disk, the arena, the clock --------------------------------------------------------------------

    def _on_spilled(self, event: ObjectSpilled, now_s: float) -> None:
        item = self.objects[event.object_id]
        self._end_spill(item)
        item.is_on_disk = True
        self.spilled_bytes += item.size_bytes
        self._disk_failed_s = None
        self._settle(item)
        if item.object_id in self.droppable.room_by_id:  # it was the least recently used, and still is
            self.droppable.room_by_id.move_to_end(item.object_id, last=False)

    def _on_spill_failed(self, event: SpillFailed, now_s: float) -> None:
        item = self.objects[event.object_id]
        self._end_spill(item)
        if self._disk_failed_s is None:
            self._disk_failed_s = now_s
        self._disk_text = event.text
        self._disk_retry_at_s = now_s + self.disk_retry_s
        self._settle(item)
        if item.object_id in self.spillable.room_by_id:
            self.spillable.room_by_id.move_to_end(item.object_id, last=False)

    def _on_restored(self, event: ObjectRestored, now_s: float) -> None:
        item = self.objects[event.object_id]
        assert item.state is State.RESTORING, f"{item.object_id} was restored while {item.state}"
        item.state = State.SEALED
        self._serve_waiters(item)
        self._settle(item)

    def _on_restore_failed(self, event: RestoreFailed, now_s: float) -> None:
        item = self.objects[event.object_id]
        assert item.state is State.RESTORING, f"{item.object_id} failed to restore while {item.state}"
        self._lose(item, event.text)

    def _on_file_unreadable(self, event: FileUnreadable, now_s: float) -> None:
        item = self.objects.get(event.object_id)
        if item is None or not item.is_on_disk:
            return
        if item.state in (State.SPILLED, State.RECALLED):
            self._lose(item, event.text)
        elif item.state is State.SEALED:  # it is back, and was whole then; it is spilled anew if need be
            self._delete_file(item)
            item.is_on_disk = False
            self._settle(item)
        # Else it is being restored just now: the disk itself will say whether it can be read.

    def _lose(self, item: StoredObject, why: str) -> None:
        text = f"its spilled file could not be read: {why}"
        self._disappoint_waiters(item, text)
        if not item.is_freed:
            self._do(ReportGone(item.object_id, item.owner, text))
        self._remove(item)

    def _on_arena_exhausted(self, event: ArenaExhausted, now_s: float) -> None:
        item = self.objects.get(event.object_id)
        usable_bytes = event.usable_bytes
        if item is not None and item.state in (State.CREATING, State.RESTORING):
            # Whatever the shell says is usable, this block was not: granting it again would never end.
            usable_bytes = min(usable_bytes, item.offset + item.room_bytes - PAGE_BYTES)
            self.allocator.free(item.offset)
            item.offset = -1
            item.state = State.QUEUED if item.state is State.CREATING else State.RECALLED
            self.queue[item.object_id] = None
            self.queue.move_to_end(item.object_id, last=False)
        self.usable_bytes = min(self.usable_bytes, usable_bytes)
        self.allocator.shrink(usable_bytes)
        self._shrunk_s = now_s
        for object_id in list(self.queue):
            if self.objects[object_id].room_bytes > self.allocator.capacity_bytes:
                self._refuse_queued(self.objects[object_id], Refusal.TOO_LARGE, now_s)

    def _on_tick(self, event: Tick, now_s: float) -> None:
        if self._shrunk_s is not None and now_s - self._shrunk_s >= REGROW_S:
            self._shrunk_s = None
            self.allocator.grow(self._promised_bytes)
            self.usable_bytes = self._promised_bytes
        for object_id in [name for name in self.queue if self.objects[name].deadline_s <= now_s]:
            self._refuse_queued(self.objects[object_id], Refusal.STORE_FULL, now_s)
        if self._disk_failed_s is not None and not self.spilling_bytes:
            # What is on the full disk is read from there: its reader may be the one who makes room.
            recalled = [item for item in map(self.objects.__getitem__, self.queue) if item.state is State.RECALLED]
            for item in recalled:
                if all(self._reads_files(client) for client, _ in item.waiters):
                    self._refuse_queued(item, Refusal.DISK_FULL, now_s)
        head = self._head()
        if head is None or self._disk_failed_s is None or not self.spillable.room_by_id:
            return
        if now_s - max(self._disk_failed_s, head.queued_s) >= self.disk_wait_s and not self.spilling_bytes:
            self._refuse_queued(head, Refusal.DISK_FULL, now_s)

    # --- room ----------------------------------------------------------------------------------------------

    def _admit(self, now_s: float) -> None:
        while (item := self._head()) is not None:
            offset = self.allocator.allocate(item.size_bytes)
            if offset is not None and offset + item.room_bytes > self.usable_bytes:
                # No pages are behind it. The allocator still has it only for another block beyond, granted in the same
                # breath, which is about to be reported as well; granting this one again meanwhile would never end.
                self.allocator.free(offset)
                return
            if offset is not None:
                self._grant(item, offset)
            elif not self._drop_one(item, now_s):
                self._spill_for(item, now_s)
                return

    def _grant(self, item: StoredObject, offset: int) -> None:
        del self.queue[item.object_id]
        item.offset = offset
        if item.state is State.QUEUED:
            item.state = State.CREATING
            self._do(GrantCreate(item.creator, item.request, item.object_id, offset, item.size_bytes))
        else:
            item.state = State.RESTORING
            self._do(RestoreObject(item.object_id, offset, item.size_bytes))

    def _drop_one(self, item: StoredObject, now_s: float) -> bool:
        # Nothing is dropped for a request that would not fit even then: those copies may still be wanted.
        within_reach = self.allocator.free_bytes + self.droppable.total_bytes + self.spilling_bytes
        if now_s >= self._disk_retry_at_s:
            within_reach += self.spillable.total_bytes
        victim_id = self.droppable.first()
        if victim_id is None or within_reach < item.room_bytes:
            return False
        victim = self.objects[victim_id]
        if victim.is_on_disk:
            self._free_room(victim)
            victim.state = State.SPILLED
        else:
            self._do(ReportGone(victim_id, victim.owner, "it was evicted, because the room was needed"))
            self._remove(victim)
        return True

    def _spill_for(self, item: StoredObject, now_s: float) -> None:
        within_reach = self.allocator.free_bytes + self.spilling_bytes + self.spillable.total_bytes
        if now_s < self._disk_retry_at_s or within_reach < item.room_bytes:
            return
        # At least one byte: enough may be free in pieces that are too small, and then each spill joins some.
        wanted_bytes = max(item.room_bytes - self.allocator.free_bytes, 1)
        while self.spilling_bytes < wanted_bytes and (victim_id := self.spillable.first()) is not None:
            victim = self.objects[victim_id]
            self.spillable.discard(victim_id)
            victim.state = State.SPILLING
            self.spilling_bytes += victim.room_bytes
            self._do(SpillObject(victim_id, victim.offset, victim.size_bytes))

    def _end_spill(self, item: StoredObject) -> None:
        assert item.state is State.SPILLING, f"a spill of {item.object_id} ended while {item.state}"
        item.state = State.SEALED
        self.spilling_bytes -= item.room_bytes

    def _head(self) -> StoredObject | None:
        object_id = next(iter(self.queue), None)
        return None if object_id is None else self.objects[object_id]

    def _enqueue(self, item: StoredObject, wait_max_s: float | None, now_s: float) -> None:
        item.queued_s = now_s
        item.deadline_s = now_s + (self.create_wait_s if wait_max_s is None else wait_max_s)
        self.queue[item.object_id] = None

    def _refuse_queued(self, item: StoredObject, kind: Refusal, now_s: float) -> None:
        text = refusal_text(item, kind, self.stats(), now_s, self._disk_text)
        if item.state is State.QUEUED:
            self._do(RefuseCreate(item.creator, item.request, item.object_id, kind, text))
            self._disappoint_waiters(item, text)
            self._remove(item)
            return
        for client, request in item.waiters:
            self._do(RefusePin(client, request, item.object_id, kind, text))
        item.waiters.clear()
        del self.queue[item.object_id]
        item.state = State.SPILLED

    # --- one object ----------------------------------------------------------------------------------------

    def _serve_waiters(self, item: StoredObject) -> None:
        for client, request in item.waiters:
            pins = self.pins_by_client.setdefault(client, {})
            pins[item.object_id] = pins.get(item.object_id, 0) + 1
            item.pin_count += 1
            if item.pin_count == 1:
                self.pinned_bytes += item.room_bytes
            is_scarce = self.pinned_bytes > SCARCE_FRACTION * self.allocator.capacity_bytes
            self._do(GrantPin(client, request, item.object_id, item.offset, item.size_bytes, is_scarce))
        item.waiters.clear()

    def _disappoint_waiters(self, item: StoredObject, text: str) -> None:
        for client, request in item.waiters:
            self._do(ReplyMissing(client, request, item.object_id, text))
        item.waiters.clear()

    def _unpin(self, client: str, object_id: str, count: int) -> None:
        pins = self.pins_by_client.get(client, {})
        held = pins.get(object_id, 0)
        count = min(count, held)
        if count == 0:
            return
        if count == held:
            del pins[object_id]
        else:
            pins[object_id] = held - count
        if not pins:
            del self.pins_by_client[client]
        item = self.objects[object_id]
        item.pin_count -= count
        if item.pin_count == 0:
            self.pinned_bytes -= item.room_bytes
            self._settle(item)

    def _settle(self, item: StoredObject) -> None:
        """Put the object where its state belongs: kept, droppable, spillable, or away with it."""
        self.droppable.discard(item.object_id)
        self.spillable.discard(item.object_id)
        if item.state is not State.SEALED or item.pin_count or item.waiters:
            return
        if item.is_freed:
            self._remove(item)
        elif item.is_on_disk or not item.is_primary:
            self.droppable.add(item)
        else:
            self.spillable.add(item)

    def _free_room(self, item: StoredObject) -> None:
        assert item.pin_count == 0, f"{item.object_id} would be moved away under its readers"
        self.droppable.discard(item.object_id)
        self.spillable.discard(item.object_id)
        if item.offset >= 0:
            self.allocator.free(item.offset)
            item.offset = -1

    def _remove(self, item: StoredObject) -> None:
        self._free_room(item)
        self.queue.pop(item.object_id, None)
        del self.objects[item.object_id]
        if item.is_on_disk:
            self._delete_file(item)

    def _delete_file(self, item: StoredObject) -> None:
        self.spilled_bytes -= item.size_bytes
        self._do(DeleteSpilled(item.object_id))

    def _do(self, command: StoreCommand) -> None:
        self._commands.append(command)
