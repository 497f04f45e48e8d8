"""Where threads of ours sleep in the kernel outside the loop. Ctrl-C may raise here: nothing is half done (frames.py).

Nothing else belongs into these functions: an exception may fall between any two of their byte codes.
"""

from __future__ import annotations

import socket
from typing import Any


def receive(sock: socket.socket, bytes_max: int) -> bytes:
    """The next message; for as long as the socket's own SO_RCVTIMEO, then BlockingIOError."""
    return sock.recv(bytes_max)


def poll(poller: Any, timeout_s: float) -> bool:
    """Whether a descriptor of a `select.poll` became ready in time."""
    return bool(poller.poll(timeout_s * 1000))


def acquire(lock: Any, timeout_s: float) -> bool:
    """Whether a bare lock could be had in time."""
    return bool(lock.acquire(True, timeout_s))


CODES = frozenset(function.__code__ for function in (receive, poll, acquire))
