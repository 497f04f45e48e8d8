"""What contenders of the same shape share: timing, pools, executors, joblib, fresh programs."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import joblib

from benchmarks.array_work import give_back, new_array, touch
from benchmarks.contenders import Measure, Sample
from benchmarks.machine import own_memory_bytes, proportional_set_size_mb, tree_cpu_s
from benchmarks.work import fill_and_echo, hold, noop, process_id

WORKERS = 2
ARRAY_TASKS = 8
ARRAYS_BACK = 4
ROUNDS = 3
# Long enough for a worker to have put away what it did last, short enough for a benchmark.
IDLE_S = 1.0
BUSY_WITHIN_S = 30.0


def timed(function: Callable[[], Any]) -> float:
    """Seconds that one call takes."""
    started_s = time.perf_counter()
    function()
    return time.perf_counter() - started_s


def time_tasks(run: Callable[[int], Any], tasks: int) -> Sample:
    """Seconds, and CPU microseconds a task, of `run(tasks)`, after a warm-up with a tenth of them."""
    run(max(tasks // 10, 100))
    cpu_before_s = tree_cpu_s()
    elapsed_s = timed(lambda: run(tasks))
    cpu_s = tree_cpu_s() - cpu_before_s
    return {"seconds": elapsed_s, "cpu_us": cpu_s / tasks * 1e6}


def time_round_trips(call: Callable[[], Any], calls: int) -> float:
    """Median microseconds of a call, after a warm-up."""
    for _ in range(max(calls // 10, 20)):
        call()
    return statistics.median(timed(call) for _ in range(calls)) * 1e6


def time_array_to_tasks(run: Callable[[Any], Sequence[float]], size_bytes: int) -> Sample:
    """Median seconds of `run(array)`, which hands the array to 8 tasks; a new array for every round."""
    durations_s = []
    for seed in range(ROUNDS + 1):
        array = new_array(size_bytes, seed)
        started_s = time.perf_counter()
        totals = run(array)
        durations_s.append(time.perf_counter() - started_s)
        assert list(totals) == [touch(array)] * ARRAY_TASKS, "a task saw another array"
    return {"seconds": statistics.median(durations_s[1:])}


def time_arrays_back(run: Callable[[list[tuple[int, int]]], Sequence[Any]], size_bytes: int) -> Sample:
    """Median seconds until four arrays made in workers are here, every page of them read."""
    arguments = [(index, size_bytes) for index in range(ARRAYS_BACK)]
    durations_s = []
    for _ in range(ROUNDS + 1):
        started_s = time.perf_counter()
        arrays = run(arguments)
        totals = [touch(array) for array in arrays]
        durations_s.append(time.perf_counter() - started_s)
        assert len(totals) == ARRAYS_BACK and all(array.nbytes == size_bytes for array in arrays)
        del arrays
    return {"seconds": statistics.median(durations_s[1:])}


def idle_memory(find_process_ids: Callable[[], Sequence[int]]) -> Sample:
    """Median proportional set size of the workers, a second after their last task."""
    pids = sorted(set(find_process_ids()))
    assert pids, "no worker was found"
    time.sleep(IDLE_S)
    return {"pss_mb": statistics.median(proportional_set_size_mb(pid) for pid in pids)}


def queued_memory(submit: Callable[..., Any], tasks: int, end: Callable[[], Any]) -> Sample:
    """Bytes that a task which waits takes in its owner, with the future that its user has of it; all workers are busy.

    `end` drops the tasks.
    """
    with tempfile.TemporaryDirectory() as folder:
        kept = [submit(hold, folder) for _ in range(WORKERS)]
        deadline_s = time.monotonic() + BUSY_WITHIN_S
        while len(os.listdir(folder)) < WORKERS:
            assert time.monotonic() < deadline_s, "not all workers have begun"
            time.sleep(0.01)
        kept += [submit(noop, item) for item in range(1000)]
        before_bytes = own_memory_bytes()
        kept += [submit(noop, item) for item in range(tasks)]
        bytes_each = (own_memory_bytes() - before_bytes) / tasks
        end()
    return {"queued_bytes": bytes_each}


def default_chunksize(tasks: int) -> int:
    """What the standard Pool chooses: four chunks a worker."""
    return -(-tasks // (WORKERS * 4))


def pool_measures(make_pool: Callable[[], Any]) -> dict[str, Measure]:
    """Figures of whatever has the standard Pool's interface."""

    def with_pool(measure: Callable[[Any], Sample]) -> Sample:
        with make_pool() as pool:
            return measure(pool)

    def submit(pool: Any, tasks: int) -> None:
        results = [pool.apply_async(noop, (item,)) for item in range(tasks)]
        for result in results:
            result.get()

    return {
        "submit": lambda tasks: with_pool(lambda pool: time_tasks(lambda n: submit(pool, n), tasks)),
        "map_chunk1": lambda tasks: with_pool(
            lambda pool: time_tasks(lambda n: pool.map(noop, range(n), chunksize=1), tasks)
        ),
        "map_default": lambda tasks: with_pool(lambda pool: time_tasks(lambda n: pool.map(noop, range(n)), tasks)),
        "apply": lambda calls: with_pool(
            lambda pool: {"round_trip_us": time_round_trips(lambda: pool.apply(noop, (1,)), calls)}
        ),
        "array_to_tasks": lambda size_bytes: with_pool(
            lambda pool: time_array_to_tasks(lambda array: pool.map(touch, [array] * ARRAY_TASKS), size_bytes)
        ),
        "arrays_back": lambda size_bytes: with_pool(
            lambda pool: time_arrays_back(lambda arguments: pool.map(give_back, arguments), size_bytes)
        ),
        "idle_worker": lambda _: with_pool(lambda pool: idle_memory(lambda: pool.map(process_id, range(20), 1))),
        "queued_task": lambda tasks: with_pool(
            lambda pool: queued_memory(
                lambda function, item: pool.apply_async(function, (item,)), tasks, pool.terminate
            )
        ),
    }


def executor_measures(make_executor: Callable[[], Any]) -> dict[str, Measure]:
    """Figures of whatever has the standard Executor's interface."""

    def with_executor(measure: Callable[[Any], Sample]) -> Sample:
        with make_executor() as executor:
            return measure(executor)

    def submit(executor: Any, tasks: int) -> None:
        futures = [executor.submit(noop, item) for item in range(tasks)]
        for future in futures:
            future.result()

    def map_chunks(executor: Any, tasks: int, chunksize: int) -> None:
        for _ in executor.map(noop, range(tasks), chunksize=chunksize):
            pass

    return {
        "submit": lambda tasks: with_executor(lambda executor: time_tasks(lambda n: submit(executor, n), tasks)),
        "map_chunk1": lambda tasks: with_executor(
            lambda executor: time_tasks(lambda n: map_chunks(executor, n, 1), tasks)
        ),
        "map_default": lambda tasks: with_executor(
            lambda executor: time_tasks(lambda n: map_chunks(executor, n, default_chunksize(n)), tasks)
        ),
        "apply": lambda calls: with_executor(
            lambda executor: {"round_trip_us": time_round_trips(lambda: executor.submit(noop, 1).result(), calls)}
        ),
        "array_to_tasks": lambda size_bytes: with_executor(
            lambda executor: time_array_to_tasks(lambda array: list(executor.map(touch, [array] * 8)), size_bytes)
        ),
        "arrays_back": lambda size_bytes: with_executor(
            lambda executor: time_arrays_back(lambda arguments: list(executor.map(give_back, arguments)), size_bytes)
        ),
        "idle_worker": lambda _: with_executor(
            lambda executor: idle_memory(lambda: list(executor.map(process_id, range(20))))
        ),
        "queued_task": lambda tasks: with_executor(
            lambda executor: queued_memory(
                executor.submit, tasks, lambda: executor.shutdown(wait=False, cancel_futures=True)
            )
        ),
    }


def joblib_measures(backend: str) -> dict[str, Measure]:
    """joblib.Parallel on the backend, whose library is connected already."""

    def run(tasks: int, batch_size: Any) -> None:
        with joblib.parallel_config(backend=backend, n_jobs=WORKERS):
            joblib.Parallel(batch_size=batch_size)(joblib.delayed(noop)(item) for item in range(tasks))

    return {
        "joblib_auto": lambda tasks: time_tasks(lambda n: run(n, "auto"), tasks),
        "joblib_single": lambda tasks: time_tasks(lambda n: run(n, 1), tasks),
    }


def time_put_get(put: Callable[[Any], Any], get: Callable[[Any], Any], size_bytes: int) -> Sample:
    """Median milliseconds of `put` and of `get`; a new array for every round, the first round warms up."""
    put_s, get_s = [], []
    for seed in range(ROUNDS + 3):
        array = new_array(size_bytes, seed)
        started_s = time.perf_counter()
        reference = put(array)
        stored_s = time.perf_counter()
        value = get(reference)
        got_s = time.perf_counter()
        assert touch(value) == touch(array), "what came back is another array"
        put_s.append(stored_s - started_s)
        get_s.append(got_s - stored_s)
        del reference, value
    return {"put_ms": statistics.median(put_s[1:]) * 1e3, "get_ms": statistics.median(get_s[1:]) * 1e3}


def primitive_measures(module: Any) -> dict[str, Measure]:
    """Figures of whatever has the standard `multiprocessing`'s locks, queues and processes."""

    def lock(pairs: int) -> Sample:
        mutex = module.Lock()

        def run() -> None:
            for _ in range(pairs):
                mutex.acquire()
                mutex.release()

        run()
        return {"pair_us": timed(run) / pairs * 1e6}

    def queue(items: int) -> Sample:
        here, there = module.Queue(), module.Queue()
        process = module.Process(target=fill_and_echo, args=(here, there, items))
        process.start()
        for _ in range(items // 10):  # a warm-up
            here.get()
        item_us = timed(lambda: [here.get() for _ in range(items)]) / items * 1e6

        def call() -> None:
            there.put(1)
            here.get()

        round_trip_us = time_round_trips(call, 500)
        there.put(None)
        process.join()
        return {"item_us": item_us, "round_trip_us": round_trip_us}

    def process(count: int) -> Sample:
        def run() -> None:
            child = module.Process(target=noop)
            child.start()
            child.join()
            assert child.exitcode == 0, f"a process that does nothing ended with {child.exitcode}"

        run()
        return {"process_ms": statistics.median(timed(run) for _ in range(count)) * 1e3}

    return {"lock": lock, "queue": queue, "process": process}


def time_fresh_program(program: str) -> Sample:
    """Median seconds from starting a Python process until its first line, and until it has ended."""
    first_s, exit_s = [], []
    # The first round compiles what is not compiled yet, as installing does; it could not keep it under this variable.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for _ in range(ROUNDS + 1):
        started_s = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        first_s.append(time.perf_counter() - started_s)
        process.stdout.read()
        process.wait()
        exit_s.append(time.perf_counter() - started_s)
        assert line.strip() == b"3", f"the program printed {line!r}"
    # The first one has filled the disk cache and compiled the modules.
    return {"seconds": statistics.median(first_s[1:]), "exit_seconds": statistics.median(exit_s[1:])}


POOL_PROGRAM = """
{imports}
if __name__ == "__main__":
    with {make_pool} as pool:
        print(pool.apply(abs, (-3,)), flush=True)
"""
EXECUTOR_PROGRAM = """
{imports}
if __name__ == "__main__":
    with {make_executor} as executor:
        print(executor.submit(abs, -3).result(), flush=True)
"""
