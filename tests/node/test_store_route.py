"""A node's way to the control store through another node, at both ends; sockets stand for the tunnel and the server."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clusterpool.core import store_route as core
from clusterpool.errors import NotConnected
from clusterpool.node import store_route
from clusterpool.node.store_route import RELAY_NAME, NodeStoreRoute, StoreRelay
from tests.control_store.servers import short_folder
from tests.waiting import wait_for


class Server:
    """Echoes what it gets, on pairs of sockets."""

    def __init__(self) -> None:
        self.connections = 0

    def connect(self) -> socket.socket:
        self.connections += 1
        ours, theirs = socket.socketpair()
        threading.Thread(target=self._echo, args=(ours,), daemon=True).start()
        return theirs

    @staticmethod
    def _echo(connection: socket.socket) -> None:
        with connection:
            while piece := connection.recv(65536):
                connection.sendall(piece)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


@pytest.fixture
def relay(folder: Path, server: Server) -> Iterator[StoreRelay]:
    made = StoreRelay(folder, server.connect)
    made.start()
    yield made
    made.stop()
    assert not (folder / RELAY_NAME).exists()


def connected(folder: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(30)
    connection.connect(str(folder / RELAY_NAME))
    return connection


def echoed(connection: socket.socket, content: bytes) -> bytes:
    def send() -> None:
        with contextlib.suppress(OSError):
            connection.sendall(content)

    thread = threading.Thread(target=send)
    thread.start()
    received = b""
    while len(received) < len(content) and (piece := connection.recv(65536)):
        received += piece
    thread.join()
    return received


def test_bytes_pass_both_ways_and_the_end_of_either_side_ends_both(folder: Path, relay: StoreRelay) -> None:
    content = bytes(range(256)) * 4000
    with connected(folder) as first, connected(folder) as second:
        assert echoed(first, content) == content
        assert echoed(second, b"PING") == b"PING"
        first.shutdown(socket.SHUT_WR)
        assert first.recv(1) == b""
        assert echoed(second, b"PING") == b"PING"


def test_a_store_that_cannot_be_reached_ends_the_connection(folder: Path) -> None:
    def away() -> socket.socket:
        raise NotConnected("away")

    relay = StoreRelay(folder, away)
    relay.start()
    try:
        with connected(folder) as connection:
            assert connection.recv(1) == b""
    finally:
        relay.stop()


def test_more_connections_than_any_cluster_needs_are_refused(
    folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_route, "_RELAYED_MAX", 2)
    relay = StoreRelay(folder, server.connect)
    relay.start()
    try:
        with connected(folder) as first, connected(folder) as second:
            assert echoed(first, b"x") == echoed(second, b"x") == b"x"
            with connected(folder) as third:
                assert third.recv(1) == b""
        wait_for(lambda: is_passed_on(folder))
    finally:
        relay.stop()


def is_passed_on(folder: Path) -> bool:
    with connected(folder) as connection, contextlib.suppress(OSError):
        return echoed(connection, b"x") == b"x"
    return False


class Tunnels:
    """Opens what stands for a tunnel, as the node's loop would: in another thread."""

    def __init__(self, server: Server) -> None:
        self.asked: list[str] = []
        self.answer: Callable[[Any], None] = lambda on_answer: on_answer(server.connect().detach(), None)

    def open(self, node_id: str, on_answer: Any) -> None:
        self.asked.append(node_id)
        threading.Thread(target=self.answer, args=(on_answer,), daemon=True).start()


class Probe:
    """The direct way: away until `is_there`."""

    def __init__(self) -> None:
        self.is_there = threading.Event()

    def __call__(self) -> None:
        if not self.is_there.is_set():
            raise NotConnected("away")


@pytest.fixture
def tunnels(server: Server) -> Tunnels:
    return Tunnels(server)


@pytest.fixture
def probe() -> Probe:
    return Probe()


@pytest.fixture
def route(tunnels: Tunnels, probe: Probe, monkeypatch: pytest.MonkeyPatch) -> Iterator[NodeStoreRoute]:
    monkeypatch.setattr(store_route, "_PROBE_PERIOD_S", 0.01)
    monkeypatch.setattr(store_route, "_DIAL_S", 0.3)
    made = NodeStoreRoute(tunnels.open, probe)
    made.set_peers(["head", "second"])
    yield made
    made.stop()


def test_connections_go_through_a_peer_until_the_direct_way_works_and_are_cut_then(
    route: NodeStoreRoute, tunnels: Tunnels, probe: Probe
) -> None:
    assert not route.is_relayed
    route.failed(had_no_answer=True)
    assert route.is_relayed
    with route.dial() as connection:
        connection.settimeout(30)
        assert tunnels.asked == ["head"]
        assert echoed(connection, b"PING") == b"PING"
        probe.is_there.set()
        wait_for(lambda: not route.is_relayed)
        assert connection.recv(1) == b""


def test_a_peer_that_refuses_or_is_silent_is_an_error_and_the_next_is_tried(
    route: NodeStoreRoute, tunnels: Tunnels
) -> None:
    route.failed(had_no_answer=True)
    tunnels.answer = lambda on_answer: on_answer(None, (111, "its store is away"))
    with pytest.raises(OSError, match="node head cannot pass on.*its store is away"):
        route.dial()
    tunnels.answer = lambda on_answer: None
    started_s = time.monotonic()
    with pytest.raises(TimeoutError, match="does not answer"):
        route.dial()
    assert time.monotonic() - started_s < 15
    route.failed(had_no_answer=True)
    with pytest.raises(TimeoutError):
        route.dial()
    assert tunnels.asked == ["head", "head", "second"]


def test_a_tunnel_that_opens_too_late_is_closed(route: NodeStoreRoute, tunnels: Tunnels) -> None:
    late: list[Any] = []
    tunnels.answer = late.append
    route.failed(had_no_answer=True)
    with pytest.raises(TimeoutError):
        route.dial()
    ours, theirs = socket.socketpair()
    late[0](theirs.detach(), None)
    with ours:
        ours.settimeout(30)
        assert ours.recv(1) == b""


def test_when_the_node_ends_nothing_goes_through_a_peer_any_more(route: NodeStoreRoute) -> None:
    route.failed(had_no_answer=True)
    with route.dial() as connection:
        connection.settimeout(30)
        route.stop()
        assert connection.recv(1) == b""
        with pytest.raises(ConnectionAbortedError):
            route.dial()


def test_the_machine_and_its_shell_agree_on_the_way(route: NodeStoreRoute) -> None:
    for _ in range(core.PEERS_TRIED_MAX):
        route.failed(had_no_answer=True)
    assert not route.is_relayed, "no peer has helped: the store itself is away"
