"""Generators of this worker that wait for whoever takes their items (core/stream_pace.py decides when)."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from clusterpool.core.stream_pace import ProducerPace
from clusterpool.worker.interrupts import Interrupted, Key

if TYPE_CHECKING:
    from clusterpool.worker.task_runner import TaskRunner

# What is said of a generator that has ended, or has not started, is kept; this bounds it.
PACES_MAX = 10_000


class StreamPaces:
    """By task. Notes come from whoever turns the loop; a generator's thread looks and waits."""

    def __init__(self, runner: TaskRunner) -> None:
        self._runner = runner
        self._paces: OrderedDict[Key, ProducerPace] = OrderedDict()

    def taken(self, key: Key, count: int) -> None:
        """The owner has taken so many items."""
        self._pace(key).taken(count)

    def _pace(self, key: Key) -> ProducerPace:
        pace = self._paces.get(key)
        if pace is None:
            pace = self._paces.setdefault(key, ProducerPace())
            if len(self._paces) > PACES_MAX:
                self._paces.popitem(last=False)
        return pace

    def open(self, key: Key, buffer: int) -> None:
        """A generator starts."""
        self._pace(key).bound(buffer)

    def close(self, key: Key) -> None:
        """It has ended."""
        self._paces.pop(key, None)

    def sent(self, key: Key, size_bytes: int) -> bool:
        """One more item is on its way; whether the generator may go on at once."""
        pace = self._paces.get(key)
        if pace is None:
            return True
        pace.sent(size_bytes)
        return pace.has_room

    def wait(self, key: Key) -> None:
        """Until there is room. The worker's CPU is lent to others meanwhile, the taker may be one of them.

        Raises: Interrupted when the task is cancelled; NotConnected.
        """
        pace, runner = self._paces.get(key), self._runner
        if pace is None:
            return
        runner.client.wait_until(lambda: pace.has_room or runner.interrupts.is_wanted(key))
        if runner.interrupts.take(key):
            raise Interrupted
