"""What an owner keeps in order to run a task again when what it made is lost.

    a task ends with a stored result --> record --(its last object goes, and nobody descends from it)--> forgotten
                                          |  ^
                                  rebuild |  | ends
                                          v  |
                                        running

Only results that lie in arenas have a record: small ones are with their owner, and go with it. Arguments that have a
record of their own may be freed, and are rebuilt first, in their turn; so a record lives as long as an object of it, or
as long as the record of a task that had one as an argument. Other arguments (put, small, made by actors, borrowed)
could not be had again: their values are kept for as long as the record.
Source: Ray paper, sections 4.2.1 and 4.2.3; "Ownership" (NSDI '21), section 4.3 (lineage reference counts).
"""

from __future__ import annotations

from collections import OrderedDict

from clusterpool.core.dispatch import Task
from clusterpool.core.messages import Reference
from clusterpool.core.owner_events import TaskArguments
from clusterpool.core.ownership import OwnershipTable

# What the records of one owner may hold: pickled calls, and values that are kept for them. More lets older objects be
# rebuilt, less keeps the owner small; beyond it the oldest are forgotten. Ray's border (max_lineage_bytes) is the same.
LINEAGE_BYTES_MAX = 1 << 30
# Measured size of a record without payload, with its entries in the tables; a border in bytes needs no better.
_RECORD_BYTES = 1000


class LineageRecord:
    """One task that could be run again."""

    __slots__ = (
        "arguments", "cost_bytes", "dependents", "held", "is_running", "living", "numbers", "parents", "set_number",
        "task",
    )  # fmt: skip

    def __init__(self, task: Task, set_number: int, arguments: TaskArguments, numbers: dict[int, int]) -> None:
        self.task = task  # as it was last run
        self.set_number = set_number
        self.arguments = arguments
        self.numbers = numbers  # of its stored objects; with their places among the results, or in the stream
        self.living = dict.fromkeys(numbers)  # those of them that somebody may still ask for
        self.parents: list[LineageRecord] = []  # once for each argument that may have to be rebuilt first
        self.dependents = 0  # records that have this one as a parent, once for each argument
        self.held: list[Reference] = []  # what could not be rebuilt is kept: one local reference each
        self.is_running = False
        self.cost_bytes = _RECORD_BYTES + len(task.spec.payload)

    @property
    def is_needed(self) -> bool:
        """Whether it may still have to run again, or does so now."""
        return bool(self.living or self.dependents or self.is_running)


class LineageTable:
    """The records of one owner. Methods return the references that are let go with forgotten records."""

    def __init__(self, table: OwnershipTable, dropped_functions: dict[int, None]) -> None:
        self._given_back = dropped_functions  # the owner's: those that it may forget when no task has them
        self.by_task: OrderedDict[int, LineageRecord] = OrderedDict()  # oldest first
        self.by_object: dict[int, LineageRecord] = {}  # freed objects too, for as long as their record lives
        self.functions: dict[int, int] = {}  # how many records have each function
        self._dropped: dict[int, None] = {}  # functions that only records have a use for
        self.evicted: dict[int, None] = {}  # living objects whose records had to go for lack of room
        self.size_bytes = 0  # Invariant: the sum of the records' costs
        self.bytes_max = LINEAGE_BYTES_MAX
        self._table = table

    def keep(
        self, task: Task, set_number: int, arguments: TaskArguments, numbers: dict[int, int]
    ) -> tuple[list[Reference], list[int]]:
        """Record a task that has just ended, while its arguments are still there.

        Returns: what is let go with older records that make room, and the objects that cannot be rebuilt any more.
        """
        record = LineageRecord(task, set_number, arguments, numbers)
        references = [*arguments.dependencies, *arguments.references]
        if arguments.payload_object is not None:
            references.append(arguments.payload_object)
        for reference in references:
            parent = self.by_object.get(reference.number) if reference.owner == self._table.address else None
            if parent is not None:
                parent.dependents += 1
                record.parents.append(parent)
            else:
                self._table.hold(reference)
                record.held.append(reference)
                record.cost_bytes += self._size_of(reference)
        self.by_task[task.spec.number] = record
        self.by_object.update(dict.fromkeys(numbers, record))
        function = task.spec.function
        self.functions[function] = self.functions.get(function, 0) + 1
        self.size_bytes += record.cost_bytes
        return self._make_room(record)

    def _size_of(self, reference: Reference) -> int:
        value = self._table.value_of(reference)
        if value is None:
            return 0
        return value.stored.size_bytes if value.stored is not None else len(value.payload)

    def _make_room(self, newest: LineageRecord) -> tuple[list[Reference], list[int]]:
        references: list[Reference] = []
        evicted: list[int] = []
        if self.size_bytes > self.bytes_max:
            for record in list(self.by_task.values()):
                if self.size_bytes <= self.bytes_max or record is newest:
                    break
                if record.is_running or record.task.spec.number not in self.by_task:
                    continue
                evicted += record.living
                references += self._forget(record)
        self.evicted.update(dict.fromkeys(evicted))
        return references, evicted

    def object_freed(self, number: int) -> list[Reference]:
        """An object of this process is no more."""
        self.evicted.pop(number, None)
        record = self.by_object.get(number)
        if record is None:
            return []
        record.living.pop(number, None)
        return self.settle(record)

    def object_settled(self, number: int) -> list[Reference]:
        """The object has a value that cannot be lost (a small one, or an error): nobody rebuilds it for itself."""
        record = self.by_object[number]
        record.living.pop(number, None)
        if not record.dependents:  # else it may have been let go by the time that they need it again
            del self.by_object[number]
            record.numbers.pop(number, None)
        return self.settle(record)

    def revive(self, number: int) -> None:
        """A freed object is wanted again, by a task that is run again."""
        self.by_object[number].living[number] = None

    def settle(self, record: LineageRecord) -> list[Reference]:
        """Forget the record, and those that were kept for it only, unless it may have to run again."""
        if record.is_needed or self.by_task.get(record.task.spec.number) is not record:
            return []
        return self._forget(record)

    def _forget(self, record: LineageRecord) -> list[Reference]:
        references: list[Reference] = []
        records = [record]
        while records:
            record = records.pop()
            del self.by_task[record.task.spec.number]
            for number in record.numbers:
                self.by_object.pop(number, None)
            function = record.task.spec.function
            self.functions[function] -= 1
            if not self.functions[function]:
                del self.functions[function]
                if function in self._dropped:
                    del self._dropped[function]
                    self._given_back[function] = None
            self.size_bytes -= record.cost_bytes
            references += record.held
            for parent in record.parents:
                parent.dependents -= 1
                if not parent.is_needed and self.by_task.get(parent.task.spec.number) is parent:
                    records.append(parent)
        return references

    def take_over_functions(self, numbers: set[int]) -> set[int]:
        """Which of these must not be forgotten; the owner has them back when they may be."""
        kept = {number for number in numbers if number in self.functions}
        self._dropped.update(dict.fromkeys(kept))
        return kept

    def clear(self) -> None:
        """There is no cluster any more."""
        self.by_task.clear()
        self.by_object.clear()
        self.functions.clear()
        self.evicted.clear()
        self.size_bytes = 0
