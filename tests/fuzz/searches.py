"""How long to search: `./dev fuzz 100` searches a hundred times as long as CI does, and with other seeds each time."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

FACTOR = int(os.environ.get("CLUSTERPOOL_FUZZ", "1"))


def search(examples: int, *, steps: int = 50) -> settings:
    """The settings of a test by hypothesis."""
    return settings(
        max_examples=examples * FACTOR,
        stateful_step_count=steps,
        deadline=None,
        derandomize=FACTOR == 1,
        suppress_health_check=list(HealthCheck),
    )


def seeds(count: int) -> list[str]:
    """The seeds of a test by `random.Random`; a failure names its own, and `CLUSTERPOOL_FUZZ_SEED` repeats it."""
    repeated = os.environ.get("CLUSTERPOOL_FUZZ_SEED")
    if repeated:
        return [repeated]
    start = "" if FACTOR == 1 else os.urandom(4).hex() + "-"
    return [f"{start}{number}" for number in range(count * FACTOR)]
