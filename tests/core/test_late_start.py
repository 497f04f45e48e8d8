"""When an embedded cluster starts its control store."""

from __future__ import annotations

import pytest

from clusterpool.core.late_start import DELAY_MAX_S, LateStart


@pytest.mark.parametrize(
    ("looks", "due_s"),
    [
        ([(0.5, 1.0), (1.0, 2.0), (1.5, 3.0)], 1.0),  # two idle CPUs: at once, but not before the first tasks
        ([(0.5, 1.0), (1.0, 1.1), (1.5, 1.2), (2.0, 1.4), (2.5, 2.0)], 2.5),  # busy, then a CPU to spare
        ([(0.5 * n, 0.0) for n in range(1, 20)], DELAY_MAX_S),  # never idle
        ([(0.5, None), (1.0, None)], 1.0),  # nobody knows
    ],
)
def test_it_waits_for_a_cpu_to_spare(looks: list[tuple[float, float | None]], due_s: float) -> None:
    start = LateStart(100.0)
    due = [now_s for now_s, unused_s in looks if start.is_due(unused_s, 100.0 + now_s)]
    assert due[0] == due_s


def test_a_look_that_came_late_counts_for_the_time_that_it_covers() -> None:
    start = LateStart(0.0)
    assert not start.is_due(0.0, 0.5)
    assert not start.is_due(0.6, 2.5)  # 0.6 s of two seconds
    assert start.is_due(1.0, 3.0)
