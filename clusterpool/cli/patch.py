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
    """Once, before the program is loaded. What was imported from the modules before keeps what it has."""
    # First, because they build on the standard classes, or pass them on, and must go on doing so.
    from clusterpool.futures import ProcessPoolExecutor

    _patch_joblib()
    pool_class = _stand_in(multiprocessing.pool.Pool)

    def context_pool(
        self: Any,
        processes: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
    ) -> Any:
        """A pool of the cluster's; which start method the context has makes no difference to it."""
        return pool_class(processes, initializer, initargs, maxtasksperchild, context=self)

    standard: Any = multiprocessing
    standard.Pool = pool_class
    standard.pool.Pool = pool_class
    standard.context.BaseContext.Pool = context_pool
    futures: Any = concurrent.futures
    futures.ProcessPoolExecutor = ProcessPoolExecutor
    futures.process.ProcessPoolExecutor = ProcessPoolExecutor


def _stand_in(standard_pool: Any) -> Any:
    """A class that is the cluster's `Pool` to programs, and the standard one to the standard `ThreadPool`.

    That one, like the standard pool itself, reaches its base by the module's name `Pool`: for its constructor, and for
    helpers that the cluster's pool does not have.
    """
    from clusterpool.multiprocessing.pool import Pool

    def initialize(self: Any, *args: Any, **options: Any) -> None:
        if isinstance(self, standard_pool):
            standard_pool.__init__(self, *args, **options)
        else:
            Pool.__init__(self, *args, **options)

    helpers = {
        name: member
        for name, member in vars(standard_pool).items()
        if isinstance(member, (staticmethod, classmethod)) and not hasattr(Pool, name)
    }
    names = {"__init__": initialize, "__doc__": Pool.__doc__, "__module__": Pool.__module__}
    return type("Pool", (Pool,), {**helpers, **names})


def _patch_joblib() -> None:
    from joblib.parallel import register_parallel_backend

    from clusterpool.joblib.hook import NAME, make_backend

    register_parallel_backend(NAME, make_backend, make_default=True)
