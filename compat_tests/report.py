"""Makes docs/compatibility.md of the prose, the table of names and the counts of the last full runs.

`compatibility/page.md` holds the prose, with marks where something is put in:

    <!-- results -->           a table: suite by Python version
    <!-- expected -->          the tests that are not counted, and why
    <!-- names SECTION -->     a table: the names of `compatibility/names.toml`, with their tests
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compat_tests import kept
from compat_tests.expectations import Expectation, read_expectations, read_toml
from compat_tests.suites import SUITES

FOLDER = Path(__file__).parent / "compatibility"
PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
_HEADER = "<!-- Made by `./dev compat report` from compat_tests/compatibility/; change that. -->\n\n"
_MARK = re.compile(r"<!-- (results|expected|names (\w+)) -->")
_VERDICTS = ("yes", "partly", "no")
_SUITE_OF_SECTION = {"multiprocessing": "multiprocessing", "futures": "futures"}


@dataclass(frozen=True)
class Row:
    """One row of a table of names."""

    section: str
    module: str
    names: tuple[str, ...]
    verdict: str
    why: str = ""
    classes: tuple[str, ...] = ()


def read_rows(path: Path = FOLDER / "names.toml") -> list[Row]:
    """Raises: ValueError for a row that does not say what it must."""
    rows = []
    for entry in read_toml(path)["name"]:
        row = Row(
            entry["section"],
            entry["module"],
            tuple(entry["names"]),
            entry["verdict"],
            entry.get("why", ""),
            tuple(entry.get("classes", ())),
        )
        if row.verdict not in _VERDICTS or (row.verdict != "yes" and not row.why) or not row.names:
            raise ValueError(f"names.toml: {row.names} needs a verdict ({', '.join(_VERDICTS)}), and a why if not yes")
        rows.append(row)
    return rows


def make_page(folder: Path = kept.FOLDER) -> str:
    """`folder`: where the counts are kept."""
    rows = read_rows()
    results_by_suite = {suite: kept.read_results(suite, folder) for suite in SUITES}

    def replacement(match: re.Match[str]) -> str:
        if match[1] == "results":
            return _results_table(results_by_suite)
        if match[1] == "expected":
            return _expected_list(read_expectations())
        section = match[2]
        chosen = [row for row in rows if row.section == section]
        return _names_table(chosen, results_by_suite[_SUITE_OF_SECTION[section]])

    return _HEADER + _MARK.sub(replacement, (FOLDER / "page.md").read_text())


def _results_table(results_by_suite: dict[str, dict[str, dict[str, Any]]]) -> str:
    versions = sorted({version for results in results_by_suite.values() for version in results}, key=_numbers)
    lines = [
        f"| suite | {' | '.join(f'Python {version}' for version in versions)} |",
        "|---" * (len(versions) + 1) + "|",
    ]
    for name, results in results_by_suite.items():
        cells = [_result_cell(results.get(version)) for version in versions]
        lines.append(f"| {SUITES[name].description} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _result_cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return "not run"
    counted, passed = result["counted"], result["counted_passed"]
    percent = int(1000 * passed / counted) / 10 if counted else 0.0
    return f"{passed} of {counted} ({percent:.1f} %)"


def _names_table(rows: list[Row], results: dict[str, dict[str, Any]]) -> str:
    lines = ["| name | | | their tests |", "|---|---|---|---|"]
    for row in rows:
        names = ", ".join(f"`{_prefix(row.module)}{name}`" for name in row.names)
        lines.append(f"| {names} | {row.verdict} | {row.why} | {_tests_cell(row.classes, results)} |")
    return "\n".join(lines)


def _prefix(module: str) -> str:
    """What a name of a submodule is written with: `pool.ThreadPool`."""
    part = module.removeprefix("multiprocessing").removeprefix("concurrent.futures").removeprefix(".")
    return f"{part}." if part else ""


def _tests_cell(classes: Iterable[str], results: dict[str, dict[str, Any]]) -> str:
    by_version = {}
    for version, result in results.items():
        counts = [result["classes"][name] for name in classes if name in result["classes"]]
        if counts:
            passed, counted = (sum(column) for column in zip(*counts, strict=True))
            by_version[version] = f"{passed} of {counted}"
    if len(set(by_version.values())) <= 1:
        return next(iter(by_version.values()), "")
    return ", ".join(f"{version}: {text}" for version, text in by_version.items())


def _expected_list(expectations: list[Expectation]) -> str:
    tests_by_reason: dict[tuple[str, str], list[str]] = {}
    for one in expectations:
        versions = f" (Python {', '.join(one.versions)})" if one.versions else ""
        tests_by_reason.setdefault((one.kind, " ".join(one.reason.split())), []).append(f"`{one.test}`{versions}")
    lines = []
    for (kind, reason), tests in tests_by_reason.items():
        counted = " This one is counted as not passed." if kind == "differs" else ""
        lines.append(f"- {', '.join(tests)}: {reason}{counted}")
    return "\n".join(lines) or "- none"


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]
