"""How a node reaches the control store: by itself, or through another node when it alone cannot. Pure.

             no answer, or failed twice                    failed
    direct ------------------------------> through peer 1 ---------> through peer 2 ... --> direct, for a while
      ^                                       |  ^  |worked
      |                                       |  +--+
      +---------------DirectWorked------------+

Whether the store is away or only this node is cut off cannot be told from here: so peers are tried in turn, and if none
helps the store is taken to be away, and tried directly for a while before the peers are asked again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# A refused connection may be a server that is just being started again; no answer at all has cost seconds already.
FAILURES_MAX = 2
PEERS_TRIED_MAX = 3
# Between two rounds through the peers. Longer keeps a node that is cut off silent for longer; shorter keeps a node from
# seeing at once that the store itself is back.
REST_S = 5.0


class AttemptFailed(NamedTuple):
    """An operation failed, by the way that is in use. `peers`: those that could pass it on, the best first."""

    peers: tuple[str, ...]
    had_no_answer: bool


class AttemptWorked(NamedTuple):
    """An operation was answered, by the way that is in use."""


class DirectWorked(NamedTuple):
    """While a peer passes everything on: the store has answered us directly."""


class UseWay(NamedTuple):
    """Make new connections so, and break those that go another way. `peer`: empty for direct."""

    peer: str


class StoreRoute:
    """Of one node; `peer` is the one in use."""

    def __init__(self) -> None:
        self.peer = ""
        self._failures = 0
        self._tried: list[str] = []
        self._rest_until_s: float | None = None

    def handle(self, event: AttemptFailed | AttemptWorked | DirectWorked, now_s: float) -> list[Any]:
        """`now_s`: monotonic seconds."""
        if isinstance(event, AttemptFailed):
            return self._failed(event, now_s)
        self._failures = 0
        self._tried.clear()
        self._rest_until_s = None
        if isinstance(event, DirectWorked) and self.peer:
            self.peer = ""
            return [UseWay("")]
        return []

    def _failed(self, event: AttemptFailed, now_s: float) -> list[Any]:
        if not self.peer:
            self._failures += 1
            if self._failures < FAILURES_MAX and not event.had_no_answer:
                return []
            if self._rest_until_s is not None and now_s < self._rest_until_s:
                return []
        self._failures = 0
        left = [peer for peer in event.peers if peer not in self._tried]
        if left and len(self._tried) < PEERS_TRIED_MAX:
            self._tried.append(left[0])
            self.peer = left[0]
            return [UseWay(self.peer)]
        self._tried.clear()
        self._rest_until_s = now_s + REST_S
        if not self.peer:
            return []
        self.peer = ""
        return [UseWay("")]
