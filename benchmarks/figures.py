"""The figures: what is measured, how much of it, against whom, and the bar that clusterpool has to clear.

Every metric is a cost, less is better, so that one ratio serves all: the other's cost divided by ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

OURS = "clusterpool"
CONTENDERS = (OURS, "multiprocessing", "futures", "loky", "ray", "dask")
# Not a contender: how fast this machine can copy memory at all.
MEMCPY = "memcpy"


@dataclass(frozen=True)
class Speedup:
    """Met if the contender's cost is at least `at_least` times ours."""

    against: str
    at_least: float


@dataclass(frozen=True)
class Ceiling:
    """Met if our own cost is at most this, in the metric's unit."""

    at_most: float


@dataclass(frozen=True)
class Metric:
    """One number of a sample, e.g. `seconds`; its unit, and the bars it has (none: it is only reported)."""

    name: str
    title: str
    unit: str
    bars: tuple[Speedup | Ceiling, ...] = ()


@dataclass(frozen=True)
class Figure:
    """One measurement, made by a fresh process for every contender and repeat.

    divisors: contenders that are so slow at this that they get only 1/n of the tasks; seconds are scaled up.
    """

    name: str
    metrics: tuple[Metric, ...]
    contenders: tuple[str, ...]
    amount: int = 1
    quick_amount: int = 1
    divisors: dict[str, int] = field(default_factory=dict)


POOLS = (OURS, "multiprocessing", "futures", "loky", "ray")
ARRAY_BYTES = 100_000_000
QUICK_ARRAY_BYTES = 10_000_000
# What locks and queues of one host may cost: three times the standard library's.
THIRD = Speedup("multiprocessing", 0.333)


def cpu(of_what: str) -> Metric:
    """CPU time has no bar: it is reported, and should fall from run to run."""
    return Metric("cpu_us", f"CPU time of all processes, per task of {of_what}", "us")


def seconds(title: str, *bars: Speedup | Ceiling) -> Metric:
    """Elapsed time; scaled up where a contender got fewer tasks."""
    return Metric("seconds", title, "s", bars)


FIGURES = (
    Figure(
        "submit",
        (
            seconds(
                "submit of 10,000 no-ops, all results",
                Speedup("multiprocessing", 2),
                Speedup("futures", 6),
                Speedup("ray", 20),
            ),
            cpu("submit"),
        ),
        CONTENDERS,
        amount=10_000,
        quick_amount=2_000,
    ),
    Figure(
        "map_chunk1",
        (
            seconds("Pool.map of 50,000 no-ops, chunksize=1", Speedup("multiprocessing", 3)),
            cpu("map, chunksize=1"),
        ),
        CONTENDERS,
        amount=50_000,
        quick_amount=5_000,
        divisors={"ray": 10, "dask": 10, "loky": 5, "futures": 5},
    ),
    Figure(
        "map_default",
        (
            seconds("Pool.map of 1,000,000 no-ops, default chunks", Speedup("multiprocessing", 0.8)),
            cpu("map, default chunks"),
        ),
        POOLS,
        amount=1_000_000,
        quick_amount=100_000,
    ),
    Figure(
        "apply",
        (
            Metric(
                "round_trip_us",
                "Pool.apply round trip, median",
                "us",
                (Speedup("multiprocessing", round(1 / 0.8, 3)),),
            ),
        ),
        CONTENDERS,
        amount=2_000,
        quick_amount=300,
        divisors={"dask": 4},
    ),
    Figure(
        "array_to_tasks",
        (seconds("the same 100 MB array to 8 tasks", Speedup("multiprocessing", 25), Speedup("ray", 1)),),
        CONTENDERS,
        amount=ARRAY_BYTES,
        quick_amount=QUICK_ARRAY_BYTES,
    ),
    Figure(
        "arrays_back",
        (seconds("four 100 MB arrays back", Speedup("multiprocessing", 4), Speedup("ray", 1)),),
        CONTENDERS,
        amount=ARRAY_BYTES,
        quick_amount=QUICK_ARRAY_BYTES,
    ),
    Figure(
        "joblib_auto",
        (seconds("joblib.Parallel of 5,000 no-ops, batch_size='auto'", Speedup("loky", 1)),),
        (OURS, "multiprocessing", "loky", "ray", "dask"),
        amount=5_000,
        quick_amount=1_000,
        divisors={"ray": 5, "dask": 5},
    ),
    Figure(
        "joblib_single",
        (seconds("joblib.Parallel of 5,000 no-ops, batch_size=1", Speedup("loky", 3)),),
        (OURS, "multiprocessing", "loky", "ray", "dask"),
        amount=5_000,
        quick_amount=1_000,
        divisors={"ray": 5, "dask": 5},
    ),
    Figure(
        "put_get",
        (
            Metric("put_ms", "put of 100 MB, warm (for memcpy: the copy)", "ms", (Speedup(MEMCPY, 0.8),)),
            Metric("get_ms", "get of 100 MB, warm", "ms", (Ceiling(1.0),)),
        ),
        (OURS, "ray", "dask", MEMCPY),
        amount=ARRAY_BYTES,
        quick_amount=QUICK_ARRAY_BYTES,
    ),
    Figure(
        "first_result",
        (
            seconds("fresh process to the first result of Pool(2)", Ceiling(0.5)),
            Metric("exit_seconds", "fresh process to its end", "s"),
        ),
        CONTENDERS,
    ),
    Figure(
        "actor",
        (
            Metric("pipelined_us", "actor calls, pipelined, per call", "us", (Speedup("ray", 2),)),
            Metric("one_at_a_time_us", "actor calls, one at a time, per call", "us", (Speedup("ray", 1),)),
        ),
        (OURS, "ray", "dask"),
        amount=5_000,
        quick_amount=500,
        divisors={"dask": 5},
    ),
    Figure(
        "lock",
        (Metric("pair_us", "Lock: acquire and release, nobody else there", "us", (THIRD,)),),
        (OURS, "multiprocessing"),
        amount=200_000,
        quick_amount=20_000,
    ),
    Figure(
        "queue",
        (
            Metric("item_us", "Queue: an item from one process to another", "us", (THIRD,)),
            Metric("round_trip_us", "Queue: an item there and one back", "us", (THIRD,)),
        ),
        (OURS, "multiprocessing"),
        amount=50_000,
        quick_amount=5_000,
    ),
    Figure(
        "process",
        (Metric("process_ms", "Process: start and join (for multiprocessing: a fork of the driver)", "ms"),),
        (OURS, "multiprocessing"),
        amount=30,
        quick_amount=5,
    ),
    Figure(
        "idle_worker",
        (Metric("pss_mb", "memory of an idle worker, proportional set size", "MB", (Ceiling(20.0),)),),
        CONTENDERS,
    ),
    Figure(
        "queued_task",
        (
            Metric(
                "queued_bytes", "memory of each of 1,000,000 queued tasks in their owner", "bytes", (Ceiling(1000.0),)
            ),
        ),
        (OURS, "multiprocessing", "futures"),
        amount=1_000_000,
        quick_amount=50_000,
        divisors={"futures": 10},
    ),
)

FIGURE_BY_NAME = {figure.name: figure for figure in FIGURES}
