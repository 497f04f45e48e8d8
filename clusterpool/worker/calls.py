"""One task, from its spec to its result."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from pickle import PicklingError
from types import FunctionType
from typing import TYPE_CHECKING, Any

from clusterpool import ids
from clusterpool.client.values import INLINE_BYTES_MAX, NONE_PAYLOAD
from clusterpool.core import messages as m
from clusterpool.core.messages import Address, ResultExtras, TaskKind, TaskResult, TaskSpec, TaskStatus, ValuePart
from clusterpool.serialization.exceptions import unpicklable_result
from clusterpool.serialization.packing import dumps_value
from clusterpool.worker.interrupts import Interrupted, Key

if TYPE_CHECKING:
    from clusterpool.worker.task_runner import TaskRunner

_CHUNKS = (TaskKind.MAP, TaskKind.STARMAP)


class CallRunner:
    """Runs calls of functions and methods for a worker."""

    def __init__(self, runner: TaskRunner) -> None:
        self._runner = runner

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
            return self.returned(owner, spec, call())
        except Interrupted:
            return TaskResult(spec.number, TaskStatus.CANCELLED, b"")
        except (Exception, KeyboardInterrupt) as exc:
            return self.error(spec, exc, is_loaded=is_loaded)
        except BaseException as exc:
            if not runner.runtime.returns_exits:
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
        else:
            function, *rest = args
            args = tuple(rest)
        if kind == TaskKind.MAP:
            return partial(_map, function, args[0])
        if kind == TaskKind.STARMAP:
            return partial(_starmap, function, args[0])
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
        if references:
            runner.hand_over(owner, references)
        part = runner.runtime.values.part_of(serialized, ids.object_id(owner.process_id, spec.number), references)
        return TaskResult(spec.number, TaskStatus.STORED, b"", ResultExtras(part))

    def error(self, spec: TaskSpec, exc: BaseException, *, is_loaded: bool = True) -> TaskResult:
        """An ERROR result; UNLOADABLE when the call could not even be made."""
        name = spec.extras.name if spec.extras is not None else ""
        status = TaskStatus.ERROR if is_loaded else TaskStatus.UNLOADABLE
        return TaskResult(spec.number, status, self._runner.dump(exc, name))

    def _several(self, owner: Address, spec: TaskSpec, value: Any, returns: int) -> TaskResult:
        values = list(value) if returns else []
        if len(values) != returns:
            raise ValueError(f"the task has num_returns={returns}, but returned {len(values)} values")
        parts = [
            self._runner.part_of(owner, item, ids.object_id(owner.process_id, spec.number + offset))
            for offset, item in enumerate(values)
        ]
        return TaskResult(spec.number, TaskStatus.MULTIPLE, b"", ResultExtras(None, parts))

    def _stream(self, owner: Address, spec: TaskSpec, iterable: Any) -> TaskResult:
        if not inspect.isgenerator(iterable) and not hasattr(iterable, "__iter__"):
            raise TypeError(f"a streaming task must return an iterable, not {type(iterable).__name__}")
        count = 0
        for item in iterable:
            self.send_item(owner, spec, count, item)
            count += 1
        return self.stream_ended(spec, count)

    def stream_ended(self, spec: TaskSpec, count: int) -> TaskResult:
        """A generator has ended well."""
        return TaskResult(spec.number, TaskStatus.STREAM_END, str(count).encode())

    def send_item(self, owner: Address, spec: TaskSpec, index: int, item: Any) -> None:
        """Send one item of a generator to the owner, at once.

        Raises: Interrupted when the owner has closed the stream. (Where the main thread runs the generator, a signal
        has raised it already.)
        """
        runner = self._runner
        if runner.interrupts.take(Key(owner, spec.number)):
            raise Interrupted
        part: ValuePart = runner.part_of(owner, item, f"{owner.process_id}.{spec.number}s{index}")
        runner.client.send(owner, m.StreamItem(spec.number, index, part))
        runner.let_go_of_part(part)

    def _create_actor(self, owner: Address, spec: TaskSpec) -> TaskResult:
        from clusterpool.worker.actor import ActorRunner

        runner = self._runner
        assert spec.extras is not None
        args, kwargs = runner.arguments_of(spec)
        cls = runner.function_of(owner, spec.function)
        instance = _call(cls, args, kwargs)
        runner.actor = ActorRunner(runner, instance, concurrency=spec.extras.concurrency)
        return TaskResult(spec.number, TaskStatus.OK, NONE_PAYLOAD)


def _refuse_unnamed(values: Iterable[Any]) -> None:
    """Raises: PicklingError, the standard pickler's, for a function that cannot be imported by its name."""
    for value in values:
        if type(value) is FunctionType and "<" in value.__qualname__:
            name = value.__qualname__
            raise PicklingError(f"Can't pickle {value!r}: attribute lookup {name} on {value.__module__} failed")


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def _map(function: Callable[..., Any], items: Iterable[Any]) -> list[Any]:
    return list(map(function, items))


def _starmap(function: Callable[..., Any], items: Iterable[tuple[Any, ...]]) -> list[Any]:
    return [function(*item) for item in items]


# From these on inwards the user's own code runs.
USER_CODE_CALLERS = frozenset(
    function.__code__ for function in (_call, _map, _starmap, CallRunner._several, CallRunner._stream)
)
