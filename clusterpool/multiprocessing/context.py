"""What `get_context` returns: the standard library's context, with the cluster's pool and number of CPUs."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clusterpool.multiprocessing.pool import Pool


class ClusterContext:
    """A context whose `Pool` and `cpu_count` are the cluster's; all else is the standard context's.

    Workers are forks of a clean process whatever the start method is called, so each method gives the same
    pool.
    """

    def __init__(self, method: str | None) -> None:
        self._context = multiprocessing.get_context(method)

    def Pool(self, *args: Any, **options: Any) -> Pool:  # noqa: N802 (the standard library's name)
        from clusterpool.multiprocessing.pool import Pool

        return Pool(*args, **options)

    def cpu_count(self) -> int:
        return cpu_count()

    def get_context(self, method: str | None = None) -> ClusterContext:
        return self if method is None else ClusterContext(method)

    def get_start_method(self, allow_none: bool = False) -> str | None:
        return self._context.get_start_method(allow_none)

    def __getattr__(self, name: str) -> Any:
        if name == "_context":  # not set yet: while unpickling
            raise AttributeError(name)
        return getattr(self._context, name)


def get_context(method: str | None = None) -> ClusterContext:
    """Raises: ValueError for a start method that the standard library does not know."""
    return ClusterContext(method)


def cpu_count() -> int:
    """The CPUs of the whole cluster; joins or starts it."""
    from clusterpool.client import api

    api.connect()
    return max(1, int(api.cluster_resources().get("CPU", 1)))
