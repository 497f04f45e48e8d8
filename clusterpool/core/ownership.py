"""Who owns an object, who else holds a reference to it, and when it can go.

Every object has one owner, the process whose task or `put` made it. The owner counts

    local     references held by Python objects, messages and containers in the owner's own process
    pins      tasks in flight that have it as an argument
    borrowers references handed to other processes, by process

and frees the object when all are zero. A borrower counts its own local references, and how many times it has been
handed the object; when the last local reference goes it sends that number back (RemoveBorrower).

Whoever hands a reference to a process P tells the owner first (AddBorrower P), on the same ordered connection as its
own later RemoveBorrower. The owner's balance for P may be negative for a while, when P's RemoveBorrower overtakes the
giver's AddBorrower on another connection; the giver's own balance keeps the object alive meanwhile.
Source: the ownership protocol of "Ownership: A Distributed Futures System" (NSDI '21), section 4, simplified by
counting what was handed over instead of merging borrower sets.
"""

from __future__ import annotations

from typing import Any

from clusterpool.core.messages import Address, Reference, ValuePart

Key = tuple[Address, int]  # owner and number


class OwnedObject:
    """An object of this process. `value` is None until its task ends."""

    __slots__ = ("askers", "borrowers", "local", "number", "pins", "value", "waiting_tasks")

    def __init__(self, number: int, *, local: int) -> None:
        self.number = number
        self.value: ValuePart | None = None
        self.local = local
        self.pins = 0
        self.borrowers: dict[Address, int] = {}
        self.waiting_tasks: list[Any] = []  # tasks (opaque here) that have it as an argument
        self.askers: list[tuple[Address, int]] = []  # borrowers that asked for the value, with their request numbers

    @property
    def is_unused(self) -> bool:
        """Whether nobody can ever ask for it again."""
        return self.local <= 0 and self.pins == 0 and not self.borrowers and not self.askers


class BorrowedObject:
    """An object of another process, as seen from here."""

    __slots__ = ("handed", "is_asked", "local", "value", "waiting_tasks")

    def __init__(self) -> None:
        self.local = 0
        self.handed = 0
        self.value: ValuePart | None = None
        self.is_asked = False
        self.waiting_tasks: list[Any] = []


class OwnershipTable:
    """All objects that this process owns or borrows. Methods return what the composite must send or free."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.owned: dict[int, OwnedObject] = {}
        self.borrowed: dict[Key, BorrowedObject] = {}

    # --- local references

    def create(self, number: int, *, local: int = 1) -> OwnedObject:
        """A new object, whose value is not known yet."""
        assert number not in self.owned, f"object {number} exists"
        record = OwnedObject(number, local=local)
        self.owned[number] = record
        return record

    def hold(self, reference: Reference, *, was_handed: bool = False) -> None:
        """One more local reference; `was_handed`: it came in a message, so the owner counts it for us."""
        if reference.owner == self.address:
            record = self.owned.get(reference.number)
            if record is not None:
                record.local += 1
            return
        key = (reference.owner, reference.number)
        borrowed = self.borrowed.get(key)
        if borrowed is None:
            borrowed = self.borrowed[key] = BorrowedObject()
        borrowed.local += 1
        if was_handed:
            borrowed.handed += 1

    def drop(self, owner: Address, number: int) -> Dropped | None:
        """One local reference less; what follows when it was the last."""
        if owner == self.address:
            record = self.owned.get(number)
            if record is None:
                return None
            record.local -= 1
            return self._maybe_free(record)
        borrowed = self.borrowed.get((owner, number))
        if borrowed is None:
            return None
        borrowed.local -= 1
        if borrowed.local > 0 or borrowed.waiting_tasks:
            return None
        del self.borrowed[(owner, number)]
        inner = borrowed.value.references if borrowed.value is not None else []
        return Dropped(owner, number, borrowed.handed, None, inner)

    def let_go(self, number: int) -> list[Dropped]:
        """Whatever holds this object of ours in this process counts no more; what follows."""
        record = self.owned.get(number)
        if record is None:
            return []
        record.local = 0
        dropped = self._maybe_free(record)
        return [dropped] if dropped is not None else []

    def pin(self, reference: Reference) -> None:
        """A task that is being submitted has it as an argument."""
        if reference.owner == self.address:
            record = self.owned.get(reference.number)
            if record is not None:
                record.pins += 1
        else:
            self.hold(reference)

    def unpin(self, reference: Reference) -> Dropped | None:
        """That task is done."""
        if reference.owner != self.address:
            return self.drop(reference.owner, reference.number)
        record = self.owned.get(reference.number)
        if record is None:
            return None
        record.pins -= 1
        return self._maybe_free(record)

    # --- values

    def value_of(self, reference: Reference) -> ValuePart | None:
        """The value, if it is known here."""
        if reference.owner == self.address:
            record = self.owned.get(reference.number)
            if record is None:
                return ValuePart(lost_kind="object_lost", lost="the object was freed: no reference to it was left")
            return record.value
        borrowed = self.borrowed.get((reference.owner, reference.number))
        return borrowed.value if borrowed is not None else None

    def set_value(self, number: int, value: ValuePart) -> tuple[OwnedObject | None, Dropped | None]:
        """An object's task has ended; the record (to serve those who wait), and what to free when nobody cares."""
        record = self.owned.get(number)
        if record is None:
            return None, Dropped(self.address, number, 0, value, value.references)
        assert record.value is None, f"object {number} got a second value"
        record.value = value
        return record, None

    def settle(self, record: OwnedObject) -> Dropped | None:
        """After those who waited were served: free the object if nobody is left."""
        # A task that waited may have failed for this very value, and let go of the object already.
        return self._maybe_free(record) if self.owned.get(record.number) is record else None

    # --- other processes

    def hand_over(self, borrower: Address, references: list[Reference]) -> list[tuple[Address, list[int]]]:
        """References are about to be sent to `borrower`; whom to tell (AddBorrower), by owner."""
        foreign: dict[Address, list[int]] = {}
        for reference in references:
            if reference.owner == borrower:
                continue  # it comes home: its owner needs no account with itself
            if reference.owner == self.address:
                record = self.owned.get(reference.number)
                if record is not None:
                    _balance(record, borrower, 1)
            else:
                foreign.setdefault(reference.owner, []).append(reference.number)
        return list(foreign.items())

    def add_borrower(self, borrower: Address, numbers: list[int]) -> list[Dropped]:
        """Somebody handed our objects to `borrower`."""
        return self._change_balance(borrower, numbers, [1] * len(numbers))

    def remove_borrower(self, borrower: Address, numbers: list[int], counts: list[int]) -> list[Dropped]:
        """`borrower` has no local reference any more."""
        return self._change_balance(borrower, numbers, [-count for count in counts])

    def _change_balance(self, borrower: Address, numbers: list[int], changes: list[int]) -> list[Dropped]:
        dropped: list[Dropped] = []
        for number, change in zip(numbers, changes, strict=False):
            record = self.owned.get(number)
            if record is not None:
                _balance(record, borrower, change)
                _append(dropped, self._maybe_free(record))
        return dropped

    def forget_process(self, address: Address) -> list[Dropped]:
        """A process ended: it borrows nothing any more."""
        dropped: list[Dropped] = []
        for record in list(self.owned.values()):
            record.askers = [asker for asker in record.askers if asker[0] != address]
            if record.borrowers.pop(address, None) is not None:
                _append(dropped, self._maybe_free(record))
        return dropped

    def _maybe_free(self, record: OwnedObject) -> Dropped | None:
        # A pending object stays: its task still has to put its value somewhere.
        if record.value is None or not record.is_unused or record.waiting_tasks:
            return None
        del self.owned[record.number]
        return Dropped(self.address, record.number, 0, record.value, record.value.references)


class Dropped:
    """An object that this process has no use for any more."""

    __slots__ = ("handed", "inner", "number", "owner", "value")

    def __init__(
        self, owner: Address, number: int, handed: int, value: ValuePart | None, inner: list[Reference]
    ) -> None:
        self.owner = owner
        self.number = number
        self.handed = handed  # for a borrowed object: the count to give back to its owner
        self.value = value  # for an owned object: what to free
        self.inner = inner  # references that its value held


def _balance(record: OwnedObject, borrower: Address, change: int) -> None:
    balance = record.borrowers.get(borrower, 0) + change
    if balance:
        record.borrowers[borrower] = balance
    else:
        record.borrowers.pop(borrower, None)


def _append(dropped: list[Dropped], item: Dropped | None) -> None:
    if item is not None:
        dropped.append(item)
