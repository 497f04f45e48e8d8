"""References as simulated programs hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clusterpool.core import owner_events as e
from clusterpool.core.messages import Reference

if TYPE_CHECKING:
    from clusterpool.simulation.client import Client


class Ref:
    """A reference that a program holds; it must let go of it, once."""

    __slots__ = ("_client", "is_held", "part")

    def __init__(self, client: Client, part: Reference, *, is_counted: bool) -> None:
        self._client = client
        self.part = part
        self.is_held = True
        if not is_counted:
            client.event(e.ReferencesMade([part]))

    def drop(self) -> None:
        """Let go."""
        if self.is_held:
            self.is_held = False
            self._client.released.append((self.part.owner, self.part.number))
