"""Arrow tables as one Arrow IPC stream each, in one out-of-band buffer.

pyarrow's own pickling makes a buffer for each column of each chunk and takes the whole of a sliced buffer
along. One stream is what another Arrow reader could map, and holds only the rows of a slice.
"""

from __future__ import annotations

import pickle
import sys
from typing import Any


def reduce_table(table: Any) -> Any:
    """A reduction of a `pyarrow.Table` or `RecordBatch`; NotImplemented where Arrow IPC has no form."""
    pyarrow = sys.modules["pyarrow"]  # loaded: there is a table
    is_batch = isinstance(table, pyarrow.RecordBatch)
    sink = pyarrow.BufferOutputStream()
    try:
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            if is_batch:
                writer.write_batch(table)
            else:
                writer.write_table(table)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
        return NotImplemented
    return restore_table, (pickle.PickleBuffer(sink.getvalue()), is_batch)


def restore_table(stream: Any, is_batch: bool) -> Any:
    """The table in an IPC stream, in place: its columns keep the buffer alive."""
    import pyarrow
    import pyarrow.ipc

    with pyarrow.ipc.open_stream(pyarrow.py_buffer(stream)) as reader:
        return reader.read_next_batch() if is_batch else reader.read_all()
