"""A simulated arena and disk: bytes that really are where the store says, so that a store that errs is found out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


class SimulatedArena:
    """The shared memory of one node; it comes into being with the first byte."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.page_bytes_max = size_bytes  # what the file system has behind it
        self._bytes: bytearray | None = None

    def write(self, offset: int, content: bytes) -> None:
        """Write in place."""
        if self._bytes is None:
            self._bytes = bytearray(self.size_bytes)
        self._bytes[offset : offset + len(content)] = content

    def read(self, offset: int, size_bytes: int) -> bytes:
        """A copy of what is there."""
        if self._bytes is None:
            return bytes(size_bytes)
        return bytes(self._bytes[offset : offset + size_bytes])


class SimulatedDisk:
    """The spill folder of one node."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.files: dict[str, bytes] = {}
        self.is_broken = False

    @property
    def used_bytes(self) -> int:
        """The bytes of all files."""
        return sum(len(content) for content in self.files.values())

    def write(self, object_id: str, content: bytes) -> bool:
        """Keep an object; False when there is no room."""
        if self.is_broken or self.used_bytes + len(content) > self.size_bytes:
            return False
        self.files[object_id] = content
        return True

    def read(self, object_id: str) -> bytes | None:
        """An object; None when the file is gone."""
        return None if self.is_broken else self.files.get(object_id)
