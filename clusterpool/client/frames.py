"""Whether an exception may be raised where a signal has fallen: the same question for Ctrl-C and for cancelled tasks.

A signal falls anywhere between two byte codes. In the middle of our own code, with a lock just taken, an exception
would leave the client half changed, and others waiting for ever. The frames tell whose code runs.
"""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
import time
from pathlib import Path
from types import CodeType, FrameType

from clusterpool.client import sleeps
from clusterpool.client.loop import Loop

# Our code between the user's and what it waits for takes some 10 to 100 us.
RETRY_S = 0.002

_PACKAGE = Path(__file__).resolve().parents[1]
_OURS = tuple(
    f"{_PACKAGE / name}/"
    for name in ("client", "core", "object_store", "processes", "serialization", "transport", "worker")
)
# Where a thread sleeps holds no lock, and the callers undo what they did.
_SLEEPS = frozenset({Loop._turn.__code__, Loop._poll_awake.__code__, Loop._wait_for_role.__code__, *sleeps.CODES})


def may_raise(frame: FrameType | None, callers: frozenset[CodeType] = frozenset()) -> bool:
    """Whether `frame`, the innermost, is the user's code, or ours where it sleeps.

    `callers`: our functions from which inwards the user's own code runs.
    """
    innermost = frame
    while frame is not None:
        code = frame.f_code
        if code in callers:
            return True
        if code.co_filename.startswith(_OURS):
            return frame is innermost and code in _SLEEPS
        frame = frame.f_back
    return not callers  # a program's own thread starts with the user's code, a worker's with ours


def is_put_off(exc: BaseException) -> bool:
    """Put off a Ctrl-C that has been raised already, if it is one: what it fell into goes on to its end."""
    if type(exc) is not KeyboardInterrupt or threading.current_thread() is not threading.main_thread():
        return False
    interrupt_later()
    return True


def interrupt_later() -> None:
    """Send the main thread another SIGINT, when our code will have been done; from a signal handler."""
    # A bare thread: `threading` has locks of its own, which the interrupted code may hold.
    _thread.start_new_thread(_interrupt_later, (threading.get_ident(),))  # handlers run in the main thread


def _interrupt_later(main_ident: int) -> None:
    time.sleep(RETRY_S)
    with contextlib.suppress(ProcessLookupError):
        signal.pthread_kill(main_ident, signal.SIGINT)
