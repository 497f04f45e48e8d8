"""Descriptors from the node and for others: channels, parked descriptors, listeners.

    park(fd) --ticket, anywhere, by any way--> fetch(ticket) -> fd          the same open file, on the same node
                                                                            a socket joined to it, on another
    lease(fd) --its ticket--> fetch, as often as wanted, for as long as the lease lives in the process that made it

One request is one connection to the node's `fd.sock`: nothing is kept between calls, so any thread and any forked
child may ask. Only who leases keeps one, by whose end the node learns that this process has ended.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections import deque
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
# In one message; they are about 20 characters each.
_NAMES_MAX = 16
_LISTENER_TRIES_MAX = 20


class Ticket(NamedTuple):
    """What a parked descriptor can be fetched by, anywhere in the cluster: once, unless it is leased."""

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

    Raises: FileNotFoundError when it was fetched before, or its lease or job has ended; ConnectionResetError when its
    node is gone; NotConnected.
    """
    _, fds = _ask(d.FetchDescriptor(ticket.node_id, ticket.name))
    return fds[0]


# --- leases


class Lease:
    """A parked descriptor that can be fetched any number of times, until this object goes."""

    __slots__ = ("__weakref__", "_line", "ticket")

    def __init__(self, line: _Line, ticket: Ticket) -> None:
        self._line = line
        self.ticket = ticket

    def __del__(self) -> None:
        try:
            self._line.release(self.ticket.name)
        except (AttributeError, TypeError):  # the interpreter is at its end
            pass


class _Line:
    """One client's connection to its node for all of its leases; the node drops them when it ends."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._sock = _connected(client)
        try:
            answer, _ = _exchange(self._sock, d.OpenLine(), None)
        except BaseException:
            self._sock.close()
            raise
        self.name = answer.name
        self._released: deque[str] = deque()

    def release(self, name: str) -> None:
        """Have the node told soon. Safe in a garbage collection, in any thread: this only takes note."""
        client = self.client
        if not client.is_closed:
            self._released.append(name)
            client.deliveries.queue.append(self._tell)
            client.loop.kick()  # also if this thread turns the loop: it may be about to leave it

    def _tell(self) -> None:
        """By whoever turns the loop, which holds no lock then."""
        while self._released:
            names: list[str] = []
            with contextlib.suppress(IndexError):
                while len(names) < _NAMES_MAX:
                    names.append(self._released.popleft())
            with contextlib.suppress(OSError):  # the node has ended, and has nothing any more
                self._sock.send(d.encode(d.ReleaseLeases(names)))

    def close(self) -> None:
        self._sock.close()


class _Lines:
    current: _Line | None = None
    lock = threading.Lock()  # held while one is opened


def lease(fd: int) -> Lease:
    """Have the node keep a duplicate of `fd`, which stays the caller's, for as long as the result lives."""
    runtime = api.runtime()
    client = runtime.client
    with _Lines.lock:
        line = _Lines.current
        if line is None or line.client is not client:
            line = _Lines.current = _Line(client)
            runtime.after_shutdown.append(line.close)
    answer, _ = _ask(d.ParkDescriptor(client.job.job_id, line.name), fd)
    return Lease(line, Ticket(client.address.node_id, answer.name))


def _forget_in_child() -> None:
    line, _Lines.current, _Lines.lock = _Lines.current, None, threading.Lock()
    if line is not None:
        line.close()  # the parent's must end with the parent


os.register_at_fork(after_in_child=_forget_in_child)


# --- listeners


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
    with _connected(api.connect()) as sock:
        return _exchange(sock, request, fd)


def _connected(client: Client) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(str(_node_folder(client) / "fd.sock"))
        sock.settimeout(ANSWER_PATIENCE_S)
    except BaseException as exc:
        sock.close()
        if isinstance(exc, (ConnectionError, FileNotFoundError)):
            raise NotConnected(f"the node {client.address.node_id} does not answer any more: {exc}") from exc
        raise
    return sock


def _exchange(sock: socket.socket, request: d.Request, fd: int | None) -> tuple[d.Answer, list[int]]:
    try:
        socket.send_fds(sock, [d.encode(request)], [] if fd is None else [fd])
        frame, fds, _, _ = socket.recv_fds(sock, d.REQUEST_BYTES_MAX, 2, socket.MSG_CMSG_CLOEXEC)
    except ConnectionError as exc:
        raise NotConnected(f"the node does not answer any more: {exc}") from exc
    if not frame:
        raise NotConnected(f"the node ended, or refused {request}")
    answer = d.decode_answer(frame)
    if answer.error_number:
        for received in fds:
            os.close(received)
        raise OSError(answer.error_number, answer.text)
    return answer, list(fds)
