"""Reading values that may be lost: whoever cannot have one tells its owner, and waits for another copy or a new one."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from clusterpool import errors
from clusterpool.client.values import ObjectUnreadable
from clusterpool.core import owner_events as e
from clusterpool.core.messages import Reference, ValuePart

if TYPE_CHECKING:
    from clusterpool.client.client import Client
    from clusterpool.client.object_ref import ObjectRef
    from clusterpool.client.runtime import Runtime

# How often a value is asked for in vain that nobody says is gone, on a node that nobody says is dead. Each time the
# nodes have tried for some seconds at least; where two cannot reach each other for longer, an error is better than to
# wait for ever.
VAIN_ROUNDS_MAX = 3


class Rounds:
    """The attempts of one reader to have one value."""

    def __init__(self, client: Client, reference: Reference) -> None:
        self._client = client
        self._reference = reference
        self._vain = 0

    def go_on(self, error: ObjectUnreadable) -> bool:
        """Tell the owner that the value could not be read; whether to try again once there is one."""
        if not (error.unreadable.gone or error.unreadable.dead):
            self._vain += 1
            if self._vain >= VAIN_ROUNDS_MAX:
                return False
        self._client.handle_event(e.ValueUnreadable(self._reference, error.unreadable))
        return True


def read_values(
    here: Runtime, refs: Sequence[ObjectRef], parts: Sequence[ValuePart], ends_s: float | None
) -> list[Any]:
    """The values of `refs`, which are known to be `parts`; rebuilt ones are waited for until `ends_s` (monotonic).

    Raises: what the tasks raised; GetTimeout, ObjectLost, StoreFull.
    """
    return [_read(here, ref, part, ends_s) for ref, part in zip(refs, parts, strict=True)]


def _read(here: Runtime, ref: ObjectRef, part: ValuePart, ends_s: float | None) -> Any:
    values = here.values
    if part.stored is None:
        return values.load(part)
    rounds: Rounds | None = None
    while True:
        try:
            return values.load(part)
        except ObjectUnreadable as exc:
            rounds = rounds or Rounds(here.client, ref.part)
            if not rounds.go_on(exc):
                raise errors.ObjectLost(str(exc)) from None
        part = _wait(here.client, ref, ends_s)


def _wait(client: Client, ref: ObjectRef, ends_s: float | None) -> ValuePart:
    table = client.machine.objects.table
    found: list[ValuePart] = []

    def is_known() -> bool:
        part = table.value_of(ref.part)
        if part is not None:
            found.append(part)
        return bool(found)

    client.settle()
    if not client.wait_until(is_known, None if ends_s is None else max(0.0, ends_s - monotonic())):
        raise errors.GetTimeout(f"{ref!r} was lost with its node and has not been rebuilt in time: ask again later")
    return found[0]


def is_there(client: Client, part: ValuePart | None, reference: Reference) -> bool:
    """Whether a value can be read now, as far as is known; a lost one is asked for."""
    if part is None:
        return False
    if part.stored is not None and not part.stored.node_ids:
        client.handle_event(e.ValueWanted(reference))
        return False
    return True
