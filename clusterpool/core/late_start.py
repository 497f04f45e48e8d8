"""When an embedded cluster starts its control store, which its first tasks do not need. Pure.

Server and client take a fifth of a second of CPU to start. On a small machine that is the user's: a program that has
just begun to compute would do so at half speed meanwhile.
"""

from __future__ import annotations

# Sooner, and it would fall between the start of the cluster and the first tasks, when the machine looks idle.
DELAY_S = 0.9
# A machine that is never idle: to wait longer would gain little, some per cent of what has been computed by then.
DELAY_MAX_S = 5.0
# So much of a CPU unused over the last look: the start then takes nothing from anybody.
SPARE_CPUS = 0.5


class LateStart:
    """Waits for a moment at which the machine has a CPU to spare."""

    def __init__(self, now_s: float) -> None:
        self._started_s = now_s
        self._looked_s = now_s
        self._unused_s: float | None = None

    def is_due(self, unused_s: float | None, now_s: float) -> bool:
        """Asked now and then. `unused_s`: what all CPUs together have been idle, ever; None where nobody knows."""
        before_s, elapsed_s = self._unused_s, now_s - self._looked_s
        self._unused_s, self._looked_s = unused_s, now_s
        if now_s - self._started_s < DELAY_S:
            return False
        if now_s - self._started_s >= DELAY_MAX_S or unused_s is None:
            return True
        return before_s is not None and unused_s - before_s >= SPARE_CPUS * elapsed_s
