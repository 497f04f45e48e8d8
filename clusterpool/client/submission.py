"""How a call becomes a task: the function is shipped once, the arguments are pickled at the call."""

from __future__ import annotations

import pickle
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from clusterpool.client.object_ref import ObjectRef
from clusterpool.client.stored_arguments import StoredArguments
from clusterpool.client.values import INLINE_BYTES_MAX, LARGE_BYTES_MIN
from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.dispatch import Task
from clusterpool.core.messages import Reference, TaskExtras, TaskKind, TaskSpec
from clusterpool.serialization.functions import ShippedFunction, loads_function, ship_function
from clusterpool.serialization.packing import Serialized, dumps_arguments, dumps_value, loads
from clusterpool.serialization.references import capture_references, resolve

if TYPE_CHECKING:
    from clusterpool.client.client import Client
    from clusterpool.client.values import Values

# Functions that programs keep but never call again must not fill the memory either.
FUNCTIONS_MAX = 512
_TABLED = (types.FunctionType, types.BuiltinFunctionType, type)
_EMPTY: dict[str, Any] = {}
_NUMBERS = frozenset({int, float, bool, type(None)})


class Slot:
    """Stands in a pickled argument list for the value of an ObjectRef, which the task gets instead."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __reduce__(self) -> tuple[Any, ...]:
        return Slot, (self.index,)


class Held(NamedTuple):
    """What must live as long as a pickled function: object references, and what else its pickle needs when loaded."""

    references: Sequence[ObjectRef] = ()
    kept: Sequence[Any] = ()


_HELD_NOTHING = Held()


class FunctionTable:
    """The functions that one worker set has been told of, by identity, for as long as the user has them."""

    def __init__(self, client: Client, values: Values) -> None:
        self._client = client
        self._values = values
        # By id of the callable. Weak: a program that submits a fresh lambda each time must not fill the memory, and
        # what a closure holds goes with it, here and at the workers.
        self._entries: OrderedDict[int, tuple[weakref.ref[Any], int, ShippedFunction]] = OrderedDict()
        # By number: what is in closures and globals, which each task of the function carries.
        self.held: dict[int, Held] = {}
        self._passing: set[int] = set()  # numbers of callables that are shipped for one call

    def number_of(self, function: Callable[..., Any]) -> int:
        """The function's number, pickling it now if it is new or has changed.

        Raises: what pickle raises.
        """
        entry = self._entries.get(id(function))
        if entry is not None and entry[0]() is function and entry[2].is_current():
            return entry[1]
        shipped = ship_function(function)
        payload, references = self._small(shipped)
        number = next(self._client.numbers)
        name = str(getattr(function, "__qualname__", type(function).__name__))
        self._client.handle_event(e.FunctionAdded(number, payload, name))
        if references or shipped.kept:
            self.held[number] = Held(references, shipped.kept)
        if isinstance(function, _TABLED):
            key = id(function)
            self._forget(key)
            self._entries[key] = (weakref.ref(function, lambda watch: self._gone(key, watch)), number, shipped)
            if len(self._entries) > FUNCTIONS_MAX:
                self._forget(next(iter(self._entries)))
        else:
            self._passing.add(number)
        return number

    def done_with(self, number: int) -> None:
        """A call is submitted: what is no plain function, but an object whose state may change, is not used again."""
        if number in self._passing:
            self._passing.discard(number)
            self._drop(number)

    def _small(self, shipped: ShippedFunction) -> tuple[bytes, list[ObjectRef]]:
        """What to send to each worker: a function with much data in its closure goes through the store."""
        if len(shipped.payload) < LARGE_BYTES_MIN:
            return shipped.payload, list(shipped.references)
        stored = put_value(self._client, self._values, shipped.payload)
        with capture_references():
            payload = pickle.dumps(_StoredFunction(stored), 5)
        return payload, [*shipped.references, stored]

    def _gone(self, key: int, watch: weakref.ref[Any]) -> None:
        if self._client.is_closed:
            return  # perhaps the interpreter is at its end, and modules are gone
        entry = self._entries.get(key)
        if entry is not None and entry[0] is watch:
            self._forget(key)

    def _forget(self, key: int) -> None:
        """Safe in a garbage collection: the machine is only left a note."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._drop(entry[1])

    def _drop(self, number: int) -> None:
        self.held.pop(number, None)
        if self._client.is_closed:
            return  # also at the interpreter's end, when the names below are gone
        self._client.handle_event_later(e.FunctionsDropped([number]))

    def clear(self) -> None:
        """No task of these functions will be submitted any more."""
        for key in list(self._entries):
            self._forget(key)


class _StoredFunction:
    """Stands for a function whose pickle lies in the store; loading it gives the function itself."""

    def __init__(self, reference: ObjectRef) -> None:
        self._reference = reference

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_stored_function, (self._reference,)


def _load_stored_function(reference: ObjectRef) -> Any:
    return loads_function(resolve(reference))


class _StoredSetup:
    """Stands for the pickle of an initializer and its arguments, which lies in the store."""

    def __init__(self, reference: ObjectRef) -> None:
        self._reference = reference

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_stored_setup, (self._reference,)


def _load_stored_setup(reference: ObjectRef) -> Any:
    return loads(resolve(reference))


def put_value(client: Client, values: Values, value: Any) -> ObjectRef:
    """Make a value an object of this process.

    Raises: what pickle raises; ObjectTooLarge, StoreFull.
    """
    serialized = dumps_value(value)
    number = next(client.numbers)
    for reference in serialized.references:
        reference.check_client(client)
    references = [reference.part for reference in serialized.references]
    if references:
        client.handle_event(e.ReferencesMade(references))
    part = values.part_of(serialized, values.new_object_id(number), references, client.address)
    client.handle_event(e.ValuePut(number, part))
    return ObjectRef(client, client.address, number, is_counted=True)


class TaskMaker:
    """Makes tasks of calls, for one client."""

    def __init__(self, client: Client, values: Values) -> None:
        self._client = client
        self._values = values
        self.stored = StoredArguments(client, lambda value: put_value(client, values, value))

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
            if not kwargs and extras is None and number not in table.held and _NUMBERS.issuperset(map(type, args)):
                # A few numbers, the rule for many tiny tasks: a third of the way below.
                payload = pickle.dumps((args, _EMPTY), 5)
                if len(payload) <= INLINE_BYTES_MAX:
                    return Task(TaskSpec(next(self._client.numbers), number, kind, payload), sink, index, retries), None
        else:
            number, args = 0, (function, *args)
        held = table.held.get(number, _HELD_NOTHING) if table.held else _HELD_NOTHING
        return self.task(number, args, kwargs, sink, index, retries=retries, extras=extras, kind=kind, held=held)

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
        held: Held = _HELD_NOTHING,
    ) -> tuple[Task, e.TaskArguments | None]:
        """A task of a function that has a number already (0: the callable is the first of `args`).

        `held`: the function's own, whose references the worker has for as long as it runs the task.
        """
        dependencies: list[ObjectRef] = []
        args, kwargs = _take_references(args, kwargs, dependencies)
        serialized = dumps_arguments(
            args, kwargs, large_bytes_min=LARGE_BYTES_MIN, store_large=self.stored.reference_to
        )
        return self._finish(
            function, serialized, dependencies, held, sink=sink, index=index, retries=retries, extras=extras, kind=kind
        )

    def setup(self, initializer: Callable[..., object], initargs: Iterable[Any]) -> tuple[bytes, Held]:
        """An initializer as each worker of a group gets it, and what must live as long as the group.

        Raises: what pickle raises; ObjectTooLarge, StoreFull.
        """
        shipped = ship_function(initializer)
        serialized = dumps_arguments(
            (shipped.payload, *initargs), _EMPTY, large_bytes_min=LARGE_BYTES_MIN, store_large=self.stored.reference_to
        )
        references = (*serialized.references, *shipped.references)
        kept = (*serialized.kept, *shipped.kept)
        for reference in references:
            reference.check_client(self._client)
        payload = serialized.to_bytes()
        if len(payload) < LARGE_BYTES_MIN:
            return payload, Held(references, kept)
        # Many parts that are not large, each: all of it goes through the store.
        stored = put_value(self._client, self._values, payload)
        with capture_references():
            payload = pickle.dumps(_StoredSetup(stored), 5)
        return payload, Held((*references, stored), kept)

    def chunk(
        self, table: FunctionTable, function: int, items: Any, sink: Any, index: int,
        *, kind: int, retries: int, extras: TaskExtras | None = None,
    ) -> tuple[Task, e.TaskArguments | None]:  # fmt: skip
        """A task that applies a function of `table` to each of `items` (a list)."""
        if len(items) == 1 and type(items[0]) in _NUMBERS and function not in table.held:
            # `chunksize=1` over a range: the rule for many tiny tasks, and a third of the way below.
            payload = pickle.dumps(((items,), _EMPTY), 5)
            if len(payload) <= INLINE_BYTES_MAX:
                spec = TaskSpec(next(self._client.numbers), function, kind, payload, extras)
                return Task(spec, sink, index, retries), None
        serialized = dumps_arguments(
            (items,), _EMPTY, large_bytes_min=LARGE_BYTES_MIN, store_large=self.stored.reference_to
        )
        held = table.held.get(function, _HELD_NOTHING)
        return self._finish(
            function, serialized, [], held, sink=sink, index=index, retries=retries, extras=extras, kind=kind
        )

    def _finish(
        self, function: int, serialized: Serialized, dependencies: list[ObjectRef], held: Held, *,
        sink: Any, index: int, retries: int, extras: TaskExtras | None, kind: int,
    ) -> tuple[Task, e.TaskArguments | None]:  # fmt: skip
        client = self._client
        number = next(client.numbers)
        kept = (*serialized.kept, *held.kept)
        is_bare = not (dependencies or held.references or serialized.references or kept)
        if is_bare and serialized.size_bytes <= INLINE_BYTES_MAX:
            spec = TaskSpec(number, function, kind, serialized.to_bytes(), extras)
            return Task(spec, sink, index, retries), None
        holders = (*dependencies, *serialized.references, *held.references)
        for reference in holders:
            reference.check_client(client)
        references = [reference.part for reference in (*serialized.references, *held.references)]
        extras = extras or TaskExtras()
        payload, stored, payload_object = b"", None, None
        if serialized.size_bytes <= INLINE_BYTES_MAX:
            payload = serialized.to_bytes()
        else:
            payload_number = next(client.numbers)
            stored = self._values.store(serialized, self._values.new_object_id(payload_number), client.address)
            client.handle_event(e.ValuePut(payload_number, m.ValuePart(stored=stored)))
            payload_object = Reference(client.address, payload_number)
        extras = msgspec.structs.replace(extras, arguments=[], references=references, stored=stored)
        parts = [reference.part for reference in dependencies]
        arguments = e.TaskArguments(parts, references, payload_object, holders, kept or None)
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
