"""The few things of the engine that the backend needs; imported late, because they load the client."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clusterpool.client.worker_group import WorkerGroup


def connect(address: str | None) -> Any:
    """The client of the current cluster, which is joined or started if need be."""
    from clusterpool.client import api

    if address is not None and not api.is_initialized():
        api.init(address=address)
    return api.connect()


def open_group(size: int, **options: Any) -> WorkerGroup:
    """A worker group; a `SystemExit` of a task is raised in the caller, as with joblib's own backends."""
    from clusterpool.calls.worker_setup import set_up_worker
    from clusterpool.client.worker_group import WorkerGroup

    return WorkerGroup(size, initializer=set_up_worker, initargs=(None, ()), **options)


def cluster_cpus(address: str | None) -> int:
    """CPUs of all nodes, 1 at least: what `n_jobs=-1` means."""
    from clusterpool.client import api

    connect(address)
    return max(1, int(api.cluster_resources().get("CPU", 1)))


def wait_until(predicate: Callable[[], bool], timeout: float | None) -> bool:
    """Turn the client's loop in this thread until `predicate()`; False when `timeout` seconds went by."""
    from clusterpool.client import api

    return bool(api.wait_until(predicate, timeout))
