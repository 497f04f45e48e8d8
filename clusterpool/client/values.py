"""Values in and out of the object store, and errors as their own types."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clusterpool import errors
from clusterpool.core import messages as m
from clusterpool.core import recovery_messages as r
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
# Files of one object that may be unreadable, one after the other, before it counts as lost: the node drops a copy whose
# file is, so that a second one would be of a copy that it has fetched and spilled meanwhile.
_FILES_MAX = 2
NONE_PAYLOAD = dumps_value(None).to_bytes()


class ObjectUnreadable(errors.ObjectLost):
    """A stored object could not be had from where it was said to be; its owner may know better, or rebuild it."""

    def __init__(self, unreadable: m.UnreadablePart) -> None:
        super().__init__(unreadable.text)
        self.unreadable = unreadable


class _FileUnreadable(Exception):
    """What the node has on disk of an object could not be read; the node has been told."""


def make_error(kind: str, text: str, error: bytes = b"") -> BaseException:
    """The exception that a failure of this kind raises; `error`: the user's own that it comes from."""
    if error and kind != "actor_died":
        return load_exception(error)
    cause = load_exception(error) if error else None
    if cause is not None:
        text = f"{text} ({type(cause).__name__}: {cause})"
    exception = ERROR_BY_KIND.get(kind, errors.ClusterpoolError)(text)
    exception.__cause__ = cause
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

    def close(self) -> None:
        """The client has left: what was kept mapped for later reads goes. Values that are held stay as they are."""
        if self._arena is not None:
            self._arena.forget_spares()

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
        trouble: list[str] = []
        while True:
            answer = self._ask(lambda request: m.PinObject(request, stored), lambda: client.unpin(stored.object_id))
            try:
                return self._loaded(stored, answer, trouble)
            except _FileUnreadable:
                continue

    def load_stored_nowait(
        self,
        stored: m.StoredValue,
        on_loaded: Callable[[Any, BaseException | None], None],
        trouble: list[str] | None = None,
    ) -> None:
        """Load a stored object, and have `on_loaded(value, error)` called as a delivery.

        trouble: the files of it that could not be read, so far.
        """
        client = self._client
        unread = [] if trouble is None else trouble

        def answered(answer: m.Message) -> None:
            def deliver() -> None:
                try:
                    value = self._loaded(stored, answer, unread)
                except _FileUnreadable:
                    self.load_stored_nowait(stored, on_loaded, unread)
                except BaseException as exc:
                    on_loaded(None, exc)
                else:
                    on_loaded(value, None)

            client.call_later(deliver)

        client.request_nowait(lambda request: m.PinObject(request, stored), answered)

    def _loaded(self, stored: m.StoredValue, answer: m.Message, trouble: list[str]) -> Any:
        """The value in the pages that the node has pinned for us, or in a file of it.

        Raises: _FileUnreadable, with the reason added to `trouble`: to be asked for again.
        """
        if isinstance(answer, m.StoreFailed):
            if answer.kind in _UNREADABLE:
                text = "; ".join([*trouble, answer.text])
                raise ObjectUnreadable(m.UnreadablePart(stored.object_id, answer.gone, text, answer.dead))
            raise make_error(answer.kind, answer.text)
        if isinstance(answer, m.ObjectOnDisk):
            return loads_packed(self._read_spilled(stored, trouble))
        assert isinstance(answer, m.ObjectPinned)
        return loads_packed(self._read_pinned(stored.object_id, answer))

    def _read_pinned(self, object_id: str, pinned: m.ObjectPinned) -> Any:
        client = self._client
        try:
            if not pinned.is_scarce:
                return self.arena.read_anchor(pinned.offset, pinned.size_bytes, lambda: client.unpin(object_id))
            copied = self.arena.read_copy(pinned.offset, pinned.size_bytes)
        except BaseException as exc:
            client.unpin(object_id)
            if not isinstance(exc, OSError):
                raise
            # This process's trouble: the copy may be whole, and another worker able to read it.
            text = f"object {object_id} could not be read from the object store {self.arena.path}: {exc}"
            raise ObjectUnreadable(m.UnreadablePart(object_id, [], text)) from exc
        client.unpin(object_id)
        return copied

    def _read_spilled(self, stored: m.StoredValue, trouble: list[str]) -> bytearray:
        from clusterpool.object_store.spill import SpillFolder

        client, object_id = self._client, stored.object_id
        assert client.registered is not None
        content = bytearray(stored.size_bytes)
        try:
            SpillFolder(client.registered.spill_folder).read(object_id, memoryview(content))
        except errors.ObjectLost as exc:
            trouble.append(str(exc))
            # It drops that copy, and looks for another one when it is asked again.
            client.send(client.node, r.CopyUnreadable(object_id, str(exc)))
            if len(trouble) < _FILES_MAX:
                raise _FileUnreadable from None
            gone = [client.node.node_id]
            raise ObjectUnreadable(m.UnreadablePart(object_id, gone, "; ".join(trouble))) from None
        return content
