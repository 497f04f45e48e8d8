"""Everything that a process knows of the tasks it submitted and the objects it owns: the composite of the parts.

    shell --event--> OwnerMachine --command--> shell
                       |- WorkerSet (one a group or resource shape) -- Dispatcher
                       |- ActorChannel (one an actor)
                       |- Children
                       |- Following (groups that have a worker for each CPU)
                       |- OwnershipTable
                       |- OwnerRecovery -- LineageTable

Drivers and workers run the same machine. One thread at a time may call it (the client holds a lock).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.actors import ActorChannel
from clusterpool.core.children import Children
from clusterpool.core.chunks import ChunkTable
from clusterpool.core.dispatch import Task
from clusterpool.core.following import Following
from clusterpool.core.messages import TaskStatus
from clusterpool.core.owner_actors import OwnerActors
from clusterpool.core.owner_arguments import OwnerArguments
from clusterpool.core.owner_cancels import OwnerCancels
from clusterpool.core.owner_closing import failures_at_close
from clusterpool.core.owner_functions import OwnerFunctions
from clusterpool.core.owner_objects import OwnerObjects
from clusterpool.core.owner_recovery import OwnerRecovery
from clusterpool.core.rescue import Rescue
from clusterpool.core.worker_set import WorkerSet

Commands = list[e.Command]
_CHECKED = (e.FailTasks, e.SetEnded, e.DeliverChunk)


class OwnerMachine:
    """The state of one owner. `numbers` yields task and object numbers, never one twice."""

    def __init__(self, address: m.Address, *, job: m.JobPart, numbers: Iterator[int], requests: Iterator[int]) -> None:
        self.address = address
        self.node = address.node
        self.job = job
        self.requests = requests
        self._numbers = numbers
        self.tasks: dict[int, Task] = {}  # unfinished, by number
        self.functions = OwnerFunctions()
        self.sets: dict[int, WorkerSet] = {}
        self.cancelled: bool = False  # the answer to the last TaskCancelAsked
        self.objects = OwnerObjects(address, self.node, numbers)
        self.chunks = ChunkTable(self.objects.hold_result, self.objects.discard_held)
        self.actors = OwnerActors(self)
        self.children = Children(self)
        self.following = Following(self)
        self.arguments = OwnerArguments(self)
        self.await_arguments = self.arguments.await_all
        self.hand_over_arguments = self.arguments.hand_over
        self.recovery = self.objects.recovery = OwnerRecovery(self)
        self._set_by_process: dict[str, WorkerSet] = {}  # kept by the sets
        self.cancels = OwnerCancels(self, self.arguments.targets, self._set_by_process)
        self._handlers = self._handlers_of_events()
        self._message_handlers = self._handlers_of_messages()
        self.objects.on_known = self.arguments.known

    def _handlers_of_events(self) -> dict[type, Callable[[Any, float], Commands]]:
        return {
            e.SetOpened: self._set_opened,
            e.SetResized: self._set_changed,
            e.SetClosed: self._set_changed,
            e.SetTerminated: self._set_changed,
            e.FunctionAdded: self.functions.added,
            e.FunctionsDropped: self.functions.dropped_by_user,
            e.ClientClosed: self._client_closed,
            e.TasksSubmitted: self._tasks_submitted,
            e.TaskWithArgumentsSubmitted: self._task_with_arguments,
            e.ChildOpened: self.children.opened,
            e.ChildSignalled: self.children.signalled,
            e.ChildDropped: self.children.dropped,
            e.ProcessWatched: self.children.watched,
            e.ActorOpened: self.actors.opened,
            e.ActorMet: self.actors.met,
            e.ActorKilled: self.actors.killed,
            e.ActorCallsSubmitted: self.actors.calls_submitted,
            e.StreamClosed: self.cancels.stream_closed,
            e.ItemsTaken: lambda event, _: self.objects.items_taken(event.number, event.taken),
            e.TaskCancelAsked: self.cancels.asked,
            e.WorkInterrupted: self.cancels.interrupted,
            e.ReferencesHeld: self._references_held,
            e.ReferencesMade: self._references_made,
            e.ValuePut: self._value_put,
            e.ReferencesDropped: lambda event, _: self.objects.dropped(event.keys),
            e.ValueWanted: lambda event, _: self.objects.wanted(event.reference, next(self.requests)),
            e.MessageArrived: self._message_arrived,
            e.ProcessGone: self._process_gone,
            e.Retiring: lambda _, __: self.objects.retiring(),
            # Else the node would take the leased workers for orphans and kill them, with what they own for others.
            e.Retired: lambda _, __: self._give_back_idle(),
            e.TimePassed: lambda _, now_s: self.advance_all(now_s),
            **self.recovery.handlers_of_events(),
        }

    def _handlers_of_messages(self) -> dict[type, Callable[[m.Address, Any, float], Commands]]:
        return {
            m.TasksFinished: self._tasks_finished,
            m.TaskStarted: self._task_started,
            m.WorkerGranted: self._worker_granted,
            m.WorkerReady: self._worker_ready,
            m.WorkerSetupFailed: self._setup_failed,
            m.WorkerLingers: self._worker_lingers,
            m.WorkerExited: self._worker_exited,
            m.RequestFailed: self._request_failed,
            m.ReclaimLeases: lambda _, __, ___: self._give_back_idle(),
            m.StreamItem: lambda source, message, _: self.objects.stream_item(source, message),
            m.ResolveObject: lambda source, message, _: self.objects.asked(source, message),
            m.ObjectResolved: lambda _, message, __: self.objects.resolved(message),
            m.AddBorrower: lambda _, message, __: self.objects.add_borrower(message),
            m.RemoveBorrower: lambda source, message, _: self.objects.remove_borrower(source, message),
            m.ProcessEnded: lambda _, message, now_s: self._gone(message.address, message.text, now_s),
            m.NodeLost: self._node_lost,
            m.CapacityChanged: self.following.changed,
            m.Undeliverable: self._undeliverable,
            m.TasksUnsent: lambda _, message, __: self.actors.undelivered(message),
            m.ActorLocated: lambda _, message, __: self.actors.located(message),
            **self.recovery.handlers_of_messages(),
        }

    def handle(self, event: e.Event, now_s: float) -> Commands:
        """Take note of `event` at `now_s` (monotonic seconds); what to do about it, in order."""
        self.objects.now_s = now_s
        commands = self._handlers[type(event)](event, now_s)
        return commands + self._forget_functions() if self.functions.dropped else commands

    def next_wakeup_s(self, now_s: float) -> float | None:
        """When TimePassed is due, if ever."""
        soonest_s: float | None = None
        for worker_set in self.sets.values():
            time_s = worker_set.next_wakeup_s(now_s)
            if time_s is not None and (soonest_s is None or time_s < soonest_s):
                soonest_s = time_s
        return soonest_s

    def is_needed(self) -> bool:
        """Whether others would lose something if this process ended now."""
        # Its tasks, wherever they are, would end with it, and so would the workers that are at them.
        return bool(self.tasks) or self.objects.is_needed() or self.actors.is_needed()

    def address_of(self, process_id: str) -> m.Address | None:
        """Where a worker is that this process has a lease of."""
        worker_set = self._set_by_process.get(process_id)
        return worker_set.held[process_id].address if worker_set is not None else None

    def is_sent(self, number: int) -> bool:
        """Whether the task is at a worker."""
        task = self.tasks.get(number)
        return task is not None and task.worker != ""

    def is_running(self, number: int) -> bool:
        """Whether a worker is at the task, as far as is known here: one that was sent behind others is not."""
        task = self.tasks.get(number)
        if task is None or not task.worker:
            return False
        worker_set = self._set_by_process.get(task.worker)
        slot = worker_set.dispatcher.slots.get(task.worker) if worker_set is not None else None
        return slot is None or next(iter(slot.outstanding), None) == number

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
            requests=self.requests,
            functions=self.functions.payloads,
            set_by_process=self._set_by_process,
            rescue=Rescue(self.functions.names, self.chunks, event.set_number),
        )
        if event.safe_to_repeat:
            worker_set.allow_repeats(self.tasks, self._numbers)
        worker_set.on_sent(self.hand_over_arguments)
        self.sets[event.set_number] = worker_set
        commands = self.following.opened(event.set_number) if event.follows_cluster else []
        return commands + worker_set.advance(now_s)

    def _set_of_request(self, request: int) -> WorkerSet | None:
        # A set forgets a request that is met, failed or cancelled: what comes for it later finds nobody, and goes back.
        return next((worker_set for worker_set in self.sets.values() if request in worker_set.requested), None)

    def _forget_functions(self) -> Commands:
        gone = self.functions.forget(self.tasks)
        return [command for worker_set in self.sets.values() for command in worker_set.forget_functions(gone)]

    def _tasks_submitted(self, event: e.TasksSubmitted, now_s: float) -> Commands:
        tasks = self.tasks
        for task in event.tasks:
            tasks[task.spec.number] = task
            if task.sink is None:
                self.objects.expect_results(task)
        worker_set = self.sets.get(event.set_number)
        if worker_set is None:  # it ended between the submitter's check and now
            return self._checked([e.FailTasks(event.tasks, "cancelled", "the pool ended before the task was started")])
        return self._checked(worker_set.submit(event.tasks, now_s))

    def _task_with_arguments(self, event: e.TaskWithArgumentsSubmitted, now_s: float) -> Commands:
        target: WorkerSet | ActorChannel | None
        target = self.actors.channels[event.actor_id] if event.actor_id else self.sets.get(event.set_number)
        if target is None:
            self.tasks[event.task.spec.number] = event.task
            if event.task.sink is None:
                self.objects.expect_results(event.task)
            return self._checked([e.FailTasks([event.task], "cancelled", "the pool ended before the task was started")])
        return self.await_arguments(event.task, event.arguments, target, now_s)

    def _set_changed(self, event: e.SetResized | e.SetClosed | e.SetTerminated, now_s: float) -> Commands:
        worker_set = self.sets.get(event.set_number)
        if worker_set is None:
            return []  # it has ended by itself meanwhile
        if isinstance(event, e.SetResized):
            self.following.left(event.set_number)
            commands = self.following.opened(event.set_number) if event.follows_cluster else []
            return commands + self._checked(worker_set.resize(event.size, now_s))
        if isinstance(event, e.SetClosed):
            return self._checked(worker_set.close(now_s))
        commands = self._checked(worker_set.terminate())
        tasks = [self.tasks[number] for number in sorted(worker_set.awaiting) if number in self.tasks]
        worker_set.awaiting.clear()
        for task in tasks:
            task.is_cancelled = True
        if tasks:
            commands += self._checked([e.FailTasks(tasks, "cancelled", "the pool was terminated")])
        return commands

    def _tasks_finished(self, source: m.Address, message: m.TasksFinished, now_s: float) -> Commands:
        strays: Commands = []
        for result in message.results:
            if result.extras is not None and result.number not in self.tasks:  # its task was cancelled meanwhile
                strays += self.objects.discard_result(result)
        if strays:
            return strays + self._tasks_finished_for(source, message, now_s)
        return self._tasks_finished_for(source, message, now_s)

    def _tasks_finished_for(self, source: m.Address, message: m.TasksFinished, now_s: float) -> Commands:
        worker_set = self._set_by_process.get(source.process_id)
        if worker_set is None:
            return self.actors.finished(source, message)
        finished, worker = worker_set.finished(source.process_id, message, now_s)
        commands = self.settle(finished, worker, worker_set)
        if worker_set.notices:
            notices, worker_set.notices = worker_set.notices, []
            commands += self._checked(notices)
        if not worker_set.is_quiet(now_s):
            commands += self._checked(worker_set.advance(now_s))
        return commands

    def _task_started(self, source: m.Address, message: m.TaskStarted, now_s: float) -> Commands:
        worker_set = self._set_by_process.get(source.process_id)
        if worker_set is not None:
            worker_set.stopping.started(source.process_id, message.number, now_s)
        return []

    def settle(
        self, finished: list[tuple[Task, m.TaskResult]], worker: m.WorkerPart | None, source: WorkerSet | ActorChannel
    ) -> Commands:
        """Tasks have ended: values go to their objects or sinks, and their arguments are let go."""
        commands: Commands = []
        delivered: list[tuple[Task, m.TaskResult]] = []
        tasks, objects = self.tasks, self.objects
        for item in finished:
            task, result = item
            extras = task.spec.extras
            if extras is None and result.extras is None and task.sink is not None:
                tasks.pop(task.spec.number, None)  # the rule for tiny tasks: nothing of what is below
                delivered.append(item)
                continue
            if result.extras is not None and result.status == TaskStatus.LOST:
                commands += self.recovery.argument_lost(task, result, source)
                continue
            tasks.pop(task.spec.number, None)
            if result.extras is not None or (extras is not None and extras.returns == -1):
                # Before the arguments go: a result may hand back a reference that nobody else holds any more.
                commands += self.recovery.task_ended(task, result, source)
                if task.spec.number in self.recovery.unread:
                    delivered.append(item)
                    continue
            if extras is not None:
                commands += objects.release_arguments(task)
            if task.sink is None:
                commands += objects.task_ended(task, result)
                if task.spec.number in self.recovery.running:
                    commands += self.recovery.rebuilt(task.spec.number)
            else:
                delivered.append(item)
        if delivered:
            commands.append(e.DeliverResults(delivered, worker))
        return commands

    def _checked(self, commands: Commands) -> Commands:
        """Pass commands on; failures of object tasks become values of their objects, not calls of a sink."""
        for command in commands:
            if type(command) in _CHECKED:
                break
        else:
            return commands
        checked: Commands = []
        for command in commands:
            if isinstance(command, e.FailTasks):
                checked += self._failed(command)
                continue
            if isinstance(command, e.SetEnded):
                self.sets.pop(command.set_number, None)
            elif isinstance(command, e.DeliverChunk):
                self.tasks.pop(command.task.spec.number, None)
                checked += self.recovery.unread.chunk_ended(command)
            checked.append(command)
        return checked

    checked = _checked

    def _failed(self, command: e.FailTasks) -> Commands:
        commands: Commands = []
        with_sink: list[Task] = []
        channels: list[ActorChannel] = []  # whose later calls this one held up
        for task in command.tasks:
            self.tasks.pop(task.spec.number, None)
            channel = self.arguments.ended(task)
            if channel is not None:
                channels.append(channel)
            if task.spec.extras is not None:
                commands += self.objects.release_arguments(task)
            if self.chunks:
                commands += self.chunks.drop(task.spec.number)
            if task.sink is None:
                commands += self.objects.task_failed(task, command)
                if task.spec.number in self.recovery.running:
                    commands += self.recovery.rebuilt(task.spec.number)
            else:
                with_sink.append(task)
        if with_sink:
            commands.append(msgspec.structs.replace(command, tasks=with_sink))
        for channel in channels:
            commands += self.actors.send_ready(channel)
        return commands

    # --- workers

    def _worker_granted(self, source: m.Address, message: m.WorkerGranted, now_s: float) -> Commands:
        worker_set = self._set_of_request(message.request)
        if worker_set is None:
            met = self.children.granted(message)
            return self.actors.granted(source, message, now_s) if met is None else met
        commands = worker_set.granted(message.request, message.worker, now_s)
        if worker_set.setup.references and message.worker.address.process_id in worker_set.held:
            commands = self.objects.hand_over(message.worker.address, worker_set.setup.references) + commands
        return self._checked(commands)

    def _worker_ready(self, source: m.Address, _message: m.WorkerReady, now_s: float) -> Commands:
        worker_set = self._set_by_process.get(source.process_id)
        if worker_set is None:
            return self.children.loaded(source.process_id)
        return self._checked(worker_set.worker_ready(source.process_id, now_s))

    def _setup_failed(self, source: m.Address, message: m.WorkerSetupFailed, now_s: float) -> Commands:
        worker_set = self._set_by_process.get(source.process_id)
        if worker_set is None:
            return []
        return self._checked(worker_set.setup_failed(source.process_id, message.error, now_s))

    def _worker_lingers(self, source: m.Address, _message: m.WorkerLingers, now_s: float) -> Commands:
        worker_set = self._set_by_process.get(source.process_id)
        if worker_set is None:
            return []
        return self._checked(worker_set.exited(source.process_id, 0, "it has been retired", now_s))

    def _worker_exited(self, _source: m.Address, message: m.WorkerExited, now_s: float) -> Commands:
        process_id = message.address.process_id
        commands = self.objects.process_gone(message.address, message.text)
        worker_set = self._set_by_process.get(process_id)
        if worker_set is not None:
            commands += self.recovery.orphans(worker_set, message)
            ended = worker_set.exited(process_id, message.exit_code, message.text, now_s, task=message.task)
            commands += self._checked(ended)
        commands += self.children.process_gone(message.address, message.exit_code)
        return commands + self.actors.process_gone(message.address, message.text, exit_code=message.exit_code)

    def _request_failed(self, _source: m.Address, message: m.RequestFailed, now_s: float) -> Commands:
        worker_set = self._set_of_request(message.request)
        if worker_set is None:
            failed = self.children.request_failed(message)
            return self.actors.request_failed(message) if failed is None else failed
        commands = worker_set.request_failed(message.request, message.count, message.kind, message.text, now_s)
        return self._checked(commands)

    def _give_back_idle(self) -> Commands:
        commands: Commands = []
        for worker_set in self.sets.values():
            if not worker_set.is_group:
                commands += worker_set.give_back_idle()
        return commands

    def _process_gone(self, event: e.ProcessGone, now_s: float) -> Commands:
        """A connection broke. The nodes of the processes that matter here report their ends, with the cause."""
        address = event.address
        process_id = address.process_id
        is_leased = process_id in self._set_by_process or self.children.has(process_id)
        if is_leased or self.actors.has_lease(address) or self.objects.is_watched(address):
            return []
        return self._gone(address, event.text, now_s)

    def _undeliverable(self, source: m.Address, message: m.Undeliverable, now_s: float) -> Commands:
        text = f"process {message.address.process_id} on node {message.address.node_id} has ended"
        if source == message.address.node:  # of what we have a lease this tells the cause, a moment later
            return self._process_gone(e.ProcessGone(message.address, text), now_s)
        return self._gone(message.address, text, now_s)

    def _gone(self, address: m.Address, text: str, now_s: float) -> Commands:
        """A process ended. Its node reports a worker's exit with the cause, so tasks wait for that report."""
        commands = self.objects.process_gone(address, text)
        if not self.children.has(address.process_id):
            commands += self.children.process_gone(address)
        return commands + self.actors.process_gone(address, text)

    def _node_lost(self, _source: m.Address, message: m.NodeLost, now_s: float) -> Commands:
        commands = self.following.node_lost(message.node_id) + self.objects.node_gone(message.node_id, message.text)
        for worker_set in list(self.sets.values()):
            commands += self._checked(worker_set.node_lost(message.node_id, message.text, now_s))
            commands += self.arguments.node_lost(worker_set, message.node_id, message.text, now_s)
            commands += self._checked(worker_set.advance(now_s))
        commands += self.children.node_gone(message.node_id) + self.actors.node_gone(message.node_id, message.text)
        for channel in list(self.actors.channels.values()):
            commands += self.arguments.node_lost(channel, message.node_id, message.text, now_s)
        return commands

    def ask_again(self, now_s: float) -> Commands:
        """What we have asked for may be lost: ask anew, and give back what comes for the old requests."""
        commands: Commands = []
        for worker_set in list(self.sets.values()):
            commands += worker_set.cancel_requests()
            commands += self._checked(worker_set.advance(now_s))
        commands += self.children.ask_again()
        return commands + self.actors.ask_again()

    def _client_closed(self, event: e.ClientClosed, _now_s: float) -> Commands:
        """There is no cluster any more: whoever waits for anything must not wait for ever."""
        for task in self.tasks.values():
            task.is_cancelled = True
        commands = self._checked(list(failures_at_close(self, event)))
        commands += self.objects.lose_unknown("not_connected", event.text)
        commands += self.children.all_gone(event.text)
        commands += [e.SetEnded(set_number) for set_number in self.sets]
        self.sets.clear()
        self._set_by_process.clear()
        self.recovery.clear()
        return commands

    def advance_all(self, now_s: float) -> Commands:
        """Time has passed, or something that any set may have waited for has ended."""
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

    def _message_arrived(self, event: e.MessageArrived, now_s: float) -> Commands:
        handler = self._message_handlers.get(type(event.message))
        return handler(event.source, event.message, now_s) if handler is not None else []
