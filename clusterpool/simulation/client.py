"""A simulated driver or worker: the shell around its OwnerMachine, and what its programs can ask of it.

It does what client/client.py, connections.py, values.py and runtime.py do, without threads: a program is a generator
(threads.py), and `turn` is called after everything that the process hears.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core import wire
from clusterpool.core.actor_messages import ActorLoaded, ActorSaved, CallsResumed, ResultsTaken
from clusterpool.core.coordination_messages import CoordinationDone, CoordinationFailed, CountHeld
from clusterpool.core.dispatch import Task
from clusterpool.core.messages import Address, Message, Reference, TaskExtras, TaskKind, TaskSpec, ValuePart
from clusterpool.core.owner import OwnerMachine
from clusterpool.core.recovery_messages import CopyUnreadable
from clusterpool.simulation.carriers import Carriers
from clusterpool.simulation.party import End, Host, Party, connect
from clusterpool.simulation.programs import (
    STORED_BYTES_MIN,
    Operation,
    Outcome,
    Payload,
    content_of,
    encode_operation,
    encode_payload,
    outcome_of,
)
from clusterpool.simulation.reading import Unreadable, View
from clusterpool.simulation.references import Ref
from clusterpool.simulation.threads import Disconnected, Steps, Thread, Wait

if TYPE_CHECKING:
    from clusterpool.simulation.world import World

_REPLIES = frozenset({
    m.ObjectCreated, m.ObjectPinned, m.ObjectOnDisk, m.StoreFailed, m.ActorLocated, ActorLoaded, ActorSaved,
    CoordinationDone, CoordinationFailed,
})  # fmt: skip
_WORKER_MESSAGES = frozenset({
    m.StreamTaken,
    m.SetupWorker, m.StartTasks, m.ForgetFunctions, m.TakeBackTasks, m.CancelTasks, m.RetireWorker, ResultsTaken,
    CallsResumed,
})  # fmt: skip
# Of sets, of children and of those that are watched: to the sink of that number.
_NEWS = (e.SetWorkerJoined, e.SetWorkerLeft, e.SetEnded, e.SetSetupFailed, e.ChildStarted, e.ChildLoaded, e.ChildEnded,
         e.ChildFailed, e.WatchedEnded)  # fmt: skip
NUMBERS_APART = 1024
BLOCK_PATIENCE_S = 0.001
VAIN_ROUNDS_MAX = 3  # as in client/reading.py


class Client(Party):
    """A driver or a worker."""

    kind = "driver"

    def __init__(self, world: World, host: Host, address: Address, job: m.JobPart, node: Any) -> None:
        super().__init__(world, host, address.process_id)
        self.address = address
        self.node = Address(address.node_id, address.node_id)
        self.node_party = node  # a SimulatedNode
        self.job = job
        self.numbers = itertools.count(NUMBERS_APART, NUMBERS_APART)
        self.requests = itertools.count(1)
        self.machine = OwnerMachine(address, job=job, numbers=self.numbers, requests=self.requests)
        self.is_registered = False
        self.is_closed = False
        self.closed_text = ""
        self.by_process: dict[str, End] = {}
        self.threads: list[Thread] = []
        self.released: deque[tuple[Address, int]] = deque()
        self.unpinned: deque[str] = deque()
        self.set_sinks: dict[int, Callable[[Any], None]] = {}
        self._submitted: deque[e.Event] = deque()
        self._replies: dict[int, Callable[[Message], None]] = {}
        self._deliveries: deque[Callable[[], None]] = deque()
        self._wakeup_s: float | None = None
        self._is_turning = False
        self._functions: dict[str, int] = {}
        self.set_numbers = itertools.count(1)
        self.task_sets: dict[tuple[Any, ...], int] = {}
        self.carriers = Carriers(self)

    # --- start and end

    def join(self) -> None:
        """Connect to the node."""
        if not self.node_party.is_alive:
            self.mark_closed("no node listens")
            return
        end, other = connect(self.world, self, self.node_party)
        self._adopt(end, self.node)
        self.node_party.accept(other)
        end.send(self._hello())
        end.send(m.RegisterProcess(self.job if self.kind == "driver" else None))

    def _hello(self) -> m.Hello:
        return m.Hello(m.PROTOCOL_VERSION, self.address, self.kind, 1, self.job.job_id, "3", "0")

    def run(self, steps: Steps, on_end: Callable[[Any], None] = lambda _: None) -> Thread:
        """Run a program in this process."""
        thread = Thread(self, steps, on_end)
        self.threads.append(thread)
        thread.start()
        self.turn()
        return thread

    def mark_closed(self, text: str, failure: str = "cancelled") -> None:
        """There is no cluster any more for this process."""
        if self.is_closed:
            return
        self.is_closed = True
        self.closed_text = text
        self.note("closed", text)
        self.event(e.ClientClosed(failure, text))
        self.turn()

    # --- the machine

    def event(self, event: e.Event) -> None:
        """Put an event to the machine, behind those that wait; handled at the next `turn` or at once."""
        self._submitted.append(event)
        if not self._is_turning:
            self._drain()

    def _drain(self) -> None:
        self._is_turning = True
        try:
            while self._submitted or self.released or self.unpinned:
                released_count = len(self.released)
                while self._submitted:
                    self._handle(self._submitted.popleft())
                if released_count:
                    keys = [self.released.popleft() for _ in range(released_count)]
                    self._handle(e.ReferencesDropped(keys))
                if self.unpinned:
                    names = list(self.unpinned)
                    self.unpinned.clear()
                    self.send(self.node, m.UnpinObjects(names))
        finally:
            self._is_turning = False

    def _handle(self, event: e.Event) -> None:
        now_s = self.now_s()
        commands = self.machine.handle(event, now_s)
        for command in commands:
            if type(command) is e.Send:
                self.send(command.destination, command.message)
            else:
                self._deliver(command)
        self.world.monitor.owner_stepped(self)

    def turn(self) -> None:
        """After whatever was heard: hand out results, let programs go on, set the alarm."""
        if self._is_turning or not self.is_alive:
            return
        moved = True
        while moved:
            self._drain()
            while self._deliveries:
                self._deliveries.popleft()()
            self._drain()
            moved = sum(thread.look() for thread in list(self.threads)) > 0
            self.threads = [thread for thread in self.threads if not thread.is_done]
            moved = moved or bool(self._submitted or self.released or self.unpinned or self._deliveries)
        self._set_alarm()

    def _set_alarm(self) -> None:
        now_s = self.now_s()
        wakeup_s = self.machine.next_wakeup_s(now_s)
        if wakeup_s is None or (self._wakeup_s is not None and self._wakeup_s <= wakeup_s):
            return
        self._wakeup_s = wakeup_s
        # Rounded up: a clock that turns too early would find nothing to do, and turn again.
        delay_s = self.host.world_delay_s(max(0.0, wakeup_s - now_s)) + 1e-6
        self.world.timeline.after(delay_s, self.act, self._alarm, wakeup_s)

    def _alarm(self, wakeup_s: float) -> None:
        if self._wakeup_s != wakeup_s:
            return
        self._wakeup_s = None
        due_s = self.machine.next_wakeup_s(self.now_s())
        if due_s is not None and due_s <= self.now_s() and not self.is_closed:
            self.event(e.TimePassed())
        self.turn()

    # --- connections

    def send(self, destination: Address, message: Message) -> None:
        """Send a message; lost when there is no way."""
        if type(message) is m.StartTasks:
            for spec in message.tasks:
                self.world.evidence.sent(self.name, spec.number)
        if destination.node_id == self.address.node_id:
            end = self.by_process.get(destination.process_id) or self._connect(destination, message)
            if end is not None:
                end.send(message)
            return
        end = self.by_process.get(self.node.process_id)
        if end is not None:
            end.send(m.Relay(destination, self.address, wire.encode(message)))

    def _connect(self, destination: Address, message: m.Message) -> End | None:
        if destination == self.node or self.is_closed:
            return None
        listener = self.world.clients.get(destination.process_id)
        if listener is None or not listener.is_alive or listener.is_closed:
            unsent = wire.unsent_tasks(destination, message)
            self._submitted.extend([e.MessageArrived(self.address, unsent)] if unsent is not None else [])
            self._submitted.append(e.ProcessGone(destination, "it does not listen any more"))
            return None
        end, other = connect(self.world, self, listener)
        self._adopt(end, destination)
        listener.accept(other)
        end.send(self._hello())
        return end

    def _adopt(self, end: End, peer: Address) -> None:
        end.peer = peer
        self.by_process[peer.process_id] = end
        self._listen(end)

    def accept(self, end: End) -> None:
        """Another process has connected."""
        self._listen(end)

    def _listen(self, end: End) -> None:
        end.incoming.on_message = lambda message: self._received(end, message)
        end.incoming.on_end = lambda: self._ended(end)

    def _received(self, end: End, message: Message) -> None:
        if type(message) is m.Hello:
            end.peer = message.address
            self.by_process.setdefault(message.address.process_id, end)
            return
        assert end.peer is not None, "a message came before the greeting"
        if type(message) is m.Relay:
            self._heard(message.source, wire.decode(message.body))
        else:
            self._heard(end.peer, message)
        self.turn()

    def _heard(self, source: Address, message: Message) -> None:
        kind = type(message)
        self.note(kind.__name__, message)
        if kind in _WORKER_MESSAGES:
            self.worker_message(source, message)
        elif kind in _REPLIES and message.request in self._replies:  # type: ignore[attr-defined]
            self._replies.pop(message.request)(message)  # type: ignore[attr-defined]
        elif kind is CountHeld:
            self.carriers.count_held(message)  # type: ignore[arg-type]
        elif kind is m.Registered:
            self.is_registered = True
        elif kind is m.LeftNode:
            self.mark_closed("clusterpool was shut down")
        else:
            if isinstance(message, (m.WorkerExited, m.ProcessEnded)):
                # What a worker had sent us must be handled before the news of its end.
                end = self.by_process.get(message.address.process_id)
                if end is not None and end.peer != self.node:
                    end.incoming.drain()
            self.event(e.MessageArrived(source, message))

    def worker_message(self, source: Address, message: Message) -> None:
        """Drivers get none."""

    def _ended(self, end: End) -> None:
        end.close()
        peer = end.peer
        if peer is None:
            return
        if self.by_process.get(peer.process_id) is end:
            del self.by_process[peer.process_id]
        if peer == self.node:
            self.mark_closed(f"the node {peer.node_id} has ended", "worker_died")
        else:
            self.event(e.ProcessGone(peer, "its connection was closed"))
        self.turn()

    # --- results

    def _deliver(self, command: e.Command) -> None:
        if isinstance(command, e.DeliverResults):
            for task, result in command.results:
                self._deliveries.append(lambda task=task, result=result: self._load_result(task, result))  # type: ignore[misc]
        elif isinstance(command, e.DeliverChunk):
            self._deliveries.append(lambda: command.task.sink.gathered(command.parts))
        elif isinstance(command, e.FailTasks):
            for task in command.tasks:
                if command.error and command.kind != "actor_died":
                    outcome = outcome_of(command.error)
                else:
                    outcome = Outcome(command.kind, 0, text=command.text)
                    self.world.evidence.check_attempts(self.name, task.spec.number, outcome)
                self._deliveries.append(lambda task=task, outcome=outcome: task.sink(outcome))  # type: ignore[misc]
        elif isinstance(command, _NEWS):
            sink = self.set_sinks.get(command.set_number)
            if sink is not None:
                self._deliveries.append(lambda: sink(command))

    def _load_result(self, task: Task, result: m.TaskResult) -> None:
        part = result.extras.value if result.extras is not None else None
        if result.status == m.TaskStatus.OK or result.status in (m.TaskStatus.ERROR, m.TaskStatus.UNLOADABLE):
            task.sink(outcome_of(result.payload))
        elif result.status == m.TaskStatus.STORED and part is not None:
            self._load_part(task, part)
        elif result.status == m.TaskStatus.CANCELLED:
            task.sink(Outcome("cancelled", 0, text="the task was cancelled"))
        else:
            task.sink(Outcome("object_lost", 0, text=result.payload.decode(errors="replace")))

    def _load_part(self, task: Task, part: ValuePart) -> None:
        def finish(outcome: Outcome) -> None:
            if part.stored is not None:
                self.event(e.ResultRead(task.spec.number))
                for node_id in part.stored.node_ids:
                    self.send(Address(node_id, node_id), m.FreeObjects([part.stored.object_id]))
            self.released.extend((reference.owner, reference.number) for reference in part.references)
            task.sink(outcome)

        if part.stored is None:
            finish(outcome_of(part.payload))
            return

        def load() -> Steps:
            try:
                outcome, view = yield from self.load_stored(part)
            except Unreadable as exc:
                self.released.extend((reference.owner, reference.number) for reference in part.references)
                self.event(e.ResultUnreadable(task, exc.unreadable.text))
                return
            if view is not None:
                view.close()
            finish(outcome)

        self.run_quietly(load())

    def run_quietly(self, steps: Steps) -> None:
        """Run a program that nobody waits for; it ends when the process is closed."""

        def guarded() -> Steps:
            try:
                yield from steps
            except Disconnected:
                return

        thread = Thread(self, guarded(), lambda _: None)
        self.threads.append(thread)
        thread.start()

    # --- what programs ask for (each `yield from`)

    def wait_until(self, is_due: Callable[[], bool]) -> Steps:
        """Wait; a worker's CPU is lent to others meanwhile.

        Raises: Disconnected.
        """
        if not is_due():
            yield from self._wait(is_due)
        if not is_due():
            raise Disconnected(self.closed_text)

    def _wait(self, is_due: Callable[[], bool]) -> Steps:
        yield Wait(lambda: is_due() or self.is_closed)

    def wait_for(self, is_due: Callable[[], bool], patience_s: float | None) -> Steps:
        """Wait for so long at most; a worker's CPU is lent to others meanwhile."""
        yield Wait(lambda: is_due() or self.is_closed, patience_s)

    def maybe_die(self, operation: Operation) -> Steps:
        """Drivers do not."""
        yield from ()

    def request_nowait(self, make: Callable[[int], Message], on_answer: Callable[[Any], None]) -> int:
        """Ask the node something; `on_answer` gets what it says. The number of the request."""
        request = next(self.requests)
        self._replies[request] = on_answer
        self.send(self.node, make(request))
        return request

    def ask(self, make: Callable[[int], Message], give_back: Callable[[], None]) -> Steps:
        """Ask the node; its answer. `give_back` what comes after an interrupt."""
        answers: list[Message] = []
        is_abandoned = False

        def answered(answer: Message) -> None:
            answers.append(answer)
            if is_abandoned and not isinstance(answer, m.StoreFailed):
                give_back()

        request = next(self.requests)
        self._replies[request] = answered
        self.send(self.node, make(request))
        try:
            if not answers:
                yield Wait(lambda: bool(answers) or self.is_closed)
        except BaseException:
            is_abandoned = not answers
            if answers and not isinstance(answers[0], m.StoreFailed):
                give_back()
            raise
        if not answers:
            raise Disconnected(self.closed_text)
        return answers[0]

    def store(self, object_id: str, content: bytes, owner: Address) -> Steps:
        """Write a value of `owner`'s to the node's store; where it is, or the Outcome that says why not."""
        answer = yield from self.ask(
            lambda request: m.CreateObject(request, object_id, len(content), owner),
            lambda: self.send(self.node, m.AbortObject(object_id)),
        )
        if isinstance(answer, m.StoreFailed):
            if answer.kind != "exists":
                return Outcome(answer.kind, 0, text=answer.text)
            return m.StoredValue(object_id, len(content), [self.node.node_id], owner)
        self.node_party.arena.write(answer.offset, content)
        self.send(self.node, m.SealObject(object_id))
        return m.StoredValue(object_id, len(content), [self.node.node_id], owner)

    def part_of(
        self, object_id: str, number: int, size_bytes: int, references: list[Reference], owner: Address
    ) -> Steps:
        """A value of `owner`'s as a message carries it, or the Outcome that says why not."""
        if size_bytes < STORED_BYTES_MIN:
            return ValuePart(payload=encode_payload(Payload("ok", number, size_bytes)), references=references)
        stored = yield from self.store(object_id, content_of(number, size_bytes), owner)
        return stored if isinstance(stored, Outcome) else ValuePart(stored=stored, references=references)

    def load(self, part: ValuePart) -> Steps:
        """The outcome that a part stands for, and the view of it if it is stored.

        Raises: Unreadable.
        """
        if part.stored is not None:
            result = yield from self.load_stored(part)
            return result
        if part.error:
            return outcome_of(part.error), None
        if part.lost_kind:
            return Outcome(part.lost_kind, 0, text=part.lost), None
        return outcome_of(part.payload)._replace(references=tuple(part.references)), None

    def load_stored(self, part: ValuePart) -> Steps:
        """As `load`, of a stored value."""
        stored = part.stored
        assert stored is not None
        answer = yield from self.ask(
            lambda request: m.PinObject(request, stored), lambda: self.unpinned.append(stored.object_id)
        )
        if isinstance(answer, m.StoreFailed):
            if answer.kind in ("lost", "freed"):
                raise Unreadable(m.UnreadablePart(stored.object_id, answer.gone, answer.text, answer.dead))
            return Outcome(answer.kind, 0, text=answer.text), None
        view = None
        if isinstance(answer, m.ObjectOnDisk):
            content = self.node_party.disk.read(stored.object_id)
            if content is None:
                self.send(self.node, CopyUnreadable(stored.object_id, "there is no such file"))
                result = yield from self.load_stored(part)
                return result
        else:
            assert isinstance(answer, m.ObjectPinned)
            content = self.node_party.arena.read(answer.offset, answer.size_bytes)
            view = View(self, stored.object_id, answer.offset, content)
        number = int.from_bytes(content[:8], "little")
        monitor = self.world.monitor
        monitor.check(len(content) == stored.size_bytes, f"{stored.object_id} has another size than it had")
        monitor.check(content == content_of(number, stored.size_bytes), f"{stored.object_id} has been torn")
        return Outcome("ok", number, tuple(part.references)), view

    def put(self, number: int, size_bytes: int, references: list[Reference] | None = None) -> Steps:
        """Put a value; its Ref, or the Outcome that says why not."""
        object_number = next(self.numbers)
        inner = references or []
        if inner:
            self.event(e.ReferencesMade(inner))
        object_id = f"{self.address.process_id}.{object_number}"
        part = yield from self.part_of(object_id, number, size_bytes, inner, self.address)
        if isinstance(part, Outcome):
            self.released.extend((reference.owner, reference.number) for reference in inner)
            return part
        self.event(e.ValuePut(object_number, part))
        return Ref(self, Reference(self.address, object_number), is_counted=True)

    def get(self, ref: Ref) -> Steps:
        """The outcome of a reference; inside it are references that the caller may hold."""
        table = self.machine.objects.table
        vain = 0
        self._drain()
        if table.value_of(ref.part) is None and ref.part.owner != self.address:
            self.event(e.ValueWanted(ref.part))
        while True:
            yield from self.wait_until(lambda: table.value_of(ref.part) is not None)
            part = table.value_of(ref.part)
            assert part is not None
            try:
                outcome, view = yield from self.load(part)
            except Unreadable as exc:
                vain += not (exc.unreadable.gone or exc.unreadable.dead)
                if vain >= VAIN_ROUNDS_MAX:
                    return Outcome("object_lost", 0, text=exc.unreadable.text)
                self.event(e.ValueUnreadable(ref.part, exc.unreadable))
                self._drain()
                continue
            if view is not None:
                view.close()
            if part.lost_kind and ref.part.owner == self.address:
                self.world.evidence.check_attempts(self.name, ref.part.number, outcome)
            return outcome

    # --- tasks

    def function_of(self, operation: Operation) -> int:
        """The number of the function that tasks so long have: their durations are measured apart."""
        name = f"{operation.duration_s:.0e}"
        number = self._functions.get(name)
        if number is None:
            number = self._functions[name] = next(self.numbers)
            self.event(e.FunctionAdded(number, name.encode()))
        return number

    def task_set(self, resources: dict[str, float], strategy: str = "") -> int:
        """The number of the set of leases for tasks of this shape."""
        key = (tuple(sorted(resources.items())), strategy)
        number = self.task_sets.get(key)
        if number is None:
            number = self.task_sets[key] = next(self.set_numbers)
            demand = m.WorkerDemand(m.WorkerKind.TASK, resources, "task", {}, strategy)
            self.event(e.SetOpened(number, demand, e.SetupPlan("task"), None))
        return number

    def open_group(
        self,
        size: int,
        sink: Callable[[Any], None],
        *,
        runs_max: int | None = None,
        safe_to_repeat: bool = False,
    ) -> int:
        """A set of so many workers."""
        number = next(self.set_numbers)
        self.set_sinks[number] = sink
        demand = m.WorkerDemand(m.WorkerKind.GROUP, {}, "group")
        self.event(e.SetOpened(number, demand, e.SetupPlan("group"), size, runs_max, safe_to_repeat))
        return number

    def submit(
        self,
        set_number: int,
        operation: Operation,
        arguments: list[Ref] | None = None,
        inner: list[Ref] | None = None,
        *,
        retries: int = 3,
        sink: Callable[[Outcome], None] | None = None,
    ) -> Ref | None:
        """Submit a task; a reference to its result, unless it goes to `sink`."""
        number = next(self.numbers)
        spec = TaskSpec(number, self.function_of(operation), TaskKind.CALL, encode_operation(operation))
        task = Task(spec, sink, 0, retries)
        self.submit_task(task, set_number, "", arguments or [], inner or [])
        if sink is not None:
            return None
        return Ref(self, Reference(self.address, number), is_counted=True)

    def call_actor(
        self, actor_id: str, operation: Operation, arguments: list[Ref] | None = None, *, retries: int = 0
    ) -> Ref:
        """Call a method of an actor."""
        number = next(self.numbers)
        extras = TaskExtras(1, "call", 1, method="call")
        task = Task(TaskSpec(number, 0, TaskKind.ACTOR_CALL, encode_operation(operation), extras), None, 0, retries)
        self.submit_task(task, 0, actor_id, arguments or [], [])
        return Ref(self, Reference(self.address, number), is_counted=True)

    def submit_task(self, task: Task, set_number: int, actor_id: str, arguments: list[Ref], inner: list[Ref]) -> None:
        """Submit a task to a set, or a call to an actor."""
        if not actor_id:
            self.world.evidence.submitted(self.name, task.spec.number, task.retries_left)
        if not arguments and not inner:
            if actor_id:
                self.event(e.ActorCallsSubmitted(actor_id, [task]))
            else:
                self.event(e.TasksSubmitted(set_number, [task]))
            return
        references = [ref.part for ref in inner]
        extras = task.spec.extras or TaskExtras()
        extras = msgspec.structs.replace(extras, references=references)
        task.spec = msgspec.structs.replace(task.spec, extras=extras)
        plan = e.TaskArguments([ref.part for ref in arguments], references)
        self.event(e.TaskWithArgumentsSubmitted(set_number, actor_id, task, plan))
