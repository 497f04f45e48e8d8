"""In which order the outcomes of a lazy call are handed out. Pure; the caller holds the lock."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class InOrder(Generic[T]):
    """Hands out outcomes by their index, whatever order they came in (`imap`)."""

    def __init__(self) -> None:
        self.taken = 0  # also the index of the next outcome to hand out
        self._outcome_by_index: dict[int, T] = {}

    def add(self, index: int, outcome: T) -> None:
        assert index >= self.taken, f"outcome {index} came twice"
        assert index not in self._outcome_by_index, f"outcome {index} came twice"
        self._outcome_by_index[index] = outcome

    add_last = add

    def is_ready(self) -> bool:
        return self.taken in self._outcome_by_index

    def take(self) -> T:
        outcome = self._outcome_by_index.pop(self.taken)
        self.taken += 1
        return outcome


class AsTheyCome(Generic[T]):
    """Hands out outcomes in the order of their arrival (`imap_unordered`)."""

    def __init__(self) -> None:
        self.taken = 0
        self._outcomes: deque[T] = deque()
        self._last: tuple[int, T] | None = None

    def add(self, index: int, outcome: T) -> None:
        self._outcomes.append(outcome)

    def add_last(self, index: int, outcome: T) -> None:
        """The one that comes after all others, of which there are `index`."""
        self._last = index, outcome

    def is_ready(self) -> bool:
        return bool(self._outcomes) or (self._last is not None and self.taken == self._last[0])

    def take(self) -> T:
        if self._outcomes:
            outcome = self._outcomes.popleft()
        else:
            assert self._last is not None, "nothing is ready"
            outcome = self._last[1]
        self.taken += 1
        return outcome
