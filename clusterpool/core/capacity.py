"""Which processes of a node are told how many CPUs the cluster has, whenever that changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clusterpool.core.cluster_view import ClusterView, NodeRecord
from clusterpool.core.messages import Address, CapacityChanged, WatchCapacity
from clusterpool.core.node_events import Send


class CapacityWatch:
    """Kept by the node whose own `record` is. It takes a process that has ended out of `watchers`."""

    def __init__(self, record: NodeRecord, view: ClusterView) -> None:
        self._record = record
        self._view = view
        self.watchers: set[Address] = set()
        self._told: dict[str, float] = {}

    def message_handlers(self) -> dict[type, Callable[[Address, Any, float], list[Any]]]:
        """For the node's table."""
        return {WatchCapacity: lambda source, _, __: self._asked(source)}

    def _asked(self, source: Address) -> list[Any]:
        self.watchers.add(source)
        return [Send(source, CapacityChanged(self._cpus_by_node()))]

    def look(self) -> list[Any]:
        """The view may have changed: tell who watches."""
        if not self.watchers:
            return []
        cpus_by_node = self._cpus_by_node()
        if cpus_by_node == self._told:
            return []
        self._told = cpus_by_node
        return [Send(watcher, CapacityChanged(cpus_by_node)) for watcher in sorted(self.watchers)]

    def _cpus_by_node(self) -> dict[str, float]:
        # A node that is no member yet, or no more, has its own CPUs all the same.
        own = {self._record.node_id: self._record.resources.get("CPU", 0.0)}
        return own | {view.node_id: view.total.get("CPU", 0.0) for view in self._view}
