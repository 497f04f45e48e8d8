"""Everything that a seed decides while a world runs: how long things take, and what goes wrong by itself."""

from __future__ import annotations

from random import Random


class Chance:
    """Durations of what processes do."""

    def __init__(self, random: Random, *, fork_failure: float = 0.0) -> None:
        self._random = random
        self._fork_failure = fork_failure

    def fork_s(self) -> float:
        """From the wish for a worker to its first line."""
        return self._random.uniform(0.004, 0.03)

    def setup_s(self) -> float:
        """An initializer."""
        return self._random.choice((0.0, 0.001, 0.05))

    def disk_s(self) -> float:
        """To write or read one object."""
        return self._random.uniform(0.001, 0.02)

    def last_moments_s(self) -> float:
        """How long a process still lives that is about to die."""
        return self._random.choice((0.0, 0.0001, 0.0005, 0.002, 0.005))

    def fork_fails(self) -> bool:
        """Whether a worker cannot be started."""
        return self._fork_failure > 0 and self._random.random() < self._fork_failure


class Latencies:
    """Durations of messages."""

    def __init__(self, random: Random, *, remote_s: float = 0.0005, spread: float = 4.0) -> None:
        self._random = random
        self._remote_s = remote_s
        self._spread = spread

    def local_s(self, slowness: float) -> float:
        """Between two processes of a host."""
        return self._random.uniform(20e-6, 80e-6) * slowness

    def remote_s(self, size_bytes: int) -> float:
        """Between two hosts: mostly short, now and then long; 1 GB/s."""
        factor = self._random.random()
        return self._remote_s * (1.0 + self._spread * factor * factor * factor) + size_bytes * 1e-9

    def store_s(self) -> float:
        """One way between a node and the control store."""
        return self._random.uniform(0.0002, 0.002)
