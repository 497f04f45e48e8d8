"""Mappings that a read has left behind, kept for the next read of the same pages.

    read ends --> was a page of it written to? --yes--> unmapped, with the copies of those pages
                              | no
                              v
                           [spare] --> next read of just these pages: nothing is mapped, no page faults

A fresh mapping of 100 MB costs its reader some 8 ms of page faults, and 5 ms more to unmap it; asking the kernel which
of its pages were copied costs 1 ms. Many tasks that get the same array, one after another, read it from one mapping
then. Pages of a private mapping that were not written to are the file's own: whatever is put there next shows in them.
"""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from collections.abc import Callable

# Below this, mapping anew costs less than asking.
SPARE_BYTES_MIN = 1 << 20
# Of one process. The memory is the store's and taken anyway; but it counts as resident in each process that has it
# mapped, and more would make a worker look like the one that eats the memory.
SPARE_BYTES_MAX = 256 << 20
SPARES_MAX = 16

# Of an entry of /proc/self/pagemap, eight bytes a page, the highest byte: bit 7 present, 6 swapped, 5 the file's own
# page (clear: a copy, made on write), 0 mapped here alone. Source: Linux, admin-guide/mm/pagemap.rst
_ENTRY_BYTES = 8
_UNTOUCHED = bytes([0x00, 0xA0, 0xA1])


class SpareMappings:
    """Of one arena in one process. Any thread may use it, also within a garbage collection: each step is atomic."""

    def __init__(self, unmap: Callable[[int, int], object]) -> None:
        self._unmap = unmap
        self._addresses: OrderedDict[tuple[int, int], int] = OrderedDict()  # by start in the file and length, in bytes
        self._is_closed = False

    def take(self, start: int, length: int) -> int | None:
        """The address of a mapping of these pages, as they are in the file; it is the caller's from now on."""
        return self._addresses.pop((start, length), None)

    def give(self, start: int, length: int, address: int) -> None:
        """Keep a mapping that nobody reads any more, or unmap it."""
        is_worth_it = SPARE_BYTES_MIN <= length <= SPARE_BYTES_MAX
        if self._is_closed or not is_worth_it or not is_untouched(address, length):
            self._unmap(address, length)
            return
        if self._addresses.setdefault((start, length), address) != address:
            self._unmap(address, length)  # two reads at a time had one each
        self._shrink()
        if self._is_closed:
            self.close()

    def _shrink(self) -> None:
        """Unmap the oldest beyond the limits."""
        while True:
            kept = list(self._addresses)
            if len(kept) <= SPARES_MAX and sum(length for _, length in kept) <= SPARE_BYTES_MAX:
                return
            self._unmap_oldest()

    def _unmap_oldest(self) -> None:
        try:
            (_, length), address = self._addresses.popitem(last=False)
        except KeyError:
            return
        self._unmap(address, length)

    def close(self) -> None:
        """Unmap all, and keep none any more: the memory of a removed file goes with its last mapping."""
        self._is_closed = True
        while self._addresses:
            self._unmap_oldest()

    def __del__(self) -> None:
        self.close()


def is_untouched(address: int, length: int) -> bool:
    """Whether no page of a private mapping was written to, as far as the kernel tells."""
    first, pages = address // mmap.PAGESIZE, -(-length // mmap.PAGESIZE)
    entries = bytearray(pages * _ENTRY_BYTES)
    try:
        # Opened each time: a descriptor shows the process that opened it, in its forked children as well.
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False  # no such system, or not allowed
    try:
        count = os.preadv(fd, [entries], first * _ENTRY_BYTES)
    except OSError:
        return False
    finally:
        os.close(fd)
    return count == len(entries) and not entries[_ENTRY_BYTES - 1 :: _ENTRY_BYTES].translate(None, _UNTOUCHED)
