"""Contexts and the classes `Process`: the standard library's, with everything that they make on the cluster.

A worker is a fresh fork of a clean process whatever the start method is called, so each context makes the same things;
the methods differ in their names only, which programs ask for and set.

Source: https://docs.python.org/3/library/multiprocessing.html#contexts-and-start-methods
"""

from __future__ import annotations

import multiprocessing.reduction
from collections.abc import Callable, Iterable
from multiprocessing import context as _standard
from typing import TYPE_CHECKING, Any

from clusterpool.calls import engine

if TYPE_CHECKING:
    from clusterpool.multiprocessing.pool import Pool as PoolClass
    from clusterpool.multiprocessing.popen_cluster import Popen

__all__: tuple[str, ...] = ()

AuthenticationError = _standard.AuthenticationError
BufferTooShort = _standard.BufferTooShort
ProcessError = _standard.ProcessError
TimeoutError = _standard.TimeoutError
assert_spawning = _standard.assert_spawning
get_spawning_popen = _standard.get_spawning_popen
set_spawning_popen = _standard.set_spawning_popen
reduction = multiprocessing.reduction

# --- processes ------------------------------------------------------------------------------------------------------


class _OnCluster:
    """Mixed into the standard classes, so that `isinstance` holds for those too."""

    @staticmethod
    def _Popen(process_obj: Any) -> Popen:  # noqa: N802 (the standard library's name)
        from clusterpool.multiprocessing.popen_cluster import Popen

        return Popen(process_obj)

    @staticmethod
    def _after_fork() -> None:
        """The child is no fork of this program: what it has, finalizers too, is its own."""


class Process(_OnCluster, _standard.Process):  # type: ignore[misc]
    """A process on some node of the cluster, chosen by load; it takes no CPU from the tasks there."""


class ForkProcess(_OnCluster, _standard.ForkProcess):  # type: ignore[misc]
    """The `Process` of `get_context("fork")`."""


class SpawnProcess(_OnCluster, _standard.SpawnProcess):  # type: ignore[misc]
    """The `Process` of `get_context("spawn")`."""


class ForkServerProcess(_OnCluster, _standard.ForkServerProcess):  # type: ignore[misc]
    """The `Process` of `get_context("forkserver")`."""


# --- contexts -------------------------------------------------------------------------------------------------------


class _Factories:
    """The methods of a context that make something. Modules are loaded when they are first needed."""

    # The two attributes come with the standard classes.
    get_context: Callable[..., Any]

    def cpu_count(self) -> int:
        """The CPUs of the whole cluster; joins or starts it."""
        return engine.cluster_cpus()

    def Manager(self) -> Any:  # noqa: N802
        """A started `SyncManager`: its server is a process of the cluster's."""
        from clusterpool.multiprocessing.managers import SyncManager

        manager = SyncManager(ctx=self.get_context())
        manager.start()
        return manager

    def Pipe(self, duplex: bool = True) -> Any:  # noqa: N802
        """Two connected `Connection` objects."""
        from clusterpool.multiprocessing.connection import Pipe

        return Pipe(duplex)

    def Lock(self) -> Any:  # noqa: N802
        from clusterpool.multiprocessing.synchronize import Lock

        return Lock(ctx=self.get_context())

    def RLock(self) -> Any:  # noqa: N802
        from clusterpool.multiprocessing.synchronize import RLock

        return RLock(ctx=self.get_context())

    def Condition(self, lock: Any = None) -> Any:  # noqa: N802
        from clusterpool.multiprocessing.synchronize import Condition

        return Condition(lock, ctx=self.get_context())

    def Semaphore(self, value: int = 1) -> Any:  # noqa: N802
        from clusterpool.multiprocessing.synchronize import Semaphore

        return Semaphore(value, ctx=self.get_context())

    def BoundedSemaphore(self, value: int = 1) -> Any:  # noqa: N802
        from clusterpool.multiprocessing.synchronize import BoundedSemaphore

        return BoundedSemaphore(value, ctx=self.get_context())

    def Event(self) -> Any:  # noqa: N802
        from clusterpool.multiprocessing.synchronize import Event

        return Event(ctx=self.get_context())

    def Barrier(self, parties: int, action: Any = None, timeout: float | None = None) -> Any:  # noqa: N802
        from clusterpool.multiprocessing.synchronize import Barrier

        return Barrier(parties, action, timeout, ctx=self.get_context())

    def Queue(self, maxsize: int = 0) -> Any:  # noqa: N802
        from clusterpool.multiprocessing.queues import Queue

        return Queue(maxsize, ctx=self.get_context())

    def JoinableQueue(self, maxsize: int = 0) -> Any:  # noqa: N802
        from clusterpool.multiprocessing.queues import JoinableQueue

        return JoinableQueue(maxsize, ctx=self.get_context())

    def SimpleQueue(self) -> Any:  # noqa: N802
        from clusterpool.multiprocessing.queues import SimpleQueue

        return SimpleQueue(ctx=self.get_context())

    def Pool(  # noqa: N802
        self,
        processes: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        **options: Any,
    ) -> PoolClass:
        """A pool of the cluster's; `options`: what only that one has."""
        from clusterpool.multiprocessing.pool import Pool

        return Pool(processes, initializer, initargs, maxtasksperchild, context=self.get_context(), **options)

    def RawValue(self, typecode_or_type: Any, *args: Any) -> Any:  # noqa: N802
        from clusterpool.multiprocessing.sharedctypes import RawValue

        return RawValue(typecode_or_type, *args)

    def RawArray(self, typecode_or_type: Any, size_or_initializer: Any) -> Any:  # noqa: N802
        from clusterpool.multiprocessing.sharedctypes import RawArray

        return RawArray(typecode_or_type, size_or_initializer)

    def Value(self, typecode_or_type: Any, *args: Any, lock: Any = True) -> Any:  # noqa: N802
        from clusterpool.multiprocessing.sharedctypes import Value

        return Value(typecode_or_type, *args, lock=lock, ctx=self.get_context())

    def Array(self, typecode_or_type: Any, size_or_initializer: Any, *, lock: Any = True) -> Any:  # noqa: N802
        from clusterpool.multiprocessing.sharedctypes import Array

        return Array(typecode_or_type, size_or_initializer, lock=lock, ctx=self.get_context())

    def allow_connection_pickling(self) -> None:
        """Connections can always be pickled."""


class BaseContext(_Factories, _standard.BaseContext):  # type: ignore[misc]
    """What all contexts have."""

    def get_context(self, method: str | None = None) -> Any:
        """Raises: ValueError for a start method that the standard library does not know."""
        if method is None:
            return self
        try:
            return _concrete_contexts[method]
        except KeyError:
            raise ValueError(f"cannot find context for {method!r}") from None


class ForkContext(BaseContext, _standard.ForkContext):  # type: ignore[misc]
    """`get_context("fork")`. No process is a fork of the caller: it would have nothing of a caller elsewhere."""

    Process = ForkProcess


class SpawnContext(BaseContext, _standard.SpawnContext):  # type: ignore[misc]
    """`get_context("spawn")`."""

    Process = SpawnProcess


class ForkServerContext(BaseContext, _standard.ForkServerContext):  # type: ignore[misc]
    """`get_context("forkserver")`."""

    Process = ForkServerProcess


class DefaultContext(BaseContext, _standard.DefaultContext):  # type: ignore[misc]
    """The context behind the functions of the module; which method it names can be set once."""

    Process = Process

    def get_context(self, method: str | None = None) -> Any:
        if method is not None:
            return super().get_context(method)
        state = vars(self)  # as the standard class keeps it
        if state["_actual_context"] is None:
            state["_actual_context"] = state["_default_context"]
        return state["_actual_context"]


_concrete_contexts: dict[str, Any] = {
    "fork": ForkContext(),
    "spawn": SpawnContext(),
    "forkserver": ForkServerContext(),
}
# The name of the method that the standard library of this Python would use.
_default_context = DefaultContext(_concrete_contexts[vars(_standard)["_default_context"]._default_context._name])


def _force_start_method(method: str) -> None:
    vars(_default_context)["_actual_context"] = _concrete_contexts[method]


get_context = _default_context.get_context
get_start_method = _default_context.get_start_method
set_start_method = _default_context.set_start_method
cpu_count = _default_context.cpu_count
