"""What Ctrl-C in a program does to its work elsewhere: all of it stops, as if its processes had a terminal."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

from clusterpool.core import owner_events as e

if TYPE_CHECKING:
    from clusterpool.client.client import Client


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
