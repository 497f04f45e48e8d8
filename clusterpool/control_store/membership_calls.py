"""What a node's membership asks of the control store, and what the change feed tells it of the others."""

from __future__ import annotations

from typing import Any

from clusterpool.control_store.port import ControlStorePort, Event
from clusterpool.core import membership as ms


class MembershipCalls:
    """The membership's commands for one node, by whichever connection its shell has."""

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id
        self._registration = 1  # counted up with each that is known to have succeeded

    def carry_out(self, store: ControlStorePort, command: Any) -> Any:
        """Carry out a command of the membership; the event that answers it, or None.

        Raises: NotConnected; sent again, a registration whose answer was lost is no second one.
        """
        if isinstance(command, ms.RegisterNode):
            return ms.Registered(store.register_node(command.record, self._registration))
        if isinstance(command, ms.RestoreNode):
            return ms.Restored(store.restore_node(command.record, command.incarnation))
        if isinstance(command, ms.SendHeartbeat):
            answer = store.heartbeat(self._node_id, command.incarnation, command.load)
            return ms.HeartbeatAnswered(answer, command.incarnation)
        if isinstance(command, ms.ReadNodes):
            return ms.NodesRead(store.list_nodes())
        if isinstance(command, ms.DeclareNodeDead):
            store.declare_node_dead(command.node_id, command.incarnation, command.reason)
            return None
        if isinstance(command, ms.RemoveNode):
            store.remove_node(self._node_id, command.incarnation)
            return None
        raise AssertionError(f"no such command of the membership: {command!r}")

    def answered(self, event: Any) -> None:
        """What `carry_out` gave has reached the node: its next registration is another one."""
        if isinstance(event, ms.Registered):
            self._registration += 1


def node_event(event: Event) -> ms.NodeEventRead | None:
    """What an event of the change feed says of a node, if it is about one."""
    if event.kind not in ("node_joined", "node_left", "node_died"):
        return None
    fields = event.fields
    incarnation = int(fields.get("incarnation", "0"))
    return ms.NodeEventRead(event.kind, fields.get("node_id", ""), incarnation, fields.get("reason", ""))
