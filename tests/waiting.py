"""How tests wait for what happens in other threads and processes: for a condition with a deadline, never for time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# A hang is what this catches: far more than anything takes, on a machine that does much else.
HANGS_AFTER_S = 30.0


def wait_for(
    condition: Callable[[], T],
    what: str = "the condition comes true",
    within_s: float = HANGS_AFTER_S,
    *,
    period_s: float = 0.005,
) -> T:
    """The first true value of `condition()`; fails after `within_s`."""
    started_s = time.monotonic()
    while not (value := condition()):
        assert time.monotonic() - started_s < within_s, f"not within {within_s:g} s: {what}"
        time.sleep(period_s)
    return value


def pid_at_meeting(folder: Path | str, count: int) -> int:
    """The number of this process, when so many processes have come to the folder: one that starts late takes part."""
    os.makedirs(folder, exist_ok=True)
    Path(folder, str(os.getpid())).touch()
    wait_for(lambda: len(os.listdir(folder)) >= count, f"{count} processes take part")
    return os.getpid()


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that was killed and not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
