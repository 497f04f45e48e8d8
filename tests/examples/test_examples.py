"""Every program of docs/examples runs, gives the right answer, and prints nothing on standard error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(220)  # a program or two, each with some seconds of work on two CPUs

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
FOREST = ("forest.py", "--trees", "20")
WORDS = ("word_count.py", "--files", "40")


def run(program: str, *arguments: str, timeout_s: float = 100) -> str:
    """Standard output of the example, as a user starts it: by its path, from a folder of its own choosing."""
    process = subprocess.run(
        [sys.executable, EXAMPLES / program, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stderr == ""
    return process.stdout


def test_every_example_has_a_test_here() -> None:
    source = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in source] == []


@pytest.mark.parametrize("module", ["multiprocessing", "clusterpool.multiprocessing"])
def test_monte_carlo_pi(module: str) -> None:
    output = run("monte_carlo_pi.py", "--module", module, "--tasks", "16", "--points", "5000")
    # The seeds are fixed, so the digits are those of every backend and every machine.
    assert output == "pi is about 3.1463\n"


def test_word_count_gives_the_words_of_the_standard_executor() -> None:
    ours = run(*WORDS)
    assert ours == run(*WORDS, "--module", "concurrent.futures")
    assert len(ours.splitlines()) == 6


def test_forest_gives_the_scores_of_loky() -> None:
    assert run(*FOREST) == run(*FOREST, "--backend", "loky")


def test_task_graph() -> None:
    expected = sum(number * number for number in range(1000))
    output = run("task_graph.py", "--numbers", "1000", "--leaves", "7")
    assert output == f"the sum of the squares below 1,000 is {expected:,}\n"


def test_parameter_server_learns() -> None:
    output = run("parameter_server.py", "--steps", "20")
    accuracy = float(output.rpartition(":")[2])
    # All-benign, the best constant answer, is right in 63 % of the cases.
    assert accuracy > 0.95


@pytest.mark.parametrize("module", ["multiprocessing", "clusterpool.multiprocessing"])
def test_digits_neighbours(module: str) -> None:
    outcome = last_line("digits_neighbours.py", "--module", module, "--processes", "2")
    assert outcome["answer"] == "3 neighbours in norm 2: 1777 of 1797 digits"
    assert outcome["workers"] == 2


@pytest.mark.parametrize("backend", ["loky", "clusterpool"])
def test_digits_grid_search(backend: str) -> None:
    outcome = last_line("digits_grid_search.py", "--backend", backend, "--folds", "2")
    assert outcome["answer"].startswith("C=10, gamma=0.0005: accuracy 0.9")


def last_line(program: str, *arguments: str) -> dict[str, Any]:
    outcome: dict[str, Any] = json.loads(run(program, *arguments).splitlines()[-1])
    return outcome


@pytest.mark.timeout(400)
def test_main_job_finds_all_results_the_same() -> None:
    output = run("main_job.py", timeout_s=350)
    assert output.endswith("All results are the same.\n")
    assert output.count("the same") >= 2
