"""The executor on a real, embedded cluster, held to the standard library's contract."""

from __future__ import annotations

import asyncio
import concurrent.futures
import concurrent.futures.process
import gc
import itertools
import operator
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest

import clusterpool
from clusterpool.futures import ProcessPoolExecutor, as_completed, wait
from clusterpool.futures.process import BrokenProcessPool
from tests.waiting import pid_at_meeting

pytestmark = pytest.mark.usefixtures("cluster")

_initialized = None


def initialize(value):
    global _initialized
    _initialized = value


def fail_to_initialize():
    raise OSError("no license")


def get_initialized():
    return _initialized, os.getpid()


def sleep_and_pid(seconds):
    time.sleep(seconds)
    return os.getpid()


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_self_once(path):
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return "second attempt"
    return kill_self()


def wait_for_file(path, seconds=30):
    end = time.monotonic() + seconds
    while not os.path.exists(path):
        if time.monotonic() > end:
            raise TimeoutError(path)
        time.sleep(0.005)
    return os.getpid()


class OwnError(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")
        self.first, self.second = first, second


def raise_own_error():
    raise OwnError("one", second=2)


def everything(*args, **kwargs):
    return args, kwargs


def until(predicate, seconds=20):
    end = time.monotonic() + seconds
    while not predicate():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def executor(cluster):
    with ProcessPoolExecutor(2) as executor:
        yield executor


def test_is_the_class_at_the_top_level():
    assert clusterpool.Executor is ProcessPoolExecutor
    assert issubclass(ProcessPoolExecutor, concurrent.futures.Executor)


def test_calls_run_in_other_processes(executor, tmp_path):
    pids = {future.result(30) for future in [executor.submit(pid_at_meeting, tmp_path, 2) for _ in range(8)]}
    assert len(pids) == 2 and os.getpid() not in pids
    assert set(executor._processes) == pids
    assert executor._max_workers == 2


def test_ten_thousand_calls(executor):
    futures = [executor.submit(operator.neg, i) for i in range(10_000)]
    assert [f.result(50) for f in futures] == [-i for i in range(10_000)]


def test_every_keyword_belongs_to_the_call(executor):
    words = dict.fromkeys(["self", "fn", "retries", "timeout", "resources", "num_cpus", "key"], 1)
    assert executor.submit(everything, 1, **words).result(30) == ((1,), words)


def test_lambdas_closures_and_results_of_local_classes(executor):
    base = 10
    assert executor.submit(lambda x: x + base, 5).result(30) == 15


def test_exception_has_its_type_arguments_and_remote_traceback(executor):
    error = executor.submit(raise_own_error).exception(30)
    assert isinstance(error, OwnError) and (error.first, error.second) == ("one", 2)
    assert "raise_own_error" in str(error.__cause__)


def test_unpicklable_argument_and_result_fail_their_own_call_only(executor):
    with pytest.raises((TypeError, pickle.PicklingError)):
        executor.submit(everything, threading.Lock()).result(30)
    with pytest.raises((TypeError, pickle.PicklingError)):
        executor.submit(threading.Lock).result(30)
    assert executor.submit(int, 3).result(30) == 3


def test_wait_as_completed_and_asyncio(executor):
    futures = [executor.submit(sleep_and_pid, 0.01 * i) for i in range(4)]
    assert set(as_completed(futures, 30)) == set(futures)
    assert wait([executor.submit(int) for _ in range(20)], 30).not_done == set()

    async def main():
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(executor, pow, 2, 5), await executor.submit(int, 7)

    assert asyncio.run(main()) == (32, 7)


def test_futures_can_be_waited_for_in_many_threads(executor):
    future = executor.submit(sleep_and_pid, 0.2)
    got = []
    threads = [threading.Thread(target=lambda: got.append(future.result(30))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(got)) == 1 and len(got) == 5


def test_map(executor):
    assert list(executor.map(operator.neg, range(1000))) == [-i for i in range(1000)]
    assert list(executor.map(pow, range(100), itertools.repeat(2), chunksize=7)) == [i * i for i in range(100)]
    assert list(itertools.islice(executor.map(abs, itertools.count(), buffersize=8), 100)) == list(range(100))
    values = executor.map(operator.truediv, [1, 1], [1, 0])
    assert next(values) == 1.0
    with pytest.raises(ZeroDivisionError):
        next(values)


@pytest.mark.parametrize("chunksize", [1, 4])
def test_map_calls_a_submit_that_a_program_has_put_in_place_of_ours(chunksize):
    # As tqdm's process_map does, to count what is done.
    done = []
    with ProcessPoolExecutor(2) as executor:
        submit = executor.submit

        def counting_submit(*args):
            future = submit(*args)
            future.add_done_callback(lambda future: (time.sleep(0.01), done.append(future)))
            return future

        executor.submit = counting_submit
        assert list(executor.map(operator.add, range(10), range(10), chunksize=chunksize)) == list(range(0, 20, 2))
        assert len(done) == -(-10 // chunksize)  # a bar is closed before the executor is shut down


def test_map_timeout(executor):
    with pytest.raises(concurrent.futures.TimeoutError):
        list(executor.map(sleep_and_pid, [0, 1.5], timeout=0.3))


def test_cancel_and_running_tell_the_truth(tmp_path):
    go_on = str(tmp_path / "go on")
    with ProcessPoolExecutor(1) as executor:
        first = executor.submit(wait_for_file, go_on)
        until(first.running)
        rest = [executor.submit(sleep_and_pid, 0) for _ in range(20)]
        assert not first.cancel()
        cancelled = [future for future in rest if future.cancel()]
        assert cancelled and all(not f.running() and f.cancelled() for f in cancelled)
        open(go_on, "w").close()
        assert first.result(30)
        assert wait(rest, 30).not_done == set()


def test_initializer_sets_a_global_that_tasks_see():
    with ProcessPoolExecutor(2, initializer=initialize, initargs=("set",)) as executor:
        assert {executor.submit(get_initialized).result(30)[0] for _ in range(10)} == {"set"}


def test_failing_initializer_breaks_the_pool():
    executor = ProcessPoolExecutor(1, initializer=fail_to_initialize)
    with pytest.raises(BrokenProcessPool, match="no license"):
        executor.submit(int).result(30)
    with pytest.raises(BrokenProcessPool):
        executor.submit(int)
    executor.shutdown()


def test_max_tasks_per_child_replaces_workers():
    with ProcessPoolExecutor(1, max_tasks_per_child=3) as executor:
        pids = [executor.submit(os.getpid).result(30) for _ in range(9)]
    assert [len(set(pids[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert len(set(pids)) == 3


def test_killed_worker_breaks_the_pool_and_says_how(tmp_path):
    with ProcessPoolExecutor(2) as executor:
        waiting = executor.submit(wait_for_file, str(tmp_path / "never"))
        error = executor.submit(kill_self).exception(30)
        assert isinstance(error, concurrent.futures.process.BrokenProcessPool)
        assert "SIGKILL" in str(error)
        assert isinstance(waiting.exception(30), BrokenProcessPool)
        with pytest.raises(BrokenProcessPool):
            executor.submit(int)


def test_idle_worker_killed_from_outside_breaks_the_pool():
    with ProcessPoolExecutor(2) as executor:
        pid = executor.submit(os.getpid).result(30)
        os.kill(pid, signal.SIGKILL)
        until(lambda: executor._broken)
        with pytest.raises(BrokenProcessPool):
            executor.submit(int)


def test_retries_run_the_call_of_a_killed_worker_again(tmp_path):
    with ProcessPoolExecutor(2, retries=1) as executor:
        assert executor.submit(kill_self_once, str(tmp_path / "1")).result(30) == "second attempt"
        with pytest.raises(BrokenProcessPool):
            executor.submit(kill_self).result(30)
        assert executor.submit(int, 5).result(30) == 5
    with ProcessPoolExecutor(1) as executor:
        view = executor.options(retries=1)
        assert view.submit(kill_self_once, str(tmp_path / "2")).result(30) == "second attempt"


def test_shutdown_finishes_calls_and_ends_workers():
    executor = ProcessPoolExecutor(2)
    futures = [executor.submit(sleep_and_pid, 0.01) for _ in range(20)]
    futures[0].result(30)
    processes = executor._processes
    executor.shutdown()
    assert all(future.done() for future in futures)
    for pid, process in processes.items():
        assert not process.is_alive() and process.exitcode == 0
        until(lambda pid=pid: not os.path.exists(f"/proc/{pid}"))
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(int)


def test_shutdown_with_cancel_futures():
    executor = ProcessPoolExecutor(1)
    futures = [executor.submit(sleep_and_pid, 0.05) for _ in range(100)]
    futures[0].result(30)
    executor.shutdown(cancel_futures=True)
    assert all(future.done() for future in futures)
    assert sum(future.cancelled() for future in futures) > 50


@pytest.mark.parametrize("end", ["kill_workers", "terminate_workers"])
def test_kill_and_terminate_workers(end):
    executor = ProcessPoolExecutor(1)
    future = executor.submit(sleep_and_pid, 60)
    until(future.running)
    (pid,) = executor._processes
    getattr(executor, end)()
    assert isinstance(future.exception(30), BrokenProcessPool)
    until(lambda: not os.path.exists(f"/proc/{pid}"))
    with pytest.raises(RuntimeError):
        executor.submit(int)


def test_sys_exit_in_a_call_is_raised_at_its_caller(executor):
    executor.submit(int).result(30)  # the workers start with the first call
    pids = set(executor._processes)
    error = executor.submit(sys.exit, 3).exception(30)
    assert isinstance(error, SystemExit) and error.code == 3
    assert isinstance(executor.submit(everything, 1).result(30), tuple)
    assert set(executor._processes) == pids


def test_callback_may_wait_for_a_lock_that_is_held_while_a_large_argument_is_submitted(executor):
    lock = threading.RLock()  # a call that is done by then has its callback called here and now
    called = []

    def callback(_):
        with lock:
            called.append(1)

    large = bytes(3_000_000)
    futures = []
    for _ in range(20):
        with lock:
            futures.append(executor.submit(sleep_and_pid, 0))
            futures[-1].add_done_callback(callback)
            time.sleep(0.005)  # its callback begins, and waits for the lock
            futures.append(executor.submit(len, large))
    assert [future.result(30) for future in futures[1::2]] == [len(large)] * 20
    until(lambda: len(called) == 20)


def test_arguments_are_let_go_without_the_garbage_collector(executor):
    class Argument:
        def method(self):
            return 1

    gc.disable()
    try:
        for make_call in (lambda a: (a.method,), lambda a: (id, a)):
            argument = Argument()
            is_gone = weakref.ref(argument)
            assert executor.submit(*make_call(argument)).result(30)
            del argument
            until(lambda is_gone=is_gone: is_gone() is None)
    finally:
        gc.enable()


def run_script(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)


def test_interpreter_exit_awaits_pending_calls():
    done = run_script(
        "import time\nfrom clusterpool.futures import ProcessPoolExecutor\n"
        "executor = ProcessPoolExecutor(1)\n"
        "future = executor.submit(lambda: time.sleep(0.5) or 'finished')\n"
        "future.add_done_callback(lambda f: print(f.result(), flush=True))\n"
    )
    assert (done.stdout, done.stderr, done.returncode) == ("finished\n", "", 0)


def test_callback_added_at_the_interpreters_exit_runs():
    done = run_script(
        "import atexit, time\nfrom clusterpool.futures import ProcessPoolExecutor\n"
        "executor = ProcessPoolExecutor(1)\n"
        "future = executor.submit(lambda: time.sleep(0.5) or 'finished')\n"
        "atexit.register(future.add_done_callback, lambda f: print(f.result(), flush=True))\n"
    )
    assert (done.stdout, done.stderr, done.returncode) == ("finished\n", "", 0)


def test_calls_are_done_before_exit_handlers_and_threads_may_submit_more():
    done = run_script(
        "import atexit, threading, time\nfrom clusterpool.futures import ProcessPoolExecutor\n"
        "executor = ProcessPoolExecutor(1)\n"
        "def late():\n"
        "    threading.main_thread().join()\n"
        "    while not all(future.done() for future in futures):\n"
        "        time.sleep(0.01)\n"
        "    future = executor.submit(pow, 2, 3)\n"
        "    print('late', future.result(), flush=True)\n"
        "futures = [executor.submit(time.sleep, 0.3)]\n"
        "futures[0].add_done_callback(lambda future: print('callback', flush=True))\n"
        "threading.Thread(target=late).start()\n"
        "atexit.register(lambda: print('handler', flush=True))\n"
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert sorted(done.stdout.splitlines()) == ["callback", "handler", "late 8"]


def test_exit_handlers_find_all_calls_done():
    done = run_script(
        "import atexit, time\nfrom clusterpool.futures import ProcessPoolExecutor\n"
        "executor = ProcessPoolExecutor(1)\n"
        "future = executor.submit(time.sleep, 0.3)\n"
        "future.add_done_callback(lambda future: print('callback', flush=True))\n"
        "atexit.register(lambda: print(future.done(), flush=True))\n"
    )
    assert (done.stdout, done.stderr, done.returncode) == ("callback\nTrue\n", "", 0)


def test_dropped_executor_finishes_its_calls():
    done = run_script(
        "import clusterpool\n"
        "def start():\n"
        "    executor = clusterpool.Executor(2)\n"
        "    return [executor.submit(pow, i, 2) for i in range(100)]\n"
        "print(sum(f.result() for f in start()))\n"
    )
    assert (done.stdout, done.stderr, done.returncode) == ("328350\n", "", 0)


def test_initializer_of_main_sets_a_global_of_main():
    done = run_script(
        "from clusterpool.futures import ProcessPoolExecutor\n"
        "state = None\n"
        "def initialize(value):\n"
        "    global state\n"
        "    state = value\n"
        "def read(_): return state\n"
        "with ProcessPoolExecutor(2, initializer=initialize, initargs=(7,)) as executor:\n"
        "    print(set(executor.map(read, range(10))))\n"
    )
    assert (done.stdout, done.stderr, done.returncode) == ("{7}\n", "", 0)


def test_pending_calls_end_when_the_cluster_ends():
    done = run_script(
        "import clusterpool, os, signal, time\n"
        "executor = clusterpool.Executor(1)\n"
        "future = executor.submit(time.sleep, 60)\n"
        "while not future.running(): time.sleep(0.01)\n"
        "clusterpool.shutdown()\n"
        "try: future.result(30)\n"
        "except BaseException as error: print(type(error).__name__)\n"
        "executor = clusterpool.Executor(1)\n"
        "future = executor.submit(os.getppid)\n"
        "zygote = future.result(30)\n"
        "node = int(open(f'/proc/{zygote}/stat').read().rpartition(')')[2].split()[1])\n"
        "future = executor.submit(time.sleep, 60)\n"
        "while not future.running(): time.sleep(0.01)\n"
        "os.kill(node, signal.SIGKILL)\n"
        "print(type(future.exception(30)).__name__)\n"
    )
    # In the first case either news may come first: that its worker is gone, or that the cluster is.
    first, *rest = done.stdout.split()
    assert first in ("CancelledError", "BrokenProcessPool"), done.stderr
    assert (rest, done.returncode) == (["BrokenProcessPool"], 0), done.stderr


def test_executor_inside_a_task(executor):
    def nested(n):
        with ProcessPoolExecutor(2) as inner:
            return sum(inner.map(abs, range(n)))

    assert executor.submit(nested, 10).result(50) == 45
