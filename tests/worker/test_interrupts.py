"""Where an interrupt may hit a worker's main thread; with real signals."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from clusterpool.client import frames
from clusterpool.core.messages import Address
from clusterpool.worker import calls, interrupts
from clusterpool.worker.interrupts import Interrupted, Interrupts, Key

OWNER = Address("n1", "d1")
KEY, OTHER = Key(OWNER, 1), Key(OWNER, 2)


@pytest.fixture
def interrupter() -> Iterator[Interrupts]:
    before = signal.getsignal(signal.SIGINT)
    yield Interrupts(calls.USER_CODE_CALLERS)
    signal.signal(signal.SIGINT, before)


def later(seconds: float, function: Callable[..., Any], *args: Any) -> None:
    timer = threading.Timer(seconds, function, args)
    timer.daemon = True
    timer.start()


def run(function: Callable[[], Any]) -> Any:
    """As a worker calls the user's functions."""
    return calls._call(function, (), {})


def test_the_running_task_is_interrupted(interrupter: Interrupts) -> None:
    interrupter.current = KEY
    later(0.05, interrupter.ask, KEY)
    started_s = time.monotonic()
    with pytest.raises(Interrupted):
        run(lambda: time.sleep(10))
    assert time.monotonic() - started_s < 5
    assert isinstance(Interrupted(), KeyboardInterrupt)  # so that the user's `except Exception` lets it pass


def test_another_task_is_not(interrupter: Interrupts) -> None:
    interrupter.current = KEY
    has_asked = threading.Event()

    def ask_for_another() -> None:
        interrupter.ask(OTHER)
        signal.raise_signal(signal.SIGINT)
        has_asked.set()

    def user() -> None:
        assert has_asked.wait(20)
        time.sleep(0.05)

    later(0.02, ask_for_another)
    run(user)
    assert interrupter.take(OTHER)


def test_nothing_happens_between_tasks(interrupter: Interrupts) -> None:
    interrupter.ask(KEY)
    signal.raise_signal(signal.SIGINT)
    time.sleep(0.01)
    assert interrupter.take(KEY) and not interrupter.take(KEY)


def test_our_own_code_is_left_alone_until_it_is_done(interrupter: Interrupts, monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[str] = []
    names: dict[str, Any] = {"reached": reached}
    code = "import time\ndef ours():\n    time.sleep(0.05)\n    reached.append('end of ours')\n"
    exec(compile(code, "/the/client/code.py", "exec"), names)
    monkeypatch.setattr(frames, "_OURS", ("/the/client/",))
    interrupter.current = KEY
    later(0.01, interrupter.ask, KEY)

    def user() -> None:
        names["ours"]()
        for _ in range(1000):
            time.sleep(0.005)
        reached.append("end of the user's")

    with pytest.raises(Interrupted):
        run(user)
    assert reached == ["end of ours"]


def test_a_task_that_ends_meanwhile_is_not_interrupted(interrupter: Interrupts) -> None:
    interrupter.current = KEY
    interrupter.ask(KEY)  # falls into our own code: it is tried again later
    interrupter.current = None
    interrupter.forget(KEY)
    time.sleep(0.05)
    interrupter.current = KEY
    run(lambda: time.sleep(0.05))


def test_cancels_that_come_too_late_do_not_gather(interrupter: Interrupts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "WANTED_MAX", 10)
    for number in range(100):
        interrupter.ask(Key(OWNER, number))
    assert not interrupter.take(Key(OWNER, 0)) and interrupter.take(Key(OWNER, 99))
