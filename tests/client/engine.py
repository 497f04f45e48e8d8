"""What the engine's tests look at beside its public results: the tables of the driver and the store's figures."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import clusterpool
from clusterpool.client import current
from tests.waiting import HANGS_AFTER_S

MIB = 1024 * 1024


def wait_for(condition: Callable[[], Any], timeout_s: float = HANGS_AFTER_S) -> Any:
    """The first true value of `condition()`, or its last one when time is up."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := condition()) and time.monotonic() < deadline_s:
        time.sleep(0.005)
    return value


def objects_left() -> dict[str, Any]:
    """What this process still owns, borrows or waits for; empty lists when all was let go."""

    def look(machine: Any) -> dict[str, Any]:
        table = machine.objects.table
        return {
            "owned": [
                (number, record.local, record.pins, dict(record.borrowers)) for number, record in table.owned.items()
            ],
            "borrowed": [(key, record.local) for key, record in table.borrowed.items()],
            "tasks": sorted(machine.tasks),
            "arguments": sorted(machine.objects._arguments),
            "streams": sorted(machine.objects.streams),
        }

    left: dict[str, Any] = current.get().client.ask_machine(look)
    return left


def store_bytes() -> int:
    """Bytes of the arena in use, on all nodes."""
    return sum(node["store_used_bytes"] + node["spilled_bytes"] for node in clusterpool.nodes())


def check_nothing_left(timeout_s: float = 15.0) -> None:
    """Fails unless all objects go, here and in the store, within `timeout_s`."""

    def is_all_gone() -> bool:
        # Exceptions that a test has caught hold its frames, and those its references; and another thread may be about
        # to let go of the last of them, so it takes more than one look.
        gc.collect()
        return not any(objects_left().values()) and store_bytes() == 0

    wait_for(is_all_gone, timeout_s)
    assert not any(objects_left().values()), objects_left()
    assert store_bytes() == 0
