"""What the kernel says of the machine's CPUs."""

from __future__ import annotations

import os
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_STAT = Path("/proc/stat")


def unused_cpu_s() -> float | None:
    """Seconds that the machine's CPUs, added up, have been idle since it was started; None if it does not say."""
    try:
        with _STAT.open() as file:
            words = file.readline().split()
        return (int(words[4]) + int(words[5])) / _TICKS_PER_S  # "cpu", user, nice, system, idle, iowait
    except (OSError, ValueError, IndexError):
        return None
