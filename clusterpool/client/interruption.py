"""What Ctrl-C in a program does to its work elsewhere: all of it stops, as if its processes had a terminal."""

from __future__ import annotations

import os
import signal
import sys
import threading
from time import monotonic
from types import CodeType, FrameType
from typing import TYPE_CHECKING

from clusterpool.client.frames import interrupt_later, may_raise
from clusterpool.core import owner_events as e

if TYPE_CHECKING:
    from clusterpool.client.client import Client

# For how long Ctrl-C waits for our own code to be done, which takes microseconds unless something hangs.
PUT_OFF_S = 3.0


class _Handler:
    """Of SIGINT: KeyboardInterrupt comes when the main thread is out of our own code, never in the middle of it."""

    def __init__(self, client: Client, callers: frozenset[CodeType]) -> None:
        self._client = client
        self._callers = callers
        self._put_off_s: float | None = None  # since when

    def __call__(self, signal_number: int, frame: FrameType | None) -> None:
        since_s = self._put_off_s
        # A callback of the user's that never ends runs within our code: at last the user must win.
        if may_raise(frame, self._callers) or (since_s is not None and monotonic() - since_s > PUT_OFF_S):
            self._put_off_s = None
            interrupt_work(self._client)
            signal.default_int_handler(signal_number, frame)
        if since_s is None:
            self._put_off_s = monotonic()
        interrupt_later()


def install(client: Client, callers: frozenset[CodeType]) -> bool:
    """Have Ctrl-C stop the work of `client`; False where it is not ours to handle. `callers`: as in frames.py."""
    if threading.current_thread() is not threading.main_thread():
        return False
    before = signal.getsignal(signal.SIGINT)
    # An earlier client of this program, which has been shut down since, has no work to stop.
    if before is not signal.default_int_handler and not isinstance(before, _Handler):
        return False  # the program has a handler of its own
    signal.signal(signal.SIGINT, _Handler(client, callers))
    return True


def interrupt_work(client: Client) -> None:
    """In the handler of a SIGINT that is about to raise KeyboardInterrupt: tasks are cancelled, children get it too.

    A terminal sends Ctrl-C to all processes of a program; ours have no terminal, so they get it from here. Else the
    program, interrupted, would wait at its end for children that know of nothing, and at the prompt of a session the
    next call would wait behind the work of the last one. The workers stay.
    """
    # Whoever sends the signal to the driver alone (`kill -INT`) means the driver alone.
    if client.kind == "driver" and not (_is_in_foreground() or _is_a_session()):
        return
    client.handle_event_later(e.WorkInterrupted())
    for child in list(client.deliveries.set_sinks.values()):
        if getattr(child, "is_child_process", False):
            client.handle_event_later(e.ChildSignalled(child.number, signal.SIGINT))


def _is_a_session() -> bool:
    """Whether somebody types the calls one by one: Python's own prompt, or a notebook, which has no terminal."""
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules


def _is_in_foreground() -> bool:
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
