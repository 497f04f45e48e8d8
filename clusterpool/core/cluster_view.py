"""The living nodes of the cluster: what each says about itself, and how the scheduler sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated

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


class NodeEntry(msgspec.Struct, frozen=True, gc=False):
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


class SilentNode(msgspec.Struct, frozen=True):
    """A node that the control store has not heard for a while; fields as in NodeEntry."""

    node_id: str
    incarnation: int
    heartbeat_us: int
    silence_s: float


class SilenceReport(msgspec.Struct, frozen=True):
    """Who is silent, at one instant. The rest shows a reader whether it has missed a change."""

    silent: list[SilentNode]
    nodes: int  # how many are listed
    incarnation: int  # the highest ever given


class NodeView(msgspec.Struct, frozen=True, gc=False):
    """One living node as the scheduler sees it.

    While the store answers, its load is half a second old at most; in a large cluster older (core/membership.py).
    """

    record: NodeRecord
    incarnation: int
    load: NodeLoad
    is_suspect: bool

    @property
    def address(self) -> tuple[str, int]:
        return self.record.host, self.record.port

    @property
    def node_id(self) -> str:
        return self.record.node_id

    @property
    def public_key(self) -> str:
        return self.record.public_key

    @property
    def total(self) -> dict[str, float]:
        return self.record.resources

    @property
    def labels(self) -> dict[str, str]:
        return self.record.labels

    @property
    def host_name(self) -> str:
        return self.record.host_name

    @property
    def pid(self) -> int:
        return self.record.pid

    @property
    def available(self) -> dict[str, float]:
        return self.load.available

    @property
    def queue_length(self) -> int:
        return self.load.queue_length

    @property
    def workers(self) -> int:
        return self.load.workers

    @property
    def leases(self) -> int:
        return self.load.leases

    @property
    def load_number(self) -> int:
        return self.load.number

    @property
    def arena_used_bytes(self) -> int:
        return self.load.arena_used_bytes

    @property
    def arena_size_bytes(self) -> int:
        return self.load.arena_size_bytes

    @property
    def spilled_bytes(self) -> int:
        return self.load.spilled_bytes


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

    def trusted_peers(self) -> Iterator[NodeView]:
        """The other nodes to which work may be sent, as they are when one asks."""
        for view in self._view_by_node.values():
            if not view.is_suspect and view.node_id != self.own_node_id:
                yield view

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
        self._view_by_node[node_id] = msgspec.structs.replace(known, load=load)
        self.version += 1
        return True

    def suspect(self, node_id: str, is_suspect: bool) -> None:
        known = self._view_by_node.get(node_id)
        if known is not None and known.is_suspect is not is_suspect:
            self._view_by_node[node_id] = msgspec.structs.replace(known, is_suspect=is_suspect)
            self.version += 1

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
    load = entry.load or NodeLoad(available=entry.record.resources)
    return NodeView(entry.record, entry.incarnation, load, is_suspect)
