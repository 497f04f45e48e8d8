"""clusterpool: its Pool, its Executor and its engine, on the embedded cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import clusterpool
import clusterpool.multiprocessing
from benchmarks.contenders import Measure, Sample
from benchmarks.contenders.common import (
    POOL_PROGRAM,
    WORKERS,
    executor_measures,
    joblib_measures,
    pool_measures,
    primitive_measures,
    time_fresh_program,
    time_put_get,
    time_round_trips,
    time_tasks,
)
from benchmarks.work import Counter

# As much as Ray gets: enough for the largest figure, four arrays of 100 MB and their predecessors.
STORE_BYTES = 1 << 30

engine: Any = clusterpool


def with_engine(measure: Measure) -> Measure:
    """The measure, on a cluster that is started for it."""

    def measured(amount: int) -> Sample:
        engine.init(num_cpus=WORKERS, object_store_bytes=STORE_BYTES)
        try:
            return measure(amount)
        finally:
            engine.shutdown()

    return measured


def actor(calls: int) -> Sample:
    """Calls of one actor's method: all at once, then each after the answer to the one before."""
    counter = engine.remote(Counter).remote()

    def pipelined(amount: int) -> None:
        engine.get([counter.add.remote(1) for _ in range(amount)])

    pipelined_us = time_tasks(pipelined, calls)["seconds"] / calls * 1e6
    one_us = time_round_trips(lambda: engine.get(counter.add.remote(1)), calls // 5)
    return {"pipelined_us": pipelined_us, "one_at_a_time_us": one_us}


def put_get(size_bytes: int) -> Sample:
    """The object store, without tasks."""
    return time_put_get(engine.put, engine.get, size_bytes)


def first_result(_: int) -> Sample:
    """An embedded cluster from nothing, each time."""
    return time_fresh_program(
        POOL_PROGRAM.format(imports="from clusterpool.multiprocessing import Pool", make_pool="Pool(2)")
    )


def _make(name: str) -> Callable[[], Any]:
    return lambda: getattr(engine, name)(WORKERS)


ON_EXECUTOR = executor_measures(_make("Executor"))
ON_CLUSTER: dict[str, Measure] = {
    **pool_measures(_make("Pool")),
    # What the bar is about: the Executor's submit, against Pool.apply_async of the others.
    "submit": ON_EXECUTOR["submit"],
    "queued_task": ON_EXECUTOR["queued_task"],
    **joblib_measures("clusterpool"),
    **primitive_measures(clusterpool.multiprocessing),
    "actor": actor,
    "put_get": put_get,
}
FIGURES: dict[str, Measure] = {
    **{name: with_engine(measure) for name, measure in ON_CLUSTER.items()},
    "first_result": first_result,
}
