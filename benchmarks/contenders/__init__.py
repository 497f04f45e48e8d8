"""How each contender does each figure. A module of this folder is named as its contender is in figures.py.

Each module has `FIGURES`: name of the figure -> function from the amount of work to the sample, which gives
each metric its value. A function is called once, in a process of its own, and warms up by itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

Sample = dict[str, float]
Measure = Callable[[int], Sample]

# Where a module may not bear the contender's name, because it would hide the library it measures.
MODULE_BY_CONTENDER = {
    "clusterpool": "ours",
    "multiprocessing": "standard_pool",
    "futures": "standard_futures",
    "loky": "loky_executor",
    "ray": "ray_tasks",
    "dask": "dask_client",
    "memcpy": "memcpy",
}


def measures_of(contender: str) -> Mapping[str, Measure]:
    """What the contender can be measured at. Raises ImportError where its library is not installed."""
    module = importlib.import_module(f"benchmarks.contenders.{MODULE_BY_CONTENDER[contender]}")
    figures: Mapping[str, Measure] = module.FIGURES
    return figures
