"""Runs tasks in the order they come: the main thread runs user code, and turns the client's loop when it has none.

    messages --(whoever turns the loop)--> pending --main thread--> results --> owner
                                              ^  |
                                 taken back, cancelled

Results gather while a batch of tiny tasks runs and go out together; when a task runs for longer than the loop's
hand-back time, the I/O thread takes over the loop and sends what has gathered.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections import deque
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from clusterpool.client.submission import Slot
from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.actor_messages import CallsResumed, ResultsTaken
from clusterpool.core.messages import Address, Reference, TaskResult, TaskSpec, TaskStatus, ValuePart
from clusterpool.processes.task_page import ENDED, ITEMS, TASK
from clusterpool.serialization.exceptions import dump_exception, unpicklable_result
from clusterpool.serialization.functions import explain_load_failure, loads_function
from clusterpool.serialization.packing import dumps_value, loads
from clusterpool.worker.calls import USER_CODE_CALLERS, CallRunner
from clusterpool.worker.child import run_child
from clusterpool.worker.interrupts import Interrupts, Key
from clusterpool.worker.streams import StreamPaces

if TYPE_CHECKING:
    from clusterpool.client.runtime import Runtime

logger = logging.getLogger(__name__)

# Finished results wait for this long at most while more tiny tasks run.
FLUSH_NS = 1_000_000
FLUSH_RESULTS = 1000
# Exit handlers of a worker that nobody waits for have this long.
END_S = 10.0
_FAILED_SETUP_EXIT_CODE = 1
_ACTOR_KINDS = (m.TaskKind.CREATE_ACTOR, m.TaskKind.ACTOR_CALL)


class TaskRunner:
    """The tasks of one worker."""

    def __init__(self, runtime: Runtime, *, name: str, page: memoryview) -> None:
        self.runtime = runtime
        self.client = runtime.client
        self.name = name
        self.functions: dict[tuple[Address, int], Any] = {}  # by owner and number: payload until used, then callable
        self.pending: deque[tuple[Address, TaskSpec]] = deque()
        self.setups: deque[tuple[Address, m.SetupWorker]] = deque()
        self.is_retiring = False
        self.page = page  # what runs, for the node to read should the process die
        self.called: tuple[Address, int] | None = None  # the function that was called last
        self.called_as = ""  # its name, if the call has one
        self.interrupts = Interrupts(USER_CODE_CALLERS)
        self.streams = StreamPaces(self)
        self.actor: Any = None  # worker.actor.ActorRunner
        self._is_made_known = False
        self.early: list[tuple[Address, m.Message]] = []  # what callers say of an actor that is still being made
        self.calls = CallRunner(self)
        # The main thread appends without a lock; whoever sends takes away what is there under `_flush_lock`.
        self._results: list[TaskResult] = []
        self._results_owner: Address | None = None
        self._flush_lock = threading.Lock()
        self._exit_code: int | None = None
        self.wants_save = False  # a checkpoint of its actor
        self._retired_by: tuple[Address, m.RetireWorker] | None = None
        self._run_ns = 0
        self._flushed_ns = 0
        self._is_blocked = False
        self._main_ident = threading.get_ident()
        self.client.loop.stays_awake = True
        self.client.on_block = self._block
        self.client.on_unblock = self._unblock

    def called_name(self) -> str:
        """Of the function that prints, where a worker runs those of many names: for who has called `remote` only."""
        if self.called is None or self.actor is not None or self.runtime.returns_exits:
            return ""
        return self.called_as or str(getattr(self.functions.get(self.called), "__qualname__", ""))

    # --- the main thread

    def run(self) -> int:
        """Run tasks until the worker is retired or its node is gone; the exit code."""
        loop, client, pending = self.client.loop, self.client, self.pending
        while True:
            loop.wait_until(lambda: bool(pending or self.setups or self.wants_save or self._is_ending()))
            if client.is_closed:
                return 0
            if self._exit_code is not None:
                return self._exit_code
            if self.setups:
                owner, setup = self.setups.popleft()
                if setup.is_process:
                    return run_child(self.runtime, owner, setup)
                if not self._set_up(owner, setup):
                    return _FAILED_SETUP_EXIT_CODE
            if self.wants_save:
                self.actor.save()
            if pending:
                self._run_pending()
            elif self.is_retiring and not self.setups:
                self._end()
                return 0

    def _is_ending(self) -> bool:
        return self.is_retiring or self.client.is_closed or self._exit_code is not None

    def save_soon(self) -> None:
        """Have the actor take a checkpoint when the main thread runs none of its calls."""
        self.wants_save = True
        self.client.loop.kick()

    def exit(self, error: SystemExit) -> None:
        """A call in another thread wants the process to end."""
        self._exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
        self.client.loop.kick()

    def _end(self) -> None:
        if self.actor is not None:
            self.actor.close()
        self.flush()
        client = self.client
        assert self._retired_by is not None
        source, retire = self._retired_by
        client.handle_event(e.Retiring())
        if lingers := client.is_needed():
            for address in {source: None, client.node: None}:
                client.send(address, m.WorkerLingers())
            client.loop.wait_until(lambda: client.is_closed or not client.machine.is_needed())
        if lingers or not retire.is_awaited:
            # A thread that some task has left running must not keep the process: what it held is given to others.
            timer = threading.Timer(END_S, os._exit, (0,))
            timer.daemon = True
            timer.start()
        client.handle_event(e.Retired())
        self.runtime.shutdown()

    def _run_pending(self) -> None:
        pending, interrupts, page = self.pending, self.interrupts, self.page
        while True:
            try:
                owner, spec = pending.popleft()
            except IndexError:
                break
            key = interrupts.current = Key(owner, spec.number)
            if interrupts.take(key):
                interrupts.current = None
                self.drop_references(spec)
                self.add_result(owner, TaskResult(spec.number, TaskStatus.CANCELLED, b""))
                continue
            if spec.kind >= m.TaskKind.CREATE_ACTOR and self._is_for_actor(owner, spec):
                interrupts.current = None
                continue
            page[ITEMS] = 0
            page[TASK] = spec.number
            started_ns = perf_counter_ns()
            try:
                result = self.calls.run(owner, spec)
            except BaseException:
                # SystemExit: the process ends, but what others are waiting for has been done.
                self.flush()
                raise
            page[TASK] = spec.number | ENDED
            interrupts.current = None
            interrupts.forget(key)
            ended_ns = perf_counter_ns()
            self._run_ns += ended_ns - started_ns
            self.add_result(owner, result)
            is_due = ended_ns - self._flushed_ns > FLUSH_NS or len(self._results) >= FLUSH_RESULTS
            if is_due and pending:
                self.flush()
                self.client.loop.turn_nowait()
        self.flush()

    def _is_for_actor(self, owner: Address, spec: TaskSpec) -> bool:
        """Hand a call to the actor's own threads or coroutines, when it has them."""
        if self.actor is None and spec.kind == m.TaskKind.ACTOR_CALL:
            # The constructor failed: the creator, who hears of it first, fails the calls and ends the process.
            self.drop_references(spec)
            return True
        if spec.kind == m.TaskKind.ACTOR_CALL and not self._is_made_known:
            # Should this call kill the process, its sender must know that it had started.
            self._is_made_known = True
            self.flush()
        return self.actor is not None and self.actor.take(owner, spec)

    def _set_up(self, owner: Address, setup: m.SetupWorker) -> bool:
        os.environ.update(setup.env)
        if setup.name:
            self.name = setup.name
        # Programs choose a GPU or the line of a progress bar by `current_process()._identity[0]`.
        process = multiprocessing.current_process()
        process.name = f"ClusterPoolWorker-{setup.lease}"
        process._identity = (setup.lease,)
        if setup.payload:
            try:
                (function, *args), _ = loads(setup.payload)
                loads_function(function, node_id=self.client.address.node_id)(*args)
            except BaseException as exc:
                error = self.dump(exc, "initializer")
                self.client.send(owner, m.WorkerSetupFailed(setup.lease, error))
                return False
            finally:
                self._release(setup.references)
        self.client.send(owner, m.WorkerReady(setup.lease))
        return True

    # --- results (any thread)

    def add_result(self, owner: Address, result: TaskResult) -> None:
        """Keep a result until the next flush; the main thread only."""
        if owner != self._results_owner:
            self.flush()
            self._results_owner = owner
        self._results.append(result)

    def flush(self) -> None:
        """Send the results that have gathered; from any thread."""
        self._flushed_ns = perf_counter_ns()
        with self._flush_lock:
            results, owner = self._results[:], self._results_owner
            if not results or owner is None:
                return
            del self._results[: len(results)]
            run_ns, self._run_ns = self._run_ns, 0
            self.client.send(owner, m.TasksFinished(results, run_ns, self._is_blocked))
        for result in results:
            if result.extras is not None:
                self.let_go_of_result(result)

    def turn_by_thread(self) -> None:
        """The I/O thread has taken the loop: the main thread is busy, so what it had finished goes out now."""
        if self._results:
            self.flush()

    # --- waiting inside a task

    def _block(self) -> None:
        current = self.interrupts.current
        if threading.get_ident() != self._main_ident or current is None:
            return
        owner = current.owner
        self._is_blocked = True
        returned = self._give_back(owner, len(self.pending))
        self.flush()
        self.client.send(owner, m.TasksFinished(returned, 0, True))
        self.client.send(self.client.node, m.WorkerBlocked())

    def _unblock(self) -> None:
        if not self._is_blocked or threading.get_ident() != self._main_ident:
            return
        self._is_blocked = False
        self.client.send(self.client.node, m.WorkerUnblocked())
        if self.interrupts.current is not None:
            self.client.send(self.interrupts.current.owner, m.TasksFinished([], 0, False))

    def _drop(self, owner: Address, numbers: list[int]) -> None:
        """Drop those of these tasks that have not started, and say so."""
        kept: list[tuple[Address, TaskSpec]] = []
        dropped: list[TaskResult] = []
        while self.pending:
            try:
                item = self.pending.pop()  # from the other end than the main thread: each gets a task or not
            except IndexError:
                break
            if item[0] == owner and item[1].number in numbers and item[1].kind not in _ACTOR_KINDS:
                dropped.append(TaskResult(item[1].number, TaskStatus.CANCELLED, b""))
                self.drop_references(item[1])
            else:
                kept.append(item)
        self.pending.extend(reversed(kept))
        if dropped:
            self.client.send(owner, m.TasksFinished(dropped, 0, self._is_blocked))

    def _give_back(self, owner: Address, count: int) -> list[TaskResult]:
        """Take unstarted tasks of `owner` from the end; results that say so."""
        returned: list[TaskResult] = []
        kept: list[tuple[Address, TaskSpec]] = []
        while self.pending and len(returned) < count:
            try:
                item = self.pending.pop()
            except IndexError:
                break
            if item[0] == owner and item[1].kind not in _ACTOR_KINDS:
                number = item[1].number
                is_cancelled = self.interrupts.take(Key(owner, number))
                status = TaskStatus.CANCELLED if is_cancelled else TaskStatus.RETURNED
                returned.append(TaskResult(number, status, b""))
                self.drop_references(item[1])
            else:
                kept.append(item)
        self.pending.extend(reversed(kept))
        returned.reverse()
        return returned

    # --- messages (whoever turns the loop, under the client's lock)

    def message(self, source: Address, message: m.Message) -> None:
        """Take note of a message to this worker."""
        if isinstance(message, m.StartTasks):
            for function in message.functions:
                self.functions[(source, function.number)] = function.payload
            for spec in message.tasks:
                if spec.extras is not None:
                    self._hold_references(spec)
                self.pending.append((source, spec))
        elif isinstance(message, m.ForgetFunctions):
            # What their closures hold may run code of the user's when it goes: not here, under the lock.
            forgotten = [self.functions.pop((source, number), None) for number in message.numbers]
            self.client.call_later(forgotten.clear)
        elif isinstance(message, m.TakeBackTasks):
            self.client.send(source, m.TasksFinished(self._give_back(source, message.count), 0, self._is_blocked))
        elif isinstance(message, m.CancelTasks):
            self._cancel(source, message)
        elif isinstance(message, m.StreamTaken):
            self.streams.taken(Key(source, message.number), message.taken)
        elif isinstance(message, m.SetupWorker):
            if message.references:
                self.client.handle_event(e.ReferencesHeld(message.references))
            self.setups.append((source, message))
        elif isinstance(message, (ResultsTaken, CallsResumed)):
            if self.actor is None:
                self.early.append((source, message))
            else:
                self.actor.message(source, message)
        elif isinstance(message, m.RetireWorker):
            self.is_retiring = True
            self._retired_by = (source, message)

    def _cancel(self, source: Address, message: m.CancelTasks) -> None:
        if not message.interrupt:
            self._drop(source, message.numbers)
            return
        for number in message.numbers:
            key = Key(source, number)
            if self.actor is None:
                self.interrupts.ask(key)
            elif not self.actor.cancel(key):
                self.interrupts.ask(key)
                if self.actor.cancel(key):  # its loop or its threads have got it just now
                    self.interrupts.forget(key)

    # --- references

    def _references_of(self, spec: TaskSpec) -> list[Reference]:
        extras = spec.extras
        if extras is None:
            return []
        return [*extras.references, *(inner for part in extras.arguments for inner in part.references)]

    def _hold_references(self, spec: TaskSpec) -> None:
        references = self._references_of(spec)
        if references:
            self.client.handle_event(e.ReferencesHeld(references))

    def drop_references(self, spec: TaskSpec) -> None:
        """A task has ended, or will not start."""
        if spec.extras is not None:
            self._release(self._references_of(spec))

    def _release(self, references: list[Reference]) -> None:
        for reference in references:
            self.client.release_reference(reference.owner, reference.number)

    # --- loading and dumping

    def function_of(self, owner: Address, number: int) -> Any:
        """A function that was shipped.

        Raises: VersionMismatch when it needs what this node has not.
        """
        key = self.called = (owner, number)
        function = self.functions[key]
        if isinstance(function, bytes):
            function = self.functions[key] = loads_function(function, node_id=self.client.address.node_id)
        return function

    def arguments_of(self, spec: TaskSpec) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a task, with the values of its references in place.

        Raises: VersionMismatch when they need a module that this node has not.
        """
        extras, values = spec.extras, self.runtime.values
        stored = extras.stored if extras is not None else None
        try:
            args, kwargs = loads(spec.payload) if stored is None else values.load_stored(stored)
        except (ImportError, AttributeError) as exc:
            raise explain_load_failure(exc, self.client.address.node_id) from exc
        if extras is not None and extras.arguments:
            loaded = [values.load(part) for part in extras.arguments]
            args = tuple(loaded[arg.index] if type(arg) is Slot else arg for arg in args)
            kwargs = {name: loaded[arg.index] if type(arg) is Slot else arg for name, arg in kwargs.items()}
        return args, kwargs

    def hand_over(self, owner: Address, references: list[Reference]) -> None:
        """References go out with a result. Until it is sent (`let_go...`) they are held here.

        Else the user's code may drop the last one meanwhile, and the owner hears of that before it hears of the result.
        """
        self.client.handle_event(e.ReferencesMade(references))
        self.client.hand_over(owner, references)

    def let_go_of_result(self, result: TaskResult) -> None:
        """The result is sent."""
        assert result.extras is not None
        for part in (result.extras.value, *result.extras.values):
            if part is not None:
                self._release(part.references)

    def let_go_of_part(self, part: ValuePart) -> None:
        """An item of a stream is sent."""
        self._release(part.references)

    def dump(self, exc: BaseException, task_name: str) -> bytes:
        """An exception as the owner gets it."""
        return dump_exception(exc, node_id=self.client.address.node_id, pid=self.client.pid, task_name=task_name)

    def part_of(self, owner: Address, value: Any, object_id: str) -> ValuePart:
        """A result on its way to `owner`: its references are handed over first.

        Raises: SerializationFailed; StoreFull, ObjectTooLarge.
        """
        part = self.unsent_part_of(owner, value, object_id)
        if part.references:
            self.client.hand_over(owner, part.references)
        return part

    def unsent_part_of(self, owner: Address, value: Any, object_id: str) -> ValuePart:
        """The same, of which `owner` has not been told yet; its references are held, as by `hand_over`.

        Raises: SerializationFailed; StoreFull, ObjectTooLarge.
        """
        try:
            serialized = dumps_value(value)
        except Exception as exc:
            raise unpicklable_result(value, exc) from exc
        references = [reference.part for reference in serialized.references]
        part = self.runtime.values.part_of(serialized, object_id, references, owner)
        if references:
            self.client.handle_event(e.ReferencesMade(references))
        return part
