"""The nodes of this user on this host that live, found by their folders and locks rather than by asking them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass

from clusterpool.config import NodeConfig, NodePaths, SessionPaths, is_folder_locked, user_folders
from clusterpool.processes.death import (
    ProcessIdentity,
    has_exited,
    is_same_process,
    kill_process,
    open_pidfd_of,
    read_process,
)
from clusterpool.processes.sweep import sweep_stale_sessions

# An orderly end takes a fraction of a second; a node whose disk is slow may still be spilling.
END_WITHIN_S = 10.0
_KILLED_WITHIN_S = 5.0


@dataclass(frozen=True)
class LocalNode:
    """A node of a cluster that was started by `up` or `start`, not one that a program keeps for itself."""

    paths: NodePaths
    config: NodeConfig
    identity: ProcessIdentity

    @property
    def node_id(self) -> str:
        return self.config.node_id


def living_sessions() -> list[SessionPaths]:
    """Of every session folder of this user, whoever lives in it."""
    return [
        SessionPaths(path)
        for folder in user_folders()
        for path in sorted(folder.iterdir())
        if path.name.startswith("s-") and path.is_dir() and not path.is_symlink()
    ]


def living_nodes(session: SessionPaths) -> list[LocalNode]:
    """The session's nodes, heads last: that is the order in which to end them."""
    found: list[LocalNode] = []
    for paths in session.nodes():
        if not is_folder_locked(paths.folder):
            continue
        identity = read_process(paths.pid_file("node"))
        try:
            config = NodeConfig.from_json(paths.config_file.read_text())
        except (OSError, ValueError):
            continue  # it is just ending, or another version of clusterpool started it
        if identity is not None and not config.is_embedded and is_same_process(identity):
            found.append(LocalNode(paths, config, identity))
    return sorted(found, key=lambda node: node.config.is_head)


def end_nodes(nodes: Iterable[LocalNode], *, timeout_s: float = END_WITHIN_S) -> list[LocalNode]:
    """End them in good order, all at once; those that had to be killed because they did not within `timeout_s`."""
    ending: list[tuple[LocalNode, int]] = []
    for node in nodes:
        descriptor = open_pidfd_of(node.identity)
        if descriptor is not None:
            ending.append((node, descriptor))
            kill_process(node.identity, signal.SIGTERM)
    killed: list[LocalNode] = []
    deadline_s = time.monotonic() + timeout_s
    try:
        for node, descriptor in ending:
            if not has_exited(descriptor, max(0.0, deadline_s - time.monotonic())):
                kill_process(node.identity, signal.SIGKILL, timeout_s=_KILLED_WITHIN_S)
                killed.append(node)
    finally:
        for _, descriptor in ending:
            os.close(descriptor)
    if killed:
        # They could not remove their files themselves.
        sweep_stale_sessions(list({node.paths.session.folder.parent for node in killed}))
    return killed
