"""Values to payloads and back.

Most arguments are a few numbers and strings: those are one call of the C pickler. Everything else goes
through `ValuePickler`, which keeps large buffers out of the stream, sends what `__main__` defines, and hands
large parts of arguments to the caller, who stores them once. Each value is pickled by itself, so tasks share
nothing.
"""

from __future__ import annotations

import ctypes
import io
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import msgspec

from clusterpool.serialization import layout, references
from clusterpool.serialization.arrow import reduce_table
from clusterpool.serialization.functions import PROTOCOL, ShippingPickler

# A smaller buffer stays in the stream. Out of band one costs about 4 us on the two sides together (measured),
# and in band two or three more copies, which take as long at 16 to 64 KiB; the lower end, for values of many
# such buffers.
BUFFER_BYTES_MIN = 16_384
# Bytes that are an argument or a result themselves: out of band they need one copy on arrival, in band two
# before.
BYTES_OUT_OF_BAND_MIN = 65_536

StoreLarge = Callable[[Any], Any]
NO_LIMIT = 1 << 62

# A longer container costs more to look through than the 2 us that our pickler takes above the plain one.
_PLAIN_ITEMS_MAX = 50
_PLAIN = {int, float, str, bytes, bool, type(None)}  # and numpy's numbers, once one was seen
_NUMBERS = frozenset({int, float, bool, type(None)})
_dumps = pickle.dumps


class Serialized(msgspec.Struct, gc=False):
    """A pickled value whose large buffers are not copied yet: they are still the user's own arrays.

    So write it (`to_bytes`, `segments`) before the user's call returns, after which he may change them.
    """

    stream: bytes
    buffers: tuple[memoryview, ...] = ()
    references: tuple[Any, ...] = ()  # object references anywhere in the value
    stored: tuple[Any, ...] = ()  # those of them that `store_large` put in the place of a large part
    kept: tuple[Any, ...] = ()  # of arguments: what must live for as long as the payload may be loaded

    @property
    def size_bytes(self) -> int:
        """How long the payload is, also when it is written by `segments`."""
        if not self.buffers:
            return len(self.stream)
        return layout.packed_size(len(self.stream), self.buffers)

    def segments(self) -> Iterator[bytes | memoryview]:
        """The payload in pieces, in order, without a copy of the buffers."""
        return layout.segments(self.stream, self.buffers) if self.buffers else iter((self.stream,))

    def to_bytes(self) -> bytes:
        """The payload: the bare pickle, or the packed layout where there are buffers."""
        return b"".join(self.segments()) if self.buffers else self.stream


class ValuePickler(ShippingPickler):
    """Pickles one value with its large buffers out of band."""

    def __init__(self, file: io.BytesIO, *, large_bytes_min: int, store_large: StoreLarge | None) -> None:
        buffers: list[memoryview] = []

        def take_buffer(buffer: pickle.PickleBuffer) -> bool:
            # Whether the buffer stays in the stream. (No method: it would make a cycle, and what was pickled
            # would live until the next garbage collection.)
            view = buffer.raw()
            if view.nbytes < BUFFER_BYTES_MIN:
                return True
            buffers.append(view)
            return False

        super().__init__(file, take_buffer)
        self.buffers = buffers
        self.stored: list[Any] = []
        self._large_bytes_min = large_bytes_min if store_large is not None else NO_LIMIT
        self._store_large = store_large
        self._replaced_by_id: dict[int, Any] = {}

    def reducer_override(self, thing: Any) -> Any:
        kind = type(thing)
        module = kind.__module__
        if module == "numpy" and kind.__name__ == "ndarray":
            return self._reduce_array(thing)
        if module == "pyarrow.lib" and kind.__name__ in ("Table", "RecordBatch"):
            return self._reduce_arrow(thing)
        return super().reducer_override(thing)

    def replace_large(self, value: Any) -> Any:
        """What to pickle for a top-level part of the value: long bytes never reach `reducer_override`.

        They are looked for in the part itself and, where it is a list or a tuple that has some among its
        first few items (looking at all would take longer than pickling them), among all its items.
        """
        kind = type(value)
        if kind is bytes or kind is bytearray:
            return self._replace_bytes(value) if len(value) >= BYTES_OUT_OF_BAND_MIN else value
        if (kind is not list and kind is not tuple) or not any(map(_is_long_bytes, value[:8])):
            return value
        # The same list twice among the arguments must stay one list.
        replaced = self._replaced_by_id.get(id(value))
        if replaced is None:
            replaced = kind(self._replace_bytes(item) if _is_long_bytes(item) else item for item in value)
            self._replaced_by_id[id(value)] = replaced
        return replaced

    def _replace_bytes(self, value: bytes | bytearray) -> Any:
        replaced = self._replaced_by_id.get(id(value))
        if replaced is None:
            reduction = self._stored_instead(value) if len(value) >= self._large_bytes_min else None
            if reduction is None:
                reduction = (_restore_bytes, (pickle.PickleBuffer(value), type(value) is bytearray))
            replaced = self._replaced_by_id[id(value)] = _Reduced(reduction)
        return replaced

    def _stored_instead(self, value: Any) -> Any:
        assert self._store_large is not None
        reference = self._store_large(value)
        if reference is None:
            return None
        self.stored.append(reference)
        return references.resolve, (reference,)

    def _reduce_array(self, array: Any) -> Any:
        if array.nbytes >= self._large_bytes_min and not array.dtype.hasobject:
            replacement = self._stored_instead(array)
            if replacement is not None:
                return replacement
        dtype, flags = array.dtype, array.flags
        order = "C" if flags.c_contiguous else "F" if flags.f_contiguous else None
        if order is None or dtype.hasobject or (flags.writeable and dtype.kind not in "mMV"):
            return NotImplemented  # numpy's own way: copied into the stream, or a writable buffer
        # numpy itself gives a read-only buffer, hence a read-only array on arrival, for an array that is
        # read-only here, and none at all for dates. So we show the memory by ctypes; nobody writes to it.
        memory: Any = (ctypes.c_ubyte * array.nbytes).from_address(array.ctypes.data)
        memory._owner = array
        return _restore_array, (pickle.PickleBuffer(memory), dtype, array.shape, order)

    def _reduce_arrow(self, table: Any) -> Any:
        if self._store_large is not None and table.get_total_buffer_size() >= self._large_bytes_min:
            replacement = self._stored_instead(table)
            if replacement is not None:
                return replacement
        return reduce_table(table)


def dumps_arguments(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    large_bytes_min: int = NO_LIMIT,
    store_large: StoreLarge | None = None,
) -> Serialized:
    """Pickle the arguments of a call; `loads` gives `(args, kwargs)` back.

    `store_large(part)` is asked for each numpy array and Arrow table anywhere in them, and for bytes and
    bytearrays that are an argument themselves, of `large_bytes_min` or more. It may return an object
    reference, which goes in the part's place and is in `stored` of the result; None leaves the part where it
    is.

    Raises: what pickle raises (PicklingError, TypeError, AttributeError) for something that cannot be
    pickled.
    """
    for value in args:
        if type(value) not in _NUMBERS and not _is_plain(value):
            break
    else:
        if not kwargs or all(map(_is_plain, kwargs.values())):
            return Serialized(_dumps((args, kwargs), PROTOCOL))
    kept: list[Any] = []
    with io.BytesIO() as file, references.capture_references(kept) as captured:
        pickler = ValuePickler(file, large_bytes_min=large_bytes_min, store_large=store_large)
        args = tuple(map(pickler.replace_large, args))
        kwargs = {name: pickler.replace_large(value) for name, value in kwargs.items()}
        return _dumped(pickler, (args, kwargs), file, captured, kept)


def dumps_value(value: Any, reducers: Mapping[type, Callable[[Any], Any]] | None = None) -> Serialized:
    """Pickle one value, such as a result; raises what pickle raises.

    `reducers`, by class, come before those of `copyreg`.
    """
    if _is_plain(value):
        return Serialized(_dumps(value, PROTOCOL))
    with io.BytesIO() as file, references.capture_references() as captured:
        pickler = ValuePickler(file, large_bytes_min=NO_LIMIT, store_large=None)
        if reducers:
            pickler.dispatch_table = {**pickler.dispatch_table, **reducers}
        return _dumped(pickler, pickler.replace_large(value), file, captured)


def loads(payload: bytes | bytearray | memoryview) -> Any:
    """The value of a payload that came in a message.

    A bytearray is handed over: arrays may be views of it, and write to it. Other payloads are copied from, so
    that arrays are writable and nobody else's.
    """
    if payload[0] == layout.PICKLE_START:
        return pickle.loads(payload)
    if isinstance(payload, bytearray):
        return loads_packed(payload)
    return loads_packed(bytearray(payload))


def loads_packed(buffer: Any) -> Any:
    """The value of a payload in place: arrays are views of `buffer`, keep it alive, writable if it is.

    `buffer` is anything with the buffer protocol, contiguous; bytes after the payload's end are ignored.
    """
    view = pickle.PickleBuffer(buffer).raw()
    if view[0] == layout.PICKLE_START:
        return pickle.loads(view)
    stream, buffers = layout.split(view)
    return pickle.loads(stream, buffers=buffers)


class _Reduced:
    """Stands for a value that pickle would not let us reduce our way."""

    __slots__ = ("_reduction",)

    def __init__(self, reduction: tuple[Any, ...]) -> None:
        self._reduction = reduction

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduction


def _dumped(
    pickler: ValuePickler, value: Any, file: io.BytesIO, captured: list[Any], kept: Sequence[Any] = ()
) -> Serialized:
    try:
        pickler.dump(value)
    except RuntimeError as error:
        # A lock or queue of the standard library's, in a program of which one import was changed and the other not.
        if str(error).endswith("through inheritance"):
            error.args = (f"{error}; make it with clusterpool.multiprocessing, whose objects can be passed to tasks",)
        raise
    return Serialized(file.getvalue(), tuple(pickler.buffers), tuple(captured), tuple(pickler.stored), tuple(kept))


def _restore_bytes(buffer: Any, is_bytearray: bool) -> bytes | bytearray:
    return bytearray(buffer) if is_bytearray else bytes(buffer)


def _restore_array(buffer: Any, dtype: Any, shape: tuple[int, ...], order: Any) -> Any:
    import numpy

    return numpy.frombuffer(buffer, numpy.uint8).view(dtype).reshape(shape, order=order)


def _is_long_bytes(value: Any) -> bool:
    kind = type(value)
    return (kind is bytes or kind is bytearray) and len(value) >= BYTES_OUT_OF_BAND_MIN


def _is_plain(value: Any) -> bool:
    """Whether the plain C pickler does all for `value` that ours would. Never wrongly true.

    Numbers, strings, short containers of them, pairs in such containers, small arrays.
    """
    kind = type(value)
    if kind in _PLAIN:
        return kind is not bytes or len(value) < BYTES_OUT_OF_BAND_MIN
    if kind is dict:
        return len(value) <= _PLAIN_ITEMS_MAX and _are_plain(value) and _are_plain(value.values())
    if kind is tuple or kind is list:
        if len(value) > _PLAIN_ITEMS_MAX:
            return False
        return _are_plain(value) or (
            all(type(item) is tuple and len(item) <= _PLAIN_ITEMS_MAX for item in value)
            and _are_plain(list(chain.from_iterable(value)))
        )
    return kind.__module__ == "numpy" and _is_plain_numpy(value, kind)


def _are_plain(values: Any) -> bool:
    kinds = set(map(type, values))
    return kinds <= _PLAIN and (bytes not in kinds or not any(map(_is_long_bytes, values)))


def _is_plain_numpy(value: Any, kind: type) -> bool:
    if kind.__name__ == "ndarray":
        # A read-only array would come back read-only.
        return value.nbytes < BUFFER_BYTES_MIN and value.flags.writeable and not value.dtype.hasobject
    numpy = sys.modules.get("numpy")
    if numpy is None or not issubclass(kind, (numpy.number, numpy.bool_)):
        return False
    _PLAIN.add(kind)
    return True
