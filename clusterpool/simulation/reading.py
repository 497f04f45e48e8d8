"""Stored values in a simulated reader's hands, or not where it looked for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clusterpool.core import messages as m

if TYPE_CHECKING:
    from clusterpool.simulation.client import Client


class Unreadable(Exception):
    """A stored value is not where it was said to be."""

    def __init__(self, unreadable: m.UnreadablePart) -> None:
        super().__init__(unreadable.text)
        self.unreadable = unreadable


class View:
    """A stored value that is being read in place."""

    def __init__(self, client: Client, object_id: str, offset: int, content: bytes) -> None:
        self._client = client
        self._object_id = object_id
        self._offset = offset
        self._content = content

    def close(self) -> None:
        """Read no more; what was read must be as it was."""
        client = self._client
        if not client.is_alive:
            return
        now = client.node_party.arena.read(self._offset, len(self._content))
        client.world.monitor.check(
            now == self._content, f"{self._object_id} has changed under {client.name}, which reads it"
        )
        client.unpinned.append(self._object_id)
