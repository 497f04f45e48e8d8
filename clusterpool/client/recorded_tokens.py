"""How a process that belongs to no cluster uses a thin semaphore: it writes down what it holds.

Forks of a process and children that the standard library started cannot be asked by a node, as others can
(token_counts.py). They are few, so that it may take a microsecond more.
"""

from __future__ import annotations

import os
import threading
from time import monotonic, sleep
from typing import Any

from clusterpool.errors import NotConnected
from clusterpool.processes.token_records import BUSY, GIVEN, HELD, has_moved, register

# It looks again and again rather than sleep in C, where it may have a token that is not written down yet.
_PAUSE_MIN_S = 0.0001
_PAUSE_MAX_S = 0.005


class RecordedTokens:
    """`acquire` and `release` of a SemLock, each written down. Any thread may call them, and a signal's handler."""

    def __init__(self, thin: Any, home: str, name: str, *, is_recursive: bool) -> None:
        self._thin = thin
        self._home = home
        self._name = name
        self._is_recursive = is_recursive
        self._slot: Any = None  # taken at first use: most forks never use it
        self._lock = threading.RLock()

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """As SemLock's; None waits for ever.

        Raises: NotConnected when there is nothing to be had here any more, because it has moved to the control store.
        """
        if self._take():
            return True
        self._check_thin()
        if not block:
            return False
        deadline_s = None if timeout is None else monotonic() + timeout
        pause_s = _PAUSE_MIN_S
        while deadline_s is None or monotonic() < deadline_s:
            sleep(pause_s if deadline_s is None else max(0.0, min(pause_s, deadline_s - monotonic())))
            pause_s = min(2 * pause_s, _PAUSE_MAX_S)
            if self._take():
                return True
            if pause_s == _PAUSE_MAX_S:
                self._check_thin()
        return False

    def _check_thin(self) -> None:
        if has_moved(self._home, self._name):
            raise NotConnected(
                f"the lock or semaphore {self._name} is used on several nodes now, but process {os.getpid()} "
                "was forked, or started by the standard library, and belongs to no cluster; start it with "
                "clusterpool.multiprocessing.Process, or pass the lock to another host only when it has ended"
            )

    def _take(self) -> bool:
        with self._lock:
            slot = self._slot_of_ours()
            slot[BUSY] += 1
            try:
                return bool(self._thin.acquire(False))
            finally:
                self._write_down(slot)

    def release(self) -> None:
        """As SemLock's."""
        with self._lock:
            slot = self._slot_of_ours()
            slot[BUSY] += 1
            slot[GIVEN] += 1
            try:
                self._thin.release()
            finally:
                self._write_down(slot)

    def _write_down(self, slot: Any) -> None:
        held = self._thin._count()
        slot[HELD] = min(held, 1) if self._is_recursive else held
        slot[BUSY] -= 1

    def _slot_of_ours(self) -> Any:
        if self._slot is None:
            self._slot = register(self._home, self._name)
        return self._slot
