"""Which version of a global, or of a class, was shipped: tokens that change only when its maker changes it.

Without them a worker could not tell `x` shipped again because another function uses it too (keep what is
there: an initializer may have filled it) from `x` shipped again because the user's program gave it a new
value (take it).

    driver                                worker
    STATE = {}           -- token A -->   STATE = {}           absent: set, remember A
                                          STATE["m"] = load()  the initializer fills it in place
    (another function)   -- token A -->   the same A: keep
    STATE = {"k": 1}     -- token B -->   the present value is the one shipped last: set, remember B
                                          global STATE; STATE = 5
    STATE = {}           -- token C -->   the worker gave it a value of its own: keep
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import types
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any

from clusterpool.serialization import references

# A mutable value whose plain pickle is larger is looked at once in a while only when a cached definition is checked
# (`Looks`): for each task, a digest of more would take longer than the call is worth.
CONTENT_CHECK_BYTES_MAX = 65_536

ABSENT = object()

_IMMUTABLE = frozenset({int, float, complex, str, bytes, bool, type(None), type(Ellipsis), range, slice})
_IDENTITY_ONLY = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
# Nothing weak can point to these, and a strong reference would keep the class that they belong to alive for
# ever.
_DESCRIPTORS = (property, staticmethod, classmethod, types.MemberDescriptorType, types.GetSetDescriptorType)


def new_token() -> str:
    """16 hexadecimal digits that no other process makes: forks of the zygote must not share a counter."""
    return os.urandom(8).hex()


def hold(value: Any) -> Callable[[Any], bool]:
    """A test for being the very same object, which keeps `value` alive only where it must."""
    if isinstance(value, _DESCRIPTORS):
        identity = id(value)
        return lambda other: id(other) == identity
    try:
        reference = weakref.ref(value)
    except TypeError:
        return lambda other: other is value
    return lambda other: reference() is other


def content_of(value: Any) -> tuple[bytes, int] | None:
    """Digest and size of a mutable value's plain pickle; None for what is compared by identity only.

    Callables and classes are: plain pickle writes no more than their names. So is what plain pickle refuses.
    """
    if type(value) in _IMMUTABLE or isinstance(value, _IDENTITY_ONLY) or callable(value):
        return None
    import xxhash

    buffers: list[pickle.PickleBuffer] = []
    try:
        with references.capture_references(is_sent=False):  # so no reference escapes
            stream = pickle.dumps(value, 5, buffer_callback=buffers.append)
        hasher = xxhash.xxh3_128(stream)
        size = len(stream)
        for buffer in buffers:
            raw = buffer.raw()
            hasher.update(raw)
            size += raw.nbytes
    except Exception:  # the user's own __reduce__ may raise anything; identity is then all there is
        return None
    return bytes(hasher.digest()), size


class Looks:
    """When large values are looked at again: when something begins that has to see what was changed in place.

    With the standard library and with loky that is: new workers, a `Process`, a call of joblib's.
    """

    def __init__(self) -> None:
        self.number = 0

    def look_anew(self) -> None:
        """From now on every large value is looked at again, once for each definition that was made from it."""
        self.number += 1


looks = Looks()


class Dependency:
    """One value that a shipped definition was made from, and whether it still is the value."""

    __slots__ = ("_digest", "_is_large", "_is_same", "_look", "_read")

    def __init__(self, read: Callable[[], Any], value: Any) -> None:
        self._read = read
        self._is_same = hold(value)
        content = content_of(value)
        self._digest = content[0] if content is not None else None
        self._is_large = content is not None and content[1] > CONTENT_CHECK_BYTES_MAX
        self._look = looks.number

    def is_current(self) -> bool:
        """Same object, and for what can change in place: same content (of large ones: when looked at last)."""
        value = self._read()
        if not self._is_same(value):
            return False
        look = looks.number
        if self._digest is None or (self._is_large and self._look == look):
            return True
        content = content_of(value)
        if content is None or content[0] != self._digest:
            return False
        self._look = look
        return True


def global_dependency(namespace: Mapping[str, Any], name: str) -> Dependency:
    """On the global `name`, absent ones included: a helper may be defined after the first call."""
    return Dependency(lambda: namespace.get(name, ABSENT), namespace.get(name, ABSENT))


def cell_dependency(cell: types.CellType) -> Dependency:
    """On a variable of the enclosing function."""

    def read() -> Any:
        try:
            return cell.cell_contents
        except ValueError:  # not assigned yet
            return ABSENT

    return Dependency(read, read())


class _Version:
    """A value that was shipped from or to here, and the token that it has everywhere."""

    __slots__ = ("digest", "is_same", "token")

    def __init__(self, value: Any, token: str, digest: bytes | None) -> None:
        self.is_same = hold(value)
        self.token = token
        self.digest = digest  # None: arrived here, and not looked at yet


class VersionTable:
    """Tokens of globals and of classes, on the side that ships and on the side that loads.

    Threads: every method may be called from any.
    """

    def __init__(self) -> None:
        self._by_name: dict[tuple[str, str], _Version] = {}
        self._by_class: dict[int, tuple[str, dict[str, Any]]] = {}  # removed when the class dies
        self._arrays_by_class: dict[int, tuple[int, dict[str, Any]]] = {}  # when looked at, and what large ones held
        self._lock = threading.RLock()
        self.made_count = 0  # tokens made here; a definition that needed none is as it arrived

    def token_to_ship(self, namespace: str, name: str, value: Any) -> str:
        """The token of a global about to be shipped: a new one for another object or another content."""
        content = content_of(value)
        digest = content[0] if content is not None else None
        with self._lock:
            version = self._by_name.get((namespace, name))
            if version is not None and version.is_same(value) and (version.digest is None or version.digest == digest):
                version.digest = digest
                return version.token
            token = new_token()
            self.made_count += 1
            self._by_name[namespace, name] = _Version(value, token, digest)
            return token

    def should_take(self, namespace: str, name: str, present: Any, token: str) -> bool:
        """Whether a global that arrives with `token` replaces the `present` value (see the diagram)."""
        version = self._by_name.get((namespace, name))
        return version is not None and version.token != token and version.is_same(present)

    def arrived(self, namespace: str, name: str, value: Any, token: str) -> None:
        """Remember that `value` was put into the namespace under this token."""
        with self._lock:
            self._by_name[namespace, name] = _Version(value, token, None)

    def class_to_ship(self, cls: type) -> str:
        """The token of a class: a new one once an attribute of it was set, replaced or deleted."""
        attributes = _attributes(cls)
        with self._lock:
            record = self._by_class.get(id(cls))
            if record is not None and record[1] == attributes and not self._has_other_arrays(cls):
                return record[0]
            self.made_count += 1
            self._arrays_by_class[id(cls)] = looks.number, _large_arrays(cls)
            return self._remember_class(cls, new_token(), attributes)

    def _has_other_arrays(self, cls: type) -> bool:
        """Whether a large array of the class was changed in place, as far as a look at it is due (`Looks`)."""
        looked, contents = self._arrays_by_class.get(id(cls), (looks.number, {}))
        if looked == looks.number:
            return False
        self._arrays_by_class[id(cls)] = looks.number, contents
        return _large_arrays(cls) != contents

    def class_arrived(self, cls: type, token: str, changed: Collection[str] = ()) -> None:
        """Remember the attributes that the class has now that it was filled with the state of this token.

        Those in `changed` were left as code here has set them, and stay known as changed.
        """
        attributes = _attributes(cls)
        with self._lock:
            before = self._by_class[id(cls)][1] if changed else {}
            for name in changed:
                attributes.pop(name, None)
                if name in before:
                    attributes[name] = before[name]
            self._remember_class(cls, token, attributes)

    def class_token(self, cls: type) -> str | None:
        """The token that the class was last shipped or filled with; None for one that was neither."""
        record = self._by_class.get(id(cls))
        return record[0] if record is not None else None

    def changed_attributes(self, cls: type) -> set[str]:
        """The attributes that code here has set, or changed in place, since the class was filled."""
        record = self._by_class.get(id(cls))
        if record is None:
            return set()
        now = _attributes(cls)
        return {name for name in now.keys() | record[1].keys() if now.get(name) != record[1].get(name)}

    def _remember_class(self, cls: type, token: str, attributes: dict[str, Any]) -> str:
        # By number, not in a WeakKeyDictionary: a metaclass may define its own __eq__ and __hash__.
        key = id(cls)
        if key not in self._by_class:
            weakref.finalize(cls, self._forget_class, key).atexit = False
        self._by_class[key] = (token, attributes)
        return token

    def _forget_class(self, key: int) -> None:
        self._by_class.pop(key, None)
        self._arrays_by_class.pop(key, None)


# Python itself adds these when they are first looked at, or they hold caches: no change that anybody made.
_ATTRIBUTES_IGNORED = frozenset(
    {
        "__annotations__",
        "__annotate__",
        "__annotate_func__",
        "__annotations_cache__",
        "__dict__",
        "__weakref__",
    }
    | {
        "__slotnames__",
        "_abc_impl",
        "__abstractmethods__",
        "__firstlineno__",
        "__static_attributes__",
        "__type_params__",
    }
)


def _attributes(cls: type) -> dict[str, Any]:
    # Numbers are enough: while the class has the attribute, nothing else can have its number.
    attributes: dict[str, Any] = {}
    for name, value in vars(cls).items():
        if name in _ATTRIBUTES_IGNORED:
            continue
        attributes[name] = id(value)
        if _is_array(value):
            is_compared = value.nbytes <= CONTENT_CHECK_BYTES_MAX
        else:
            is_compared = type(value) in (list, dict, set) and not (name.startswith("_") and name.endswith("_"))
        if is_compared:
            attributes[name] = (id(value), content_of(value))
    return attributes


def _large_arrays(cls: type) -> dict[str, Any]:
    return {
        name: content_of(value)
        for name, value in vars(cls).items()
        if _is_array(value) and value.nbytes > CONTENT_CHECK_BYTES_MAX
    }


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) is getattr(numpy, "ndarray", None)
