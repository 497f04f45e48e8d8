"""What a killed process held of a lock or semaphore of one host comes free, and two never hold one lock."""

from __future__ import annotations

import gc
import multiprocessing as standard
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from clusterpool.multiprocessing import BoundedSemaphore, Lock, Process, RLock, Semaphore, Value
from tests.conftest import segment_names
from tests.waiting import wait_for

FREE_WITHIN_S = 5.0
# Where the time is not what is tested, beside other tests.
FREE_AT_LAST_S = 30.0
# How many kills of the long test; each costs a second or two, since somebody must have waited for long.
KILLS = 12


@pytest.fixture(scope="module", autouse=True)
def _cluster(cluster: None) -> None:
    """Of this module."""


def hold(lock: Any, ready: Path, count: int = 1) -> None:
    for _ in range(count):
        lock.acquire()
    ready.touch()
    time.sleep(100)


def take_and_end(lock: Any) -> None:
    lock.acquire()


def give(semaphore: Any) -> None:
    semaphore.release()


@pytest.mark.parametrize(
    ("maker", "within_s"),
    [
        pytest.param(Lock, FREE_WITHIN_S, marks=pytest.mark.alone),  # it measures time
        (RLock, FREE_AT_LAST_S),
        (lambda: BoundedSemaphore(1), FREE_AT_LAST_S),
        (lambda: Semaphore(1), FREE_AT_LAST_S),
    ],
)
def test_it_comes_free_when_its_holder_is_killed_and_not_before(maker: Any, within_s: float, tmp_path: Path) -> None:
    lock, ready = maker(), tmp_path / "ready"
    holder = Process(target=hold, args=(lock, ready))
    holder.start()
    wait_for(ready.exists, "the lock is held")
    assert not lock.acquire(timeout=2.5), "its holder lives"
    holder.kill()
    assert lock.acquire(timeout=within_s)
    assert not lock.acquire(False) or isinstance(lock, type(RLock()))
    lock.release()


def test_a_stopped_process_keeps_what_it_holds(tmp_path: Path) -> None:
    lock, ready = Lock(), tmp_path / "ready"
    holder = Process(target=hold, args=(lock, ready))
    holder.start()
    wait_for(ready.exists, "the lock is held")
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGSTOP)
    assert not lock.acquire(timeout=3)
    holder.kill()
    assert lock.acquire(timeout=FREE_AT_LAST_S)


def test_who_only_tries_finds_it_free_as_well(tmp_path: Path) -> None:
    lock, ready = Lock(), tmp_path / "ready"
    holder = Process(target=hold, args=(lock, ready))
    holder.start()
    wait_for(ready.exists, "the lock is held")
    holder.kill()
    wait_for(lambda: lock.acquire(False), "it is free", FREE_AT_LAST_S)


def test_all_tokens_of_a_dead_process_come_back(tmp_path: Path) -> None:
    semaphore, ready = BoundedSemaphore(3), tmp_path / "ready"
    holder = Process(target=hold, args=(semaphore, ready, 2))
    holder.start()
    wait_for(ready.exists, "two are held")
    assert semaphore.acquire(False)
    holder.kill()
    assert semaphore.acquire(timeout=FREE_AT_LAST_S) and semaphore.acquire(timeout=FREE_AT_LAST_S)
    assert semaphore.get_value() == 0
    for _ in range(3):
        semaphore.release()
    with pytest.raises(ValueError, match="too many"):
        semaphore.release()


def test_tokens_that_others_release_belong_to_nobody(tmp_path: Path) -> None:
    """A semaphore that tells of something: who has died after it took what it was told has taken it for good."""
    semaphore = Semaphore(1)
    giver = Process(target=give, args=(semaphore,))
    giver.start()
    giver.join()
    assert semaphore.get_value() == 2
    holder = Process(target=hold, args=(semaphore, tmp_path / "ready", 2))
    holder.start()
    wait_for((tmp_path / "ready").exists, "both are taken")
    holder.kill()
    holder.join()
    assert not semaphore.acquire(timeout=3)


def test_what_a_process_keeps_that_ends_in_order_stays_taken() -> None:
    """A producer that has taken places and filled them: they are free when somebody empties them."""
    places = Semaphore(2)
    producer = Process(target=take_and_end, args=(places,))
    producer.start()
    producer.join()
    assert places.acquire(timeout=20)
    assert not places.acquire(timeout=3)


def test_a_fork_of_this_process_is_counted_too(tmp_path: Path) -> None:
    context = standard.get_context("fork")
    lock, ready = Lock(), tmp_path / "ready"
    holder = context.Process(target=hold, args=(lock, ready))
    holder.start()
    wait_for(ready.exists, "the fork holds the lock")
    assert not lock.acquire(timeout=2.5)
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    # It is not waited for: what is left of it is a zombie.
    assert lock.acquire(timeout=FREE_AT_LAST_S)
    lock.release()
    holder.join()
    user = context.Process(target=use, args=(lock, tmp_path / "used"))
    user.start()
    user.join()
    assert (tmp_path / "used").exists() and lock.acquire(False)
    name = lock._semlock.name
    lock.release()
    del lock, holder, user
    gc.collect()
    assert not [segment for segment in segment_names() if name in segment]


def use(lock: Any, path: Path) -> None:
    with lock:
        path.touch()


def contend(lock: Any, guarded: Any, inside: Any, seed: int) -> None:
    """Take and give the lock at once and for ever; two who are inside find each other's mark."""
    chance = random.Random(seed)
    me = os.getpid()
    while True:
        with lock:
            inside.value = me
            guarded.value += 1
            if chance.random() < 0.3:
                time.sleep(chance.random() * 0.003)
            if inside.value != me:
                (Path(os.environ["CLUSTERPOOL_TEST_FOLDER"]) / f"two-{me}").touch()
        if chance.random() < 0.5:
            time.sleep(chance.random() * 0.003)


@pytest.mark.parametrize("maker", [Lock, RLock])
def test_kills_at_random_moments_leave_one_lock_with_one_holder(
    maker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLUSTERPOOL_TEST_FOLDER", str(tmp_path))
    lock, guarded, inside = maker(), Value("q", 0, lock=False), Value("q", 0, lock=False)
    chance = random.Random(7)

    def start(number: int) -> Any:
        process = Process(target=contend, args=(lock, guarded, inside, number))
        process.start()
        return process

    contenders = [start(number) for number in range(4)]
    try:
        for number in range(KILLS):
            before = guarded.value
            wait_for(lambda: guarded.value > before + 20, f"the lock goes round after {number} kills")
            time.sleep(chance.random() * 0.01)
            index = chance.randrange(len(contenders))
            contenders[index].kill()
            contenders[index].join()
            contenders[index] = start(100 + number)
    finally:
        for process in contenders:
            process.kill()
    assert lock.acquire(timeout=FREE_AT_LAST_S)
    assert not list(tmp_path.glob("two-*")), "two processes were inside at once"
