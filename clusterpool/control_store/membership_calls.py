"""What a node's membership asks of the control store, and what the change feed tells it of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from clusterpool.control_store.actor_registry import actor_event
from clusterpool.control_store.port import ControlStorePort, Event
from clusterpool.control_store.records import decode_record
from clusterpool.control_store.unreadable import OnUnreadable, log_unreadable, sendable, skipped_if_unreadable
from clusterpool.core import membership as ms
from clusterpool.core import node_events as e
from clusterpool.core.cluster_view import NodeRecord

# Each event wakes each node's reader, which costs the server some 12 us: a hundred actors a second would take all its
# time in a cluster of a thousand nodes. There a reader takes ten times a second what has gathered; that much later is a
# busy time's news known.
_FEED_PAUSE_S_PER_NODE = 0.0001
_FEED_PAUSE_S_MAX = 0.5


def feed_pause_s(nodes_count: int) -> float:
    """How long a reader of the change feed rests after it has read something."""
    return min(nodes_count * _FEED_PAUSE_S_PER_NODE, _FEED_PAUSE_S_MAX) if nodes_count > ms.SMALL_MAX else 0.0


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
            return ms.Registered(store.register_node(command.record, self._registration, above=command.above))
        if isinstance(command, ms.RestoreNode):
            return ms.Restored(store.restore_node(command.record, command.incarnation))
        if isinstance(command, ms.SendHeartbeat):
            answer = store.heartbeat(self._node_id, command.incarnation, command.load)
            return ms.HeartbeatAnswered(answer, command.incarnation)
        if isinstance(command, ms.ReadNodes):
            return ms.NodesRead(store.list_nodes())
        if isinstance(command, ms.ReadSilent):
            return ms.SilentRead(store.silent_nodes(command.silence_s))
        if isinstance(command, ms.FindNode):
            return ms.NodeFound(command.node_id, store.find_node(command.node_id))
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


def node_event(event: Event) -> ms.NodeEventRead:
    """What an event about a node means to the membership."""
    fields = event.fields
    incarnation = int(fields.get("incarnation", "0"))
    node_id, record = fields.get("node_id", ""), None
    if "record" in fields:
        record = sendable(decode_record(fields["record"], NodeRecord))
        if record.node_id != node_id:
            raise ValueError(f"the record of {record.node_id!r} comes with the join of {node_id!r}")
    return ms.NodeEventRead(event.kind, node_id, incarnation, fields.get("reason", ""), record)


def feed_events(
    events: Iterable[Event],
    tell: OnUnreadable = log_unreadable,
    read: Callable[[Event], ms.NodeEventRead] = node_event,
) -> Iterator[ms.NodeEventsRead | e.ActorEventRead]:
    """What events of the change feed mean to a node's machine, in their order; those about nodes in one piece.

    read: `node_event`, or what gives the same.
    """
    about_nodes: list[ms.NodeEventRead] = []
    for event in events:
        if event.kind in ("node_joined", "node_left", "node_died"):
            with skipped_if_unreadable("events", event.id, tell):
                about_nodes.append(read(event))
            continue
        if about_nodes:
            yield ms.NodeEventsRead(about_nodes)
            about_nodes = []
        if event.kind in ("actor_changed", "actor_created"):
            about_actor = None
            with skipped_if_unreadable("events", event.id, tell):
                about_actor = actor_event(event.fields)
            if about_actor is not None:
                yield about_actor
    if about_nodes:
        yield ms.NodeEventsRead(about_nodes)
