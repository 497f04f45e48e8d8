"""`multiprocessing` on a cluster: `import clusterpool.multiprocessing as mp`.

`Pool`, `cpu_count` and `get_context` are the cluster's. Every other name is the standard library's own,
passed through: processes, queues, locks and managers work as they do there, on the driver's host; versions
that span the cluster are to come.
"""

from __future__ import annotations

import multiprocessing as _standard
from multiprocessing import AuthenticationError as AuthenticationError
from multiprocessing import BufferTooShort as BufferTooShort
from multiprocessing import ProcessError as ProcessError
from multiprocessing import TimeoutError as TimeoutError
from multiprocessing import active_children as active_children
from multiprocessing import current_process as current_process
from multiprocessing import freeze_support as freeze_support
from multiprocessing import parent_process as parent_process
from typing import TYPE_CHECKING, Any

from clusterpool.multiprocessing.context import cpu_count as cpu_count
from clusterpool.multiprocessing.context import get_context as get_context

if TYPE_CHECKING:
    from clusterpool.multiprocessing import pool as pool
    from clusterpool.multiprocessing.pool import Pool as Pool

__all__ = [name for name in _standard.__all__ if name != "reducer"]


def __getattr__(name: str) -> Any:
    """`Pool` and `pool` load the client, so they come when asked for; the rest is the standard library's."""
    import importlib

    if name in ("Pool", "pool"):
        module = importlib.import_module("clusterpool.multiprocessing.pool")
        return module if name == "pool" else module.Pool
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(_standard, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "Pool", "pool"})
