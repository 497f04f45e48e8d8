"""The worker processes of a `Pool` on a real embedded cluster: setup, life, death, the end of a pool."""

from __future__ import annotations

import collections
import gc
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from clusterpool.errors import TaskCancelled, WorkerDied, WorkerSetupFailed
from clusterpool.multiprocessing import Pool
from tests.waiting import is_alive, wait_for

# All on one cluster of the module: only its last test waits for the end of a cluster.
pytestmark = pytest.mark.usefixtures("cluster")

setup_value: Any = None


def square(x: int) -> int:
    return x * x


def pid_of_task(_: Any = None) -> int:
    return os.getpid()


def set_up(value: Any, folder: Path) -> None:
    global setup_value
    setup_value = value
    with (folder / str(os.getpid())).open("a") as file:
        file.write("x")


def setup_seen(_: Any) -> tuple[Any, int]:
    return setup_value, os.getpid()


def failing_setup() -> None:
    raise RuntimeError("no licence")


def meet(folder: Path, number: int, count: int) -> int:
    """Returns when `count` tasks run at the same moment."""
    (folder / str(number)).touch()
    wait_for(lambda: len(os.listdir(folder)) >= count)
    return os.getpid()


def identity_at_meeting(folder: Path, number: int, count: int) -> tuple[str, tuple[int, ...]]:
    meet(folder, number, count)
    process = multiprocessing.current_process()
    return process.name, process._identity  # type: ignore[attr-defined]


def wait_for_file(path: Path) -> str:
    wait_for(path.exists)
    return path.name


def block(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def die(how: str) -> None:
    if how == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "_exit":
        os._exit(3)
    elif how == "sys.exit":
        sys.exit(4)
    elif how == "SIGSEGV":
        os.kill(os.getpid(), signal.SIGSEGV)


def die_once(mark: Path) -> str:
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


# --- 4: the initializer


def test_initializer_runs_once_in_each_worker_and_its_globals_are_seen(tmp_path: Path) -> None:
    with Pool(2, set_up, ("hello", tmp_path)) as pool:
        seen = pool.map(setup_seen, range(40), chunksize=1)
    assert {value for value, _ in seen} == {"hello"}
    for _, pid in seen:
        assert (tmp_path / str(pid)).read_text() == "x"


def test_initializer_runs_again_in_each_replacement(tmp_path: Path) -> None:
    with Pool(1, set_up, ("hello", tmp_path), maxtasksperchild=1) as pool:
        seen = pool.map(setup_seen, range(4), chunksize=1)
    assert [value for value, _ in seen] == ["hello"] * 4
    assert len({pid for _, pid in seen}) == 4
    assert all((tmp_path / str(pid)).read_text() == "x" for _, pid in seen)


def test_initializer_that_fails_is_an_error_not_a_hang() -> None:
    with Pool(2, failing_setup) as pool:
        with pytest.raises(WorkerSetupFailed, match=r"failing_setup.*no licence"):
            pool.map_async(square, range(10)).get(30)


# --- 5: maxtasksperchild


def test_maxtasksperchild_counts_chunks() -> None:
    with Pool(1, maxtasksperchild=2) as pool:
        pids = pool.map(pid_of_task, range(12), chunksize=2)
    assert sorted(collections.Counter(pids).values()) == [4, 4, 4]


def test_workers_that_reached_their_limit_are_replaced() -> None:
    with Pool(2, maxtasksperchild=1) as pool:
        before = [worker.pid for worker in pool._pool]
        pids = [pool.apply(pid_of_task) for _ in range(6)]
        assert len(set(pids)) == 6
        wait_for(lambda: len(pool._pool) == 2 and not {w.pid for w in pool._pool} & set(before))
        wait_for(lambda: not any(map(is_alive, pids)))


# --- 6: who gets the work


def test_work_goes_to_whichever_worker_is_free(tmp_path: Path) -> None:
    (tmp_path / "now").touch()
    names = ["later"] + ["now"] * 30
    with Pool(2) as pool:
        results = pool.imap_unordered(wait_for_file, [tmp_path / name for name in names])
        assert [results.next(30) for _ in range(30)] == ["now"] * 30
        (tmp_path / "later").touch()
        assert results.next(30) == "later"


def test_more_processes_than_cpus(tmp_path: Path) -> None:
    count = 2 * (os.cpu_count() or 1) + 1
    with Pool(count) as pool:
        pids = pool.starmap(meet, [(tmp_path, number, count) for number in range(count)], 1)
    assert len(set(pids)) == count


def test_two_pools_run_side_by_side(tmp_path: Path) -> None:
    with Pool(2) as first, Pool(2) as second:
        results = [
            pool.starmap_async(meet, [(tmp_path, number, 4) for number in numbers], 1)
            for pool, numbers in ((first, (0, 1)), (second, (2, 3)))
        ]
        pids = [pid for result in results for pid in result.get(30)]
    assert len(set(pids)) == 4


# --- 7: deaths


def test_an_initializer_that_ends_its_process_ends_the_pool_and_hangs_nobody() -> None:
    with Pool(1, initializer=os._exit, initargs=(3,)) as pool:
        with pytest.raises(WorkerSetupFailed, match=r"(?s)4 workers .* exit code 3"):
            pool.apply_async(pid_of_task).get(30)
        with pytest.raises(WorkerSetupFailed):
            pool.map_async(square, range(4)).get(30)


@pytest.mark.parametrize("how", ["SIGKILL", "_exit", "SIGSEGV"])
@pytest.mark.parametrize("call", ["apply", "map", "imap"])
def test_death_in_a_task_is_an_error_and_the_pool_goes_on(how: str, call: str) -> None:
    with Pool(2, retries=0) as pool:
        with pytest.raises(WorkerDied):
            if call == "apply":
                pool.apply_async(die, (how,)).get(30)
            elif call == "map":
                pool.map_async(die, ["", how, ""], 1).get(30)
            else:
                pool.imap(die, [how]).next(30)
        assert pool.map(square, range(20), 1) == [x * x for x in range(20)]
        wait_for(lambda: len(pool._pool) == 2)


def test_error_of_a_death_names_the_worker_the_node_and_the_signal() -> None:
    with Pool(1, retries=0) as pool:
        with pytest.raises(WorkerDied, match=r"(?s)pid \d+\) on node n\w+ was killed by signal 9 \(SIGKILL\)"):
            pool.apply_async(die, ("SIGKILL",)).get(30)
        with pytest.raises(WorkerDied, match=r"(?s)pid \d+\) on node n\w+ ended with exit code 3"):
            pool.apply_async(die, ("_exit",)).get(30)


class OutOfTheOrdinary(BaseException):
    pass


def raise_this(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("error", [SystemExit(4), KeyboardInterrupt(), GeneratorExit(), OutOfTheOrdinary("x")])
def test_what_is_no_exception_is_raised_at_the_caller_and_costs_no_worker(error: BaseException) -> None:
    with Pool(1) as pool:
        pid = pool.apply(pid_of_task)
        with pytest.raises(type(error)) as caught:
            pool.apply(raise_this, (error,))
        assert caught.value.args == error.args
        assert pool.apply(pid_of_task) == pid


def test_workers_have_names_and_numbers_of_their_own(tmp_path: Path) -> None:
    with Pool(3) as pool:
        identities = pool.starmap(identity_at_meeting, [(tmp_path, number, 3) for number in range(3)], 1)
    assert len({name for name, _ in identities}) == 3
    numbers = sorted(number for _, (number,) in identities)
    assert numbers == list(range(numbers[0], numbers[0] + 3))


def test_a_task_whose_worker_died_is_tried_again(tmp_path: Path) -> None:
    with Pool(2) as pool:
        assert pool.apply_async(die_once, (tmp_path / "a",)).get(30) == "survived"
        marks = [tmp_path / f"b{number}" for number in range(3)]
        assert pool.map_async(die_once, marks, 1).get(60) == ["survived"] * 3


def test_a_task_that_always_kills_its_worker_fails_in_the_end() -> None:
    with Pool(2) as pool:
        with pytest.raises(WorkerDied):
            pool.apply_async(die, ("SIGKILL",)).get(60)


def test_an_idle_worker_that_is_killed_is_replaced() -> None:
    with Pool(2) as pool:
        victim = pool._pool[0]
        os.kill(victim.pid, signal.SIGKILL)
        victim.join(30)
        assert not victim.is_alive()
        assert victim.exitcode == -signal.SIGKILL
        assert pool.map(square, range(20), 1) == [x * x for x in range(20)]
        wait_for(lambda: len(pool._pool) == 2)
        assert victim.pid not in [worker.pid for worker in pool._pool]


# --- 8: the end


def test_terminate_kills_the_workers_and_fails_what_waits(tmp_path: Path) -> None:
    pool = Pool(2)
    result = pool.map_async(block, [tmp_path] * 2, 1)
    wait_for(lambda: len(os.listdir(tmp_path)) == 2)
    pids = [worker.pid for worker in pool._pool]
    pool.terminate()
    pool.join()
    wait_for(lambda: not any(map(is_alive, pids)))
    with pytest.raises(TaskCancelled):
        result.get(30)
    assert all(worker.exitcode is not None for worker in pool._pool)


def test_context_manager_terminates(tmp_path: Path) -> None:
    with Pool(1) as pool:
        pool.apply_async(block, (tmp_path,))
        wait_for(lambda: len(os.listdir(tmp_path)) == 1)
        pids = [worker.pid for worker in pool._pool]
    wait_for(lambda: not any(map(is_alive, pids)))
    assert pool._state == "TERMINATE"
    with pytest.raises(ValueError, match="Pool not running"):
        with pool:
            pass
    with pytest.raises(ValueError, match="Pool not running"):
        pool.apply(square, (1,))


def test_close_and_join_finish_the_work() -> None:
    pool = Pool(2)
    result = pool.map_async(square, range(5000), 1)
    workers = pool._pool
    pool.close()
    with pytest.raises(ValueError, match="Pool not running"):
        pool.map(square, [1])
    pool.join()
    assert result.ready()
    assert result.get() == [x * x for x in range(5000)]
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_join_of_a_running_pool_is_a_value_error() -> None:
    with Pool(1) as pool:
        with pytest.raises(ValueError, match="Pool is still running"):
            pool.join()


def test_workers_that_die_after_close_are_replaced_until_all_is_done(tmp_path: Path) -> None:
    pool = Pool(1)
    results = [pool.apply_async(die_once, (tmp_path / str(number),)) for number in range(3)]
    pool.close()
    pool.join()
    assert [result.get(0) for result in results] == ["survived"] * 3


@pytest.mark.parametrize("attempt", range(5))
def test_terminate_while_an_imap_submits_large_items(attempt: int) -> None:
    pool = Pool(2)
    results = pool.imap(len, (bytes(2**21) for _ in itertools.repeat(None)))
    assert [results.next(30) for _ in range(5)] == [2**21] * 5
    pool.terminate()
    pool.join()
    with pytest.raises(TaskCancelled):
        for _ in range(100):
            results.next(30)


def test_limited_workers_and_an_early_close() -> None:
    pool = Pool(3, maxtasksperchild=1)
    results = [pool.apply_async(square, (x,)) for x in range(12)]
    pool.close()
    pool.join()
    assert [result.get(0) for result in results] == [x * x for x in range(12)]


def test_terminate_from_another_thread_ends_a_wait(tmp_path: Path) -> None:
    pool = Pool(1)
    timer = threading.Timer(0.2, pool.terminate)
    timer.start()
    with pytest.raises(TaskCancelled):
        pool.map(block, [tmp_path])
    timer.join()
    pool.join()


def test_pool_left_open_gives_a_resource_warning_and_its_workers_end() -> None:
    pool = Pool(2)
    pids = [worker.pid for worker in pool._pool]
    with pytest.warns(ResourceWarning, match="unclosed running multiprocessing pool"):
        del pool
        gc.collect()
    wait_for(lambda: not any(map(is_alive, pids)))


# --- 23: what programs read


def test_what_programs_read() -> None:
    with Pool(3) as pool:
        assert pool._processes == len(pool._pool) == 3
        assert len({worker.pid for worker in pool._pool}) == 3
        for worker in pool._pool:
            assert worker.is_alive()
            assert worker.exitcode is None
            assert isinstance(worker.name, str)
            assert is_alive(worker.pid)
        assert pool._pool[0] is pool._pool[0]
        assert len(pool._cache) == 0
        assert pool._state == "RUN"
        assert repr(pool) == "<clusterpool.multiprocessing.pool.Pool state=RUN pool_size=3>"
