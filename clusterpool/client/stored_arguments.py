"""Large parts of arguments lie in the store once, however many tasks have them, and no longer than they are wanted.

    kept      by identity of the user's array or table: a reference, for as long as the array itself lives
    numbers   by content: which object has it. No reference: tasks in flight keep the object, or an array in `kept`

So an array that a program passes again and again is stored once, and its copy goes with it; one that was changed in
between has another content and replaces the old copy; bytes, which cannot be watched, stay until the last task that
has them ends.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from clusterpool.client.object_ref import ObjectRef
from clusterpool.core.messages import Reference
from clusterpool.errors import ObjectTooLarge, StoreFull
from clusterpool.serialization.digests import content_digest, is_immutable

if TYPE_CHECKING:
    from clusterpool.client.client import Client
    from clusterpool.core.owner import OwnerMachine

# How many copies are kept for arrays that still live. More would be spilled to disk for programs with thousands of
# large arrays; fewer would store again what a loop passes in turns.
KEPT_MAX = 64
# Digests are 16 bytes each; what is forgotten here is only stored again.
NUMBERS_MAX = 1024


class StoredArguments:
    """The stored parts of one client's arguments. `put` makes a value an object of this process."""

    def __init__(self, client: Client, put: Callable[[Any], ObjectRef]) -> None:
        self._client = client
        self._put = put
        self._kept: OrderedDict[int, tuple[weakref.ref[Any], bytes | None, ObjectRef]] = OrderedDict()  # by id
        self._numbers: OrderedDict[bytes, int] = OrderedDict()  # by content
        self._call = threading.local()

    @contextlib.contextmanager
    def one_call(self) -> Iterator[None]:
        """Within one call of the user's, an object that is met again has not changed."""
        self._call.known = {}
        try:
            yield
        finally:
            self._call.known = None

    def reference_to(self, value: Any) -> ObjectRef:
        """A reference to a stored copy of `value`.

        Raises: what pickle raises; ObjectTooLarge, StoreFull.
        """
        in_call: dict[int, tuple[Any, ObjectRef]] | None = getattr(self._call, "known", None)
        if in_call is not None and id(value) in in_call:
            return in_call[id(value)][1]
        reference = self._find_or_store(value)
        if in_call is not None:
            in_call[id(value)] = (value, reference)
        return reference

    def _find_or_store(self, value: Any) -> ObjectRef:
        kept = self._kept.get(id(value))
        is_kept = kept is not None and kept[0]() is value
        # The identity of bytes says nothing, because nobody tells us when they are gone.
        is_known_by_identity = is_kept and is_immutable(value)
        digest = None if is_known_by_identity else content_digest(value)
        is_same = is_known_by_identity or (kept is not None and digest is not None and kept[1] == digest)
        if kept is not None and is_kept and is_same and self._is_there(kept[2].part.number):
            return kept[2]
        reference = self._living(digest) if digest is not None else None
        if reference is None:
            reference = self._stored(value)
        if digest is not None:
            self._numbers[digest] = reference.part.number
            if len(self._numbers) > NUMBERS_MAX:
                self._numbers.popitem(last=False)
        self._keep(value, digest, reference)
        return reference

    def _stored(self, value: Any) -> ObjectRef:
        try:
            return self._put(value)
        except (ObjectTooLarge, StoreFull) as exc:
            kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
            size_bytes = getattr(value, "nbytes", None) or len(value)
            text = f"an argument (or a part of one) of type {kind} with {size_bytes / 1e6:,.1f} MB cannot be stored"
            raise type(exc)(f"{text}: {exc}") from exc

    def _is_there(self, number: int) -> bool:
        """Whether the object has not been let go, nor lost with its node."""
        record = self._client.machine.objects.table.owned.get(number)
        return record is not None and record.value is not None and not record.value.lost_kind

    def _living(self, digest: bytes) -> ObjectRef | None:
        number = self._numbers.get(digest)
        if number is None:
            return None
        client = self._client
        part = Reference(client.address, number)

        def hold(machine: OwnerMachine) -> bool:
            if not self._is_there(number):
                return False
            machine.objects.table.hold(part)
            return True

        return ObjectRef(client, client.address, number, is_counted=True) if client.ask_machine(hold) else None

    def _keep(self, value: Any, digest: bytes | None, reference: ObjectRef) -> None:
        key = id(value)

        def gone(watch: weakref.ref[Any]) -> None:
            # Perhaps within a garbage collection: this must only take note, and so does the reference's own end.
            entry = self._kept.get(key)
            if entry is not None and entry[0] is watch:
                self._kept.pop(key, None)

        try:
            watch = weakref.ref(value, gone)
        except TypeError:  # bytes and bytearrays
            return
        self._kept[key] = (watch, digest, reference)
        self._kept.move_to_end(key)
        if len(self._kept) > KEPT_MAX:
            with contextlib.suppress(KeyError):  # another thread's array has just gone
                self._kept.popitem(last=False)

    def clear(self) -> None:
        """Forget everything: the references go, and the copies with them."""
        self._kept.clear()
        self._numbers.clear()
