"""Connections to the other nodes: zmq over TCP, with CURVE keys that only this cluster's members have.

Each node binds one ROUTER and opens one DEALER to each peer; messages go out by DEALER and come in by ROUTER, so each
pair of nodes has one ordered stream each way. A frame without the cluster's keys never gets past libzmq.
"""

from __future__ import annotations

import logging
from typing import Any

import zmq as _zmq
from zmq.auth.thread import ThreadAuthenticator

from clusterpool.errors import StartFailed
from clusterpool.node.cluster_keys import ClusterKeys

logger = logging.getLogger(__name__)
zmq: Any = _zmq  # its type stubs hide what it takes from C

# What libzmq tells of those who do not get in: other protocols, other keys, no keys.
_REFUSALS = {
    "EVENT_HANDSHAKE_FAILED_NO_DETAIL": "broke off the handshake",
    "EVENT_HANDSHAKE_FAILED_PROTOCOL": "does not speak the protocol of nodes (or not with keys)",
    "EVENT_HANDSHAKE_FAILED_AUTH": "does not have the keys of this cluster",
}
# How long the last messages of a node that ends may take to leave it.
LINGER_MS = 500
# Below this, copying a frame is cheaper than telling its owner when zmq is done with it.
_COPY_BYTES_MAX = 65536


class _OnlyClusterMembers:
    def __init__(self, public_key: bytes) -> None:
        self._public_key = public_key  # Z85 text

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a client with this public key (Z85 text) may connect; called by zmq's authenticator."""
        return key == self._public_key


class Peers:
    """Sends frames to other nodes and receives theirs; used by the node's only thread."""

    def __init__(self, node_id: str, keys: ClusterKeys, *, host: str, port: int) -> None:
        self._node_id = node_id
        self._keys = keys
        self._context = zmq.Context()
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", _OnlyClusterMembers(keys.client_public))
        self._router = self._socket(zmq.ROUTER)
        self._router.curve_server = True
        self._router.curve_publickey, self._router.curve_secretkey = keys.server_public, keys.server_secret
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a node that came back takes over its identity
        self._dealers: dict[str, tuple[tuple[str, int], Any]] = {}  # by node id, with the address it connects to
        self._refusal_texts = {getattr(zmq, name): text for name, text in _REFUSALS.items()}
        self._monitor = self._router.get_monitor_socket(sum(self._refusal_texts))
        self.port = self._bind(host, port)
        self.refusals()  # zmq signals only to those who have once found nothing

    def _bind(self, host: str, port: int) -> int:
        try:
            if port:
                self._router.bind(f"tcp://{host}:{port}")
                return port
            bound: int = self._router.bind_to_random_port(f"tcp://{host}")
            return bound
        except zmq.ZMQError as exc:
            self.close()
            raise StartFailed(
                f"the node could not listen at {host}:{port}: {exc}; is that an address of this machine, and the port "
                "free? Port 0 takes any free one"
            ) from exc

    def _socket(self, kind: int) -> Any:
        socket = self._context.socket(kind)
        # At its high-water mark a ROUTER drops messages silently; the queues are bounded in the core.
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        socket.setsockopt(zmq.MAXMSGSIZE, 256 * 1024 * 1024)
        return socket

    def fileno(self) -> int:
        """Readable when frames may have come; then call `receive` (edge-triggered: it reads all)."""
        return int(self._router.getsockopt(zmq.FD))

    def refusals_fileno(self) -> int:
        """Readable when somebody may have been refused; then call `refusals` (edge-triggered: it reads all)."""
        return int(self._monitor.getsockopt(zmq.FD))

    def refusals(self) -> list[str]:
        """Why strangers were not let in since the last call, a text each; their bytes never got past libzmq."""
        texts: list[str] = []
        while True:
            try:
                parts = self._monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return texts
            event = int.from_bytes(parts[0][:2], "little")
            texts.append(self._refusal_texts.get(event, "was refused"))

    def send(self, node_id: str, address: tuple[str, int], frame: bytes) -> None:
        """Send a frame to a node; lost if the node is gone."""
        known = self._dealers.get(node_id)
        if known is None or known[0] != address:
            self.forget(node_id)  # it may have come back, and listen elsewhere
            known = self._dealers[node_id] = (address, self._connect(address))
        if known[1] is not None:
            known[1].send(frame, zmq.NOBLOCK, copy=len(frame) < _COPY_BYTES_MAX)

    def _connect(self, address: tuple[str, int]) -> Any:
        dealer = self._socket(zmq.DEALER)
        dealer.setsockopt(zmq.IDENTITY, self._node_id.encode())
        dealer.curve_serverkey = self._keys.server_public
        dealer.curve_publickey, dealer.curve_secretkey = self._keys.client_public, self._keys.client_secret
        try:
            dealer.connect(f"tcp://{address[0]}:{address[1]}")
        except zmq.ZMQError as exc:  # whatever somebody else has written into the control store
            logger.warning("what is for the node at %s:%s is dropped, since that is no address: %s", *address, exc)
            dealer.close(0)
            return None
        return dealer

    def receive(self) -> list[tuple[str, bytes]]:
        """All frames that have come, with the node that sent each."""
        frames: list[tuple[str, bytes]] = []
        while True:
            try:
                parts = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return frames
            # Any other number of parts is no frame of ours, and neither are no bytes: the caller counts them.
            frames.append((parts[0].decode(errors="replace"), parts[1] if len(parts) == 2 else b""))

    def forget(self, node_id: str) -> None:
        """The node is gone: drop what was still to be sent to it."""
        _, dealer = self._dealers.pop(node_id, (None, None))
        if dealer is not None:
            dealer.close(0)

    def close(self) -> None:
        """Close all sockets, after a short time for what is on its way."""
        self._authenticator.stop()
        for _, dealer in self._dealers.values():
            if dealer is not None:
                dealer.close()
        self._dealers.clear()
        self._router.disable_monitor()
        self._monitor.close(0)
        self._router.close()
        self._context.term()
