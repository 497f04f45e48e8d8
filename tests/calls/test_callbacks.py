"""The thread that runs callbacks."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from clusterpool.calls.callbacks import CallbackThread


def test_calls_run_in_order_in_one_other_thread() -> None:
    callbacks = CallbackThread("test")
    seen: list[tuple[int, int]] = []
    for number in range(100):
        callbacks.run(lambda number=number: seen.append((number, threading.get_ident())))
    callbacks.join()
    assert [number for number, _ in seen] == list(range(100))
    assert len({ident for _, ident in seen}) == 1
    assert seen[0][1] != threading.get_ident()


def test_an_error_is_reported_and_the_next_call_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", reported.append)
    callbacks = CallbackThread("test")
    ran: list[int] = []
    callbacks.run(lambda: 1 / 0)
    callbacks.run(lambda: ran.append(1))
    callbacks.join()
    assert ran == [1]
    assert [args.exc_type for args in reported] == [ZeroDivisionError]


def test_join_within_a_callback_returns() -> None:
    callbacks = CallbackThread("test")
    joined = threading.Event()

    def join() -> None:
        callbacks.join()
        joined.set()

    callbacks.run(join)
    assert joined.wait(30)


def test_thread_ends_with_its_owner() -> None:
    callbacks = CallbackThread("test")
    ident: list[threading.Thread] = []
    callbacks.run(lambda: ident.append(threading.current_thread()))
    callbacks.join()
    gone = weakref.ref(callbacks)
    del callbacks
    gc.collect()
    assert gone() is None
    ident[0].join(30)
    assert not ident[0].is_alive()


def test_no_thread_without_a_call() -> None:
    before = threading.active_count()
    callbacks = CallbackThread("test")
    callbacks.stop()
    callbacks.join()
    assert threading.active_count() == before
