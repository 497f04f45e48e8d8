"""What runs leave for later ones: the tests that the reference passes, and the counts that go into the documentation.

One small file for each suite and Python version: `baselines/multiprocessing-3.11.json`, `results/...`.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compat_tests.events import NOT_INVOLVED, PASSED
from compat_tests.outcomes import Share, TestOutcome, Totals

FOLDER = Path(__file__).parent
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def baseline_of(outcomes: Iterable[TestOutcome]) -> frozenset[str]:
    """Tests that the reference passes, and that have something to do with it."""
    return frozenset(test.name for test in outcomes if test.outcome == PASSED and test.detail != NOT_INVOLVED)


def write_baseline(suite: str, names: frozenset[str], folder: Path = FOLDER) -> Path:
    tests_by_class: dict[str, list[str]] = {}
    for name in sorted(names):
        class_name, _, test = name.partition(".")
        tests_by_class.setdefault(class_name, []).append(test)
    return _write(folder / "baselines", suite, {"passed": tests_by_class})


def read_baseline(suite: str, folder: Path = FOLDER, version: str = VERSION) -> frozenset[str] | None:
    """None if none was kept for this Python version."""
    kept = _read(folder / "baselines", suite, version)
    if kept is None:
        return None
    return frozenset(f"{name}.{test}" for name, tests in kept["passed"].items() for test in tests)


def write_result(
    suite: str, subject: str, totals: Totals, share: Share, *, by_class: dict[str, Share], folder: Path = FOLDER
) -> Path:
    content = {
        "subject": subject,
        "passed": totals.passed,
        "failed": totals.failed,
        "skipped": totals.skipped,
        "expected": totals.expected,
        "hung": totals.hung,
        "counted": share.counted,
        "counted_passed": share.passed,
        "missing": list(share.missing),
        # How many passed, and of how many that count.
        "classes": {name: [one.passed, one.counted] for name, one in sorted(by_class.items()) if one.counted},
    }
    return _write(folder / "results", suite, content)


def read_results(suite: str, folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """By Python version, oldest first."""
    found = {}
    for path in (folder / "results").glob(f"{suite}-*.json"):
        found[path.stem.removeprefix(f"{suite}-")] = json.loads(path.read_text())
    return dict(sorted(found.items(), key=lambda item: [int(part) for part in item[0].split(".")]))


def _write(folder: Path, suite: str, content: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{suite}-{VERSION}.json"
    path.write_text(json.dumps({"python": platform.python_version(), **content}, indent=1) + "\n")
    return path


def _read(folder: Path, suite: str, version: str) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads((folder / f"{suite}-{version}.json").read_text())
    except FileNotFoundError:
        return None
    return content
