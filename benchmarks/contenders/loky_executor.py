"""loky's ProcessPoolExecutor, and joblib's default backend, which is loky."""

from __future__ import annotations

import importlib
from typing import Any

from benchmarks.contenders import Measure
from benchmarks.contenders.common import (
    EXECUTOR_PROGRAM,
    WORKERS,
    executor_measures,
    joblib_measures,
    time_fresh_program,
)

loky: Any = importlib.import_module("loky")

FIGURES: dict[str, Measure] = {
    **executor_measures(lambda: loky.ProcessPoolExecutor(WORKERS)),
    **joblib_measures("loky"),
    "first_result": lambda _: time_fresh_program(
        EXECUTOR_PROGRAM.format(imports="from loky import ProcessPoolExecutor", make_executor="ProcessPoolExecutor(2)")
    ),
}
