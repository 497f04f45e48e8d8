"""The list of expected failures: what it covers, and that it is held to be true."""

from __future__ import annotations

from pathlib import Path

import pytest

from compat_tests.events import FAILED, PASSED
from compat_tests.expectations import Expectation, Expectations, read_expectations
from compat_tests.outcomes import TestOutcome as Outcome

REASON = "it reads a private attribute of the standard class"


def entry(test: str, kind: str = "private", versions: tuple[str, ...] = ()) -> Expectation:
    return Expectation("multiprocessing", test, kind, REASON, versions)


def test_star_covers_what_begins_so() -> None:
    found = Expectations([entry("TestPool.test_x*")], "multiprocessing", "3.11")
    assert found.expected_among(["TestPool.test_x", "TestPool.test_xy", "TestPool.test_y"]) == {
        "TestPool.test_x",
        "TestPool.test_xy",
    }


def test_entry_of_another_suite_or_version_does_not_count() -> None:
    entries = [entry("TestPool.test_x", versions=("3.10",))]
    assert not Expectations(entries, "multiprocessing", "3.11").expected_among(["TestPool.test_x"])
    assert not Expectations(entries, "futures", "3.10").expected_among(["TestPool.test_x"])
    assert Expectations(entries, "multiprocessing", "3.10").expected_among(["TestPool.test_x"])


def test_public_difference_is_expected_but_counted() -> None:
    found = Expectations([entry("TestPool.test_x", "differs")], "multiprocessing", "3.11")
    assert found.expected_among(["TestPool.test_x"])
    assert not found.not_counted_among(["TestPool.test_x"])


def test_unsteady_test_may_pass_and_is_not_counted() -> None:
    found = Expectations([entry("TestPool.test_x", "unsteady")], "multiprocessing", "3.11")
    assert found.wrong([Outcome("TestPool", "test_x", PASSED)]) == []
    assert found.not_counted_among(["TestPool.test_x"])


def test_listed_test_that_passes_is_wrong_and_misspelt_one_unused() -> None:
    found = Expectations([entry("TestPool.test_x"), entry("TestPool.test_z")], "multiprocessing", "3.11")
    outcomes = [Outcome("TestPool", "test_x", PASSED), Outcome("TestPool", "test_y", FAILED)]
    assert found.wrong(outcomes) == ["TestPool.test_x"]
    assert found.unused(outcome.name for outcome in outcomes) == ["TestPool.test_z"]


@pytest.mark.parametrize(
    "text",
    [
        '[[expected]]\nsuite = "multiprocessing"\ntests = ["A.b"]\nkind = "private"\n',
        '[[expected]]\nsuite = "multiprocessing"\ntests = ["A.b"]\nkind = "flaky"\nreason = "it fails at times here"\n',
        '[[expected]]\nsuite = "unknown"\ntests = ["A.b"]\nkind = "private"\nreason = "it reads a private name"\n',
    ],
)
def test_entry_without_kind_or_reason_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "expected.toml"
    path.write_text(text)
    with pytest.raises(ValueError):
        read_expectations(path)


def test_the_list_itself_can_be_read() -> None:
    assert isinstance(read_expectations(), list)
