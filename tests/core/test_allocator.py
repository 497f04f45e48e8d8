"""The arena's allocator: no overlap, bytes add up, warm pages before fresh ones."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from clusterpool.core.allocator import PAGE_BYTES, Allocator, round_up

PAGES = 64


class AllocatorMachine(RuleBasedStateMachine):
    """Random allocations and frees against a plain page map."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = Allocator(PAGES * PAGE_BYTES)
        self.size_by_offset: dict[int, int] = {}
        self.owner_by_page: dict[int, int] = {}

    @rule(size=st.integers(0, 20 * PAGE_BYTES))
    def allocate(self, size: int) -> None:
        largest = self.allocator.largest_free_bytes
        offset = self.allocator.allocate(size)
        pages = max(1, -(-size // PAGE_BYTES))
        if offset is None:
            assert pages * PAGE_BYTES > largest
            return
        assert pages * PAGE_BYTES <= largest
        assert offset % PAGE_BYTES == 0
        for page in range(offset // PAGE_BYTES, offset // PAGE_BYTES + pages):
            assert 0 <= page < PAGES
            assert page not in self.owner_by_page
            self.owner_by_page[page] = offset
        self.size_by_offset[offset] = pages * PAGE_BYTES

    @precondition(lambda self: self.size_by_offset)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.size_by_offset)))
        size = self.size_by_offset.pop(offset)
        assert self.allocator.free(offset) == size
        self.owner_by_page = {page: owner for page, owner in self.owner_by_page.items() if owner != offset}

    @rule()
    def free_everything(self) -> None:
        for offset in list(self.size_by_offset):
            self.allocator.free(offset)
        self.size_by_offset.clear()
        self.owner_by_page.clear()
        assert self.allocator.free_blocks() == [(0, PAGES * PAGE_BYTES)]

    @invariant()
    def bytes_add_up(self) -> None:
        self.allocator.check_invariants()
        assert self.allocator.used_bytes == sum(self.size_by_offset.values())
        assert self.allocator.used_bytes + self.allocator.free_bytes == self.allocator.capacity_bytes
        assert self.allocator.used_blocks() == sorted(self.size_by_offset.items())


TestAllocatorMachine = AllocatorMachine.TestCase


def test_freed_pages_are_used_again_before_fresh_ones() -> None:
    allocator = Allocator(1000 * PAGE_BYTES)
    first = allocator.allocate(10 * PAGE_BYTES)
    allocator.allocate(PAGE_BYTES)
    assert first == 0
    allocator.free(first)
    assert [allocator.allocate(5 * PAGE_BYTES), allocator.allocate(5 * PAGE_BYTES)] == [0, 5 * PAGE_BYTES]
    assert allocator.frontier_bytes == 11 * PAGE_BYTES


def test_a_warm_block_at_the_frontier_is_extended_rather_than_skipped() -> None:
    allocator = Allocator(100 * PAGE_BYTES)
    allocator.free(allocator.allocate(10 * PAGE_BYTES) or 0)
    assert allocator.allocate(20 * PAGE_BYTES) == 0
    assert allocator.frontier_bytes == 20 * PAGE_BYTES


def test_the_tightest_block_is_taken() -> None:
    allocator = Allocator(100 * PAGE_BYTES)
    offsets = [allocator.allocate(pages * PAGE_BYTES) for pages in (8, 1, 4, 1, 6, 1)]
    for index in (0, 2, 4):
        allocator.free(offsets[index] or 0)
    assert allocator.allocate(3 * PAGE_BYTES) == offsets[2]


def test_the_whole_arena_can_be_one_block() -> None:
    allocator = Allocator(16 * PAGE_BYTES + 5)
    assert allocator.allocate(16 * PAGE_BYTES + 1) is None
    assert allocator.allocate(16 * PAGE_BYTES) == 0
    assert allocator.allocate(0) is None
    allocator.free(0)
    assert allocator.free_blocks() == [(0, 16 * PAGE_BYTES)]


def test_freeing_what_is_not_in_use_is_a_bug() -> None:
    with pytest.raises(KeyError):
        Allocator(PAGE_BYTES).free(0)


@pytest.mark.parametrize(
    ("wish_pages", "capacity_pages"),
    [
        (50, 50),
        (200, 100),  # it never grows
        (2, 5),  # five pages are in use at the end of the arena's used part
        (6, 6),  # part of the warm free block beyond them goes
    ],
)
def test_shrinking_stops_at_what_is_in_use(wish_pages: int, capacity_pages: int) -> None:
    allocator = Allocator(100 * PAGE_BYTES)
    allocator.allocate(5 * PAGE_BYTES)
    allocator.free(allocator.allocate(3 * PAGE_BYTES) or 0)
    allocator.shrink(wish_pages * PAGE_BYTES)
    assert allocator.capacity_bytes == capacity_pages * PAGE_BYTES
    allocator.check_invariants()


def test_round_up() -> None:
    assert [round_up(size) for size in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="one page"):
        Allocator(100)
    with pytest.raises(ValueError, match="negative"):
        Allocator(PAGE_BYTES).allocate(-1)
