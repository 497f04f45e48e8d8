"""Cancelling a task that runs: KeyboardInterrupt is raised in the user's code, and nowhere else.

    CancelTasks --(whoever turns the loop)--> `ask` --SIGINT--> main thread --> `_interrupted`
                                                                   |  in the user's code, or polling: raise
                                                                   |  elsewhere in ours: look again in RETRY_S
                                                                   v  no such task runs (any more): nothing

(client/frames.py says how the two are told apart.)
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import OrderedDict
from types import CodeType, FrameType
from typing import NamedTuple

from clusterpool.client.frames import interrupt_later, may_raise
from clusterpool.core.messages import Address

# Cancels that came too late for their tasks are remembered in vain; this bounds them.
WANTED_MAX = 10_000


class Key(NamedTuple):
    """A task, as its worker names it."""

    owner: Address
    number: int


class Interrupted(KeyboardInterrupt):
    """The task is being cancelled. The user's code may clean up, as after Ctrl-C."""

    def __init__(self) -> None:
        super().__init__("the task was cancelled while it ran")


class Interrupts:
    """Which tasks are to be cancelled, and which one the main thread runs. Made in the main thread."""

    def __init__(self, calls_user_code: frozenset[CodeType]) -> None:
        self.current: Key | None = None
        self._wanted: OrderedDict[Key, None] = OrderedDict()
        self._calls_user_code = calls_user_code
        self._main_ident = threading.get_ident()
        signal.signal(signal.SIGINT, self._interrupted)

    def ask(self, key: Key) -> None:
        """Cancel this task, be it running or still to come; from any thread."""
        self._wanted[key] = None
        if len(self._wanted) > WANTED_MAX:
            self._wanted.popitem(last=False)
        # The main thread enters `current` before it looks whether the task is wanted: one of the two sees the other.
        if self.current == key:
            self._signal()

    def take(self, key: Key) -> bool:
        """Whether the task is to be cancelled; it counts as done then."""
        if not self._wanted:
            return False
        return self._wanted.pop(key, self) is None

    def is_wanted(self, key: Key) -> bool:
        """Whether the task is to be cancelled, which is still to be done."""
        return key in self._wanted

    def forget(self, key: Key) -> None:
        """The task has ended."""
        if self._wanted:
            self._wanted.pop(key, None)

    def _signal(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pthread_kill(self._main_ident, signal.SIGINT)

    def _interrupted(self, _number: int, frame: FrameType | None) -> None:
        key = self.current
        if key is None or key not in self._wanted:
            return
        if may_raise(frame, self._calls_user_code):
            self._wanted.pop(key, None)
            raise Interrupted
        interrupt_later()
