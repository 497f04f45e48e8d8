"""LeanFuture keeps every promise of the standard Future."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import gc
import itertools
import logging
import pickle
import sys
import threading
import weakref

import pytest

from clusterpool.client import future as future_module
from clusterpool.client.future import LeanFuture


class Handle:
    """The task of a future, as the engine would answer for it."""

    def __init__(self, *, cancels: bool = True, runs: bool = False) -> None:
        self.cancels, self.runs, self.asked = cancels, runs, []

    def cancel(self, number: int) -> bool:
        self.asked.append(number)
        return self.cancels

    def is_running(self, number: int) -> bool:
        return self.runs


def task_future(**kwargs) -> LeanFuture:
    future = LeanFuture()
    future._handle, future._task_number = Handle(**kwargs), 7
    return future


def in_thread(function, *args) -> threading.Thread:
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    return thread


@pytest.fixture(params=["plain", "task"])
def future(request) -> LeanFuture:
    return LeanFuture() if request.param == "plain" else task_future()


def test_a_new_future_has_no_attribute_of_its_own():
    future = LeanFuture()
    assert vars(future) == {}
    assert not future.done() and not future.cancelled() and not future.running()
    assert isinstance(future, concurrent.futures.Future)


def test_result_and_exception(future):
    assert future.finish(41, None)
    assert (future.result(), future.exception(), future.done()) == (41, None, True)
    failed = LeanFuture()
    failed.finish(None, KeyError("k"))
    with pytest.raises(KeyError):
        failed.result()
    assert isinstance(failed.exception(), KeyError)


def test_a_false_value_and_a_false_error_are_told_apart():
    class Empty(Exception):
        def __len__(self) -> int:
            return 0

    future = LeanFuture()
    future.finish(None, Empty())
    with pytest.raises(Empty):
        future.result()


def test_second_end_is_refused():
    future = LeanFuture()
    future.set_result(1)
    with pytest.raises(concurrent.futures.InvalidStateError):
        future.set_result(2)
    with pytest.raises(concurrent.futures.InvalidStateError):
        future.set_exception(ValueError())
    assert not future.finish(3, None)
    assert future.result() == 1


def test_finish_after_cancel_changes_nothing(future):
    assert future.cancel()
    assert not future.finish(1, None)
    assert future.cancelled() and future.done()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result(0)
    with pytest.raises(concurrent.futures.CancelledError):
        future.exception(0)


def test_result_times_out(future):
    for timeout in (0, -1, 0.01):
        with pytest.raises(concurrent.futures.TimeoutError):
            future.result(timeout)
        with pytest.raises(concurrent.futures.TimeoutError):
            future.exception(timeout)
    future.finish(5, None)
    assert future.result(0) == 5


def test_result_waits_for_another_thread(future):
    got = []
    waiter = in_thread(lambda: got.append(future.result(20)))
    while "_condition" not in vars(future):
        pass
    future.finish("late", None)
    waiter.join(20)
    assert got == ["late"]


def test_cancel_wakes_waiting_threads(future):
    errors = []

    def wait() -> None:
        try:
            future.result(20)
        except concurrent.futures.CancelledError as error:
            errors.append(error)

    waiter = in_thread(wait)
    while "_condition" not in vars(future):
        pass
    future.cancel()
    waiter.join(20)
    assert len(errors) == 1


def test_callbacks_run_once_in_order_and_their_errors_are_logged(future, caplog):
    seen = []

    def bad(_):
        raise ValueError("bad callback")

    future.add_done_callback(lambda f: seen.append(1))
    future.add_done_callback(bad)
    future.add_done_callback(lambda f: seen.append(2))
    with caplog.at_level(logging.ERROR, "concurrent.futures"):
        future.finish(0, None)
        future.add_done_callback(bad)
    future.add_done_callback(lambda f: seen.append(f is future))
    assert seen == [1, 2, True]
    assert caplog.text.count("bad callback") >= 2


def test_cancel_and_running_ask_the_task():
    running = task_future(cancels=False, runs=True)
    assert running.running() and not running.cancel() and not running.cancelled()
    waiting = task_future(cancels=True)
    seen = []
    waiting.add_done_callback(seen.append)
    assert not waiting.running()
    assert waiting.cancel() and waiting.cancelled() and waiting.cancel()
    assert seen == [waiting]
    assert waiting._handle.asked == [7]
    done = task_future(runs=True)
    done.finish(1, None)
    assert not done.running() and not done.cancel()
    assert done._handle.asked == []


def test_set_running_or_notify_cancel_as_the_standard_one():
    future = LeanFuture()
    assert future.set_running_or_notify_cancel()
    assert future.running() and not future.cancel()
    future.set_result(1)
    with pytest.raises(RuntimeError):
        future.set_running_or_notify_cancel()
    cancelled = LeanFuture()
    cancelled.cancel()
    assert not cancelled.set_running_or_notify_cancel()
    assert cancelled._state == "CANCELLED_AND_NOTIFIED"


@pytest.mark.parametrize("end", ["result", "error", "cancel"])
def test_repr_says_what_the_standard_one_says(end):
    lean, standard = LeanFuture(), concurrent.futures.Future()
    assert "state=pending" in repr(lean)
    for future in (lean, standard):
        if end == "result":
            future.set_result("x")
        elif end == "error":
            future.set_exception(ValueError())
        else:
            future.cancel()

    def tail(text: str) -> str:
        return text[text.index("state=") :]

    assert tail(repr(lean)) == tail(repr(standard))


def test_cannot_be_pickled_or_copied(future):
    for action in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot pickle"):
            action(future)


def test_standard_wait_and_as_completed():
    lean = [LeanFuture() for _ in range(4)]
    standard = concurrent.futures.Future()
    lean[0].finish(0, None)
    assert concurrent.futures.wait([*lean, standard], 0).done == {lean[0]}
    first = concurrent.futures.wait([*lean, standard], 5, concurrent.futures.FIRST_COMPLETED)
    assert first.done == {lean[0]}

    def finish_the_rest() -> None:
        lean[1].finish(1, None)
        lean[2].finish(None, ValueError())
        lean[3].cancel()
        lean[3].set_running_or_notify_cancel()
        standard.set_result(9)

    thread = in_thread(finish_the_rest)
    assert set(concurrent.futures.as_completed([*lean, standard], 20)) == {*lean, standard}
    thread.join()
    assert concurrent.futures.wait(lean, 5).not_done == set()


def test_first_exception_wait():
    futures = [task_future() for _ in range(3)]
    timer = threading.Timer(0.02, futures[1].finish, (None, ValueError()))
    timer.start()
    done = concurrent.futures.wait(futures, 20, concurrent.futures.FIRST_EXCEPTION).done
    assert done == {futures[1]}


def test_cancelled_task_counts_as_completed_at_once():
    future = task_future()
    timer = threading.Timer(0.02, future.cancel)
    timer.start()
    assert list(concurrent.futures.as_completed([future], 20)) == [future]


def test_await_and_wrap_future():
    async def main() -> list[object]:
        first, second, failed, done = LeanFuture(), task_future(), LeanFuture(), LeanFuture()
        done.finish("done", None)
        timer = threading.Timer(
            0.02, lambda: (first.finish(1, None), second.finish(2, None), failed.finish(None, KeyError("k")))
        )
        timer.start()
        values = [await asyncio.wait_for(first, 20), await asyncio.wrap_future(second), await done]
        with pytest.raises(KeyError):
            await failed
        return values

    assert asyncio.run(main()) == [1, 2, "done"]


def test_cancelling_an_asyncio_future_cancels_the_task():
    async def main() -> LeanFuture:
        future = task_future()
        wrapped = asyncio.wrap_future(future)
        wrapped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await wrapped
        return future

    assert asyncio.run(main()).cancelled()


def test_waits_of_tasks_go_through_the_hook(monkeypatch):
    calls = []

    def hook(predicate, timeout):
        calls.append(timeout)
        if len(calls) == 2:
            future.finish("hooked", None)
        return predicate()

    monkeypatch.setattr(future_module, "wait_hook", hook)
    future = task_future()
    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(-3)
    assert future.result() == "hooked"
    assert calls == [0, None]
    plain = LeanFuture()
    with pytest.raises(concurrent.futures.TimeoutError):
        plain.result(0)
    assert len(calls) == 2, "a future without a task must not wait for the client's messages"


def test_cancel_wakes_those_who_wait_in_the_hook(monkeypatch):
    woken = []
    monkeypatch.setattr(future_module, "wake_hook", lambda: woken.append(1))
    task_future().cancel()
    assert woken == [1]


def test_failed_result_leaves_no_cycle():
    future = LeanFuture()
    future.finish(None, ValueError())
    gone = weakref.ref(future)
    gc.disable()
    try:
        with pytest.raises(ValueError):
            future.result()
        del future
        assert gone() is None
    finally:
        gc.enable()


def interleave(make) -> int:
    """Try two actions against each other at every bytecode; the number of places tried.

    `make()` gives `first, second, check`. `first()` runs here, and before its n-th bytecode in `future.py`
    another thread runs `second()`, for n = 0, 1, ... until `first` has no more; where `first` holds the lock,
    `second` has to wait for it. After both, `check()`.
    """
    for place in itertools.count():
        first, second, check = make()
        bytecodes = itertools.count()
        threads: list[threading.Thread] = []

        def trace(frame, event, _, *, place=place, bytecodes=bytecodes, threads=threads, second=second):
            if frame.f_code.co_filename != future_module.__file__:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode" and next(bytecodes) == place:
                threads.append(in_thread(second))
                threads[0].join(0.01)
            return trace

        # Before `settrace`, or Python 3.12 counts no bytecodes in the first frame.
        sys._getframe().f_trace_opcodes = True
        sys.settrace(trace)
        try:
            first()
        finally:
            sys.settrace(None)
        if not threads:
            return place
        check(threads[0])
        threads[0].join(20)
        assert not threads[0].is_alive()
    raise AssertionError("unreachable")


@pytest.mark.parametrize("finish_first", [True, False])
def test_callback_runs_once_wherever_the_end_comes(finish_first):
    def make():
        future, calls = task_future(), []

        def finish():
            future.finish("v", None)

        def watch():
            future.add_done_callback(calls.append)

        def check(thread):
            thread.join(20)
            assert calls == [future]

        return (finish, watch, check) if finish_first else (watch, finish, check)

    assert interleave(make) > 20


def test_waiter_is_told_once_wherever_the_end_comes():
    def make():
        future, other, done = task_future(), task_future(), []

        def watch():
            done.append(concurrent.futures.wait([future, other], 20).done)

        def check(thread):
            assert not done, "the future was counted twice"
            other.finish("o", None)
            thread.join(20)
            assert done == [{future, other}]

        return lambda: future.finish("v", None), watch, check

    assert interleave(make) > 20


def test_result_is_there_wherever_the_end_comes():
    def make():
        future, got = task_future(), []

        def check(thread):
            thread.join(20)
            assert got == ["v"]

        return lambda: future.finish("v", None), lambda: got.append(future.result(20)), check

    assert interleave(make) > 20


@pytest.mark.parametrize("make_future", [LeanFuture, task_future])
def test_one_end_only_wherever_the_second_comes(make_future):
    def make():
        future, ends = make_future(), []

        def check(thread):
            thread.join(20)
            assert sorted(ends) == [False, True]
            assert future.done() and future.cancelled() == (future._state != "FINISHED")

        return (
            lambda: ends.append(future.finish("v", None)),
            lambda: ends.append(future.finish_cancelled()),
            check,
        )

    assert interleave(make) > 20


@pytest.fixture
def nervous_threads():
    """Threads change every few microseconds, so that races happen in a short test."""
    old = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(old)


@pytest.mark.parametrize("watch", ["result", "callback", "wait", "as_completed"])
def test_no_end_is_missed_or_told_twice_in_a_race(nervous_threads, watch):
    rounds = 400
    futures = [task_future() for _ in range(rounds)]
    start = threading.Barrier(2)

    def finish_all() -> None:
        for future in futures:
            start.wait()
            future.finish("v", None)

    finisher = in_thread(finish_all)
    for future in futures:
        calls: list[LeanFuture] = []
        other = task_future()
        start.wait()
        if watch == "result":
            assert future.result(20) == "v"
        elif watch == "callback":
            called = threading.Event()
            future.add_done_callback(calls.append)
            future.add_done_callback(lambda _, called=called: called.set())
            assert called.wait(20)
            assert calls == [future]
        elif watch == "wait":
            # Were `future` counted twice, this would not wait for `other`.
            timer = threading.Timer(0.0005, other.finish, ("o", None))
            timer.start()
            assert concurrent.futures.wait([future, other], 20).done == {future, other}
            assert other.done()
        else:
            timer = threading.Timer(0.0005, other.finish, ("o", None))
            timer.start()
            assert set(concurrent.futures.as_completed([future, other], 20)) == {future, other}
    finisher.join(20)


def test_cancel_and_finish_agree_on_one_end(nervous_threads):
    rounds = 1000
    futures = [LeanFuture() for _ in range(rounds)]
    start = threading.Barrier(2)
    finished = []

    def finish_all() -> None:
        for future in futures:
            start.wait()
            finished.append(future.finish("v", None))

    thread = in_thread(finish_all)
    cancelled = []
    for future in futures:
        start.wait()
        cancelled.append(future.cancel())
    thread.join(20)
    for future, was_finished, was_cancelled in zip(futures, finished, cancelled, strict=True):
        assert was_finished != was_cancelled
        assert future.cancelled() == was_cancelled
