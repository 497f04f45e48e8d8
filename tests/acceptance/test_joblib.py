"""What a joblib backend must get right because others do not (lines 13 to 15 and 25 of that list)."""

from __future__ import annotations

import ast
import os
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from joblib import Parallel, delayed, parallel_config

import clusterpool
import clusterpool.joblib
from tests.waiting import pid_at_meeting

pytestmark = pytest.mark.usefixtures("cluster")

SECRET = 41


# 13


def test_n_jobs_counts_as_joblib_says(tmp_path: Path) -> None:
    with parallel_config(backend="clusterpool"):
        calls = [delayed(pid_at_meeting)(str(tmp_path), 3) for _ in range(30)]
        assert len(set(Parallel(n_jobs=3, batch_size=1)(calls))) == 3
        assert joblib.effective_n_jobs(-1) == 2, "the cluster's CPUs"
        assert joblib.effective_n_jobs(-2) == 1
        assert joblib.effective_n_jobs(5) == 5


@pytest.mark.parametrize("return_as", ["generator", "generator_unordered"])
def test_results_come_as_generators(return_as: str) -> None:
    with parallel_config(backend="clusterpool"):
        results = Parallel(n_jobs=2, return_as=return_as)(delayed(abs)(-number) for number in range(50))
        assert not isinstance(results, list)
        got = list(results)
    assert (got if return_as == "generator" else sorted(got)) == list(range(50))


def threads_max() -> str:
    return os.environ["OMP_NUM_THREADS"]


def test_inner_threads_are_limited() -> None:
    with parallel_config(backend="clusterpool", inner_max_num_threads=3):
        assert Parallel(n_jobs=2)(delayed(threads_max)() for _ in range(4)) == ["3"] * 4


def fail_or_sleep(number: int, folder: str) -> None:
    if number == 0:
        raise ZeroDivisionError("zero")
    time.sleep(0.3)
    Path(folder, str(number)).touch()


def test_an_error_stops_the_call_for_good(tmp_path: Path) -> None:
    with parallel_config(backend="clusterpool"):
        with pytest.raises(ZeroDivisionError):
            Parallel(n_jobs=2, batch_size=1)(delayed(fail_or_sleep)(number, str(tmp_path)) for number in range(40))
        written = len(os.listdir(tmp_path))
        assert Parallel(n_jobs=2)(delayed(abs)(-number) for number in range(4)) == [0, 1, 2, 3]
        time.sleep(0.5)  # what had not been stopped would go on writing
    assert len(os.listdir(tmp_path)) <= written + 2


def nested(number: int) -> list[int]:
    result: list[int] = Parallel(n_jobs=2)(delayed(abs)(-number - more) for more in range(3))
    return result


def test_calls_may_be_nested() -> None:
    with parallel_config(backend="clusterpool"):
        results = Parallel(n_jobs=2)(delayed(nested)(number) for number in range(4))
    assert results == [[number, number + 1, number + 2] for number in range(4)]


def test_a_killed_worker_raises_and_the_next_call_works() -> None:
    with parallel_config(backend="clusterpool"):
        with pytest.raises(BrokenProcessPool):
            Parallel(n_jobs=2)(delayed(os._exit)(3) for _ in range(4))
        assert Parallel(n_jobs=2)(delayed(abs)(-number) for number in range(4)) == [0, 1, 2, 3]


# 14


def test_workers_are_used_again(tmp_path: Path) -> None:
    with parallel_config(backend="clusterpool"):
        calls = [[delayed(pid_at_meeting)(str(tmp_path / name), 2) for _ in range(20)] for name in "ab"]
        first, second = (set(Parallel(n_jobs=2, batch_size=1)(each)) for each in calls)
    assert first == second


def total(array: Any) -> float:
    return float(array.sum())


def test_a_large_argument_is_stored_once() -> None:
    array = np.ones(25_000_000)  # 200 MB; the store of the tests holds about one and a half of it
    with parallel_config(backend="clusterpool"):
        for _ in range(2):
            assert Parallel(n_jobs=2)(delayed(total)(array) for _ in range(6)) == [25e6] * 6
    used = sum(node["store_used_bytes"] + node["spilled_bytes"] for node in clusterpool.nodes())
    assert used < 1.5 * array.nbytes


# 15


def test_only_public_names_of_joblib_are_imported_and_nothing_is_patched() -> None:
    folder = Path(clusterpool.joblib.__file__).parent
    found = []
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("joblib"):
                found += [part for part in (node.module or "").split(".") if part.startswith("_")]
                found += [name.name for name in node.names if name.name.startswith("_")]
            assert not (
                isinstance(node, ast.Assign)
                and any(ast.unparse(target).startswith("joblib.") for target in node.targets)
            )
    assert found == []


# 25


def backend_of_worker() -> tuple[str, list[int]]:
    with parallel_config(backend="clusterpool"):
        inner: list[int] = Parallel(n_jobs=2)(delayed(abs)(-number) for number in range(3))
    return "clusterpool", inner


def test_the_backend_is_known_by_name_in_workers() -> None:
    with parallel_config(backend="clusterpool"):
        assert Parallel(n_jobs=2)(delayed(backend_of_worker)() for _ in range(2)) == [("clusterpool", [0, 1, 2])] * 2
