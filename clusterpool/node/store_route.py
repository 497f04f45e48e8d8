"""The node's way to the control store, direct or through another node, and its help for those that are cut off.

    redis client --[tunnel]==> peer --unix socket--> StoreRelay --TCP--> control store

The tunnel carries the bytes of the connection as they are (password and TLS included), so whatever a node does with the
store, it does through a peer as well. The relay gives a peer no more than it could have by itself: bytes to the server.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clusterpool.core import store_route as sr
from clusterpool.errors import ClusterpoolError

logger = logging.getLogger(__name__)

# The name of the relay's socket among the listeners of a node.
RELAY_NAME = "store"
# A node has five connections to the store.
_RELAYED_MAX = 64
_DIAL_S = 2.0
_PROBE_PERIOD_S = 1.0
_PIECE_BYTES = 65536

# open_tunnel(node_id, on_answer), from any thread; on_answer(descriptor or None, (error number, text) or None).
OpenTunnel = Callable[[str, Callable[[int | None, tuple[int, str] | None], None]], None]


class NodeStoreRoute:
    """Asked by the connections of all threads of the node; told how things went by one of them."""

    def __init__(self, open_tunnel: OpenTunnel, probe: Callable[[], object]) -> None:
        self._open_tunnel = open_tunnel
        self._probe = probe  # connects directly; raises ClusterpoolError
        self._machine = sr.StoreRoute()
        self._lock = threading.Lock()  # guards the machine
        self._peers: tuple[str, ...] = ()
        self._way_told = ""  # the way that the log named last
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()  # those that go through a peer
        self._prober: threading.Thread | None = None
        self._is_stopping = threading.Event()

    @property
    def is_relayed(self) -> bool:
        """Whether new connections go through a peer."""
        return bool(self._machine.peer)

    def set_peers(self, peers: list[str]) -> None:
        """The other nodes, those first that are likely to reach the store."""
        self._peers = tuple(peers)

    def dial(self) -> socket.socket:
        """A connection to the store through the peer in use. Raises: OSError."""
        if self._is_stopping.is_set():
            raise ConnectionAbortedError("the node ends, and tunnels with it")
        peer = self._machine.peer
        answers: queue.SimpleQueue[tuple[int | None, tuple[int, str] | None]] = queue.SimpleQueue()
        has_given_up = threading.Event()

        def on_answer(descriptor: int | None, error: tuple[int, str] | None) -> None:
            if descriptor is not None and has_given_up.is_set():
                socket.socket(fileno=descriptor).close()
            else:
                answers.put((descriptor, error))

        self._open_tunnel(peer, on_answer)
        try:
            descriptor, error = answers.get(timeout=_DIAL_S)
        except queue.Empty:
            has_given_up.set()
            raise TimeoutError(
                f"node {peer}, through which the control store was to be reached, does not answer"
            ) from None
        if descriptor is None:
            number, text = error if error is not None else (0, "no reason given")
            raise OSError(number, f"node {peer} cannot pass on to the control store: {text}")
        connection = socket.socket(fileno=descriptor)
        self._sockets.add(connection)
        return connection

    def failed(self, *, had_no_answer: bool) -> None:
        """An operation by the way in use failed."""
        self._handle(sr.AttemptFailed(self._peers, had_no_answer))

    def worked(self) -> None:
        """An operation by the way in use was answered."""
        peer = self._machine.peer
        if peer != self._way_told:
            self._way_told = peer
            logger.warning("the control store is reached %s", f"through node {peer}" if peer else "directly again")
        self._handle(sr.AttemptWorked())

    def stop(self) -> None:
        """The node's loop, which carries the tunnels, has ended: what goes through a peer fails from now on."""
        self._is_stopping.set()
        self._break_connections()

    def _handle(self, event: Any) -> None:
        with self._lock:
            for command in self._machine.handle(event, time.monotonic()):
                self._use(command.peer)

    def _use(self, peer: str) -> None:
        # Not a warning: while the store is away for all, the peers are tried again and again.
        if peer:
            logger.info("the control store is tried through node %s", peer)
        else:
            logger.info("the control store is tried directly again")
        self._break_connections()
        if peer and (self._prober is None or not self._prober.is_alive()):
            self._prober = threading.Thread(target=self._probe_until_direct, name="store-probe", daemon=True)
            self._prober.start()

    def _break_connections(self) -> None:
        """Their users make others, the new way."""
        for connection in list(self._sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _probe_until_direct(self) -> None:
        while self.is_relayed and not self._is_stopping.wait(_PROBE_PERIOD_S):
            with contextlib.suppress(ClusterpoolError):
                self._probe()
                self._handle(sr.DirectWorked())


class StoreRelay:
    """Passes the connections of other nodes on to the control store, as this node reaches it itself."""

    def __init__(self, folder: Path, connect: Callable[[], socket.socket]) -> None:
        """folder: of the node's listeners. connect: to the server, before any word was said; raises OSError or ours."""
        self._path = folder / RELAY_NAME
        self._connect = connect
        self._listener: socket.socket | None = None
        self._free = threading.Semaphore(_RELAYED_MAX)

    def start(self) -> None:
        """Listen, in the background."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self._path))
        self._listener.listen()
        threading.Thread(target=self._accept, name="store-relay", daemon=True).start()

    def stop(self) -> None:
        """Take no more connections."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        assert self._listener is not None
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if not self._free.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._pass_on, args=(connection,), name="store-relayed", daemon=True).start()

    def _pass_on(self, theirs: socket.socket) -> None:
        try:
            with theirs, self._connect() as ours:
                other = {theirs: ours, ours: theirs}
                while True:
                    for source in select.select([theirs, ours], [], [])[0]:
                        piece = source.recv(_PIECE_BYTES)
                        if not piece:
                            return
                        other[source].sendall(piece)
        except (OSError, ClusterpoolError) as exc:
            logger.info("a connection of another node to the control store was not passed on: %s", exc)
        finally:
            self._free.release()
