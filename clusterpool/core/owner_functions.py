"""The functions that an owner has pickled, for as long as tasks may use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from clusterpool.core import owner_events as e

if TYPE_CHECKING:
    from clusterpool.core.dispatch import Task


class OwnerFunctions:
    """Payloads and names, by number."""

    def __init__(self) -> None:
        self.payloads: dict[int, bytes] = {}
        self.names: dict[int, str] = {}
        self.dropped: dict[int, None] = {}  # unfinished tasks may use these, later ones will not
        # Keeps those that a task may be run again with; it puts them back into `dropped` in the end.
        self.take_over: Callable[[set[int]], set[int]] = lambda _: set()
        self._look_at_tasks = 0  # at so few unfinished tasks, or at so many dropped functions, look which can go
        self._look_at_dropped = 0

    def added(self, event: e.FunctionAdded, _now_s: float) -> list[e.Command]:
        """A function was pickled."""
        self.payloads[event.number] = event.payload
        if event.name:
            self.names[event.number] = event.name
        return []

    def dropped_by_user(self, event: e.FunctionsDropped, _now_s: float) -> list[e.Command]:
        """No more tasks of these will be submitted."""
        self.dropped.update(dict.fromkeys(event.numbers))
        return []

    def forget(self, tasks: dict[int, Task]) -> set[int]:
        """Let go of those that neither the user nor any of these unfinished tasks needs; their numbers."""
        dropped = self.dropped
        # Looking at all unfinished tasks each time would cost too much while many are unfinished.
        if len(tasks) > self._look_at_tasks and len(dropped) < self._look_at_dropped:
            return set()
        in_use = {task.spec.function for task in tasks.values()}
        gone = {number for number in dropped if number not in in_use}
        for number in gone:
            del dropped[number]
        gone -= self.take_over(gone)
        for number in gone:
            self.payloads.pop(number, None)
            self.names.pop(number, None)
        self._look_at_tasks, self._look_at_dropped = len(tasks) // 2, 2 * len(dropped) + 1
        return gone
