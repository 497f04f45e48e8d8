"""Ends of tunnels on real sockets and pipes: what arrives, what blocks, and who learns of whose end."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.node.shells import Nodes, Turning


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path)
    yield made
    made.close()


def fetched(nodes: Nodes, fd: int) -> socket.socket:
    """`fd`, which is closed here, parked at `nb` and fetched at `na`."""
    nodes.shells["nb"].descriptors._parked["j1-1"] = os.dup(fd)
    os.close(fd)
    return joined(nodes, "fetch", "j1-1")


def joined(nodes: Nodes, kind: str, name: str) -> socket.socket:
    answers: list[Any] = []
    nodes.shells["na"].tunnels.open("nb", kind, name, lambda fd, error: answers.append((fd, error)))
    nodes.run_until(lambda: answers)
    fd, error = answers[0]
    if error is not None:
        raise OSError(*error)
    sock = socket.socket(fileno=fd)
    sock.settimeout(20)
    return sock


def pair(nodes: Nodes) -> tuple[socket.socket, socket.socket]:
    """A socket at `nb` and the one at `na` that is joined to its other side."""
    near, far = socket.socketpair()
    near.settimeout(20)
    return near, fetched(nodes, far.detach())


def test_a_hundred_megabytes_arrive_as_they_were(nodes: Nodes) -> None:
    near, away = pair(nodes)
    block = os.urandom(1024 * 1024)
    digests = [hashlib.sha256(), hashlib.sha256()]

    def send() -> None:
        for _ in range(100):
            near.sendall(block)
            digests[0].update(block)
        near.shutdown(socket.SHUT_WR)

    with Turning(nodes), near, away:
        sender = threading.Thread(target=send)
        sender.start()
        while received := away.recv(1 << 20):
            digests[1].update(received)
        sender.join()
        assert digests[0].digest() == digests[1].digest()
        # Half closed: the answer goes the other way.
        away.sendall(b"thanks")
        assert near.recv(100) == b"thanks"


def test_a_reader_who_does_not_read_stops_the_writer(nodes: Nodes) -> None:
    near, away = pair(nodes)
    near.setblocking(False)
    sent = 0
    with near, away:
        for _ in range(2000):
            try:
                sent += near.send(bytes(65536))
            except BlockingIOError:
                nodes.settle()
                try:
                    sent += near.send(bytes(65536))
                except BlockingIOError:
                    break
        else:
            pytest.fail("the writer never had to wait")
        # The window, and the buffers of the four sockets on the way.
        assert sent < 4 * 1024 * 1024
        turns = nodes.turns
        nodes.settle()
        assert nodes.turns - turns < 10  # nothing spins while it waits


def test_the_end_of_one_side_is_the_end_at_the_other(nodes: Nodes) -> None:
    near, away = pair(nodes)
    near.sendall(b"last words")
    near.close()
    with Turning(nodes), away:
        assert away.recv(100) == b"last words"
        assert away.recv(100) == b""
        with pytest.raises(BrokenPipeError):
            while True:
                away.sendall(bytes(1000))


def test_a_reader_who_goes_stops_the_writer_at_the_other_side(nodes: Nodes) -> None:
    near, away = pair(nodes)
    away.close()
    with Turning(nodes), near:
        assert near.recv(100) == b""
        with pytest.raises(BrokenPipeError):
            while True:
                near.sendall(bytes(1000))


def test_when_both_have_closed_nothing_is_left(nodes: Nodes) -> None:
    near, away = pair(nodes)
    near.sendall(bytes(100_000))
    near.close()
    nodes.settle()
    away.close()
    tunnels = [shell.tunnels for shell in nodes.shells.values()]
    nodes.run_until(lambda: not any(end._ends or len(end._machine) for end in tunnels))


def test_whoever_shares_a_parked_socket_can_go_on_with_it(nodes: Nodes) -> None:
    near, far = socket.socketpair()
    near.settimeout(20)
    away = fetched(nodes, os.dup(far.fileno()))
    away.sendall(b"from away")
    away.close()
    nodes.run_until(lambda: not nodes.shells["nb"].tunnels._ends)
    far.sendall(b", from here")
    with near, far:
        assert near.recv(100) == b"from away, from here"
        assert os.get_blocking(far.fileno())


def test_a_pipe_goes_through_both_ways_round(nodes: Nodes) -> None:
    reading, writing = os.pipe()
    away = fetched(nodes, writing)
    with Turning(nodes):
        away.sendall(b"into the pipe")
        away.close()
        assert os.read(reading, 100) == b"into the pipe"
        assert os.read(reading, 100) == b""
    os.close(reading)

    reading, writing = os.pipe()
    away = fetched(nodes, reading)
    with Turning(nodes):
        os.write(writing, b"out of the pipe")
        assert away.recv(100) == b"out of the pipe"
        os.close(writing)
        assert away.recv(100) == b""
    away.close()


def test_a_pipe_whose_reader_has_gone_breaks_for_its_writer(nodes: Nodes) -> None:
    reading, writing = os.pipe()
    away = fetched(nodes, reading)
    away.close()
    nodes.run_until(lambda: not nodes.shells["nb"].tunnels._ends)
    with pytest.raises(BrokenPipeError):
        os.write(writing, b"x")
    os.close(writing)


def test_a_listener_is_connected_to_from_another_node(nodes: Nodes) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(nodes.shells["nb"].paths.folder / "l" / "j1.abc"))
    listener.listen(5)
    with listener, joined(nodes, "connect", "j1.abc") as away, Turning(nodes):
        accepted, _ = listener.accept()
        with accepted:
            accepted.sendall(b"welcome")
            assert away.recv(100) == b"welcome"


@pytest.mark.parametrize(
    ("kind", "name", "number"),
    [
        ("fetch", "j1-99", errno.ENOENT),
        ("connect", "j1.nobody", errno.ENOENT),
        ("connect", "j1.closed", errno.ECONNREFUSED),
        ("fetch", "j1-file", errno.EINVAL),
    ],
)
def test_what_is_not_there_is_refused(nodes: Nodes, kind: str, name: str, number: int, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as closed:
        closed.bind(str(nodes.shells["nb"].paths.folder / "l" / "j1.closed"))
    file = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    nodes.shells["nb"].descriptors._parked["j1-file"] = file
    with pytest.raises(OSError) as caught:
        joined(nodes, kind, name)
    assert caught.value.errno == number


def test_a_lost_node_ends_the_stream_and_refuses_who_asks(nodes: Nodes) -> None:
    near, away = pair(nodes)
    nodes.lost.add("nb")
    nodes.shells["na"].tunnels.node_gone("nb")
    with near, away:
        assert away.recv(100) == b""
    with pytest.raises(ConnectionResetError):
        joined(nodes, "fetch", "j1-2")


def test_the_end_of_a_job_ends_its_streams(nodes: Nodes) -> None:
    near, away = pair(nodes)
    nodes.shells["nb"].descriptors.job_ended("j1")
    nodes.settle()
    with near, away:
        assert near.recv(100) == b""
        assert away.recv(100) == b""
