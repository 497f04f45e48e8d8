"""What a process answers when its node counts the tokens of a thin semaphore (core/census.py).

A thread that sleeps in C may have got its token without having counted it. So an answer waits until every sleep that
was under way at the question has ended, which takes a slice of one at the most.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from clusterpool.core import coordination_messages as c

if TYPE_CHECKING:
    from clusterpool.client.client import Client
    from clusterpool.client.semaphore import Semaphore


class TokenCounts:
    """One per client."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._waiting: deque[tuple[c.CountHeld, Semaphore, frozenset[object]]] = deque()
        client.on_count_held = self._asked

    def _asked(self, question: c.CountHeld) -> None:
        """Called under the client's lock, by whoever turns the loop."""
        # Here, for processes that never use one.
        from clusterpool.client.semaphore import count_abandoned, find_known

        semaphore = find_known(question.name)
        if semaphore is None:
            self._send(question, count_abandoned(question.name), 0, False)
            return
        sleeping = frozenset(list(semaphore.sleeping.values()))
        if sleeping:
            self._waiting.append((question, semaphore, sleeping))
        else:
            self._send(question, *semaphore.count_held(question.request))

    def slept(self, semaphore: Semaphore) -> None:
        """One of its sleeps has ended."""
        if self._waiting:
            self._client.call_later(self._answer_due)

    def _answer_due(self) -> None:
        for _ in range(len(self._waiting)):
            question, semaphore, sleeping = self._waiting.popleft()
            if sleeping.isdisjoint(list(semaphore.sleeping.values())):
                self._send(question, *semaphore.count_held(question.request))
            else:
                self._waiting.append((question, semaphore, sleeping))

    def _send(self, question: c.CountHeld, held: int, given: int, is_busy: bool) -> None:
        if not self._client.is_closed:
            self._client.send(self._client.node, c.HeldCounted(question.request, question.name, held, given, is_busy))
