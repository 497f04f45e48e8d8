"""Connections to the other nodes: zmq over TCP, with CURVE keys that only this cluster's members have.

Each node binds one ROUTER and opens one DEALER to each peer; messages go out by DEALER and come in by ROUTER, so each
pair of nodes has one ordered stream each way. A frame without the cluster's keys never gets past libzmq.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from clusterpool.errors import AuthenticationFailed


class ClusterKeys:
    """The key pairs of one cluster: all nodes share them, and nobody else has them."""

    def __init__(self, server: tuple[bytes, bytes], client: tuple[bytes, bytes]) -> None:
        self.server_public, self.server_secret = server
        self.client_public, self.client_secret = client

    @classmethod
    def generate(cls) -> ClusterKeys:
        """New keys."""
        return cls(zmq.curve_keypair(), zmq.curve_keypair())

    def to_json(self) -> str:
        """The text of a keys file (mode 0600)."""
        pairs = {
            "server": [self.server_public.decode(), self.server_secret.decode()],
            "client": [self.client_public.decode(), self.client_secret.decode()],
        }
        return json.dumps(pairs)

    @classmethod
    def read(cls, path: str | Path) -> ClusterKeys:
        """Raises: AuthenticationFailed when the file is missing or no keys file."""
        try:
            pairs = json.loads(Path(path).read_text())
            server, client = pairs["server"], pairs["client"]
            return cls((server[0].encode(), server[1].encode()), (client[0].encode(), client[1].encode()))
        except (OSError, ValueError, KeyError, IndexError) as exc:
            raise AuthenticationFailed(
                f"the cluster's keys could not be read from {path}: {exc}; copy the file that `clusterpool up` made"
            ) from exc


class _OnlyClusterMembers:
    def __init__(self, public_key: bytes) -> None:
        self._public_key = public_key

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a client with this public key may connect; called by zmq's authenticator."""
        return key == self._public_key


class Peers:
    """Sends frames to other nodes and receives theirs; used by the node's only thread."""

    def __init__(self, node_id: str, keys: ClusterKeys, *, host: str, port: int) -> None:
        self._node_id = node_id
        self._keys = keys
        self._context = zmq.Context()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", _OnlyClusterMembers(zmq.utils.z85.decode(keys.client_public)))
        self._router = self._socket(zmq.ROUTER)
        self._router.curve_server = True
        self._router.curve_publickey, self._router.curve_secretkey = keys.server_public, keys.server_secret
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a node that came back takes over its identity
        self.port: int = port
        if port:
            self._router.bind(f"tcp://{host}:{port}")
        else:
            self.port = self._router.bind_to_random_port(f"tcp://{host}")
        self._dealers: dict[str, Any] = {}

    def _socket(self, kind: int) -> Any:
        socket = self._context.socket(kind)
        # At its high-water mark a ROUTER drops messages silently; the queues are bounded in the core.
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.LINGER, 200)
        socket.setsockopt(zmq.MAXMSGSIZE, 256 * 1024 * 1024)
        return socket

    def fileno(self) -> int:
        """Readable when frames may have come; then call `receive` (edge-triggered: it reads all)."""
        return int(self._router.getsockopt(zmq.FD))

    def send(self, node_id: str, address: tuple[str, int], frame: bytes) -> None:
        """Send a frame to a node; lost if the node is gone."""
        dealer = self._dealers.get(node_id)
        if dealer is None:
            dealer = self._dealers[node_id] = self._socket(zmq.DEALER)
            dealer.setsockopt(zmq.IDENTITY, self._node_id.encode())
            dealer.curve_serverkey = self._keys.server_public
            dealer.curve_publickey, dealer.curve_secretkey = self._keys.client_public, self._keys.client_secret
            dealer.connect(f"tcp://{address[0]}:{address[1]}")
        dealer.send(frame, zmq.NOBLOCK, copy=len(frame) < 65536)

    def receive(self) -> list[tuple[str, bytes]]:
        """All frames that have come, with the node that sent each."""
        frames: list[tuple[str, bytes]] = []
        while True:
            try:
                parts = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return frames
            if len(parts) == 2:
                frames.append((parts[0].decode(errors="replace"), parts[1]))

    def forget(self, node_id: str) -> None:
        """The node is gone: drop what was still to be sent to it."""
        dealer = self._dealers.pop(node_id, None)
        if dealer is not None:
            dealer.close(0)

    def close(self) -> None:
        """Close all sockets, after a short time for what is on its way."""
        self._authenticator.stop()
        for dealer in self._dealers.values():
            dealer.close()
        self._router.close()
        self._context.term()
