"""Nodes reach each other with the cluster's keys, and nobody without them gets a frame in."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from clusterpool.errors import AuthenticationFailed, StartFailed
from clusterpool.node.cluster_keys import ClusterKeys
from clusterpool.node.peers import Peers

# Longer than two nodes of one machine need for their handshake, many times over.
REFUSED_S = 0.5


@pytest.fixture
def keys() -> ClusterKeys:
    return ClusterKeys.generate()


@pytest.fixture
def pair(keys: ClusterKeys) -> Iterator[tuple[Peers, Peers]]:
    peers = Peers("na", keys, host="127.0.0.1", port=0), Peers("nb", keys, host="127.0.0.1", port=0)
    yield peers
    for peer in peers:
        peer.close()


def received(peers: Peers, count: int, within_s: float = 30.0) -> list[tuple[str, bytes]]:
    """The next `count` frames; fewer if no more come. As the node does: it waits on the descriptor alone."""
    frames: list[tuple[str, bytes]] = []
    poll = select.epoll()
    poll.register(peers.fileno(), select.EPOLLIN)
    deadline_s = time.monotonic() + within_s
    while len(frames) < count and time.monotonic() < deadline_s:
        if poll.poll(deadline_s - time.monotonic()):
            frames += peers.receive()
    poll.close()
    return frames


def test_frames_arrive_in_order_with_the_name_of_their_sender(pair: tuple[Peers, Peers]) -> None:
    a, b = pair
    sent = [str(number).encode() for number in range(2000)]
    for frame in sent:
        a.send("nb", ("127.0.0.1", b.port), frame)
    assert received(b, len(sent)) == [("na", frame) for frame in sent]


def test_a_large_frame_arrives_whole(pair: tuple[Peers, Peers]) -> None:
    a, b = pair
    frame = os.urandom(3 << 20)
    a.send("nb", ("127.0.0.1", b.port), frame)
    assert received(b, 1) == [("na", frame)]


def test_a_node_that_listens_elsewhere_now_is_reached_there(keys: ClusterKeys, pair: tuple[Peers, Peers]) -> None:
    a, b = pair
    a.send("nb", ("127.0.0.1", b.port), b"first")
    assert received(b, 1) == [("na", b"first")]
    again = Peers("nb", keys, host="127.0.0.1", port=0)
    a.send("nb", ("127.0.0.1", again.port), b"second")
    assert received(again, 1) == [("na", b"second")]
    again.close()


def stranger(kind: str, keys: ClusterKeys, port: int) -> tuple[Any, Any]:
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IDENTITY, b"na")
    if kind != "no keys":
        # The server's public key is all that a stranger could find out by listening.
        socket.curve_serverkey = keys.server_public if kind == "own keys" else zmq.curve_keypair()[0]
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    socket.connect(f"tcp://127.0.0.1:{port}")
    return context, socket


@pytest.mark.parametrize("kind", ["no keys", "own keys", "keys of another cluster"])
def test_a_stranger_gets_no_frame_in(kind: str, keys: ClusterKeys, pair: tuple[Peers, Peers]) -> None:
    a, b = pair
    context, socket = stranger(kind, keys, b.port)
    socket.send(b"let me in")
    assert received(b, 1, within_s=REFUSED_S) == []
    a.send("nb", ("127.0.0.1", b.port), b"a member")
    assert received(b, 1) == [("na", b"a member")]
    socket.close()
    context.term()


def test_an_address_that_is_not_ours_is_named(keys: ClusterKeys) -> None:
    with pytest.raises(StartFailed, match=r"could not listen at 192\.0\.2\.1:7"):
        Peers("na", keys, host="192.0.2.1", port=7)


def test_keys_survive_their_file_and_other_files_are_refused(keys: ClusterKeys, tmp_path: Any) -> None:
    file = tmp_path / "keys.json"
    file.write_text(keys.to_json())
    assert vars(ClusterKeys.read(file)) == vars(keys)
    for text in (
        "",
        "[]",
        "{}",
        '{"server": [1, 2], "client": [3, 4]}',
        '{"server": ["x", "y"], "client": ["x", "y"]}',
    ):
        file.write_text(text)
        with pytest.raises(AuthenticationFailed, match=r"keys\.json"):
            ClusterKeys.read(file)
    with pytest.raises(AuthenticationFailed, match="nowhere"):
        ClusterKeys.read(tmp_path / "nowhere")
