"""tests/ mirrors clusterpool/, beside the few folders of tests that belong to no one package."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
# contracts: one suite a port, on the fake and on the real thing; faults: kill -9 on real processes;
# cluster: several nodes on one machine; acceptance: the user's view of the whole; examples, benchmarks,
# compat_tests: the programs of those folders.
NAMED_FOLDERS = {"acceptance", "benchmarks", "cluster", "compat_tests", "contracts", "examples", "faults", "fuzz"}
NAMED_FOLDERS |= {"simulation", "tidy"}


def is_well_placed(path: PurePosixPath) -> bool:
    """`path` is that of a test file, relative to tests/."""
    folders = path.parts[:-1]
    if folders and folders[0] in NAMED_FOLDERS:
        return True
    if not folders:
        module = path.stem.removeprefix("test_")
        return (ROOT / "clusterpool" / f"{module}.py").is_file() or (ROOT / "clusterpool" / module).is_dir()
    return ROOT.joinpath("clusterpool", *folders).is_dir()


def test_every_test_file_mirrors_the_package_or_stands_in_a_named_folder() -> None:
    paths = [PurePosixPath(path.relative_to(ROOT / "tests")) for path in (ROOT / "tests").rglob("test_*.py")]
    assert paths
    assert [str(path) for path in paths if not is_well_placed(path)] == []


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("core/test_dispatch.py", True),
        ("faults/test_kill_node.py", True),
        ("test_errors.py", True),
        ("test_nothing_of_ours.py", False),
        ("helpers/test_dispatch.py", False),
    ],
)
def test_what_counts_as_well_placed(path: str, expected: bool) -> None:
    assert is_well_placed(PurePosixPath(path)) == expected
