"""`clusterpool run`: a script runs as Python would run it, on the cluster, with `--patch` without any change."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.cli.commands import clusterpool_command


def run(folder: Path, text: str, *options: str, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the script on a private cluster of its own."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(text))
    return clusterpool_command("run", *options, "--address", "local", script, *arguments)


PATCHED = pytest.mark.parametrize("options", [(), ("--patch",)], ids=["plain", "patched"])


@PATCHED
def test_a_script_sees_what_python_would_show_it(tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "beside.py").write_text("NAME = 'beside'\n")
    text = """
        import os, sys
        import beside
        print(beside.NAME, __name__, __file__ == sys.argv[0], sys.argv[1:])
        print(os.path.samefile(sys.path[0], os.path.dirname(__file__)), sys.modules["__main__"].__dict__ is globals())
        print(os.environ["CLUSTERPOOL_ADDRESS"])
    """
    done = run(tmp_path, text, *options, arguments=("--json", "-v", "--", "x"))
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["beside __main__ True ['--json', '-v', '--', 'x']", "True True", "local"]


@PATCHED
@pytest.mark.parametrize(
    ("statement", "exit_code"),
    [("pass", 0), ("sys.exit(7)", 7), ("sys.exit('bye')", 1), ("1 / 0", 1), ("raise KeyboardInterrupt", 130)],
)
def test_the_exit_code_is_the_script_s(
    tmp_path: Path, options: tuple[str, ...], statement: str, exit_code: int
) -> None:
    done = run(tmp_path, f"import sys\n{statement}\n", *options)
    # A Python that was interrupted ends by the signal itself, which shells show as 130.
    assert done.returncode in ({exit_code, -2} if exit_code == 130 else {exit_code})


def test_a_traceback_of_the_script_has_no_frame_of_ours(tmp_path: Path) -> None:
    done = run(tmp_path, "def f():\n    raise ValueError('mine')\nf()\n", "--patch")
    lines = done.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "script.py" in lines[1] and lines[-1] == "ValueError: mine"
    assert "clusterpool" not in done.stderr.replace(str(tmp_path), "")


def test_an_error_of_ours_that_the_script_lets_pass_is_the_script_s(tmp_path: Path) -> None:
    done = run(tmp_path, "from clusterpool.errors import GetTimeout\nraise GetTimeout('late')\n", "--patch")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("clusterpool.errors.GetTimeout: late\n")


def test_pools_of_the_standard_library_run_on_the_cluster(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
        import multiprocessing, multiprocessing.pool, os, time
        from concurrent.futures import ProcessPoolExecutor
        from concurrent.futures.process import ProcessPoolExecutor as SameExecutor
        from multiprocessing import Pool, get_context
        from multiprocessing.pool import Pool as SamePool
        from joblib import Parallel, delayed

        def is_on_cluster(_=None):
            return "CLUSTERPOOL_NODE_ID" in os.environ

        assert Pool is SamePool and ProcessPoolExecutor is SameExecutor
        with Pool(2) as pool:
            print(pool.map(is_on_cluster, range(3)), isinstance(pool, multiprocessing.pool.Pool))
        for method in (None, "fork", "spawn", "forkserver"):
            with get_context(method).Pool(1, initializer=abs, initargs=(1,), maxtasksperchild=1) as pool:
                print(method, pool.apply(is_on_cluster))
        with multiprocessing.Pool(1) as pool:
            print(pool.apply(is_on_cluster))
        with ProcessPoolExecutor(2) as executor:
            print(list(executor.map(is_on_cluster, range(3))))
        print(Parallel(n_jobs=2)(delayed(is_on_cluster)() for _ in range(2)))
        """,
        "--patch",
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "[True, True, True] True",
        "None True",
        "fork True",
        "spawn True",
        "forkserver True",
        "True",
        "[True, True, True]",
        "[True, True]",
    ]


def test_the_rest_of_the_standard_library_stays_what_it_is(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
        import multiprocessing, os
        from concurrent.futures import ThreadPoolExecutor
        from multiprocessing.pool import ThreadPool
        from multiprocessing.shared_memory import SharedMemory
        from joblib import Parallel, delayed

        def is_here(_=None):
            return "CLUSTERPOOL_NODE_ID" not in os.environ

        def put(queue):
            queue.put(is_here())

        if __name__ == "__main__":
            with ThreadPool(2) as pool:
                print(pool.map(is_here, range(5)))
            with ThreadPoolExecutor(2) as executor:
                print(list(executor.map(is_here, range(2))))
            queue = multiprocessing.Queue()
            process = multiprocessing.Process(target=put, args=(queue,))
            process.start()
            print(queue.get(timeout=20))
            process.join()
            with multiprocessing.Manager() as manager:
                print(manager.dict(a=1), manager.Pool(1).apply(is_here))
            memory = SharedMemory(create=True, size=10)
            memory.close()
            memory.unlink()
            print(Parallel(n_jobs=2, prefer="threads")(delayed(is_here)() for _ in range(2)))
            print(Parallel(n_jobs=2, backend="multiprocessing")(delayed(is_here)() for _ in range(2)))
        """,
        "--patch",
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "[True, True, True, True, True]",
        "[True, True]",
        "True",
        "{'a': 1} True",
        "[True, True]",
        "[True, True]",
    ]


def test_workers_are_not_patched(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
        import multiprocessing

        def module_of_pool(_):
            return type(multiprocessing.get_context("spawn")).Pool.__module__

        if __name__ == "__main__":
            with multiprocessing.Pool(1) as pool:
                print(pool.apply(module_of_pool, (0,)))
        """,
        "--patch",
    )
    assert (done.stdout, done.stderr) == ("multiprocessing.context\n", "")


def test_the_patch_stays_in_the_process_that_asked_for_it() -> None:
    program = "import multiprocessing, clusterpool.cli.patch; print(multiprocessing.Pool.__module__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert done.stdout == "multiprocessing.context\n", done.stderr
