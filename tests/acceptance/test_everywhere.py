"""What holds for all facades (lines 16 to 18, 20, 24 and 26 of the list of what others get wrong)."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clusterpool
import clusterpool.multiprocessing as mp


def program(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Run a script as a user would."""
    script = folder / "program.py"
    script.write_text(textwrap.dedent(text))
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=50, cwd=folder)


# 16


def double_in_place(array: Any) -> Any:
    array *= 2
    return array


@pytest.mark.parametrize("items", [10, 1_000_000])
def test_arrays_are_writable_on_both_sides_and_shared_with_nobody(cluster: None, items: int) -> None:
    array = np.ones(items)
    with mp.Pool(2) as pool:
        results = pool.map(double_in_place, [array] * 4, chunksize=1)
    assert array.sum() == items, "the caller's own is unchanged"
    for result in results:
        assert result.sum() == 2 * items, "no task saw what another one wrote"
        result[0] = 7.0
    assert [result[0] for result in results] == [7.0] * 4


# 17


def test_main_functions_lambdas_closures_classes_and_globals_work_without_a_guard(tmp_path: Path) -> None:
    done = program(
        tmp_path,
        """
        from clusterpool.multiprocessing import Pool

        offset = 0

        class Point:
            def __init__(self, x):
                self.x = x

        def set_up(value):
            global offset
            offset = value

        def moved(point):
            return Point(point.x + offset)

        def adder(number):
            return lambda value: value + number

        with Pool(2, set_up, (10,)) as pool:
            print([point.x for point in pool.map(moved, [Point(1), Point(2)])])
            print(pool.map(adder(5), [1, 2]), pool.map(lambda value: value * 2, [1, 2]))
            print(isinstance(pool.apply(moved, (Point(1),)), Point))
        """,
    )
    assert done.stdout.splitlines() == ["[11, 12]", "[6, 7] [2, 4]", "True"], done.stderr
    assert done.stderr == ""  # 26: nothing of ours in a clean run


# 18


def test_a_module_that_a_worker_lacks_is_named(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").write_text("def f(x):\n    return x\n")
    with mp.Pool(1) as pool:
        monkeypatch.syspath_prepend(str(tmp_path))
        import only_here  # type: ignore[import-not-found]

        with pytest.raises(clusterpool.errors.VersionMismatch) as caught:
            pool.apply_async(only_here.f, (1,)).get(20)
    for part in ("only_here", clusterpool.nodes()[0]["node_id"], "Python 3."):
        assert part in str(caught.value)


# 20


def test_results_of_all_kinds_can_be_awaited(cluster: None) -> None:
    import asyncio

    @clusterpool.remote
    def five() -> int:
        return 5

    async def main() -> list[int]:
        with mp.Pool(1) as pool:
            return [await pool.apply_async(abs, (-4,)), await five.remote()]

    assert asyncio.run(main()) == [4, 5]


# 24


def use_proxy(proxy: Any) -> int:
    proxy.append(5)
    return len(proxy)


def test_proxies_of_the_standard_manager_work_in_workers(cluster: None) -> None:
    import multiprocessing

    with multiprocessing.get_context("spawn").Manager() as manager, mp.Pool(1) as pool:
        shared = manager.list([1])
        assert pool.apply_async(use_proxy, (shared,)).get(20) == 2
        assert list(shared) == [1, 5]


# 26


def test_what_workers_print_reaches_standard_output_and_nothing_standard_error(tmp_path: Path) -> None:
    done = program(
        tmp_path,
        """
        from clusterpool.multiprocessing import Pool

        with Pool(2) as pool:
            pool.map(lambda number: print("line", number), range(4), chunksize=1)
        """,
    )
    lines = sorted(line.rpartition(") ")[2] for line in done.stdout.splitlines())
    assert lines == [f"line {number}" for number in range(4)]
    assert done.stderr == ""


def test_a_clean_run_warns_of_nothing(cluster: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with mp.Pool(2) as pool:
            assert pool.map(abs, range(10)) == list(range(10))
            pool.close()
            pool.join()
