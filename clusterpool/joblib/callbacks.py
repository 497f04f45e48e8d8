"""The thread of joblib's callbacks: they take locks and submit, which the client's loop must not wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable

from clusterpool.calls.callbacks import CallbackThread

# An aborted call waits this long for a callback that still runs: without it, joblib might put the batch that
# this one submits to the next call of the same object. Longer, and an input iterator that never returns would
# keep Ctrl-C waiting.
_PATIENCE_S = 1.0


class Callbacks:
    """Runs the callbacks of one worker group's batches, one after another, until the calls end."""

    def __init__(self) -> None:
        self._thread = CallbackThread("clusterpool-joblib")
        # Have a call called soon; it asks `has_ended` first.
        self.run: Callable[[Callable[[], object]], None] = self._thread.run
        self._ident = 0
        self._is_ended = False

    def has_ended(self) -> bool:
        """Whether the calls have ended meanwhile; asked by each callback before it does anything."""
        self._ident = threading.get_ident()
        return self._is_ended

    def end(self) -> None:
        """Call no more of them."""
        self._is_ended = True

    def wait_idle(self) -> None:
        """After `end`: wait for the callback that runs now, if it takes no unreasonable time."""
        if threading.get_ident() == self._ident:
            return
        is_idle = threading.Event()
        self._thread.run(is_idle.set)
        is_idle.wait(_PATIENCE_S)
