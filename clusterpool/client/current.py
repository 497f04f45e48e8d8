"""The one client of this process: the only global state there is."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from clusterpool.errors import NotConnected

if TYPE_CHECKING:
    from clusterpool.client.runtime import Runtime

_runtime: Runtime | None = None
lock = threading.RLock()  # held while a cluster is started, joined or left


def get() -> Runtime:
    """The runtime of this process.

    Raises: NotConnected when there is none.
    """
    if _runtime is None:
        raise NotConnected("clusterpool is not started in this process; call clusterpool.init() first")
    return _runtime


def get_if_any() -> Runtime | None:
    """The runtime, or None."""
    return _runtime


def set(runtime: Runtime | None) -> None:
    """Make `runtime` this process's one, or forget it."""
    global _runtime
    _runtime = runtime


def _forget_in_child() -> None:
    """A forked child has copies of our descriptors, but no I/O thread: it must start or join a cluster anew."""
    global lock
    lock = threading.RLock()
    runtime = _runtime
    if runtime is not None:
        set(None)
        runtime.client.abandon()


os.register_at_fork(after_in_child=_forget_in_child)
