"""A short conversation of a command with one node, over its socket."""

from __future__ import annotations

import os
import platform
import select
import time
from pathlib import Path

from clusterpool import ids
from clusterpool.core import messages as m
from clusterpool.core import wire
from clusterpool.core.joining import RegistrationRefused
from clusterpool.core.messages import Address
from clusterpool.errors import NotConnected, ProtocolError, VersionMismatch
from clusterpool.transport import stream
from clusterpool.version import __version__


class NodeLink:
    """Use it as a context manager. Every method may raise NotConnected, or VersionMismatch."""

    def __init__(self, node_socket: str | Path, *, timeout_s: float = 5.0) -> None:
        self.node_socket = str(node_socket)
        self._timeout_s = timeout_s
        self._last_request = 0
        node_id = "n" + Path(node_socket).parent.name.removeprefix("n-")
        try:
            self._connection = stream.connect(node_socket)
        except OSError as exc:
            raise NotConnected(f"no node listens at {node_socket} ({exc.strerror})") from exc
        address = Address(node_id, ids.new_process_id("t"))
        python_version = platform.python_version()
        hello = m.Hello(m.PROTOCOL_VERSION, address, "tool", os.getpid(), "", python_version, __version__)
        self._connection.send(hello)

    def __enter__(self) -> NodeLink:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def describe(self) -> list[m.NodePart]:
        """The nodes of the cluster as this node sees them, itself first."""
        self._last_request += 1
        self._connection.send(m.DescribeCluster(self._last_request))
        deadline_s = time.monotonic() + self._timeout_s
        while True:
            for message in self._received(deadline_s):
                if isinstance(message, RegistrationRefused):
                    raise VersionMismatch(message.text)
                if isinstance(message, m.ClusterDescribed) and message.request == self._last_request:
                    return message.nodes

    def stop(self, *, all_nodes: bool) -> None:
        """Tell the node to end, and with `all_nodes` every other one."""
        self._connection.send(m.StopNode(all_nodes))

    def _received(self, deadline_s: float) -> list[m.Message]:
        poll = select.poll()
        poll.register(self._connection.fileno(), select.POLLIN)
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not poll.poll(left_s * 1000):
            raise NotConnected(
                f"the node at {self.node_socket} did not answer within {self._timeout_s:g} s; is it stopped?"
            )
        try:
            frames, has_ended = self._connection.receive()
            messages = [wire.decode(frame) for frame in frames]
        except (ValueError, ProtocolError) as exc:
            raise NotConnected(f"what listens at {self.node_socket} is no node of this version: {exc}") from exc
        if has_ended and not messages:
            raise NotConnected(f"the node at {self.node_socket} closed the connection: it is ending")
        return messages
