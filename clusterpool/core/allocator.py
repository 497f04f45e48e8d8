"""Which bytes of the arena an object gets: best fit among warm pages first, fresh pages last.

    0                                   frontier              capacity
    | used | free, warm | used | free, warm | never touched, fresh |

Writing to shared memory that nobody has touched runs at about 1 GB/s (the kernel allocates and clears each
page); writing to pages that exist runs at the speed of memcpy. So a freed block is used again before the
frontier moves.
"""

from __future__ import annotations

from bisect import bisect_left, insort

# The page size of the machines that we run on. Every object starts on a page of its own, so that one
# object's pages can be dropped or mapped without touching its neighbour; the price is 2 KiB an object on
# average, which is small as only large objects come here.
PAGE_BYTES = 4096


def round_up(size_bytes: int, unit_bytes: int = PAGE_BYTES) -> int:
    """The smallest multiple of `unit_bytes` that holds `size_bytes`."""
    return -(-size_bytes // unit_bytes) * unit_bytes


class Allocator:
    """Splits `[0, capacity_bytes)` into blocks of whole pages; knows nothing of what lies in them.

    Search and neighbours are found by bisection; inserting into the sorted list moves machine words only.
    """

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes < PAGE_BYTES:
            raise ValueError(f"an arena needs at least one page of {PAGE_BYTES} bytes: {capacity_bytes=}")
        self.capacity_bytes = capacity_bytes // PAGE_BYTES * PAGE_BYTES
        self.frontier_bytes = 0  # everything from here on has never been used
        self.used_bytes = 0
        self._size_by_used_offset: dict[int, int] = {}
        # Invariant: the three hold the same warm free blocks; no two of them touch, all end at or below the
        # frontier.
        self._free_by_size: list[tuple[int, int]] = []  # (size, offset), sorted
        self._free_size_by_offset: dict[int, int] = {}
        self._free_offset_by_end: dict[int, int] = {}

    @property
    def free_bytes(self) -> int:
        """Bytes not in use, warm and fresh, in however many pieces."""
        return self.capacity_bytes - self.used_bytes

    @property
    def largest_free_bytes(self) -> int:
        """The largest size that `allocate` would grant now."""
        tail_bytes = self.capacity_bytes - self._tail_offset()
        return max(tail_bytes, self._free_by_size[-1][0] if self._free_by_size else 0)

    def allocate(self, size_bytes: int) -> int | None:
        """The offset of a block that holds `size_bytes` (a page if empty), or None for no room."""
        if size_bytes < 0:
            raise ValueError(f"a size cannot be negative: {size_bytes=}")
        size = round_up(max(size_bytes, 1))
        # Best fit, the lowest offset among equals: it keeps large blocks whole for the large arrays to come.
        found = bisect_left(self._free_by_size, (size, 0))
        if found < len(self._free_by_size):
            block_size, offset = self._free_by_size[found]
            self._remove_free(offset, block_size)
            if block_size > size:
                self._add_free(offset + size, block_size - size)
        else:
            offset = self._tail_offset()
            if offset + size > self.capacity_bytes:
                return None
            if offset < self.frontier_bytes:  # a warm block lies against the frontier: its pages come first
                self._remove_free(offset, self.frontier_bytes - offset)
            self.frontier_bytes = offset + size
        self._size_by_used_offset[offset] = size
        self.used_bytes += size
        return offset

    def free(self, offset: int) -> int:
        """Take back the block at `offset`; return its bytes, whole pages."""
        size = self._size_by_used_offset.pop(offset)
        self.used_bytes -= size
        start, end = offset, offset + size
        before = self._free_offset_by_end.get(start)
        if before is not None:
            self._remove_free(before, start - before)
            start = before
        after_size = self._free_size_by_offset.get(end)
        if after_size is not None:
            self._remove_free(end, after_size)
            end += after_size
        self._add_free(start, end - start)
        return size

    def shrink(self, capacity_bytes: int) -> None:
        """Never grant beyond `capacity_bytes` until `grow`, or beyond what is in use now if that is more.

        For an arena whose file system turned out smaller than it had promised.
        """
        tail = self._tail_offset()
        self.capacity_bytes = min(self.capacity_bytes, max(round_up(capacity_bytes), tail, PAGE_BYTES))
        if self.frontier_bytes > self.capacity_bytes:
            self._remove_free(tail, self.frontier_bytes - tail)
            if self.capacity_bytes > tail:
                self._add_free(tail, self.capacity_bytes - tail)
            self.frontier_bytes = self.capacity_bytes

    def grow(self, capacity_bytes: int) -> None:
        """Grant up to `capacity_bytes` again: the file system may have room by now."""
        self.capacity_bytes = max(self.capacity_bytes, capacity_bytes // PAGE_BYTES * PAGE_BYTES)

    def free_blocks(self) -> list[tuple[int, int]]:
        """`(offset, size)` of every free block by offset, warm and fresh joined: for tests."""
        blocks = sorted(self._free_size_by_offset.items())
        tail = self._tail_offset()
        if tail < self.frontier_bytes:
            blocks.pop()
        if tail < self.capacity_bytes:
            blocks.append((tail, self.capacity_bytes - tail))
        return blocks

    def used_blocks(self) -> list[tuple[int, int]]:
        """`(offset, size)` of every block in use, by offset."""
        return sorted(self._size_by_used_offset.items())

    def check_invariants(self) -> None:
        """Used and free blocks tile the arena, and no two free blocks touch."""
        position, was_free = 0, False
        free = set(self.free_blocks())
        for offset, size in sorted([*free, *self.used_blocks()]):
            assert offset == position, f"a gap or an overlap at {position}: {offset=}, {size=}"
            assert size > 0 and size % PAGE_BYTES == 0, f"a block of {size} bytes at {offset}"
            is_free = (offset, size) in free
            assert not (is_free and was_free), f"two free blocks meet at {offset}"
            position, was_free = offset + size, is_free
        assert position == self.capacity_bytes, f"the blocks end at {position}, not {self.capacity_bytes}"
        assert self.used_bytes == sum(self._size_by_used_offset.values())
        assert self.frontier_bytes <= self.capacity_bytes
        assert sorted((size, offset) for offset, size in self._free_size_by_offset.items()) == self._free_by_size
        assert all(offset + size <= self.frontier_bytes for size, offset in self._free_by_size)

    def _tail_offset(self) -> int:
        return self._free_offset_by_end.get(self.frontier_bytes, self.frontier_bytes)

    def _add_free(self, offset: int, size: int) -> None:
        insort(self._free_by_size, (size, offset))
        self._free_size_by_offset[offset] = size
        self._free_offset_by_end[offset + size] = offset

    def _remove_free(self, offset: int, size: int) -> None:
        del self._free_by_size[bisect_left(self._free_by_size, (size, offset))]
        del self._free_size_by_offset[offset]
        del self._free_offset_by_end[offset + size]
