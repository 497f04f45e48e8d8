"""Ray: its tasks and actors where it has its own way, its Pool for Pool.map, its joblib backend for joblib.

One node on the loopback address, two CPUs, no dashboard, no usage statistics, a store of 1 GiB.
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks.array_work import give_back, touch
from benchmarks.contenders import Measure, Sample
from benchmarks.contenders.common import (
    ARRAY_TASKS,
    WORKERS,
    idle_memory,
    joblib_measures,
    time_array_to_tasks,
    time_arrays_back,
    time_fresh_program,
    time_put_get,
    time_round_trips,
    time_tasks,
)
from benchmarks.work import Counter, noop, process_id

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_DEDUP_LOGS="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
ray: Any = importlib.import_module("ray")

STORE_BYTES = 1 << 30
OPTIONS = {
    "num_cpus": WORKERS,
    "include_dashboard": False,
    "object_store_memory": STORE_BYTES,
    "log_to_driver": False,
    "logging_level": "ERROR",
    "_node_ip_address": "127.0.0.1",
}
FIRST_RESULT_PROGRAM = """
import ray
ray.init(**{options!r}, _temp_dir={folder!r})
from ray.util.multiprocessing import Pool
with Pool(2) as pool:
    print(pool.apply(abs, (-3,)), flush=True)
ray.shutdown()
"""


def with_ray(measure: Measure) -> Measure:
    """The measure, on a Ray that is started for it and ended after it."""

    def measured(amount: int) -> Sample:
        folder = tempfile.mkdtemp(prefix="r-")
        ray.init(**OPTIONS, _temp_dir=folder)
        try:
            return measure(amount)
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)

    return measured


def submit(tasks: int) -> Sample:
    """`f.remote()` for every item, one `ray.get` for all."""
    task = ray.remote(noop)
    return time_tasks(lambda n: ray.get([task.remote(item) for item in range(n)]), tasks)


def pool_map(tasks: int, chunksize: int | None) -> Sample:
    """ray.util.multiprocessing.Pool, whose workers are actors."""
    module: Any = importlib.import_module("ray.util.multiprocessing")
    pool = module.Pool(WORKERS)
    return time_tasks(lambda n: pool.map(noop, range(n), chunksize=chunksize), tasks)


def apply(calls: int) -> Sample:
    """One task and its result."""
    task = ray.remote(noop)
    return {"round_trip_us": time_round_trips(lambda: ray.get(task.remote(1)), calls)}


def array_to_tasks(size_bytes: int) -> Sample:
    """With the explicit `put` that Ray's manual asks for: without it each task stores a copy of its own."""
    task = ray.remote(touch)

    def run(array: Any) -> Sequence[float]:
        reference = ray.put(array)
        totals: list[float] = ray.get([task.remote(reference) for _ in range(ARRAY_TASKS)])
        return totals

    return time_array_to_tasks(run, size_bytes)


def arrays_back(size_bytes: int) -> Sample:
    """Four tasks that return an array each; the results are views of the store."""
    task = ray.remote(give_back)
    return time_arrays_back(lambda arguments: ray.get([task.remote(item) for item in arguments]), size_bytes)


def actor(calls: int) -> Sample:
    """Calls of one actor's method: all at once, then each after the answer to the one before."""
    counter = ray.remote(Counter).remote()

    def pipelined(amount: int) -> None:
        ray.get([counter.add.remote(1) for _ in range(amount)])

    pipelined_us = time_tasks(pipelined, calls)["seconds"] / calls * 1e6
    one_us = time_round_trips(lambda: ray.get(counter.add.remote(1)), calls // 5)
    return {"pipelined_us": pipelined_us, "one_at_a_time_us": one_us}


def idle_worker(_: int) -> Sample:
    """Workers that have run a task of this job."""
    task = ray.remote(process_id)
    return idle_memory(lambda: ray.get([task.remote(item) for item in range(20)]))


def joblib_figure(name: str) -> Measure:
    """joblib on Ray's backend."""

    def measured(tasks: int) -> Sample:
        module: Any = importlib.import_module("ray.util.joblib")
        module.register_ray()
        return joblib_measures("ray")[name](tasks)

    return measured


def first_result(_: int) -> Sample:
    """Ray and its Pool from nothing, each time."""
    folder = tempfile.mkdtemp(prefix="r-")
    try:
        return time_fresh_program(FIRST_RESULT_PROGRAM.format(options=OPTIONS, folder=folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


ON_RAY: dict[str, Measure] = {
    "submit": submit,
    "map_chunk1": lambda tasks: pool_map(tasks, 1),
    "map_default": lambda tasks: pool_map(tasks, None),
    "apply": apply,
    "array_to_tasks": array_to_tasks,
    "arrays_back": arrays_back,
    "joblib_auto": joblib_figure("joblib_auto"),
    "joblib_single": joblib_figure("joblib_single"),
    "put_get": lambda size_bytes: time_put_get(ray.put, ray.get, size_bytes),
    "actor": actor,
    "idle_worker": idle_worker,
}
FIGURES: dict[str, Measure] = {
    **{name: with_ray(measure) for name, measure in ON_RAY.items()},
    "first_result": first_result,
}
