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


def render(target: Target, nodes: list[NodePart], *, width: int = 200) -> Group:
    """A table of the nodes, and what they have together. `width`: characters of a line of the terminal; what does not
    fit into it is left out whole, the least wanted first, since the half of each column would tell nothing.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    columns = _columns(nodes)
    for title in _DROPPED_IN_ORDER:
        if _width_of(columns) > width:
            del columns[title]
    for title in columns:
        table.add_column(title, justify="right" if title in _NUMBERS else "left", no_wrap=title != "OTHER")
    for cells, node in zip(zip(*columns.values(), strict=True), nodes, strict=True):
        styles = ["" if title != "STATE" else "green" if node.alive else "yellow" for title in columns]
        table.add_row(*(Text(cell, style) for cell, style in zip(cells, styles, strict=True)))
    return Group(Text.from_markup(_heading(target, nodes)), table, Text(_together(nodes)))


# By how much people miss them, and how wide they are; `--json` has everything.
_DROPPED_IN_ORDER = ("ADDRESS", "OTHER", "HOST", "MEMORY", "GPU", "QUEUE", "WORKERS", "STORE")
_NUMBERS = ("CPU", "GPU", "MEMORY", "STORE", "WORKERS", "QUEUE")
_GAP = 2
_OTHER_WIDTH_MAX = 24


def _columns(nodes: list[NodePart]) -> dict[str, list[str]]:
    """The cells of each column."""
    return {
        "NODE": [_shown_name(node) for node in nodes],
        "HOST": [node.host for node in nodes],
        "ADDRESS": [node.address or "-" for node in nodes],
        "STATE": [("alive" if node.alive else "silent") + (", head" if node.is_head else "") for node in nodes],
        "CPU": [_used(node, "CPU") for node in nodes],
        "GPU": [_used(node, "GPU") for node in nodes],
        "MEMORY": [show_size(node.total.get("memory", 0)) for node in nodes],
        "STORE": [_store(node) for node in nodes],
        "WORKERS": [str(node.workers) for node in nodes],
        "QUEUE": [str(node.queue_length) for node in nodes],
        "OTHER": [_others(node) for node in nodes],
    }


def _width_of(columns: dict[str, list[str]]) -> int:
    from rich.cells import cell_len

    widths = [
        min(max(map(cell_len, [title, *cells])), _OTHER_WIDTH_MAX if title == "OTHER" else 1000)  # that is wrapped
        for title, cells in columns.items()
    ]
    return sum(widths) + _GAP * (len(widths) - 1)


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
