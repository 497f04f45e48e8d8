"""What killed processes held of a lock that several nodes use comes free, and two never hold it."""

from __future__ import annotations

import multiprocessing as standard
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import clusterpool
from clusterpool import errors
from clusterpool.multiprocessing import BoundedSemaphore, Lock, Process, Semaphore, Value
from tests.cluster import clusters
from tests.cluster.clusters import Cluster

pytestmark = pytest.mark.cluster
LIMIT_S = 30


def take(lock: Any, ready: Path, count: int) -> None:
    for _ in range(count):
        lock.acquire()
    ready.touch()
    time.sleep(100)


@pytest.mark.parametrize("maker", [Lock, lambda: BoundedSemaphore(2), lambda: Semaphore(2)])
def test_a_killed_process_of_the_home_gives_back_what_it_held_before_the_move(
    three_nodes: Cluster, driver: None, maker: Any, tmp_path: Path
) -> None:
    lock = maker()
    count = lock._semlock.total
    holder = Process(target=take, args=(lock, tmp_path / "ready", count))
    holder.start()
    clusters.wait_for((tmp_path / "ready").exists, what="all is held")
    there = clusterpool.remote(num_cpus=0, scheduling=f"node:{three_nodes.second}")
    is_held = not clusterpool.get(there(lambda: lock.acquire(timeout=1)).remote(), timeout=LIMIT_S)
    waiting = there(lambda: [lock.acquire(timeout=15) for _ in range(count)]).remote()
    assert is_held
    holder.kill()
    assert clusterpool.get(waiting, timeout=LIMIT_S) == [True] * count


def test_a_killed_fork_gives_back_what_it_held_before_the_move(
    three_nodes: Cluster, driver: None, tmp_path: Path
) -> None:
    lock = Lock()
    holder = standard.get_context("fork").Process(target=take, args=(lock, tmp_path / "ready", 1))
    holder.start()
    clusters.wait_for((tmp_path / "ready").exists, what="the fork holds it")
    there = clusterpool.remote(num_cpus=0, scheduling=f"node:{three_nodes.second}")
    assert not clusterpool.get(there(lambda: lock.acquire(timeout=1)).remote(), timeout=LIMIT_S)
    waiting = there(lambda: lock.acquire(timeout=15)).remote()
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    assert clusterpool.get(waiting, timeout=LIMIT_S)
    holder.join()


def test_a_fork_is_told_that_a_lock_is_not_to_be_had_there_any_more(
    three_nodes: Cluster, driver: None, tmp_path: Path
) -> None:
    lock = Lock()
    there = clusterpool.remote(num_cpus=0, scheduling=f"node:{three_nodes.second}")
    waiter = standard.get_context("fork").Process(target=wait_and_tell, args=(lock, tmp_path / "told"))
    with lock:
        assert not clusterpool.get(there(lambda: lock.acquire(False)).remote(), timeout=LIMIT_S)
        waiter.start()
        clusters.wait_for((tmp_path / "told").exists, what="the fork hears of it")
    waiter.join()
    assert "is used on several nodes now" in (tmp_path / "told").read_text()


def wait_and_tell(lock: Any, told: Path) -> None:
    try:
        lock.acquire()
    except errors.NotConnected as exc:
        part = told.with_suffix(".part")
        part.write_text(str(exc))
        part.rename(told)


def is_really_inside(pid: int, folder: Path) -> bool:
    """Whether the process has the lock as well, and has not merely left its mark behind when it was killed.

    The kernel closes a dying process's sockets, whereupon its node gives back what it held, before it shows the process
    as dead. So what was killed counts only if it goes on all the same.
    """
    if not (folder / f"killed-{pid}").exists():
        return clusters.is_alive(pid)
    end_s = time.monotonic() + 2
    while clusters.is_alive(pid):
        if time.monotonic() > end_s:
            return True
        time.sleep(0.01)
    return False


def contend(lock: Any, value: Any, folder: Path, seed: int) -> None:
    """Enter and leave, and write down each number that was given to the value; two who are inside find one another."""
    chance = random.Random(seed)
    mark, mine = folder / "inside", folder / f"pid-{os.getpid()}"
    mine.touch()
    while not (folder / "stop").exists():
        with lock:
            try:
                fd = os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                other = int(mark.read_text() or 0)
                if is_really_inside(other, folder):
                    (folder / f"two-{os.getpid()}-{other}").touch()
                mark.unlink()
                continue
            os.write(fd, str(os.getpid()).encode())
            os.close(fd)
            value.value += 1
            number = value.value
            if chance.random() < 0.3:
                time.sleep(chance.random() * 0.01)
            mark.unlink()
        with open(folder / f"numbers-{os.getpid()}", "a") as file:
            file.write(f"{number}\n")


def test_kills_at_random_moments_on_three_nodes(three_nodes: Cluster, driver: None, tmp_path: Path) -> None:
    value = Value("q", 0)
    lock = value.get_lock()
    chance = random.Random(11)
    nodes = [three_nodes.head, three_nodes.second, three_nodes.third]

    def start(number: int) -> None:
        options = {"num_cpus": 0, "scheduling": f"node:{nodes[number % 3]}", "retries": 0}
        clusterpool.remote(**options)(contend).remote(lock, value, tmp_path, number)

    def count() -> int:
        return sum(path.read_text().count("\n") for path in tmp_path.glob("numbers-*"))

    def living() -> list[int]:
        pids = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
        return [pid for pid in pids if clusters.is_alive(pid)]

    for number in range(4):
        start(number)
    try:
        for number in range(8):
            before = count()
            clusters.wait_for(lambda: count() > before + 10, what=f"it goes round after {number} kills")
            time.sleep(chance.random() * 0.02)
            victim = chance.choice(living())
            (tmp_path / f"killed-{victim}").touch()
            os.kill(victim, signal.SIGKILL)
            start(4 + number)
    finally:
        (tmp_path / "stop").touch()
    clusters.wait_for(lambda: lock.acquire(timeout=1), what="it is free at last")
    lock.release()
    assert not list(tmp_path.glob("two-*")), "two processes were inside at once"
    numbers = [int(line) for path in tmp_path.glob("numbers-*") for line in path.read_text().split()]
    assert len(set(numbers)) == len(numbers), "a number that was released with the lock was forgotten"
