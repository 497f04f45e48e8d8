"""What must hold of a store after every event: for the tests and the simulator."""

from __future__ import annotations

from collections import Counter

from clusterpool.core.store_index import StoreIndex
from clusterpool.core.store_objects import State

IN_ARENA = (State.CREATING, State.SEALED, State.SPILLING, State.RESTORING)
WAITING_FOR_ROOM = (State.QUEUED, State.RECALLED)


def check_store(index: StoreIndex) -> None:
    """Raise AssertionError with the story if the store contradicts itself."""
    index.allocator.check_invariants()
    _check_room(index)
    _check_pins(index)
    _check_order(index)
    _check_queue(index)


def _check_room(index: StoreIndex) -> None:
    for item in index.objects.values():
        assert (item.offset >= 0) == (item.state in IN_ARENA), f"{item} should have room, or should not"
    blocks = sorted((item.offset, item.room_bytes) for item in index.objects.values() if item.offset >= 0)
    assert blocks == index.allocator.used_blocks(), "the arena's blocks are not those of the objects"
    spilled_bytes = sum(item.size_bytes for item in index.objects.values() if item.is_on_disk)
    assert spilled_bytes == index.spilled_bytes, f"{spilled_bytes} are on disk, counted {index.spilled_bytes}"
    spilling = sum(item.room_bytes for item in index.objects.values() if item.state is State.SPILLING)
    assert spilling == index.spilling_bytes, f"{spilling} are being spilled, counted {index.spilling_bytes}"


def _check_pins(index: StoreIndex) -> None:
    counts: Counter[str] = Counter()
    for client, pins in index.pins_by_client.items():
        assert pins, f"{client} is listed without a pin"
        assert min(pins.values()) > 0, f"{client} holds {pins}"
        counts.update(pins)
    for item in index.objects.values():
        assert item.pin_count == counts.pop(item.object_id, 0), f"{item} has other pins than its clients"
        if item.pin_count:
            assert item.state in (State.SEALED, State.SPILLING), f"{item} is pinned without bytes"
        if item.waiters:
            assert item.state not in (State.SEALED, State.SPILLING, State.SPILLED), f"{item} keeps one waiting"
    assert not counts, f"pins on objects that are not here: {counts}"
    pinned = sum(item.room_bytes for item in index.objects.values() if item.pin_count)
    assert pinned == index.pinned_bytes, f"{pinned} are pinned, counted {index.pinned_bytes}"


def _check_order(index: StoreIndex) -> None:
    for item in index.objects.values():
        is_idle = item.state is State.SEALED and not item.pin_count
        is_safe = item.is_on_disk or not item.is_primary
        assert (item.object_id in index.droppable.room_by_id) == (is_idle and is_safe), f"{item}"
        assert (item.object_id in index.spillable.room_by_id) == (is_idle and not is_safe), f"{item}"
        assert not (is_idle and item.is_freed), f"{item} was let go and is still here"
    for order in (index.droppable, index.spillable):
        assert set(order.room_by_id) <= set(index.objects), "an order lists an object that is gone"
        assert sum(order.room_by_id.values()) == order.total_bytes, "an order's bytes do not add up"


def _check_queue(index: StoreIndex) -> None:
    waiting = {item.object_id for item in index.objects.values() if item.state in WAITING_FOR_ROOM}
    assert set(index.queue) == waiting, "the queue is not those who wait"
    for item in index.objects.values():
        assert item.state is not State.RECALLED or item.waiters, f"{item} comes back for nobody"
    head_id = next(iter(index.queue), None)
    if head_id is not None:
        room = index.objects[head_id].room_bytes
        # Between two reports of missing pages the allocator may still hold room that has none behind it.
        is_shrinking = index.allocator.capacity_bytes > index.usable_bytes
        is_room = index.allocator.largest_free_bytes >= room
        assert is_shrinking or not is_room, f"{head_id} waits though there is room"
        can_drop = index.allocator.free_bytes + index.droppable.total_bytes + index.spilling_bytes >= room
        assert not (can_drop and index.droppable.room_by_id), f"{head_id} waits though copies could be dropped"
