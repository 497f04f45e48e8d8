"""End a cluster, or the nodes of this host, in good order, and see that nothing stays."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clusterpool import config
from clusterpool.cli.failures import NoCluster
from clusterpool.cli.join_file import remove_join_file
from clusterpool.cli.local_nodes import LocalNode, end_nodes, living_nodes, living_sessions
from clusterpool.cli.node_link import NodeLink
from clusterpool.config import ClusterRecord, SessionPaths
from clusterpool.control_store.server import ServerProcess
from clusterpool.errors import ClusterpoolError, NotConnected
from clusterpool.processes.session_folder import remove_session_if_over
from clusterpool.processes.sweep import sweep_stale_sessions

# Nodes of other hosts hear of the end through the head; a dead one is off the list after five seconds.
_OTHERS_WITHIN_S = 10.0
# The workers of a node end with it, but a moment later; what they hold open counts as life in the session.
_LAST_WORKERS_WITHIN_S = 3.0


@dataclass
class StopReport:
    """What a command ended, by node id; `is_store_ended` is False where no control store of ours was running."""

    cluster_id: str
    ended: list[str] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    remaining: list[str] = field(default_factory=list)  # on other hosts
    is_store_ended: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether all went in good order."""
        return not self.killed and not self.remaining


def end_cluster() -> StopReport:
    """End every node of the recorded cluster, then its control store, then remove its files.

    Raises: NoCluster.
    """
    record = config.read_cluster_record()
    if record is None:
        raise NoCluster("no cluster of yours is recorded on this host; there is nothing to end")
    return clean_up_after(record)


def clean_up_after(record: ClusterRecord) -> StopReport:
    """The same for a given record, dead or alive."""
    session = SessionPaths(Path(record.session_folder))
    nodes = living_nodes(session)
    report = StopReport(record.cluster_id)
    server = ServerProcess.attach(session.folder / "store")
    others = _nodes_elsewhere(nodes)
    if others and nodes:
        with suppress(NotConnected), NodeLink(nodes[-1].paths.node_socket) as link:
            link.stop(all_nodes=True)
    _end_in_order(nodes, report)
    if others and server is not None:
        report.remaining = _wait_for_others(session, record)
    # Looked for again: a node may have started it anew meanwhile.
    server = ServerProcess.attach(session.folder / "store")
    if server is not None:
        server.stop()
        report.is_store_ended = True
    _forget(session, record.cluster_id)
    return report


def end_local_nodes(node_id: str | None = None) -> list[StopReport]:
    """End the nodes of this host, or one of them; a control store here ends with the cluster's last node.

    Raises: NoCluster when there is none.
    """
    reports: list[StopReport] = []
    for session in living_sessions():
        all_here = living_nodes(session)
        nodes = [node for node in all_here if node_id is None or node.node_id == node_id]
        if not nodes:
            continue
        report = StopReport(nodes[0].config.cluster_id)
        others = _nodes_elsewhere(all_here)
        _end_in_order(nodes, report)
        if len(nodes) == len(all_here) and not others:
            server = ServerProcess.attach(session.folder / "store")
            if server is not None:
                server.stop()
                report.is_store_ended = True
            _forget(session, report.cluster_id)
        report.remaining = others if node_id is None else []
        reports.append(report)
    if not reports:
        wanted = f"no living node {node_id}" if node_id else "no living node of a cluster"
        raise NoCluster(f"{wanted} is on this host; `clusterpool status` shows the nodes of your cluster")
    return reports


def _end_in_order(nodes: list[LocalNode], report: StopReport) -> None:
    """The heads last: drivers hang on them."""
    for is_head in (False, True):
        phase = [node for node in nodes if node.config.is_head is is_head]
        killed = {node.node_id for node in end_nodes(phase)}
        report.killed += sorted(killed)
        report.ended += [node.node_id for node in phase if node.node_id not in killed]


def _forget(session: SessionPaths, cluster_id: str) -> None:
    with suppress(OSError):
        sweep_stale_sessions([session.folder.parent])
    deadline_s = time.monotonic() + _LAST_WORKERS_WITHIN_S
    while not remove_session_if_over(session) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    remove_join_file(cluster_id)
    config.remove_cluster_record(cluster_id)


def _nodes_elsewhere(nodes: list[LocalNode]) -> list[str]:
    """The cluster's nodes on other hosts, as far as a node here knows."""
    own_host = socket.gethostname()
    for node in reversed(nodes):
        with suppress(ClusterpoolError), NodeLink(node.paths.node_socket) as link:
            return [part.node_id for part in link.describe() if part.host != own_host]
    return []


def _wait_for_others(session: SessionPaths, record: ClusterRecord) -> list[str]:
    """The nodes that are still registered when the patience has run out."""
    from clusterpool.control_store.store import ControlStore

    store: Any = None
    try:
        password = (session.folder / "password").read_text().strip() or None
        store = ControlStore.connect(record.control_store_url, cluster_id=record.cluster_id, password=password)
        deadline_s = time.monotonic() + _OTHERS_WITHIN_S
        while True:
            left = [entry.record.node_id for entry in store.list_nodes().nodes]
            if not left or time.monotonic() >= deadline_s:
                return left
            time.sleep(0.1)
    except (OSError, ClusterpoolError):
        return []
    finally:
        if store is not None:
            store.close()
