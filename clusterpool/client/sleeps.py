"""Where threads of ours sleep in the kernel outside the loop. Ctrl-C may raise here: nothing is half done (frames.py).

Nothing else belongs into these functions: an exception may fall between any two of their byte codes.
"""

from __future__ import annotations

import socket
from collections import deque
from typing import Any


def receive(sock: socket.socket, bytes_max: int, box: deque[bytes]) -> None:
    """The next message, into `box`; for as long as the socket's own SO_RCVTIMEO, then BlockingIOError.

    Ctrl-C may be raised although there is a message in the box: C puts it there, before any byte code.
    """
    box.extend(map(sock.recv, (bytes_max,)))


def poll(poller: Any, timeout_s: float) -> bool:
    """Whether a descriptor of a `select.poll` became ready in time."""
    return bool(poller.poll(timeout_s * 1000))


def acquire(lock: Any, timeout_s: float, box: deque[bool]) -> None:
    """Whether a bare lock could be had in time, into `box`, as above."""
    box.extend(map(lock.acquire, (True,), (timeout_s,)))


CODES = frozenset(function.__code__ for function in (receive, poll, acquire))
