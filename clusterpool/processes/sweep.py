"""Remove what dead sessions left behind (after kill -9, a crash of the machine), and nothing of living ones.

Runs at every start, so the usual case, where nothing is stale, costs a few system calls for each living
session.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from clusterpool.config import NodePaths, SessionPaths, user_folders
from clusterpool.processes.death import (
    ProcessIdentity,
    is_same_process,
    kill_process,
    process_identity,
    read_process,
)
from clusterpool.processes.session_folder import (
    DEAD_PREFIX,
    NEW_PREFIX,
    remove_folder,
    remove_node_files,
    remove_user_folder_if_empty,
    try_lock,
)

# The variable by which each process of a session can be known for one, even when it has no other mark.
SESSION_VARIABLE = "CLUSTERPOOL_SESSION"
# How long an embedded node may outlive its driver. It needs a fraction of a second; one that is stopped or
# stuck would stay for ever. Sooner, and a script run in a loop would shoot the node of the run before,
# which is about to end.
ORPHAN_GRACE_S = 10.0
# A folder gets its name within milliseconds of being made. After a minute its maker has died in between.
UNNAMED_GRACE_S = 60.0
_SERVER_NAMES = ("valkey", "redis")
_KILL_WAIT_S = 1.0
_ORPHAN_MARK = "orphaned"


@dataclass
class SweepReport:
    """What was found and removed; `failures` is for the caller's log."""

    session_ids: list[str] = field(default_factory=list)
    node_ids: list[str] = field(default_factory=list)
    pids_killed: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def sweep_stale_sessions(folders: list[Path] | None = None) -> SweepReport:
    """Sweep the given `clusterpool-<uid>` folders, by default all in which this user may have left something.

    Safe to run in several processes at once, and at any moment of another's start or end.
    """
    report = SweepReport()
    for folder in user_folders() if folders is None else folders:
        try:
            if folder.stat().st_uid != os.getuid():
                continue
            entries = [(entry.name, Path(entry.path)) for entry in os.scandir(folder) if _is_folder(entry)]
        except FileNotFoundError:
            continue
        for name, path in entries:
            try:
                if name.startswith("s-"):
                    _sweep_session(SessionPaths(path), report)
                else:
                    _sweep_unnamed(path)
            except OSError as error:  # old litter that cannot be removed must not keep anybody from starting
                report.failures.append(f"{path}: {error}")
        if report.session_ids:
            remove_user_folder_if_empty(folder)
    return report


def belongs_to_session(pid: int, session_id: str) -> bool:
    """Whether the process was started within the session: by its environment, or by a path in its command
    line.
    """
    mark = f"{SESSION_VARIABLE}={session_id}".encode()
    folder = f"/s-{session_id}/".encode()
    try:
        if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return True
        # A server that rewrites its title may overwrite the environment, but shows the socket it listens on.
        return folder in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)  # whatever a link points to is not ours


def _sweep_session(session: SessionPaths, report: SweepReport) -> None:
    lock = try_lock(session.folder)
    if lock is None:
        _sweep_nodes_of_living_session(session, report)
        return
    try:
        server = _server_of(session)
        if server is not None and _has_clients(server):
            return  # nodes of other hosts live on with it
        for node in session.nodes():
            _sweep_node(node, report)
        if server is not None and kill_process(server, timeout_s=_KILL_WAIT_S):
            report.pids_killed.append(server.pid)
        for arena in node_arenas(session):
            arena.unlink(missing_ok=True)
        remove_folder(session.folder)
        report.session_ids.append(session.session_id)
    finally:
        os.close(lock)


def _server_of(session: SessionPaths) -> ProcessIdentity | None:
    """The control store of a cluster that was started by command; it is no child of any node.

    It is known by the folder that it runs in: its pid may have changed since it was written down, and it writes over
    its environment.
    """
    if not session.store_folder.is_dir():
        return None
    for name in os.listdir("/proc"):  # noqa: PTH208
        try:
            if not name.isdigit() or os.readlink(f"/proc/{name}/cwd") != str(session.store_folder):  # noqa: PTH115
                continue
            if Path(f"/proc/{name}/comm").read_text().startswith(_SERVER_NAMES):  # a shell may stand there as well
                return process_identity(int(name))
        except OSError:
            continue
    return None


def _has_clients(server: ProcessIdentity) -> bool:
    import psutil  # takes longer to load than the rest of a sweep, and is hardly ever needed

    try:
        connections = psutil.Process(server.pid).net_connections("tcp")
    except psutil.Error:
        return False
    return any(connection.status == psutil.CONN_ESTABLISHED for connection in connections)


def node_arenas(session: SessionPaths) -> list[Path]:
    """Of all nodes of the session, also of those whose folder is gone."""
    pattern = session.node("n*").arena_file
    return list(pattern.parent.glob(pattern.name))


def _sweep_nodes_of_living_session(session: SessionPaths, report: SweepReport) -> None:
    for node in session.nodes():
        lock = try_lock(node.folder)
        if lock is None:
            _end_orphan(node, report)
            continue
        try:
            _sweep_node(node, report)
        finally:
            os.close(lock)


def _sweep_node(node: NodePaths, report: SweepReport) -> None:
    """The caller holds the node's lock or the session's, hence no living node does.

    Another sweep may hold the other one, and do the same at the same time: nothing here minds what is gone
    already.
    """
    _kill_recorded(node, report)
    remove_node_files(node, _spill_path(node))
    report.node_ids.append(node.node_id)


def _end_orphan(node: NodePaths, report: SweepReport) -> None:
    """Kill an embedded node that still lives though its driver has long been dead; a later sweep removes
    its files.
    """
    driver = read_process(node.pid_file("driver"))
    if driver is None or is_same_process(driver):
        return
    mark = node.folder / _ORPHAN_MARK
    try:
        first_seen_s = mark.stat().st_mtime
    except FileNotFoundError:
        try:
            mark.touch(mode=0o600)
        except FileNotFoundError:
            pass  # it has just ended
        return
    if time.time() - first_seen_s < ORPHAN_GRACE_S:
        return
    _kill_recorded(node, report)
    lock = try_lock(node.folder)
    if lock is not None:
        try:
            remove_node_files(node, _spill_path(node))
            report.node_ids.append(node.node_id)
        finally:
            os.close(lock)


def _kill_recorded(node: NodePaths, report: SweepReport) -> None:
    try:
        files = sorted(path for path in node.folder.iterdir() if path.suffix == ".pid")
    except FileNotFoundError:
        return
    for file in files:
        # The driver is the user's program: a session never kills it.
        identity = None if file.name == "driver.pid" else read_process(file)
        if identity is None or not _is_ours(identity, node):
            continue
        if kill_process(identity, timeout_s=_KILL_WAIT_S):
            report.pids_killed.append(identity.pid)


def _is_ours(identity: ProcessIdentity, node: NodePaths) -> bool:
    return is_same_process(identity) and belongs_to_session(identity.pid, node.session.session_id)


def _spill_path(node: NodePaths) -> Path | None:
    """Where the node spilled to, from what it was told; only the one field, so that any version's file can
    be read.
    """
    try:
        spill_folder = json.loads(node.config_file.read_text()).get("spill_folder")
    except (OSError, ValueError, AttributeError):
        return None
    return None if spill_folder is None else Path(spill_folder) / node.arena_file.name


def _sweep_unnamed(path: Path) -> None:
    """A folder that was on its way in (.new-) or out (.dead-) when its process was killed."""
    if path.name.startswith(DEAD_PREFIX):
        import shutil

        shutil.rmtree(path, ignore_errors=True)
    elif path.name.startswith(NEW_PREFIX):
        try:
            if time.time() - path.stat().st_mtime < UNNAMED_GRACE_S:
                return
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_folder(path)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)
