"""`concurrent.futures` whose `ProcessPoolExecutor` runs on a cluster; everything else is the standard one."""

from __future__ import annotations

from concurrent.futures import (
    ALL_COMPLETED,
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    InvalidStateError,
    TimeoutError,
    as_completed,
    wait,
)
from typing import TYPE_CHECKING, Any

from clusterpool.futures.executor import ProcessPoolExecutor

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

__all__ = [
    "ALL_COMPLETED",
    "FIRST_COMPLETED",
    "FIRST_EXCEPTION",
    "BrokenExecutor",
    "CancelledError",
    "Executor",
    "Future",
    "InvalidStateError",
    "ProcessPoolExecutor",
    "ThreadPoolExecutor",
    "TimeoutError",
    "as_completed",
    "wait",
]


def __getattr__(name: str) -> Any:
    # The standard package imports its thread module on demand as well, and so may the newer pools of later
    # Pythons be reached; the process module must not be: importing it takes as long as starting our workers.
    import concurrent.futures
    import importlib

    if name in ("process", "thread"):
        return importlib.import_module(f"{__name__}.{name}")
    if name in ("ThreadPoolExecutor", "InterpreterPoolExecutor"):
        return getattr(concurrent.futures, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
