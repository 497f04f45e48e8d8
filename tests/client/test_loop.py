"""The hand-over of the right to poll, with real threads; every wait has a limit, so that a lost wake-up fails."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest

from clusterpool.client.loop import HAND_BACK_S, Loop

LIMIT_S = 20.0  # far beyond anything but a hang


class Harness:
    """A loop whose messages are single bytes: each makes its number known."""

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.known: list[int] = [0] * 256  # how often each number came
        self.handlers: list[str] = []  # names of the threads that handled messages
        self.callbacks: list[Callable[[], Any]] = []
        self.taken: list[bool] = []
        self.loop = Loop(
            process=self.process, after_turn=self.deliver, next_wakeup_s=lambda: None, on_taken=self.taken.append
        )
        self.loop.add(self.near.fileno())

    def process(self, ready: list[tuple[int, int]]) -> None:
        for fd, _ in ready:
            assert fd == self.near.fileno()
            for number in self.near.recv(4096):
                self.known[number] += 1
                self.handlers.append(threading.current_thread().name)

    def deliver(self) -> None:
        while self.callbacks:
            self.callbacks.pop(0)()

    def send(self, *numbers: int) -> None:
        self.far.sendall(bytes(numbers))

    def wait_for(self, number: int, timeout_s: float | None = LIMIT_S) -> bool:
        return self.loop.wait_until(lambda: self.known[number] > 0, timeout_s)

    def wait_until_role_is_of(self, thread: threading.Thread) -> None:
        deadline_s = time.monotonic() + LIMIT_S
        while self.loop._role_ident != thread.ident:
            assert time.monotonic() < deadline_s, "it never took the role"
            time.sleep(0.001)

    def wait_until_thread_polls(self) -> None:
        self.loop.arm()
        self.wait_until_role_is_of(self.loop._thread)

    def close(self) -> None:
        self.loop.stop()
        self.near.close()
        self.far.close()


@pytest.fixture
def harness() -> Iterator[Harness]:
    """A loop with its I/O thread."""
    harness = Harness()
    harness.loop.start()
    yield harness
    harness.close()


class Threads:
    """Threads whose errors fail the test."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []

    def start(self, target: Callable[[], object], name: str = "user") -> threading.Thread:
        def run() -> None:
            try:
                target()
            except BaseException as exc:
                self.errors.append(exc)

        thread = threading.Thread(target=run, name=name, daemon=True)
        self.threads.append(thread)
        thread.start()
        return thread

    def join(self) -> None:
        deadline_s = time.monotonic() + LIMIT_S
        for thread in self.threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        assert not any(thread.is_alive() for thread in self.threads), "a thread was never woken"
        if self.errors:
            raise self.errors[0]


@pytest.fixture
def threads() -> Iterator[Threads]:
    """User threads, joined at the end."""
    threads = Threads()
    yield threads
    threads.join()


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true without anybody here turning the loop."""
    deadline_s = time.monotonic() + LIMIT_S
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.001)
    return condition()


# --- one thread


def test_what_is_true_already_needs_no_turn(harness: Harness) -> None:
    assert harness.loop.wait_until(lambda: True, 0.0)
    assert not harness.loop.wait_until(lambda: False, 0.0)


def test_the_waiting_thread_handles_its_message_itself(harness: Harness) -> None:
    harness.loop.wait_until(lambda: False, 0.01)  # from now on the role is not the I/O thread's
    harness.send(1)
    assert harness.wait_for(1)
    assert harness.handlers == [threading.current_thread().name]


def test_the_io_thread_handles_what_nobody_waits_for(harness: Harness) -> None:
    harness.loop.wait_until(lambda: False, 0.001)
    harness.send(1)
    assert eventually(lambda: harness.known[1] > 0)
    assert harness.handlers == ["clusterpool-io"]
    assert harness.taken[-1] is True


def test_a_wait_ends_at_its_time(harness: Harness) -> None:
    started_s = time.monotonic()
    assert not harness.wait_for(1, 0.05)
    assert 0.05 <= time.monotonic() - started_s < LIMIT_S / 2


@pytest.mark.parametrize("timeout_s", [9_999_999, 1e12, float("inf")])
def test_no_time_is_too_long(harness: Harness, threads: Threads, timeout_s: float) -> None:
    # `result.get(9999999)` is what programs write so that Ctrl-C works; epoll refuses more than 24 days.
    for number in (1, 2):  # one that polls and one that waits for the role
        threads.start(lambda number=number: harness.wait_for(number, timeout_s))  # type: ignore[misc]
    assert eventually(lambda: len(harness.loop._waiters) == 1)
    harness.send(1, 2)


def test_a_wait_within_a_callback_goes_on_turning(harness: Harness) -> None:
    outcome: list[bool] = []

    def callback() -> None:
        harness.send(2)
        outcome.append(harness.wait_for(2))

    harness.callbacks.append(callback)
    harness.send(1)
    assert harness.loop.wait_until(lambda: bool(outcome), LIMIT_S)
    assert outcome == [True]


def test_an_error_in_a_callback_reaches_the_waiter_and_leaves_the_role(harness: Harness) -> None:
    harness.loop.wait_until(lambda: False, 0.01)
    harness.callbacks.append(lambda: 1 / 0)
    harness.send(1)
    with pytest.raises(ZeroDivisionError):
        harness.loop.wait_until(lambda: False, LIMIT_S)
    harness.send(2)
    assert eventually(lambda: harness.known[2] > 0)


def test_an_error_in_the_io_thread_is_logged_and_does_not_end_it(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        harness.callbacks.append(lambda: 1 / 0)
        harness.send(1)
        assert eventually(lambda: "ZeroDivisionError" in caplog.text)
    harness.send(2)
    assert eventually(lambda: harness.known[2] > 0)


# --- several threads


def test_every_one_of_many_waiters_gets_its_message(harness: Harness, threads: Threads) -> None:
    for number in range(40):
        threads.start(lambda number=number: harness.wait_for(number, None))  # type: ignore[misc]
    numbers = list(range(40))
    Random(1).shuffle(numbers)
    for number in numbers:
        harness.send(number)
        time.sleep(0.0005)


def test_a_waiter_that_is_served_with_the_leader_does_not_strand_the_next(harness: Harness, threads: Threads) -> None:
    # The leader wakes only the first waiter when it leaves, and that one may be going as well.
    for round_number in range(100):
        base = 3 * (round_number % 80)
        harness.known[base : base + 3] = [0, 0, 0]
        started = [threads.start(lambda n=base + offset: harness.wait_for(n, None)) for offset in (0, 1, 2)]  # type: ignore[misc]
        assert eventually(lambda: len(harness.loop._waiters) == 2)
        harness.send(base, base + 1)
        harness.send(base + 2)
        for thread in started:
            thread.join(LIMIT_S)
            assert not thread.is_alive(), f"stranded in round {round_number}"


def test_the_io_thread_takes_over_when_the_waiter_it_made_way_for_has_gone(harness: Harness) -> None:
    for number in range(200):
        # A wait that is over at about the time at which the I/O thread hands the role over.
        harness.loop.wait_until(lambda: False, 0.0001 * (number % 5))
        if number % 4 == 0:
            time.sleep(2 * HAND_BACK_S)  # so that the I/O thread polls again
        harness.send(number)
        assert eventually(lambda number=number: harness.known[number] > 0), f"nobody polls after wait {number}"  # type: ignore[misc]


def test_a_waiter_whose_predicate_raises_passes_the_role_on(harness: Harness, threads: Threads) -> None:
    is_broken = threading.Event()

    def predicate() -> bool:
        if is_broken.is_set():
            raise LookupError("broken")
        return False

    leader = threads.start(lambda: harness.wait_for(1, None), "leader")
    assert eventually(lambda: harness.loop._role_ident == leader.ident)

    def broken() -> None:
        with pytest.raises(LookupError):
            harness.loop.wait_until(predicate, None)

    threads.start(broken, "broken")
    assert eventually(lambda: len(harness.loop._waiters) == 1)
    threads.start(lambda: harness.wait_for(2, None), "last")
    assert eventually(lambda: len(harness.loop._waiters) == 2)
    is_broken.set()
    harness.send(1)  # the leader goes, and leaves the role to the broken one
    harness.send(2)


def test_the_leader_wakes_those_whose_predicates_came_true_by_a_callback(harness: Harness, threads: Threads) -> None:
    flags = {"done": False}
    leader = threads.start(lambda: harness.wait_for(1, None), "leader")
    assert eventually(lambda: harness.loop._role_ident == leader.ident)
    waiter = threads.start(lambda: harness.loop.wait_until(lambda: flags["done"], None), "waiter")
    assert eventually(lambda: len(harness.loop._waiters) == 1)
    harness.callbacks.append(lambda: flags.update(done=True))
    harness.loop.kick()
    waiter.join(LIMIT_S)
    assert not waiter.is_alive()
    assert leader.is_alive()
    harness.send(1)


@pytest.mark.parametrize("seed", range(6))
def test_stress_of_waits_with_and_without_limits(harness: Harness, threads: Threads, seed: int) -> None:
    """Each thread sends itself messages and waits for them, now with a short limit, now without."""
    rounds, count = 150, 6
    received = [0] * count

    def user(number: int) -> None:
        random = Random(seed * 100 + number)
        for round_number in range(1, rounds + 1):
            if random.random() < 0.3:
                harness.loop.wait_until(lambda: False, random.choice([0.0, 0.0001, 0.001]))
            harness.send(number)
            if random.random() < 0.5:
                harness.loop.kick_poller()
            while not harness.loop.wait_until(
                lambda wanted=round_number: harness.known[number] >= wanted,  # type: ignore[misc]
                random.choice([None, LIMIT_S, 0.0002]),
            ):
                pass
            if random.random() < 0.1:
                time.sleep(0.0005)
            received[number] = round_number

    for number in range(count):
        threads.start(lambda number=number: user(number))  # type: ignore[misc]
    threads.join()
    assert received == [rounds] * count
    harness.send(200)
    assert eventually(lambda: harness.known[200] > 0), "nobody polls any more"


# --- the end


def test_stopping_wakes_all_waiters(threads: Threads) -> None:
    harness = Harness()
    harness.loop.start()
    outcomes: list[bool] = []
    for number in range(5):
        threads.start(lambda number=number: outcomes.append(harness.wait_for(number, None)))  # type: ignore[misc]
    assert eventually(lambda: len(harness.loop._waiters) == 4)
    harness.close()
    threads.join()
    assert outcomes == [False] * 5
    assert harness.loop.is_stopped
    assert not harness.wait_for(1, 0.1)
    harness.loop.stop()


def test_a_kick_after_the_end_writes_to_nobody_elses_file() -> None:
    harness = Harness()
    harness.loop.start()
    numbers = {harness.loop._kick_fd, harness.loop._timer_fd}
    harness.close()
    fds: list[int] = []
    while not numbers <= set(fds) and len(fds) < 50:
        fds.append(os.eventfd(0, os.EFD_NONBLOCK))
    harness.loop.kick()
    harness.loop.arm()
    for fd in fds:
        with pytest.raises(BlockingIOError):
            os.read(fd, 8)
        os.close(fd)


def test_a_busy_thread_handles_what_has_arrived_without_waiting_for_more(harness: Harness) -> None:
    harness.wait_until_thread_polls()
    harness.loop.turn_nowait()  # takes the role from the I/O thread, and returns though nothing comes
    harness.send(7)
    # Within the time for which the I/O thread leaves the role alone; later turns find the message handled by either.
    while not harness.known[7]:
        harness.loop.turn_nowait()
    assert harness.known[7] == 1


def test_a_turn_without_waiting_leaves_the_role_to_a_thread_that_waits(harness: Harness, threads: Threads) -> None:
    waiter = threads.start(lambda: harness.wait_for(9), name="waiter")
    harness.wait_until_role_is_of(waiter)
    harness.loop.turn_nowait()
    assert harness.loop._role_ident == waiter.ident
    harness.send(9)
    waiter.join(LIMIT_S)
    assert harness.handlers == ["waiter"]


def test_a_thread_that_turns_the_loop_for_a_while_stops_when_another_wants_to(
    harness: Harness, threads: Threads
) -> None:
    has_turned = threading.Event()

    def turn() -> None:
        while not has_turned.is_set():  # it does not wait for an I/O thread that is in the middle of its turn
            harness.loop.turn_for(lambda: bool(has_turned.set()), LIMIT_S)

    turning = threads.start(turn, name="turning")
    harness.wait_until_role_is_of(turning)
    waiter = threads.start(lambda: harness.wait_for(3), name="waiter")
    assert eventually(lambda: bool(harness.loop._waiters))
    harness.send(4)  # any message lets it look
    turning.join(LIMIT_S)
    assert not turning.is_alive()
    harness.send(3)
    waiter.join(LIMIT_S)
    assert harness.known[3] == 1


def test_a_thread_turns_the_loop_until_it_has_something_to_do(harness: Harness) -> None:
    me = threading.current_thread().name
    for sent in range(1, 100):
        harness.send(5)
        harness.loop.turn_for(lambda sent=sent: harness.known[5] == sent, LIMIT_S)
        # The I/O thread may have been in the middle of its turn; then it handles the message.
        assert eventually(lambda sent=sent: harness.known[5] == sent)
        if me in harness.handlers:
            break
    assert me in harness.handlers


def test_a_loop_that_stays_awake_handles_the_same_messages(harness: Harness, threads: Threads) -> None:
    harness.loop.stays_awake = True
    for number in range(1, 200):
        threads.start(lambda number=number: harness.send(number))
        assert harness.wait_for(number)
    assert harness.known[1:200] == [1] * 199
    assert not harness.wait_for(200, 0.01)  # with nothing to come it sleeps until the time is over


def test_one_who_leaves_often_does_not_keep_the_io_thread_from_its_turn_for_ever(harness: Harness) -> None:
    # Each leaves a timer, or one that another has armed a moment ago: whichever it was must still expire.
    for _ in range(50):
        harness.loop.turn_nowait()
    harness.send(7)
    assert eventually(lambda: harness.known[7] == 1), "nobody polls any more"
