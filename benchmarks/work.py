"""What the tasks and actors of the benchmarks do. Imports nothing heavy: idle workers are weighed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


def noop(_item: object = None) -> None:
    """A task that costs nothing, so that what is measured is the cost of having one."""


def process_id(_item: object = None) -> int:
    """Which worker ran this; the pause lets the other workers get one of these tasks too."""
    time.sleep(0.02)
    return os.getpid()


def hold(folder: str) -> None:
    """Keeps a worker busy for as long as the folder is there; a file in it tells of that."""
    mark = Path(folder, f"busy-{os.getpid()}")
    mark.touch()
    while mark.exists():
        time.sleep(0.01)


def fill_and_echo(there: Any, here: Any, items: int) -> None:
    """Puts `items` and a tenth more, then one for each that comes, until None comes."""
    for number in range(items + items // 10):
        there.put(number)
    while here.get() is not None:
        there.put(0)


class Counter:
    """The smallest actor."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, amount: int) -> int:
        """Adds `amount` and says what the total is now."""
        self.total += amount
        return self.total
