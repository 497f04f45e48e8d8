"""`GroupWorker`: what an owner knows of a worker process."""

from __future__ import annotations

from dataclasses import dataclass

from clusterpool.core.messages import WorkerPart


@dataclass(frozen=True)
class GroupWorker:
    """One worker process. `exit_code`: None while it lives, negative for a signal, as in multiprocessing."""

    process_id: str
    node_id: str
    pid: int
    host: str
    exit_code: int | None = None


def as_group_worker(worker: WorkerPart | None, exit_code: int | None = None) -> GroupWorker | None:
    """The same facts without the lease."""
    if worker is None:
        return None
    return GroupWorker(worker.address.process_id, worker.address.node_id, worker.pid, worker.host, exit_code)
