"""No contender: copying an array into memory that is already mapped, the best that any store could do."""

from __future__ import annotations

import functools
import statistics

import numpy

from benchmarks.array_work import new_array
from benchmarks.contenders import Measure, Sample
from benchmarks.contenders.common import ROUNDS, timed


def put_get(size_bytes: int) -> Sample:
    """The copy counts as the put; there is no get."""
    target = new_array(size_bytes, 0)
    durations_s = []
    for seed in range(ROUNDS + 3):
        source = new_array(size_bytes, seed)
        durations_s.append(timed(functools.partial(numpy.copyto, target, source)))
    return {"put_ms": statistics.median(durations_s[1:]) * 1e3}


FIGURES: dict[str, Measure] = {"put_get": put_get}
