"""Nothing in the checkout depends on the machine or the package index of whoever wrote it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUFFIXES = {".py", ".md", ".toml", ".cfg", ".ini", ".yaml", ".yml", ".json", ".sh", ".txt", ""}
SKIPPED_FOLDERS = {".git", ".venv", "__pycache__", "node_modules", "LICENSES"}
SKIPPED_FOLDERS |= {f".{tool}_cache" for tool in ("mypy", "pytest", "ruff", "import_linter")} | {".hypothesis"}
# Written in pieces, so that this file does not find itself.
REGISTRY_HOSTS = (
    "pypi" + ".org",
    "python" + "hosted",
    "anaconda" + ".org",
    "repo.anaconda" + ".com",
    "npmjs" + ".org",
)
HOME_FOLDERS = ("root", "work", "home", "Users")
# A path may follow a quote, a space or an equals sign; after a letter or a brace it is part of a longer one.
MACHINE_PATH = re.compile(r"(?<![\w.})\]~/*:-])/(?:" + "|".join(HOME_FOLDERS) + r")/\w")


def text_files() -> list[Path]:
    return sorted(
        path
        for path in ROOT.rglob("*")
        if path.suffix in SUFFIXES and path.is_file() and not SKIPPED_FOLDERS.intersection(path.relative_to(ROOT).parts)
    )


def forbidden_in(text: str) -> list[str]:
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        found += [f"line {number}: names the host {host}" for host in REGISTRY_HOSTS if host in line]
        if match := MACHINE_PATH.search(line):
            found.append(f"line {number}: a path of one machine: {line[match.start() :][:60]}")
    return found


def test_no_file_names_a_registry_host_or_a_path_of_one_machine() -> None:
    complaints = [
        f"{path.relative_to(ROOT)}: {complaint}"
        for path in text_files()
        for complaint in forbidden_in(path.read_text(errors="replace"))
    ]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    ("line", "is_forbidden"),
    [
        ("open('/" + "root/data.csv')", True),
        ("cd /" + "work/main", True),
        ("PATH=/" + "home/ann/bin", True),
        ("https://" + "pypi" + ".org/simple", True),
        ("see docs/work/plan.md", False),
        ("{folder}/work/plan", False),
        ("/usr/bin/env python3", False),
    ],
)
def test_what_counts_as_forbidden(line: str, is_forbidden: bool) -> None:
    assert bool(forbidden_in(line)) == is_forbidden
