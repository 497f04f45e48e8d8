"""When a job is over on a node: its driver has ended, and the last worker of it here as well. Pure.

requested here, or joined here --> known --driver ended--> ending --no worker left--> over

A node that was taken for dead, and one to which a message came back, only suppose that a driver has ended: the job is
over here all the same, but what the whole cluster has of it is not theirs to remove. Nor is it when the driver's node
was declared dead and has come back with the driver: see `JobGone.home`. (When it is lost once more, and nobody knows of
the driver any more, whoever takes its job off the list of jobs removes what is left: `NodeActors.reconcile_jobs`.)
"""

from __future__ import annotations

from collections.abc import Callable

from clusterpool.core.coordination_events import JobGone
from clusterpool.core.messages import Address


class JobEnds:
    """The jobs that have, or had, processes on this node."""

    def __init__(self) -> None:
        self._job_by_driver: dict[Address, str] = {}
        self._ending: dict[Address, JobGone] = {}  # of drivers that have ended, in order

    def seen(self, driver: Address, job_id: str) -> None:
        """A driver has joined this node, or its job wants workers here."""
        self._job_by_driver[driver] = job_id
        pending = self._ending.get(driver)
        if pending is not None and (pending.home or not pending.is_known):
            # Its end was only supposed; what its node's former life had here ends all the same.
            del self._ending[driver]

    def process_ended(self, address: Address, *, is_known: bool = True) -> None:
        """A process has ended, here or elsewhere, or so it seems; it need not be a driver."""
        self._driver_ended(address, is_known=is_known)

    def node_lost(self, node_id: str, *, is_known: bool = True) -> None:
        """Another node is gone, with the drivers on it, or so it seems."""
        for address in self._job_by_driver:
            if address.node_id == node_id:
                self._driver_ended(address, is_known=is_known, home=node_id)

    def _driver_ended(self, driver: Address, *, is_known: bool, home: str = "") -> None:
        job_id, earlier = self._job_by_driver.get(driver), self._ending.get(driver)
        if job_id is None:
            return
        # What is known for certain stays known.
        if earlier is None or (is_known, not home) > (earlier.is_known, not earlier.home):
            self._ending[driver] = JobGone(job_id, is_known, home)

    def take_over(self, has_workers_of: Callable[[Address], bool]) -> list[JobGone]:
        """The jobs that are over here by now; each is told once."""
        over = [driver for driver in self._ending if not has_workers_of(driver)]
        for driver in over:
            del self._job_by_driver[driver]
        return [self._ending.pop(driver) for driver in over]
