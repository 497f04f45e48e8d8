"""Sums and percentages."""

from __future__ import annotations

from compat_tests.events import FAILED, HUNG, PASSED, SKIPPED
from compat_tests.outcomes import TestOutcome as Outcome
from compat_tests.outcomes import Totals, share_of, totals_of

OUTCOMES = [
    Outcome("A", "passes", PASSED),
    Outcome("A", "fails", FAILED),
    Outcome("A", "hangs", HUNG),
    Outcome("A", "cannot", FAILED),
    Outcome("A", "skips", SKIPPED),
]


def test_hang_is_a_failure_and_expected_failure_is_none() -> None:
    totals = totals_of(OUTCOMES, frozenset({"A.cannot"}))
    assert totals == Totals(passed=1, failed=2, skipped=1, expected=1, hung=1)
    assert str(totals) == "1 passed, 2 failed, 1 skipped, 1 xfailed"


def test_totals_without_expected_failures_read_as_pytest_writes_them() -> None:
    assert str(Totals(passed=3)) == "3 passed, 0 failed, 0 skipped"


def test_only_what_the_reference_passes_is_counted() -> None:
    baseline = frozenset({"A.passes", "A.hangs", "A.skips", "A.cannot", "A.not_run"})
    share = share_of(OUTCOMES, baseline, frozenset({"A.cannot"}))
    assert (share.counted, share.passed, share.missing) == (3, 1, ("A.hangs", "A.skips"))


def test_percentage_is_rounded_down() -> None:
    outcomes = [Outcome("A", str(number), PASSED if number < 1999 else FAILED) for number in range(2000)]
    share = share_of(outcomes, frozenset(outcome.name for outcome in outcomes), frozenset())
    assert str(share) == "1999 of 2000 (99.9 %)"
