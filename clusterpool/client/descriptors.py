"""Descriptors from the node and for others: channels, parked descriptors, listeners.

    park(fd) --ticket, anywhere, by any way--> fetch(ticket) -> fd          the same open file, on the same node
                                                                            a socket joined to it, on another

One request is one connection to the node's `fd.sock`: nothing is kept between calls, so any thread and any forked
child may ask.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from clusterpool.client import api
from clusterpool.core import descriptor_messages as d
from clusterpool.errors import NotConnected

if TYPE_CHECKING:
    from clusterpool.client.client import Client

# Another node that dies without a word is found dead within 4.75 s, and the node answers then.
ANSWER_PATIENCE_S = 60.0
# A tunnel cannot wait in a listener's queue as a local process does, and whoever waits is refused when it is full.
BACKLOG_MIN = 128
BACKLOG_RETRY_S = 0.02
_LISTENER_TRIES_MAX = 20


class Ticket(NamedTuple):
    """What a parked descriptor can be fetched by, once, anywhere in the cluster."""

    node_id: str
    name: str


def channel(name: str) -> tuple[int, int]:
    """The receiving and the sending descriptor of a channel of this node; the caller closes them.

    One end each of a SOCK_SEQPACKET pair that all processes of the node share; the node makes it at the first
    request. After the channel has moved, the sending one raises BrokenPipeError and the receiving one is at its end.
    """
    _, fds = _ask(d.GetChannel(name))
    return fds[0], fds[1]


def park(fd: int) -> Ticket:
    """Have the node keep a duplicate of `fd`, which stays the caller's, until it is fetched or the job ends."""
    client = api.connect()
    answer, _ = _ask(d.ParkDescriptor(client.job.job_id), fd)
    return Ticket(client.address.node_id, answer.name)


def fetch(ticket: Ticket) -> int:
    """The parked descriptor, or on another node a socket that is joined to it; the caller closes it.

    Raises: FileNotFoundError when it was fetched before, or its job has ended; ConnectionResetError when its node is
    gone; NotConnected.
    """
    _, fds = _ask(d.FetchDescriptor(ticket.node_id, ticket.name))
    return fds[0]


class Listening(NamedTuple):
    """A listener, and how `connect` finds it. Whoever closes the socket removes the file at `path` as well, if it is to
    be gone before the job ends.
    """

    socket: socket.socket
    node_id: str
    name: str
    path: Path


def listen(backlog: int = 1, name: str | None = None) -> Listening:
    """A listening stream socket that can be reached from every node. `name`: one that an earlier `listen` chose.

    Raises: OSError (EADDRINUSE) when somebody has the name; FileNotFoundError for no possible name.
    """
    client = api.connect()
    for _ in range(_LISTENER_TRIES_MAX):
        # As short as the names of processes' sockets, whose paths are known to fit.
        chosen = name or f"{client.job.job_id}.{os.urandom(3).hex()}"
        path = _listener_path(client, chosen)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(str(path))
            path.chmod(0o600)
            sock.listen(max(backlog, BACKLOG_MIN))
        except OSError as exc:
            sock.close()
            if exc.errno != errno.EADDRINUSE or name is not None:
                raise
        else:
            return Listening(sock, client.address.node_id, chosen, path)
    raise OSError(errno.EADDRINUSE, "no free name for a listener was found")


def connect(node_id: str, name: str) -> socket.socket:
    """A stream socket connected to the listener of that name.

    Raises: ConnectionRefusedError or FileNotFoundError when nobody listens there, as for UNIX sockets;
    ConnectionResetError when its node is gone; NotConnected.
    """
    client = api.connect()
    if node_id != client.address.node_id:
        return socket.socket(fileno=_connect_elsewhere(node_id, name))
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(str(_listener_path(client, name)))
    except BaseException:
        sock.close()
        raise
    return sock


def _connect_elsewhere(node_id: str, name: str) -> int:
    deadline_s = monotonic() + ANSWER_PATIENCE_S
    while True:
        try:
            _, fds = _ask(d.ConnectListener(node_id, name))
        except BlockingIOError:  # its queue is full: a local process would wait in connect(2)
            if monotonic() > deadline_s:
                raise
            sleep(BACKLOG_RETRY_S)
        else:
            return fds[0]


def _node_folder(client: Client) -> Path:
    assert client.registered is not None, "the client has not joined its node"
    return Path(client.registered.processes_folder).parent


def _listener_path(client: Client, name: str) -> Path:
    # The name comes from outside (an address that a user wrote): it must not lead out of the folder.
    try:
        msgspec.convert(name, d.Name)
    except msgspec.ValidationError as exc:
        raise FileNotFoundError(errno.ENOENT, f"no listener is called {name!r}: {exc}") from None
    return _node_folder(client) / "l" / name


def _ask(request: d.Request, fd: int | None = None) -> tuple[d.Answer, list[int]]:
    client = api.connect()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        try:
            sock.connect(str(_node_folder(client) / "fd.sock"))
            sock.settimeout(ANSWER_PATIENCE_S)
            socket.send_fds(sock, [d.encode(request)], [] if fd is None else [fd])
            frame, fds, _, _ = socket.recv_fds(sock, d.REQUEST_BYTES_MAX, 2, socket.MSG_CMSG_CLOEXEC)
        except (ConnectionError, FileNotFoundError) as exc:
            raise NotConnected(f"the node {client.address.node_id} does not answer any more: {exc}") from exc
    if not frame:
        raise NotConnected(f"the node {client.address.node_id} ended, or refused {request}")
    answer = d.decode_answer(frame)
    if answer.error_number:
        for received in fds:
            os.close(received)
        raise OSError(answer.error_number, answer.text)
    return answer, list(fds)
