"""Groups without a size of their own: one worker for each CPU of the cluster, while nodes come and go.

    SetOpened(follows_cluster) --WatchCapacity--> node
    node --CapacityChanged--> all such groups get the new size: they ask for workers, or let the least busy ones go
    node --NodeLost--> they want fewer before the workers of that node are taken out, so that those are not replaced

A size that the user gives to such a group ends this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clusterpool.core import owner_events as e
from clusterpool.core.messages import Address, CapacityChanged, WatchCapacity

if TYPE_CHECKING:
    from clusterpool.core.owner import OwnerMachine

Commands = list[e.Command]

# No message asks for more workers (WorkerCount); a node may say that it has any number of CPUs.
WORKERS_MAX = 100_000


class Following:
    """The groups of one owner that follow the cluster, and the CPUs that this has."""

    def __init__(self, owner: OwnerMachine) -> None:
        self._owner = owner
        self._numbers: dict[int, None] = {}  # of the sets
        self._cpus_by_node: dict[str, float] = {}  # empty until the node has answered

    def opened(self, set_number: int) -> Commands:
        """A group is to follow. (The size that it was opened with may be out of date already; the answer sets that.)"""
        self._numbers[set_number] = None
        return [e.Send(self._owner.node, WatchCapacity())]

    def left(self, set_number: int) -> None:
        """It has got a size of its own, or ends."""
        self._numbers.pop(set_number, None)

    def changed(self, _source: Address, message: CapacityChanged, now_s: float) -> Commands:
        """The node tells what there is."""
        self._cpus_by_node = dict(message.cpus_by_node)
        commands: Commands = self._set_sizes()
        for number in list(self._numbers):
            worker_set = self._owner.sets[number]
            assert worker_set.size is not None, "only groups follow"
            commands += self._owner.checked(worker_set.resize(worker_set.size, now_s))
        return commands

    def node_lost(self, node_id: str) -> Commands:
        """A node is gone, and its workers are about to be taken out."""
        if self._cpus_by_node.pop(node_id, None) is None:
            return []
        commands = self._set_sizes()
        for number in self._numbers:
            self._owner.sets[number].stopping.expect_loss(node_id)
        return commands

    def _set_sizes(self) -> Commands:
        size = min(max(1, int(sum(self._cpus_by_node.values()))), WORKERS_MAX)
        commands: Commands = []
        for number in list(self._numbers):
            worker_set = self._owner.sets.get(number)
            if worker_set is None or worker_set.is_closing:
                del self._numbers[number]
            elif worker_set.size != size:
                worker_set.size = size
                commands.append(e.SetSizeChanged(number, size))
        return commands
