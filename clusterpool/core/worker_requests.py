"""The workers that a set has asked its node for and that have not come yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clusterpool.core.messages import Address, CancelRequest, JobPart, RequestWorkers, WorkerDemand
from clusterpool.core.owner_events import Send

if TYPE_CHECKING:
    from collections.abc import Iterator


class WorkerRequests:
    """Requests under way, oldest first. `numbers`: the owner's, never one twice."""

    def __init__(self, node: Address, job: JobPart, demand: WorkerDemand, numbers: Iterator[int]) -> None:
        self._node = node
        self._job = job
        self._demand = demand
        self._numbers = numbers
        self._missing: dict[int, int] = {}  # by request number, how many are still to come; never 0

    def __contains__(self, request: object) -> bool:
        return request in self._missing

    def __bool__(self) -> bool:
        return bool(self._missing)

    def __iter__(self) -> Iterator[int]:
        return iter(self._missing)

    @property
    def count(self) -> int:
        """How many workers are still to come."""
        return sum(self._missing.values())

    def ask(self, count: int) -> Send:
        """Ask for `count` workers more."""
        request = next(self._numbers)
        self._missing[request] = count
        return Send(self._node, RequestWorkers(request, count, self._demand, self._job))

    def count_down(self, request: int, count: int = 1) -> None:
        """So many of them have come, or never will."""
        left = self._missing.get(request, 0) - count
        if left > 0:
            self._missing[request] = left
        else:
            self._missing.pop(request, None)

    def cancel(self, count: int) -> list[Send]:
        """Expect `count` fewer, or all that are left; one that comes nevertheless is given back."""
        commands: list[Send] = []
        for request, missing in list(self._missing.items()):
            cancelled = min(missing, count)
            if cancelled > 0:
                count -= cancelled
                self.count_down(request, cancelled)
                commands.append(Send(self._node, CancelRequest(request, cancelled)))
        return commands

    def cancel_all(self) -> list[Send]:
        """Expect nobody any more."""
        return self.cancel(self.count)
