"""The standard library's concurrent.futures.ProcessPoolExecutor."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

from benchmarks.contenders import Measure
from benchmarks.contenders.common import EXECUTOR_PROGRAM, WORKERS, executor_measures, time_fresh_program

FIGURES: dict[str, Measure] = {
    **executor_measures(lambda: ProcessPoolExecutor(WORKERS)),
    "first_result": lambda _: time_fresh_program(
        EXECUTOR_PROGRAM.format(
            imports="from concurrent.futures import ProcessPoolExecutor",
            make_executor="ProcessPoolExecutor(2)",
        )
    ),
}
