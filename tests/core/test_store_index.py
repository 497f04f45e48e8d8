"""The object store's index, case by case; test_store_random.py drives it at random."""

from __future__ import annotations

import pytest

from clusterpool.core.allocator import PAGE_BYTES
from clusterpool.core.store_index import REGROW_S, StoreIndex
from clusterpool.core.store_invariants import check_store
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
from clusterpool.core.store_objects import State


class Store:
    """A StoreIndex of ten pages with a clock; sizes are in pages; invariants are checked at each step."""

    def __init__(self, pages: int = 10) -> None:
        self.index = StoreIndex(pages * PAGE_BYTES, create_wait_s=60, disk_wait_s=5, disk_retry_s=1)
        self.now_s = 0.0
        self.requests = 0

    def __call__(self, event: StoreEvent) -> list[StoreCommand]:
        commands = self.index.handle(event, self.now_s)
        check_store(self.index)
        return commands

    def create(self, name: str, pages: int, *, client: str = "w1", primary: bool = True) -> list[StoreCommand]:
        self.requests += 1
        return self(ObjectCreateRequested(client, self.requests, name, pages * PAGE_BYTES, primary))

    def make(self, name: str, pages: int, *, primary: bool = True) -> None:
        (grant,) = self.create(name, pages, primary=primary)
        assert isinstance(grant, GrantCreate)
        assert self(ObjectSealed("w1", name)) == []

    def pin(self, name: str, client: str = "w2") -> list[StoreCommand]:
        self.requests += 1
        return self(PinRequested(client, self.requests, name))

    def unpin(self, name: str, client: str = "w2") -> list[StoreCommand]:
        return self(Unpinned(client, [name]))

    def tick(self, now_s: float) -> list[StoreCommand]:
        self.now_s = now_s
        return self(Tick())

    def spill_away(self, name: str) -> None:
        """Leave `name` on disk only, and nothing in its place."""
        pages = self.index.allocator.capacity_bytes // PAGE_BYTES
        assert [type(command) for command in self.create("filler", pages)] == [SpillObject]
        (grant,) = self(ObjectSpilled(name))
        assert isinstance(grant, GrantCreate)
        self(ObjectAborted("w1", "filler"))
        assert self.index.objects[name].state is State.SPILLED


def test_an_object_is_granted_sealed_and_pinned_where_it_was_written() -> None:
    store = Store()
    (grant,) = store.create("a", 3)
    assert grant == GrantCreate("w1", 1, "a", 0, 3 * PAGE_BYTES)
    store(ObjectSealed("w1", "a"))
    assert store.pin("a") == [GrantPin("w2", 2, "a", 0, 3 * PAGE_BYTES, False)]
    assert store.index.stats().pinned_bytes == 3 * PAGE_BYTES


def test_a_pin_waits_for_the_seal() -> None:
    store = Store()
    store.create("a", 1)
    assert store.pin("a") == []
    assert store(ObjectSealed("w1", "a")) == [GrantPin("w2", 2, "a", 0, PAGE_BYTES, False)]


def test_a_pin_on_nothing_is_answered_at_once() -> None:
    (reply,) = Store().pin("a")
    assert isinstance(reply, ReplyMissing)
    assert "no copy" in reply.text


def test_a_waiting_reader_learns_that_the_creator_gave_up() -> None:
    store = Store()
    store.create("a", 1)
    store.pin("a")
    (reply,) = store(ObjectAborted("w1", "a"))
    assert isinstance(reply, ReplyMissing)
    assert store.index.allocator.used_bytes == 0


def test_an_object_is_created_once() -> None:
    store = Store()
    store.create("a", 1)
    assert store.create("a", 1, client="w2") == [ReplyAlreadyExists("w2", 2, "a")]
    store(ObjectSealed("w2", "a"))  # not its creator
    assert store.index.objects["a"].state is State.CREATING
    store(ObjectSealed("w1", "a"))
    assert store.create("a", 1, client="w2") == [ReplyAlreadyExists("w2", 3, "a")]


def test_larger_than_the_store_is_refused_with_the_figures() -> None:
    (refusal,) = Store(pages=1000).create("a", 1001)
    assert isinstance(refusal, RefuseCreate)
    assert refusal.kind is Refusal.TOO_LARGE
    assert "object a of 4.1 MB" in refusal.text
    assert "whole store of 4.1 MB" in refusal.text


def test_the_least_recently_used_copy_is_dropped_and_reported() -> None:
    store = Store()
    for name in ("a", "b"):
        store.make(name, 4, primary=False)
    store.pin("a")
    store.unpin("a")  # now b is the one used longest ago
    commands = store.create("c", 4)
    assert commands[0] == ReportGone("b", None, "it was evicted, because the room was needed")
    assert isinstance(commands[1], GrantCreate)
    assert "a" in store.index.objects


def test_copies_go_before_primaries_are_spilled() -> None:
    store = Store()
    store.make("primary", 5)
    store.make("copy", 5, primary=False)
    assert [type(command) for command in store.create("c", 5)] == [ReportGone, GrantCreate]


def test_a_promoted_copy_is_spilled_rather_than_dropped() -> None:
    store = Store()
    store.make("a", 8, primary=False)
    store(CopyPromoted("a"))
    assert store.create("b", 8) == [SpillObject("a", 0, 8 * PAGE_BYTES)]


def test_nothing_is_dropped_in_vain() -> None:
    store = Store()
    store.make("pinned", 5)
    store.pin("pinned")
    store.make("copy", 5, primary=False)
    assert store.create("c", 6) == []
    assert "copy" in store.index.objects


def test_a_primary_is_spilled_restored_and_then_dropped_without_a_second_write() -> None:
    store = Store()
    store.make("a", 8)
    store.spill_away("a")
    assert store.index.stats().spilled_bytes == 8 * PAGE_BYTES
    assert store.pin("a") == [RestoreObject("a", 0, 8 * PAGE_BYTES)]
    (pinned,) = store(ObjectRestored("a"))
    assert isinstance(pinned, GrantPin)
    store.unpin("a")
    assert [type(command) for command in store.create("b", 8)] == [GrantCreate]  # no SpillObject
    assert store.index.objects["a"].state is State.SPILLED
    assert store(ObjectFreed("a")) == [DeleteSpilled("a")]
    assert store.index.stats().spilled_bytes == 0


def test_a_reader_may_pin_during_the_spill_and_keeps_the_bytes() -> None:
    store = Store()
    store.make("a", 8)
    store.create("b", 8)
    (pinned,) = store.pin("a")
    assert isinstance(pinned, GrantPin)
    assert store(ObjectSpilled("a")) == []
    assert [type(command) for command in store.unpin("a")] == [GrantCreate]


def test_no_more_is_spilled_than_the_request_needs() -> None:
    store = Store()
    for name in "abcde":
        store.make(name, 2)
    assert [command.object_id for command in store.create("f", 4) if isinstance(command, SpillObject)] == [
        "a",
        "b",
    ]
    store(ObjectSpilled("a"))
    (grant,) = store(ObjectSpilled("b"))
    assert isinstance(grant, GrantCreate)


def test_free_room_in_pieces_is_joined_by_further_spills() -> None:
    store = Store()
    for name in "abcde":
        store.make(name, 2)
    store(ObjectFreed("a"))
    store(ObjectFreed("c"))  # four pages are free, two by two
    assert store.create("f", 4) == [SpillObject("b", 2 * PAGE_BYTES, 2 * PAGE_BYTES)]
    assert [type(command) for command in store(ObjectSpilled("b"))] == [GrantCreate]


def test_requests_are_served_first_come_first_served() -> None:
    store = Store()
    store.make("a", 9)
    store.pin("a")
    assert store.create("large", 5) == []
    assert store.create("small", 1) == []  # there is a page, but large came first
    store(ObjectFreed("a"))
    assert [command.object_id for command in store.unpin("a") if isinstance(command, GrantCreate)] == [
        "large",
        "small",
    ]


def test_a_wait_for_pinned_room_ends_with_an_error_that_explains() -> None:
    store = Store()
    store.make("a", 9)
    store.pin("a")
    store.create("b", 5)
    assert store.tick(59) == []
    (refusal,) = store.tick(60)
    assert isinstance(refusal, RefuseCreate)
    assert refusal.kind is Refusal.STORE_FULL
    assert "within 60.0 s" in refusal.text
    assert "held by readers" in refusal.text
    assert store.create("c", 1) != []


def test_a_request_may_bring_its_own_limit() -> None:
    store = Store()
    store.make("a", 9)
    store.pin("a")
    store(ObjectCreateRequested("w1", 9, "b", 5 * PAGE_BYTES, True, 2.0))
    assert store.tick(1.9) == []
    assert len(store.tick(2.0)) == 1


def test_a_full_disk_is_tried_again_and_then_reported() -> None:
    store = Store()
    store.make("a", 8)
    store.create("b", 8)
    assert store(SpillFailed("a", "no space left on /spill")) == []
    assert store.tick(0.5) == []
    assert store.tick(1.0) == [SpillObject("a", 0, 8 * PAGE_BYTES)]
    assert store(SpillFailed("a", "no space left on /spill")) == []
    (refusal,) = store.tick(5.0)
    assert isinstance(refusal, RefuseCreate)
    assert refusal.kind is Refusal.DISK_FULL
    assert "no space left on /spill" in refusal.text
    assert "a" in store.index.objects  # nothing is lost


def test_a_disk_that_recovers_serves_the_request() -> None:
    store = Store()
    store.make("a", 8)
    store.create("b", 8)
    store(SpillFailed("a", "full"))
    store.tick(1.0)
    assert [type(command) for command in store(ObjectSpilled("a"))] == [GrantCreate]
    assert store.tick(6.0) == []


def test_a_restore_without_room_is_refused_but_not_lost() -> None:
    store = Store()
    store.make("a", 8)
    store.spill_away("a")
    store.make("b", 9)
    store.pin("b")
    assert store.pin("a") == []
    (refusal,) = store.tick(60)
    assert isinstance(refusal, RefusePin)
    assert refusal.kind is Refusal.STORE_FULL
    store(ObjectFreed("b"))
    store.unpin("b")
    assert [type(command) for command in store.pin("a")] == [RestoreObject]


def test_what_is_on_a_full_disk_is_read_from_there() -> None:
    """Room can only come from readers who take what is there, one after the other."""
    store = Store()
    store.make("a", 8)
    store.spill_away("a")
    store.make("b", 8)
    assert [type(command) for command in store.pin("a")] == [SpillObject]
    assert store(SpillFailed("b", "no space left on /spill")) == []
    (refusal,) = store.tick(0.5)
    assert isinstance(refusal, RefusePin)
    assert (refusal.object_id, refusal.kind) == ("a", Refusal.DISK_FULL)
    store(ObjectFreed("a"))
    store(ObjectFreed("b"))
    assert not store.index.objects


def test_a_damaged_file_means_a_lost_object() -> None:
    store = Store()
    store.make("a", 8)
    store.spill_away("a")
    store.pin("a")
    commands = store(RestoreFailed("a", "short file"))
    assert [type(command) for command in commands] == [ReplyMissing, ReportGone, DeleteSpilled]
    assert "a" not in store.index.objects


def test_a_file_that_its_reader_cannot_read_means_a_lost_object() -> None:
    store = Store()
    store.make("a", 8)
    store.spill_away("a")
    gone, deleted = store(FileUnreadable("a", "input/output error"))
    assert gone == ReportGone("a", None, "its spilled file could not be read: input/output error")
    assert deleted == DeleteSpilled("a")
    assert "a" not in store.index.objects
    assert store(FileUnreadable("a", "said twice")) == []


def test_who_waits_for_an_object_whose_file_is_unreadable_is_told() -> None:
    store = Store()
    store.make("a", 8)
    store.spill_away("a")
    store.make("b", 8)
    store.pin("b")
    store.pin("a")
    assert store.index.objects["a"].state is State.RECALLED
    commands = store(FileUnreadable("a", "input/output error"))
    assert [type(command) for command in commands] == [ReplyMissing, ReportGone, DeleteSpilled]


def test_what_is_back_in_memory_is_not_lost_with_its_file() -> None:
    store = Store()
    store.make("a", 8)
    store.spill_away("a")
    store.pin("a")
    assert store.index.objects["a"].state is State.RESTORING
    assert store(FileUnreadable("a", "too early: the disk will say")) == []
    store(ObjectRestored("a"))
    assert store(FileUnreadable("a", "input/output error")) == [DeleteSpilled("a")]
    assert store.index.spilled_bytes == 0
    store.unpin("a")
    assert [type(command) for command in store.create("b", 8)] == [SpillObject], "it is spilled anew"


@pytest.mark.parametrize("pins", [1, 3])
def test_pins_are_counted(pins: int) -> None:
    store = Store()
    store.make("a", 8)
    for _ in range(pins):
        store.pin("a")
    store(ObjectFreed("a"))
    for _ in range(pins - 1):
        store.unpin("a")
    assert "a" in store.index.objects
    store.unpin("a")
    assert store.index.allocator.used_bytes == 0


def test_a_client_cannot_take_back_the_pins_of_another() -> None:
    store = Store()
    store.make("a", 8)
    store.pin("a", "w2")
    store(ObjectFreed("a"))
    store.unpin("a", "w3")
    assert store.index.objects["a"].pin_count == 1


def test_a_client_that_ends_leaves_nothing() -> None:
    store = Store()
    store.make("read", 2)
    store.pin("read", "w9")
    store.pin("read", "w9")
    store.create("unfinished", 2, client="w9")
    store.pin("unfinished", "w2")
    store.create("waiting", 9, client="w9")
    store(ObjectFreed("read"))
    (reply,) = store(ClientGone("w9"))
    assert isinstance(reply, ReplyMissing)
    assert reply.client == "w2"
    assert store.index.objects == {}
    assert store.index.stats().queued_count == 0


def test_a_recall_without_readers_is_forgotten() -> None:
    store = Store()
    store.make("a", 8)
    store.spill_away("a")
    store.make("b", 9)
    store.pin("b", "w3")
    store.pin("a", "w2")
    assert store(ClientGone("w2")) == []
    assert store.index.objects["a"].state is State.SPILLED


@pytest.mark.parametrize("moment", ["queued", "creating", "spilling", "spilled", "recalled", "restoring"])
def test_a_freed_object_goes_whatever_it_is_doing(moment: str) -> None:
    store = Store()
    if moment in ("queued", "recalled"):
        if moment == "recalled":
            store.make("a", 8)
            store.spill_away("a")
        store.make("pinned", 9)
        store.pin("pinned", "w3")
        _ = store.create("a", 8) if moment == "queued" else store.pin("a")
    else:
        _ = store.create("a", 8) if moment == "creating" else store.make("a", 8)
        if moment == "spilling":
            store.create("b", 8)
        elif moment in ("spilled", "restoring"):
            store.spill_away("a")
            if moment == "restoring":
                store.pin("a")
    assert store.index.objects["a"].state.value == moment
    commands = store(ObjectFreed("a"))
    follow_up: dict[str, StoreEvent] = {
        "creating": ObjectSealed("w1", "a"),
        "spilling": ObjectSpilled("a"),
        "restoring": ObjectRestored("a"),
    }
    if moment in follow_up:
        assert "a" in store.index.objects
        commands += store(follow_up[moment])
    assert "a" not in store.index.objects
    on_disk = moment in ("spilling", "spilled", "recalled", "restoring")
    assert (DeleteSpilled("a") in commands) == on_disk
    assert any(isinstance(command, ReplyMissing) for command in commands) == (moment in ("recalled", "restoring"))
    assert any(isinstance(command, RefuseCreate) for command in commands) == (moment == "queued")


def test_late_messages_change_nothing() -> None:
    store = Store()
    for event in (ObjectSealed("w1", "a"), ObjectAborted("w1", "a"), ObjectFreed("a"), Unpinned("w1", ["a"])):
        assert store(event) == []
    assert store(ClientGone("w1")) == []


def test_readers_are_asked_to_copy_when_they_hold_half_of_the_store() -> None:
    store = Store()
    for name in ("a", "b"):
        store.make(name, 5)
    grants = [command for name in ("a", "b") for command in store.pin(name)]
    assert [grant.is_scarce for grant in grants if isinstance(grant, GrantPin)] == [False, True]


def test_an_arena_that_cannot_grow_makes_the_store_smaller_and_keeps_the_request() -> None:
    store = Store()
    store.make("a", 4, primary=False)
    (grant,) = store.create("b", 5)
    assert isinstance(grant, GrantCreate)
    commands = store(ArenaExhausted("b", 6 * PAGE_BYTES))
    assert [type(command) for command in commands] == [ReportGone, GrantCreate]
    assert store.index.stats().capacity_bytes == 6 * PAGE_BYTES
    (refusal,) = store.create("c", 7)
    assert isinstance(refusal, RefuseCreate)


def test_an_arena_that_cannot_grow_refuses_what_can_never_fit() -> None:
    store = Store()
    store.make("a", 2)
    store.create("b", 8)
    (refusal,) = store(ArenaExhausted("b", 10 * PAGE_BYTES))  # even if the shell miscounts
    assert not isinstance(refusal, GrantCreate)
    commands = store(ArenaExhausted("unknown", 5 * PAGE_BYTES))
    assert any(isinstance(command, RefuseCreate) for command in commands)


def test_an_arena_whose_file_system_was_full_is_tried_again() -> None:
    store = Store()
    store.make("a", 2)
    store.create("b", 8)
    (refusal,) = store(ArenaExhausted("b", 3 * PAGE_BYTES))
    assert isinstance(refusal, RefuseCreate) and "the file system of the shared memory is full" in refusal.text
    store.now_s += REGROW_S / 2
    store(Tick())
    assert store.index.stats().missing_bytes == 7 * PAGE_BYTES
    assert isinstance(store.create("c", 8)[0], RefuseCreate)
    store.now_s += REGROW_S / 2
    store(Tick())
    assert store.index.stats().missing_bytes == 0
    (grant,) = store.create("d", 8)
    assert isinstance(grant, GrantCreate)
    (refusal,) = store(ArenaExhausted("d", 3 * PAGE_BYTES))  # it is full still
    assert isinstance(refusal, RefuseCreate) and store.index.stats().missing_bytes == 7 * PAGE_BYTES


def test_a_request_that_met_a_full_file_system_keeps_its_place_in_the_queue() -> None:
    store = Store()
    store.make("pinned", 4)
    store.pin("pinned")
    store.create("first", 5)
    store.create("second", 6)
    assert store(ArenaExhausted("first", 8 * PAGE_BYTES)) == []
    store(ObjectFreed("pinned"))
    (grant,) = store.unpin("pinned")
    assert isinstance(grant, GrantCreate)
    assert grant.object_id == "first"


def test_a_spilled_object_is_still_the_one_used_longest_ago() -> None:
    store = Store()
    store.make("copy", 3, primary=False)
    store.pin("copy")
    store.make("a", 5)
    assert [type(command) for command in store.create("b", 5, client="w9")] == [SpillObject]
    store(ClientGone("w9"))
    store.unpin("copy")
    store(ObjectSpilled("a"))
    assert [type(command) for command in store.create("c", 6)] == [GrantCreate]
    assert "copy" in store.index.objects
    assert store.index.objects["a"].state is State.SPILLED


def test_a_freed_object_cannot_be_pinned_again() -> None:
    store = Store()
    store.make("a", 1)
    store.pin("a")
    store(ObjectFreed("a"))
    (reply,) = store.pin("a", "w3")
    assert isinstance(reply, ReplyMissing)
    assert "let it go" in reply.text


def test_nobody_is_refused_while_the_disk_is_being_tried_again() -> None:
    store = Store()
    store.make("a", 8)
    store.make("tail", 1)
    store.create("b", 8)
    store(SpillFailed("a", "full"))
    assert [type(command) for command in store.tick(4.5)] == [SpillObject]
    assert store.tick(5.0) == []
    assert [type(command) for command in store(ObjectSpilled("a"))] == [GrantCreate]


def test_a_disk_that_worked_in_between_gets_its_full_time_again() -> None:
    store = Store()
    for name in ("a", "b"):
        store.make(name, 5)
    store.create("c", 10)
    store(SpillFailed("a", "full"))
    store(ObjectSpilled("b"))
    store.now_s = 4.0
    store(Tick())
    store(SpillFailed("a", "full"))
    assert not any(isinstance(command, RefuseCreate) for command in store.tick(8.9))
    store(SpillFailed("a", "full"))
    assert any(isinstance(command, RefuseCreate) for command in store.tick(9.0))


def test_two_grants_without_pages_are_not_granted_again_in_turn_for_ever() -> None:
    """While the second block is still granted the arena cannot shrink below it, and the first fits there again."""
    store = Store()
    store.create("whole", 10)
    assert store.create("a", 4) == store.create("b", 4) == []
    grants = store(ObjectAborted("w1", "whole"))
    assert [type(grant) for grant in grants] == [GrantCreate, GrantCreate]
    assert store(ArenaExhausted("a", 3 * PAGE_BYTES)) == []
    refusals = store(ArenaExhausted("b", 3 * PAGE_BYTES))
    assert all(isinstance(refusal, RefuseCreate) for refusal in refusals)
    assert sorted(refusal.object_id for refusal in refusals) == ["a", "b"]
