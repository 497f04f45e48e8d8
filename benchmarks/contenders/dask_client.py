"""Dask: the distributed client on a LocalCluster of two single-threaded worker processes, on loopback."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
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

OPTIONS = {
    "n_workers": WORKERS,
    "threads_per_worker": 1,
    "processes": True,
    "host": "127.0.0.1",
    "dashboard_address": None,
    "silence_logs": 50,
}
FIRST_RESULT_PROGRAM = """
from distributed import Client, LocalCluster
if __name__ == "__main__":
    with LocalCluster(**{options!r}) as cluster, Client(cluster) as client:
        print(client.submit(abs, -3).result(), flush=True)
"""


def with_client(measure: Callable[[Any, int], Sample]) -> Measure:
    """The measure, with a client of a cluster that is started for it."""

    def measured(amount: int) -> Sample:
        distributed: Any = importlib.import_module("distributed")
        with distributed.LocalCluster(**OPTIONS) as cluster, distributed.Client(cluster) as client:
            client.wait_for_workers(WORKERS)
            return measure(client, amount)

    return measured


def submit(client: Any, tasks: int) -> Sample:
    """`pure=False`, since Dask would otherwise run calls that look alike only once."""
    return time_tasks(lambda n: client.gather([client.submit(noop, item, pure=False) for item in range(n)]), tasks)


def map_chunk1(client: Any, tasks: int) -> Sample:
    """One graph of `tasks` tasks."""
    return time_tasks(lambda n: client.gather(client.map(noop, range(n), pure=False)), tasks)


def apply(client: Any, calls: int) -> Sample:
    """One task and its result."""
    return {"round_trip_us": time_round_trips(lambda: client.submit(noop, 1, pure=False).result(), calls)}


def array_to_tasks(client: Any, size_bytes: int) -> Sample:
    """Scattered once to every worker, as Dask's manual asks for."""

    def run(array: Any) -> Sequence[float]:
        stored = client.scatter(array, broadcast=True, hash=False)
        totals: list[float] = client.gather([client.submit(touch, stored, pure=False) for _ in range(ARRAY_TASKS)])
        return totals

    return time_array_to_tasks(run, size_bytes)


def arrays_back(client: Any, size_bytes: int) -> Sample:
    """Four tasks that return an array each."""
    return time_arrays_back(
        lambda arguments: client.gather([client.submit(give_back, item, pure=False) for item in arguments]),
        size_bytes,
    )


def put_get(client: Any, size_bytes: int) -> Sample:
    """scatter and gather: the array travels to a worker and back."""
    return time_put_get(lambda array: client.scatter(array, hash=False), client.gather, size_bytes)


def actor(client: Any, calls: int) -> Sample:
    """Calls of one actor's method: all at once, then each after the answer to the one before."""
    counter = client.submit(Counter, actor=True).result()

    def pipelined(amount: int) -> None:
        answers = [counter.add(1) for _ in range(amount)]
        for answer in answers:
            answer.result()

    pipelined_us = time_tasks(pipelined, calls)["seconds"] / calls * 1e6
    one_us = time_round_trips(lambda: counter.add(1).result(), calls // 5)
    return {"pipelined_us": pipelined_us, "one_at_a_time_us": one_us}


def idle_worker(client: Any, _: int) -> Sample:
    """Workers that have run a task."""
    return idle_memory(lambda: client.gather(client.map(process_id, range(20), pure=False)))


def joblib_figure(name: str) -> Measure:
    """joblib on Dask's backend, which finds the client by itself."""
    return with_client(lambda _, tasks: joblib_measures("dask")[name](tasks))


FIGURES: dict[str, Measure] = {
    "submit": with_client(submit),
    "map_chunk1": with_client(map_chunk1),
    "apply": with_client(apply),
    "array_to_tasks": with_client(array_to_tasks),
    "arrays_back": with_client(arrays_back),
    "put_get": with_client(put_get),
    "actor": with_client(actor),
    "idle_worker": with_client(idle_worker),
    "joblib_auto": joblib_figure("joblib_auto"),
    "joblib_single": joblib_figure("joblib_single"),
    "first_result": lambda _: time_fresh_program(FIRST_RESULT_PROGRAM.format(options=OPTIONS)),
}
