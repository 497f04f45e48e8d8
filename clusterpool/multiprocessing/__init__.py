"""`multiprocessing` on a cluster: `import clusterpool.multiprocessing as mp`.

Every name and every submodule of the standard library's is here. What makes, shares or waits for something is the
cluster's; the rest (`util`, `process`, `dummy`, `reduction` and so on) are the standard modules themselves. Nothing
of the engine is imported before something is made.
"""

from __future__ import annotations

import multiprocessing as _standard
import typing as _typing  # no name may be here that the standard module does not have

from clusterpool.multiprocessing import context as context
from clusterpool.multiprocessing import passthrough as _passthrough
from clusterpool.multiprocessing.context import AuthenticationError as AuthenticationError
from clusterpool.multiprocessing.context import BufferTooShort as BufferTooShort
from clusterpool.multiprocessing.context import Process as Process
from clusterpool.multiprocessing.context import ProcessError as ProcessError
from clusterpool.multiprocessing.context import TimeoutError as TimeoutError
from clusterpool.multiprocessing.context import _default_context

if _typing.TYPE_CHECKING:
    from clusterpool.multiprocessing import connection as connection
    from clusterpool.multiprocessing import managers as managers
    from clusterpool.multiprocessing import pool as pool
    from clusterpool.multiprocessing import queues as queues
    from clusterpool.multiprocessing import sharedctypes as sharedctypes
    from clusterpool.multiprocessing import synchronize as synchronize
    from clusterpool.multiprocessing.pool import Pool as Pool

_passthrough.install()

Array = _default_context.Array
Barrier = _default_context.Barrier
BoundedSemaphore = _default_context.BoundedSemaphore
Condition = _default_context.Condition
Event = _default_context.Event
JoinableQueue = _default_context.JoinableQueue
Lock = _default_context.Lock
Manager = _default_context.Manager
Pipe = _default_context.Pipe
Queue = _default_context.Queue
RLock = _default_context.RLock
RawArray = _default_context.RawArray
RawValue = _default_context.RawValue
Semaphore = _default_context.Semaphore
SimpleQueue = _default_context.SimpleQueue
Value = _default_context.Value
active_children = _default_context.active_children
allow_connection_pickling = _default_context.allow_connection_pickling
cpu_count = _default_context.cpu_count
current_process = _default_context.current_process
freeze_support = _default_context.freeze_support
get_all_start_methods = _default_context.get_all_start_methods
get_context = _default_context.get_context
get_logger = _default_context.get_logger
get_start_method = _default_context.get_start_method
log_to_stderr = _default_context.log_to_stderr
parent_process = _default_context.parent_process
reducer = context.reduction
set_executable = _default_context.set_executable
set_forkserver_preload = _default_context.set_forkserver_preload
set_start_method = _default_context.set_start_method

SUBDEBUG = 5
SUBWARNING = 25

__all__ = list(_standard.__all__)

_SUBMODULES = frozenset(
    {"connection", "context", "heap", "managers", "pool", "queues", "shared_memory", "sharedctypes", "synchronize"}
)


def __getattr__(name: str) -> _typing.Any:
    """Modules when they are asked for; `Pool`, the class itself, loads the engine."""
    import importlib

    if name == "Pool":
        return importlib.import_module(f"{__name__}.pool").Pool
    if name in _SUBMODULES or name in _passthrough.STANDARD:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES, *_passthrough.STANDARD})
