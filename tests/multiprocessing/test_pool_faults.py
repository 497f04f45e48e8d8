"""What goes wrong in the calls of a pool on a real cluster: items that kill their workers, hang, or are stopped."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clusterpool.errors import TaskCancelled, TaskTimeout, WorkerDied
from clusterpool.multiprocessing import Pool
from tests.waiting import is_alive, wait_for

pytestmark = pytest.mark.usefixtures("cluster")


def double(x: int) -> int:
    return 2 * x


def die(how: str) -> None:
    if how == "_exit":
        os._exit(3)
    os.kill(os.getpid(), getattr(signal, how))


class DieAt:
    """Doubles its argument, unless that is one of the bad ones."""

    def __init__(self, bad: set[int], how: str) -> None:
        self.bad = bad
        self.how = how

    def __call__(self, x: int) -> int:
        if x in self.bad:
            die(self.how)
        return 2 * x


def double_big(x: int) -> bytes:
    if x == 5:
        os._exit(3)
    return bytes([x]) * 300_000  # more than travels in a message


def die_once(folder: str, x: int) -> int:
    path = Path(folder, str(x))
    if x in (3, 4, 7) and not path.exists():
        path.touch()
        die("SIGKILL")
    return 2 * x


def hang_at_three(x: int) -> int:
    if x == 3:
        time.sleep(1e6)
    return 2 * x


def spin(_: Any = None) -> None:
    while True:
        pass


def touch_and_sleep(path: str, seconds: float = 1e6) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(seconds)


def touch_and_wait(path: str) -> None:
    """Until somebody takes the file away."""
    Path(path).touch()
    wait_for(lambda: not Path(path).exists())


def outcomes(results: Iterator[Any]) -> list[Any]:
    """What an iterator gives, errors included, to its end."""
    found: list[Any] = []
    while True:
        try:
            found.append(next(results))
        except StopIteration:
            return found
        except Exception as error:
            found.append(error)


# --- items that kill their workers


@pytest.mark.parametrize("how", ["_exit", "SIGSEGV", "SIGKILL", "SIGABRT"])
def test_the_good_items_of_a_chunk_return_and_the_bad_one_says_which_it_was(how: str) -> None:
    with Pool(2, retries=1) as pool:
        found = outcomes(pool.imap(DieAt({13}, how), range(30), chunksize=10))
        assert [value for value in found if isinstance(value, int)] == [2 * x for x in range(30) if x != 13]
        error = found[13]
        assert isinstance(error, WorkerDied)
        for part in ("item 13 of the iterable", "attempt 2 of 2", "pid ", "on node ", "peak memory"):
            assert part in str(error), str(error)
        assert ("exit code 3" if how == "_exit" else f"({how})") in str(error)
        assert pool.map(double, range(10)) == [2 * x for x in range(10)], "the pool is usable"


def test_a_map_raises_the_error_after_the_others_have_run(tmp_path: Path) -> None:
    with Pool(2, retries=1) as pool:
        with pytest.raises(WorkerDied, match="item 7 of the iterable"):
            pool.map(DieAt({7}, "_exit"), range(40), chunksize=20)
        with pytest.raises(WorkerDied, match="item 7 of the iterable"):
            pool.starmap(DieAt({7}, "_exit"), [(x,) for x in range(20)], chunksize=20)
        with pytest.raises(WorkerDied, match="item 3 of the iterable"):
            pool.map(DieAt({3}, "_exit"), range(5), chunksize=1)


def test_several_bad_items_of_a_chunk() -> None:
    with Pool(2, retries=1) as pool:
        bad = {0, 4, 5, 19}
        found = outcomes(pool.imap_unordered(DieAt(bad, "_exit"), range(20), chunksize=20))
    good = [value for value in found if isinstance(value, int)]
    assert (sorted(good), len(found)) == ([2 * x for x in range(20) if x not in bad], 20)


def test_a_chunk_whose_parts_are_stored_is_put_together_again() -> None:
    with Pool(2, retries=1) as pool:
        found = outcomes(pool.imap(double_big, range(8), chunksize=8))
    assert [value[0] for value in found if isinstance(value, bytes)] == [0, 1, 2, 3, 4, 6, 7]
    assert isinstance(found[5], WorkerDied)


def test_a_call_that_leaves_its_worker_unable_to_answer_fails_in_the_end() -> None:
    """It has ended each time: without a limit it would run for ever."""
    with Pool(1, retries=1) as pool:
        with pytest.raises(WorkerDied, match="attempt 2 of 2"):
            pool.apply_async(os.closerange, (3, 4096)).get(30)
        assert pool.apply(double, (4,)) == 8


def test_items_that_kill_their_worker_once_are_done_in_the_end(tmp_path: Path) -> None:
    with Pool(2) as pool:
        results = pool.starmap(die_once, [(str(tmp_path), x) for x in range(10)], chunksize=10)
    assert results == [2 * x for x in range(10)]


def test_workers_killed_at_random_cost_nothing() -> None:
    with Pool(3, retries=100) as pool:
        has_ended = threading.Event()
        chance = random.Random(5)

        def kill() -> None:
            while not has_ended.wait(0.7):
                living = [worker for worker in pool._workers.living() if worker.is_alive()]
                if living:
                    try:
                        chance.choice(living).kill()
                    except ProcessLookupError:
                        pass

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            results = pool.map(slow_double, range(400), chunksize=50)
        finally:
            has_ended.set()
            killer.join()
    assert results == [2 * x for x in range(400)]


def slow_double(x: int) -> int:
    time.sleep(0.01)
    return 2 * x


# --- limits of time


def test_a_call_beyond_its_limit_raises_and_its_worker_is_replaced() -> None:
    with Pool(2) as pool:
        pool.map(double, range(4))
        with pytest.raises(multiprocessing.TimeoutError, match="limit of 0.5 s") as info:
            pool.apply(spin, timeout=0.5)
        assert isinstance(info.value, TaskTimeout)
        wait_for(lambda: len(pool._workers.living()) == 2)
        assert pool.map(double, range(10)) == [2 * x for x in range(10)]


def start_and_wait(path: str) -> None:
    """A program that the task has started, and that it waits for."""
    program = subprocess.Popen(["sleep", "1000"])
    Path(f"{path}.new").write_text(str(program.pid))
    Path(f"{path}.new").rename(path)
    program.wait()


def test_what_a_call_has_started_ends_with_it(tmp_path: Path) -> None:
    cancelled, terminated = tmp_path / "cancelled", tmp_path / "terminated"
    with Pool(2) as pool:
        running = pool.apply_async(start_and_wait, (str(cancelled),))
        wait_for(cancelled.exists)
        assert running.cancel()
        pool.apply_async(start_and_wait, (str(terminated),))
        wait_for(terminated.exists)
    wait_for(lambda: not is_alive(int(cancelled.read_text())) and not is_alive(int(terminated.read_text())))


def ignore_and_sleep(path: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    touch_and_sleep(path)


def test_a_task_that_ignores_sigterm_does_not_hang_the_end_of_its_pool(tmp_path: Path) -> None:
    pool = Pool(1)
    pool.apply_async(ignore_and_sleep, (str(tmp_path / "began"),))
    wait_for((tmp_path / "began").exists)
    pool.terminate()
    pool.join()


def test_only_the_item_beyond_its_limit_fails() -> None:
    with Pool(2) as pool:
        pool.map(double, range(4))
        found = outcomes(pool.imap(hang_at_three, range(10), chunksize=5, timeout=1))
        assert isinstance(found[3], TaskTimeout) and "item 3 of the iterable" in str(found[3])
        assert found[:3] + found[4:] == [2 * x for x in range(10) if x != 3]
        with pytest.raises(multiprocessing.TimeoutError):
            pool.map(hang_at_three, range(5), timeout=1)
        assert pool.starmap(hang_at_three, [(1,), (2,)], timeout=20) == [2, 4]


def test_next_still_has_a_timeout_of_its_own() -> None:
    with Pool(1) as pool:
        results = pool.imap(time.sleep, [2.0], timeout=30)
        with pytest.raises(multiprocessing.TimeoutError):
            results.next(timeout=0.01)
        assert results.next(timeout=30) is None


def test_others_go_on_beside_a_call_that_is_stopped(tmp_path: Path) -> None:
    with Pool(2, retries=0) as pool:
        late = pool.apply_async(spin, timeout=0.7)
        results = pool.map_async(slow_double, range(200), chunksize=1)
        assert results.get(30) == [2 * x for x in range(200)]
        with pytest.raises(multiprocessing.TimeoutError):
            late.get(30)


def test_a_limit_that_cannot_be_is_refused() -> None:
    with Pool(1) as pool:
        for timeout, error in ((0, ValueError), ("1", TypeError)):
            for call in (pool.apply_async, pool.map_async, pool.imap, pool.imap_unordered, pool.starmap_async):
                with pytest.raises(error):
                    call(double, [1], timeout=timeout)  # type: ignore[operator]


# --- retries after exceptions


def fail_once(path: str) -> str:
    if not Path(path).exists():
        Path(path).touch()
        raise OSError("the licence server is busy")
    return "done"


def test_exceptions_are_retried_where_the_pool_is_told_so(tmp_path: Path) -> None:
    with Pool(1, retry_exceptions=[OSError]) as pool:
        assert pool.apply(fail_once, (str(tmp_path / "1"),)) == "done"
        assert pool.map(fail_once, [str(tmp_path / "2"), str(tmp_path / "3")], chunksize=2) == ["done", "done"]
        with pytest.raises(ZeroDivisionError):
            pool.apply(divmod, (1, 0))


# --- stopping calls


def test_a_running_call_is_stopped_and_nothing_else(tmp_path: Path) -> None:
    with Pool(2) as pool:
        path = tmp_path / "started"
        running = pool.apply_async(touch_and_sleep, (str(path),))
        other = pool.apply_async(touch_and_sleep, (str(tmp_path / "other"), 1.0))
        wait_for(lambda: path.exists() and path.read_text() != "")
        pid = int(path.read_text())
        assert running.cancel() and running.cancelled()
        with pytest.raises(TaskCancelled):
            running.get(30)
        wait_for(lambda: not is_alive(pid))
        assert other.get(30) is None and not other.cancelled()
        assert not other.cancel(), "it was done"
        assert pool.map(double, range(10)) == [2 * x for x in range(10)]


def test_a_waiting_call_is_dropped(tmp_path: Path) -> None:
    with Pool(1) as pool:
        first = pool.apply_async(touch_and_wait, (str(tmp_path / "first"),))
        wait_for((tmp_path / "first").exists)
        second = pool.apply_async(touch_and_sleep, (str(tmp_path / "second"),))
        assert second.cancel()
        (tmp_path / "first").unlink()
        assert first.get(30) is None
        with pytest.raises(TaskCancelled):
            second.get(30)
        assert pool.apply(double, (4,)) == 8
    assert not (tmp_path / "second").exists()


def test_a_map_is_stopped_as_a_whole() -> None:
    with Pool(2) as pool:
        result = pool.map_async(time.sleep, [30] * 8, chunksize=1)
        assert result.cancel()
        with pytest.raises(TaskCancelled):
            result.get(30)
        assert pool.map(double, range(4)) == [0, 2, 4, 6]


# --- stragglers


def slow_first_time(folder: str, x: int) -> int:
    """Item 5 is slow where it is started first, as on a slow machine."""
    path = Path(folder, str(x))
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        Path(folder, f"{x}-again").touch()
        return 2 * x
    time.sleep(600 if x == 5 else 0.05)
    return 2 * x


def test_the_last_slow_call_is_started_again_where_that_is_safe(tmp_path: Path) -> None:
    with Pool(2, safe_to_repeat=True) as pool:
        results = pool.starmap(slow_first_time, [(str(tmp_path), x) for x in range(8)], chunksize=1)
        assert results == [2 * x for x in range(8)]
        assert (tmp_path / "5-again").exists()
        wait_for(lambda: len(pool._workers.living()) == 2)
        assert pool.map(double, range(4)) == [0, 2, 4, 6], "the pool is usable"


def big_second_time(folder: str, x: int) -> bytes:
    slow_first_time(folder, x)
    return bytes([x]) * 2_000_000


def test_a_stored_result_of_a_second_start_arrives(tmp_path: Path) -> None:
    with Pool(2, safe_to_repeat=True) as pool:
        arguments = [(str(tmp_path), x) for x in range(8)]
        found = pool.starmap(big_second_time, arguments, chunksize=1)
    assert [value == bytes([x]) * 2_000_000 for x, value in enumerate(found)] == [True] * 8
