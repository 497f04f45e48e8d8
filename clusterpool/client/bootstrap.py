"""Which cluster a driver uses, and how it starts one of its own.

    init(address=...)  ->  CLUSTERPOOL_ADDRESS  ->  what `clusterpool up` recorded, if alive  ->  an embedded one

An address is the path of a session's folder or node socket (this host); "local" asks for an embedded cluster.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import threading
from pathlib import Path

import msgspec

from clusterpool import config, ids
from clusterpool.client.client import Client
from clusterpool.client.packages import Prepared, upload
from clusterpool.client.resource_needs import checked_other_amounts
from clusterpool.client.runtime import Runtime
from clusterpool.core import messages as m
from clusterpool.core.messages import Address
from clusterpool.errors import NotConnected
from clusterpool.processes.launch import NodeProcess, launch_node
from clusterpool.processes.standard_descriptors import fill_standard_descriptors
from clusterpool.processes.sweep import sweep_stale_sessions

_MIB = 1024 * 1024


def join(node_socket: str, *, namespace: str, environment: Prepared, log_to_driver: bool) -> Runtime:
    """Join the node that listens at `node_socket`, as a driver with a new job.

    Raises: NotConnected, VersionMismatch; WorkerSetupFailed when the environment cannot be sent.
    """
    fill_standard_descriptors()
    node_folder = Path(node_socket).parent
    node_id = "n" + node_folder.name.removeprefix("n-")
    address = Address(node_id, ids.new_process_id("d"))
    job = _make_job(address, namespace, environment.text)
    client = Client(
        node_socket=node_socket,
        processes_folder=str(node_folder / "p"),
        address=address,
        job=job,
        kind="driver",
    )
    if log_to_driver:
        client.on_log_lines = print_lines
    client.start(wants_logs=log_to_driver)
    try:
        upload(client, environment.packages)
    except BaseException:
        client.close()
        raise
    return Runtime(client)


def _make_job(address: Address, namespace: str, runtime_env: str) -> m.JobPart:
    main = sys.modules.get("__main__")
    main_path = getattr(main, "__file__", None) or ""
    with contextlib.suppress(OSError):
        main_path = str(Path(main_path).resolve()) if main_path else ""
    return m.JobPart(
        job_id=ids.new_job_id(),
        namespace=namespace or "default",
        host=socket.gethostname(),
        cwd=_working_folder(),
        sys_path=_search_path(),
        main_path=main_path,
        env=dict(os.environ),
        runtime_env=runtime_env,
        owner=address,
        authkey=bytes(multiprocessing.current_process().authkey),
    )


def renewed(job: m.JobPart) -> m.JobPart:
    """The job with this process's environment, search path and working folder as they are now.

    Children of the standard Pool inherit what the program has set by the time the pool is made.
    """
    return msgspec.structs.replace(job, env=dict(os.environ), cwd=_working_folder(), sys_path=_search_path())


def _search_path() -> list[str]:
    return [str(Path(entry).resolve()) if entry else _working_folder() for entry in sys.path]


def _working_folder() -> str:
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:  # it was removed
        return "/"


def check_arguments(
    *,
    num_cpus: float | None,
    num_gpus: float | None,
    memory: int | None,
    resources: dict[str, float] | None,
    object_store_bytes: int | None,
    namespace: str | None,
) -> None:
    """Raises: ValueError, TypeError for sizes that no cluster can have, and for a namespace that is no name."""
    named = {"num_cpus": num_cpus, "num_gpus": num_gpus, "memory": memory, "object_store_bytes": object_store_bytes}
    checked_other_amounts(resources)
    for name, amount in named.items():
        if amount is None:
            continue
        if not isinstance(amount, (int, float)):
            raise TypeError(f"{name} must be a number, not {amount!r}")
        if not 0 <= amount < float("inf"):
            raise ValueError(f"{name} must be a number of 0 or more: {amount}")
    if not isinstance(namespace or "", str):
        raise TypeError(f"namespace must be a string, not {namespace!r}")


def start_embedded(
    *,
    num_cpus: float | None,
    num_gpus: float | None,
    memory: int | None,
    resources: dict[str, float] | None,
    object_store_bytes: int | None,
) -> tuple[NodeProcess, str]:
    """Start a private one-node cluster that ends with this process; its process and its socket.

    Raises: StartFailed.
    """
    fill_standard_descriptors()
    node_id = ids.new_node_id()
    session = config.SessionPaths.in_base(ids.new_session_id())
    memory_bytes = memory if memory is not None else config.detect_memory_bytes()
    store_bytes = object_store_bytes or config.default_object_store_bytes(memory_bytes)
    process = launch_node(
        config.NodeConfig(
            session_folder=str(session.folder),
            node_id=node_id,
            cluster_id=session.session_id,
            is_embedded=True,
            driver_pid=os.getpid(),
            num_cpus=config.detect_cpus() if num_cpus is None else num_cpus,
            num_gpus=len(config.detect_gpus()) if num_gpus is None else num_gpus,
            memory_bytes=memory_bytes,
            resources=dict(resources or {}),
            object_store_bytes=max(store_bytes, 16 * _MIB),
            **config.memory_settings(),
        )
    )
    # While the node starts: what others left that were killed together with their drivers. Next to nothing to do when
    # there is nothing.
    with contextlib.suppress(OSError):
        sweep_stale_sessions()
    return process, str(process.paths.node_socket)


def find_address(address: str | None) -> str | None:
    """The node socket of the cluster to use; None for an embedded one.

    Raises: NotConnected when an address was given and nothing is there.
    """
    address = address or os.environ.get("CLUSTERPOOL_ADDRESS") or None
    if address == "local":
        return None
    if address is not None:
        return socket_of(address)
    record = config.read_cluster_record()
    if record is not None and config.is_alive(record):
        return record.node_socket
    return None


def socket_of(address: str) -> str:
    """The node socket that an address names: a session's folder, a node's folder, or the socket itself.

    Raises: NotConnected.
    """
    path = Path(address)
    with contextlib.suppress(OSError, ValueError):  # what can be no path at all, such as one that is too long
        if path.is_socket():
            return str(path)
        if path.is_dir():
            candidates = [path / "node.sock", *sorted(path.glob("n-*/node.sock"))]
            for candidate in candidates:
                # The socket of a node that was killed is still there.
                if candidate.is_socket() and config.is_folder_locked(candidate.parent):
                    return str(candidate)
    raise NotConnected(
        f"no cluster is at {address[:200]!r}: give the session folder or node socket that `clusterpool status` shows, "
        "'local' for a private cluster, or start one with `clusterpool up`"
    )


_print_lock = threading.Lock()


def print_lines(message: m.LogLines) -> None:
    """Show what a worker printed, with a prefix that says which worker it was.

    Without one where an unchanged program runs (`clusterpool run --patch`): its output is what it would be otherwise.
    """
    prefix = f"({message.name or 'task'} pid={message.pid}, node={message.node_id}) "
    if config.runs_unchanged_program():
        prefix = ""
    stream = sys.stdout if message.stream == 1 else sys.stderr
    if stream is None:
        return
    with _print_lock, contextlib.suppress(ValueError, OSError):
        stream.write("".join(f"{prefix}{line}\n" for line in message.lines))
        stream.flush()
