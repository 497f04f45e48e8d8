"""What the object store wants done with its arena and its disk: pages at once, files in a thread."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from clusterpool.config import NodeConfig
from clusterpool.core import node_events as e
from clusterpool.core import store_messages as s
from clusterpool.core import transfer_messages as t
from clusterpool.core.messages import Address, Message
from clusterpool.object_store.arena import Arena
from clusterpool.object_store.spill import SpillFolder

logger = logging.getLogger(__name__)


class DiskThread:
    """Spills and restores objects; started by the first that is spilled."""

    def __init__(self, config: NodeConfig, arena: Arena, post: Callable[[Any], None]) -> None:
        self._config = config
        self._arena = arena
        self._post = post
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._folder: SpillFolder | None = None

    def reserve(self, command: e.ReservePages) -> Any:
        """Make sure that the arena has pages; the event that says so or not."""
        try:
            self._arena.reserve(command.offset, command.size_bytes)
        except OSError as exc:
            logger.warning("the arena cannot grow: %s", exc)
            return s.ArenaExhausted(command.object_id, self._arena.reserved_bytes)
        return e.PagesReserved(command.client, command.request, command.object_id, command.offset, command.size_bytes)

    def take(self, command: Any, send: Callable[[Address, Message], None]) -> bool:
        """Carry out a command of the store or the transfers; whether it was one."""
        if isinstance(command, t.WriteChunk):
            self._arena.write(command.arena_offset, command.chunk)
        elif isinstance(command, t.ReadChunk):
            view: Any = self._arena.write_view(command.arena_offset, command.size_bytes)
            with view:  # it is encoded at once: no copy before
                data = t.ChunkData(command.transfer, command.offset, view)
                send(Address(command.node_id, command.node_id), data)
        elif isinstance(command, s.RestoreObject):
            reserved = self.reserve(e.ReservePages("", 0, command.object_id, command.offset, command.size_bytes))
            if isinstance(reserved, s.ArenaExhausted):
                self._post(reserved)
            else:
                self._enqueue(command)
        elif isinstance(command, (s.SpillObject, s.DeleteSpilled)):
            self._enqueue(command)
        else:
            return False
        return True

    def stop(self) -> None:
        """Finish what is under way."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(10.0)

    def _enqueue(self, command: Any) -> None:
        if self._thread is None:
            self._folder = SpillFolder(self._config.spill_path, bytes_max=self._config.spill_bytes_max)
            self._thread = threading.Thread(target=self._main, name="disk", daemon=True)
            self._thread.start()
        self._queue.put(command)

    def _main(self) -> None:
        while True:
            command = self._queue.get()
            if command is None:
                return
            event = self._carry_out(command)
            if event is not None:
                self._post(event)

    def _carry_out(self, command: Any) -> Any:
        folder = self._folder
        assert folder is not None
        object_id = command.object_id
        if isinstance(command, s.DeleteSpilled):
            try:
                folder.delete(object_id)
            except OSError as exc:  # the session's folder goes with the node
                logger.warning("object %s: its file could not be removed: %s", object_id, exc)
            return None
        is_spill = isinstance(command, s.SpillObject)
        view = self._arena.write_view(command.offset, command.size_bytes)
        try:
            if is_spill:
                folder.write(object_id, view)
                return s.ObjectSpilled(object_id)
            folder.read(object_id, view)
            return s.ObjectRestored(object_id)
        except Exception as exc:
            logger.warning("object %s: %s failed: %s", object_id, "spilling" if is_spill else "restoring", exc)
            failed = s.SpillFailed if is_spill else s.RestoreFailed
            return failed(object_id, str(exc))
        finally:
            view.release()
