"""When a job is over on a node: its driver has ended, and the last worker of it here as well. Pure.

requested here, or joined here --> known --driver ended--> ending --no worker left--> over

A node that was taken for dead, and one to which a message came back, only suppose that a driver has ended: the job is
over here all the same, but what the whole cluster has of it is not theirs to remove.
"""

from __future__ import annotations

from collections.abc import Callable

from clusterpool.core.messages import Address


class JobEnds:
    """The jobs that have, or had, processes on this node."""

    def __init__(self) -> None:
        self._job_by_driver: dict[Address, str] = {}
        self._ending: dict[Address, bool] = {}  # drivers that have ended, in order, and whether that is known

    def seen(self, driver: Address, job_id: str) -> None:
        """A driver has joined this node, or its job wants workers here."""
        self._job_by_driver[driver] = job_id

    def process_ended(self, address: Address, *, is_known: bool = True) -> None:
        """A process has ended, here or elsewhere, or so it seems; it need not be a driver."""
        if address in self._job_by_driver:
            self._ending[address] = is_known or self._ending.get(address, False)

    def node_lost(self, node_id: str, *, is_known: bool = True) -> None:
        """Another node is gone, with the drivers on it, or so it seems."""
        for address in self._job_by_driver:
            if address.node_id == node_id:
                self.process_ended(address, is_known=is_known)

    def take_over(self, has_workers_of: Callable[[Address], bool]) -> list[tuple[str, bool]]:
        """The jobs that are over here by now, and whether that is known of their drivers; each is told once."""
        if not self._ending:
            return []
        over = [driver for driver in self._ending if not has_workers_of(driver)]
        return [(self._job_by_driver.pop(driver), self._ending.pop(driver)) for driver in over]
