"""A process that is killed while it waits for a condition, an event or a barrier holds nobody up for long."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from clusterpool.multiprocessing import Barrier, Condition, Event, Lock, Process, Value
from tests.waiting import wait_for

# A second until somebody is missed, another for the count of those who live; the rest is for other tests beside this.
HELD_UP_S = 10.0


@pytest.fixture(scope="module", autouse=True)
def _cluster(cluster: None) -> None:
    """Of this module."""


@pytest.fixture
def started() -> Iterator[Callable[..., Any]]:
    """Start a process that is killed at last."""
    processes: list[Any] = []

    def start(target: Callable[..., None], *args: Any) -> Any:
        process = Process(target=target, args=args)
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


def sleepers(condition: Any) -> int:
    return int(condition._sleeping_count.get_value())


def sleep_in(condition: Any, woken: Any) -> None:
    with condition:
        condition.wait()
        woken.value += 1
    time.sleep(100)


def wait_at(event: Any, woken: Any) -> None:
    event.wait()
    with woken:
        woken.value += 1


def meet(barrier: Any, rounds: Any) -> None:
    while True:
        barrier.wait()
        with rounds:
            rounds.value += 1


def hold_condition(condition: Any, held: Any) -> None:
    condition.acquire()
    held.value = 1
    time.sleep(100)


@pytest.mark.parametrize("lock", [None, Lock])
def test_notify_all_wakes_the_living_and_does_not_wait_for_the_dead(started: Any, lock: Any) -> None:
    condition, woken = Condition(lock() if lock else None), Value("i", 0, lock=False)
    waiters = [started(sleep_in, condition, woken) for _ in range(3)]
    wait_for(lambda: sleepers(condition) == 3, "all wait")
    waiters[1].kill()
    waiters[1].join()
    before_s = time.monotonic()
    with condition:
        condition.notify_all()
        assert time.monotonic() - before_s < HELD_UP_S
        assert sleepers(condition) == 0
    wait_for(lambda: woken.value == 2, "the two that live")
    before_s = time.monotonic()
    with condition:
        condition.notify_all()
    assert time.monotonic() - before_s < 1.0, "the dead are missed once only"
    assert (condition._woken_count.get_value(), condition._wait_semaphore.get_value()) == (0, 0)


def test_a_notification_goes_to_one_that_lives(started: Any) -> None:
    condition, woken = Condition(), Value("i", 0, lock=False)
    waiters = [started(sleep_in, condition, woken) for _ in range(2)]
    wait_for(lambda: sleepers(condition) == 2, "both wait")
    waiters[0].kill()
    waiters[0].join()
    with condition:
        condition.notify()
    wait_for(lambda: woken.value == 1, "the one that lives")


def test_who_is_killed_with_the_condition_gives_it_back(started: Any) -> None:
    condition, held = Condition(), Value("i", 0, lock=False)
    holder = started(hold_condition, condition, held)
    wait_for(lambda: held.value, "it is held")
    holder.kill()
    assert condition.acquire(timeout=HELD_UP_S)
    condition.release()


def test_a_wait_that_times_out_leaves_nothing_behind() -> None:
    condition = Condition()
    with condition:
        assert condition.wait(0.01) is False
        assert sleepers(condition) == 0
        condition.notify_all()
        assert condition._wait_semaphore.get_value() == 0


def test_threads_of_one_process_wait_for_a_condition_of_a_plain_lock() -> None:
    condition, woken = Condition(Lock()), []

    def wait() -> None:
        with condition:
            woken.append(condition.wait(20))

    threads = [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: sleepers(condition) == 4, "all wait")
    for count in (1, 3, 4):
        with condition:
            condition.notify(1 if count != 3 else 2)
        wait_for(lambda: len(woken) == count, f"{count} are woken")
    assert woken == [True] * 4
    for thread in threads:
        thread.join()


def test_an_event_is_set_though_one_that_waited_is_dead(started: Any) -> None:
    event, woken = Event(), Value("i", 0)
    waiters = [started(wait_at, event, woken) for _ in range(2)]
    wait_for(lambda: sleepers(event._cond) == 2, "both wait")
    waiters[0].kill()
    waiters[0].join()
    before_s = time.monotonic()
    event.set()
    assert time.monotonic() - before_s < HELD_UP_S
    wait_for(lambda: woken.value == 1, "the one that lives")
    assert event.is_set()


def test_a_party_killed_at_a_barrier_breaks_it_by_the_others_timeout_and_not_for_ever(started: Any) -> None:
    barrier, rounds = Barrier(3), Value("i", 0)
    parties = [started(meet, barrier, rounds) for _ in range(2)]
    barrier.wait(20)
    wait_for(lambda: barrier.n_waiting == 2, "both are here again")
    parties[0].kill()
    parties[0].join()
    barrier.wait(20)  # it had come before it died
    # It has not left: this round must nevertheless end before the next begins, which lacks a party.
    with pytest.raises(threading.BrokenBarrierError):
        barrier.wait(7)
    parties[1].join(30)
    barrier.reset()
    parties = [started(meet, barrier, rounds) for _ in range(2)]
    barrier.wait(20)


def test_kills_at_random_moments_leave_a_condition_that_works(started: Any) -> None:
    condition, woken = Condition(), Value("i", 0, lock=False)
    chance = random.Random(3)
    waiters = [started(sleep_again, condition, woken) for _ in range(3)]
    for _ in range(6):
        time.sleep(chance.random() * 0.05)
        waiters.pop(chance.randrange(3)).kill()
        waiters.append(started(sleep_again, condition, woken))
        before = woken.value

        def is_heard() -> bool:
            with condition:
                condition.notify_all()
            return bool(woken.value > before + 3)

        wait_for(is_heard, "the living are woken")


def sleep_again(condition: Any, woken: Any) -> None:
    while True:
        with condition:
            condition.wait()
            woken.value += 1
