"""Which events, messages and lines of the machines a simulation has reached, and which never."""

from __future__ import annotations

import dis
import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import clusterpool.core
from clusterpool.core import node_events, owner_events


class Coverage:
    """Counts what the machines were told; lines too, once `trace_lines` is called (which is slow)."""

    def __init__(self) -> None:
        self.taken: Counter[str] = Counter()
        self.lines: dict[str, set[int]] = {}
        self._is_counting = False
        self._folder = str(Path(clusterpool.core.__file__).parent)

    def start(self) -> None:
        """Count events from now on."""
        self._is_counting = True

    def event(self, machine: Any, event: Any) -> None:
        """A machine is about to handle something."""
        if not self._is_counting:
            return
        name = type(machine).__name__
        self.taken[f"{name}: {type(event).__name__}"] += 1
        if isinstance(event, (node_events.MessageArrived, owner_events.MessageArrived)):
            self.taken[f"{name}: {type(event.message).__name__}"] += 1

    def never_taken(self, machines: list[Any]) -> list[str]:
        """The events and messages in the machines' tables that nobody has told them."""
        known: set[str] = set()
        for machine in machines:
            for table in (machine._handlers, machine._message_handlers):
                known |= {f"{type(machine).__name__}: {kind.__name__}" for kind in table}
        return sorted(known - set(self.taken))

    # --- lines

    def trace_lines(self) -> None:
        """Note every line of the core that runs in this thread."""
        sys.settrace(self._trace)

    def stop(self) -> None:
        """Note no more lines."""
        sys.settrace(None)

    def _trace(self, frame: FrameType, _kind: str, _argument: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(self._folder):
            return None
        lines = self.lines.setdefault(code.co_filename, set())
        # A function of which every line has run needs no further look; this is what makes it bearable.
        missing = _lines_of(code) - lines
        if not missing:
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
        for path in sorted(Path(self._folder).glob("*.py")):
            code = compile(path.read_text(), str(path), "exec")
            inside: set[int] = set()
            for function in _functions_in(code):
                inside |= _lines_of(function)
            left = sorted(inside - self.lines.get(str(path), set()))
            if left:
                missing[path.name] = left
        return missing


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
