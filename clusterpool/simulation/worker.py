"""A simulated worker: takes tasks, runs them one after the other or as an actor, as worker/task_runner.py does."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.actor_messages import CallsResumed, ResultsTaken
from clusterpool.core.messages import Address, Message, Reference, ResultExtras, TaskResult, TaskSpec, TaskStatus
from clusterpool.core.object_names import object_id
from clusterpool.simulation.actor_programs import call_from_task
from clusterpool.simulation.actors import Actor, Journal
from clusterpool.simulation.child_programs import be_parent, run_child
from clusterpool.simulation.chunk_programs import decode_items
from clusterpool.simulation.client import BLOCK_PATIENCE_S, Client
from clusterpool.simulation.lock_programs import Turn, take_turns
from clusterpool.simulation.party import Host
from clusterpool.simulation.programs import (
    Failed,
    Operation,
    Outcome,
    Payload,
    decode_operation,
    encode_payload,
    put_number,
    value_of,
)
from clusterpool.simulation.reading import Unreadable, View
from clusterpool.simulation.references import Ref
from clusterpool.simulation.stream_programs import StreamPaces, generate, take_in_task
from clusterpool.simulation.sync_programs import Gate, Meeting, meet, pass_gate
from clusterpool.simulation.threads import Disconnected, Interrupted, Pause, Steps, Thread, Wait
from clusterpool.simulation.token_programs import Stint, do_stint

if TYPE_CHECKING:
    from clusterpool.simulation.node import SimulatedNode
    from clusterpool.simulation.world import World

FLUSH_S = 0.001
FLUSH_RESULTS = 1000
# The I/O thread takes over the loop from a main thread that is busy for so long.
TAKE_OVER_S = 0.002
# A chunk runs in parts of so long, or of one item (as in worker/calls.py).
PART_S = 0.0005
STEP_MAX = 256
SIGTERM, SIGKILL = 15, 9
_ACTOR_KINDS = (m.TaskKind.CREATE_ACTOR, m.TaskKind.ACTOR_CALL)
Key = tuple[Address, int]


class Worker(Client):
    """A worker process."""

    kind = "worker"

    def __init__(self, world: World, host: Host, address: Address, job: m.JobPart, node: SimulatedNode) -> None:
        super().__init__(world, host, address, job, node)
        self.pending: deque[tuple[Address, TaskSpec]] = deque()
        self.setups: deque[tuple[Address, m.SetupWorker]] = deque()
        self.known_functions: set[Key] = set()
        self.is_retiring = False
        self.task_page = 0  # the number of the task that runs
        self.exit_code: int | None = None
        self.actor: Actor | None = None
        self.paces = StreamPaces()
        self.early: list[tuple[Address, Message]] = []  # what callers say of an actor that is still being made
        self._is_made_known = False
        self._exit_code_wanted: int | None = None
        self.wants_save = False  # a checkpoint of its actor
        self._started = 0
        self._item = (-1, 0, 1)  # of the chunk that runs: which item, of how many, and how many from there on
        self._retired_by = node.address
        self._results: list[TaskResult] = []
        self._results_owner: Address | None = None
        self._run_s = 0.0
        self._flushed_s = 0.0
        self._is_blocked = False
        self._cancelled: set[Key] = set()
        self._current: Key | None = None
        self._main: Thread | None = None
        self._views: list[View] = []

    def begin(self) -> None:
        """The process is there: join the node, and run tasks."""
        self.join()
        self._main = Thread(self, self._run(), lambda code: self.exit(int(code or 0)))
        self.threads.append(self._main)
        self._main.start()
        self.turn()

    def exit(self, code: int, cause: str = "itself") -> None:
        """The process ends by itself, or by a signal (negative). `cause`: as in evidence.py."""
        if not self.is_alive:
            return
        self.cause = cause
        self.exit_code = code
        for view in self._views:
            view.close()
        self.note("exit", code)
        self.vanish()
        self.node_party.worker_is_gone(self)

    def last_task(self) -> m.LastTask:
        """What its node reads of it when it has ended."""
        item, items, step = self._item if self.task_page else (-1, 0, 1)
        return m.LastTask(self.task_page, self._started, item, items, step)

    # --- the main thread

    def _run(self) -> Steps:
        while True:
            yield Wait(lambda: bool(self.pending or self.setups or self.wants_save or self._is_ending()))
            if self.is_closed:
                return 0
            if self._exit_code_wanted is not None:
                return self._exit_code_wanted
            if self.setups:
                owner, setup = self.setups.popleft()
                if setup.is_process:
                    return (yield from run_child(self, owner, setup))
                yield from self._set_up(owner, setup)
            if self.wants_save and self.actor is not None and self.actor.journal is not None:
                self.actor.journal.save(self.actor)
            if self.pending:
                yield from self._run_pending()
            elif self.is_retiring and not self.setups:
                if self.actor is not None and self.actor.journal is not None:
                    yield from self.actor.journal.close()
                self.flush()
                self.event(e.Retiring())
                if self.machine.is_needed():
                    for address in {self._retired_by: None, self.node: None}:
                        self.send(address, m.WorkerLingers())
                    yield Wait(lambda: self.is_closed or not self.machine.is_needed())
                self.event(e.Retired())
                return 0

    def _is_ending(self) -> bool:
        return self.is_retiring or self.is_closed or self._exit_code_wanted is not None

    def ask_to_exit(self, code: int) -> None:
        """The process shall end when its main thread has nothing to do."""
        self._exit_code_wanted = code

    def _set_up(self, owner: Address, setup: m.SetupWorker) -> Steps:
        if setup.name == "group":
            yield Pause(self.world.chance.setup_s())
        if setup.payload:
            for reference in setup.references:
                self.released.append((reference.owner, reference.number))
        self.send(owner, m.WorkerReady(setup.lease))

    def _run_pending(self) -> Steps:
        while self.pending:
            owner, spec = self.pending.popleft()
            key = self._current = (owner, spec.number)
            if key in self._cancelled:
                self._cancelled.discard(key)
                self._current = None
                self.drop_references(spec)
                self._add_result(owner, TaskResult(spec.number, TaskStatus.CANCELLED, b""))
                continue
            try:
                if spec.kind in _ACTOR_KINDS and (yield from self._is_for_actor(owner, spec)):
                    self._current = None
                    continue
                self._item = (-1, 0, 1)
                self.task_page = self._started = spec.number
                started_s = self.now_s()
                result = yield from self.result_of(owner, spec)
            except Disconnected:
                return
            self.task_page = 0
            self._current = None
            self._cancelled.discard(key)
            self._run_s += self.now_s() - started_s
            self._add_result(owner, result)
            is_due = self.now_s() - self._flushed_s > FLUSH_S or len(self._results) >= FLUSH_RESULTS
            if is_due and self.pending:
                self.flush()
        self.flush()

    def _is_for_actor(self, owner: Address, spec: TaskSpec) -> Steps:
        """Hand a call to the actor's journal, when it has one; whether nothing is left to do."""
        if spec.kind != m.TaskKind.ACTOR_CALL:
            return False
        if self.actor is None:
            # The constructor failed: the creator, who hears of it first, fails the calls and ends the process.
            self.drop_references(spec)
            return True
        if not self._is_made_known:
            # Should this call kill the process, its sender must know that it had started.
            self._is_made_known = True
            self.flush()
        if self.actor.journal is None:
            self.world.ledger.started(self, spec)
            return False
        yield from self.actor.journal.run(self.actor, owner, spec)
        return True

    def _create_actor(self, owner: Address, spec: TaskSpec) -> Steps:
        extras = spec.extras
        assert extras is not None
        operation = decode_operation(spec.payload)
        yield from self._work(operation)
        if operation.fails:
            raise Failed(Outcome("error", operation.salt))
        plan = extras.actor
        actor_id = operation.caller
        journal = Journal(self, plan) if plan is not None else None
        self.actor = Actor(actor_id, plan.life if plan is not None else 0, journal)
        if journal is not None:
            yield from journal.restore(self.actor)
        return TaskResult(spec.number, TaskStatus.OK, encode_payload(Payload("ok", 0)))

    def _work(self, operation: Operation) -> Steps:
        """Compute for a while, if the process survives it."""
        if operation.duration_s > TAKE_OVER_S:
            self.after(TAKE_OVER_S, self._taken_over)
        lag_s = operation.lag_s if operation.lag_s and self.world.monitor.is_first(operation) else 0.0
        yield Pause(operation.duration_s + lag_s)
        if not operation.turn and not operation.stream and not operation.family:
            yield from self.maybe_die(operation)

    def maybe_die(self, operation: Operation) -> Steps:
        """End the process, if the operation says so, now or soon."""
        if not self.world.monitor.dies(operation):
            return
        if operation.dies_late:
            self.after(self.world.chance.last_moments_s(), self.exit, -9, "task")
            return
        self.exit(-9, "task")
        yield Wait(lambda: False)

    def result_of(self, owner: Address, spec: TaskSpec) -> Steps:
        """Run a task; its result."""
        views: list[View] = []
        self._views = views
        try:
            if spec.function and (owner, spec.function) not in self.known_functions:
                self.world.monitor.fail(f"{self.name} has never got function {spec.function} of {owner}")
            if spec.kind == m.TaskKind.CREATE_ACTOR:
                return (yield from self._create_actor(owner, spec))
            if spec.kind == m.TaskKind.MAP:
                return (yield from self._run_chunk(spec))
            operation = decode_operation(spec.payload)
            arguments, inner = yield from self._inputs_of(owner, spec, operation, views)
            limits = spec.extras.limits if spec.extras is not None else None
            if limits is not None and limits.timeout_s > 0:
                self.send(owner, m.TaskStarted(spec.number))
            yield from self._work(operation)
            if operation.stream:
                return (yield from generate(self, owner, spec, operation, arguments))
            if self.actor is not None:
                number = self.actor.called(operation, arguments)
                return (yield from self._returned(owner, spec, operation, number, []))
            children = yield from self._children_of(operation)
            if operation.turn:
                yield from self._take_part(operation)
            if operation.family:
                yield from be_parent(self, operation)
            if operation.taking:
                yield from take_in_task(self, operation)
            if operation.handle:
                yield from call_from_task(self, operation, spec.extras.references if spec.extras is not None else [])
            if operation.fails:
                raise Failed(Outcome("error", operation.salt))
            references = yield from self._boxes_of(spec, operation)
            number = value_of(operation, arguments, inner, children)
            return (yield from self._returned(owner, spec, operation, number, references))
        except Interrupted:
            return TaskResult(spec.number, TaskStatus.CANCELLED, b"")
        except Unreadable as exc:
            return TaskResult(spec.number, TaskStatus.LOST, b"", ResultExtras(unreadable=exc.unreadable))
        except Failed as failed:
            outcome = failed.outcome
            payload = Payload(outcome.kind, outcome.number, 8, outcome.text)
            return TaskResult(spec.number, TaskStatus.ERROR, encode_payload(payload))
        finally:
            self._views = []
            for view in views:
                view.close()
            self.drop_references(spec)

    def _take_part(self, operation: Operation) -> Steps:
        """Do what there is to do with locks, semaphores or queues."""
        turn: Turn | Stint | Gate | Meeting = msgspec.msgpack.decode(operation.turn, type=Turn | Stint | Gate | Meeting)
        if isinstance(turn, Turn):
            failure = yield from take_turns(self, turn, operation)
        elif isinstance(turn, Gate):
            failure = yield from pass_gate(self, turn, operation)
        elif isinstance(turn, Meeting):
            failure = yield from meet(self, turn, operation)
        else:
            failure = yield from do_stint(self, turn, operation)
        if failure is not None:
            raise Failed(failure)

    def _run_chunk(self, spec: TaskSpec) -> Steps:
        """Map over a chunk, or over the span of it that was asked for; in parts, of which the node can read."""
        items = decode_items(spec.payload)
        span = spec.extras.span if spec.extras is not None else None
        low, high = (0, len(items)) if span is None else (span.low, span.high)
        numbers: list[int] = []
        step = 1
        while low < high:
            part = items[low : min(low + step, high)]
            self._item = (low, len(items), len(part))
            duration_s = sum(item.duration_s for item in part)
            if duration_s > TAKE_OVER_S:
                self.after(TAKE_OVER_S, self._taken_over)
            yield Pause(duration_s)
            for item in part:
                yield from self.maybe_die(item)
                if item.fails:
                    raise Failed(Outcome("error", item.salt))
                numbers.append(item.salt)
            low += len(part)
            # A chunk that has killed a worker is run item by item.
            step = 1 if span is not None or duration_s >= PART_S else min(2 * step, STEP_MAX)
        return TaskResult(spec.number, TaskStatus.OK, encode_payload(Payload("ok", 0, numbers=numbers)))

    def _inputs_of(self, owner: Address, spec: TaskSpec, operation: Operation, views: list[View]) -> Steps:
        arguments: list[int] = []
        inner: list[int] = []
        extras = spec.extras
        for part in extras.arguments if extras is not None else ():
            outcome, view = yield from self.load(part)
            if view is not None:
                views.append(view)
            arguments.append(_number(outcome))
        if operation.inner and extras is not None:
            refs = [Ref(self, reference, is_counted=False) for reference in extras.references]
            try:
                for ref in refs:
                    inner.append(_number((yield from self.get(ref))))
            finally:
                for ref in refs:
                    ref.drop()
        return arguments, inner

    def _children_of(self, operation: Operation) -> Steps:
        if not operation.children:
            return []
        number = self.task_set({"CPU": 1.0})
        refs = [self.submit(number, child) for child in operation.children]
        numbers: list[int] = []
        try:
            for ref in refs:
                assert ref is not None
                numbers.append(_number((yield from self.get(ref))))
        finally:
            for ref in refs:
                if ref is not None:
                    ref.drop()
        return numbers

    def _boxes_of(self, spec: TaskSpec, operation: Operation) -> Steps:
        """The references that the task returns; each is held here until the result is sent."""
        refs: list[Ref] = []
        try:
            for child in operation.boxed:
                ref = self.submit(self.task_set({"CPU": 1.0}), child)
                assert ref is not None
                refs.append(ref)
            for position, size_bytes in enumerate(operation.put_bytes):
                put = yield from self.put(put_number(operation.salt, position), size_bytes)
                if isinstance(put, Outcome):
                    raise Failed(put)
                refs.append(put)
            if operation.peeks and spec.extras is not None:
                refs += [Ref(self, reference, is_counted=False) for reference in spec.extras.references]
            references = [ref.part for ref in refs]
            if references:
                self.event(e.ReferencesMade(references))
            return references
        finally:
            for ref in refs:
                ref.drop()

    def _hand_over(self, receiver: Address, references: list[Reference]) -> None:
        """References are on their way to another process."""
        self._drain()
        for command in self.machine.objects.hand_over(receiver, references):
            assert isinstance(command, e.Send)
            self.send(command.destination, command.message)

    def _returned(
        self, owner: Address, spec: TaskSpec, operation: Operation, number: int, references: list[Reference]
    ) -> Steps:
        attempt = spec.extras.attempt if spec.extras is not None else 1
        name = object_id(owner.process_id, spec.number, attempt)
        part = yield from self.part_for(owner, name, number, operation.result_bytes, references)
        if part.stored is None and not references:
            return TaskResult(spec.number, TaskStatus.OK, part.payload)
        return TaskResult(spec.number, TaskStatus.STORED, b"", ResultExtras(part))

    def part_for(self, owner: Address, name: str, number: int, size_bytes: int, references: list[Reference]) -> Steps:
        """A value that goes to its owner, with the references in it. Raises: Failed."""
        try:
            part = yield from self.part_of(name, number, size_bytes, references, owner)
            if isinstance(part, Outcome):
                raise Failed(part)
        except BaseException:
            self.released.extend((reference.owner, reference.number) for reference in references)
            raise
        if references:
            self._hand_over(owner, references)
        return part

    # --- results

    def _add_result(self, owner: Address, result: TaskResult) -> None:
        if owner != self._results_owner:
            self.flush()
            self._results_owner = owner
        self._results.append(result)

    def flush(self) -> None:
        """Send the results that have gathered."""
        self._flushed_s = self.now_s()
        results, owner = self._results, self._results_owner
        if not results or owner is None:
            return
        self._results = []
        run_s, self._run_s = self._run_s, 0.0
        self.send(owner, m.TasksFinished(results, round(run_s * 1e9), self._is_blocked))
        self.let_go_of(results)

    def let_go_of(self, results: list[TaskResult]) -> None:
        """These results are sent."""
        for result in results:
            if result.extras is not None and result.extras.value is not None:
                references = result.extras.value.references
                self.released.extend((reference.owner, reference.number) for reference in references)

    def _taken_over(self) -> None:
        self.flush()
        self.turn()

    # --- waiting inside a task

    def _wait(self, is_due: Any) -> Steps:
        done = yield Wait(lambda: is_due() or self.is_closed, BLOCK_PATIENCE_S)
        if done:
            return
        self._block()
        try:
            yield Wait(lambda: is_due() or self.is_closed)
        finally:
            self._unblock()

    def wait_for(self, is_due: Any, patience_s: float | None) -> Steps:
        """Wait for so long at most; the CPU is lent to others meanwhile."""
        due = lambda: is_due() or self.is_closed  # noqa: E731
        if (yield Wait(due, BLOCK_PATIENCE_S if patience_s is None else min(patience_s, BLOCK_PATIENCE_S))):
            return
        self._block()
        try:
            yield Wait(due, patience_s)
        finally:
            self._unblock()

    def wait_quietly(self, is_due: Any) -> Steps:
        """Wait, with the CPU kept; ends with the process's cluster, too."""
        if not is_due():
            yield Wait(lambda: is_due() or self.is_closed)

    def _block(self) -> None:
        if self._current is None:
            return
        owner = self._current[0]
        self._is_blocked = True
        returned = self._give_back(owner, len(self.pending))
        self.flush()
        self.send(owner, m.TasksFinished(returned, 0, True))
        self.send(self.node, m.WorkerBlocked())

    def _unblock(self) -> None:
        if not self._is_blocked:
            return
        self._is_blocked = False
        self.send(self.node, m.WorkerUnblocked())
        if self._current is not None:
            self.send(self._current[0], m.TasksFinished([], 0, False))

    def _give_back(self, owner: Address, count: int) -> list[TaskResult]:
        returned: list[TaskResult] = []
        kept: list[tuple[Address, TaskSpec]] = []
        while self.pending and len(returned) < count:
            source, spec = self.pending.pop()
            if source == owner and spec.kind not in _ACTOR_KINDS:
                key = (owner, spec.number)
                status = TaskStatus.CANCELLED if key in self._cancelled else TaskStatus.RETURNED
                self._cancelled.discard(key)
                returned.append(TaskResult(spec.number, status, b""))
                self.drop_references(spec)
            else:
                kept.append((source, spec))
        self.pending.extend(reversed(kept))
        returned.reverse()
        return returned

    # --- messages

    def worker_message(self, source: Address, message: Message) -> None:
        """Take note of what an owner wants."""
        if isinstance(message, m.StartTasks):
            self.known_functions.update((source, function.number) for function in message.functions)
            for spec in message.tasks:
                references = _references_of(spec)
                if references:
                    self.event(e.ReferencesHeld(references))
                self.pending.append((source, spec))
        elif isinstance(message, m.ForgetFunctions):
            self.known_functions.difference_update((source, number) for number in message.numbers)
        elif isinstance(message, m.TakeBackTasks):
            returned = self._give_back(source, message.count)
            self.send(source, m.TasksFinished(returned, 0, self._is_blocked))
        elif isinstance(message, m.CancelTasks):
            for number in message.numbers:
                self._cancel((source, number), interrupts=message.interrupt)
        elif isinstance(message, m.StreamTaken):
            self.paces.taken(source, message)
        elif isinstance(message, m.SetupWorker):
            if message.references:
                self.event(e.ReferencesHeld(message.references))
            self.setups.append((source, message))
        elif isinstance(message, (ResultsTaken, CallsResumed)):
            if self.actor is None or self.actor.journal is None:
                self.early.append((source, message))
            else:
                self.actor.journal.message(source, message)
        elif isinstance(message, m.RetireWorker):
            self.is_retiring = True
            self._retired_by = source

    def _cancel(self, key: Key, *, interrupts: bool) -> None:
        if key == self._current and self._main is not None:
            if interrupts:
                self._main.interrupt(Interrupted())
        elif any((source, spec.number) == key for source, spec in self.pending):
            self._cancelled.add(key)

    def drop_references(self, spec: TaskSpec) -> None:
        """A task has ended, or will not start."""
        self.released.extend((reference.owner, reference.number) for reference in _references_of(spec))


def _references_of(spec: TaskSpec) -> list[Reference]:
    extras = spec.extras
    if extras is None:
        return []
    return [*extras.references, *(inner for part in extras.arguments for inner in part.references)]


def _number(outcome: Outcome) -> int:
    if outcome.kind != "ok":
        raise Failed(outcome)
    return outcome.number
