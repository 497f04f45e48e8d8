"""What an owner does about values whose copies are lost: another copy, or the task that made them once more.

    known --its last node dies, or a reader says that it is gone--> lost --somebody wants it--> running --> known
                                                                      |                            |
                                                                      +--cannot be rebuilt-->  ObjectLost

A lost object keeps its value part, with no node in it; whoever tries to read that reports it here, so nobody needs to
know beforehand. Objects that nobody asks for are not rebuilt (docs/decisions/0013-lazy-rebuilding.md).
Results that go to a sink are no objects: see unread_results.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core import recovery_messages as r
from clusterpool.core.actors import ActorChannel
from clusterpool.core.dispatch import Task
from clusterpool.core.lineage import LineageRecord, LineageTable
from clusterpool.core.messages import Address, Reference, StoredValue, TaskStatus, ValuePart
from clusterpool.core.object_names import object_id
from clusterpool.core.ownership import OwnedObject
from clusterpool.core.unread_results import UnreadResults, task_again
from clusterpool.core.worker_set import WorkerSet

if TYPE_CHECKING:
    from clusterpool.core.owner import OwnerMachine

Commands = list[e.Command]

_NOT_REBUILDABLE = (
    "it cannot be rebuilt, because only what a task has made that may be run again can (retries= above 0, of which "
    "some are left; not what put(), a call of an actor or a stream that was closed early has made)"
)
_EVICTED = (
    "it cannot be rebuilt, because this process had more to remember for that than LINEAGE_BYTES_MAX, and forgot the "
    "oldest; keep fewer large objects, or store them in files"
)


class OwnerRecovery:
    """The part of an owner's machine that rebuilds."""

    def __init__(self, owner: OwnerMachine) -> None:
        self._owner = owner
        self._objects = owner.objects
        self._table = owner.objects.table
        self.lineage = LineageTable(self._table, owner.functions.dropped)
        owner.functions.take_over = self.lineage.take_over_functions
        self.running: dict[int, LineageRecord] = {}  # by task number, those that are run again
        self.unread = UnreadResults(owner)
        self._number_by_name: dict[str, int] = {}  # of stored objects
        self._lost_texts: dict[int, str] = {}  # by object that is lost or being rebuilt, what happened
        self._lost_again: dict[int, None] = {}  # made by a second run, and lost while it went on

    def handlers_of_events(self) -> dict[type, Callable[[Any, float], Commands]]:
        """For the owner's table."""
        return {
            e.ValueUnreadable: lambda event, _: self.unreadable(event.reference, event.unreadable)[0],
            e.ResultRead: self.unread.read,
            e.ChunkRead: self.unread.chunk_read,
            e.ResultUnreadable: self.unread.unreadable,
        }

    def handlers_of_messages(self) -> dict[type, Callable[[Address, Any, float], Commands]]:
        """For the owner's table."""
        return {
            r.CopyMade: lambda source, message, _: self._copy_made(source, message.object_id),
            r.CopyGone: lambda source, message, _: self._copy_gone(source, message),
            r.RequestsLost: lambda _, __, now_s: self._owner.ask_again(now_s),
        }

    # --- what is kept

    def task_ended(self, task: Task, result: m.TaskResult, source: WorkerSet | ActorChannel) -> Commands:
        """A task has a result that is more than a small value or an error; its arguments are still there."""
        if result.extras is not None:
            self._objects.hold_result(result)
        worker_set = source if isinstance(source, WorkerSet) else None
        if task.sink is None:
            return self._keep(task, result, worker_set)
        value = result.extras.value if result.extras is not None else None
        if value is not None and value.stored is not None and worker_set is not None:
            self.unread.task_ended(task, worker_set)
        return []

    def _keep(self, task: Task, result: m.TaskResult, worker_set: WorkerSet | None) -> Commands:
        record = self.running.get(task.spec.number)
        if record is not None:
            record.task = task
            return []
        if worker_set is None or task.retries_left <= 0:
            return []
        numbers = self._stored_numbers(task.spec.number, result)
        if not numbers:
            return []
        arguments = msgspec.structs.replace(self._objects.arguments_of(task), holders=None)
        task.spec = _without_values(task.spec)
        references, evicted = self.lineage.keep(task, worker_set.number, arguments, numbers)
        commands: Commands = []
        for number in evicted:
            owned = self._table.owned.get(number)
            if owned is not None and is_lost(owned.value):
                commands += self._lost_for_good(number, _EVICTED)
        return commands + self._drop(references)

    def _stored_numbers(self, number: int, result: m.TaskResult) -> dict[int, int]:
        if result.status == TaskStatus.STREAM_END:
            stream = self._objects.streams.get(number)
            items = stream.items if stream is not None else []
            owned = self._table.owned
            return {
                item: index
                for index, item in enumerate(items)
                if item in owned and (value := owned[item].value) is not None and value.stored is not None
            }
        if result.extras is None:
            return {}
        values: list[ValuePart | None] = [*result.extras.values] or [result.extras.value]
        return {
            number + offset: offset
            for offset, value in enumerate(values)
            if value is not None and value.stored is not None and number + offset in self._table.owned
        }

    def freed(self, number: int, value: ValuePart | None) -> list[Reference]:
        """An object of ours is no more; the references that are let go with what was kept to rebuild it."""
        self._lost_texts.pop(number, None)
        self._lost_again.pop(number, None)
        if value is not None and value.stored is not None:
            self._number_by_name.pop(value.stored.object_id, None)
        return self.lineage.object_freed(number)

    def known(self, number: int, value: ValuePart) -> Commands:
        """An object of ours has got a value."""
        if value.stored is not None:
            self._number_by_name[value.stored.object_id] = number
            return []
        self._lost_texts.pop(number, None)
        return self._drop(self.lineage.object_settled(number)) if number in self.lineage.by_object else []

    def _drop(self, references: list[Reference]) -> Commands:
        return self._objects.dropped([(reference.owner, reference.number) for reference in references])

    def orphans(self, worker_set: WorkerSet, message: m.WorkerExited) -> Commands:
        """A worker is gone that may have stored results which we have not heard of: nobody will ever ask for them."""
        slot = worker_set.dispatcher.slots.get(message.address.process_id)
        names: list[str] = []
        for task in slot.outstanding.values() if slot is not None else ():
            names += _names_of_results(self._owner.address, task.spec)
            if task.spec.number == message.task.started:
                break  # those behind it have not been begun
        return [e.Send(message.address.node, m.FreeObjects(names))] if names else []

    # --- copies

    def _copy_made(self, source: Address, object_id: str) -> Commands:
        value = self._stored_value(object_id)
        if value is None:  # freed meanwhile, or lost and rebuilt under another name
            return [e.Send(source, m.FreeObjects([object_id]))]
        assert value.stored is not None
        if source.node_id in value.stored.node_ids:
            return []
        commands: Commands = [] if value.stored.node_ids else [e.Send(source, r.PromoteCopy(object_id))]
        self._set_nodes(object_id, [*value.stored.node_ids, source.node_id])
        return commands

    def copies_made(self, stored: StoredValue) -> Commands:
        """A task that was tried again has stored the same thing again."""
        commands: Commands = []
        for node_id in stored.node_ids:
            commands += self._copy_made(Address(node_id, node_id), stored.object_id)
        return commands

    def _copy_gone(self, source: Address, message: r.CopyGone) -> Commands:
        number = self._number_by_name.get(message.object_id)
        if number is None:
            return []
        why = f": {message.text}" if message.text else ""
        text = f"its last copy, on node {source.node_id}, is gone{why}"
        return self._without_nodes(number, [source.node_id], text)

    def node_gone(self, node_id: str, text: str) -> Commands:
        """A node is lost, and the copies in its arena."""
        commands: Commands = []
        for number in [number for number, record in self._table.owned.items() if _has_copy_on(record, node_id)]:
            commands += self._without_nodes(number, [node_id], f"its only copy was on node {node_id}: {text}")
        return commands

    def _stored_value(self, object_id: str) -> ValuePart | None:
        number = self._number_by_name.get(object_id)
        record = self._table.owned.get(number) if number is not None else None
        return record.value if record is not None else None

    def _set_nodes(self, object_id: str, node_ids: list[str]) -> None:
        record = self._table.owned[self._number_by_name[object_id]]
        value = record.value
        assert value is not None and value.stored is not None
        stored = msgspec.structs.replace(value.stored, node_ids=node_ids)
        record.value = msgspec.structs.replace(value, stored=stored)

    def _without_nodes(self, number: int, gone: list[str], text: str) -> Commands:
        record = self._table.owned[number]
        stored = record.value.stored if record.value is not None else None
        if stored is None:
            return []
        left = [node_id for node_id in stored.node_ids if node_id not in gone]
        if len(left) == len(stored.node_ids):
            return []
        self._set_nodes(stored.object_id, left)
        if not left:
            return self._lost(number, text)
        if left[0] != stored.node_ids[0]:
            return [e.Send(Address(left[0], left[0]), r.PromoteCopy(stored.object_id))]
        return []

    def _lost(self, number: int, text: str) -> Commands:
        """No copy is left: it will be rebuilt when somebody wants it, if it can be."""
        self._lost_texts[number] = text
        if number in self.lineage.by_object:
            return []
        if self._objects.is_in_running_stream(number):
            return self._reset(self._table.owned[number])  # the generator is tried again, and sends it again
        return self._lost_for_good(number, _EVICTED if number in self.lineage.evicted else _NOT_REBUILDABLE)

    def _lost_for_good(self, number: int, reason: str) -> Commands:
        record = self._table.owned[number]
        commands = self._reset(record)
        self.lineage.evicted.pop(number, None)
        lineage = self.lineage.by_object.get(number)
        name = self._owner.functions.names.get(lineage.task.spec.function, "") if lineage is not None else ""
        made_by = f" (made by {name})" if name else ""
        text = f"object {number}{made_by}: {self._lost_texts.pop(number, 'its last copy is gone')}; {reason}"
        return commands + self._objects.set_value(number, ValuePart(lost_kind="object_lost", lost=text))

    def reset_if_lost(self, record: OwnedObject) -> Commands:
        """Make way for the value that comes of another run."""
        return self._reset(record) if is_lost(record.value) else []

    def _reset(self, record: OwnedObject) -> Commands:
        """The object has no value until it gets another one."""
        value, record.value = record.value, None
        if value is None:
            return []
        if value.stored is not None:
            self._number_by_name.pop(value.stored.object_id, None)
        return self._drop(value.references)

    # --- readers

    def unreadable(self, reference: Reference, unreadable: m.UnreadablePart) -> tuple[Commands, bool]:
        """A reader could not have this value; whether it makes sense to try again soon."""
        if reference.owner != self._owner.address:
            return self._ask_owner_again(reference, unreadable)
        record = self._table.owned.get(reference.number)
        value = record.value if record is not None else None
        if value is None or value.stored is None or value.stored.object_id != unreadable.object_id:
            return [], True
        # A reader that takes our own node for dead is wrong: we would not hear it.
        own = self._owner.node.node_id
        lost = [*unreadable.gone, *(node_id for node_id in unreadable.dead if node_id != own)]
        known, object_id = value.stored.node_ids, value.stored.object_id
        # If another is not dead either, it must not keep what nobody counts on any more.
        commands: Commands = [
            e.Send(Address(node_id, node_id), m.FreeObjects([object_id])) for node_id in known if node_id in lost
        ]
        commands += self._without_nodes(reference.number, lost, unreadable.text)
        commands += self.want(reference)
        return commands, bool(unreadable.gone or unreadable.dead) or not known

    def _ask_owner_again(self, reference: Reference, unreadable: m.UnreadablePart) -> tuple[Commands, bool]:
        borrowed = self._table.borrowed.get((reference.owner, reference.number))
        value = borrowed.value if borrowed is not None else None
        if borrowed is None or value is None or value.stored is None:
            return [], True
        if value.stored.object_id != unreadable.object_id:
            return [], True
        borrowed.value, borrowed.is_asked = None, False
        commands = self._objects.wanted(reference, next(self._owner.requests), unreadable)
        return commands + self._drop(value.references), bool(unreadable.gone or unreadable.dead)

    def want(self, reference: Reference) -> Commands:
        """Somebody waits for an object of ours: if it is lost, rebuild it."""
        record = self._table.owned.get(reference.number)
        return self.rebuild(reference.number) if record is not None and is_lost(record.value) else []

    def argument_lost(self, task: Task, result: m.TaskResult, target: WorkerSet | ActorChannel) -> Commands:
        """A worker could not read an argument, so that the call was not made: send it again when that is there."""
        assert result.extras is not None and result.extras.unreadable is not None
        unreadable = result.extras.unreadable
        arguments = self._objects.arguments_of(task)
        commands: Commands = []
        is_hopeful = task.spec.extras is None or task.spec.extras.stored is None
        for reference in arguments.dependencies:
            value = self._table.value_of(reference)
            if value is not None and value.stored is not None and value.stored.object_id == unreadable.object_id:
                asked, is_hopeful = self.unreadable(reference, unreadable)
                commands += asked
        is_spent = False
        if not is_hopeful:
            # Nobody says that it is gone, yet it cannot be read: two nodes may not reach each other.
            is_spent = task.retries_left == 0
            task.retries_left -= 1  # below 0: calls of an actor may be sent again without limit
        if is_spent:
            label = target.label(task) if isinstance(target, ActorChannel) else target.rescue.label(task)
            text = f"{label}, was not run, because an argument of it could not be read: {unreadable.text}"
            return commands + self._owner.checked([e.FailTasks([task], "object_lost", text)])
        task.worker = ""
        return commands + self._owner.arguments.await_again(task, target, self._objects.now_s)

    # --- rebuilding

    def rebuild(self, number: int) -> Commands:
        """Run the task of a lost object again, and first those of its arguments that are lost too."""
        commands: Commands = []
        wanted = deque([number])
        while wanted:
            number = wanted.popleft()
            record = self.lineage.by_object.get(number)
            if record is None:
                continue
            commands += self._await_run(number, record) if record.is_running else self._begin(record, wanted)
        return commands

    def _await_run(self, number: int, record: LineageRecord) -> Commands:
        """An object is lost whose task runs again already, for another of its objects: its value comes with that."""
        owned = self._table.owned.get(number)
        if owned is None or owned.value is None or owned.value.stored is None or not is_lost(owned.value):
            return []
        attempt = record.task.spec.extras.attempt if record.task.spec.extras is not None else 1
        if owned.value.stored.object_id == object_id(self._owner.address.process_id, number, attempt):
            self._lost_again[number] = None  # an item of a stream, which this run does not make once more
        return self._reset(owned)

    def _begin(self, record: LineageRecord, wanted: deque[int]) -> Commands:
        worker_set = self._owner.sets.get(record.set_number)
        if worker_set is None or worker_set.is_closing:
            return self._give_up(record, "it cannot be rebuilt, because the workers of its task have been let go")
        if record.task.retries_left <= 0:
            return self._give_up(record, "its task has been run as often as its retries= allow")
        arguments = record.arguments
        for reference in [*arguments.dependencies, *arguments.references]:
            if self._is_forgotten(reference):
                text = f"it cannot be rebuilt, because its argument, object {reference.number}, has been let go"
                return self._give_up(record, f"{text} with what was needed to make that again")
        commands = self._revive_arguments(arguments, wanted)
        for number in record.numbers:
            owned = self._table.owned.get(number)
            if owned is not None:
                commands += self.reset_if_lost(owned)
        task = task_again(record.task)
        record.task, record.is_running = task, True
        self.running[task.spec.number] = record
        return commands + self._owner.arguments.run_again(task, arguments, worker_set, self._objects.now_s)

    def _is_forgotten(self, reference: Reference) -> bool:
        if reference.owner != self._owner.address or reference.number in self._table.owned:
            return False
        return reference.number not in self.lineage.by_object

    def _revive_arguments(self, arguments: e.TaskArguments, wanted: deque[int]) -> Commands:
        """Dependencies must have values before the task starts; what is passed on as a reference must exist."""
        commands: Commands = []
        own = self._owner.address
        for reference in arguments.references:
            if reference.owner == own and reference.number not in self._table.owned:
                # As good as lost: rebuilt if the task asks for it.
                record = self._revive(reference.number)
                record.value = ValuePart(stored=StoredValue(f"{own.process_id}.{reference.number}~", 0, [], own))
        for reference in arguments.dependencies:
            if reference.owner != own:
                continue
            owned = self._table.owned.get(reference.number)
            if owned is None:
                owned = self._revive(reference.number)
            else:
                commands += self.reset_if_lost(owned)
            if owned.value is None:
                wanted.append(reference.number)
        return commands

    def _revive(self, number: int) -> OwnedObject:
        self.lineage.revive(number)
        self._lost_texts[number] = "it was an argument that had been let go"
        return self._table.create(number, local=0)

    def _give_up(self, record: LineageRecord, reason: str) -> Commands:
        commands: Commands = []
        for number in list(record.living):
            owned = self._table.owned.get(number)
            if owned is not None and (owned.value is None or is_lost(owned.value)):
                commands += self._lost_for_good(number, reason)
        return commands

    def rebuilt(self, number: int) -> Commands:
        """A task that was run again has ended, and its objects have got what values came of that."""
        record = self.running.pop(number)
        record.is_running = False
        commands: Commands = []
        for item in list(record.living):
            owned = self._table.owned.get(item)
            if item in self._lost_again:
                del self._lost_again[item]
                commands += self.rebuild(item)
            elif owned is not None and owned.value is None and not record.is_running:
                text = "its task was run again, but did not make it again"
                commands += self._lost_for_good(item, text)
            else:
                self._lost_texts.pop(item, None)
        return commands + self._drop(self.lineage.settle(record))

    def failure_of(self, task: Task, failure: e.FailTasks) -> ValuePart:
        """The value of a task's objects when it will never have a result."""
        if failure.error and failure.kind == "dependency":
            return ValuePart(error=failure.error)  # the error of the other task is this one's own
        if task.spec.number not in self.running or failure.error or failure.kind in ("cancelled", "not_connected"):
            return ValuePart(error=failure.error, lost_kind=failure.kind, lost=failure.text)
        numbers = self.running[task.spec.number].numbers
        texts = [self._lost_texts[number] for number in numbers if number in self._lost_texts]
        why = texts[0] if texts else "its last copy is gone"
        text = f"{why}; its task was run again, but that failed: {failure.text}"
        return ValuePart(lost_kind="object_lost", lost=text)

    def item_of(self, number: int, index: int) -> int | None:
        """The object of a stream's item, when the generator is run again for its lost ones."""
        record = self.running.get(number)
        if record is None:
            return None
        return next((item for item, place in record.numbers.items() if place == index), 0)

    def clear(self) -> None:
        """There is no cluster any more."""
        self.lineage.clear()
        self.running.clear()
        self.unread.clear()
        self._lost_again.clear()


def is_lost(value: ValuePart | None) -> bool:
    """Whether a value is known to have no copy left."""
    return value is not None and value.stored is not None and not value.stored.node_ids


def _has_copy_on(record: OwnedObject, node_id: str) -> bool:
    value = record.value
    return value is not None and value.stored is not None and node_id in value.stored.node_ids


def _names_of_results(owner: Address, spec: m.TaskSpec) -> list[str]:
    """As in worker/calls.py; not of a stream's items, of which only the last can be unknown here."""
    extras = spec.extras or m.TaskExtras()
    first = spec.number + (extras.span.part if extras.span is not None else 0)
    return [object_id(owner.process_id, first + offset, extras.attempt) for offset in range(extras.returns)]


def _without_values(spec: m.TaskSpec) -> m.TaskSpec:
    """The arguments' values are put in anew when the task is run again."""
    if spec.extras is None or not spec.extras.arguments:
        return spec
    return msgspec.structs.replace(spec, extras=msgspec.structs.replace(spec.extras, arguments=[]))
