"""How far a generator task may run ahead of whoever takes its items.

    worker:  yield --sent--> [has_room?] --no--> pause until `taken` says that there is
    owner:   take, take, ... --every `step` items--> StreamTaken

An item counts until it is taken, not until its value is let go: collecting references does not hold up what makes them.
"""

from __future__ import annotations

from collections import deque

# Untaken items of a generator: fewer would make it wait for a slow consumer's hiccups; each costs its owner a record of
# about 1 KB, and up to 100 KiB for a value that is not in the store.
ITEMS_MAX = 1000
# The same in bytes, wherever they lie: more would only be spilled to disk and read back.
BYTES_MAX = 128_000_000
# Larger items reach the bound in bytes first.
_SMALL_BYTES_MAX = BYTES_MAX // ITEMS_MAX
# What a stream's owner says it has taken when the generator shall not pause any more.
NO_BOUND = 1 << 62


class ProducerPace:
    """The generator's side. `buffer`: how many untaken items there may be; 0 for the default, -1 for any number."""

    def __init__(self) -> None:
        self._items_max = ITEMS_MAX
        self._bytes_max = BYTES_MAX
        self._sent = 0
        self._taken = 0
        self._sizes: deque[int] = deque()  # of the items that are not taken
        self._untaken_bytes = 0

    def bound(self, buffer: int) -> None:
        """The generator starts; what was taken before (of an earlier attempt) still counts."""
        if buffer:
            self._items_max = self._bytes_max = NO_BOUND
            if buffer > 0:
                self._items_max = buffer

    def sent(self, size_bytes: int) -> None:
        """One more item is on its way."""
        self._sent += 1
        if self._sent > self._taken:
            self._sizes.append(size_bytes)
            self._untaken_bytes += size_bytes

    def taken(self, count: int) -> None:
        """So many items have been taken, all in all."""
        self._taken = max(self._taken, count)
        while self._sizes and self._sent - len(self._sizes) < self._taken:
            self._untaken_bytes -= self._sizes.popleft()

    @property
    def has_room(self) -> bool:
        """Whether the generator may go on."""
        return len(self._sizes) < self._items_max and self._untaken_bytes < self._bytes_max


def step_of(buffer: int) -> int:
    """After how many items taken the generator is told: half of what it may run ahead, so that it need not stop."""
    if buffer < 0:
        return NO_BOUND
    return max(1, (buffer or ITEMS_MAX) // 2)


def step_for(step: int, size_bytes: int) -> int:
    """The same once an item of this size has come. Of large ones each is told: the bound in bytes may be near.

    It never grows again: of what was taken meanwhile, the generator may still wait to hear.
    """
    return 1 if size_bytes > _SMALL_BYTES_MAX else step
