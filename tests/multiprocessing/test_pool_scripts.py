"""Whole programs that use `Pool`, run as scripts: `__main__`, its globals, the end of the interpreter."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest


def run_script(folder: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(text))
    return subprocess.run(
        [sys.executable, *options, str(script)], capture_output=True, text=True, timeout=50, cwd=folder
    )


def test_main_functions_and_no_main_guard(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        from clusterpool.multiprocessing import Pool

        class Point:
            def __init__(self, x):
                self.x = x

        def move(point):
            return Point(point.x + 1)

        with Pool(2) as pool:
            points = pool.map(move, [Point(x) for x in range(5)])
            print([type(point) is Point and point.x for point in points])
            print(pool.map(lambda x: -x, range(3)))
        """,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["[1, 2, 3, 4, 5]", "[0, -1, -2]"]
    assert done.returncode == 0


def test_globals_that_the_initializer_sets_in_main_are_seen_by_all_functions(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        from clusterpool.multiprocessing import Pool

        model = None
        calls = 0

        def load(name):
            global model
            model = name.upper()

        def count(_):
            global calls
            calls += 1
            return calls

        def predict(x):
            return helper(x), calls > 0

        def helper(x):
            return model + str(x)

        if __name__ == "__main__":
            with Pool(1, initializer=load, initargs=("m",)) as pool:
                print(pool.map(count, range(3), chunksize=1))
                print(pool.map(predict, range(2)))
            print(model, calls)
        """,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["[1, 2, 3]", "[('M0', True), ('M1', True)]", "None 0"]


def test_globals_of_main_are_seen_by_tasks(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        import math
        from clusterpool.multiprocessing import Pool

        FACTOR = 3
        table = {1: "one", 2: "two"}

        def use(x):
            return table.get(x), math.floor(x * FACTOR)

        if __name__ == "__main__":
            pool = Pool(2)
            print(pool.map(use, [1, 2]))
            pool.close()
            pool.join()
        """,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["[('one', 3), ('two', 6)]"]


def test_large_globals_that_were_changed_in_place_are_seen_by_new_workers(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        import joblib

        import clusterpool
        import clusterpool.multiprocessing as mp

        weights = [0] * 100_000

        def first(_):
            return weights[0]

        def put_first(queue):
            queue.put(first(None))

        queue = mp.Queue()
        for step in range(3):
            weights[0] = step
            with mp.Pool(1) as pool:
                seen = pool.map(first, [None])
            with clusterpool.Executor(1) as executor:
                seen.append(executor.submit(first, None).result())
            with joblib.parallel_config(backend="clusterpool"):
                seen += joblib.Parallel(n_jobs=2)(joblib.delayed(first)(None) for _ in range(2))
            process = mp.Process(target=put_first, args=(queue,))
            process.start()
            seen.append(queue.get())
            process.join()
            print(seen)
        """,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["[0, 0, 0, 0, 0]", "[1, 1, 1, 1, 1]", "[2, 2, 2, 2, 2]"]


@pytest.mark.parametrize("options", [[], ["-W", "error"]])
def test_program_that_forgets_its_pool_ends_quietly(tmp_path: Path, options: list[str]) -> None:
    done = run_script(
        tmp_path,
        """
        import warnings
        warnings.simplefilter("ignore", ResourceWarning)
        from clusterpool.multiprocessing import Pool

        class Holder:
            def __init__(self):
                self.pool = Pool(processes=1)

        holder = Holder()
        print(holder.pool.map(float, tuple(range(3))))
        """,
        *options,
    )
    assert done.stderr == ""
    assert done.stdout == "[0.0, 1.0, 2.0]\n"
    assert done.returncode == 0


def test_program_that_ends_while_an_endless_imap_runs(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        import itertools
        from clusterpool.multiprocessing import Pool

        pool = Pool(2)
        results = pool.imap(abs, itertools.count())
        print(next(results), next(results))
        """,
    )
    assert done.returncode == 0
    assert done.stdout == "0 1\n"
    assert done.stderr == ""


def test_error_at_the_top_of_a_program_shows_the_remote_traceback(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        from clusterpool.multiprocessing import Pool

        def divide(x):
            return 1 / x  # this line is shown

        with Pool(2) as pool:
            pool.map(divide, [1, 0])
        """,
    )
    assert done.returncode == 1
    assert "this line is shown" in done.stderr
    assert "ZeroDivisionError: division by zero" in done.stderr


def test_what_cannot_be_pickled_in_main_is_in_nobodys_way(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        import logging
        import threading
        from clusterpool.multiprocessing import Pool

        lock = threading.Lock()
        log = logging.getLogger("script")
        stream = open("out.txt", "w")

        class Job:
            lock = threading.RLock()
            pool = None

            @staticmethod
            def increased(x):
                return x + 1

            def doubled(self, x):
                with self.lock:
                    return 2 * x

        def locked(x):
            with lock:
                log.info("seen only where logging is set up")
                return x

        def uses_stream(x):
            stream.write(str(x))

        def needs_pool(x):
            return x if pool is not None else -1

        pool = Job.pool = Pool(2)
        print(pool.map(locked, [1, 2]), pool.map(Job.increased, [1, 2]), pool.map(Job().doubled, [1, 2]))
        print(pool.map(needs_pool, [1, 2]))
        try:
            pool.apply(uses_stream, (1,))
        except TypeError as error:
            print(error)
        pool.close()
        pool.join()
        stream.close()
        """,
        "-W",
        "error",
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[:2] == ["[1, 2] [2, 3] [2, 4]", "[1, 2]"]
    assert "the global 'stream' of __main__ is not in this worker" in lines[2]


def test_what_workers_print_comes_with_a_prefix(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        import sys
        from clusterpool.multiprocessing import Pool

        def speak(x):
            print("number", x)
            print("no end", x, end="")
            sys.stdout.flush()
            return x

        with Pool(1) as pool:
            pool.map(speak, range(2))
            pool.close()
            pool.join()
        """,
        "-W",
        "error",
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert all(re.match(r"\(\S+ pid=\d+, node=n[0-9a-f]{10}\) ", line) for line in lines), lines
    assert [line.partition(") ")[2] for line in lines] == ["number 0", "no end 0number 1", "no end 1"]


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("call", ["pool.map(nap, range(9), 1)", "list(pool.imap(nap, range(9)))", "tiny()", "end()"])
def test_ctrl_c_ends_the_program_at_once(tmp_path: Path, call: str, delay_s: float) -> None:
    """That nothing is left behind is what the fixture `nothing_left_behind` sees to."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import time
            from clusterpool.multiprocessing import Pool

            def nap(x):
                time.sleep(60)

            def tiny():
                while True:
                    pool.map(abs, range(20_000), 1)

            def end():
                pool.map_async(nap, range(9))
                pool.close()
                pool.join()

            pool = Pool(2)
            print("started", flush=True)
            {call}
            """
        )
    )
    # A session of its own, so that the signal goes to the whole group, as from a terminal, and not to pytest.
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as program:
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == "started\n"
            time.sleep(delay_s)  # not a wait: different moments of the call are to be hit
            os.killpg(program.pid, signal.SIGINT)
            begin_s = time.monotonic()
            _, errors = program.communicate(timeout=20)
            assert time.monotonic() - begin_s < 8
        finally:
            program.kill()
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert errors.count("Traceback") == 1
    assert program.returncode == -signal.SIGINT
