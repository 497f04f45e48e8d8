"""Put the cluster's pools in the place of the standard library's, in this process only.

Only the names by which programs reach the pools are bound anew; no class of the standard library is changed but for the
method `Pool` of its contexts. Queues, locks, managers, `Process` and the resource tracker stay what they are. Workers
of the cluster are processes of their own and are not patched: a pool that a task makes is a standard one on its node.
"""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import multiprocessing
import multiprocessing.context
import multiprocessing.managers  # it keeps the standard Pool for its servers, if it is imported before the patch
import multiprocessing.pool
from collections.abc import Callable, Iterable
from typing import Any


def patch_standard_library() -> None:
    """Any number of times. What was imported from the modules before keeps what it has."""
    # Ours first: they pass on some of the standard names, which must be the standard ones still.
    from clusterpool.futures import ProcessPoolExecutor
    from clusterpool.multiprocessing.pool import Pool

    def context_pool(
        self: Any,
        processes: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
    ) -> Pool:
        """A pool of the cluster's; which start method the context has makes no difference to it."""
        return Pool(processes, initializer, initargs, maxtasksperchild, context=self)

    standard: Any = multiprocessing
    standard.Pool = Pool
    standard.pool.Pool = Pool
    standard.context.BaseContext.Pool = context_pool
    futures: Any = concurrent.futures
    futures.ProcessPoolExecutor = ProcessPoolExecutor
    futures.process.ProcessPoolExecutor = ProcessPoolExecutor
    _patch_joblib()


def _patch_joblib() -> None:
    from joblib.parallel import register_parallel_backend

    from clusterpool.joblib.hook import NAME, make_backend

    register_parallel_backend(NAME, make_backend, make_default=True)
