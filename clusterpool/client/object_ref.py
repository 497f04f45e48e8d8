"""`ObjectRef`: a name for a value that may not exist yet."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from clusterpool.client import current
from clusterpool.core import owner_events as e
from clusterpool.core.messages import Address, Reference
from clusterpool.core.object_names import object_id
from clusterpool.errors import NotConnected
from clusterpool.serialization import references

if TYPE_CHECKING:
    from clusterpool.client.client import Client


class ObjectRef:
    """A reference to the result of a task or a `put`.

    As an argument of a task it is replaced by its value; inside a container it is passed on as it is. `get` gives its
    value, `await` too, and `future()` a standard future. The value is kept for as long as any process has a reference.
    Source: Ray paper, section 3 (futures).
    """

    __slots__ = ("__weakref__", "_client", "_number", "_owner")

    def __init__(self, client: Client, owner: Address, number: int, *, is_counted: bool) -> None:
        self._client = client
        self._owner = owner
        self._number = number
        if not is_counted:
            client.handle_event(e.ReferencesMade([Reference(owner, number)]))

    def __del__(self) -> None:
        try:
            if not self._client.is_closed:
                self._client.release_reference(self._owner, self._number)
        except AttributeError:  # __init__ failed, or the interpreter is at its end
            pass

    def check_client(self, client: Client | None) -> None:
        """Raises: NotConnected when the reference belongs to another cluster than `client`'s."""
        if self._client is not client:
            raise NotConnected(
                f"{self!r} belongs to a cluster that this process has left "
                f"({self._client.closed_text or 'shut down'}); its value is gone: make it again in the present one"
            )

    @property
    def part(self) -> Reference:
        """The reference as messages carry it."""
        return Reference(self._owner, self._number)

    @property
    def object_id(self) -> str:
        """The object's name: its owner's process id and its number there."""
        return object_id(self._owner.process_id, self._number)

    def future(self) -> concurrent.futures.Future[Any]:
        """A standard future of the value, for `concurrent.futures.wait`, `as_completed` and callbacks."""
        from clusterpool.client.api import future_of

        return future_of(self)

    def __await__(self) -> Generator[Any, None, Any]:
        import asyncio

        return asyncio.wrap_future(self.future()).__await__()

    def __reduce__(self) -> tuple[Any, ...]:
        references.capture(self)
        return references.restore, (self._owner.node_id, self._owner.process_id, self._number)

    def __copy__(self) -> ObjectRef:
        return self

    def __deepcopy__(self, _memo: object) -> ObjectRef:
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ObjectRef):
            return NotImplemented
        return (self._owner, self._number) == (other._owner, other._number)

    def __hash__(self) -> int:
        return hash((self._owner, self._number))

    def __repr__(self) -> str:
        return f"ObjectRef({self.object_id})"


def restore_reference(owner_node: str, owner_process: str, number: int) -> ObjectRef:
    """Make a reference again in the process that unpickles it."""
    return ObjectRef(current.get().client, Address(owner_node, owner_process), number, is_counted=False)


def pin_forever(reference: ObjectRef) -> None:
    """The user pickled a reference himself, to where nobody can see: keep its object until the job ends."""
    reference._client.handle_event(e.ReferencesMade([reference.part]))


def value_of(reference: ObjectRef) -> Any:
    """The value of a large part of an argument, which was stored on its own."""
    from clusterpool.client.api import get

    return get(reference)


references.set_restore_hook(restore_reference)
references.set_resolve_hook(value_of)
references.set_escape_hook(pin_forever)
