"""The few things of the engine that an executor needs; imported late, because they load the client."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clusterpool.client.worker_group import TaskKind, WorkerGroup


def open_group(size: int | None, *, address: str | None, **options: Any) -> WorkerGroup:
    """A worker group on the current cluster, joined or started first; `size` None: one worker a CPU."""
    from clusterpool.client import api
    from clusterpool.client.worker_group import WorkerGroup

    client = connect(address)
    if size is None:
        size = max(1, int(api.cluster_resources().get("CPU", 1)))
    return WorkerGroup(size, client=client, **options)


def connect(address: str | None) -> Any:
    """The client of this process; `address` counts only where none is connected yet."""
    from clusterpool.client import api

    if address is not None and not api.is_initialized():
        api.init(address=address)
    return api.connect()


def wait_until(predicate: Callable[[], bool], timeout: float | None) -> bool:
    """Turn the client's loop in this thread until `predicate()`; False when `timeout` seconds went by."""
    from clusterpool.client import api

    return bool(api.wait_until(predicate, timeout))


def chunk_kind(*, is_star: bool) -> TaskKind:
    """How a chunk is called: `function(*item)` for each item, or `function(item)`."""
    from clusterpool.client.worker_group import TaskKind

    return TaskKind.STARMAP if is_star else TaskKind.MAP
