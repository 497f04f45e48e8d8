"""Managers: the standard library's, whose servers are processes of the cluster and are reached from every node of it.

A manager without an address listens at one of the cluster's (`connection.Listener`). Its proxies say in their pickles
that it takes our connections to reach it, so they work in tasks and processes on any node.

Source: https://docs.python.org/3/library/multiprocessing.html#managers
"""

from __future__ import annotations

import multiprocessing.managers as standard
from collections.abc import Iterable
from multiprocessing.managers import BaseProxy, Token
from typing import Any

from clusterpool.multiprocessing import connection

__all__ = ["BaseManager", "BaseProxy", "SharedMemoryManager", "SyncManager", "Token"]

_BY_SERIALIZER: dict[str, Any] = standard.listener_client  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:
    """All that is the same here as there: `Server`, `AutoProxy`, `MakeProxyType`, the proxies."""
    return getattr(standard, name)


class Serializer(str):
    """The name of a serializer of ours, in the standard module's table.

    Proxies carry it, and the table must have it wherever they are unpickled: hence a class of this module, which
    is imported by that.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return Serializer, (str(self),)


_SERIALIZERS = {"pickle": Serializer("clusterpool-pickle"), "xmlrpclib": Serializer("clusterpool-xmlrpclib")}
_BY_SERIALIZER[_SERIALIZERS["pickle"]] = (connection.Listener, connection.Client)
_BY_SERIALIZER[_SERIALIZERS["xmlrpclib"]] = (connection.XmlListener, connection.XmlClient)


class BaseManager(standard.BaseManager):
    """A manager of the program's own types: `register` them, then `start` or `connect`."""

    def __init__(
        self,
        address: Any = None,
        authkey: bytes | None = None,
        serializer: str = "pickle",
        ctx: Any = None,
        **options: Any,
    ) -> None:
        if ctx is None:
            from clusterpool.multiprocessing.context import get_context

            ctx = get_context()
        context: Any = _Here(ctx)
        super().__init__(address, authkey, _SERIALIZERS.get(serializer, serializer), context, **options)


class _Here:
    """A context whose processes run on this process's node: what a manager holds shall live and die with its program,
    and shared memory is of one host.
    """

    def __init__(self, context: Any) -> None:
        self._context = context

    def Process(self, **options: Any) -> Any:  # noqa: N802 (the standard library's name)
        from clusterpool.client import api

        process = self._context.Process(**options)
        process._node_id = api.connect().address.node_id
        return process


class SyncManager(BaseManager, standard.SyncManager):
    """What `Manager()` starts."""


class _Segments(standard._SharedMemoryTracker):  # type: ignore[misc,name-defined]
    def destroy_segment(self, segment_name: str) -> None:
        self.segment_names.remove(segment_name)
        segment = _SharedMemory(segment_name)
        segment.close()
        segment.unlink()


class SharedMemoryServer(standard.SharedMemoryServer):
    """The standard server, on shared memory of ours."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        context: Any = self.shared_memory_context  # type: ignore[has-type]
        self.shared_memory_context = _Segments(context.shared_memory_context_name, [])


class SharedMemoryManager(BaseManager, standard.SharedMemoryManager):
    """Makes shared memory of this host, and removes it when it is shut down."""

    _Server = SharedMemoryServer

    def SharedMemory(self, size: int) -> Any:  # noqa: N802
        """A new segment, which goes with this manager at the latest."""
        segment = _SharedMemory(None, create=True, size=size)
        self._track(segment)
        return segment

    def ShareableList(self, sequence: Iterable[Any] | None) -> Any:  # noqa: N802
        """A new list in a segment of its own."""
        from clusterpool.multiprocessing.shared_memory import ShareableList

        made = ShareableList(sequence)
        self._track(made.shm)
        return made

    def _track(self, segment: Any) -> None:
        try:
            with self._Client(self._address, authkey=self._authkey) as server:  # type: ignore[attr-defined]
                standard.dispatch(server, None, "track_segment", (segment.name,))  # type: ignore[attr-defined]
        except BaseException:
            segment.unlink()
            raise


def _SharedMemory(*args: Any, **options: Any) -> Any:  # noqa: N802
    from clusterpool.multiprocessing.shared_memory import SharedMemory

    return SharedMemory(*args, **options)


def _make_pool(*args: Any, **options: Any) -> Any:
    from clusterpool.multiprocessing.pool import Pool

    return Pool(*args, **options)


SyncManager.register("Pool", _make_pool, standard.PoolProxy)  # type: ignore[attr-defined]
