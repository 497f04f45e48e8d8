"""One task, from its spec to its result."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pickle import PicklingError
from time import perf_counter_ns
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from clusterpool.client.values import INLINE_BYTES_MAX, NONE_PAYLOAD, ObjectUnreadable
from clusterpool.core import messages as m
from clusterpool.core.messages import Address, ResultExtras, TaskKind, TaskResult, TaskSpec, TaskStatus, ValuePart
from clusterpool.core.object_names import object_id
from clusterpool.errors import ObjectLost
from clusterpool.processes.task_page import ITEM, ITEMS, STEP
from clusterpool.serialization.exceptions import unpicklable_result
from clusterpool.serialization.functions import loads_function
from clusterpool.serialization.packing import dumps_value
from clusterpool.worker.interrupts import Interrupted, Key

if TYPE_CHECKING:
    from clusterpool.worker.task_runner import TaskRunner

logger = logging.getLogger(__name__)

_CHUNKS = (TaskKind.MAP, TaskKind.STARMAP)
# Items that are run before the page is written again: as many as take about so long, and not more than that. More are
# run again when the worker dies; fewer cost tiny items up to half as much again.
PART_NS = 500_000
STEP_MAX = 256


class CallRunner:
    """Runs calls of functions and methods for a worker."""

    def __init__(self, runner: TaskRunner) -> None:
        self._runner = runner
        self._retry_on: tuple[bytes, tuple[type[BaseException], ...]] = (b"", ())  # the last one, loaded

    def run(self, owner: Address, spec: TaskSpec) -> TaskResult:
        """Run a task in this thread. User errors become ERROR results; SystemExit ends the process."""
        runner = self._runner
        extras = spec.extras
        is_loaded = False
        try:
            if spec.kind == TaskKind.CREATE_ACTOR:
                return self._create_actor(owner, spec)
            call = self.call_of(owner, spec)
            is_loaded = True
            if extras is not None and extras.limits is not None and extras.limits.timeout_s > 0:
                runner.client.send(owner, m.TaskStarted(spec.number))
            return self.returned(owner, spec, call())
        except Interrupted:
            return TaskResult(spec.number, TaskStatus.CANCELLED, b"")
        except BaseException as exc:
            # All but an exit is the task's own affair: asyncio.CancelledError, for one, which is no Exception.
            if isinstance(exc, SystemExit) and not runner.runtime.returns_exits:
                raise
            return self.error(spec, exc, is_loaded=is_loaded)
        finally:
            if extras is not None:
                runner.drop_references(spec)

    def call_of(self, owner: Address, spec: TaskSpec) -> Callable[[], Any]:
        """What is to be called, with its arguments loaded."""
        runner = self._runner
        args, kwargs = runner.arguments_of(spec)
        kind = spec.kind
        if kind == TaskKind.ACTOR_CALL:
            assert spec.extras is not None
            return partial(_call, runner.actor.method(spec.extras.method), args, kwargs)
        if spec.function:
            function = runner.function_of(owner, spec.function)
            runner.called_as = spec.extras.name if spec.extras is not None else ""
        else:
            function, *rest = args
            args = tuple(rest)
        if kind in _CHUNKS:
            items = args[0]
            span = spec.extras.span if spec.extras is not None else None
            low, high = (0, len(items)) if span is None else (span.low, span.high)
            page = runner.page
            page[ITEM] = low
            page[STEP] = 1
            page[ITEMS] = len(items)
            if span is not None:
                items = items[low:high]
            if len(items) == 1:
                parts: Iterable[Sequence[Any]] = (items,)
            else:
                # A chunk that has killed a worker is run item by item, so that it is known which one does it.
                parts = _parts(items, page, low, STEP_MAX if span is None else 1)
            return partial(_map if kind == TaskKind.MAP else _starmap, function, parts)
        return partial(_call, function, args, kwargs)

    def returned(self, owner: Address, spec: TaskSpec, value: Any) -> TaskResult:
        """What a call has returned, as its result; a stream's items are made and sent here."""
        extras = spec.extras
        if extras is None or extras.returns == 1:
            return self.result(owner, spec, value)
        if extras.returns == -1:
            return self._stream(owner, spec, value)
        return self._several(owner, spec, value, extras.returns)

    def result(self, owner: Address, spec: TaskSpec, value: Any) -> TaskResult:
        """An OK or STORED result."""
        if value is None:
            return TaskResult(spec.number, TaskStatus.OK, NONE_PAYLOAD)
        try:
            if self._runner.runtime.refuses_unnamed_results:
                _refuse_unnamed(value if spec.kind in _CHUNKS else [value])
            serialized = dumps_value(value)
        except Exception as exc:
            return self.error(spec, unpicklable_result(value, exc))
        if not serialized.references and serialized.size_bytes <= INLINE_BYTES_MAX:
            return TaskResult(spec.number, TaskStatus.OK, serialized.to_bytes())
        runner = self._runner
        references = [reference.part for reference in serialized.references]
        # Handed over only once it is stored: for what could not be, nobody would ever give them back.
        part = runner.runtime.values.part_of(serialized, _object_id(owner, spec), references, owner)
        if references:
            runner.hand_over(owner, references)
        return TaskResult(spec.number, TaskStatus.STORED, b"", ResultExtras(part))

    def error(self, spec: TaskSpec, exc: BaseException, *, is_loaded: bool = True) -> TaskResult:
        """An ERROR result; UNLOADABLE when the call could not even be made."""
        if isinstance(exc, ObjectUnreadable) and spec.kind == TaskKind.CREATE_ACTOR:
            exc = ObjectLost(str(exc))
        if isinstance(exc, ObjectUnreadable) and not is_loaded:
            return TaskResult(spec.number, TaskStatus.LOST, b"", ResultExtras(unreadable=exc.unreadable))
        name = spec.extras.name if spec.extras is not None else ""
        status = TaskStatus.ERROR if is_loaded else TaskStatus.UNLOADABLE
        payload = self._runner.dump(exc, name)
        limits = spec.extras.limits if spec.extras is not None else None
        if limits is not None and limits.retry_on and is_loaded and isinstance(exc, self._classes(limits.retry_on)):
            return TaskResult(spec.number, status, payload, ResultExtras(is_retryable=True))
        return TaskResult(spec.number, status, payload)

    def _classes(self, payload: bytes) -> tuple[type[BaseException], ...]:
        """The exception classes of a `retry_exceptions`; none when they cannot be loaded here."""
        if self._retry_on[0] != payload:
            try:
                classes = loads_function(payload, node_id=self._runner.client.address.node_id)
            except Exception:  # a module that this node lacks, for instance: then it is no exception of these
                logger.warning("the classes of a retry_exceptions= could not be loaded", exc_info=True)
                classes = ()
            self._retry_on = (payload, classes)
        return self._retry_on[1]

    def _several(self, owner: Address, spec: TaskSpec, value: Any, returns: int) -> TaskResult:
        if returns and not isinstance(value, Iterable):
            raise TypeError(f"the task has num_returns={returns}, but returned no sequence: {type(value).__name__}")
        values = list(value) if returns else []
        if len(values) != returns:
            raise ValueError(f"the task has num_returns={returns}, but returned {len(values)} values")
        runner = self._runner
        parts: list[ValuePart] = []
        try:
            for offset, item in enumerate(values):
                parts.append(runner.unsent_part_of(owner, item, _object_id(owner, spec, offset)))
        except BaseException:
            # The task has an error instead of results: nobody will ask for those that are stored already.
            names = [part.stored.object_id for part in parts if part.stored is not None]
            runner.client.send(runner.client.node, m.FreeObjects(names))
            for part in parts:
                runner.let_go_of_part(part)
            raise
        references = [reference for part in parts for reference in part.references]
        if references:
            runner.client.hand_over(owner, references)
        return TaskResult(spec.number, TaskStatus.MULTIPLE, b"", ResultExtras(None, parts))

    def _stream(self, owner: Address, spec: TaskSpec, iterable: Any) -> TaskResult:
        if not inspect.isgenerator(iterable) and not hasattr(iterable, "__iter__"):
            raise TypeError(f"a streaming task must return an iterable, not {type(iterable).__name__}")
        count, key, streams = 0, Key(owner, spec.number), self._runner.streams
        self.open_stream(key, spec)
        try:
            for item in iterable:
                if not self.send_item(owner, spec, count, item):
                    streams.wait(key)
                count += 1
        finally:
            streams.close(key)
        return self.stream_ended(spec, count)

    def open_stream(self, key: Key, spec: TaskSpec) -> None:
        """A generator is about to make its first item; `streams.close` when it has ended."""
        assert spec.extras is not None
        self._runner.streams.open(key, spec.extras.stream_buffer)

    def stream_ended(self, spec: TaskSpec, count: int) -> TaskResult:
        """A generator has ended well."""
        return TaskResult(spec.number, TaskStatus.STREAM_END, str(count).encode())

    def send_item(self, owner: Address, spec: TaskSpec, index: int, item: Any) -> bool:
        """Send one item of a generator to the owner, at once; whether the generator may go on without waiting.

        Raises: Interrupted when the owner has closed the stream. (Where the main thread runs the generator, a signal
        has raised it already.)
        """
        runner = self._runner
        if runner.interrupts.take(Key(owner, spec.number)):
            raise Interrupted
        part: ValuePart = runner.part_of(owner, item, f"{_object_id(owner, spec)}s{index}")
        runner.client.send(owner, m.StreamItem(spec.number, index, part))
        runner.let_go_of_part(part)
        size_bytes = part.stored.size_bytes if part.stored is not None else len(part.payload)
        return runner.streams.sent(Key(owner, spec.number), size_bytes)

    def _create_actor(self, owner: Address, spec: TaskSpec) -> TaskResult:
        from clusterpool.worker.actor import ActorRunner

        runner = self._runner
        assert spec.extras is not None
        args, kwargs = runner.arguments_of(spec)
        cls = runner.function_of(owner, spec.function)
        plan = spec.extras.actor
        if plan is None:
            instance = _call(cls, args, kwargs)
            runner.actor = ActorRunner(runner, instance, concurrency=spec.extras.concurrency)
        else:
            from clusterpool.worker.journal import Journal

            journal = Journal(runner, plan)
            runner.actor = ActorRunner(runner, journal.make(cls, args, kwargs), concurrency=1, journal=journal)
            journal.replay()
        return TaskResult(spec.number, TaskStatus.OK, NONE_PAYLOAD)


def _object_id(owner: Address, spec: TaskSpec, offset: int = 0) -> str:
    """What attempts have made lies under a name of each, and so does what the spans of one chunk have."""
    extras = spec.extras
    if extras is None:
        return object_id(owner.process_id, spec.number + offset)
    part = extras.span.part if extras.span is not None else 0
    return object_id(owner.process_id, spec.number + offset + part, extras.attempt)


def _refuse_unnamed(values: Iterable[Any]) -> None:
    """Raises: PicklingError, the standard pickler's, for a function that cannot be imported by its name."""
    for value in values:
        if type(value) is FunctionType and "<" in value.__qualname__:
            name = value.__qualname__
            raise PicklingError(f"Can't pickle {value!r}: attribute lookup {name} on {value.__module__} failed")


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def _parts(items: Sequence[Any], page: memoryview, first: int, step_max: int) -> Iterator[Sequence[Any]]:
    """A chunk in parts of about PART_NS, or of one item; before each the page says which."""
    low, step = 0, 1
    while low < len(items):
        page[STEP] = step
        page[ITEM] = first + low
        started_ns = perf_counter_ns()
        yield items[low : low + step]
        low += step
        step = min(2 * step, step_max) if perf_counter_ns() - started_ns < PART_NS else 1


def _map(function: Callable[..., Any], parts: Iterable[Sequence[Any]]) -> list[Any]:
    results: list[Any] = []
    for part in parts:
        results += [function(item) for item in part]
    return results


def _starmap(function: Callable[..., Any], parts: Iterable[Sequence[tuple[Any, ...]]]) -> list[Any]:
    results: list[Any] = []
    for part in parts:
        results += [function(*item) for item in part]
    return results


def _codes_of(function: Any) -> set[CodeType]:
    """Its code, and until Python 3.12 that of its comprehensions, which have frames of their own."""
    return {function.__code__, *(code for code in function.__code__.co_consts if isinstance(code, CodeType))}


# From these on inwards the user's own code runs.
USER_CODE_CALLERS = frozenset(
    code
    for function in (_call, _map, _starmap, CallRunner._several, CallRunner._stream)
    for code in _codes_of(function)
)
