"""Virtual time: what happens when, in an order that only the seed decides, and a trace of it.

Two things at the same instant happen in the order in which they were planned.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import deque
from collections.abc import Callable
from typing import Any

# So many of the last lines are printed when something is wrong.
LINES_KEPT = 120


class Violation(AssertionError):
    """Something that must never happen has happened."""


class Trace:
    """What happened, as a hash of all and the last lines for people."""

    def __init__(self, lines_kept: int = LINES_KEPT) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._lines: deque[tuple[float, str, str, Any]] = deque(maxlen=lines_kept)
        self.count = 0

    def note(self, now_s: float, who: str, what: str, detail: Any = None) -> None:
        """Keep a line; `detail` is put into words only when the line is printed, so it must never change."""
        self._hash.update(f"{now_s:.9f} {who} {what}\n".encode())
        self._lines.append((now_s, who, what, detail))
        self.count += 1

    def digest(self) -> str:
        """The same for two runs in which the same things happened at the same times."""
        return self._hash.hexdigest()

    def lines(self) -> list[str]:
        """The last lines, oldest first."""
        return [f"{now_s:12.6f}  {who:<12} {what} {_shortened(detail)}" for now_s, who, what, detail in self._lines]


def _shortened(detail: Any) -> str:
    text = "" if detail is None else str(detail)
    return text if len(text) <= 400 else text[:300] + " ... " + text[-80:]


class Timeline:
    """The events to come. `now_s` is the world's own clock; each host has another (party.py)."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.steps = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._last_tie = 0

    def at(self, time_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Have `action(*arguments)` called at a time, or now if that is over."""
        self._last_tie += 1
        heapq.heappush(self._heap, (max(time_s, self.now_s), self._last_tie, action, arguments))

    def after(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Have `action(*arguments)` called in a while."""
        self.at(self.now_s + delay_s, action, *arguments)

    def step(self) -> bool:
        """Let the next thing happen; False when there is none."""
        if not self._heap:
            return False
        self.now_s, _, action, arguments = heapq.heappop(self._heap)
        self.steps += 1
        action(*arguments)
        return True
