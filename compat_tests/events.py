"""What a class's process tells the harness while it runs the tests: one JSON object a line, on a pipe of its own.

    {"event": "start", "test": "test_x"}
    {"event": "end", "test": "test_x", "outcome": "failed", "detail": "...", "seconds": 0.1}
    {"event": "fixture", "test": "setUpClass", "outcome": "failed", "detail": "...", "seconds": 0}
    {"event": "done"}

The pipe and not standard output, because tests print, and replace `sys.stdout`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import time
from typing import Any, TextIO

PASSED, FAILED, SKIPPED, HUNG = "passed", "failed", "skipped", "hung"
# The detail of a test that passed without having asked for what is tested.
NOT_INVOLVED = "not involved"
# The traceback of every thread is written this long before the harness ends a test that hangs.
_TRACEBACK_BEFORE_S = 2.0


class EventWriter:
    """Writes the events of one process. `hang_log` gets the tracebacks of a test that exceeds `test_limit_s`."""

    def __init__(self, fd: int, *, test_limit_s: float, hang_log: TextIO) -> None:
        self._fd = fd
        # Programs that the tests start must not hold the pipe.
        os.set_inheritable(fd, False)
        self._traceback_after_s = max(test_limit_s - _TRACEBACK_BEFORE_S, test_limit_s / 2)
        self._hang_log = hang_log
        self._pid = os.getpid()
        self._started_s = 0.0

    def start(self, test: str) -> None:
        if self._is_fork:
            return
        self._started_s = time.monotonic()
        self._write(event="start", test=test)
        faulthandler.dump_traceback_later(self._traceback_after_s, file=self._hang_log)

    def end(self, test: str, outcome: str, detail: str = "") -> None:
        if self._is_fork:
            return
        faulthandler.cancel_dump_traceback_later()
        self._write(event="end", test=test, outcome=outcome, detail=detail, seconds=self._seconds())

    def fixture(self, name: str, outcome: str, detail: str) -> None:
        self._write(event="fixture", test=name, outcome=outcome, detail=detail, seconds=0.0)

    def done(self) -> None:
        """After the last test. Does not return in a child that a test forked and that came back."""
        if self._is_fork:
            # faulthandler's end at an ordinary exit would wait for a thread that only the parent has.
            os._exit(1)
        self._write(event="done")

    def _seconds(self) -> float:
        return round(time.monotonic() - self._started_s, 3)

    @property
    def _is_fork(self) -> bool:
        """A child that a test forked: it has nothing to say, and faulthandler would block it for ever."""
        return os.getpid() != self._pid

    def _write(self, **event: Any) -> None:
        if not self._is_fork:
            os.write(self._fd, json.dumps(event).encode() + b"\n")
