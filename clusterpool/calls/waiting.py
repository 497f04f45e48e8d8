"""How a call waits for its results, and how a thread other than the client's loop ends such a wait.

`wait_until` turns the client's loop in the waiting thread, which looks at its predicate after each batch of
messages. A change that no message caused (the end of an iterable, a callback that has run) must be announced
by `wake_waiters`, after it was made. Used as `waiting.wait_until(...)`, so that tests can put other waits in
their place.
"""

from __future__ import annotations

from clusterpool.client import future as client_future
from clusterpool.client.api import wait_until

__all__ = ["wait_until", "wake_waiters"]


def wake_waiters() -> None:
    """Have every `wait_until` look at its predicate again; cheap, from any thread."""
    wake = client_future.wake_hook
    if wake is not None:
        wake()
