"""What a process answers when its node counts the tokens of a thin semaphore (core/census.py).

A thread that sleeps in C may have got its token without having counted it. So an answer waits until every sleep that
was under way at the question has ended, which takes a slice of one at the most.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

from clusterpool.core import coordination_messages as c

if TYPE_CHECKING:
    from clusterpool.client.client import Client
    from clusterpool.client.semaphore import Semaphore


# For how long a lock counts what it gives back after a first question. Often there is no second, since the holder was
# found; two questions of one census are never further apart, unless some process answers very late.
WATCHED_S = 3.0
# By name, what was collected while this process held tokens of it: the next task may unpickle it and give them back.
held_by_nobody: dict[str, tuple[Any, HeldTokens]] = {}


class HeldTokens:
    """What must be known of one semaphore in this process, apart from what C counts. `is_quick`: for locks, below."""

    def __init__(self, *, is_recursive: bool, is_quick: bool) -> None:
        self._is_recursive = is_recursive
        self._is_quick = is_quick
        # Called for each token that is given back: a counter in C, since nothing else is as quick. Looking counts too.
        self.count_given: Callable[[], int] = itertools.count().__next__
        self._looks = 0
        self.sleeping: dict[int, object] = {}  # by thread that sleeps in C, an object for this one sleep
        self.giving: list[None] = []  # one for each thread that brings a token from here to the control store
        self._asked_by = 0
        self._watched = 0  # the census for which it is watched, and since when
        self._watched_s = 0.0

    def count(self, thin: Any, census: int, rewire: Callable[[], None]) -> tuple[int, int, bool]:
        """The tokens that this process holds, how many it has given back, whether that is just changing.

        census: its number. The same one asks twice, and only the difference matters. Locks, which are to be quick,
        count what they give back from the first question to the second alone; `rewire` has that begin or end.
        """
        is_again = self._asked_by == census
        is_late = self._is_quick and is_again and self._watched != census
        self._asked_by = census
        if self._is_quick and not is_again:
            self._watched, self._watched_s = census, monotonic()
            rewire()
        given = self.count_given()
        held = thin._count() if thin is not None else 0
        is_busy = self.count_given() != given + 1 or is_late or bool(self.giving)
        self._looks += 2
        if is_again and self._watched:
            self.unwatch()
            rewire()
        return (min(held, 1) if self._is_recursive else held), given - self._looks, is_busy

    @property
    def is_watched(self) -> bool:
        """Whether a lock is to count what it gives back."""
        return self._watched != 0

    @property
    def is_watched_in_vain(self) -> bool:
        """Whether there will be no second question."""
        return monotonic() - self._watched_s > WATCHED_S

    def unwatch(self) -> None:
        """Count no longer."""
        self._watched = 0

    def forget_threads(self) -> None:
        """After a fork, in the child."""
        self.sleeping, self.giving = {}, []


class TokenCounts:
    """One per client."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._waiting: deque[tuple[c.CountHeld, Semaphore, frozenset[object]]] = deque()
        self._settled: weakref.WeakSet[Semaphore] | None = None
        client.on_count_held = self._asked

    def settle_at_exit(self, semaphore: Semaphore) -> None:
        """When this process ends in order with tokens of this semaphore, they are no dead one's: it means to keep them.

        As a producer does that has taken the places of what it leaves behind.
        """
        if self._settled is None:
            from multiprocessing.util import Finalize

            self._settled = weakref.WeakSet()
            # Killed processes do not come here. All that end in order run the standard module's finalizers.
            Finalize(None, self._settle, exitpriority=-6)
        self._settled.add(semaphore)

    def _settle(self) -> None:
        for semaphore in list(self._settled or ()):
            semaphore.keep_for_ever()

    def _asked(self, question: c.CountHeld) -> None:
        """Called under the client's lock, by whoever turns the loop."""
        # Here, for processes that never use one.
        from clusterpool.client.semaphore import find_known

        semaphore = find_known(question.name)
        if semaphore is None:
            self._send(question, _count_abandoned(question.name), 0, False)
            return
        sleeping = frozenset(list(semaphore.counted.sleeping.values()))
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
            if sleeping.isdisjoint(list(semaphore.counted.sleeping.values())):
                self._send(question, *semaphore.count_held(question.request))
            else:
                self._waiting.append((question, semaphore, sleeping))

    def _send(self, question: c.CountHeld, held: int, given: int, is_busy: bool) -> None:
        if not self._client.is_closed:
            self._client.send(self._client.node, c.HeldCounted(question.request, question.name, held, given, is_busy))


def _count_abandoned(name: str) -> int:
    thin, _ = held_by_nobody.get(name, (None, None))
    if thin is None:
        return 0
    held: int = thin._count()
    return min(held, 1) if thin.kind == 0 else held
