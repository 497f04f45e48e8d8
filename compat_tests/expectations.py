"""The list of tests that cannot pass (`expected_failures.toml`), and whether a run agrees with it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compat_tests.events import PASSED
from compat_tests.outcomes import TestOutcome
from compat_tests.suites import SUITES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).parent / "expected_failures.toml"
# Of these kinds a test says nothing about what a program can see; see the head of the file.
_NOT_COUNTED_KINDS = ("private", "inheritance", "unsteady")
_KINDS = (*_NOT_COUNTED_KINDS, "differs")
_MAY_PASS_KIND = "unsteady"
_REASON_MIN = 20


@dataclass(frozen=True)
class Expectation:
    """One test, or with a `*` at its end several, that cannot pass."""

    suite: str
    test: str
    kind: str
    reason: str
    versions: tuple[str, ...] = ()

    def covers(self, test: str) -> bool:
        return test.startswith(self.test[:-1]) if self.test.endswith("*") else test == self.test


class Expectations:
    """Those for one suite and one Python version ("3.11")."""

    def __init__(self, expectations: Iterable[Expectation], suite: str, version: str) -> None:
        self._expectations = [
            expectation
            for expectation in expectations
            if expectation.suite == suite and (not expectation.versions or version in expectation.versions)
        ]

    def expected_among(self, tests: Iterable[str]) -> frozenset[str]:
        return frozenset(test for test in tests if any(one.covers(test) for one in self._expectations))

    def not_counted_among(self, tests: Iterable[str]) -> frozenset[str]:
        kinds = [one for one in self._expectations if one.kind in _NOT_COUNTED_KINDS]
        return frozenset(test for test in tests if any(one.covers(test) for one in kinds))

    def wrong(self, outcomes: Iterable[TestOutcome]) -> list[str]:
        """The listed tests that passed after all, and may not."""
        passed = [outcome.name for outcome in outcomes if outcome.outcome == PASSED]
        listed = [one for one in self._expectations if one.kind != _MAY_PASS_KIND]
        return sorted(test for test in passed if any(one.covers(test) for one in listed))

    def unused(self, tests: Iterable[str]) -> list[str]:
        """Entries that name no test of the suite: misspelt, or of a suite that has changed."""
        names = list(tests)
        return [one.test for one in self._expectations if not any(one.covers(name) for name in names)]


def read_expectations(path: Path = FILE) -> list[Expectation]:
    """Raises: ValueError for an entry without what it must have."""
    found = []
    for entry in read_toml(path).get("expected", []):
        found += _expectations_in(entry)
    return found


def read_toml(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = tomllib.loads(path.read_text())
    return content


def _expectations_in(entry: dict[str, Any]) -> list[Expectation]:
    unknown = set(entry) - {"suite", "tests", "kind", "reason", "versions"}
    if unknown or entry.get("suite") not in SUITES or entry.get("kind") not in _KINDS or not entry.get("tests"):
        raise ValueError(f"expected_failures.toml: an entry needs suite, tests, kind ({', '.join(_KINDS)}): {entry}")
    if len(entry.get("reason", "")) < _REASON_MIN:
        raise ValueError(f"expected_failures.toml: say why {entry['tests']} cannot pass")
    return [
        Expectation(entry["suite"], test, entry["kind"], entry["reason"], tuple(entry.get("versions", ())))
        for test in entry["tests"]
    ]
