"""The sockets of one client: to its node, to the processes that it speaks to, and from those that found it."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
from collections.abc import Callable

from clusterpool.client.loop import Loop
from clusterpool.core import messages as m
from clusterpool.core import wire
from clusterpool.core.messages import Address, Message
from clusterpool.core.rejections import greeting_fault
from clusterpool.errors import NotConnected, ProtocolError
from clusterpool.transport import stream
from clusterpool.version import __version__


class Connections:
    """Finds or makes the connection to a process. Used under the client's lock."""

    def __init__(
        self,
        address: Address,
        *,
        kind: str,
        job_id: str,
        processes_folder: str,
        loop: Loop,
        on_unreachable: Callable[[Address, str], None],
        on_unsent: Callable[[Address, Message], None],
    ) -> None:
        self.address = address
        self.node = address.node
        self.by_process: dict[str, stream.Connection] = {}
        self.by_fd: dict[int, stream.Connection] = {}
        self.hello = m.Hello(
            m.PROTOCOL_VERSION, address, kind, os.getpid(), job_id, platform.python_version(), __version__
        )
        self.is_closed = False
        self._processes_folder = processes_folder
        self._loop = loop
        self._on_unreachable = on_unreachable
        self._on_unsent = on_unsent
        self._listener: socket.socket | None = None

    def open(self, node_socket: str) -> stream.Connection:
        """Listen for others, and connect to the node.

        Raises: NotConnected when the node does not listen.
        """
        try:
            connection = stream.connect(node_socket)
        except OSError as exc:
            raise NotConnected(
                f"no node listens at {node_socket} ({exc}); it has ended, or the cluster was stopped: "
                "start one with `clusterpool up`, or leave out the address to use a private one"
            ) from exc
        self._listener = stream.listen(self._path_of(self.address.process_id))
        self._loop.add(self._listener.fileno())
        self._adopt(connection, self.node)
        connection.send(self.hello)
        return connection

    def _path_of(self, process_id: str) -> str:
        return f"{self._processes_folder}/{process_id}.sock"

    def send(self, destination: Address, message: Message) -> None:
        """Send a message to a process here, or through the node to one elsewhere; lost when there is no way."""
        if destination.node_id == self.address.node_id:
            connection = self.by_process.get(destination.process_id) or self._connect(destination)
            if connection is None or not connection.send(message):
                self._on_unsent(destination, message)
                return
        else:
            connection = self.by_process.get(self.node.process_id)
            if connection is None:
                return
            connection.send(m.Relay(destination, self.address, wire.encode(message)))
        if connection.has_unsent:
            self._loop.watch_output(connection.fileno(), True)

    def flush(self, connection: stream.Connection) -> None:
        """The socket has room again."""
        connection.flush()
        if not connection.has_unsent:
            self._loop.watch_output(connection.fileno(), False)

    def _connect(self, destination: Address) -> stream.Connection | None:
        if destination == self.node or self.is_closed:
            return None
        try:
            connection = stream.connect(self._path_of(destination.process_id))
        except OSError as exc:
            self._on_unreachable(destination, f"it does not listen any more ({exc.strerror})")
            return None
        self._adopt(connection, destination)
        connection.send(self.hello)
        return connection

    def _adopt(self, connection: stream.Connection, peer: Address) -> None:
        connection.peer = peer
        self.by_process[peer.process_id] = connection
        self.by_fd[connection.fileno()] = connection
        self._loop.add(connection.fileno())

    def accept(self, fd: int) -> None:
        """Take in those who connect, if `fd` is where they do."""
        if self._listener is None or fd != self._listener.fileno():
            return
        for accepted in stream.accept(self._listener):
            self.by_fd[accepted.fileno()] = accepted
            self._loop.add(accepted.fileno())
            accepted.send(self.hello)

    def greeted(self, connection: stream.Connection, peer: Address) -> None:
        """The other side has said who it is.

        Raises: ProtocolError if it cannot be.
        """
        known = connection.peer if isinstance(connection.peer, Address) else None
        # A worker may be leased to a task that ran in itself: then it has called itself, and this is the other end.
        is_own_call = peer == self.address and peer.process_id in self.by_process
        # Two processes may call each other at the same time: a second connection of the same name is none the worse.
        fault = greeting_fault(self.address, peer, known, is_taken=False)
        if fault and not is_own_call:
            raise ProtocolError(fault)
        connection.peer = peer
        connection.frame_bytes_max = stream.FRAME_BYTES_MAX
        self.by_process.setdefault(peer.process_id, connection)

    def drop(self, connection: stream.Connection) -> Address | None:
        """The connection has ended; whose it was."""
        self._loop.remove(connection.fileno())
        self.by_fd.pop(connection.fileno(), None)
        connection.close()
        peer = connection.peer
        if not isinstance(peer, Address):
            return None
        if self.by_process.get(peer.process_id) is connection:
            del self.by_process[peer.process_id]
        return peer

    def close(self) -> None:
        """Close everything, and stop listening."""
        self.abandon()
        if self._listener is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path_of(self.address.process_id))  # noqa: PTH108

    def abandon(self) -> None:
        """In the child of a fork: close the copies of our descriptors; the sockets stay the parent's."""
        self.is_closed = True
        for connection in [*self.by_process.values(), *self.by_fd.values()]:
            connection.close()
        if self._listener is not None:
            self._listener.close()
