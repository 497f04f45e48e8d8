"""Everything that a process knows of the tasks it submitted and the objects it owns: the composite of the parts.

    shell --event--> OwnerMachine --command--> shell
                       |- WorkerSet (one a group or resource shape) -- Dispatcher
                       |- ActorChannel (one an actor)
                       |- OwnershipTable

Drivers and workers run the same machine. One thread at a time may call it (the client holds a lock).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.actors import ActorChannel
from clusterpool.core.dispatch import Task
from clusterpool.core.owner_actors import OwnerActors
from clusterpool.core.owner_objects import OwnerObjects
from clusterpool.core.worker_set import WorkerSet

Commands = list[e.Command]


class OwnerMachine:
    """The state of one owner. `numbers` yields task and object numbers, never one twice."""

    def __init__(self, address: m.Address, *, job: m.JobPart, numbers: Iterator[int], requests: Iterator[int]) -> None:
        self.address = address
        self.node = m.Address(address.node_id, address.node_id)
        self.job = job
        self.requests = requests
        self.tasks: dict[int, Task] = {}  # unfinished, by number
        self.functions: dict[int, bytes] = {}
        self.sets: dict[int, WorkerSet] = {}
        self.cancelled: bool = False  # the answer to the last TaskCancelAsked
        self.objects = OwnerObjects(address, self.node, numbers)
        self.actors = OwnerActors(self)
        self._targets: dict[int, WorkerSet | ActorChannel] = {}  # by number of a task that waits for arguments
        self._handlers: dict[type, Callable[[Any, float], Commands]] = {
            e.SetOpened: self._set_opened,
            e.SetResized: lambda event, now_s: self.sets[event.set_number].resize(event.size, now_s),
            e.SetClosed: lambda event, now_s: self.sets[event.set_number].close(now_s),
            e.SetTerminated: lambda event, _: self.sets[event.set_number].terminate(),
            e.FunctionAdded: self._function_added,
            e.TasksSubmitted: self._tasks_submitted,
            e.TaskWithArgumentsSubmitted: self._task_with_arguments,
            e.ActorOpened: self.actors.opened,
            e.ActorMet: self.actors.met,
            e.ActorCallsSubmitted: self.actors.calls_submitted,
            e.TaskCancelAsked: self._cancel_asked,
            e.ReferencesHeld: self._references_held,
            e.ReferencesMade: self._references_made,
            e.ValuePut: self._value_put,
            e.ReferencesDropped: lambda event, _: self.objects.dropped(event.keys),
            e.ValueWanted: lambda event, _: self.objects.wanted(event.reference, next(self.requests)),
            e.MessageArrived: self._message_arrived,
            e.ProcessGone: self._process_gone,
            e.TimePassed: lambda _, now_s: self._advance_all(now_s),
        }
        self._message_handlers: dict[type, Callable[[m.Address, Any, float], Commands]] = {
            m.TasksFinished: self._tasks_finished,
            m.WorkerGranted: self._worker_granted,
            m.WorkerReady: self._worker_ready,
            m.WorkerSetupFailed: self._setup_failed,
            m.WorkerExited: self._worker_exited,
            m.RequestFailed: self._request_failed,
            m.ReclaimLeases: self._reclaim,
            m.StreamItem: self._stream_item,
            m.ResolveObject: lambda source, message, _: self.objects.asked(source, message),
            m.ObjectResolved: lambda _, message, now_s: self._object_resolved(message, now_s),
            m.AddBorrower: lambda _, message, __: self.objects.add_borrower(message),
            m.RemoveBorrower: lambda source, message, _: self.objects.remove_borrower(source, message),
            m.ProcessEnded: lambda _, message, now_s: self._gone(message.address, message.text, now_s),
            m.NodeLost: self._node_lost,
            m.Undeliverable: lambda _, message, now_s: self._gone(message.address, "it has ended", now_s),
            m.ActorLocated: lambda _, message, __: self.actors.located(message),
        }
        self._set_by_request: dict[int, WorkerSet] = {}
        self._set_by_process: dict[str, WorkerSet] = {}
        self.objects.on_known = self._arguments_known

    def handle(self, event: e.Event, now_s: float) -> Commands:
        """Take note of `event` at `now_s` (monotonic seconds); what to do about it, in order."""
        return self._handlers[type(event)](event, now_s)

    def next_wakeup_s(self, now_s: float) -> float | None:
        """When TimePassed is due, if ever."""
        times = [worker_set.next_wakeup_s(now_s) for worker_set in self.sets.values()]
        return min((time_s for time_s in times if time_s is not None), default=None)

    def is_hungry(self, set_number: int) -> bool:
        """Whether a task submitted to this set would start at once."""
        worker_set = self.sets.get(set_number)
        return worker_set is not None and worker_set.dispatcher.has_room()

    def is_sent(self, number: int) -> bool:
        """Whether the task is at a worker."""
        task = self.tasks.get(number)
        return task is not None and task.worker != ""

    # --- sets and tasks

    def _set_opened(self, event: e.SetOpened, now_s: float) -> Commands:
        worker_set = WorkerSet(
            event.set_number,
            node=self.node,
            job=self.job,
            demand=event.demand,
            setup=event.setup,
            size=event.size,
            runs_max=event.runs_max,
            requests=self._counted_requests(event.set_number),
            functions=self.functions,
        )
        worker_set.on_sent(self._hand_over_arguments)
        self.sets[event.set_number] = worker_set
        return worker_set.advance(now_s)

    def _counted_requests(self, set_number: int) -> Iterator[int]:
        while True:
            request = next(self.requests)
            self._set_by_request[request] = self.sets[set_number]
            yield request

    def _function_added(self, event: e.FunctionAdded, _now_s: float) -> Commands:
        self.functions[event.number] = event.payload
        return []

    def _tasks_submitted(self, event: e.TasksSubmitted, now_s: float) -> Commands:
        tasks = self.tasks
        for task in event.tasks:
            tasks[task.spec.number] = task
            if task.sink is None:
                self.objects.expect_results(task)
        return self._checked(self.sets[event.set_number].submit(event.tasks, now_s))

    def _task_with_arguments(self, event: e.TaskWithArgumentsSubmitted, now_s: float) -> Commands:
        target: WorkerSet | ActorChannel
        target = self.actors.channels[event.actor_id] if event.actor_id else self.sets[event.set_number]
        return self.await_arguments(event.task, event.arguments, target, now_s)

    def await_arguments(
        self, task: Task, arguments: e.TaskArguments, target: WorkerSet | ActorChannel, now_s: float
    ) -> Commands:
        """Send the task to `target` when all of its dependencies have values."""
        number = task.spec.number
        self.tasks[number] = task
        self._targets[number] = target
        if task.sink is None:
            self.objects.expect_results(task)
        if isinstance(target, ActorChannel):
            target.waiting.add(number)
            if task is not target.creation:
                target.submit([task])
        commands, is_known = self.objects.expect_arguments(task, arguments, self.requests)
        if is_known:
            commands += self._arguments_known(task, now_s)
        return commands

    def _arguments_known(self, task: Task, now_s: float) -> Commands:
        target = self._targets.pop(task.spec.number, None)
        if target is None or task.is_cancelled:
            return []
        error = self.objects.put_arguments(task)
        if isinstance(target, ActorChannel):
            target.waiting.discard(task.spec.number)
            if error is not None:
                task.is_cancelled = True
                return self._checked([error]) + self.actors.send_ready(target)
            return self.actors.send_ready(target)
        return self._checked([error] if error is not None else target.submit([task], now_s))

    def _hand_over_arguments(self, worker: m.Address, tasks: list[Task]) -> Commands:
        commands: Commands = []
        for task in tasks:
            extras = task.spec.extras
            if extras is not None:
                commands += self.objects.hand_over(worker, extras.references)
                for value in extras.arguments:
                    commands += self.objects.hand_over(worker, value.references)
        return commands

    hand_over_arguments = _hand_over_arguments

    def _tasks_finished(self, source: m.Address, message: m.TasksFinished, now_s: float) -> Commands:
        worker_set = self._set_by_process.get(source.process_id)
        if worker_set is None:
            return self.actors.finished(source, message)
        finished, worker = worker_set.finished(
            source.process_id, message.results, message.run_ns, message.is_blocked
        )
        commands = self.settle(finished, worker)
        return commands + self._checked(worker_set.advance(now_s))

    def settle(self, finished: list[tuple[Task, m.TaskResult]], worker: m.WorkerPart | None) -> Commands:
        """Tasks have ended: values go to their objects or sinks, and their arguments are let go."""
        commands: Commands = []
        delivered: list[tuple[Task, m.TaskResult]] = []
        tasks, objects = self.tasks, self.objects
        for item in finished:
            task = item[0]
            tasks.pop(task.spec.number, None)
            if task.spec.extras is not None:
                commands += objects.release_arguments(task)
            if task.sink is None:
                commands += objects.task_ended(task, item[1])
            else:
                if item[1].extras is not None:
                    objects.hold_result(item[1])
                delivered.append(item)
        if delivered:
            commands.append(e.DeliverResults(delivered, worker))
        return commands

    def _checked(self, commands: Commands) -> Commands:
        """Pass commands on; failures of object tasks become values of their objects, not calls of a sink."""
        if not any(type(command) in (e.FailTasks, e.SetWorkerJoined, e.SetWorkerLeft, e.SetEnded) for command in commands):
            return commands
        checked: Commands = []
        for command in commands:
            if isinstance(command, e.FailTasks):
                checked += self._failed(command)
                continue
            if isinstance(command, e.SetWorkerLeft):
                self._set_by_process.pop(command.worker.address.process_id, None)
            elif isinstance(command, e.SetEnded):
                self.sets.pop(command.set_number, None)
            checked.append(command)
        return checked

    checked = _checked

    def _failed(self, command: e.FailTasks) -> Commands:
        commands: Commands = []
        with_sink: list[Task] = []
        for task in command.tasks:
            self.tasks.pop(task.spec.number, None)
            self._targets.pop(task.spec.number, None)
            if task.spec.extras is not None:
                commands += self.objects.release_arguments(task)
            if task.sink is None:
                commands += self.objects.task_failed(task, command)
            else:
                with_sink.append(task)
        if with_sink:
            commands.append(msgspec.structs.replace(command, tasks=with_sink))
        return commands

    def _cancel_asked(self, event: e.TaskCancelAsked, now_s: float) -> Commands:
        task = self.tasks.get(event.number)
        self.cancelled = False
        if task is None or task.is_cancelled:
            return []
        if not task.worker:
            self.cancelled = task.is_cancelled = True
            return self._checked([e.FailTasks([task], "cancelled", "the task was cancelled before it started")])
        channel = self.actors.channel_of_process.get(task.worker)
        if channel is not None:
            return channel.interrupt(task) if event.interrupt else []
        worker_set = self._set_by_process.get(task.worker)
        if worker_set is None:
            return []
        if event.force:
            self.cancelled = True
            return worker_set.kill_running(task)
        return worker_set.interrupt(task) if event.interrupt else []

    # --- workers

    def _worker_granted(self, source: m.Address, message: m.WorkerGranted, now_s: float) -> Commands:
        worker_set = self._set_by_request.get(message.request)
        if worker_set is None:
            return self.actors.granted(source, message, now_s)
        self._set_by_process[message.worker.address.process_id] = worker_set
        return self._checked(worker_set.granted(message.request, message.worker, now_s))

    def _worker_ready(self, source: m.Address, _message: m.WorkerReady, now_s: float) -> Commands:
        worker_set = self._set_by_process.get(source.process_id)
        return self._checked(worker_set.worker_ready(source.process_id, now_s)) if worker_set else []

    def _setup_failed(self, source: m.Address, message: m.WorkerSetupFailed, now_s: float) -> Commands:
        worker_set = self._set_by_process.get(source.process_id)
        if worker_set is None:
            return []
        return self._checked(worker_set.setup_failed(source.process_id, message.error, now_s))

    def _worker_exited(self, _source: m.Address, message: m.WorkerExited, now_s: float) -> Commands:
        process_id = message.address.process_id
        commands = self.objects.process_gone(message.address, message.text)
        worker_set = self._set_by_process.pop(process_id, None)
        if worker_set is not None:
            commands += self._checked(worker_set.exited(process_id, message.exit_code, message.text, now_s))
        return commands + self.actors.process_gone(message.address, message.text)

    def _request_failed(self, _source: m.Address, message: m.RequestFailed, _now_s: float) -> Commands:
        worker_set = self._set_by_request.get(message.request)
        if worker_set is None:
            return self.actors.request_failed(message)
        return self._checked(worker_set.request_failed(message.request, message.count, message.kind, message.text))

    def _reclaim(self, _source: m.Address, _message: m.ReclaimLeases, _now_s: float) -> Commands:
        commands: Commands = []
        for worker_set in self.sets.values():
            if not worker_set.is_group:
                commands += worker_set.give_back_idle()
        return commands

    def _process_gone(self, event: e.ProcessGone, now_s: float) -> Commands:
        return self._gone(event.address, event.text, now_s)

    def _gone(self, address: m.Address, text: str, now_s: float) -> Commands:
        """A process ended. Its node reports a worker's exit with the cause, so tasks wait for that report."""
        commands = self.objects.process_gone(address, text)
        return commands + self.actors.process_gone(address, text)

    def _node_lost(self, _source: m.Address, message: m.NodeLost, now_s: float) -> Commands:
        commands = self.objects.node_gone(message.node_id, message.text)
        for worker_set in list(self.sets.values()):
            for process_id, worker in list(worker_set.held.items()):
                if worker.address.node_id == message.node_id:
                    self._set_by_process.pop(process_id, None)
                    commands += self._checked(worker_set.exited(process_id, -9, message.text, now_s))
        return commands + self.actors.node_gone(message.node_id, message.text)

    def _advance_all(self, now_s: float) -> Commands:
        commands: Commands = []
        for worker_set in list(self.sets.values()):
            commands += self._checked(worker_set.advance(now_s))
        return commands

    # --- objects

    def _references_held(self, event: e.ReferencesHeld, _now_s: float) -> Commands:
        for reference in event.references:
            self.objects.table.hold(reference, was_handed=True)
        return []

    def _references_made(self, event: e.ReferencesMade, _now_s: float) -> Commands:
        for reference in event.references:
            self.objects.table.hold(reference)
        return []

    def _value_put(self, event: e.ValuePut, _now_s: float) -> Commands:
        self.objects.table.create(event.number)
        return self.objects.set_value(event.number, event.value)

    def _stream_item(self, _source: m.Address, message: m.StreamItem, _now_s: float) -> Commands:
        return self.objects.stream_item(message)

    def _object_resolved(self, message: m.ObjectResolved, now_s: float) -> Commands:
        return self.objects.resolved(message, now_s)

    def _message_arrived(self, event: e.MessageArrived, now_s: float) -> Commands:
        handler = self._message_handlers.get(type(event.message))
        return handler(event.source, event.message, now_s) if handler is not None else []
