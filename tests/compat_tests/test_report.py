"""docs/compatibility.md names every public name, and is made of what is kept."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from compat_tests import kept, report
from compat_tests.outcomes import Share, Totals

MODULES = [
    "multiprocessing",
    "multiprocessing.connection",
    "multiprocessing.managers",
    "multiprocessing.pool",
    "multiprocessing.queues",
    "multiprocessing.shared_memory",
    "multiprocessing.sharedctypes",
    "multiprocessing.synchronize",
    "concurrent.futures",
]


@pytest.mark.parametrize("module", MODULES)
def test_table_has_every_public_name(module: str) -> None:
    named = {name for row in report.read_rows() if row.module == module for name in row.names}
    assert set(importlib.import_module(module).__all__) - named == set()


def test_no_name_stands_in_two_rows() -> None:
    names = [(row.module, name) for row in report.read_rows() for name in row.names]
    assert len(names) == len(set(names))


def test_every_class_of_the_table_is_in_a_baseline() -> None:
    named = {name for row in report.read_rows() for name in row.classes}
    known = set()
    for path in (kept.FOLDER / "baselines").glob("*.json"):
        known |= set(json.loads(path.read_text())["passed"])
    assert named - known == set()


def test_page_is_what_the_generator_makes() -> None:
    assert report.PAGE.read_text() == report.make_page(), "run ./dev compat report"


def test_counts_are_put_in(tmp_path: Path) -> None:
    share = Share(10, 9, ("WithProcessesTestQueue.test_put",))
    kept.write_result(
        "multiprocessing",
        "clusterpool.multiprocessing",
        Totals(passed=9, failed=1),
        share,
        by_class={"WithProcessesTestQueue": share},
        folder=tmp_path,
    )
    page = report.make_page(tmp_path)
    assert f"Python {kept.VERSION} |" in page
    assert "| 9 of 10 (90.0 %) |" in page
    queue_row = next(line for line in page.splitlines() if line.startswith("| `Queue`, `JoinableQueue`"))
    assert queue_row.endswith("| 9 of 10 |")


def test_partly_needs_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "names.toml"
    path.write_text('[[name]]\nsection = "futures"\nmodule = "m"\nnames = ["x"]\nverdict = "partly"\n')
    with pytest.raises(ValueError):
        report.read_rows(path)
