"""The bytes of a value with out-of-band buffers: the same in messages, in the arena and in files.

    0     4 bytes   magic, whose first byte is no pickle's (0x80)
    4     u32       count of buffers
    8     u64       length of the pickle stream
    16    u64 each  lengths of the buffers
          stream
    64*k  buffer    each at the next multiple of 64 bytes, where Arrow and vector instructions want it

Numbers are little-endian. A value without such buffers is its bare pickle stream, in all those places too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

MAGIC = b"CPK\x01"  # the last byte is the version
PICKLE_START = 0x80
ALIGNMENT = 64

_FIXED = struct.Struct("<4sIQ")
_ZEROS = bytes(ALIGNMENT)


def packed_size(stream_bytes: int, buffers: Sequence[memoryview]) -> int:
    """Bytes from the magic to the end of the last buffer."""
    size = _FIXED.size + 8 * len(buffers) + stream_bytes
    for buffer in buffers:
        size += -size % ALIGNMENT + buffer.nbytes
    return size


def segments(stream: bytes, buffers: Sequence[memoryview]) -> Iterator[bytes | memoryview]:
    """The layout as pieces in order, for `b"".join`, `writev` or a copy; the buffers are not copied."""
    count = len(buffers)
    header = _FIXED.pack(MAGIC, count, len(stream)) + struct.pack(f"<{count}Q", *(b.nbytes for b in buffers))
    yield header
    yield stream
    position = len(header) + len(stream)
    for buffer in buffers:
        padding = -position % ALIGNMENT
        if padding:
            yield _ZEROS[:padding]
        yield buffer
        position += padding + buffer.nbytes


def split(packed: memoryview) -> tuple[memoryview, list[memoryview]]:
    """Stream and buffers of a packed value, as views into it.

    Raises: ValueError for bytes that are no packed value, or cut short.
    """
    if packed.nbytes < _FIXED.size:
        raise ValueError(f"{packed.nbytes} bytes are too few for a packed value")
    magic, count, stream_bytes = _FIXED.unpack_from(packed)
    position = _FIXED.size + 8 * count
    if magic != MAGIC or position > packed.nbytes:
        raise ValueError(f"not a packed value of this version: starts with {bytes(packed[:4])!r}")
    lengths = struct.unpack_from(f"<{count}Q", packed, _FIXED.size)
    stream = packed[position : position + stream_bytes]
    position += stream_bytes
    buffers = []
    for length in lengths:
        position += -position % ALIGNMENT
        buffers.append(packed[position : position + length])
        position += length
    if position > packed.nbytes:
        raise ValueError(f"a packed value of {position} bytes was cut to {packed.nbytes}")
    return stream, buffers
