"""Exceptions of tasks, as bytes and back: type, arguments and the text of the remote traceback.

The standard library pickles exceptions by their arguments, which fails, or silently garbles the message, for
classes whose `__init__` takes others. So the sending side tries the round trip, and sends what the type is
filled from as well:

    1. the exception's own pickle, where a round trip gave an equal one;
    2. its type, arguments and attributes, each pickled alone, put together without running `__init__`;
    3. a stand-in: a class with the name and text of the original, under the nearest base that the receiver
    has.
"""

from __future__ import annotations

import importlib
import io
import pickle
import traceback
import types
from pathlib import Path
from typing import Any

import msgspec

from clusterpool import errors
from clusterpool.serialization.functions import DESCRIPTOR_MODULES, ShippingPickler

_PACKAGE_FOLDER = str(Path(__file__).resolve().parents[1])
_FAILED = object()
_REPR_MAX = 1000  # characters: it is read by people
_NESTED_MAX = 8  # exceptions inside exceptions' arguments (groups): deeper ones are sent as text


class RemoteTraceback(Exception):
    """The cause of each exception that comes from a worker; its text is the traceback there.

    Source: `multiprocessing.pool.RemoteTraceback`, whose form and `tb` attribute it has.
    """

    def __init__(self, tb: str) -> None:
        super().__init__(tb)
        self.tb = tb

    def __str__(self) -> str:
        return self.tb


class _Part(msgspec.Struct, array_like=True):
    """An argument of an exception: its pickle, or a nested exception, or a text where it has neither."""

    pickled: bytes | None = None
    nested: _Remains | None = None
    nested_list: list[_Remains] | None = None
    text: str = ""


class _Remains(msgspec.Struct, array_like=True):
    """What an exception is made from again."""

    whole: bytes | None  # its own pickle, if that gives an equal one
    kind: bytes | None  # its type's pickle
    names: list[tuple[str, str]]  # module and qualified name of its type and that one's bases, nearest first
    text: str
    args: list[_Part]
    attributes: dict[str, bytes]  # those that can be pickled


class _Sent(msgspec.Struct, array_like=True):
    """The payload of an exception."""

    remains: _Remains
    traceback: str


def dump_exception(exc: BaseException, *, node_id: str, pid: int, task_name: str) -> bytes:
    """The exception as bytes for `load_exception`; never raises, whatever the exception holds."""
    text = _format_traceback(exc)
    where = f"in process {pid} on node {node_id}"
    if task_name:
        where += f", task {task_name}"
    return msgspec.msgpack.encode(_Sent(_take_apart(exc, 0), f'\n"""\n{text}({where})\n"""'))


def load_exception(payload: bytes | memoryview) -> BaseException:
    """The exception in a payload, with a `RemoteTraceback` as its `__cause__`.

    Raises: errors.ProtocolError for bytes that are no payload of `dump_exception`.
    """
    try:
        sent = msgspec.msgpack.decode(payload, type=_Sent)
    except msgspec.MsgspecError as exc:
        raise errors.ProtocolError(f"no exception of a task: {exc}") from exc
    exception = _put_together(sent.remains)
    exception.__cause__ = RemoteTraceback(sent.traceback)
    return exception


def unpicklable_result(value: Any, error: BaseException) -> errors.SerializationFailed:
    """The error of a task whose result, `value`, raised `error` when it was pickled."""
    return errors.SerializationFailed(
        f"the result of the task, {_safe_repr(value)}, could not be pickled: {_describe(error)}; return "
        "something that can be (no locks, sockets, open files or running generators)",
        reason=_describe(error),
        value_repr=_safe_repr(value),
    )


def make_stand_in(base: type[BaseException], module: str, qualname: str, text: str, notes: Any) -> BaseException:
    """An exception under `base` for one whose own class is not to be had; named in pickles."""

    def reduce(self: BaseException) -> Any:
        return make_stand_in, (base, module, qualname, text, getattr(self, "__notes__", None))

    kind: type[BaseException] = type(
        qualname.rpartition(".")[2],
        (base,),
        {
            "__module__": module,
            "__qualname__": qualname,
            "__doc__": "Stands in for an exception whose own class could not be loaded here.",
            "__str__": lambda self: text,
            "__reduce__": reduce,
        },
    )
    exception = kind.__new__(kind, text)
    exception.args = (text,)
    if notes:
        _set_notes(exception, list(notes))
    return exception


def _take_apart(exc: BaseException, depth: int) -> _Remains:
    kind = type(exc)
    whole = _pickle(exc)
    if whole is not None and not _survives(exc, whole):
        whole = None
    remains = _Remains(
        whole=whole,
        kind=None,
        names=[(str(base.__module__), base.__qualname__) for base in kind.__mro__ if issubclass(base, BaseException)],
        text=_safe_str(exc),
        args=[],
        attributes={},
    )
    # The pickle may fail over there all the same, but then so does the type's; the texts above are left for
    # that.
    if whole is None:
        remains.kind = _pickle(kind)
        remains.args = [_take_part(item, depth) for item in exc.args]
        for name, value in _attributes(exc).items():
            pickled = _pickle(value)
            if pickled is not None and _load(pickled) is not _FAILED:
                remains.attributes[name] = pickled
    elif getattr(exc, "__notes__", None):
        remains.attributes["__notes__"] = _pickle(getattr(exc, "__notes__")) or b""  # noqa: B009
    return remains


def _take_part(item: Any, depth: int) -> _Part:
    pickled = _pickle(item)
    if pickled is not None and _load(pickled) is not _FAILED:
        return _Part(pickled=pickled)
    if depth < _NESTED_MAX:
        if isinstance(item, BaseException):
            return _Part(nested=_take_apart(item, depth + 1))
        if isinstance(item, (list, tuple)) and item and all(isinstance(one, BaseException) for one in item):
            return _Part(nested_list=[_take_apart(one, depth + 1) for one in item])
    return _Part(text=_safe_repr(item))


def _put_together(remains: _Remains) -> BaseException:
    exception = _load(remains.whole) if remains.whole is not None else _assemble(remains)
    if isinstance(exception, BaseException):
        return exception
    notes = _load(remains.attributes.get("__notes__"))
    notes = notes if isinstance(notes, list) else None
    for module, qualname in remains.names[1:]:
        base = _find_class(module, qualname)
        if base is None:
            continue
        try:
            return make_stand_in(base, *remains.names[0], remains.text, notes)
        except Exception:  # a base whose __new__ wants other arguments (exception groups do): take the next one
            continue
    return make_stand_in(Exception, *remains.names[0], remains.text, notes)


def _assemble(remains: _Remains) -> BaseException | None:
    kind = _load(remains.kind)
    if not isinstance(kind, type) or not issubclass(kind, BaseException):
        return None
    args = tuple(_load_part(part) for part in remains.args)
    try:
        # Not __init__, which wants the arguments that the user's code gave it, and nobody knows any more.
        exception = kind.__new__(kind, *args)
        exception.args = args
        for name, pickled in remains.attributes.items():
            value = _load(pickled)
            if name == "__notes__":
                _set_notes(exception, value)
            else:
                object.__setattr__(exception, name, value)
    except Exception:  # a __new__ of the user's own, or an attribute that is read-only
        return None
    return exception


def _set_notes(exception: BaseException, notes: Any) -> None:
    setattr(exception, "__notes__", notes)  # noqa: B010 - Python 3.10 knows no such attribute


def _load_part(part: _Part) -> Any:
    if part.pickled is not None:
        return _load(part.pickled)
    if part.nested is not None:
        return _put_together(part.nested)
    if part.nested_list is not None:
        return [_put_together(one) for one in part.nested_list]
    return part.text


def _survives(exc: BaseException, pickled: bytes) -> bool:
    """Whether the pickle gives the same exception, not one with its message built twice."""
    copy = _load(pickled)
    kind = type(exc)
    if type(copy) is not kind:
        return False
    if not isinstance(kind.__init__, types.FunctionType) and not isinstance(kind.__new__, types.FunctionType):
        return True  # nothing of the user's runs, so nothing can garble it
    try:
        return bool(copy.args == exc.args) or repr(copy.args) == repr(exc.args)
    except Exception:  # arguments whose comparison is no truth value, such as arrays
        return len(copy.args) == len(exc.args) and _safe_str(copy) == _safe_str(exc)


def _attributes(exc: BaseException) -> dict[str, Any]:
    attributes = dict(getattr(exc, "__dict__", {}))
    for kind in type(exc).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(exc, name):
                attributes[name] = getattr(exc, name)
    return attributes


def _pickle(value: Any) -> bytes | None:
    try:
        # References that an exception holds escape, so that their owners keep the objects.
        with io.BytesIO() as file:
            pickler = ShippingPickler(file)
            # Not with `multiprocessing`'s ways for sockets and connections: what they give can be loaded only once, and
            # here it is loaded to see whether it can be.
            table = pickler.dispatch_table
            pickler.dispatch_table = {kind: table[kind] for kind in table if kind.__module__ not in DESCRIPTOR_MODULES}
            pickler.dump(value)
            return file.getvalue()
    except BaseException:  # whatever the user's __reduce__ raises, an exit too: the caller has another way
        return None


def _load(pickled: bytes | None) -> Any:
    if pickled is None:
        return _FAILED
    try:
        return pickle.loads(pickled)
    except BaseException:  # the same for loading
        return _FAILED


def _find_class(module: str, qualname: str) -> type[BaseException] | None:
    try:
        found: Any = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except Exception:  # the receiver lacks the module, or its import fails there
        return None
    return found if isinstance(found, type) and issubclass(found, BaseException) else None


def _format_traceback(exc: BaseException) -> str:
    tb = exc.__traceback__
    # The frames of the worker itself say nothing to the user. An error that is our own keeps them.
    while tb is not None and tb.tb_frame.f_code.co_filename.startswith(_PACKAGE_FOLDER):
        tb = tb.tb_next
    try:
        return _encodable("".join(traceback.format_exception(type(exc), exc, tb or exc.__traceback__)))
    except BaseException:  # an exception whose attributes raise when they are looked at
        return _describe(exc) + "\n"


def _safe_str(value: Any) -> str:
    try:
        return _encodable(str(value))
    except BaseException:
        return f"<{type(value).__qualname__} whose text could not be made>"


def _safe_repr(value: Any) -> str:
    try:
        text = _encodable(repr(value))
    except BaseException:
        return f"<{type(value).__qualname__} object>"
    return text if len(text) <= _REPR_MAX else text[:_REPR_MAX] + "..."


def _encodable(text: str) -> str:
    # A file name that is no UTF-8 has lone surrogates in its text, which no message can carry.
    return text.encode("utf-8", "backslashreplace").decode()


def _describe(error: BaseException) -> str:
    return f"{type(error).__qualname__}: {_safe_str(error)}"
