"""Values survive packing, arrive writable and alone, and large buffers stay out of the stream."""

from __future__ import annotations

import ctypes
import datetime
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from clusterpool.serialization import layout, packing, references
from clusterpool.serialization.packing import BUFFER_BYTES_MIN, BYTES_OUT_OF_BAND_MIN


def packed_in_memory(serialized: packing.Serialized) -> Any:
    """A ctypes array as the arena gives it, longer than the payload."""
    memory = (ctypes.c_ubyte * (serialized.size_bytes + 100))()
    view, position = memoryview(memory).cast("B"), 0
    for segment in serialized.segments():
        view[position : position + len(segment)] = segment
        position += len(segment)
    return memory


PLAIN_VALUES = [
    None,
    True,
    3,
    -(2**70),
    2.5,
    "text",
    b"bytes",
    (),
    (1, "a", None),
    [1, 2.0],
    {"a": 1, 2: b"x"},
    [(1, 2), (3, 4)],
    list(range(1000)),
]
OTHER_VALUES = [
    {1, 2},
    {"a": [{"b": (1, [2])}]},
    datetime.datetime(2020, 1, 2),
    [b"x" * BYTES_OUT_OF_BAND_MIN, 1],
    (bytearray(b"y" * BYTES_OUT_OF_BAND_MIN), b"z" * BYTES_OUT_OF_BAND_MIN),
    b"x" * (BYTES_OUT_OF_BAND_MIN - 1),
    b"x" * BYTES_OUT_OF_BAND_MIN,
    bytearray(b"x" * BYTES_OUT_OF_BAND_MIN),
    "s" * 1_000_000,
    len,
    datetime.date,
]


@pytest.mark.parametrize("value", PLAIN_VALUES + OTHER_VALUES, ids=lambda value: repr(value)[:20])
def test_values_come_back_equal_by_every_way(value: Any) -> None:
    serialized = packing.dumps_value(value)
    payload = serialized.to_bytes()
    assert len(payload) == serialized.size_bytes
    in_memory = packed_in_memory(serialized)
    assert bytes(in_memory)[: len(payload)] == payload
    for loaded in (
        packing.loads(payload),
        packing.loads(bytearray(payload)),
        packing.loads(memoryview(payload)),
        packing.loads_packed(in_memory),
    ):
        assert loaded == value
        assert type(loaded) is type(value)


@pytest.mark.parametrize("value", PLAIN_VALUES)
def test_plain_values_are_bare_pickles(value: Any) -> None:
    assert packing.dumps_value(value).to_bytes() == pickle.dumps(value, 5)


def test_arguments_and_keywords_come_back() -> None:
    array = np.arange(10_000.0)
    payload = packing.dumps_arguments((1, array), {"k": array, "self": 2}).to_bytes()
    args, kwargs = packing.loads(payload)
    assert args[0] == 1 and kwargs["self"] == 2
    assert np.array_equal(args[1], array)
    assert args[1] is kwargs["k"], "one array passed twice is one array to the task"


@pytest.mark.parametrize("is_read_only", [False, True])
@pytest.mark.parametrize("size", [0, 10, BUFFER_BYTES_MIN, 1_000_000])
@pytest.mark.parametrize("dtype", ["u1", "f8", "M8[s]", "f2", [("a", "i4"), ("b", "f8")], bool])
def test_arrays_come_back_writable_whatever_they_were(dtype: Any, size: int, is_read_only: bool) -> None:
    array = np.zeros(size // np.dtype(dtype).itemsize, dtype)
    array.flags.writeable = not is_read_only
    serialized = packing.dumps_value(array)
    assert bool(serialized.buffers) == (array.nbytes >= BUFFER_BYTES_MIN)
    in_memory = packed_in_memory(serialized)
    payload = serialized.to_bytes()
    for loaded in (
        packing.loads(payload),
        packing.loads(memoryview(payload)),
        packing.loads(bytearray(payload)),
        packing.loads_packed(in_memory),
    ):
        assert loaded.flags.writeable
        assert loaded.dtype == array.dtype
        assert np.array_equal(loaded, array)
        loaded[:] = np.ones((), dtype)
    assert not array.view("u1").any(), "the sender's array is not touched"
    assert payload == serialized.to_bytes(), "nor is the payload that others may load too"


@pytest.mark.parametrize(
    "make",
    [
        lambda a: a.reshape(100, -1).T,
        lambda a: a.reshape(100, -1)[:, ::2],
        lambda a: np.broadcast_to(a[:1], (200, 300)),
        lambda a: a.astype(object),
        lambda a: np.asfortranarray(a.reshape(100, -1)),
        lambda a: np.asfortranarray(a.astype("M8[s]").reshape(100, -1)),
        lambda a: np.ma.masked_array(a, a > 5),
    ],
)
def test_arrays_of_any_layout_come_back_writable(make: Any) -> None:
    array = make(np.arange(10_000))
    loaded = packing.loads(packing.dumps_value([array]).to_bytes())[0]
    assert type(loaded) is type(array)
    assert loaded.flags.writeable
    assert np.array_equal(loaded, array)


def test_buffers_of_a_packed_value_are_aligned_views_that_keep_the_memory_alive() -> None:
    arrays = [np.full(5000 + index, float(index)) for index in range(3)]
    serialized = packing.dumps_value(arrays)
    assert len(serialized.buffers) == 3
    payload = serialized.to_bytes()
    _, buffers = layout.split(memoryview(payload))
    base = np.frombuffer(payload, "u1").ctypes.data
    for buffer in buffers:
        assert (np.frombuffer(buffer, "u1").ctypes.data - base) % 64 == 0
    memory = packed_in_memory(serialized)
    loaded = packing.loads_packed(memory)
    loaded[1][0] = 77.0
    again = packing.loads_packed(memory)
    assert again[1][0] == 77.0, "a view, not a copy"
    del memory, again
    assert [part[-1] for part in loaded] == [0.0, 1.0, 2.0]


def test_each_load_of_one_payload_is_a_value_of_its_own() -> None:
    payload = packing.dumps_arguments((np.zeros(100_000), [1]), {}).to_bytes()
    (first, first_list), _ = packing.loads(payload)
    first[:] = 1
    first_list.append(2)
    (second, second_list), _ = packing.loads(payload)
    assert not second.any()
    assert second_list == [1]


def test_a_list_of_long_bytes_passed_twice_stays_one_list() -> None:
    items = [b"x" * BYTES_OUT_OF_BAND_MIN]
    (first, second), _ = packing.loads(packing.dumps_arguments((items, items), {}).to_bytes())
    assert first is second
    assert first == items


def test_pandas_frames_keep_their_buffers_out_of_band_and_come_back_writable() -> None:
    frame = pd.DataFrame({"a": np.arange(50_000), "b": np.arange(50_000.0)})
    frame["c"] = pd.date_range("2020", periods=50_000, freq="s")
    serialized = packing.dumps_value(frame)
    assert len(serialized.stream) < 5_000
    loaded = packing.loads(serialized.to_bytes())
    pd.testing.assert_frame_equal(loaded, frame)
    loaded.iloc[0, 0] = 5
    assert frame.iloc[0, 0] == 0


def test_arrow_tables_are_one_ipc_stream_read_in_place() -> None:
    table = pa.table({"a": np.arange(100_000), "b": [f"s{i}" for i in range(100_000)]})
    serialized = packing.dumps_value(table.slice(10, 50_000))
    assert len(serialized.buffers) == 1
    assert serialized.size_bytes < table.nbytes * 0.6, "only the rows of the slice travel"
    memory = packed_in_memory(serialized)
    loaded = packing.loads_packed(memory)
    assert loaded.equals(table.slice(10, 50_000))
    start = ctypes.addressof(memory)
    assert start <= loaded["a"].chunk(0).buffers()[1].address < start + ctypes.sizeof(memory)
    with pa.ipc.open_stream(pa.py_buffer(serialized.buffers[0])) as reader:
        assert reader.read_all().equals(loaded), "another Arrow reader can read the buffer"


def test_arrow_batches_and_dictionaries_survive() -> None:
    batch = pa.record_batch({"a": pa.array(["x", "y", "x"]).dictionary_encode()})
    loaded = packing.loads(packing.dumps_value([batch, pa.table({})]).to_bytes())
    assert isinstance(loaded[0], pa.RecordBatch) and loaded[0].equals(batch)
    assert loaded[1].equals(pa.table({}))


class Reference:
    """As the client's ObjectRef: known by three parts, captured when it is pickled."""

    def __init__(self, *identity: Any) -> None:
        self.identity = identity

    def __reduce__(self) -> Any:
        references.capture(self)
        return references.restore, self.identity


@pytest.fixture
def restored() -> Any:
    hooks = references._Hooks
    before = hooks.restore, hooks.escape, hooks.resolve  # the client's, if an earlier test has had one in this process
    references.set_restore_hook(Reference)
    yield None
    for put_back, hook in zip(
        (references.set_restore_hook, references.set_escape_hook, references.set_resolve_hook), before, strict=True
    ):
        put_back(hook)


def test_references_anywhere_in_a_value_are_captured(restored: None) -> None:
    reference = Reference("n1", "d1", 5)
    serialized = packing.dumps_arguments((1, {"deep": [reference]}), {"k": reference})
    assert serialized.references == (reference,)
    args, _ = packing.loads(serialized.to_bytes())
    assert args[1]["deep"][0].identity == ("n1", "d1", 5)
    assert packing.dumps_value(lambda: reference).references == (reference,)


def test_a_reference_that_the_user_pickles_himself_escapes(restored: None) -> None:
    escaped: list[Any] = []
    references.set_escape_hook(escaped.append)
    reference = Reference("n1", "d1", 6)
    with references.capture_references() as outer:
        with references.capture_references() as inner:
            pickle.dumps(reference)
        assert (outer, inner) == ([], [reference])
    assert escaped == []
    pickle.dumps(reference)
    assert escaped == [reference]


def test_a_failed_dump_ends_its_capture(restored: None) -> None:
    escaped: list[Any] = []
    references.set_escape_hook(escaped.append)
    with pytest.raises(TypeError):
        packing.dumps_value([Reference(1), (item for item in ())])
    pickle.dumps(Reference(2))
    assert len(escaped) == 1


def test_large_parts_of_arguments_are_stored_once_and_resolved(restored: None) -> None:
    stored: dict[int, Any] = {}

    def store(part: Any) -> Reference:
        stored[len(stored)] = part
        return Reference(len(stored) - 1)

    references.set_resolve_hook(lambda reference: stored[reference.identity[0]])
    array, table, data = np.arange(100_000.0), pa.table({"a": np.arange(100_000)}), b"x" * 200_000
    serialized = packing.dumps_arguments(
        (array, {"deep": [array, table]}, data, [data, 1], np.zeros(10)),
        {"k": data},
        large_bytes_min=100_000,
        store_large=store,
    )
    assert len(stored) == 3
    assert serialized.size_bytes < 2000
    assert len(serialized.stored) == 3
    assert set(serialized.stored) <= set(serialized.references)
    args, kwargs = packing.loads(serialized.to_bytes())
    assert np.array_equal(args[0], array) and args[1]["deep"][0] is args[0]
    assert args[1]["deep"][1].equals(table)
    assert args[2] == data == kwargs["k"] == args[3][0]


def test_a_part_that_the_caller_does_not_store_stays(restored: None) -> None:
    asked: list[Any] = []
    serialized = packing.dumps_arguments(
        (np.zeros(100_000), b"x" * 200_000), {}, large_bytes_min=100_000, store_large=asked.append
    )
    assert len(asked) == 2
    assert serialized.stored == ()
    args, _ = packing.loads(serialized.to_bytes())
    assert args[0].nbytes == 800_000 and args[1] == b"x" * 200_000


@pytest.mark.parametrize("payload", [b"CPK\x02" + bytes(40), b"garbage, and more than sixteen", b"CPK\x01"])
def test_bytes_that_are_no_payload_are_refused(payload: bytes) -> None:
    with pytest.raises(ValueError):
        packing.loads(payload)


def test_a_payload_cut_short_is_refused() -> None:
    payload = packing.dumps_value(np.zeros(10_000)).to_bytes()
    with pytest.raises(ValueError, match="cut"):
        packing.loads(payload[:-1])


def test_deep_recursion_is_a_pickling_error() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises((pickle.PicklingError, RecursionError)):
        packing.dumps_value(value)
    while value:  # freed piece by piece: freeing it at once recurses as deep
        value = value.pop()


@pytest.mark.parametrize("make", [multiprocessing.RLock, multiprocessing.Queue])
def test_a_lock_of_the_standard_librarys_says_which_to_use(make: Callable[[], Any]) -> None:
    shared = make()
    expected = "through inheritance; make it with clusterpool.multiprocessing"
    for dump in (lambda: packing.dumps_arguments((1, [shared]), {}), lambda: packing.dumps_value({"lock": shared})):
        with pytest.raises(RuntimeError, match=expected):
            dump()


def test_importing_the_package_imports_no_numerical_library() -> None:
    import subprocess
    import sys

    code = (
        "import sys; import clusterpool.serialization.packing, clusterpool.serialization.exceptions;"
        "print([n for n in ('numpy', 'pandas', 'pyarrow', 'redis', 'zmq', 'xxhash') if n in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
