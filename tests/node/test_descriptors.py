"""The descriptor service on its socket: channels, their draining, what is parked, and bytes that are no request."""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from clusterpool.core import descriptor_messages as d
from clusterpool.node import descriptors
from tests.node.shells import FakeShell, Nodes


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path)
    yield made
    made.close()


@pytest.fixture
def shell(nodes: Nodes) -> FakeShell:
    return nodes.shells["na"]


def ask(nodes: Nodes, frame: bytes, fds: list[int] | None = None) -> tuple[d.Answer | None, list[int]]:
    """What the service answers to `frame`; None when it hangs up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(str(nodes.shells["na"].paths.folder / "fd.sock"))
        socket.send_fds(sock, [frame], fds or [])
        nodes.settle()
        sock.settimeout(30)
        answer, received, _, _ = socket.recv_fds(sock, 4096, 4)
    return (d.decode_answer(answer) if answer else None), list(received)


def ends_of(nodes: Nodes, name: str) -> tuple[socket.socket, socket.socket]:
    answer, (receiving, sending) = ask(nodes, d.encode(d.GetChannel(name)))
    assert answer == d.Answer(0)
    return socket.socket(fileno=receiving), socket.socket(fileno=sending)


def test_all_who_ask_for_a_channel_get_the_same_one(nodes: Nodes) -> None:
    receiver, sender = ends_of(nodes, "j1-d1-1")
    other_receiver, other_sender = ends_of(nodes, "j1-d1-1")
    with receiver, sender, other_receiver, other_sender:
        sender.send(b"one")
        other_sender.send(b"two")
        assert other_receiver.recv(100) == b"one"
        assert receiver.recv(100) == b"two"


def test_messages_outlive_everybody_who_had_the_channel(nodes: Nodes) -> None:
    for sock in (ends := ends_of(nodes, "j1-d1-1")):
        if sock is ends[1]:
            sock.send(b"kept")
        sock.close()
    receiver, sender = ends_of(nodes, "j1-d1-1")
    with receiver, sender:
        assert receiver.recv(100) == b"kept"


def test_draining_takes_what_is_left_and_shuts_the_channel_for_good(nodes: Nodes, shell: FakeShell) -> None:
    receiver, sender = ends_of(nodes, "j1-d1-1")
    with receiver, sender:
        for number in range(3):
            sender.send(b"%d" % number)
        assert receiver.recv(100) == b"0"
        assert shell.descriptors.drain_channel("j1-d1-1") == [b"1", b"2"]
        with pytest.raises(BrokenPipeError):
            sender.send(b"3")
        assert receiver.recv(100) == b""
    assert shell.descriptors.drain_channel("j1-d1-1") == []


def test_nobody_waits_for_getters_in_flight_when_a_channel_is_empty(
    nodes: Nodes, shell: FakeShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(descriptors.time, "sleep", slept.append)
    receiver, sender = ends_of(nodes, "j1-d1-1")
    with receiver, sender:
        assert shell.descriptors.drain_channel("j1-d1-1") == [] and slept == []
    receiver, sender = ends_of(nodes, "j1-d1-2")
    with receiver, sender:
        sender.send(b"1")
        assert shell.descriptors.drain_channel("j1-d1-2") == [b"1"] and slept == [descriptors.IN_FLIGHT_S]


def test_who_was_about_to_receive_gets_the_first_message_and_not_one_of_those_that_are_drained(
    nodes: Nodes, shell: FakeShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors, "IN_FLIGHT_S", 0.5)
    receiver, sender = ends_of(nodes, "j1-d1-1")
    with receiver, sender:
        for number in range(100):
            sender.send(b"%d" % number)
        received: list[bytes] = []

        def receive_once_it_is_shut() -> None:
            poller = select.poll()
            poller.register(receiver, select.POLLRDHUP)
            poller.poll(10_000)
            received.append(receiver.recv(100))

        thread = threading.Thread(target=receive_once_it_is_shut, daemon=True)
        thread.start()
        drained = shell.descriptors.drain_channel("j1-d1-1")
        thread.join(30)
    assert received + drained == [b"%d" % number for number in range(100)]


def test_who_asks_after_the_move_finds_a_shut_channel(nodes: Nodes, shell: FakeShell) -> None:
    assert shell.descriptors.drain_channel("j1-d1-2") == []
    receiver, sender = ends_of(nodes, "j1-d1-2")
    with receiver, sender:
        assert receiver.recv(100) == b""
        with pytest.raises(BrokenPipeError):
            sender.send(b"x")


def test_a_parked_descriptor_can_be_fetched_once(nodes: Nodes) -> None:
    reading, writing = os.pipe()
    answer, _ = ask(nodes, d.encode(d.ParkDescriptor("j1")), [writing])
    os.close(writing)
    assert answer is not None
    assert answer.error_number == 0
    _, (fetched,) = ask(nodes, d.encode(d.FetchDescriptor("na", answer.name)))
    os.write(fetched, b"hello")
    os.close(fetched)
    assert os.read(reading, 100) == b"hello"
    assert os.read(reading, 100) == b""  # the node has kept no duplicate
    os.close(reading)
    again, fds = ask(nodes, d.encode(d.FetchDescriptor("na", answer.name)))
    assert again is not None
    assert (again.error_number, fds) == (errno.ENOENT, [])


def test_the_end_of_a_job_closes_what_it_had(nodes: Nodes, shell: FakeShell) -> None:
    reading, writing = os.pipe()
    ask(nodes, d.encode(d.ParkDescriptor("j1")), [writing])
    os.close(writing)
    receiver, sender = ends_of(nodes, "j1-d1-1")
    kept_receiver, kept_sender = ends_of(nodes, "j10-d1-1")
    listener = shell.paths.folder / "l" / "j1.abcdef"
    listener.touch()
    sender.close()
    shell.descriptors.job_ended("j1")
    with receiver, kept_receiver, kept_sender:
        assert receiver.recv(100) == b""
        assert os.read(reading, 100) == b""
        assert not listener.exists()
        kept_sender.send(b"of another job")
        assert kept_receiver.recv(100) == b"of another job"
    os.close(reading)


@pytest.mark.parametrize(
    "frame",
    [
        b"\x80\x04\x95",  # a pickle
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(2000),
        msgspec.msgpack.encode(["NoSuchRequest"]),
        msgspec.msgpack.encode(["GetChannel", 3]),
        msgspec.msgpack.encode(["GetChannel", "../node.sock"]),
        msgspec.msgpack.encode(["ConnectListener", "n1", "../p/w1.sock"]),
        msgspec.msgpack.encode(["GetChannel", "x" * 101]),
    ],
)
def test_what_is_no_request_is_dropped_and_counted_and_its_descriptor_closed(
    nodes: Nodes, shell: FakeShell, frame: bytes
) -> None:
    reading, writing = os.pipe()
    assert ask(nodes, frame, [writing]) == (None, [])
    os.close(writing)
    assert os.read(reading, 1) == b""
    os.close(reading)
    assert shell.rejected == ["descriptors"]


def test_a_request_to_park_without_a_descriptor_is_refused(nodes: Nodes) -> None:
    answer, _ = ask(nodes, d.encode(d.ParkDescriptor("j1")))
    assert answer is not None
    assert answer.error_number == errno.EBADF


def test_who_has_made_too_many_queues_is_told_so(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    for end in ends_of(nodes, "j1-d1-1"):
        end.close()

    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(descriptors.socket, "socketpair", fail)
    answer, _ = ask(nodes, d.encode(d.GetChannel("j1-d1-2")))
    assert answer is not None
    assert answer.error_number == errno.EMFILE
    assert "it has 1 queues, each with two descriptors" in answer.text


# --- leases


@pytest.fixture
def line(nodes: Nodes) -> Iterator[tuple[socket.socket, str]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(str(nodes.shells["na"].paths.folder / "fd.sock"))
        sock.send(d.encode(d.OpenLine()))
        nodes.settle()
        sock.settimeout(30)
        answer = d.decode_answer(sock.recv(1000))
        assert answer.error_number == 0
        yield sock, answer.name


def leased(nodes: Nodes, line_name: str) -> tuple[int, str]:
    """The reading end of a pipe, and the name that its writing end is leased by."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    answer, _ = ask(nodes, d.encode(d.ParkDescriptor("j1", line_name)), [writing])
    os.close(writing)
    assert answer is not None
    assert answer.error_number == 0, answer
    return reading, answer.name


def check_fetched(nodes: Nodes, reading: int, name: str) -> None:
    _, (fetched,) = ask(nodes, d.encode(d.FetchDescriptor("na", name)))
    os.write(fetched, b"hello")
    os.close(fetched)
    assert os.read(reading, 100) == b"hello"


def check_gone(nodes: Nodes, reading: int, name: str) -> None:
    assert os.read(reading, 100) == b""
    os.close(reading)
    answer, _ = ask(nodes, d.encode(d.FetchDescriptor("na", name)))
    assert answer is not None
    assert answer.error_number == errno.ENOENT


def test_a_leased_descriptor_can_be_fetched_until_it_is_released(nodes: Nodes, line: tuple[socket.socket, str]) -> None:
    reading, name = leased(nodes, line[1])
    kept_reading, kept_name = leased(nodes, line[1])
    for _ in range(3):
        check_fetched(nodes, reading, name)
    line[0].send(d.encode(d.ReleaseLeases([name, "j1-99"])))
    nodes.settle()
    check_gone(nodes, reading, name)
    check_fetched(nodes, kept_reading, kept_name)
    line[0].close()
    nodes.settle()
    check_gone(nodes, kept_reading, kept_name)


def test_the_end_of_a_job_ends_its_leases_and_not_the_line(nodes: Nodes, line: tuple[socket.socket, str]) -> None:
    reading, name = leased(nodes, line[1])
    nodes.shells["na"].descriptors.job_ended("j1")
    check_gone(nodes, reading, name)
    reading, name = leased(nodes, line[1])
    check_fetched(nodes, reading, name)
    line[0].send(b"no request")
    nodes.settle()
    check_gone(nodes, reading, name)
    assert line[0].recv(10) == b""
    assert nodes.shells["na"].rejected == ["descriptors"]


def test_nobody_releases_the_leases_of_another_line(nodes: Nodes, line: tuple[socket.socket, str]) -> None:
    reading, name = leased(nodes, line[1])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.connect(str(nodes.shells["na"].paths.folder / "fd.sock"))
        other.send(d.encode(d.OpenLine()))
        other.send(d.encode(d.ReleaseLeases([name])))
        nodes.settle()
    check_fetched(nodes, reading, name)
    answer, _ = ask(nodes, d.encode(d.ReleaseLeases([name])))
    assert answer is not None
    assert answer.error_number == errno.EINVAL
    check_fetched(nodes, reading, name)
    os.close(reading)


def test_a_lease_on_a_line_that_has_ended_is_refused(nodes: Nodes) -> None:
    reading, writing = os.pipe()
    answer, _ = ask(nodes, d.encode(d.ParkDescriptor("j1", "l99")), [writing])
    os.close(writing)
    assert answer is not None
    assert answer.error_number == errno.ESTALE
    assert os.read(reading, 10) == b""
    os.close(reading)
