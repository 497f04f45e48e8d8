from __future__ import annotations

import pytest

from clusterpool.core.log_budget import BURST_BYTES, BYTES_PER_S, UNSENT_BYTES_MAX, LogBudget

MB = 1_000_000


@pytest.mark.parametrize(("unsent_bytes", "is_admitted"), [(0, True), (UNSENT_BYTES_MAX, True), (5 * MB, False)])
def test_a_driver_here_gets_lines_while_it_reads(unsent_bytes: int, is_admitted: bool) -> None:
    budget = LogBudget()
    assert budget.admit(10, 500, unsent_bytes, 100.0) is is_admitted
    assert budget.dropped == (0 if is_admitted else 10)


def test_dropped_lines_are_told_once() -> None:
    budget = LogBudget()
    for _ in range(3):
        budget.admit(1000, 500, 5 * MB, 100.0)
    assert budget.notice("/logs") == (
        "[3,000 lines of output are not shown, because this program did not read them in time; they are in /logs]"
    )
    assert budget.dropped == 0


def test_a_driver_elsewhere_gets_a_burst_and_then_so_much_a_second() -> None:
    budget = LogBudget()
    size_bytes = 256 * 1024
    assert sum(budget.admit(1, size_bytes, None, 100.0) for _ in range(1000)) == BURST_BYTES // size_bytes
    assert sum(budget.admit(1, size_bytes, None, 101.0) for _ in range(1000)) == BYTES_PER_S // size_bytes
    assert sum(budget.admit(1, size_bytes, None, 1000.0) for _ in range(1000)) == BURST_BYTES // size_bytes


def test_one_message_larger_than_the_burst_goes_when_there_is_nothing_else() -> None:
    budget = LogBudget()
    assert budget.admit(1, 10 * BURST_BYTES, None, 100.0)
    assert not budget.admit(1, 10, None, 100.0)
