"""A run of a suite: its classes one after the other or side by side, printed as they end, and the sums."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from compat_tests import kept
from compat_tests.events import HUNG
from compat_tests.expectations import Expectations, read_expectations
from compat_tests.outcomes import ClassOutcome, Share, TestOutcome, Totals, share_of, totals_of
from compat_tests.subject import Subject
from compat_tests.suites import Suite
from compat_tests.supervisor import Limits, Supervisor

Print = Callable[[str], None]
_SWEEP_LIMIT_S = 60.0


@dataclass(frozen=True)
class Request:
    """`only`: parts of class names, or `Class.test`; empty is all. `retries`: how often a failed test runs again."""

    suite: Suite
    subject: Subject
    only: tuple[str, ...] = ()
    jobs: int = 1
    limits: Limits = field(default_factory=Limits)
    retries: int = 0
    suite_folder: str = ""


@dataclass
class Report:
    """All that came out of a run, in the order of the suite."""

    request: Request
    classes: list[ClassOutcome]
    expected: frozenset[str]
    unexpected_passes: list[str]
    unused_expectations: list[str]
    share: Share | None
    share_by_class: dict[str, Share]

    @property
    def tests(self) -> list[TestOutcome]:
        return [test for one in self.classes for test in one.tests]

    @property
    def totals(self) -> Totals:
        return totals_of(self.tests, self.expected)

    @property
    def is_good(self) -> bool:
        return not (self.totals.failed or self.unexpected_passes or self.unused_expectations)


def run_suite(request: Request, say: Print, baseline: frozenset[str] | None) -> Report:
    """`baseline`: the tests that the reference passes, None if not known.

    Raises: SuiteMissing; ValueError if `only` fits no test.
    """
    everything = request.suite.tests_by_class(request.subject, request.suite_folder)
    chosen = _chosen(everything, request.only)
    if not chosen:
        raise ValueError(f"no class or test of {request.suite.name} fits {', '.join(request.only)}")
    names = [f"{_short(class_id)}.{test}" for class_id, tests in everything.items() for test in tests]
    expectations = Expectations(
        read_expectations() if request.subject.is_ours else [], request.suite.name, kept.VERSION
    )
    expected = expectations.expected_among(names)
    width = max(len(_short(class_id)) for class_id in chosen)
    classes: dict[str, ClassOutcome] = {}
    with tempfile.TemporaryDirectory(prefix="compat-", ignore_cleanup_errors=True) as folder:
        supervisor = Supervisor(
            request.suite.program,
            request.subject,
            request.limits,
            folder=Path(folder),
            suite_folder=request.suite_folder,
            expected=expected,
        )
        with ThreadPoolExecutor(request.jobs) as threads:
            running = {
                threads.submit(_run_class, supervisor, class_id, tests, expected, request.retries): class_id
                for class_id, tests in chosen.items()
            }
            for future in as_completed(running):
                outcome = classes[running[future]] = future.result()
                for line in class_lines(outcome, expected, width):
                    say(line)
        if request.subject.is_ours:
            _sweep(folder)
    in_order = [classes[class_id] for class_id in chosen]
    outcomes = [test for one in in_order for test in one.tests]
    not_counted = expectations.not_counted_among(names)
    return Report(
        request,
        in_order,
        expected,
        expectations.wrong(outcomes),
        expectations.unused(names),
        None if baseline is None else share_of(outcomes, baseline, not_counted),
        {one.class_name: share_of(one.tests, baseline or frozenset(), not_counted) for one in in_order},
    )


def _sweep(folder: str) -> None:
    """What was killed could not remove its shared memory; the next start would, if it knew of this folder."""
    environment = {**os.environ, "CLUSTERPOOL_TMPDIR": folder}
    code = "from clusterpool.processes.sweep import sweep_stale_sessions; sweep_stale_sessions()"
    subprocess.run([sys.executable, "-c", code], env=environment, check=False, timeout=_SWEEP_LIMIT_S)


def _run_class(
    supervisor: Supervisor, class_id: str, tests: list[str], expected: frozenset[str], retries: int
) -> ClassOutcome:
    outcome = supervisor.run(class_id, tests)
    for _ in range(retries):
        again = [
            test.test for test in outcome.tests if test.has_failed and test.name not in expected and test.test in tests
        ]
        if not again:
            break
        second = supervisor.run(class_id, again)
        outcome.seconds += second.seconds
        outcome.unsteady += [test.test for test in second.tests if not test.has_failed]
        better = {test.test: test for test in second.tests if not test.has_failed}
        outcome.tests = [better.get(test.test, test) for test in outcome.tests]
    return outcome


def _chosen(everything: dict[str, list[str]], only: tuple[str, ...]) -> dict[str, list[str]]:
    if not only:
        return everything
    chosen = {}
    for class_id, tests in everything.items():
        name = _short(class_id)
        fitting = [
            test
            for test in tests
            if any(part in name or part == f"{name}.{test}" or f"{name}.{test}".startswith(f"{part}[") for part in only)
        ]
        if fitting:
            chosen[class_id] = fitting
    return chosen


def _short(class_id: str) -> str:
    return class_id.rpartition(":")[2]


def class_lines(outcome: ClassOutcome, expected: frozenset[str], width: int) -> list[str]:
    """What is printed of a class: its counts, and a line for each test that failed."""
    totals = totals_of(outcome.tests, expected)
    lines = [
        f"{outcome.class_name:<{width}}  passed {totals.passed:3}  failed {totals.failed:3}  skipped {totals.skipped:3}"
        f"  expected {totals.expected:3}  {outcome.seconds:6.1f} s"
    ]
    for test in outcome.tests:
        if test.has_failed and test.name not in expected:
            word = "HUNG  " if test.outcome == HUNG else "FAILED"
            lines.append(f"    {word} {test.name}: {test.cause[:300]}")
    lines += [f"    unsteady: {outcome.class_name}.{test} passed when it was run again" for test in outcome.unsteady]
    lines += [f"    left behind, and killed: {command}" for command in outcome.leftovers]
    return lines


def closing_lines(report: Report, seconds: float) -> list[str]:
    lines = [""]
    if report.totals.hung:
        hung = [test.name for test in report.tests if test.outcome == HUNG and test.name not in report.expected]
        lines.append(f"hung: {', '.join(hung)}")
    lines += [f"{name} passes, but stands in expected_failures.toml" for name in report.unexpected_passes]
    lines += [
        f"{name} stands in expected_failures.toml, but there is no such test" for name in report.unused_expectations
    ]
    if report.share is not None:
        of_whom = report.request.suite.reference.name
        lines.append(f"of the tests that count (those that {of_whom} passes here), {report.share} pass")
    lines.append(
        f"{report.request.suite.name} on {report.request.subject.name}, Python {kept.VERSION}, {seconds:.0f} s:"
    )
    # On a line of its own, in the words of pytest.
    lines.append(str(report.totals))
    return lines
