"""How a call waits for its results, and how a thread other than the client's loop ends such a wait.

`wait_until` turns the client's loop in the waiting thread, which looks at its predicate after each batch of
messages. A change that no message caused (the end of an iterable, a callback that has run) must be announced
by `wake_waiters`, after it was made. Used as `waiting.wait_until(...)`, so that tests can put other waits in
their place.
"""

from __future__ import annotations

from collections.abc import Callable

from clusterpool.client import current
from clusterpool.client import future as client_future
from clusterpool.client.api import wait_until
from clusterpool.client.loop import HAND_BACK_S

__all__ = ["SOON_S", "turn_for_soon", "wait_until", "wake_waiters"]

# What happens within this time is worth turning the loop for.
SOON_S = HAND_BACK_S


def turn_for_soon(predicate: Callable[[], bool]) -> None:
    """Turn the client's loop, if no other thread does, until `predicate()` or for SOON_S."""
    runtime = current.get_if_any()
    if runtime is not None:
        runtime.client.loop.turn_for(predicate, SOON_S)


def wake_waiters() -> None:
    """Have every `wait_until` look at its predicate again; cheap, from any thread."""
    wake = client_future.wake_hook
    if wake is not None:
        wake()
