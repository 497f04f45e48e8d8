"""One process's connection to the cluster: the shell around the owner's machine.

    user threads --submit--> [submitted] --drain--> OwnerMachine --commands--> connections --> node, workers, owners
    user threads <-- sinks, futures <-- [deliveries] <-- results <-- whoever turns the loop (loop.py)

`_lock` guards the machine and the connections. Whoever holds it drains `_submitted` before and after, so nobody waits
for it to submit: a thread that finds it taken leaves its task to the holder. Sinks are called outside the lock, by the
one thread that has the loop's role, so that no sink is called by two threads at once.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic
from types import CodeType
from typing import Any

import msgspec

from clusterpool.client import interruption
from clusterpool.client.connections import Connections
from clusterpool.client.deliveries import Deliveries, Delivery
from clusterpool.client.loop import SIGNAL_SEEN_S, Loop
from clusterpool.client.message_kinds import NOT_FOR_MACHINE, REPLIES, WORKER_MESSAGES
from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core import wire
from clusterpool.core.coordination_messages import CountHeld, HeldCounted
from clusterpool.core.dispatch import Task
from clusterpool.core.joining import RegistrationRefused, mismatch
from clusterpool.core.messages import Address, Message
from clusterpool.core.owner import OwnerMachine
from clusterpool.core.rejections import Rejections
from clusterpool.errors import NotConnected, ProtocolError, VersionMismatch
from clusterpool.transport import stream

logger = logging.getLogger(__name__)

# Submitting faster than this gathers tasks into batches: one message for each would cost more than the tasks.
GATHER_S = 0.0002
GATHER_TASKS_MAX = 256
# Task numbers lie so far apart that the results of one task can be numbered from its own number on.
NUMBERS_APART = 1024
# A worker's task that waits for longer than this is reported as blocked.
BLOCK_PATIENCE_S = 0.001


class Client:
    """A driver or worker of the cluster. Made by bootstrap.py (drivers) and worker/main.py (workers)."""

    def __init__(self, *, node_socket: str, processes_folder: str, address: Address, job: m.JobPart, kind: str) -> None:
        self.address = address
        self.node = address.node
        self.kind = kind
        self.pid = os.getpid()
        self.job = job
        self.numbers = itertools.count(NUMBERS_APART, NUMBERS_APART)
        self.requests = itertools.count(1)
        self.machine = OwnerMachine(address, job=job, numbers=self.numbers, requests=self.requests)
        self.registered: m.Registered | None = None
        self.on_worker_message: Callable[[Address, Message], None] | None = None
        self.on_log_lines: Callable[[m.LogLines], None] | None = None
        self.on_count_held = self._holds_nothing
        self.on_closed: Callable[[str], None] | None = None
        self.deliveries = Deliveries()
        self.on_block: Callable[[], None] | None = None  # in a worker: a task is about to wait
        self.on_unblock: Callable[[], None] | None = None
        self.rejections = Rejections()
        self.is_closed = False
        self.closed_text = ""
        self._refusal = ""  # why the node does not let us join
        self._node_socket = node_socket
        self._lock = threading.Lock()
        self._lock_ident = 0

        # Tasks by set number, calls by actor id, events by None: in one queue, so that none overtakes another.
        self._submitted: deque[tuple[int | str | None, Any]] = deque()
        self._released: deque[tuple[Address, int]] = deque()
        self._unpinned: deque[str] = deque()
        self._unsent: list[m.TasksUnsent] = []
        self._is_kicked = False
        self._drained_s = 0.0
        self._wakeup_s: float | None = None  # when the machine wants to hear that time has passed
        self._is_wakeup_known = True  # else whoever turns the loop asks before it sleeps
        self._replies: dict[int, Callable[[Message], None]] = {}
        self.loop = Loop(
            process=self._process,
            after_turn=self.deliveries.run,
            next_wakeup_s=self._next_wakeup_s,
            on_taken=self._role_taken,
        )
        self._connections = Connections(
            address,
            kind=kind,
            job_id=job.job_id,
            processes_folder=processes_folder,
            loop=self.loop,
            # The machine must not be entered from within its own commands.
            on_unreachable=lambda peer, text: self._submitted.append((None, e.ProcessGone(peer, text))),
            on_unsent=self._note_unsent,
        )
        self.on_thread_turn: Callable[[], None] = lambda: None

    # --- start and end

    def start(self, *, wants_logs: bool) -> m.Registered:
        """Connect to the node and join it.

        Raises: NotConnected when the node does not answer; VersionMismatch when it is of another version.
        """
        with self._locked():
            connection = self._connections.open(self._node_socket)
            connection.send(m.RegisterProcess(self.job if self.kind == "driver" else None, wants_logs))
        if self.kind == "driver":
            self.install_interrupt_handler()
        if not self.loop.wait_until(lambda: self.registered is not None or self.is_closed, 30.0) or self.is_closed:
            self.close("it did not answer")
            if self._refusal:
                raise VersionMismatch(f"the node at {self._node_socket} cannot be joined: {self._refusal}")
            raise NotConnected(f"the node at {self._node_socket} did not let this process join: {self.closed_text}")
        self.loop.start()
        assert self.registered is not None
        return self.registered

    def close(self, text: str = "clusterpool was shut down") -> None:
        """Break all connections; waiters see the client closed."""
        if self.loop.is_stopped:
            return
        self._mark_closed(text)
        self.loop.stop()
        self.deliveries.run()
        self._connections.close()
        if self.on_closed is not None:
            self.on_closed(text)

    def _refused(self, text: str) -> None:
        self._refusal = text
        self._mark_closed(text)

    def _mark_closed(self, text: str, failure: str = "cancelled") -> None:
        if not self.is_closed:
            self.is_closed = True
            self.closed_text = text
            # Nobody else will tell the sinks of unfinished tasks, and who watches values that are still to come.
            self.handle_event(e.ClientClosed(failure, text))

    def abandon(self) -> None:
        """In the child of a fork: close the copies of our descriptors, and tell nobody."""
        self.is_closed = True
        self.closed_text = "this process was forked from one that used clusterpool"
        self._connections.abandon()
        self.loop.close_descriptors()

    @property
    def has_deliveries(self) -> bool:
        """Whether results or lines wait to be handed out."""
        return bool(self.deliveries.queue)

    @property
    def has_unsent(self) -> bool:
        """Whether something for the node is still with us, because its socket was full."""
        connection = self._connections.by_process.get(self.node.process_id)
        return connection is not None and connection.has_unsent

    def check_open(self) -> None:
        """Raises: NotConnected when the cluster is gone."""
        if self.is_closed:
            raise NotConnected(f"this process is not connected to a cluster any more: {self.closed_text}")

    # --- the lock

    @contextlib.contextmanager
    def _locked(self) -> Any:
        self._take_lock()
        try:
            yield
        finally:
            self._unlock()

    def _take_lock(self) -> None:
        self._lock.acquire()
        self._lock_ident = threading.get_ident()

    def _unlock(self) -> None:
        self._lock_ident = 0
        self._lock.release()

    def install_interrupt_handler(self, callers: frozenset[CodeType] = frozenset()) -> None:
        """Ctrl-C while the main thread is inside our own code must not leave that half changed: it comes later.

        `callers`: as in frames.py.
        """
        if interruption.install(self, callers):
            self.loop.sleep_max_s = SIGNAL_SEEN_S

    # --- submitting (any thread)

    def submit_task(self, set_number: int, task: Task) -> None:
        """Queue one task: sent at once when tasks come slowly, gathered when they come fast."""
        self._gather((set_number, task))

    def submit_call(self, actor_id: str, task: Task) -> None:
        """Queue one call of an actor; gathered into batches as tasks are."""
        self._gather((actor_id, task))

    def _gather(self, item: tuple[int | str, Task]) -> None:
        submitted = self._submitted
        submitted.append(item)
        if self._is_kicked:
            if len(submitted) >= GATHER_TASKS_MAX:
                self.drain()
        elif not self.machine.tasks or monotonic() - self._drained_s > GATHER_S:
            self.drain()
        else:
            self._is_kicked = True
            self.loop.kick_poller()

    def submit_tasks(self, set_number: int, tasks: list[Task]) -> None:
        """Queue many tasks and send what can be sent."""
        self.handle_event(e.TasksSubmitted(set_number, tasks))

    def handle_event(self, event: e.Event) -> None:
        """Put an event to the machine, behind what was submitted before."""
        self._submitted.append((None, event))
        self.drain()

    def release_reference(self, owner: Address, number: int) -> None:
        """A Python reference has gone; safe in `__del__`: any thread, even one that holds the lock."""
        self._released.append((owner, number))
        if not self._is_kicked:
            self._is_kicked = True
            self.loop.kick_poller()

    def handle_event_later(self, event: e.Event) -> None:
        """Put an event to the machine soon; safe in `__del__` and in callbacks of weak references."""
        self._submitted.append((None, event))
        if not self._is_kicked:
            self._is_kicked = True
            self.loop.kick_poller()

    def unpin(self, object_id: str) -> None:
        """An object's bytes are read no more; safe in a finalizer."""
        self._unpinned.append(object_id)
        if not self._is_kicked:
            self._is_kicked = True
            self.loop.kick_poller()

    def drain(self) -> None:
        """Handle what was submitted, unless another thread is about to."""
        while self._submitted or self._released or self._unpinned:
            if self._lock_ident == threading.get_ident() or not self._lock.acquire(blocking=False):
                return  # the holder looks again after it lets go
            self._lock_ident = threading.get_ident()
            try:
                self._drain_locked()
            finally:
                self._unlock()
        if self.deliveries.queue and not self.loop.is_mine:
            self.loop.kick()

    def _drain_locked(self) -> None:
        now_s = monotonic()
        self._is_kicked = False
        self._drained_s = now_s
        # Counted first: whatever was let go by now had been taken up before, by an event that is handled below.
        released_count = len(self._released)
        submitted = self._submitted
        while submitted:
            target, item = submitted.popleft()
            if target is None:
                self._execute(self.machine.handle(item, now_s))
                continue
            batch = [item]
            while submitted and submitted[0][0] == target:
                batch.append(submitted.popleft()[1])
            if isinstance(target, int):
                self._execute(self.machine.handle(e.TasksSubmitted(target, batch), now_s))
            else:
                self._execute(self.machine.handle(e.ActorCallsSubmitted(target, batch), now_s))
        if released_count:
            keys = [self._released.popleft() for _ in range(released_count)]
            self._execute(self.machine.handle(e.ReferencesDropped(keys), now_s))
        if self._unpinned:
            names = [self._unpinned.popleft() for _ in range(len(self._unpinned))]
            self._connections.send(self.node, m.UnpinObjects(names))
        if self.loop.is_mine:
            self._is_wakeup_known = False
            return
        known_s, self._wakeup_s = self._wakeup_s, self.machine.next_wakeup_s(now_s)
        self._is_wakeup_known = True
        if self._wakeup_s is not None and (known_s is None or self._wakeup_s < known_s):
            self.loop.kick_poller()  # it sleeps for longer than that

    def ask_machine(self, question: Callable[[OwnerMachine], Any]) -> Any:
        """Look into the machine (read only) after all that was submitted has been taken in."""
        if self._lock_ident == threading.get_ident():
            return question(self.machine)
        with self._locked():
            self._drain_locked()
            answer = question(self.machine)
        self.drain()  # what others submitted meanwhile: they left it to us
        return answer

    def settle(self) -> None:
        """Have the machine know all that this thread has submitted (after `drain`, another may still be about to)."""
        self.ask_machine(lambda _: None)

    def execute_asked(self, commands: list[e.Command]) -> None:
        """Carry out what the machine said to a question of `ask_machine`; only from within it."""
        assert self._lock_ident == threading.get_ident(), "only within ask_machine"
        self._execute(commands)

    def now_s(self) -> float:
        """The machine's clock."""
        return monotonic()

    def hand_over(self, receiver: Address, references: list[m.Reference]) -> None:
        """References go to another process with the next message to it: their owners are told first."""
        self.ask_machine(lambda machine: self._execute(machine.objects.hand_over(receiver, references)))

    def watch(self, reference: m.Reference, callback: Callable[[], None]) -> None:
        """Have `callback` called, as a delivery, once the object has a value; asks its owner for it if need be."""
        key = (reference.owner, reference.number)

        def look(machine: OwnerMachine) -> None:
            if machine.objects.table.value_of(reference) is not None:
                self.deliveries.queue.append(callback)
            else:
                self.deliveries.watchers.setdefault(key, []).append(callback)
                self._submitted.append((None, e.ValueWanted(reference)))

        self.ask_machine(look)
        self.drain()
        if self.deliveries.queue and not self.loop.is_mine:
            self.loop.kick()

    def wait_until(self, predicate: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Turn the loop until `predicate()`; a worker's CPU is lent to others meanwhile.

        Raises: NotConnected when the cluster goes away before.
        """
        if self._submitted:
            self.drain()
        if predicate():
            return True
        if self.on_block is None:
            is_true = self.loop.wait_until(lambda: predicate() or self.is_closed, timeout_s)
        else:
            # Most waits are short; telling node and owner of each would cost more than it gives.
            patience_s = BLOCK_PATIENCE_S if timeout_s is None else min(BLOCK_PATIENCE_S, timeout_s)
            is_true = self.loop.wait_until(lambda: predicate() or self.is_closed, patience_s)
            if not is_true and (timeout_s is None or timeout_s > patience_s):
                self.on_block()
                try:
                    left_s = None if timeout_s is None else timeout_s - patience_s
                    is_true = self.loop.wait_until(lambda: predicate() or self.is_closed, left_s)
                finally:
                    if self.on_unblock is not None:
                        self.on_unblock()
        if is_true and not predicate():
            self.check_open()
        return is_true

    # --- requests to the node

    def request(self, make: Callable[[int], Message], *, timeout_s: float | None = None) -> Message:
        """Send the node what `make(request number)` returns and wait for its answer.

        Raises: NotConnected when the node goes away meanwhile; TimeoutError.
        """
        answers: list[Message] = []
        self.request_nowait(make, answers.append)
        if not self.loop.wait_until(lambda: bool(answers) or self.is_closed, timeout_s):
            raise TimeoutError(f"the node did not answer within {timeout_s} s")
        if not answers:
            self.check_open()
        return answers[0]

    def request_nowait(self, make: Callable[[int], Message], on_answer: Callable[[Message], None]) -> None:
        """Send a request; `on_answer` is called (under the lock: it must only take note) with the answer."""
        request = next(self.requests)
        self._replies[request] = on_answer
        self.send(self.node, make(request))

    def send(self, destination: Address, message: Message) -> None:
        """Send a message, from any thread."""
        if self._lock_ident == threading.get_ident():
            self._connections.send(destination, message)
            return
        with self._locked():
            self._drain_locked()
            self._connections.send(destination, message)
        self.drain()

    def is_needed(self) -> bool:
        """Whether others would lose something if this process ended now."""
        with self._locked():
            self._drain_locked()
            return self.machine.is_needed()

    def call_later(self, delivery: Delivery) -> None:
        """Have `delivery` called outside the lock, in order with results, by whoever turns the loop."""
        self.deliveries.queue.append(delivery)
        if not self.loop.is_mine:
            self.loop.kick()

    # --- the loop's callbacks

    def _process(self, ready: list[tuple[int, int]]) -> None:
        by_fd = self._connections.by_fd
        self._take_lock()
        try:
            for fd, mask in ready:
                connection = by_fd.get(fd)
                if connection is None:
                    self._connections.accept(fd)
                    continue
                if mask & select.EPOLLOUT and connection.has_unsent:
                    self._connections.flush(connection)
                if mask & ~select.EPOLLOUT:
                    self._receive(connection)
            wakeup_s = self._wakeup_s
            if wakeup_s is not None and wakeup_s <= monotonic():
                self._execute(self.machine.handle(e.TimePassed(), monotonic()))
            self._is_kicked = False  # this turn may be the kick, with another having drained what it was for
            self._is_wakeup_known = False
            if self._submitted or self._released or self._unpinned:
                self._drain_locked()
        finally:
            self._unlock()
        if self._submitted or self._released or self._unpinned:
            self.drain()

    def _next_wakeup_s(self) -> float | None:
        while not self._is_wakeup_known:
            self._take_lock()
            try:
                self._wakeup_s = self.machine.next_wakeup_s(monotonic())
                self._is_wakeup_known = True
            finally:
                self._unlock()
            if self._submitted or self._released or self._unpinned:
                self.drain()  # what others left to us while we had the lock
        return self._wakeup_s

    def _role_taken(self, is_thread: bool) -> None:
        # Whoever set it may have found nobody to kick, and what it had submitted handled by another: left as it is,
        # it would keep all others from kicking us.
        self._is_kicked = False
        self.drain()
        if is_thread:
            self.on_thread_turn()

    def _receive(self, connection: stream.Connection) -> bool:
        """Handle what has arrived; whether there was anything."""
        frames: list[bytes] = []
        try:
            frames, ended = connection.receive()
            for frame in frames:
                self._arrived(connection, wire.decode(frame))
        except (msgspec.MsgspecError, ProtocolError) as exc:
            who = connection.peer or "a stranger"
            self._reject("a process", f"dropped the connection of {who}, which sent no message of ours: {exc}")
            ended = True
        if ended:
            self._disconnected(connection)
        return bool(frames)

    def _arrived(self, connection: stream.Connection, message: Message) -> None:
        if type(message) is m.Relay:
            self._relayed(connection, message)
        elif type(message) is m.Hello:
            self._greeted(connection, message)
        elif connection.peer is None:
            raise ProtocolError("a message came before the greeting")
        else:
            self._handle_message(connection.peer, message)  # type: ignore[arg-type]

    def _relayed(self, connection: stream.Connection, relay: m.Relay) -> None:
        if connection.peer != self.node:
            raise ProtocolError(f"{connection.peer} passed on a message of {relay.source}, as only the node may")
        try:
            message = wire.decode(relay.body)
        except msgspec.MsgspecError as exc:  # the node is not to blame
            self._reject("relayed", f"dropped a message of {relay.source} that is none of ours: {exc}")
            return
        self._handle_message(relay.source, message)

    def _reject(self, cause: str, text: str) -> None:
        if self.rejections.note(cause):
            logger.warning("%s (the next ones are counted only)", text)

    def _greeted(self, connection: stream.Connection, hello: m.Hello) -> None:
        reason = mismatch(self._connections.hello, hello)
        if reason and connection.peer == self.node:
            self._refused(reason)
            return
        if reason:
            raise ProtocolError(reason)
        self._connections.greeted(connection, hello.address)

    def _handle_message(self, source: Address, message: Message) -> None:
        kind = type(message)
        if kind not in NOT_FOR_MACHINE:
            self._execute(self.machine.handle(e.MessageArrived(source, message), monotonic()))
        elif kind in WORKER_MESSAGES:
            if self.on_worker_message is not None:
                self.on_worker_message(source, message)
        elif kind in REPLIES:
            callback = self._replies.pop(message.request, None)  # type: ignore[attr-defined]
            if callback is not None:
                callback(message)
            else:
                self._execute(self.machine.handle(e.MessageArrived(source, message), monotonic()))
        elif kind is m.Registered:
            self.registered = message  # type: ignore[assignment]
        elif kind is m.WorkerExited or kind is m.ProcessEnded:
            self._read_last_words(message.address.process_id)  # type: ignore[attr-defined]
            self._execute(self.machine.handle(e.MessageArrived(source, message), monotonic()))
        elif kind is m.LogLines:
            if self.on_log_lines is not None:
                lines, show = message, self.on_log_lines
                self.deliveries.queue.append(lambda: show(lines))  # type: ignore[arg-type]
        elif kind is CountHeld:
            self.on_count_held(message)  # type: ignore[arg-type]
        elif kind is m.LeftNode:
            self._mark_closed("clusterpool was shut down")
        else:
            assert kind is RegistrationRefused, kind
            self._refused(message.text)  # type: ignore[attr-defined]

    def _holds_nothing(self, question: CountHeld) -> None:
        """This process has never had anything to do with semaphores."""
        self.send(self.node, HeldCounted(question.request, question.name, 0, 0))

    def _read_last_words(self, process_id: str) -> None:
        """A worker has ended: what it had sent us must be handled before the news of its end."""
        connection = self._connections.by_process.get(process_id)
        if connection is None or connection.peer == self.node:
            return
        # To the end of what is there, not of the stream: a child of the worker may hold the socket open.
        while not connection.is_closed and self._receive(connection):
            pass

    def _disconnected(self, connection: stream.Connection) -> None:
        peer = self._connections.drop(connection)
        if peer is None:
            return
        if peer == self.node:
            self._mark_closed(
                f"the node {peer.node_id} that this process was connected to has ended, and with it what the process "
                "had on the cluster; the node failed, or somebody ended it (see its log in the session's folder)",
                "worker_died",
            )
            if self.on_closed is not None:
                self.deliveries.queue.append(lambda: self.on_closed and self.on_closed(self.closed_text))
            return
        self._execute(self.machine.handle(e.ProcessGone(peer, "its connection was closed"), monotonic()))

    # --- commands (under the lock)

    def _execute(self, commands: list[e.Command]) -> None:
        for command in commands:
            if type(command) is e.Send:
                self._connections.send(command.destination, command.message)
            else:
                self.deliveries.take(command)
        # Before anything else is heard of the process that they were for.
        while self._unsent:
            self._execute(self.machine.handle(e.MessageArrived(self.address, self._unsent.pop()), monotonic()))

    def _note_unsent(self, destination: Address, message: Message) -> None:
        unsent = wire.unsent_tasks(destination, message)
        if unsent is not None:
            self._unsent.append(unsent)
