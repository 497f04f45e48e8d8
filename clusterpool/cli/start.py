"""Start a cluster on this host, or a node that joins one; on any failure nothing stays behind.

up:              session folder, keys, password -> control store -> join file -> nodes -> all know each other -> record
start --address: session folder, keys and password from the join file -> node -> it is a member
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from clusterpool import config, ids
from clusterpool.cli.cluster_file import ClusterPlan, NodePlan
from clusterpool.cli.failures import AlreadyRunning, CommandFailed, NoCluster, WrongFile
from clusterpool.cli.join_file import JoinFile, join_file_path, remove_join_file, write_join_file
from clusterpool.cli.node_link import NodeLink
from clusterpool.cli.stop import clean_up_after
from clusterpool.control_store.address import redacted
from clusterpool.control_store.server import ServerProcess, free_port
from clusterpool.control_store.store import ControlStore
from clusterpool.core.messages import NodePart
from clusterpool.errors import NotConnected, StartFailed
from clusterpool.node.cluster_keys import ClusterKeys
from clusterpool.processes.launch import NodeProcess, describe_exit, launch_node, log_tail
from clusterpool.processes.session_folder import make_or_join_session, remove_session_if_over
from clusterpool.processes.sweep import sweep_stale_sessions
from clusterpool.sizes import parse_size

KEYS_NAME = "keys.json"
PASSWORD_NAME = "password"
STORE_NAME = "store"
# Each node must have heard of each other one; on a busy machine the nodes themselves need seconds to start.
JOIN_WITHIN_S = 30.0
# A member reads the list of nodes at once, and hears of news within half a second.
_OTHERS_WITHIN_S = 5.0
# A control store that runs already answers at once; a node would wait for one that is only away for a while.
_STORE_WITHIN_S = 3.0
_OBJECT_STORE_BYTES_MIN = 16 << 20
_PAGE_BYTES = 4096


@dataclass(frozen=True)
class StartedCluster:
    """What `up` and `start` tell their user."""

    cluster_id: str
    session_folder: str
    node_socket: str
    control_store: str  # its address, without the password
    join_file: str
    nodes: list[NodePart]


@dataclass
class _Undo:
    """What to take back, the last first, if the start does not succeed."""

    steps: list[Callable[[], object]] = field(default_factory=list)

    @contextlib.contextmanager
    def on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # Ctrl-C too
            for step in reversed(self.steps):
                with contextlib.suppress(Exception):
                    step()
            raise


def start_cluster(plan: ClusterPlan) -> StartedCluster:
    """Start a control store, a head and the other nodes, and record the cluster as this user's.

    Raises: AlreadyRunning, StartFailed, NotConnected, WrongFile.
    """
    with _only_start():
        return _start_cluster(plan)


@contextlib.contextmanager
def _only_start() -> Iterator[None]:
    """Wait until no other start of this user's is under way: of two at once, only one would have its cluster recorded,
    and nothing would ever end the other.
    """
    home = config.home_folder()
    config.make_private_folder(home, variable="CLUSTERPOOL_HOME")
    folder = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Where the file system has no locks (a home folder on some network), all goes on as it can.
        with contextlib.suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _start_cluster(plan: ClusterPlan) -> StartedCluster:
    _refuse_second_cluster()
    _check_host(plan.listen_host)
    sweep_stale_sessions()
    session = config.SessionPaths.in_base(ids.new_session_id())
    undo = _Undo()
    with undo.on_failure():
        lock = make_or_join_session(session)
        undo.steps.append(lambda: remove_session_if_over(session))
        try:
            keys = ClusterKeys.generate()
            url, password = _control_store(plan, session, lock, undo)
        finally:
            os.close(lock)
        join = JoinFile.make(session.session_id, url, password, keys)
        _write_secrets(session, join)
        path = write_join_file(join)
        undo.steps.append(lambda: remove_join_file(join.cluster_id))
        processes = _launch_all(plan, session, join, undo)
        nodes = _wait_known(processes)
        head = processes[0]
        _record(session, head, join)
        for process in processes:
            process.detach()
    return StartedCluster(
        join.cluster_id, str(session.folder), str(head.paths.node_socket), redacted(url), str(path), nodes
    )


def join_cluster(join: JoinFile, plan: NodePlan, listen_host: str | None) -> StartedCluster:
    """Start a node on this host that belongs to a cluster which runs already.

    Raises: StartFailed, NotConnected, AuthenticationFailed, WrongFile.
    """
    _check_store(join.control_store_url, join.control_store_password)
    if listen_host is not None:
        _check_host(listen_host)
    sweep_stale_sessions()
    session = config.SessionPaths.in_base(join.cluster_id)
    undo = _Undo()
    with undo.on_failure():
        lock = make_or_join_session(session)
        undo.steps.append(lambda: remove_session_if_over(session))
        try:
            _write_secrets(session, join)
            host = listen_host or _own_address(join.control_store_url)
            share = _Share.of_host(1)
            node = _launch(plan, session, join, share, undo, is_head=False, listen_host=host)
        finally:
            os.close(lock)
        nodes = _wait_member(node)
        record = config.read_cluster_record()
        if record is None or not config.is_alive(record):
            _record(session, node, join)
        node.detach()
    address = redacted(join.control_store_url)
    return StartedCluster(
        join.cluster_id,
        str(session.folder),
        str(node.paths.node_socket),
        address,
        str(join_file_path()),
        nodes,
    )


def _refuse_second_cluster() -> None:
    record = config.read_cluster_record()
    if record is None:
        return
    if config.is_alive(record):
        raise AlreadyRunning(
            f"cluster {record.cluster_id} of yours runs on this host already: `clusterpool status` shows it, "
            "`clusterpool down` ends it, `clusterpool start --address` adds a node to it"
        )
    clean_up_after(record)


def _control_store(plan: ClusterPlan, session: config.SessionPaths, lock: int, undo: _Undo) -> tuple[str, str]:
    """The address and the password of the cluster's control store, started now unless it runs elsewhere."""
    store = plan.control_store
    if store.url is not None:
        try:
            password = Path(store.password_file).read_text().strip() if store.password_file else ""
        except OSError as exc:
            raise WrongFile(f"control_store.password_file cannot be read: {exc}") from exc
        _check_store(store.url, password)
        return store.url, password
    password = secrets.token_urlsafe(32)
    # The lock goes with the server: as long as it lives no sweep takes the session for dead.
    server = ServerProcess.start(
        session.folder / STORE_NAME,
        host=plan.listen_host,
        port=store.port,
        password=password,
        appendonly=True,
        pass_fds=(lock,),
    )
    undo.steps.append(lambda: (ServerProcess.attach(server.folder) or server).stop())
    server.wait_ready()
    return server.url, password


def _check_host(host: str) -> None:
    try:
        free_port(host)
    except OSError as exc:
        raise CommandFailed(
            f"nothing can listen at {host!r}: {exc}; give an address or a name of this machine (listen_host, --host)"
        ) from exc


def _check_store(url: str, password: str) -> None:
    try:
        ControlStore.connect(url, password=password or None, timeout_s=_STORE_WITHIN_S).close()
    except ValueError as exc:
        raise WrongFile(str(exc)) from exc


def _write_secrets(session: config.SessionPaths, join: JoinFile) -> None:
    config.write_private_file(session.folder / KEYS_NAME, join.keys)
    config.write_private_file(session.folder / PASSWORD_NAME, join.control_store_password)


@dataclass(frozen=True)
class _Share:
    """What a node has of its host if nobody says: an equal part for each."""

    cpus: float
    memory_bytes: int
    object_store_bytes: int

    @classmethod
    def of_host(cls, nodes: int) -> _Share:
        memory_bytes = config.detect_memory_bytes()
        store_bytes = config.default_object_store_bytes(memory_bytes) // nodes
        return cls(max(1, config.detect_cpus() // nodes), memory_bytes // nodes, store_bytes)


def _launch_all(plan: ClusterPlan, session: config.SessionPaths, join: JoinFile, undo: _Undo) -> list[NodeProcess]:
    nodes = plan.all_nodes()
    share = _Share.of_host(len(nodes))
    return [
        _launch(node, session, join, share, undo, is_head=position == 0, listen_host=plan.listen_host)
        for position, node in enumerate(nodes)
    ]


def _launch(
    plan: NodePlan,
    session: config.SessionPaths,
    join: JoinFile,
    share: _Share,
    undo: _Undo,
    *,
    is_head: bool,
    listen_host: str,
) -> NodeProcess:
    store_bytes = share.object_store_bytes if plan.object_store_memory is None else parse_size(plan.object_store_memory)
    # Nodes of one host count its GPUs by the same numbers: only the head takes them unasked.
    gpus = plan.num_gpus if plan.num_gpus is not None else (len(config.detect_gpus()) if is_head else 0)
    node = config.NodeConfig(
        session_folder=str(session.folder),
        node_id=ids.new_node_id(),
        cluster_id=join.cluster_id,
        is_head=is_head,
        num_cpus=share.cpus if plan.num_cpus is None else plan.num_cpus,
        num_gpus=gpus,
        memory_bytes=share.memory_bytes if plan.memory is None else parse_size(plan.memory),
        resources=dict(plan.resources),
        labels={**plan.labels, **({"name": plan.name} if plan.name else {})},
        object_store_bytes=max(store_bytes // _PAGE_BYTES * _PAGE_BYTES, _OBJECT_STORE_BYTES_MIN),
        spill_folder=plan.spill_folder or config.default_spill_folder(),
        **config.memory_settings(plan.memory_limit),
        control_store_url=join.control_store_url,
        control_store_password_file=str(session.folder / PASSWORD_NAME) if join.control_store_password else None,
        listen_host=listen_host,
        listen_port=plan.port,
        keys_file=str(session.folder / KEYS_NAME),
    )
    try:
        process = launch_node(node)
    except OSError as exc:
        raise StartFailed(
            f"the folders of a node could not be made in {session.folder} and {node.spill_folder}: {exc}"
        ) from exc
    undo.steps.append(process.terminate)
    return process


def _wait_known(processes: list[NodeProcess]) -> list[NodePart]:
    """Wait until every node has heard of every other; the nodes as the head sees them."""
    for process in processes:
        process.wait_ready(JOIN_WITHIN_S)
    node_ids = {process.config.node_id for process in processes}
    views: list[list[NodePart]] = []
    for process in processes:
        views.append(_wait_view(process, lambda nodes: node_ids <= {node.node_id for node in nodes}))
    return views[0]


def _wait_member(process: NodeProcess) -> list[NodePart]:
    process.wait_ready(JOIN_WITHIN_S)
    try:
        return _wait_view(process, lambda nodes: len(nodes) > 1, timeout_s=_OTHERS_WITHIN_S)
    except StartFailed as exc:
        if process.poll() is not None:
            raise
        raise NoCluster(
            "the control store answered, but none of the cluster's other nodes is alive; start the cluster with "
            "`clusterpool up`, and use the join file that it writes"
        ) from exc


def _wait_view(
    process: NodeProcess, is_enough: Callable[[list[NodePart]], bool], *, timeout_s: float = JOIN_WITHIN_S
) -> list[NodePart]:
    """The node's view of the cluster once it is a member and `is_enough`.

    Raises: StartFailed, with the end of the node's log.
    """
    deadline_s = time.monotonic() + timeout_s
    log_file = process.paths.node_log
    tail = ""
    while time.monotonic() < deadline_s:
        tail = log_tail(log_file) or tail
        exit_code = process.poll()
        if exit_code is not None:
            raise StartFailed(
                f"node {process.config.node_id} ended instead of joining ({describe_exit(exit_code)})\n"
                f"The end of its log:\n{tail or '(empty)'}"
            )
        with contextlib.suppress(NotConnected), NodeLink(process.paths.node_socket) as link:
            nodes = link.describe()
            if nodes[0].details.get("is_member") and is_enough(nodes):
                return nodes
        time.sleep(0.02)
    raise StartFailed(
        f"node {process.config.node_id} did not become a member within {timeout_s:g} s: does the control store at "
        f"{redacted(process.config.control_store_url or '')} answer?\nThe end of the node's log:\n{tail or '(empty)'}"
    )


def _record(session: config.SessionPaths, node: NodeProcess, join: JoinFile) -> None:
    config.write_cluster_record(
        config.ClusterRecord(
            cluster_id=join.cluster_id,
            session_folder=str(session.folder),
            node_socket=str(node.paths.node_socket),
            address=str(session.folder),
            control_store_url=redacted(join.control_store_url),
            keys_file=str(session.folder / KEYS_NAME),
            started_at_s=time.time(),
        )
    )


def _own_address(control_store_url: str) -> str:
    """The address of this host on the way to the control store: there its other nodes will find it as well."""
    parts = urlsplit(control_store_url)
    host, port = parts.hostname, parts.port or 6379
    if host is None:  # a unix socket
        return "127.0.0.1"
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # sends nothing
            address: str = probe.getsockname()[0]
    except OSError as exc:
        raise CommandFailed(f"the host of the control store ({host}) cannot be found: {exc}; give --host") from exc
    return address
