"""How a call becomes a task: the function is shipped once, the arguments are pickled at the call."""

from __future__ import annotations

import contextlib
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from clusterpool.client.object_ref import ObjectRef
from clusterpool.client.values import INLINE_BYTES_MAX, LARGE_BYTES_MIN
from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.dispatch import Task
from clusterpool.core.messages import Reference, TaskExtras, TaskKind, TaskSpec
from clusterpool.serialization.digests import content_digest, is_immutable
from clusterpool.serialization.functions import ShippedFunction, ship_function
from clusterpool.serialization.packing import Serialized, dumps_arguments, dumps_value

if TYPE_CHECKING:
    from clusterpool.client.client import Client
    from clusterpool.client.values import Values

# Programs that submit a fresh lambda each time must not fill the memory with functions.
FUNCTIONS_MAX = 512
STORED_ARGUMENTS_MAX = 64
_TABLED = (types.FunctionType, types.BuiltinFunctionType, type)
_EMPTY: dict[str, Any] = {}


class Slot:
    """Stands in a pickled argument list for the value of an ObjectRef, which the task gets instead."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __reduce__(self) -> tuple[Any, ...]:
        return Slot, (self.index,)


class FunctionTable:
    """The functions that one worker set has been told of, by identity."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._entries: OrderedDict[int, tuple[Any, int, ShippedFunction]] = OrderedDict()  # by id of the callable

    def number_of(self, function: Callable[..., Any]) -> int:
        """The function's number, pickling it now if it is new or has changed.

        Raises: what pickle raises.
        """
        entry = self._entries.get(id(function))
        if entry is not None and entry[2].is_current():
            return entry[1]
        shipped = ship_function(function)
        number = next(self._client.numbers)
        self._client.handle_event(e.FunctionAdded(number, shipped.payload))
        # The entry keeps the function alive, so that its id stays its own.
        self._entries[id(function)] = (function, number, shipped)
        if len(self._entries) > FUNCTIONS_MAX:
            self._entries.popitem(last=False)
        return number


class StoredArguments:
    """Large parts of arguments that are in the store already, so that each is stored once.

    By identity where nobody can change them, by content otherwise.
    """

    def __init__(self, client: Client, values: Values) -> None:
        self._client = client
        self._values = values
        self._by_id: OrderedDict[int, tuple[Any, ObjectRef]] = OrderedDict()
        self._by_content: OrderedDict[bytes, ObjectRef] = OrderedDict()
        self._call = threading.local()

    @contextlib.contextmanager
    def one_call(self) -> Iterator[None]:
        """Within one call of the user's, an object that is met again has not changed."""
        self._call.known = {}
        try:
            yield
        finally:
            self._call.known = None

    def reference_to(self, value: Any) -> ObjectRef | None:
        """A reference to a stored copy of `value`; None leaves it where it is."""
        in_call: dict[int, tuple[Any, ObjectRef]] | None = getattr(self._call, "known", None)
        if in_call is not None and id(value) in in_call:
            return in_call[id(value)][1]
        known = self._by_id.get(id(value))
        if known is not None and known[0] is value:
            return known[1]
        is_fixed = is_immutable(value)
        digest = None if is_fixed else content_digest(value)
        reference = self._by_content.get(digest) if digest is not None else None
        if reference is None:
            reference = put_value(self._client, self._values, value)
        if is_fixed:
            self._by_id[id(value)] = (value, reference)
            _trim(self._by_id)
        elif digest is not None:
            self._by_content[digest] = reference
            self._by_content.move_to_end(digest)
            _trim(self._by_content)
        if in_call is not None:
            in_call[id(value)] = (value, reference)
        return reference

    def clear(self) -> None:
        """Forget everything: the references go, and the copies with them."""
        self._by_id.clear()
        self._by_content.clear()


def _trim(entries: OrderedDict[Any, Any]) -> None:
    while len(entries) > STORED_ARGUMENTS_MAX:
        entries.popitem(last=False)


def put_value(client: Client, values: Values, value: Any) -> ObjectRef:
    """Make a value an object of this process.

    Raises: what pickle raises; ObjectTooLarge, StoreFull.
    """
    serialized = dumps_value(value)
    number = next(client.numbers)
    references = [reference.part for reference in serialized.references]
    if references:
        client.handle_event(e.ReferencesMade(references))
    part = values.part_of(serialized, values.new_object_id(number), references)
    client.handle_event(e.ValuePut(number, part))
    return ObjectRef(client, client.address, number, is_counted=True)


class TaskMaker:
    """Makes tasks of calls, for one client."""

    def __init__(self, client: Client, values: Values) -> None:
        self._client = client
        self._values = values
        self.stored = StoredArguments(client, values)

    def call(
        self,
        table: FunctionTable,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        sink: Any,
        index: int,
        *,
        retries: int = 0,
        extras: TaskExtras | None = None,
        kind: int = TaskKind.CALL,
    ) -> tuple[Task, e.TaskArguments | None]:
        """A task that calls `function`; with its references when it has any.

        Raises: what pickle raises; ObjectTooLarge, StoreFull when a large argument cannot be stored.
        """
        if isinstance(function, _TABLED):
            number = table.number_of(function)
        else:
            number, args = 0, (function, *args)
        return self.task(number, args, kwargs, sink, index, retries=retries, extras=extras, kind=kind)

    def task(
        self,
        function: int,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        sink: Any,
        index: int,
        *,
        retries: int = 0,
        extras: TaskExtras | None = None,
        kind: int = TaskKind.CALL,
    ) -> tuple[Task, e.TaskArguments | None]:
        """A task of a function that has a number already (0: the callable is the first of `args`)."""
        dependencies: list[ObjectRef] = []
        args, kwargs = _take_references(args, kwargs, dependencies)
        serialized = dumps_arguments(
            args, kwargs, large_bytes_min=LARGE_BYTES_MIN, store_large=self.stored.reference_to
        )
        return self._finish(function, serialized, dependencies, sink, index, retries, extras, kind)

    def chunk(
        self, function: int, items: Any, sink: Any, index: int, *, kind: int, retries: int
    ) -> tuple[Task, e.TaskArguments | None]:
        """A task that applies a function to each of `items` (a list)."""
        serialized = dumps_arguments(
            (items,), _EMPTY, large_bytes_min=LARGE_BYTES_MIN, store_large=self.stored.reference_to
        )
        return self._finish(function, serialized, [], sink, index, retries, None, kind)

    def _finish(
        self, function: int, serialized: Serialized, dependencies: list[ObjectRef], sink: Any, index: int,
        retries: int, extras: TaskExtras | None, kind: int,
    ) -> tuple[Task, e.TaskArguments | None]:  # fmt: skip
        client = self._client
        number = next(client.numbers)
        if not dependencies and not serialized.references and len(serialized.stream) <= INLINE_BYTES_MAX:
            if serialized.size_bytes <= INLINE_BYTES_MAX:
                spec = TaskSpec(number, function, kind, serialized.to_bytes(), extras)
                return Task(spec, sink, index, retries), None
        references = [reference.part for reference in serialized.references]
        extras = extras or TaskExtras()
        payload, stored, payload_object = b"", None, None
        if serialized.size_bytes <= INLINE_BYTES_MAX:
            payload = serialized.to_bytes()
        else:
            payload_number = next(client.numbers)
            stored = self._values.store(serialized, self._values.new_object_id(payload_number))
            client.handle_event(e.ValuePut(payload_number, m.ValuePart(stored=stored)))
            payload_object = Reference(client.address, payload_number)
        extras = m.TaskExtras(
            extras.attempt, extras.name, extras.returns, [], references, stored, extras.method, extras.concurrency
        )
        parts = [reference.part for reference in dependencies]
        arguments = e.TaskArguments(parts, references, payload_object)
        return Task(TaskSpec(number, function, kind, payload, extras), sink, index, retries), arguments


def _take_references(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], found: list[ObjectRef]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Put slots in the place of the references among the arguments, which go to `found`."""
    if any(type(arg) is ObjectRef for arg in args):
        args = tuple(_slot(arg, found) for arg in args)
    if kwargs and any(type(value) is ObjectRef for value in kwargs.values()):
        kwargs = {name: _slot(value, found) for name, value in kwargs.items()}
    return args, kwargs


def _slot(value: Any, found: list[ObjectRef]) -> Any:
    if type(value) is not ObjectRef:
        return value
    found.append(value)
    return Slot(len(found) - 1)
