"""The standard library's multiprocessing.Pool, with its default start method."""

from __future__ import annotations

import multiprocessing

from benchmarks.contenders import Measure
from benchmarks.contenders.common import (
    POOL_PROGRAM,
    WORKERS,
    joblib_measures,
    pool_measures,
    primitive_measures,
    time_fresh_program,
)

FIGURES: dict[str, Measure] = {
    **pool_measures(lambda: multiprocessing.Pool(WORKERS)),
    **joblib_measures("multiprocessing"),
    **primitive_measures(multiprocessing),
    "first_result": lambda _: time_fresh_program(
        POOL_PROGRAM.format(imports="from multiprocessing import Pool", make_pool="Pool(2)")
    ),
}
