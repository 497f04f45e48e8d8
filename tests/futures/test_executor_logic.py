"""What the executor does with its futures and its group, on a group of threads."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import gc
import itertools
import operator
import pickle
import threading
import time
import weakref
from pickle import PicklingError

import cloudpickle
import pytest
from fake_group import Killed, wait_until

import clusterpool.futures
from clusterpool import errors
from clusterpool.calls.worker_setup import set_up_worker
from clusterpool.futures import ProcessPoolExecutor, pool_state
from clusterpool.futures.process import BrokenProcessPool

pytestmark = pytest.mark.usefixtures("fake")


def die(*_):
    raise Killed


def raise_(error):
    raise error


@pytest.fixture
def executor():
    with ProcessPoolExecutor(2) as executor:
        yield executor


# ------------------------------------------------------------------ the module


def test_module_offers_the_names_of_the_standard_one():
    names = set(concurrent.futures.__all__) - {"InterpreterPoolExecutor"}
    assert names <= set(clusterpool.futures.__all__)
    for name in names - {"ProcessPoolExecutor"}:
        assert getattr(clusterpool.futures, name) is getattr(concurrent.futures, name)
    assert clusterpool.futures.process.BrokenProcessPool is concurrent.futures.process.BrokenProcessPool
    assert clusterpool.futures.thread.ThreadPoolExecutor is concurrent.futures.ThreadPoolExecutor
    with pytest.raises(AttributeError):
        clusterpool.futures.nothing


class Owner:
    def __init__(self, executor):
        self.executor = executor

    def method(self):
        return 1


class LeavesItOut(ProcessPoolExecutor):
    def __getstate__(self):
        return {}


def test_an_executor_cannot_be_pickled_and_says_so(executor):
    for attempt in (executor, Owner(executor).method, executor.options(retries=1)):
        with pytest.raises(TypeError, match="cannot pickle 'ProcessPoolExecutor' object: an executor can be no arg"):
            cloudpickle.dumps(attempt)
    with pytest.raises(TypeError, match="cannot pickle 'ProcessPoolExecutor' object"):
        pickle.dumps(executor)
    assert type(pickle.loads(pickle.dumps(LeavesItOut()))) is LeavesItOut


# ------------------------------------------------------------------ submit


def test_submit_gives_a_future_with_the_result(executor):
    future = executor.submit(pow, 2, 10)
    assert isinstance(future, concurrent.futures.Future)
    assert future.result(30) == 1024
    assert executor.submit(int, "x").exception(10).args


def test_every_keyword_belongs_to_the_call(executor):
    def call(*args, **kwargs):
        return args, kwargs

    words = dict.fromkeys(["self", "fn", "retries", "timeout", "resources", "sink", "index", "key"], 1)
    assert executor.submit(call, 1, **words).result(30) == ((1,), words)
    assert executor.options(retries=1).submit(call, **words).result(30) == ((), words)


def test_nothing_starts_before_the_first_call(fake):
    with ProcessPoolExecutor(2) as executor:
        assert not fake and executor._processes == {}
        executor.submit(int)
        assert len(fake) == 1
    ProcessPoolExecutor(2).shutdown()
    assert len(fake) == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"max_workers": 0}, ValueError),
        ({"max_workers": -1}, ValueError),
        ({"initializer": 5}, TypeError),
        ({"max_tasks_per_child": 0}, ValueError),
        ({"max_tasks_per_child": 1.5}, TypeError),
        ({"retries": -1}, ValueError),
        ({"retries": "2"}, TypeError),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, error):
    with pytest.raises(error):
        ProcessPoolExecutor(**arguments)


def test_max_tasks_with_the_fork_method_is_refused_as_there():
    import multiprocessing

    with pytest.raises(ValueError, match="incompatible"):
        ProcessPoolExecutor(1, multiprocessing.get_context("fork"), max_tasks_per_child=2)
    ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=2)


def test_max_workers_is_readable_before_and_after_the_start():
    with ProcessPoolExecutor() as executor:
        assert executor._max_workers == 3  # what the fake cluster has
    assert ProcessPoolExecutor(7)._max_workers == 7


def test_cancel_and_running_tell_the_truth(executor, fake):
    started, go_on = threading.Event(), threading.Event()
    blockers = [executor.submit(lambda: (started.set(), go_on.wait(20))) for _ in range(2)]
    assert started.wait(30)
    assert wait_until(lambda: all(f.running() for f in blockers), 10)
    waiting = executor.submit(int)
    assert not waiting.running() and waiting.cancel() and waiting.cancelled()
    assert not blockers[0].cancel() and not blockers[0].cancelled()
    go_on.set()
    assert blockers[0].result(30)
    assert concurrent.futures.wait([*blockers, waiting], 10).not_done == set()


def test_unpicklable_result_is_a_type_error_and_a_pickling_error(executor):
    for expected in (TypeError, PicklingError, errors.SerializationFailed):
        with pytest.raises(expected, match="a lock"):
            executor.submit(raise_, errors.SerializationFailed("a lock cannot be pickled")).result(30)


# ------------------------------------------------------------------ broken pools


def test_a_dead_worker_breaks_the_pool_and_every_pending_call(executor, fake):
    executor.submit(int).result(30)
    fake[0].hold()
    futures = [executor.submit(die), *(executor.submit(int) for _ in range(50))]
    values = executor.map(str, range(5))
    fake[0].release()
    for future in futures:
        error = future.exception(10)
        # Some of the 50 may have run on the other worker before the first died.
        assert error is None or isinstance(error, BrokenProcessPool)
    error = futures[0].exception(10)
    assert "signal 9" in str(error) and "node n1" in str(error)
    assert isinstance(error.__cause__, errors.WorkerDied)
    with pytest.raises(BrokenProcessPool):
        executor.submit(int)
    with pytest.raises(BrokenProcessPool):
        executor.map(int, [1])
    with pytest.raises(BrokenProcessPool):
        list(values)
        raise BrokenProcessPool  # the map may just have got through
    assert executor._broken and fake[0].terminated


def test_dead_worker_with_retries_is_replaced_and_only_its_call_fails(fake):
    with ProcessPoolExecutor(1, retries=2) as executor:
        attempts = itertools.count()
        assert executor.submit(lambda: die() if next(attempts) < 2 else "third").result(30) == "third"
        with pytest.raises(BrokenProcessPool, match="every attempt"):
            executor.submit(die).result(30)
        assert executor.submit(int, 5).result(30) == 5
        assert not executor._broken


def test_a_view_with_retries_runs_its_calls_again(fake):
    with ProcessPoolExecutor(1) as executor:
        attempts = itertools.count()
        view = executor.options(retries=1)
        assert view.submit(lambda: die() if next(attempts) < 1 else "again").result(30) == "again"
        assert list(view.map(abs, [-1])) == [1]
        assert executor.submit(int).result(30) == 0
    assert len(fake) == 1
    with pytest.raises(RuntimeError):
        view.submit(int)


def test_a_failing_initializer_breaks_the_pool(fake):
    executor = ProcessPoolExecutor(1, initializer=raise_, initargs=(OSError("no license"),), retries=3)
    future = None
    try:
        future = executor.submit(int)
    except BrokenProcessPool:
        pass
    if future is not None:
        assert isinstance(future.exception(10), BrokenProcessPool)
    with pytest.raises(BrokenProcessPool, match="no license") as caught:
        executor.submit(int)
    assert isinstance(caught.value.__cause__, OSError)
    executor.shutdown()


def test_initializer_runs_before_tasks_and_its_failure_is_logged(caplog):
    done = []
    with ProcessPoolExecutor(1, initializer=done.append, initargs=("ready",)) as executor:
        assert executor.submit(done.copy).result(30) == ["ready"]
    with pytest.raises(OSError):
        set_up_worker(raise_, (OSError("no license"),))
    assert "Exception in initializer:" in caplog.text


# ------------------------------------------------------------------ map


def test_map_keeps_order_and_takes_any_number_of_iterables(executor):
    assert list(executor.map(operator.neg, range(100))) == [-i for i in range(100)]
    assert list(executor.map(pow, [2, 3, 4], [5, 2])) == [32, 9]
    assert list(executor.map(pow, range(50), itertools.repeat(2), chunksize=7)) == [i * i for i in range(50)]
    assert list(executor.map(int)) == []
    assert list(executor.map(int, [])) == []


@pytest.mark.parametrize("chunksize", [1, 3])
@pytest.mark.parametrize("buffersize", [None, 2])
def test_map_raises_in_its_place_and_cancels_the_rest(fake, chunksize, buffersize):
    with ProcessPoolExecutor(1) as executor:
        values = executor.map(lambda x: 6 // (3 - x), range(9), chunksize=chunksize, buffersize=buffersize)
        got = []
        with pytest.raises(ZeroDivisionError):
            for value in values:
                got.append(value)
        assert got == [2, 3, 6]
        assert list(values) == []
        assert executor.submit(int).result(30) == 0


def test_map_that_failed_or_was_left_cancels_what_has_not_started(fake):
    seen = []

    def work(i):
        seen.append(i)
        time.sleep(0.002)
        return 1 // i

    with ProcessPoolExecutor(1) as executor:
        with pytest.raises(ZeroDivisionError):
            list(executor.map(work, range(1000)))
        assert wait_until(lambda: fake[0].pending() == 0, 10)
        values = executor.map(work, range(1, 1000))
        next(values)
        values.close()
    assert len(seen) < 500


def test_map_checks_its_arguments_at_the_call(executor):
    with pytest.raises(ValueError):
        executor.map(int, [], chunksize=0)
    with pytest.raises(ValueError):
        executor.map(int, [], buffersize=0)
    with pytest.raises(TypeError):
        executor.map(int, [], buffersize="2")
    with pytest.raises(TypeError):
        executor.map(int, 5)


def test_map_timeout_counts_from_the_call(executor):
    go_on = threading.Event()
    values = executor.map(lambda x: x or go_on.wait(20), [1, 0], timeout=0.2)
    assert next(values) == 1
    with pytest.raises(concurrent.futures.TimeoutError):
        next(values)
    go_on.set()


def test_map_without_reading_still_runs_everything(fake):
    seen = []
    with ProcessPoolExecutor(2) as executor:
        executor.map(seen.append, range(10))
    assert sorted(seen) == list(range(10))


def test_lazy_map_reads_no_further_than_its_buffer():
    numbers = itertools.count()
    with ProcessPoolExecutor(2) as executor:
        values = executor.map(abs, numbers, buffersize=4)
        assert next(numbers) == 4
        assert next(values) == 0
        assert next(numbers) == 6  # one more was sent when the first was asked for
        values.close()


def test_lazy_map_keeps_its_executor():
    def values():
        return ProcessPoolExecutor(2).map(abs, range(30), buffersize=2)

    generator = values()
    gc.collect()
    assert list(generator) == list(range(30))


def test_error_of_the_input_is_raised(executor):
    def numbers():
        yield from range(5)
        raise LookupError("input")

    with pytest.raises(LookupError):
        executor.map(abs, numbers())
    values = executor.map(abs, numbers(), buffersize=2)
    got = []
    with pytest.raises(LookupError):
        for value in values:
            got.append(value)
    assert got == list(range(len(got)))


def test_map_lets_go_of_values_that_were_read(executor):
    class Thing:
        pass

    for thing in executor.map(lambda _: Thing(), range(5)):
        gone = weakref.ref(thing)
        del thing
        gc.collect()
        assert gone() is None


# ------------------------------------------------------------------ the end


def test_shutdown_refuses_new_calls_and_finishes_old_ones(fake):
    executor = ProcessPoolExecutor(1)
    futures = [executor.submit(time.sleep, 0.001) for _ in range(10)]
    executor.shutdown()
    assert all(f.done() for f in futures) and not fake[0].living
    for call in (
        lambda: executor.submit(int),
        lambda: executor.map(int, [1]),
        lambda: executor.options(retries=1).submit(int),
    ):
        with pytest.raises(RuntimeError, match="after shutdown"):
            call()
    executor.shutdown()
    assert executor._processes is None and executor._shutdown_thread


def test_shutdown_without_a_call_then_submit():
    executor = ProcessPoolExecutor(1)
    executor.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(int)


def test_shutdown_cancels_what_has_not_started(fake):
    executor = ProcessPoolExecutor(1)
    go_on = threading.Event()
    first = executor.submit(go_on.wait, 20)
    assert wait_until(first.running, 10)
    rest = [executor.submit(int) for _ in range(5)]
    values = executor.map(abs, range(5))
    timer = threading.Timer(0.05, go_on.set)
    timer.start()
    executor.shutdown(cancel_futures=True)
    assert first.result(0) is True
    assert all(f.cancelled() for f in rest)
    with pytest.raises(concurrent.futures.CancelledError):
        next(values)


def test_shutdown_waits_for_callbacks():
    seen = []
    executor = ProcessPoolExecutor(1)
    go_on = threading.Event()
    future = executor.submit(go_on.wait, 20)
    future.add_done_callback(lambda f: (time.sleep(0.05), seen.append(f)))
    go_on.set()
    executor.shutdown()
    assert seen == [future]


def test_shutdown_inside_a_callback_is_refused_instead_of_hanging():
    executor = ProcessPoolExecutor(1)
    caught = []

    def callback(_):
        try:
            executor.shutdown()
        except RuntimeError as error:
            caught.append(str(error))

    go_on = threading.Event()
    executor.submit(go_on.wait, 20).add_done_callback(callback)
    go_on.set()
    assert wait_until(lambda: caught, 10)
    assert "cannot join current thread" in caught[0]
    executor.shutdown()


def test_dropped_executor_finishes_its_calls_and_ends_its_workers(fake):
    executor = ProcessPoolExecutor(1)
    fake_executor = weakref.ref(executor)
    executor.submit(int).result(30)
    fake[0].hold()
    futures = [executor.submit(int, i) for i in range(5)]
    del executor
    gc.collect()
    assert fake_executor() is None
    fake[0].release()
    assert [f.result(30) for f in futures] == list(range(5))
    assert wait_until(lambda: fake[0].closed and not fake[0].living, 10)


def test_interpreter_exit_awaits_pending_calls(fake, monkeypatch):
    executor = ProcessPoolExecutor(1)
    future = executor.submit(time.sleep, 0.05)
    monkeypatch.setattr(pool_state, "_live", weakref.WeakSet([executor._pool]))
    monkeypatch.setattr(pool_state, "_exiting", False)
    pool_state.await_pending_at_exit()
    assert future.done() and not fake[0].living
    fresh = ProcessPoolExecutor(1)
    with pytest.raises(RuntimeError, match="after interpreter shutdown"):
        fresh.submit(int)


def test_what_was_submitted_before_the_interpreters_end_is_awaited_and_no_more(executor, fake):
    future = executor.submit(int)
    executor.map(int, range(3))  # its results are never taken
    taken = executor.map(int, range(3))
    assert [next(taken), next(taken)] == [0, 1]
    executor._pool.wait_submitted()
    assert future.done() and fake[0].pending() == 0
    fake[0].hold()
    results = executor.map(int, range(3))
    waiter = threading.Thread(target=executor._pool.wait_submitted)
    waiter.start()
    waiter.join(0.05)
    assert waiter.is_alive()
    fake[0].release()
    waiter.join(30)
    assert not waiter.is_alive() and list(results) == [0, 1, 2]


def test_kill_workers_breaks_running_calls_and_cancels_waiting_ones(fake):
    executor = ProcessPoolExecutor(1)
    go_on = threading.Event()
    running = executor.submit(go_on.wait, 20)
    assert wait_until(running.running, 10)
    waiting = executor.submit(int)
    executor.kill_workers()
    assert isinstance(running.exception(10), BrokenProcessPool) and waiting.cancelled()
    with pytest.raises(RuntimeError):
        executor.submit(int)
    go_on.set()
    ProcessPoolExecutor(1).kill_workers()
    ProcessPoolExecutor(1).terminate_workers()


def test_processes_can_be_read(executor, fake):
    executor.submit(int).result(30)
    processes = executor._processes
    assert len(processes) == 2
    for pid, process in processes.items():
        assert process.pid == pid and process.is_alive() and process.exitcode is None
    executor.shutdown()
    for process in processes.values():
        process.join(30)
        assert not process.is_alive() and process.exitcode == 0


def test_exit_code_of_a_killed_worker():
    with ProcessPoolExecutor(1, retries=1) as executor:
        executor.submit(int).result(30)
        (process,) = executor._processes.values()
        with pytest.raises(BrokenProcessPool):
            executor.options(retries=0).submit(die).result(30)
        assert process.exitcode == -9


def test_options_with_resources_has_workers_of_its_own(fake):
    with ProcessPoolExecutor(2) as executor:
        gpu = executor.options(resources={"GPU": 1}, retries=4)
        assert gpu.submit(int, 3).result(30) == 3
        assert executor.submit(int).result(30) == 0
        assert fake[0].options["resources"] == {"GPU": 1} and fake[0].retries == 4
        assert fake[1].options["resources"] == {} and fake[1].retries is None
    assert not fake[0].living and not fake[1].living


def test_asyncio_runs_in_the_executor(executor):
    import asyncio

    async def main():
        loop = asyncio.get_running_loop()
        one = await loop.run_in_executor(executor, pow, 2, 5)
        return one, await executor.submit(int, 7), await asyncio.wrap_future(executor.submit(int, 8))

    assert asyncio.run(main()) == (32, 7, 8)


def test_many_threads_submit_at_once(fake):
    with ProcessPoolExecutor(2) as executor:
        results = []

        def work(base):
            futures = [executor.submit(int, base + i) for i in range(200)]
            results.append([f.result(20) for f in futures] == list(range(base, base + 200)))

        threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert results == [True] * 4
    assert len(fake) == 1, "one group, however many threads make the first call"
