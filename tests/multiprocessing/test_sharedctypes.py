"""Values and arrays in memory that the processes of a host share."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import multiprocessing.sharedctypes as standard
import pickle
import threading
from typing import Any

import cloudpickle
import pytest

import clusterpool
from clusterpool.multiprocessing.heap import BufferWrapper
from clusterpool.multiprocessing.sharedctypes import Array, RawArray, RawValue, Value, copy, synchronized
from clusterpool.multiprocessing.synchronize import Condition, Lock, RLock
from clusterpool.processes.thin_files import remove_thin_files
from tests.conftest import segment_names


class Point(ctypes.Structure):
    _fields_ = [("x", ctypes.c_int), ("y", ctypes.c_double)]


@pytest.fixture(scope="module", autouse=True)
def _cluster(cluster: None) -> None:
    """Of this module."""


@pytest.fixture(autouse=True)
def _nothing_pickled_stays() -> Any:
    """What was pickled lives until its job ends, which is the module's."""
    yield
    gc.collect()
    remove_thin_files(clusterpool.node_id())


@pytest.mark.parametrize(("code", "value"), [("i", -7), ("d", 2.5), ("q", 1 << 40), ("c", b"x"), (ctypes.c_bool, True)])
def test_a_value(code: Any, value: Any) -> None:
    made = Value(code, value)
    assert made.value == value
    assert isinstance(made, standard.Synchronized)
    raw = RawValue(code)
    raw.value = value
    assert raw.value == value and not hasattr(raw, "get_lock")


def test_arrays() -> None:
    made = Array("i", [1, 2, 3])
    made[1:] = [5, 6]
    assert (list(made), len(made), made[1]) == ([1, 5, 6], 3, 5)
    assert list(RawArray("d", 3)) == [0.0, 0.0, 0.0]
    assert len(RawArray("d", 0)) == 0
    text = Array("c", b"hello")
    text.value = b"bye"
    assert (text.value, text.raw) == (b"bye", b"bye\0o")


def test_a_structure_has_its_fields() -> None:
    made = Value(Point, 1, 2.5)
    made.x += 1
    assert (made.x, made.y) == (2, 2.5)
    assert type(made).__name__ == "SynchronizedPoint"
    assert type(Value(Point)) is type(made)
    other = copy(made.get_obj())
    made.x = 9
    assert other.x == 2


def test_locks_are_those_that_were_given() -> None:
    lock = Lock()
    assert Value("i", lock=lock).get_lock() is lock
    assert isinstance(Value("i", lock=None).get_lock(), RLock)
    assert isinstance(Value("i").get_lock(), RLock)
    foreign = threading.Lock()
    assert Array("i", 2, lock=foreign).get_lock() is foreign
    assert not hasattr(Value("i", lock=False), "get_lock")
    with pytest.raises(AttributeError, match="'no lock' has no method 'acquire'"):
        Value("i", lock="no lock")
    with pytest.raises(AssertionError, match="already synchronized"):
        synchronized(Value("i"))
    condition = Condition()
    assert Value("i", lock=condition)._obj._wrapper.guard is condition._lock._semlock


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
@pytest.mark.parametrize(
    ("maker", "write", "read"),
    [
        (lambda: Value("i"), lambda made: setattr(made, "value", 4), lambda made: made.value),
        (lambda: RawValue("i"), lambda made: setattr(made, "value", 4), lambda made: made.value),
        (lambda: Array("d", 3), lambda made: made.__setitem__(1, 4), lambda made: made[1]),
        (lambda: RawArray(ctypes.c_int * 2, 3), lambda made: made[2].__setitem__(1, 4), lambda made: made[2][1]),
        (lambda: Value(Point), lambda made: setattr(made, "x", 4), lambda made: made.x),
    ],
)
def test_a_pickled_copy_is_the_same_memory(dumps: Any, maker: Any, write: Any, read: Any) -> None:
    made = maker()
    again = pickle.loads(dumps(made))
    write(made)
    assert read(again) == 4
    assert type(again) is type(made)


def test_other_ctypes_objects_pickle_as_before() -> None:
    RawValue("i")
    assert pickle.loads(pickle.dumps(ctypes.c_int(5))).value == 5
    with pytest.raises(RuntimeError, match="inheritance"):  # the standard library's
        pickle.dumps(standard.RawValue("i"))


def test_collected_nothing_is_left() -> None:
    def own_names() -> list[str]:
        return [name for name in segment_names() if f"clusterpool-{clusterpool.node_id()}-" in name]

    made = [Value("i"), Array("d", 10), RawValue("i"), RawArray("c", 10), BufferWrapper(10)]
    view = made[1].get_obj()
    assert len(own_names()) == 5 + 2
    del made
    gc.collect()
    assert len(own_names()) == 2, "the array is still in use, and its lock with it"
    view[3] = 4
    del view
    gc.collect()
    assert own_names() == []


def test_thousands_of_values_need_no_descriptors() -> None:
    values = [RawValue("i", number) for number in range(3000)]
    assert [value.value for value in values] == list(range(3000))


def double(value: Any, array: Any, raw: Any) -> None:
    with value.get_lock():
        value.value *= 2
    for index in range(len(array)):
        array[index] *= 2
    raw.value *= 2


def test_processes_change_them() -> None:
    value, array, raw = Value("i", 3), Array("d", [1, 2]), RawValue("q", 5)
    with clusterpool.Pool(1) as pool:
        pool.apply(double, (value, array, raw))
    assert (value.value, list(array), raw.value) == (6, [2, 4], 10)
    process = multiprocessing.get_context("spawn").Process(target=double, args=(value, array, raw))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert (value.value, list(array), raw.value) == (12, [4, 8], 20)
