"""Facts about large values: what they hold, whether they can change, how to name them in a message.

numpy and pyarrow are only looked at when the user's program has imported them: importing either here would
cost more than starting a worker.
"""

from __future__ import annotations

import sys
from typing import Any


def content_digest(value: Any) -> bytes | None:
    """16 bytes, the same for equal contents, so that a large argument is stored once; None: no digest.

    For bytes, bytearray and contiguous numpy arrays without objects. Runs at memory speed (about 10 GB/s).
    Source: XXH3, 128 bits. It is no defence against made-up collisions; the contents are the user's own.
    """
    import xxhash

    kind = type(value)
    if kind is bytes or kind is bytearray:
        hasher = xxhash.xxh3_128(kind.__name__.encode())
        hasher.update(value)
        return bytes(hasher.digest())
    numpy = sys.modules.get("numpy")
    if numpy is None or kind is not numpy.ndarray or value.dtype.hasobject:
        return None
    flags = value.flags
    if not (flags.c_contiguous or flags.f_contiguous):
        return None
    # The strides tell C from Fortran order, and the dtype's description names the fields of records.
    shape = f"{value.dtype.descr if value.dtype.names else value.dtype.str}{value.shape}{value.strides}"
    hasher = xxhash.xxh3_128(shape.encode())
    # A view as bytes, because dates and half floats have no buffer format; transposed, because a view needs C
    # order.
    plain = value if flags.c_contiguous else value.T
    hasher.update(plain.reshape(-1).view(numpy.uint8))
    return bytes(hasher.digest())


def is_immutable(value: Any) -> bool:
    """Whether nobody can change `value` any more, so that its identity stands for its content.

    A read-only numpy array counts when everything it is a view of is read-only too.
    """
    kind = type(value)
    if kind is bytes or kind is str:
        return True
    if kind.__module__ == "pyarrow.lib":
        return kind.__name__ in ("Table", "RecordBatch", "ChunkedArray") or kind.__name__.endswith("Array")
    numpy = sys.modules.get("numpy")
    if numpy is None or kind is not numpy.ndarray:
        return False
    base = value
    while isinstance(base, numpy.ndarray):
        if base.flags.writeable:
            return False
        base = base.base
    return base is None or type(base) is bytes
