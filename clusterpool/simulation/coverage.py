"""Which transitions of the core's machines simulations have taken, and which never; which lines never ran.

    with Coverage() as coverage: any number of worlds --> coverage.never_taken()

It watches the classes, not the worlds: their `handle`, the states of their records, and the first call of each public
method. That costs little enough for all worlds of a test. Lines cost ten times a world's time.
"""

from __future__ import annotations

import dis
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import msgspec

import clusterpool.core
from clusterpool.simulation.transitions import CARRIERS, EVENTS, STATES, States

FOLDER = Path(clusterpool.core.__file__).parent


class Coverage:
    """Of all worlds that run while it is entered."""

    def __init__(self) -> None:
        self.taken: dict[str, set[str]] = {}  # by machine, the events, messages and changes of state
        self.known: dict[str, set[str]] = {}  # what there is; of events and messages, once there was a machine
        self.lines: dict[str, set[int]] = {}
        self._undo: list[Callable[[], None]] = []
        self._seen: set[type] = set()

    def __enter__(self) -> Coverage:
        for kind in machines():
            if "handle" in kind.__dict__:
                self._watch_handle(kind)
            for name, function in list(kind.__dict__.items()):
                if isinstance(function, FunctionType) and not name.startswith("_") and name != "handle":
                    self._watch_first_call(kind, name, function)
        for kind, states in STATES.items():
            self._watch_states(kind, states)
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()

    def never_taken(self) -> dict[str, list[str]]:
        """By machine, what no world has done with it. A machine that no world has made is "never made"."""
        missing = {name: sorted(known - self.taken.get(name, set())) for name, known in sorted(self.known.items())}
        return {name: left for name, left in missing.items() if left}

    def unforeseen(self) -> list[str]:
        """Changes of state that transitions.py does not know."""
        return sorted(
            f"{kind.__name__}: {change}"
            for kind, states in STATES.items()
            for change in self.taken.get(kind.__name__, set())
            if ">" in change and change not in states.transitions
        )

    def counts(self) -> tuple[int, int]:
        """How many transitions there are, and how many of them were taken."""
        total = sum(len(known) for known in self.known.values())
        return total, total - sum(len(left) for left in self.never_taken().values())

    # --- what is watched

    def _sets_of(self, kind: type) -> tuple[set[str], set[str]]:
        name = kind.__name__
        return self.taken.setdefault(name, set()), self.known.setdefault(name, set())

    def _watch_handle(self, kind: type) -> None:
        original = kind.__dict__["handle"]
        taken, known = self._sets_of(kind)
        known.add("never made")

        def handle(machine: Any, event: Any, now_s: float) -> Any:
            if kind not in self._seen:
                self._seen.add(kind)
                taken.add("never made")
                known.update(_events_of(machine))
            event_kind = type(event)
            taken.add(event_kind.__name__)
            if event_kind in CARRIERS:
                taken.add(type(event.message).__name__)
            return original(machine, event, now_s)

        self._put(kind, "handle", handle, original)

    def _watch_first_call(self, kind: type, name: str, original: FunctionType) -> None:
        taken, known = self._sets_of(kind)
        known.add(f"{name}()")

        def first(*arguments: Any, **options: Any) -> Any:
            taken.add(f"{name}()")
            if kind.__dict__[name] is first:
                setattr(kind, name, original)
            return original(*arguments, **options)

        self._put(kind, name, first, original)

    def _put(self, kind: type, name: str, wrapper: Any, original: Any) -> None:
        setattr(kind, name, wrapper)

        def undo() -> None:
            if kind.__dict__[name] is wrapper:
                setattr(kind, name, original)

        self._undo.append(undo)

    def _watch_states(self, kind: type, states: States) -> None:
        taken, known = self._sets_of(kind)
        known.update(states.transitions)
        original: Any = kind.__setattr__
        tell = states.tell

        def set_attribute(record: Any, name: str, value: Any) -> None:
            try:
                before = tell(record)
            except AttributeError:  # it is being made
                original(record, name, value)
                return
            original(record, name, value)
            after = tell(record)
            if after != before:
                taken.add(f"{before}>{after}")

        kind.__setattr__ = set_attribute  # type: ignore[method-assign, assignment]

        def undo() -> None:
            if original is object.__setattr__:
                del kind.__setattr__
            else:
                kind.__setattr__ = original  # type: ignore[method-assign]

        self._undo.append(undo)

    # --- lines

    def trace_lines(self) -> None:
        """Note every line of the core that runs in this thread."""
        sys.settrace(self._trace)

    def stop_lines(self) -> None:
        """Note no more lines."""
        sys.settrace(None)

    def _trace(self, frame: FrameType, _kind: str, _argument: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(str(FOLDER)):
            return None
        lines = self.lines.setdefault(code.co_filename, set())
        # A function of which every line has run needs no further look; this is what makes it bearable.
        if code in _done or _lines_of(code) <= lines:
            _done.add(code)
            return None

        def local(frame: FrameType, kind: str, _argument: Any) -> Any:
            if kind == "line":
                lines.add(frame.f_lineno)
            return local

        lines.add(frame.f_lineno)
        return local

    def lines_never_run(self) -> dict[str, list[int]]:
        """By file of the core, the lines with code that never ran."""
        missing: dict[str, list[int]] = {}
        for path in sorted(FOLDER.glob("*.py")):
            code = compile(path.read_text(), str(path), "exec")
            inside: set[int] = set()
            for function in _functions_in(code):
                inside |= _lines_of(function)
            left = sorted(inside - self.lines.get(str(path), set()))
            if left:
                missing[path.name] = left
        return missing


def machines() -> Iterator[type]:
    """The classes of the core that do things: no messages, events, commands, enumerations, exceptions."""
    for path in sorted(FOLDER.glob("*.py")):
        module = importlib.import_module(f"{clusterpool.core.__name__}.{path.stem}")
        for kind in vars(module).values():
            is_machine = inspect.isclass(kind) and kind.__module__ == module.__name__
            if is_machine and not issubclass(kind, (msgspec.Struct, Enum, tuple, Exception)) and not _is_protocol(kind):
                yield kind


def _is_protocol(kind: type) -> bool:
    return bool(getattr(kind, "_is_protocol", False))


def _events_of(machine: Any) -> set[str]:
    tables = [getattr(machine, name, {}) for name in ("_handlers", "_message_handlers")]
    events = {kind.__name__ for table in tables for kind in table}
    return events | {kind.__name__ for kind in EVENTS.get(type(machine), ())}


_done: set[CodeType] = set()
_lines_by_code: dict[CodeType, frozenset[int]] = {}


def _lines_of(code: CodeType) -> frozenset[int]:
    known = _lines_by_code.get(code)
    if known is None:
        known = _lines_by_code[code] = frozenset(line for _, line in dis.findlinestarts(code) if line is not None)
    return known


def _functions_in(code: CodeType) -> list[CodeType]:
    found: list[CodeType] = []
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if not constant.co_name.startswith("<") and "__qualname__" not in constant.co_names:
                found.append(constant)
            found += _functions_in(constant)
    return found
