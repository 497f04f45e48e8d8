"""The node's part of semaphores, channels and cells: what lies on this host, and the way to the control store.

    CoordinationMachine --DrainCarrier--> moved page, POSIX semaphores, cells, channels --CarrierDrained--> machine
                        --CallCoordination--> [queue] --> thread "coordination" --Lua--> control store
                        <--OperationAnswered--------------------'                            |
                        <--GrantRead-- thread "grants" <--the node's stream of grants--------'

Both threads have connections of their own, apart from the node's heartbeats, and start with the first operation: what
is only ever used on one host needs no control store.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import os
import queue
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from clusterpool.core import coordination_events as e
from clusterpool.errors import STORE_CANNOT, ClusterpoolError, NotConnected
from clusterpool.node.store_thread import PATIENCE_S
from clusterpool.node.thin_tokens import drain_semaphore, read_tokens, return_tokens
from clusterpool.processes.thin_files import cell_path, remove_thin_files, semaphore_path
from clusterpool.processes.token_records import is_signal, mark_as_moved, remove_records

if TYPE_CHECKING:
    from clusterpool.node.shell import NodeShell

logger = logging.getLogger(__name__)

MOVED_PAGE = "moved"
_PAGE_BYTES = 8
_RETRY_S = 0.2
_BLOCK_MS = 1000
_STOP_S = 1.5
# Operations that change nothing have no number.
_QUESTIONS = frozenset({"exists", "value", "length", "read_cell"})


class NodeCoordination:
    """Used by the node's loop; `take` carries out what the machine says."""

    def __init__(self, shell: NodeShell) -> None:
        self._shell = shell
        self._page: memoryview | None = None
        self._store = _StoreCalls(shell)

    def open(self) -> None:
        """Make the moved page; before any process of the node starts."""
        path = self._shell.paths.folder / MOVED_PAGE
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, _PAGE_BYTES)
            self._page = memoryview(mmap.mmap(fd, _PAGE_BYTES)).cast("Q")
        finally:
            os.close(fd)

    def close(self) -> None:
        """End the threads, and remove what the node's processes have made."""
        self._store.stop()
        remove_thin_files(self._shell.node_id, folders=[self._shell.arena.path.parent])

    def take(self, command: e.CoordinationCommand) -> None:
        """Carry out a command of the machine."""
        if isinstance(command, e.CallCoordination):
            self._store.put(command)
        elif isinstance(command, e.DrainCarrier):
            self._shell.handle(self._drain(command))
        elif isinstance(command, e.ReadThinTokens):
            self._shell.handle(read_tokens(self._shell.node_id, command.name))
        elif isinstance(command, e.ReturnTokens):
            with contextlib.suppress(OSError):  # it has just been removed
                return_tokens(self._shell.node_id, command.name, command.count)
        elif isinstance(command, e.RemoveCarriers):
            for name in command.names:
                self._remove(name)
        elif isinstance(command, e.RemoveJobCarriers):
            remove_thin_files(self._shell.node_id, command.job_id, folders=[self._shell.arena.path.parent])

    def _remove(self, name: str) -> None:
        if "/" in name:
            return
        node_id = self._shell.node_id
        semaphore_path(node_id, name).unlink(missing_ok=True)
        remove_records(node_id, name)
        cell_path(self._shell.arena.path, node_id, name).unlink(missing_ok=True)
        self._shell.descriptors.forget_channel(name)

    # --- moving

    def _drain(self, command: e.DrainCarrier) -> e.CarrierDrained | e.CarrierMissing:
        assert self._page is not None
        name, node_id = command.name, self._shell.node_id
        # First of all: who has not seen the new number by the time we look in has put in what we find.
        self._page[0] += 1
        try:
            if command.kind == "channel":
                return e.CarrierDrained(name, e.Contents(items=self._shell.descriptors.drain_channel(name)))
            if command.kind == "cell":
                content = cell_path(self._shell.arena.path, node_id, name).read_bytes()
                return e.CarrierDrained(name, e.Contents(content=content))
            mark_as_moved(node_id, name)
            return e.CarrierDrained(name, e.Contents(tokens=drain_semaphore(node_id, name)), is_signal(node_id, name))
        except (OSError, ValueError) as exc:
            logger.warning("%s %s could not be moved to the control store: %s", command.kind, name, exc)
            return e.CarrierMissing(name, f"the {command.kind} {name} is not on node {node_id}: {exc}")


class _StoreCalls:
    """Calls the control store in a thread, in order, and reads this node's grants in another.

    While the store is away, calls that somebody waits for fail, each after PATIENCE_S. The others, which give back
    what a dead process held, say, are made when it is there again: nobody would make them later.
    """

    def __init__(self, shell: NodeShell) -> None:
        self._shell = shell
        self._queue: queue.SimpleQueue[tuple[e.CallCoordination, float] | None] = queue.SimpleQueue()
        self._taken: deque[tuple[e.CallCoordination, float] | None] = deque()  # out of the queue, not made
        self._numbers = itertools.count(1)
        self._store: Any = None
        self._is_started = False
        self._is_stopping = False
        self._thread = threading.Thread(target=self._main, name="coordination", daemon=True)
        self._reader = threading.Thread(target=self._read_grants, name="grants", daemon=True)

    def put(self, call: e.CallCoordination) -> None:
        """Call the store; answered by an event."""
        if not self._is_started:
            if not call.starts and self._shell.config.is_embedded:
                return  # nobody else can have put anything into a control store of this node's own
            self._is_started = True
            self._shell.store.start()
            self._thread.start()
            self._reader.start()
        self._queue.put((call, time.monotonic() + PATIENCE_S))

    def stop(self) -> None:
        """Finish what is queued, and leave nothing in the store that others might wait for."""
        self._is_stopping = True
        if not self._is_started:
            return
        if not self._shell.config.is_embedded:
            self._queue.put(
                (e.CallCoordination(0, "end_node_life", (self._shell.machine.coordination.life, True)), 0.0)
            )
        self._queue.put(None)
        self._thread.join(_STOP_S)

    # --- the calling thread

    def _main(self) -> None:
        while (taken := self._taken.popleft() if self._taken else self._queue.get()) is not None:
            self._carry_out(*taken)
        if self._store is not None:
            with contextlib.suppress(Exception):
                self._store.close()

    def _carry_out(self, call: e.CallCoordination, deadline_s: float) -> None:
        numbers = () if call.operation in _QUESTIONS else (next(self._numbers),)
        while True:
            try:
                if self._store is None:
                    self._store = self._connect()
                value = getattr(self._store, call.operation)(*numbers, *call.arguments)
            except STORE_CANNOT as exc:
                # The same number again: if it took effect the first time, it does not the second.
                has_time = isinstance(exc, NotConnected) and time.monotonic() < deadline_s
                if not self._is_stopping and (not call.tag or has_time):
                    time.sleep(_RETRY_S)
                    self._fail_overdue(exc)
                    continue
                self._failed(call, exc)
            except Exception as exc:
                if not isinstance(exc, ClusterpoolError):
                    logger.exception("control store: %s failed", call.operation)
                self._failed(call, exc)
            else:
                if call.tag:
                    self._shell.post(e.OperationAnswered(call.tag, value))
            return

    def _fail_overdue(self, exc: ClusterpoolError) -> None:
        """Of the calls behind the one that is tried."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._taken.append(self._queue.get_nowait())
        now_s = time.monotonic()
        for _ in range(len(self._taken)):
            taken = self._taken.popleft()
            if taken is not None and taken[0].tag and taken[1] < now_s:
                self._failed(taken[0], exc)
            else:
                self._taken.append(taken)

    def _failed(self, call: e.CallCoordination, exc: Exception) -> None:
        if call.tag:
            self._shell.post(e.OperationFailed(call.tag, type(exc).__name__, str(exc)))
        else:
            logger.warning("control store: %s%r failed: %s", call.operation, call.arguments[:2], exc)

    def _connect(self) -> Any:
        from clusterpool.control_store.coordination import CoordinationStore

        store = self._shell.store.connect_another(CoordinationStore)
        store.serve(self._shell.node_id)
        return store

    # --- the reading thread

    def _read_grants(self) -> None:
        store: Any = None
        last_id, server_run = "0", ""
        while not self._is_stopping:
            try:
                if store is None:
                    store = self._connect()
                grants = store.read_grants(last_id, block_ms=_BLOCK_MS)
                if server_run and store.server_run != server_run:
                    # Its clock, which names the grants, may be behind; and it may have forgotten who waits.
                    last_id, server_run = "0", store.server_run
                    self._shell.post(e.StoreChanged())
                    continue  # those that we have are not all: the others would be dropped unread
                server_run = store.server_run
                for grant in grants:
                    self._shell.post(e.GrantRead(grant.waiter, grant.name, grant.token))
                if grants:
                    last_id = grants[-1].id
                    store.drop_grants(last_id)
            except ClusterpoolError:
                time.sleep(_RETRY_S)
            except Exception:
                logger.exception("the reading of grants broke")
                store = None
                time.sleep(_RETRY_S)
        if store is not None:
            with contextlib.suppress(Exception):
                store.close()
