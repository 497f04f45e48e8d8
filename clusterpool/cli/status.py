"""What the cluster has and does: as a table for people, as JSON for programs."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from clusterpool import config
from clusterpool.cli.failures import NoCluster
from clusterpool.cli.node_link import NodeLink
from clusterpool.core.messages import NodePart
from clusterpool.errors import NotConnected
from clusterpool.sizes import show_size

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Target:
    """A living cluster, as this host knows it. `record` is None for one that was named by an address."""

    node_socket: str
    record: config.ClusterRecord | None


def find_cluster(address: str | None) -> Target:
    """The cluster of `address`, else of CLUSTERPOOL_ADDRESS, else the recorded one.

    Raises: NoCluster.
    """
    address = address or os.environ.get("CLUSTERPOOL_ADDRESS") or None
    if address is not None:
        from clusterpool.client.bootstrap import socket_of

        try:
            return Target(socket_of(address), None)
        except NotConnected as exc:
            raise NoCluster(str(exc)) from exc
    record = config.read_cluster_record()
    if record is None:
        raise NoCluster("no cluster of yours runs on this host; start one with `clusterpool up`")
    if not config.is_alive(record):
        raise NoCluster(
            f"cluster {record.cluster_id} is recorded, but its node on this host has ended (it was killed, or the "
            "machine was restarted); `clusterpool down` removes what is left of it, `clusterpool up` starts a new one"
        )
    return Target(record.node_socket, record)


def read_nodes(target: Target) -> list[NodePart]:
    """The cluster's nodes, the head first.

    Raises: NoCluster if the node does not answer; VersionMismatch.
    """
    try:
        with NodeLink(target.node_socket) as link:
            nodes = link.describe()
    except NotConnected as exc:
        raise NoCluster(f"the cluster cannot be asked: {exc}") from exc
    return sorted(nodes, key=lambda node: (not node.is_head, node.node_id))


def to_json(target: Target, nodes: list[NodePart]) -> dict[str, Any]:
    """Everything, for programs. Amounts of memory are in bytes."""
    record = target.record
    return {
        "cluster_id": record.cluster_id
        if record is not None
        else Path(target.node_socket).parents[1].name.removeprefix("s-"),
        "address": target.node_socket,
        "control_store": record.control_store_url if record is not None else None,
        "started_at_s": record.started_at_s if record is not None else None,
        "total": _summed(nodes, "total"),
        "available": _summed(nodes, "available"),
        "nodes": [node_to_json(node) for node in nodes],
    }


def node_to_json(node: NodePart) -> dict[str, Any]:
    """One node, for programs."""
    fields = msgspec.structs.asdict(node)
    for key in ("total", "available"):
        fields[key] = _named(fields[key])
    return fields


def render(target: Target, nodes: list[NodePart]) -> Group:
    """A table of the nodes, and what they have together."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("NODE", "HOST", "ADDRESS", "STATE"):
        table.add_column(title, no_wrap=True)
    for title in ("CPU", "GPU", "MEMORY", "STORE", "WORKERS", "QUEUE"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("OTHER")
    for node in nodes:
        state = ("[green]alive" if node.alive else "[yellow]silent") + (", head" if node.is_head else "")
        memory, queue = show_size(node.total.get("memory", 0)), str(node.queue_length)
        table.add_row(
            Text(_shown_name(node)), node.host, node.address or "-", state, _used(node, "CPU"), _used(node, "GPU"),
            memory, _store(node), str(node.workers), queue, Text(_others(node)),
        )  # fmt: skip
    return Group(Text.from_markup(_heading(target, nodes)), table, Text(_together(nodes)))


def _heading(target: Target, nodes: list[NodePart]) -> str:
    record = target.record
    count = f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}"
    if record is None:
        return f"[bold]Cluster at {target.node_socket}[/bold]: {count}\n"
    minutes = max(0, int(time.time() - record.started_at_s)) // 60
    for_how_long = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
    return (
        f"[bold]Cluster {record.cluster_id}[/bold]: {count}, up for {for_how_long}\n"
        f"control store {record.control_store_url}, session folder {record.session_folder}\n"
    )


def _together(nodes: list[NodePart]) -> str:
    total, available = _summed(nodes, "total"), _summed(nodes, "available")
    queued = sum(node.queue_length for node in nodes)
    workers = sum(node.workers for node in nodes)
    cpus = f"{total.get('CPU', 0) - available.get('CPU', 0):g} of {total.get('CPU', 0):g} CPUs in use"
    return f"\n{cpus}, {workers} workers, {queued} requests waiting for a worker"


def _used(node: NodePart, name: str) -> str:
    total = node.total.get(name, 0)
    return f"{total - node.available.get(name, 0):g}/{total:g}" if total else "-"


def _store(node: NodePart) -> str:
    spilled = f" +{show_size(node.spilled_bytes)} on disk" if node.spilled_bytes else ""
    return f"{show_size(node.store_used_bytes)}/{show_size(node.store_bytes)}{spilled}"


def _others(node: NodePart) -> str:
    names = [name for name in _named(node.total) if name not in ("CPU", "GPU", "memory")]
    labels = [f"{name}={value}" for name, value in node.labels.items() if name != "name"]
    return ", ".join([*(f"{name} {_used(node, name)}" for name in names), *labels])


def _shown_name(node: NodePart) -> str:
    return f"{node.node_id} {node.labels['name']}" if node.labels.get("name") else node.node_id


def _named(amounts: dict[str, float]) -> dict[str, float]:
    """Without the resource that each node has under its own id, which is for the scheduler."""
    return {name: amount for name, amount in amounts.items() if not name.startswith("node:")}


def _summed(nodes: list[NodePart], key: str) -> dict[str, float]:
    total: dict[str, float] = {}
    for node in nodes:
        for name, amount in _named(getattr(node, key)).items():
            total[name] = total.get(name, 0.0) + amount
    return total
