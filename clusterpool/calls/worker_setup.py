"""How a worker of a pool, an executor or joblib is made ready; a small module, because each of them imports it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from clusterpool.client import api
from clusterpool.config import runs_unchanged_program


def set_up_worker(initializer: Callable[..., object] | None, initargs: tuple[Any, ...]) -> None:
    """Have a task's `sys.exit()` raised at its caller, as these do, and run the user's initializer.

    The log record is the standard executor's.
    """
    if api.in_worker():
        api.runtime().returns_exits = True
    if initializer is None:
        return
    try:
        initializer(*initargs)
    except BaseException:
        logging.getLogger("concurrent.futures").critical("Exception in initializer:", exc_info=True)
        raise


def set_up_pool_worker(initializer: Callable[..., object] | None, initargs: tuple[Any, ...]) -> None:
    """The same for a pool.

    The standard pool loses the worker of a task that calls `sys.exit()`, and its caller waits for ever; to run
    the task again in other workers would only end these too.

    In a program that runs unchanged (`clusterpool run --patch`) a result that the standard pool could not give is an
    error as there; one that imports our module may return lambdas.
    """
    if api.in_worker():
        runtime = api.runtime()
        runtime.returns_exits = True
        runtime.refuses_unnamed_results = runs_unchanged_program()
    if initializer is not None:
        initializer(*initargs)
