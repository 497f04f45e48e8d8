"""The programs of docs/examples/unchanged, which know of the standard library only, print the same on three nodes.

Each is run by Python alone, under `clusterpool run --patch`, and as a copy in which the import is ours.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.clusters import Cluster, started_cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(220)]
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples" / "unchanged"
IMPORT = re.compile(r"^(from|import) multiprocessing\b", re.MULTILINE)
ALL_IMPORTING_MULTIPROCESSING = (
    "custom_manager.py",
    "deap_one_max.py",
    "emcee_line_fit.py",
    "joinable_workers.py",
    "pool_features.py",
    "producers_consumers.py",
    "scipy_evolution.py",
    "shared_structures.py",
)
ALL = (*ALL_IMPORTING_MULTIPROCESSING, "tqdm_process_map.py")

_standard_output_by_program: dict[str, str] = {}


@pytest.fixture(scope="module")
def three_nodes(run_of_tests: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A recorded cluster of three nodes: what programs use that say nothing else."""
    with started_cluster(tmp_path_factory.mktemp("cluster"), run_of_tests) as cluster:
        yield cluster


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_patched(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "clusterpool.cli", "run", "--patch", EXAMPLES / program, *arguments)


def standard_output(program: str) -> str:
    if program not in _standard_output_by_program:
        _standard_output_by_program[program] = run(EXAMPLES / program).stdout
    return _standard_output_by_program[program]


def with_our_import(program: str, folder: Path) -> Path:
    """A copy of the program in which its import lines alone are changed."""
    text = (EXAMPLES / program).read_text()
    changed = re.sub(
        r"^import multiprocessing$", "import clusterpool.multiprocessing as multiprocessing", text, flags=re.M
    )
    changed = re.sub(r"^from multiprocessing\b", "from clusterpool.multiprocessing", changed, flags=re.M)
    assert changed != text and not IMPORT.search(changed)
    copy = folder / program
    copy.write_text(changed)
    return copy


def test_every_program_is_run_here_and_none_knows_of_clusterpool() -> None:
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(ALL)
    for path in EXAMPLES.glob("*.py"):
        imports = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        assert not any("clusterpool" in ast.unparse(node) for node in imports)


@pytest.mark.parametrize("program", ALL)
def test_patched_program_prints_what_the_standard_library_s_does(program: str, three_nodes: Cluster) -> None:
    done = run_patched(program)
    assert done.stdout == standard_output(program)
    if program != "tqdm_process_map.py":
        assert done.stderr == ""


@pytest.mark.parametrize("program", ALL_IMPORTING_MULTIPROCESSING)
def test_program_with_our_import_prints_the_same(program: str, three_nodes: Cluster, tmp_path: Path) -> None:
    done = run(with_our_import(program, tmp_path))
    assert done.stdout == standard_output(program)
    assert done.stderr == ""


def test_processes_of_the_producers_and_consumers_run_on_all_three_nodes(three_nodes: Cluster) -> None:
    *lines, places = run_patched("producers_consumers.py", "--places").stdout.splitlines()
    assert lines == standard_output("producers_consumers.py").splitlines()
    count_by_node = ast.literal_eval(places.removeprefix("places: "))
    assert set(count_by_node) == three_nodes.node_ids
    assert sum(count_by_node.values()) == 6


def test_bar_of_process_map_counts_and_its_workers_write_beside_it(three_nodes: Cluster) -> None:
    bars = run_patched("tqdm_process_map.py").stderr
    assert "3/3" in bars
    assert all(line in bars for line in ("27: 111 steps", "97: 118 steps", "871: 178 steps"))
