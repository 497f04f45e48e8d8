"""`Value`, `Array` and their raw kin: ctypes objects in memory that the processes of a host share.

With a lock they can be used on every node: whoever acquires the lock sees what its last holder left. Without one they
cannot leave their host. They can be pickled at any time.
Source: https://docs.python.org/3/library/multiprocessing.html#shared-ctypes-objects
"""

from __future__ import annotations

import copyreg
import ctypes
import multiprocessing.sharedctypes as _standard
import weakref
from collections.abc import Sequence
from typing import Any

from clusterpool.client.cell import Cell
from clusterpool.client.semaphore import Semaphore
from clusterpool.multiprocessing.synchronize import RLock

__all__ = ["Array", "RawArray", "RawValue", "Value", "copy", "synchronized"]

typecode_to_type: dict[str, Any] = vars(_standard)["typecode_to_type"]
make_property: Any = vars(_standard)["make_property"]

_classes: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()  # of structures: their Synchronized ones


def RawValue(typecode_or_type: Any, *args: Any) -> Any:  # noqa: N802 (the standard library's name)
    """A ctypes object in shared memory, made with `args`."""
    value = _new_value(_type_of(typecode_or_type))
    value.__init__(*args)
    return value


def RawArray(typecode_or_type: Any, size_or_initializer: int | Sequence[Any]) -> Any:  # noqa: N802
    """A ctypes array in shared memory, of zeros or with these values."""
    item_type = _type_of(typecode_or_type)
    if isinstance(size_or_initializer, int):
        return _new_value(item_type * size_or_initializer)
    array = _new_value(item_type * len(size_or_initializer))
    array.__init__(*size_or_initializer)
    return array


def Value(typecode_or_type: Any, *args: Any, lock: Any = True, ctx: Any = None) -> Any:  # noqa: N802
    """A ctypes object in shared memory with a lock: its own, the one given, or none if `lock` is False."""
    return _locked(RawValue(typecode_or_type, *args), lock)


def Array(  # noqa: N802
    typecode_or_type: Any, size_or_initializer: int | Sequence[Any], *, lock: Any = True, ctx: Any = None
) -> Any:
    """A ctypes array in shared memory with a lock: its own, the one given, or none if `lock` is False."""
    return _locked(RawArray(typecode_or_type, size_or_initializer), lock)


def copy(obj: Any) -> Any:
    """A copy of a ctypes object, in shared memory."""
    made = _new_value(type(obj))
    ctypes.pointer(made)[0] = obj
    return made


def synchronized(obj: Any, lock: Any = None, ctx: Any = None) -> Any:
    """A wrapper for a ctypes object that holds `lock` (by default an RLock of its own) at each access."""
    assert not isinstance(obj, _standard.SynchronizedBase), "object already synchronized"
    if isinstance(obj, ctypes._SimpleCData):
        return Synchronized(obj, lock)
    if isinstance(obj, ctypes.Array):
        return SynchronizedString(obj, lock) if obj._type_ is ctypes.c_char else SynchronizedArray(obj, lock)
    kind = type(obj)
    if kind not in _classes:
        fields = {name: make_property(name) for name, *_ in kind._fields_}
        _classes[kind] = type(f"Synchronized{kind.__name__}", (SynchronizedBase,), fields)
    return _classes[kind](obj, lock)


class SynchronizedBase(_standard.SynchronizedBase):  # type: ignore[type-arg]
    """A ctypes object with a lock; `get_lock()` must be held for what is done to `get_obj()`."""

    _obj: Any
    _lock: Any

    def __init__(self, obj: Any, lock: Any = None, ctx: Any = None) -> None:
        super().__init__(obj, lock or RLock())
        cell = getattr(obj, "_wrapper", None)
        semaphore = _semaphore_of(self._lock)
        if isinstance(cell, Cell) and semaphore is not None:
            cell.guard_by(semaphore)

    def __reduce__(self) -> tuple[Any, ...]:
        return synchronized, (self._obj, self._lock)


class Synchronized(SynchronizedBase, _standard.Synchronized):  # type: ignore[type-arg]
    """A number, by its `value`."""


class SynchronizedArray(SynchronizedBase, _standard.SynchronizedArray):  # type: ignore[type-arg]
    """An array, by index and slice; the lock is held for each access."""


class SynchronizedString(SynchronizedArray, _standard.SynchronizedString):
    """An array of characters, also by its `value`, which ends at the first zero, and `raw`."""


def _type_of(typecode_or_type: Any) -> Any:
    return typecode_to_type.get(typecode_or_type, typecode_or_type)


def _new_value(kind: Any) -> Any:
    return _in_cell(kind, Cell(ctypes.sizeof(kind)))


def _locked(obj: Any, lock: Any) -> Any:
    if lock is False:
        return obj
    if lock is True or lock is None:
        lock = RLock()
    if not hasattr(lock, "acquire"):
        raise AttributeError(f"{lock!r} has no method 'acquire'")
    return synchronized(obj, lock)


def _semaphore_of(lock: Any) -> Semaphore | None:
    """What is acquired with `lock`: a lock of ours, or a condition with one. None for others, such as `threading`'s."""
    semaphore = getattr(getattr(lock, "_lock", lock), "_semlock", None)
    return semaphore if isinstance(semaphore, Semaphore) else None


# --- pickling


def _in_cell(kind: Any, cell: Cell) -> Any:
    # By the pickler's table: the types are ctypes' own, which pickle by value.
    copyreg.pickle(kind, _reduce)
    obj = kind.from_buffer(cell.create_memoryview())
    obj._wrapper = cell
    return obj


def _reduce(obj: Any) -> Any:
    cell = getattr(obj, "_wrapper", None)
    if isinstance(cell, Cell):
        return _rebuild, (*_described(type(obj)), cell)
    if cell is not None:  # the standard library's
        return vars(_standard)["reduce_ctype"](obj)
    return obj.__reduce_ex__(2)


def _described(kind: Any) -> tuple[Any, tuple[int, ...]]:
    """A type that can be pickled by its name, and the lengths of the arrays around it, from within."""
    lengths: list[int] = []
    while issubclass(kind, ctypes.Array):
        lengths.append(kind._length_)
        kind = kind._type_
    return kind, tuple(reversed(lengths))


def _rebuild(kind: Any, lengths: tuple[int, ...], cell: Cell) -> Any:
    for length in lengths:
        kind = kind * length
    return _in_cell(kind, cell)
