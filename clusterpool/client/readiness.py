"""Which of many objects have values: looked at once, and then only told of those that get one.

    Readiness --scan--> ready at the start
        |
        +--the machine says that values are known--> noted --> ready

A program that takes ten thousand results one by one calls `wait` ten thousand times with all that are left, so each
pass over them counts: there is one that checks them all, and one more that ends at the first that are ready.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from operator import lt
from typing import TYPE_CHECKING, Any

from clusterpool.client.object_ref import ObjectRef
from clusterpool.client.reading import is_there
from clusterpool.core import owner_events as e
from clusterpool.core.messages import Address

if TYPE_CHECKING:
    from clusterpool.client.client import Client

Key = tuple[Address, int]


def are_own_and_distinct(refs: Sequence[Any], address: Address) -> bool:
    """Whether these are references to different objects of the process at `address`; False if that is not obvious."""
    try:
        # (`is`, because comparing addresses takes twice as long as all the rest.)
        numbers = [ref._number for ref in refs if ref._owner is address]
    except AttributeError:
        return False
    if len(numbers) < len(refs):
        return False
    # What was submitted in this order ascends; a set of numbers that lie 1024 apart takes three times as long.
    return all(map(lt, numbers, numbers[1:])) or len(set(numbers)) == len(numbers)


def check_distinct(refs: Sequence[Any]) -> None:
    """Raises: TypeError for what is no ObjectRef, ValueError for one that is there twice."""
    if any(not isinstance(ref, ObjectRef) for ref in refs):
        raise TypeError("wait() takes a sequence of ObjectRefs")
    if len(set(refs)) != len(refs):
        raise ValueError("wait() got the same ObjectRef twice")


class Readiness:
    """Which of `refs` have values; `count_max` of them are enough. Used by one waiting thread, in a `with`.

    `is_own`: all of them are this process's.
    """

    def __init__(self, client: Client, refs: Sequence[ObjectRef], *, count_max: int, is_own: bool) -> None:
        self._client = client
        self._refs = refs
        self._count_max = count_max
        self._is_own = is_own
        self._positions: dict[int, None] = {}  # of those that are ready
        self._position_by_key: dict[Key, int] | None = None  # made when it is needed
        self._noted: deque[Key] = deque()  # values that have become known
        self._note = self._noted.extend

    def __enter__(self) -> Readiness:
        # Under the lock, as whoever iterates over the listeners is: before the first look, so that nothing is missed.
        self._client.ask_machine(lambda _: self._client.deliveries.listeners.append(self._note))
        self._look()
        if not self.are_enough() and not self._is_own:
            for ref in self._refs:
                if ref._owner != self._client.address:
                    self._client.handle_event(e.ValueWanted(ref.part))
        return self

    def __exit__(self, *_: object) -> None:
        self._client.ask_machine(lambda _: self._client.deliveries.listeners.remove(self._note))

    def _look(self) -> None:
        table = self._client.machine.objects.table
        owned = table.owned
        for position, ref in enumerate(self._refs):
            if self._is_own:
                record = owned.get(ref._number)
                if record is not None and record.value is None:
                    continue
            if is_there(self._client, table.value_of(ref.part), ref.part):
                self._positions[position] = None
                if len(self._positions) >= self._count_max:
                    return

    def are_enough(self) -> bool:
        """Whether as many are ready as are wanted. The waiting thread asks, or whoever turns the loop for it."""
        while len(self._positions) < self._count_max:
            try:
                key = self._noted.popleft()
            except IndexError:
                return False
            position = self._position_of(key)
            if position is not None:
                reference = self._refs[position].part
                if is_there(self._client, self._client.machine.objects.table.value_of(reference), reference):
                    self._positions[position] = None
        return True

    def _position_of(self, key: Key) -> int | None:
        if self._position_by_key is None:
            self._position_by_key = {(ref._owner, ref._number): position for position, ref in enumerate(self._refs)}
        return self._position_by_key.get(key)

    def parted(self) -> tuple[list[ObjectRef], list[ObjectRef]]:
        """Those that are ready, as many as are wanted, and the rest; each in the order given."""
        positions = sorted(self._positions)[: self._count_max]
        rest: list[ObjectRef] = []
        low = 0
        for position in positions:
            rest += self._refs[low:position]
            low = position + 1
        rest += self._refs[low:]
        return [self._refs[position] for position in positions], rest
