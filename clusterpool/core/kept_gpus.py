"""GPUs of workers that are no longer leased, or linger: a process that has used one has memory there until its end.

    leased --released, or lingers--> kept --the process has ended--> free
                                      |                               ^
                                      +-- it lingers, and its own job has nothing else to run on --+

A worker lingers until the tasks that it has started are done, which may need just that GPU; others wait for its end.
"""

from __future__ import annotations

from dataclasses import dataclass

from clusterpool.core.leases import Lease
from clusterpool.core.resources import Amounts, ResourcePool


@dataclass(slots=True)
class _Kept:
    job_id: str
    amounts: Amounts
    gpu_ids: list[int]
    lingers: bool = False


class KeptGpus:
    """Those of one node."""

    def __init__(self, pool: ResourcePool) -> None:
        self._pool = pool
        self._kept_by_process: dict[str, _Kept] = {}

    def keep(self, lease: Lease) -> None:
        """The lease is over and its process is not: take its GPUs out of what is given back."""
        if lease.gpu_ids:
            amounts = {"GPU": lease.amounts["GPU"]}
            self._kept_by_process[lease.worker.process_id] = _Kept(lease.worker.job.job_id, amounts, lease.gpu_ids)
            lease.amounts = {name: amount for name, amount in lease.amounts.items() if name != "GPU"}
            lease.gpu_ids = []

    def process_lingers(self, process_id: str) -> None:
        """It will not end soon."""
        kept = self._kept_by_process.get(process_id)
        if kept is not None:
            kept.lingers = True

    def lend(self, job_id: str, amounts: Amounts) -> bool:
        """Free a GPU that a lingering worker of the same job keeps, for a request that needs one; whether there was."""
        others = {name: amount for name, amount in amounts.items() if name != "GPU"}
        if "GPU" not in amounts or not self._kept_by_process or not self._pool.fits(others):
            return False
        for process_id, kept in self._kept_by_process.items():
            if kept.lingers and kept.job_id == job_id:
                self.process_ended(process_id)
                return True
        return False

    def has_for(self, job_id: str) -> bool:
        """Whether a request of this job may have what one that came earlier may not."""
        return any(kept.lingers and kept.job_id == job_id for kept in self._kept_by_process.values())

    def process_ended(self, process_id: str) -> None:
        """What it kept is free."""
        kept = self._kept_by_process.pop(process_id, None)
        if kept is not None:
            self._pool.give_back(kept.amounts, kept.gpu_ids)
