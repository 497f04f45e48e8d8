"""Threads of simulated programs: generators that say what they wait for.

A step yields a `Pause` (time goes by) or a `Wait` (until a condition holds, or for so long), and is sent True, or False
when the wait took too long.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NamedTuple


class Pause(NamedTuple):
    """Compute or sleep for so long."""

    duration_s: float


class Wait(NamedTuple):
    """Go on once `is_due()`; it is asked after everything that the process hears."""

    is_due: Callable[[], bool]
    patience_s: float | None = None


Steps = Generator[Any, bool, Any]


class Interrupted(Exception):
    """The task was cancelled while it ran."""


class Disconnected(Exception):
    """The process has lost its node."""


class Thread:
    """One program in a process; `process` must have `after(delay, action, ...)`."""

    def __init__(self, process: Any, steps: Steps, on_end: Callable[[Any], None]) -> None:
        self._process = process
        self._steps = steps
        self._on_end = on_end
        self._wait: Wait | None = None
        self._number = 0  # of the wait: a timer of an earlier one must not end it
        self.is_done = False

    def start(self) -> None:
        """Run to the first wait."""
        self._step(None)

    def look(self) -> bool:
        """Go on if what it waits for has come; whether it did."""
        wait = self._wait
        if wait is None or not wait.is_due():
            return False
        self._step(True)
        return True

    def interrupt(self, error: BaseException) -> None:
        """Raise an exception where it is."""
        if not self.is_done:
            self._step(error)

    def _timer(self, number: int) -> None:
        if number == self._number and not self.is_done:
            is_wait = self._wait is not None
            self._step(not is_wait)
            self._process.turn()

    def _step(self, answer: Any) -> None:
        self._wait = None
        self._number += 1
        try:
            asked = self._steps.throw(answer) if isinstance(answer, BaseException) else self._steps.send(answer)
        except StopIteration as stop:
            self.is_done = True
            self._on_end(stop.value)
            return
        if isinstance(asked, Pause):
            self._process.after(asked.duration_s, self._timer, self._number)
            return
        self._wait = asked
        if asked.patience_s is not None:
            self._process.after(asked.patience_s, self._timer, self._number)
