"""`multiprocessing.heap` with a `BufferWrapper` that can be pickled at any time."""

from __future__ import annotations

from multiprocessing.heap import Arena, Heap

from clusterpool.client.cell import Cell

__all__ = ["Arena", "BufferWrapper", "Heap"]


class BufferWrapper(Cell):
    """Shared memory of this host, `create_memoryview()` of it; each is a file of its own, not a part of a heap."""
