"""Starts launched_node.py in the place of a node."""

from __future__ import annotations

from clusterpool.config import NodeConfig, SessionPaths
from clusterpool.ids import new_node_id
from clusterpool.processes.launch import NodeProcess, launch_node


def config_of(session: SessionPaths, do: str = "serve", **changes: object) -> NodeConfig:
    """Of a node that does what its `do_...` of that name says."""
    values = {
        "session_folder": str(session.folder),
        "node_id": new_node_id(),
        "cluster_id": "c1",
        "labels": {"do": do},
        **changes,
    }
    return NodeConfig(**values)  # type: ignore[arg-type]


def launch(config: NodeConfig) -> NodeProcess:
    """Its folder must be on PYTHONPATH."""
    return launch_node(config, node_module="launched_node")
