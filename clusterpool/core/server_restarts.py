"""When the control store's server is started again after its end. Pure: the caller passes the time.

    running --ServerEnded--> starting, after a delay --ServerReady--> running
                                 ^         |ServerFailed
                                 +---------+

The first restart comes at once, since everybody waits for it; the delay then doubles until the server has run for a
while. A server that keeps ending is a matter for people: they are told, once, and it is tried at longer intervals.
"""

from __future__ import annotations

from typing import Any, NamedTuple

DELAY_MIN_S = 0.1
DELAY_MAX_S = 5.0
# Restarts in a row before people are told. Fewer would tell of a port that is free again a second later.
RESTARTS_MAX = 8
# From then on. Longer keeps a cluster waiting when the disk has room again; shorter fills the log.
DELAY_AFTER_ALARM_S = 20.0
# A server that ran for this long counts as one that works.
STEADY_AFTER_S = 30.0


class ServerEnded(NamedTuple):
    """The server that was ready is gone; `text` says how."""

    text: str


class ServerFailed(NamedTuple):
    """A start led to nothing. `is_data_unreadable`: because of its append-only file."""

    text: str
    is_data_unreadable: bool = False


class ServerReady(NamedTuple):
    """It answers, with its data loaded."""


class StartServer(NamedTuple):
    """Start it again after this time; `sets_data_aside`: without the data that it could not read."""

    after_s: float
    sets_data_aside: bool = False


class RaiseAlarm(NamedTuple):
    """Somebody must act: it ends again and again."""

    text: str


class ServerRestarts:
    """Of one server."""

    def __init__(self) -> None:
        self._restarts = 0  # in a row, without a steady run in between
        self._ready_s: float | None = None

    def handle(self, event: ServerEnded | ServerFailed | ServerReady, now_s: float) -> list[Any]:
        """`now_s`: monotonic seconds."""
        if isinstance(event, ServerReady):
            self._ready_s = now_s
            return []
        if self._ready_s is not None and now_s - self._ready_s >= STEADY_AFTER_S:
            self._restarts = 0
        self._ready_s = None
        self._restarts += 1
        sets_aside = isinstance(event, ServerFailed) and event.is_data_unreadable
        if self._restarts <= RESTARTS_MAX:
            return [StartServer(self._delay_s(), sets_aside)]
        start = StartServer(DELAY_AFTER_ALARM_S, sets_aside)
        return [RaiseAlarm(event.text), start] if self._restarts == RESTARTS_MAX + 1 else [start]

    def _delay_s(self) -> float:
        if self._restarts == 1:
            return 0.0
        delay_s: float = DELAY_MIN_S * 2 ** (self._restarts - 2)
        return min(DELAY_MAX_S, delay_s)
