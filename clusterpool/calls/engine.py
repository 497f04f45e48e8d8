"""What facades need of the engine before or while they run calls; imported late, because it loads the client."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clusterpool.client.worker_group import TaskKind, WorkerGroup


def connect(address: str | None) -> Any:
    """The client of the current cluster, joined or started if need be; `address` counts only while none is joined."""
    from clusterpool.client import api

    if address is not None and not api.is_initialized():
        api.init(address=address)
    return api.connect()


def cluster_cpus(address: str | None = None) -> int:
    """CPUs of all nodes, 1 at least: what `n_jobs=-1`, `processes=None` and `max_workers=None` mean."""
    from clusterpool.client import api

    connect(address)
    return max(1, int(api.cluster_resources().get("CPU", 1)))


def open_group(size: int | None, *, address: str | None = None, **options: Any) -> WorkerGroup:
    """A worker group on the current cluster, joined or started first; `size` None: one worker a CPU, at any time."""
    from clusterpool.client.worker_group import WorkerGroup

    client = connect(address)
    if size is None:
        return WorkerGroup(cluster_cpus(), follows_cluster=True, client=client, **options)
    return WorkerGroup(size, client=client, **options)


def open_exit_safe_group(size: int, **options: Any) -> WorkerGroup:
    """A worker group where a task's `SystemExit` is raised in the caller and costs no worker."""
    from clusterpool.calls.worker_setup import set_up_worker
    from clusterpool.client.worker_group import WorkerGroup

    return WorkerGroup(size, initializer=set_up_worker, initargs=(None, ()), **options)


def wait_until(predicate: Callable[[], bool], timeout: float | None) -> bool:
    """Turn the client's loop in this thread until `predicate()`; False when `timeout` seconds went by."""
    from clusterpool.client import api

    return bool(api.wait_until(predicate, timeout))


def chunk_kind(*, is_star: bool) -> TaskKind:
    """How a chunk is called: `function(*item)` for each item, or `function(item)`."""
    from clusterpool.client.worker_group import TaskKind

    return TaskKind.STARMAP if is_star else TaskKind.MAP
