"""The objects' half of an owner: values, arguments that are not known yet, references that come and go."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.dispatch import Task
from clusterpool.core.messages import Address, Reference, TaskStatus, ValuePart
from clusterpool.core.ownership import BorrowedObject, Dropped, OwnedObject, OwnershipTable
from clusterpool.core.stream_pace import step_for, step_of

if TYPE_CHECKING:
    from clusterpool.core.owner_recovery import OwnerRecovery

Commands = list[e.Command]


_NO_ARGUMENTS = e.TaskArguments([], [])


class OwnerObjects:
    """Objects owned and borrowed, tasks that wait for them, streams."""

    recovery: OwnerRecovery  # set by the composite

    def __init__(self, address: Address, node: Address, numbers: Iterator[int]) -> None:
        self.address = address
        self.node = node
        self.table = OwnershipTable(address)
        self.streams: dict[int, e.Stream] = {}
        self.lifetimes: dict[int, Callable[[], Commands]] = {}  # by object number, what its end is the end of
        self.on_known: Callable[[Task, float], Commands] = lambda _task, _now_s: []
        self._numbers = numbers
        self._arguments: dict[int, e.TaskArguments] = {}  # by task number
        self._missing: dict[int, int] = {}  # by task number, how many arguments are not known yet
        self._asked: dict[int, Reference] = {}  # by request number
        self._watched: set[Address] = set()
        self._woken: deque[Task] = deque()  # whose last argument has become known
        self._is_waking = False
        self.now_s = 0.0  # of the event that is being handled

    # --- arguments

    def expect_arguments(
        self, task: Task, arguments: e.TaskArguments, requests: Iterator[int]
    ) -> tuple[Commands, bool]:
        """Keep a task's references alive and ask for unknown values; whether all are known already."""
        number = task.spec.number
        self._arguments[number] = arguments
        for reference in arguments.dependencies:
            self.table.pin(reference)
        for reference in arguments.references:
            self.table.hold(reference)
        return self.await_values(task, requests)

    def await_values(self, task: Task, requests: Iterator[int]) -> tuple[Commands, bool]:
        """Ask for those values of a task's arguments that are unknown or lost; whether there are none."""
        number = task.spec.number
        dependencies = self.arguments_of(task).dependencies
        commands: Commands = []
        for reference in dependencies:
            if reference.owner == self.address:
                commands += self.recovery.want(reference)
        missing = 0
        for reference in dependencies:
            if self.table.value_of(reference) is None:
                missing += 1
                self._record_of(reference).waiting_tasks.append(task)
                commands += self.wanted(reference, next(requests))
        if missing:
            self._missing[number] = missing
        return commands, missing == 0

    def _record_of(self, reference: Reference) -> OwnedObject | BorrowedObject:
        if reference.owner == self.address:
            return self.table.owned[reference.number]
        return self.table.borrowed[(reference.owner, reference.number)]

    def arguments_of(self, task: Task) -> e.TaskArguments:
        """The references of a task that has not ended."""
        return self._arguments.get(task.spec.number, _NO_ARGUMENTS)

    def has_arguments(self, number: int) -> bool:
        """Whether the task has any references, which are held for it."""
        return number in self._arguments

    def has_values(self, task: Task) -> bool:
        """Whether all of a task's arguments can be read, as far as is known."""
        for reference in self.arguments_of(task).dependencies:
            value = self.table.value_of(reference)
            if value is None or (value.stored is not None and not value.stored.node_ids):
                return False
        return True

    def put_arguments(self, task: Task) -> e.FailTasks | None:
        """Write the values into the task; the failure when one of them is an error."""
        arguments = self.arguments_of(task)
        values: list[ValuePart] = []
        for reference in arguments.dependencies:
            value = self.table.value_of(reference)
            assert value is not None, "a dependency lost its value"
            if value.error or value.lost_kind:
                return e.FailTasks([task], value.lost_kind or "dependency", value.lost, None, value.error)
            values.append(value)
        if values:
            assert task.spec.extras is not None
            extras = msgspec.structs.replace(task.spec.extras, arguments=values)
            task.spec = msgspec.structs.replace(task.spec, extras=extras)
        return None

    def release_arguments(self, task: Task) -> Commands:
        """The task has ended, one way or another."""
        arguments = self._arguments.pop(task.spec.number, None)
        if arguments is None:
            return []
        self._missing.pop(task.spec.number, None)
        dropped = [self.table.unpin(reference) for reference in arguments.dependencies]
        dropped += [self.table.drop(reference.owner, reference.number) for reference in arguments.references]
        if arguments.payload_object is not None:
            # The task took over the one reference that the value was put with.
            dropped.append(self.table.drop(arguments.payload_object.owner, arguments.payload_object.number))
        return self._let_go([item for item in dropped if item is not None])

    def hand_over(self, receiver: Address, references: list[Reference]) -> Commands:
        """References go to another process with the next message: tell their owners first."""
        if not references:
            return []
        commands: Commands = [
            e.Send(owner, m.AddBorrower(receiver, numbers))
            for owner, numbers in self.table.hand_over(receiver, references)
        ]
        return commands + self.watch(receiver)

    def hold_result(self, result: m.TaskResult) -> None:
        """Keep the references inside a result that goes to a sink; the shell drops them after loading it."""
        assert result.extras is not None
        for value in [result.extras.value, *result.extras.values]:
            if value is not None:
                for reference in value.references:
                    self.table.hold(reference, was_handed=True)

    # --- values

    def expect_results(self, task: Task) -> None:
        """A task without a sink is being submitted: its results are objects, each with one reference already."""
        extras = task.spec.extras
        returns = extras.returns if extras is not None else 1
        for offset in range(returns):  # none for a stream (-1), which makes its objects as it goes
            self.table.create(task.spec.number + offset)

    def task_ended(self, task: Task, result: m.TaskResult) -> Commands:
        """A task without a sink has a result: its objects get their values."""
        extras = task.spec.extras
        returns = extras.returns if extras is not None else 1
        if returns == -1:
            return self._stream_ended(task, result)
        if result.extras is not None:
            values = result.extras.values or [result.extras.value or ValuePart()]
        else:
            values = [_value_of_result(result)] * returns
        commands: Commands = []
        for offset, value in enumerate(values[:returns]):
            commands += self._result_known(task.spec.number + offset, value)
        return commands

    def _result_known(self, number: int, value: ValuePart) -> Commands:
        record = self.table.owned.get(number)
        commands = self.recovery.reset_if_lost(record) if record is not None else []
        if record is not None and record.value is not None:
            # The task was run again for another of its results, and this one was not lost.
            return self._let_go([Dropped(self.address, 0, 0, value, value.references)])
        return commands + self.set_value(number, value)

    def task_failed(self, task: Task, failure: e.FailTasks) -> Commands:
        """A task without a sink will never have a result."""
        value = self.recovery.failure_of(task, failure)
        extras = task.spec.extras
        returns = extras.returns if extras is not None else 1
        if returns == -1:
            return self._stream_failed(task.spec.number, value)
        commands: Commands = []
        for offset in range(returns):
            commands += self._result_known(task.spec.number + offset, value)
        return commands

    def set_value(self, number: int, value: ValuePart) -> Commands:
        """An owned object gets its value; those who wait for it are served."""
        record, dropped = self.table.set_value(number, value)
        if record is None:
            return self._let_go([dropped] if dropped is not None else [])
        commands: Commands = [e.ValuesKnown([(self.address, number)])]
        if value.stored is not None or self.recovery.lineage.by_object:
            commands += self.recovery.known(number, value)
        for asker, request in record.askers:
            commands += self._answer(asker, request, value)
        record.askers.clear()
        waiting, record.waiting_tasks = record.waiting_tasks, []
        commands += self._wake(waiting)
        dropped = self.table.settle(record)
        return commands + self._let_go([dropped] if dropped is not None else [])

    def _wake(self, tasks: list[Task]) -> Commands:
        for task in tasks:
            left = self._missing.get(task.spec.number, 0) - 1
            if left > 0:
                self._missing[task.spec.number] = left
            elif self._missing.pop(task.spec.number, None) is not None:
                self._woken.append(task)
        if self._is_waking:
            return []  # an error goes down a chain of tasks that wait for one another, which may be of any length
        commands: Commands = []
        self._is_waking = True
        while self._woken:
            commands += self.on_known(self._woken.popleft(), self.now_s)
        self._is_waking = False
        return commands

    def wanted(self, reference: Reference, request: int, unreadable: m.UnreadablePart | None = None) -> Commands:
        """Somebody here waits for a value: ask its owner, once; or have it rebuilt, if it is our own and lost."""
        if reference.owner == self.address:
            return self.recovery.want(reference)
        borrowed = self.table.borrowed.get((reference.owner, reference.number))
        if borrowed is None or borrowed.is_asked:
            return []
        borrowed.is_asked = True
        self._asked[request] = reference
        question = m.ResolveObject(request, reference.number, unreadable)
        return [*self.watch(reference.owner), e.Send(reference.owner, question)]

    def asked(self, source: Address, message: m.ResolveObject) -> Commands:
        """A borrower wants a value of ours."""
        reference = Reference(self.address, message.number)
        if message.unreadable is not None:
            commands = self.recovery.unreadable(reference, message.unreadable)[0]
        else:
            commands = self.recovery.want(reference)
        record = self.table.owned.get(message.number)
        if record is None:
            gone = ValuePart(lost_kind="object_lost", lost="its owner has freed the object")
            return [*commands, e.Send(source, m.ObjectResolved(message.request, gone))]
        if record.value is None:
            record.askers.append((source, message.request))
            return commands
        return commands + self._answer(source, message.request, record.value)

    def _answer(self, asker: Address, request: int, value: ValuePart) -> Commands:
        commands = self.hand_over(asker, value.references)
        commands.append(e.Send(asker, m.ObjectResolved(request, value)))
        return commands

    def resolved(self, message: m.ObjectResolved) -> Commands:
        """The owner answered."""
        reference = self._asked.pop(message.request, None)
        for inner in message.value.references:
            self.table.hold(inner, was_handed=True)
        if reference is None:
            return []
        return self._borrowed_known((reference.owner, reference.number), message.value)

    def _borrowed_known(self, key: tuple[Address, int], value: ValuePart) -> Commands:
        borrowed = self.table.borrowed.get(key)
        if borrowed is None or borrowed.value is not None:  # let go, or asked for twice because it was in between
            return self.dropped([(inner.owner, inner.number) for inner in value.references])
        borrowed.value = value
        waiting, borrowed.waiting_tasks = borrowed.waiting_tasks, []
        return [e.ValuesKnown([key]), *self._wake(waiting)]

    # --- references

    def dropped(self, keys: list[tuple[Address, int]]) -> Commands:
        """Local references went."""
        items = [self.table.drop(owner, number) for owner, number in keys]
        return self._let_go([item for item in items if item is not None])

    def _let_go(self, items: list[Dropped]) -> Commands:
        commands: Commands = []
        while items:
            item = items.pop()
            if item.owner != self.address:
                commands.append(e.Send(item.owner, m.RemoveBorrower([item.number], [item.handed])))
            elif item.number in self.lifetimes:
                commands += self.lifetimes.pop(item.number)()
            elif item.value is not None and item.value.stored is not None:
                stored = item.value.stored
                commands += [
                    e.Send(Address(node_id, node_id), m.FreeObjects([stored.object_id])) for node_id in stored.node_ids
                ]
            inner = item.inner
            if item.owner == self.address and (item.value is None or item.value.stored is not None):
                inner = [*inner, *self.recovery.freed(item.number, item.value)]
            for reference in inner:
                dropped = self.table.drop(reference.owner, reference.number)
                if dropped is not None:
                    items.append(dropped)
        return commands

    def add_borrower(self, message: m.AddBorrower) -> Commands:
        """Somebody passed references of ours on."""
        dropped = self.table.add_borrower(message.borrower, message.numbers)
        return self.watch(message.borrower) + self._let_go(dropped)

    def remove_borrower(self, source: Address, message: m.RemoveBorrower) -> Commands:
        """A borrower let go."""
        return self._let_go(self.table.remove_borrower(source, message.numbers, message.counts))

    def watch(self, address: Address) -> Commands:
        """Have the process's node tell us when it ends."""
        if address in self._watched or address == self.address:
            return []
        self._watched.add(address)
        return [e.Send(address.node, m.WatchProcess(address.process_id))]

    def is_needed(self) -> bool:
        """Whether another process has a reference to an object of ours."""
        return any(record.borrowers or record.askers for record in list(self.table.owned.values()))

    def retiring(self) -> Commands:
        """No task runs here any more: an actor that was made here is needed only if others have handles of it."""
        commands: Commands = []
        for number in list(self.lifetimes):
            commands += self._let_go(self.table.let_go(number))
        return commands

    def discard_result(self, result: m.TaskResult) -> Commands:
        """Nobody waits for this result any more: free what is stored of it, and let go of its references."""
        self.hold_result(result)
        return self.discard_held(result)

    def discard_held(self, result: m.TaskResult) -> Commands:
        """The same of a result whose references are held already."""
        assert result.extras is not None
        values = [value for value in (result.extras.value, *result.extras.values) if value is not None]
        return self._let_go([Dropped(self.address, 0, 0, value, value.references) for value in values])

    def is_watched(self, address: Address) -> bool:
        """Whether its node will tell us when this process ends."""
        return address in self._watched

    # --- the end of others

    def process_gone(self, address: Address, text: str) -> Commands:
        """A process ended: it borrows nothing, and what it owned is lost."""
        self._watched.discard(address)
        # It will not answer.
        self._asked = {request: asked for request, asked in self._asked.items() if asked.owner != address}
        commands = self._let_go(self.table.forget_process(address))
        for key, borrowed in list(self.table.borrowed.items()):
            if key[0] != address:
                continue
            borrowed.handed = 0  # should it live, on a node that was taken for dead, it does not count us any more
            if borrowed.value is None:
                who = f"process {address.process_id} on node {address.node_id}"
                lost = f"object {key[1]} of {who} ended with that, which owned it: {text}"
                commands += self._borrowed_known(key, ValuePart(lost_kind="owner_died", lost=lost))
        return commands

    def lose_unknown(self, kind: str, text: str) -> Commands:
        """Values that others were to send will not come."""
        commands: Commands = []
        for key, borrowed in list(self.table.borrowed.items()):
            if borrowed.value is None:
                commands += self._borrowed_known(key, ValuePart(lost_kind=kind, lost=text))
        return commands

    def node_gone(self, node_id: str, text: str) -> Commands:
        """A node is lost: its processes are gone, and the copies of objects in its arena."""
        addresses = {key[0] for key in self.table.borrowed if key[0].node_id == node_id}
        addresses |= {address for address in self._watched if address.node_id == node_id}
        commands: Commands = []
        for address in sorted(addresses):
            commands += self.process_gone(address, text)
        return commands + self.recovery.node_gone(node_id, text)

    # --- streams

    def open_stream(self, number: int, buffer: int = 0) -> e.Stream:
        """A generator task is about to be submitted. `buffer`: as in TaskExtras."""
        stream = self.streams[number] = e.Stream(step_of(buffer))
        return stream

    def close_stream(self, number: int, taken: int) -> Commands:
        """Nobody will take more than the first `taken` items."""
        stream = self.streams.pop(number, None)
        if stream is None:
            return []
        stream.is_ended = True
        return self.dropped([(self.address, item) for item in stream.items[taken:]])

    def items_taken(self, number: int, taken: int) -> Commands:
        """Whoever iterates has got so far: the generator may go on."""
        stream = self.streams.get(number)
        if stream is None or stream.is_ended or taken <= stream.taken:
            return []
        stream.taken = taken
        return [e.Send(stream.source, m.StreamTaken(number, taken))] if stream.source is not None else []

    def stream_item(self, source: Address, message: m.StreamItem) -> Commands:
        """A generator task has yielded."""
        for inner in message.value.references:
            self.table.hold(inner, was_handed=True)
        item = self.recovery.item_of(message.number, message.index)
        if item is not None:
            go_on = e.Send(source, m.StreamTaken(message.number, message.index + 1))
            return [*self._result_known(item, message.value), go_on]
        stream = self.streams.get(message.number)
        if stream is not None:
            stream.source = source
            stream.step = step_for(stream.step, _size_of(message.value))
        if stream is None or message.index < len(stream.items):
            # Nobody will take it, so nobody would tell.
            go_on = e.Send(source, m.StreamTaken(message.number, message.index + 1))
            item = stream.items[message.index] if stream is not None else 0
            return [*self._item_repeated(item, message.value), go_on]
        number = next(self._numbers)
        self.table.create(number)
        stream.items.append(number)
        return [*self.set_value(number, message.value), e.StreamMoved(message.number)]

    def _item_repeated(self, item: int, value: ValuePart) -> Commands:
        # The stream is closed, or a retry repeats what the first attempt has sent.
        record = self.table.owned.get(item)
        commands = self.recovery.reset_if_lost(record) if record is not None else []
        if record is not None and record.value is None:
            return commands + self.set_value(item, value)  # it was lost with the node of the first attempt
        if value.stored is not None:
            # Under the name of the first one it is a copy more; under that of a later attempt nobody knows it: it goes.
            commands = self.recovery.copies_made(value.stored)
            value = msgspec.structs.replace(value, stored=None)
        return commands + self._let_go([Dropped(self.address, 0, 0, value, value.references)])

    def is_in_running_stream(self, number: int) -> bool:
        """Whether the object is an item of a generator that has not ended."""
        for stream in self.streams.values():
            position = bisect_left(stream.items, number)  # their numbers ascend
            if not stream.is_ended and stream.items[position : position + 1] == [number]:
                return True
        return False

    def _stream_ended(self, task: Task, result: m.TaskResult) -> Commands:
        stream = self.streams.get(task.spec.number)
        if result.status == TaskStatus.STREAM_END:
            if stream is None:
                return []
            stream.count = int(result.payload)
            stream.is_ended = True
            return [e.StreamMoved(task.spec.number)]
        return self._stream_failed(task.spec.number, _value_of_result(result))

    def _stream_failed(self, number: int, value: ValuePart) -> Commands:
        stream = self.streams.get(number)
        if number in self.recovery.running:
            return self._fail_lost_items(list(self.recovery.running[number].living), value)
        if stream is None:
            return []
        commands = self._fail_lost_items(stream.items, value)
        item = next(self._numbers)
        self.table.create(item)
        stream.items.append(item)
        stream.is_ended = True
        return [*commands, *self.set_value(item, value), e.StreamMoved(number)]

    def _fail_lost_items(self, items: list[int], value: ValuePart) -> Commands:
        commands: Commands = []
        for item in items:
            record = self.table.owned.get(item)
            if record is not None and record.value is None:
                commands += self.set_value(item, value)
        return commands


def _size_of(value: ValuePart) -> int:
    return value.stored.size_bytes if value.stored is not None else len(value.payload)


def _value_of_result(result: m.TaskResult) -> ValuePart:
    if result.status == TaskStatus.OK:
        return ValuePart(payload=result.payload)
    if result.status in (TaskStatus.ERROR, TaskStatus.UNLOADABLE):
        return ValuePart(error=result.payload)
    if result.status == TaskStatus.CANCELLED:
        return ValuePart(lost_kind="cancelled", lost="the task was cancelled")
    return ValuePart(lost_kind="object_lost", lost=result.payload.decode(errors="replace"))
