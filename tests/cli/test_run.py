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


@PATCHED
def test_a_script_given_by_a_relative_path_knows_its_whole_path(tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "script.py").write_text("import os, sys\nos.chdir('/')\nprint(sys.argv, __file__)\n1 / 0\n")
    done = clusterpool_command("run", *options, "--address", "local", "script.py", "x", cwd=tmp_path)
    assert done.stdout == f"['script.py', 'x'] {tmp_path / 'script.py'}\n"
    assert f'File "{tmp_path / "script.py"}", line 4' in done.stderr and "1 / 0" in done.stderr


def test_the_script_stays_main_until_its_last_thread_and_exit_handler_have_ended(tmp_path: Path) -> None:
    text = """
        import atexit, sys, threading
        def is_main(): return sys.modules["__main__"].__dict__ is globals() and is_main.__module__ == "__main__"
        def later(): threading.main_thread().join(); print(is_main())
        threading.Thread(target=later).start()
        atexit.register(lambda: print(is_main()))
    """
    assert run(tmp_path, text, "--patch").stdout == "True\nTrue\n"


def test_a_syntax_error_is_shown_as_python_shows_it(tmp_path: Path) -> None:
    done = run(tmp_path, "1 +\n", "--patch")
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr == subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True).stderr
    )


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


@pytest.mark.parametrize(
    "call", ["apply_async(make, (1,))", "map_async(make, range(4))", "starmap_async(make, [(1,)])"]
)
def test_a_result_that_the_standard_pool_could_not_give_is_its_error(tmp_path: Path, call: str) -> None:
    text = f"""
        from multiprocessing import Pool
        from multiprocessing.pool import MaybeEncodingError
        def make(number): return lambda: number
        with Pool(1) as pool:
            try:
                print([function() for function in pool.{call}.get(30)])
            except MaybeEncodingError as exc:
                print("MaybeEncodingError" if "<lambda>" in exc.exc else exc)
            print(pool.apply(abs, (-1,)))
    """
    assert run(tmp_path, text, "--patch").stdout == "MaybeEncodingError\n1\n"


def test_what_the_workers_of_an_unchanged_program_print_has_no_prefix(tmp_path: Path) -> None:
    text = """
        from multiprocessing import Pool
        with Pool(1) as pool:
            pool.apply(print, ("from a worker",))
    """
    assert run(tmp_path, text, "--patch").stdout == "from a worker\n"


@PATCHED
def test_a_working_folder_goes_along(tmp_path: Path, options: tuple[str, ...]) -> None:
    folder = tmp_path / "with modules"
    folder.mkdir()
    (folder / "beside.py").write_text("NAME = 'beside'\n")
    done = run(
        tmp_path,
        """
        import os
        from clusterpool import Pool

        def look(_):
            import beside
            return beside.NAME, os.path.exists("beside.py"), os.getcwd()

        with Pool(1) as pool:
            name, is_there, folder = pool.apply(look, (0,))
        print(name, is_there, folder != os.getcwd())
        """,
        *options,
        "--working-dir",
        str(folder),
    )
    assert done.stdout == "beside True True\n", done


def test_processes_queues_locks_and_managers_are_the_cluster_s(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
        import multiprocessing, multiprocessing.connection, multiprocessing.managers, os
        from multiprocessing import Lock, Manager, Process, Queue, get_context
        from multiprocessing.queues import Queue as QueueClass

        def work(queue, lock, shared):
            with lock:
                shared["worker"] = "CLUSTERPOOL_NODE_ID" in os.environ
            queue.put((os.getpid(), multiprocessing.current_process().name))

        queue, lock = Queue(), Lock()
        with Manager() as manager:
            shared = manager.dict()
            process = Process(target=work, args=(queue, lock, shared))
            process.start()
            print(queue.get(timeout=20) == (process.pid, process.name), isinstance(queue, QueueClass))
            process.join()
            print(process.exitcode, dict(shared))
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = get_context("spawn").Process(target=sender.send, args=("sent",))
        process.start()
        print(multiprocessing.connection.wait([receiver], 20) == [receiver] and receiver.recv())
        process.join()
        print({type(thing).__module__.partition(".")[0] for thing in (queue, lock, process, manager, sender)})
        """,
        "--patch",
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["True True", "0 {'worker': True}", "sent", "{'clusterpool'}"]


def test_what_is_of_this_host_stays_what_it_is(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
        import multiprocessing, multiprocessing.dummy, os
        from concurrent.futures import ThreadPoolExecutor
        from multiprocessing.pool import ThreadPool
        from multiprocessing.util import Finalize
        from joblib import Parallel, delayed
        from joblib.externals.loky.backend.context import LokyContext

        def is_here(_=None):
            return "CLUSTERPOOL_NODE_ID" not in os.environ

        if __name__ == "__main__":
            for pool_class in (ThreadPool, multiprocessing.dummy.Pool):
                with pool_class(2) as pool:
                    print(pool.map(is_here, range(5)))
            with ThreadPoolExecutor(2) as executor:
                print(list(executor.map(is_here, range(2))))
            print(Parallel(n_jobs=2, prefer="threads")(delayed(is_here)() for _ in range(2)))
            for backend in ("multiprocessing", "loky"):
                print(Parallel(n_jobs=2, backend=backend)(delayed(is_here)() for _ in range(2)))
            print([base.__module__ for base in LokyContext.__mro__], hasattr(multiprocessing.pool, "nothing"))
        """,
        "--patch",
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "[True, True, True, True, True]",
        "[True, True, True, True, True]",
        "[True, True]",
        "[True, True]",
        "[True, True]",
        "[True, True]",
        "['joblib.externals.loky.backend.context', 'multiprocessing.context', 'builtins'] False",
    ]


def test_workers_are_patched_too(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text(
        textwrap.dedent(
            """
            import concurrent.futures, multiprocessing
            from multiprocessing import Process
            from multiprocessing.queues import Queue

            def homes(_):
                import joblib.parallel
                things = (Process, Queue, multiprocessing.get_context("fork").Process, multiprocessing.pool.Pool)
                homes = {thing.__module__.partition(".")[0] for thing in things}
                return homes, concurrent.futures.ProcessPoolExecutor.__module__, joblib.parallel.DEFAULT_BACKEND

            def nested(queue):
                queue.put(homes(0))
                process = Process(target=put_homes, args=(queue,))
                process.start()
                process.join()

            def put_homes(queue):
                queue.put(homes(0))
            """
        )
    )
    done = run(
        tmp_path,
        """
        import multiprocessing
        from beside import homes, nested

        queue = multiprocessing.Queue()
        process = multiprocessing.Process(target=nested, args=(queue,))
        process.start()
        print(queue.get(timeout=20))
        print(queue.get(timeout=20))
        process.join()
        with multiprocessing.Pool(1) as pool:
            print(pool.apply(homes, (0,)))
        """,
        "--patch",
    )
    assert done.stderr == ""
    assert set(done.stdout.splitlines()) == {"({'clusterpool'}, 'clusterpool.futures.executor', 'clusterpool')"}
    assert len(done.stdout.splitlines()) == 3


def test_what_the_standard_names_pickle_loads_without_the_patch(tmp_path: Path) -> None:
    text = """
        import multiprocessing, pickle
        from multiprocessing.managers import Token
        things = [
            multiprocessing.Process, multiprocessing.TimeoutError("late"), multiprocessing.Queue, Token("t", "a", "i"),
            multiprocessing.get_context("spawn"), multiprocessing.connection.rebuild_connection,
        ]
        print(pickle.dumps(things).hex())
    """
    done = run(tmp_path, text, "--patch")
    assert done.stderr == ""
    program = f"import pickle; print([type(t).__name__ for t in pickle.loads(bytes.fromhex({done.stdout.strip()!r}))])"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert loaded.stderr == ""
    assert loaded.stdout == "['type', 'TimeoutError', 'method', 'Token', 'SpawnContext', 'function']\n"


def test_the_patch_stays_in_the_process_that_asked_for_it() -> None:
    program = "import multiprocessing, clusterpool.cli.patch; print(multiprocessing.Pool.__module__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert done.stdout == "multiprocessing.context\n", done.stderr
