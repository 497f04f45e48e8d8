"""The living nodes of the cluster: what each says about itself, and how the scheduler sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any

import msgspec

from clusterpool.core.task_messages import Amount


class NodeRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a node says about itself once, when it joins."""

    node_id: str
    host: str  # where its peers reach it
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    public_key: str  # CURVE, Z85 text
    resources: dict[str, Amount]
    labels: dict[str, str] = {}
    host_name: str = ""
    pid: int = 0
    session_folder: str = ""  # for drivers on the same host
    python_version: str = ""
    clusterpool_version: str = ""


class NodeLoad(msgspec.Struct, frozen=True):
    """What a node says about itself with every heartbeat."""

    available: dict[str, Annotated[float, msgspec.Meta(ge=-1e15, le=1e15)]]  # workers that go on may take it below 0
    queue_length: int = 0
    workers: int = 0
    leases: int = 0
    number: int = 0  # grows: what comes by way of the store may be older than what the node itself has told us
    arena_used_bytes: int = 0
    arena_size_bytes: int = 0
    spilled_bytes: int = 0


class NodeEntry(msgspec.Struct, frozen=True):
    """One living node as the control store has it."""

    record: NodeRecord
    incarnation: int
    heartbeat_us: int  # the server's clock at the last heartbeat, in microseconds since 1970; compare, do not subtract
    silence_s: float  # the server's clock now, less its clock then
    load: NodeLoad | None = None  # None until the first heartbeat


class NodesSnapshot(msgspec.Struct, frozen=True):
    """All living nodes, read at one instant, and the number of the last event before that instant."""

    nodes: list[NodeEntry]
    last_event_id: int = 0
    generation: str = ""  # changes when the store lost what it held; empty when nobody has registered yet


class NodeView(msgspec.Struct, frozen=True):
    """One living node as the scheduler sees it, half a second old at most while the store answers."""

    node_id: str
    incarnation: int
    address: tuple[str, int]
    public_key: str
    total: dict[str, float]
    available: dict[str, float]
    queue_length: int
    workers: int
    arena_used_bytes: int
    arena_size_bytes: int
    labels: dict[str, str]
    is_suspect: bool
    host_name: str = ""
    pid: int = 0
    spilled_bytes: int = 0
    leases: int = 0
    load_number: int = 0


class ClusterView:
    """The living nodes, this one included; read by the scheduler, written by `Membership` only."""

    def __init__(self, own_node_id: str) -> None:
        self.own_node_id = own_node_id
        self.version = 0  # grows with every change
        self._view_by_node: dict[str, NodeView] = {}

    def __iter__(self) -> Iterator[NodeView]:
        """In order of joining, as this node learned of it."""
        return iter(self._view_by_node.values())

    def __len__(self) -> int:
        return len(self._view_by_node)

    def __contains__(self, node_id: object) -> bool:
        return node_id in self._view_by_node

    def get(self, node_id: str) -> NodeView | None:
        return self._view_by_node.get(node_id)

    def trusted_peers(self) -> list[NodeView]:
        """The other nodes to which work may be sent."""
        return [
            view for view in self._view_by_node.values() if view.node_id != self.own_node_id and not view.is_suspect
        ]

    def total(self) -> dict[str, float]:
        return self._sum(lambda view: view.total)

    def available(self) -> dict[str, float]:
        return self._sum(lambda view: view.available)

    def put(self, view: NodeView) -> None:
        known = self._view_by_node.get(view.node_id)
        if known is not None and known.incarnation == view.incarnation and known.load_number > view.load_number:
            view = msgspec.structs.replace(known, is_suspect=view.is_suspect)
        self._view_by_node[view.node_id] = view
        self.version += 1

    def hear(self, node_id: str, load: NodeLoad) -> bool:
        """A node has told us its load itself; whether that was news."""
        known = self._view_by_node.get(node_id)
        if known is None or known.load_number >= load.number:
            return False
        self._view_by_node[node_id] = msgspec.structs.replace(known, **_load_fields(load))
        self.version += 1
        return True

    def drop(self, node_id: str) -> None:
        if self._view_by_node.pop(node_id, None) is not None:
            self.version += 1

    def _sum(self, amounts: Callable[[NodeView], dict[str, float]]) -> dict[str, float]:
        total: dict[str, float] = {}
        for view in self._view_by_node.values():
            for name, amount in amounts(view).items():
                total[name] = total.get(name, 0.0) + amount
        return total


def view_of_entry(entry: NodeEntry, *, is_suspect: bool) -> NodeView:
    """A node that has sent no heartbeat yet counts as wholly free."""
    record, load = entry.record, entry.load or NodeLoad(available=entry.record.resources)
    return NodeView(
        node_id=record.node_id,
        incarnation=entry.incarnation,
        address=(record.host, record.port),
        public_key=record.public_key,
        total=record.resources,
        labels=record.labels,
        is_suspect=is_suspect,
        host_name=record.host_name,
        pid=record.pid,
        **_load_fields(load),
    )


def _load_fields(load: NodeLoad) -> dict[str, Any]:
    return {
        "available": load.available,
        "queue_length": load.queue_length,
        "workers": load.workers,
        "leases": load.leases,
        "load_number": load.number,
        "arena_used_bytes": load.arena_used_bytes,
        "arena_size_bytes": load.arena_size_bytes,
        "spilled_bytes": load.spilled_bytes,
    }
