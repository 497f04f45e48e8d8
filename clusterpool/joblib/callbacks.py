"""The thread of joblib's callbacks: they take locks and submit, which the client's loop must not wait for."""

from __future__ import annotations

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
        # Have a call called soon.
        self.run: Callable[[Callable[[], object]], None] = self._thread.run
        self.is_ended = False  # each callback looks at it before it does anything

    def end(self) -> None:
        """Call no more of them."""
        self.is_ended = True

    def wait_idle(self) -> None:
        """After `end`: wait for the callback that runs now, if it takes no unreasonable time."""
        self._thread.join(_PATIENCE_S)
