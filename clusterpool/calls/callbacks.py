"""The thread that runs a pool's callbacks, so that user code never runs in the client's loop."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any


class CallbackThread:
    """Runs callables one after another in a thread that starts with the first of them.

    The standard library runs callbacks in the thread that handles results, where one that blocks or raises
    stops the whole pool. Here one that blocks only delays other callbacks, and one that raises is reported as
    any thread's error is.

    From Python 3.12 on, no thread can start once the interpreter has begun to end: what is queued only then runs in the
    thread that waits for it by `join`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_too_late = False

    def start(self) -> None:
        """Start the thread before there is a call for it: at the interpreter's end it could not."""
        if self._thread is None:
            self._start()

    def run(self, call: Callable[[], Any]) -> None:
        """Queue `call`; returns at once. From any thread."""
        self._calls.put(call)
        if self._thread is None:
            self._start()

    def stop(self) -> None:
        """End the thread after the calls that are queued now."""
        with self._lock:
            if self._thread is not None:
                self._calls.put(None)
                self._thread = None

    def join(self, timeout_s: float | None = None) -> None:
        """Wait, `timeout_s` at the most, until the calls queued so far have run; at once from within a callback."""
        thread = self._thread
        if thread is None and self._is_too_late:
            self._run_queued()
        if thread is None or thread is threading.current_thread():
            return
        are_done = threading.Event()
        self._calls.put(are_done.set)
        are_done.wait(timeout_s)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                # Not a bound method as target: the thread must not keep this object, hence its pool, alive.
                thread = threading.Thread(target=_run_calls, args=(self._calls,), name=self._name, daemon=True)
                try:
                    thread.start()
                except RuntimeError as exc:
                    if "interpreter shutdown" not in str(exc):
                        raise
                    self._is_too_late = True
                    return
                self._thread = thread

    def _run_queued(self) -> None:
        while not self._calls.empty():
            call = self._calls.get()
            if call is not None:
                _run_call(call)

    def __del__(self) -> None:
        self._calls.put(None)


def report_callback_error() -> None:
    """Show the exception now handled as the error of this thread."""
    kind, error, traceback = sys.exc_info()
    assert kind is not None, "called outside an except block"
    threading.excepthook(threading.ExceptHookArgs((kind, error, traceback, threading.current_thread())))


def _run_calls(calls: queue.SimpleQueue[Callable[[], Any] | None]) -> None:
    from clusterpool.calls import waiting  # late, because it loads the client

    # Callbacks that come one upon another (joblib's, each of which submits the next batch) are fetched by this thread
    # itself, for it turns the client's loop in between: a hop from thread to thread costs more than a tiny callback.
    is_busy = False
    while True:
        if calls.empty():
            idle_s = monotonic()
            if is_busy:
                waiting.turn_for_soon(lambda: not calls.empty())
            call = calls.get()
            is_busy = monotonic() - idle_s < waiting.SOON_S
        else:
            call = calls.get()
            is_busy = True
        if call is None:
            return
        _run_call(call)
        del call  # else the last result would stay alive until the next one


def _run_call(call: Callable[[], Any]) -> None:
    try:
        call()
    except BaseException:  # The border to user code: a callback's error must not end the other callbacks.
        report_callback_error()
