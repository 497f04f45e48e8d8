from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from clusterpool.core import messages as m
from clusterpool.core import wire
from clusterpool.core.messages import Message
from clusterpool.errors import ProtocolError
from clusterpool.transport import stream
from clusterpool.transport.stream import FRAME_BYTES_MAX, Connection, split_frames


@pytest.fixture
def pair() -> Iterator[tuple[Connection, Connection]]:
    """Two connected ends."""
    left, right = socket.socketpair()
    ends = Connection(left), Connection(right)
    yield ends
    for end in ends:
        end.close()


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Connection]]:
    """A bare socket, to send anything, and a connection that hears it."""
    left, right = socket.socketpair()
    connection = Connection(right)
    yield left, connection
    left.close()
    connection.close()


def framed(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def received(connection: Connection) -> list[Message]:
    """All messages that have arrived."""
    messages: list[Message] = []
    while True:
        frames, _ = connection.receive()
        if not frames:
            return messages
        messages += [wire.decode(frame) for frame in frames]


def is_at_end(connection: Connection) -> bool:
    while True:
        frames, ended = connection.receive()
        if ended or not frames:
            return ended


def test_messages_arrive_whole_and_in_order(pair: tuple[Connection, Connection]) -> None:
    sent = [m.TakeBackTasks(number) for number in range(1000)]
    for message in sent:
        pair[0].send(message)
    assert received(pair[1]) == sent
    assert not is_at_end(pair[1])


def test_both_ends_may_send(pair: tuple[Connection, Connection]) -> None:
    pair[0].send(m.RetireWorker())
    pair[1].send(m.WorkerBlocked())
    assert (received(pair[0]), received(pair[1])) == ([m.WorkerBlocked()], [m.RetireWorker()])


@pytest.mark.parametrize("pieces_of", [1, 3, 7, 64])
def test_a_frame_may_come_in_pieces(raw: tuple[socket.socket, Connection], pieces_of: int) -> None:
    sender, connection = raw
    sent: list[Message] = [m.TakeBackTasks(1), m.Undeliverable(m.Address("n" * 40, "p" * 40)), m.RetireWorker()]
    stream_bytes = b"".join(framed(wire.encode(message)) for message in sent)
    messages: list[Message] = []
    for start in range(0, len(stream_bytes), pieces_of):
        sender.sendall(stream_bytes[start : start + pieces_of])
        messages += received(connection)
    assert messages == sent


def test_what_does_not_fit_into_the_kernel_goes_out_on_flush(pair: tuple[Connection, Connection]) -> None:
    sender, receiver = pair
    payload = bytes(1024 * 1024)
    sent = [m.WorkerSetupFailed(number, payload) for number in range(20)]
    for message in sent:
        sender.send(message)
    assert sender.has_unsent
    assert sender.unsent_bytes > 0
    messages: list[Message] = []
    for _ in range(10_000):
        messages += received(receiver)
        if len(messages) == len(sent):
            break
        sender.flush()
    assert messages == sent
    assert not sender.has_unsent
    assert sender.unsent_bytes == 0


def test_a_large_frame_leaves_no_large_buffer_behind(pair: tuple[Connection, Connection]) -> None:
    sender, receiver = pair
    sender.send(m.WorkerSetupFailed(1, bytes(8 * 1024 * 1024)))
    while not received(receiver):
        sender.flush()
    sender.send(m.RetireWorker())
    assert received(receiver) == [m.RetireWorker()]
    assert len(sender._scratch) < 8192


def test_all_that_was_sent_before_the_end_arrives_before_it(raw: tuple[socket.socket, Connection]) -> None:
    sender, connection = raw
    sender.sendall(framed(wire.encode(m.RetireWorker())))
    sender.close()
    frames, ended = connection.receive()
    assert (len(frames), ended) == (1, False)
    assert connection.receive() == ([], True)


def test_half_a_frame_before_the_end_is_no_message(raw: tuple[socket.socket, Connection]) -> None:
    sender, connection = raw
    sender.sendall(framed(wire.encode(m.TakeBackTasks(1)))[:-1])
    sender.close()
    assert received(connection) == []
    assert is_at_end(connection)


@pytest.mark.parametrize("pieces_of", [1, 2, 4, 100])
def test_a_frame_that_is_too_long_is_refused_by_its_length(
    raw: tuple[socket.socket, Connection], pieces_of: int
) -> None:
    sender, connection = raw
    announced = struct.pack("<I", FRAME_BYTES_MAX + 1) + b"x" * 96

    def feed() -> None:
        for start in range(0, len(announced), pieces_of):
            sender.sendall(announced[start : start + pieces_of])
            received(connection)

    with pytest.raises(ProtocolError, match="announced"):
        feed()


def test_a_foreign_protocol_is_refused(raw: tuple[socket.socket, Connection]) -> None:
    sender, connection = raw
    sender.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(ProtocolError):
        received(connection)


@pytest.mark.parametrize("seed", range(30))
def test_a_stream_cut_anywhere_gives_the_same_frames(seed: int) -> None:
    random = Random(seed)
    frames = [random.randbytes(random.choice([0, 1, 3, 50, 5000])) for _ in range(30)]
    left, right = socket.socketpair()
    connection = Connection(right)
    data = b"".join(map(framed, frames))
    got: list[bytes] = []
    position = 0
    while position < len(data):
        length = random.choice([1, 2, 5, 100, 3000])
        left.sendall(data[position : position + length])
        position += length
        while arrived := connection.receive()[0]:
            got += arrived
    assert got == frames
    left.close()
    connection.close()


def test_the_rest_of_a_split_is_what_was_not_whole() -> None:
    data = framed(b"one") + framed(b"") + framed(b"three")[:5]
    assert split_frames(data) == ([b"one", b""], framed(b"three")[:5])


def test_sending_to_somebody_who_has_gone_is_no_error(pair: tuple[Connection, Connection]) -> None:
    sender, receiver = pair
    receiver.close()
    for _ in range(3):
        sender.send(m.RetireWorker())
    assert is_at_end(sender)
    sender.close()
    sender.close()
    sender.send(m.RetireWorker())
    assert sender.fileno() == -1


def test_only_this_user_can_connect(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    listener = stream.listen(path)
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert stream.accept(listener) == []
    client = stream.connect(path)
    (server,) = stream.accept(listener)
    client.send(m.TakeBackTasks(7))
    assert received(server) == [m.TakeBackTasks(7)]
    for end in (client, server, listener):
        end.close()
    with pytest.raises(OSError, match="refused"):
        stream.connect(path)


def test_a_socket_file_that_a_dead_process_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    stream.listen(path).close()
    listener = stream.listen(path)
    stream.connect(path).close()
    listener.close()


def test_a_peer_that_never_reads_is_cut_off_at_last(
    pair: tuple[Connection, Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "UNSENT_BYTES_MAX", 30_000_000)
    left, right = pair
    for _ in range(40):
        left.send(m.LogLines("task", 1, "n1", 1, ["x" * 1_000_000]))
        assert left.unsent_bytes <= 30_000_000
    assert not left.has_unsent
    assert is_at_end(left)  # its owner hears of it as of any other end
    assert any(right.receive()[1] for _ in range(100))


def test_a_long_message_right_behind_the_greeting_is_taken(tmp_path: Path) -> None:
    listener = stream.listen(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(tmp_path / "s"))
        (connection,) = stream.accept(listener)
        long = b"x" * (4 * stream.GREETING_BYTES_MAX)
        sent = threading.Thread(target=stranger.sendall, args=(frame(b"hello") + frame(long) + frame(long),))
        sent.start()
        received: list[bytes] = []
        while len(received) < 3:
            received += connection.receive()[0]
            if received:
                connection.frame_bytes_max = stream.FRAME_BYTES_MAX  # it has been greeted
        sent.join()
        assert received == [b"hello", long, long]
        connection.close()
    listener.close()


def test_a_stranger_cannot_begin_with_a_long_message(tmp_path: Path) -> None:
    listener = stream.listen(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(tmp_path / "s"))
        (connection,) = stream.accept(listener)
        stranger.sendall(frame(b"x" * (stream.GREETING_BYTES_MAX + 1))[:100])
        with pytest.raises(ProtocolError):
            connection.receive()
        connection.close()
    listener.close()


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + body


def test_loops_of_several_threads_do_not_read_each_others_bytes() -> None:
    mixed_up: list[bytes] = []

    def read(letter: bytes) -> None:
        left, right = socket.socketpair()
        connection = Connection(right)
        frame = framed(letter * 50_000)
        for _ in range(1000):
            left.sendall(frame)
            frames: list[bytes] = []
            while not frames:
                frames, _ended = connection.receive()
            if frames != [letter * 50_000]:
                mixed_up.append(letter)
                break
        connection.close()
        left.close()

    threads = [threading.Thread(target=read, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not mixed_up
