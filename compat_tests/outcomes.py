"""What came of the tests of a class and of a suite, and the sums over them. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from compat_tests.events import FAILED, HUNG, PASSED, SKIPPED


@dataclass(frozen=True)
class TestOutcome:
    """`class_name` and `test` without the module: together they name a test the same on every Python version."""

    class_name: str
    test: str
    outcome: str
    detail: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.class_name}.{self.test}"

    @property
    def has_failed(self) -> bool:
        return self.outcome in (FAILED, HUNG)

    @property
    def cause(self) -> str:
        """The last line of the traceback."""
        lines = [line.strip() for line in self.detail.splitlines() if line.strip()]
        return lines[-1] if lines else ""


@dataclass
class ClassOutcome:
    """All tests of one class, in the order in which they ran."""

    class_name: str
    tests: list[TestOutcome] = field(default_factory=list)
    seconds: float = 0.0
    # Command lines of processes that were alive after the class's process had ended, and had to be killed.
    leftovers: list[str] = field(default_factory=list)
    # Tests that failed first and passed when they were run again.
    unsteady: list[str] = field(default_factory=list)

    def add(self, test: str, outcome: str, detail: str = "", seconds: float = 0.0) -> None:
        self.tests.append(TestOutcome(self.class_name, test, outcome, detail, seconds))


@dataclass(frozen=True)
class Totals:
    """`expected`: failures that are on the list; they are not among `failed`. `hung`: those of `failed` that hung."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    expected: int = 0
    hung: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.passed + other.passed,
            self.failed + other.failed,
            self.skipped + other.skipped,
            self.expected + other.expected,
            self.hung + other.hung,
        )

    def __str__(self) -> str:
        """As pytest ends its runs, so that whoever reads those can read this."""
        text = f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        return f"{text}, {self.expected} xfailed" if self.expected else text


def totals_of(tests: Iterable[TestOutcome], expected: frozenset[str]) -> Totals:
    """`expected`: names of the tests that are listed as unable to pass."""
    totals = Totals()
    for test in tests:
        if test.has_failed:
            is_expected = test.name in expected
            is_hung = test.outcome == HUNG and not is_expected
            totals += Totals(failed=not is_expected, expected=is_expected, hung=is_hung)
        else:
            totals += Totals(passed=test.outcome == PASSED, skipped=test.outcome == SKIPPED)
    return totals


@dataclass(frozen=True)
class Share:
    """How many of the tests that count have passed: those that the reference passes, less those that look inside it."""

    counted: int
    passed: int
    missing: tuple[str, ...] = ()

    @property
    def percent(self) -> float:
        return 100.0 * self.passed / self.counted if self.counted else 0.0

    def __str__(self) -> str:
        # Rounded down, so that a bar that is reached in print is reached.
        return f"{self.passed} of {self.counted} ({int(self.percent * 10) / 10:.1f} %)"


def share_of(tests: Iterable[TestOutcome], baseline: frozenset[str], not_counted: frozenset[str]) -> Share:
    """Only tests that were run are counted, so that a part of a suite has a share as well."""
    counted = [test for test in tests if test.name in baseline and test.name not in not_counted]
    missing = tuple(test.name for test in counted if test.outcome != PASSED)
    return Share(len(counted), len(counted) - len(missing), missing)
