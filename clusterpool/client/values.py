"""Values in and out of the object store, and errors as their own types."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clusterpool import errors
from clusterpool.core import messages as m
from clusterpool.core.messages import Address, ValuePart
from clusterpool.core.object_names import object_id
from clusterpool.object_store.arena import Arena
from clusterpool.serialization.exceptions import load_exception
from clusterpool.serialization.packing import Serialized, dumps_value, loads, loads_packed

if TYPE_CHECKING:
    from clusterpool.client.client import Client

logger = logging.getLogger(__name__)

# Up to this size a value travels in a message: a trip to the arena costs about 100 us on both sides, a copy of
# 100 kB through a socket 30 us. The same border as Ray's.
INLINE_BYTES_MAX = 100 * 1024
# A part of an argument from this size on is stored once, however many tasks have it.
LARGE_BYTES_MIN = 1024 * 1024
_COPY_AT_ONCE_BYTES = 1024 * 1024

ERROR_BY_KIND: dict[str, type[Exception]] = {
    "worker_died": errors.WorkerDied,
    "timeout": errors.TaskTimeout,
    "setup_failed": errors.WorkerSetupFailed,
    "environment": errors.WorkerSetupFailed,
    "start_failed": errors.StartFailed,
    "infeasible": errors.TaskInfeasible,
    "cancelled": errors.TaskCancelled,
    "not_connected": errors.NotConnected,
    "actor_died": errors.ActorDied,
    "actor_unavailable": errors.ActorUnavailable,
    "object_lost": errors.ObjectLost,
    "lost": errors.ObjectLost,
    "owner_died": errors.OwnerDied,
    "too_large": errors.ObjectTooLarge,
    "store_full": errors.StoreFull,
    "disk_full": errors.StoreFull,
    "freed": errors.ObjectLost,
}

_UNREADABLE = ("lost", "freed")
NONE_PAYLOAD = dumps_value(None).to_bytes()


class ObjectUnreadable(errors.ObjectLost):
    """A stored object could not be had from where it was said to be; its owner may know better, or rebuild it."""

    def __init__(self, unreadable: m.UnreadablePart) -> None:
        super().__init__(unreadable.text)
        self.unreadable = unreadable


def make_error(kind: str, text: str, error: bytes = b"") -> BaseException:
    """The exception that a failure of this kind raises; `error`: the user's own that it comes from."""
    if error and kind != "actor_died":
        return load_exception(error)
    exception = ERROR_BY_KIND.get(kind, errors.ClusterpoolError)(text)
    if error:
        exception.__cause__ = load_exception(error)
    return exception


class Values:
    """Stores and loads values for one client."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._arena: Arena | None = None

    @property
    def arena(self) -> Arena:
        """This process's view of its node's arena."""
        if self._arena is None:
            registered = self._client.registered
            assert registered is not None
            self._arena = Arena.attach(registered.arena_path, registered.arena_bytes)
        return self._arena

    # --- in

    def store(self, serialized: Serialized, object_id: str, owner: Address | None = None) -> m.StoredValue:
        """Write a pickled value to the arena of this node, waiting for room if need be.

        `owner`: keeps account of its copies.
        Raises: ObjectTooLarge, StoreFull.
        """
        size_bytes = serialized.size_bytes
        client = self._client
        answer = self._ask(
            lambda request: m.CreateObject(request, object_id, size_bytes, owner),
            lambda: client.send(client.node, m.AbortObject(object_id)),
        )
        if isinstance(answer, m.StoreFailed):
            if answer.kind == "exists":
                return m.StoredValue(object_id, size_bytes, [client.node.node_id], owner)
            raise make_error(answer.kind, answer.text)
        assert isinstance(answer, m.ObjectCreated)
        try:
            self._write(answer.offset, size_bytes, serialized)
        except BaseException:
            client.send(client.node, m.AbortObject(object_id))
            raise
        client.send(client.node, m.SealObject(object_id))
        return m.StoredValue(object_id, size_bytes, [client.node.node_id], owner)

    def _ask(self, make: Callable[[int], m.Message], give_back: Callable[[], None]) -> m.Message:
        """Ask the node for room or for a pin; `give_back` it when this thread is interrupted while it waits."""
        client = self._client
        answers: list[m.Message] = []
        lock = threading.Lock()
        is_abandoned = False

        def answered(answer: m.Message) -> None:
            with lock:
                answers.append(answer)
            if is_abandoned and not isinstance(answer, m.StoreFailed):
                give_back()

        client.request_nowait(make, answered)
        try:
            client.loop.wait_until(lambda: bool(answers) or client.is_closed)
        except BaseException:
            with lock:
                is_abandoned = not answers
            if answers and not is_abandoned and not isinstance(answers[0], m.StoreFailed):
                give_back()
            raise
        if not answers:
            client.check_open()
        return answers[0]

    def _write(self, offset: int, size_bytes: int, serialized: Serialized) -> None:
        arena = self.arena
        position = offset
        view = arena.write_view(offset, size_bytes)
        try:
            for segment in serialized.segments():
                length = len(segment)
                if length >= _COPY_AT_ONCE_BYTES:
                    arena.write(position, segment)
                else:
                    view[position - offset : position - offset + length] = segment
                position += length
        finally:
            view.release()

    def part_of(
        self, serialized: Serialized, object_id: str, references: list[m.Reference], owner: Address
    ) -> ValuePart:
        """The value as a message carries it: in place when small, else stored."""
        if serialized.size_bytes <= INLINE_BYTES_MAX:
            return ValuePart(payload=serialized.to_bytes(), references=references)
        return ValuePart(stored=self.store(serialized, object_id, owner), references=references)

    def new_object_id(self, number: int) -> str:
        """The name of an object of this process in the stores."""
        return object_id(self._client.address.process_id, number)

    # --- out

    def load(self, part: ValuePart) -> Any:
        """The value of a part; waits for a stored one to be brought here.

        Raises: the task's exception, or the reason why there is no value; ObjectUnreadable.
        """
        if part.stored is not None:
            return self.load_stored(part.stored)
        if part.error or part.lost_kind:
            raise make_error(part.lost_kind, part.lost, part.error)
        return loads(part.payload)

    def load_stored(self, stored: m.StoredValue) -> Any:
        """The value of a stored object, in place.

        Raises: ObjectUnreadable, StoreFull.
        """
        client = self._client
        answer = self._ask(lambda request: m.PinObject(request, stored), lambda: client.unpin(stored.object_id))
        return self.loaded(stored, answer)

    def load_stored_nowait(self, stored: m.StoredValue, on_loaded: Callable[[Any, BaseException | None], None]) -> None:
        """Load a stored object, and have `on_loaded(value, error)` called as a delivery."""
        client = self._client

        def answered(answer: m.Message) -> None:
            def deliver() -> None:
                try:
                    value = self.loaded(stored, answer)
                except BaseException as exc:
                    on_loaded(None, exc)
                else:
                    on_loaded(value, None)

            client.call_later(deliver)

        client.request_nowait(lambda request: m.PinObject(request, stored), answered)

    def loaded(self, stored: m.StoredValue, answer: m.Message) -> Any:
        """The value in the pages that the node has pinned for us, or in a file of it."""
        if isinstance(answer, m.StoreFailed):
            if answer.kind in _UNREADABLE:
                raise ObjectUnreadable(m.UnreadablePart(stored.object_id, answer.gone, answer.text, answer.dead))
            raise make_error(answer.kind, answer.text)
        if isinstance(answer, m.ObjectOnDisk):
            return loads_packed(self._read_spilled(stored))
        assert isinstance(answer, m.ObjectPinned)
        client, object_id = self._client, stored.object_id
        if answer.is_scarce:
            copied = self.arena.read_copy(answer.offset, answer.size_bytes)
            client.unpin(object_id)
            return loads_packed(copied)
        anchor = self.arena.read_anchor(answer.offset, answer.size_bytes, lambda: client.unpin(object_id))
        return loads_packed(anchor)

    def _read_spilled(self, stored: m.StoredValue) -> bytearray:
        from clusterpool.object_store.spill import SpillFolder

        assert self._client.registered is not None
        content = bytearray(stored.size_bytes)
        SpillFolder(self._client.registered.spill_folder).read(stored.object_id, memoryview(content))
        return content
