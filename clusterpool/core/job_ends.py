"""When a job is over on a node: its driver has ended, and the last worker of it here as well. Pure.

requested here, or joined here --> known --driver ended--> ending --no worker left--> over
"""

from __future__ import annotations

from collections.abc import Callable

from clusterpool.core.messages import Address


class JobEnds:
    """The jobs that have, or had, processes on this node."""

    def __init__(self) -> None:
        self._job_by_driver: dict[Address, str] = {}
        self._ending: list[Address] = []  # drivers that have ended, in order

    def seen(self, driver: Address, job_id: str) -> None:
        """A driver has joined this node, or its job wants workers here."""
        self._job_by_driver[driver] = job_id

    def process_ended(self, address: Address) -> None:
        """A process has ended, here or elsewhere; it need not be a driver."""
        if address in self._job_by_driver and address not in self._ending:
            self._ending.append(address)

    def node_lost(self, node_id: str) -> None:
        """Another node is gone, with the drivers on it."""
        for address in self._job_by_driver:
            if address.node_id == node_id:
                self.process_ended(address)

    def take_over(self, has_workers_of: Callable[[Address], bool]) -> list[str]:
        """The jobs that are over by now; each is told once."""
        if not self._ending:
            return []
        over = [driver for driver in self._ending if not has_workers_of(driver)]
        self._ending = [driver for driver in self._ending if driver not in over]
        return [self._job_by_driver.pop(driver) for driver in over]
