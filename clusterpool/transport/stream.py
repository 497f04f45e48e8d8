"""Frames over a UNIX stream socket: a 4-byte little-endian length, then one encoded message.

    send(message) --> [out buffer, empty nearly always] --> socket --> [in buffer] --> receive() -> [frame, ...]

Not thread-safe: the owner of a connection (a client under its lock, a node's only thread) calls everything.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
from collections import deque
from pathlib import Path

from clusterpool.core.messages import Message
from clusterpool.core.wire import encode_into
from clusterpool.errors import ProtocolError

logger = logging.getLogger(__name__)

# A frame holds a batch of tasks whose payloads are small (large values travel through the arena), or one chunk of a
# transfer. More than this is no message of ours.
FRAME_BYTES_MAX = 256 * 1024 * 1024
# Before a process has said who it is: a greeting is some 200 bytes.
GREETING_BYTES_MAX = 64 * 1024
# Large enough for a batch of some thousand tasks to go out in one system call; the kernel may grant less.
SOCKET_BUFFER_BYTES = 4 * 1024 * 1024
# What waits for a peer that does not read. Each kind of message is bounded where it is made (tasks by dispatch, items
# of generators, output, tunnels by their windows), far below this: what comes here is a fault, and a process that has
# lost a connection says so, while one that has used up the memory takes others with it.
UNSENT_BYTES_MAX = 1024 * 1024 * 1024
_RECEIVE_BYTES = 256 * 1024
_LENGTH = struct.Struct("<I")
# What to read into: `recv` would allocate this much for each read, which maps and unmaps pages (15 us). A reader takes
# one and puts it back, for reading lets go of the GIL: a process may have a second loop, or ask some node how it is, at
# the same time, and would find the other's bytes. So there are as many as have ever read at once, one nearly always.
_buffers: list[bytearray] = []


class Connection:
    """One end of a stream socket, non-blocking."""

    __slots__ = ("_in", "_out", "_out_bytes", "_scratch", "frame_bytes_max", "is_closed", "peer", "socket")

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        self.socket = sock
        self.peer: object = None  # whatever the owner wants to find here
        self.is_closed = False
        self.frame_bytes_max = FRAME_BYTES_MAX  # longer ones are refused before they are in memory
        self._in = bytearray()
        self._out: deque[memoryview] = deque()
        self._out_bytes = 0
        self._scratch = bytearray(4096)

    def fileno(self) -> int:
        """The socket's descriptor, for epoll; -1 once closed."""
        return self.socket.fileno()

    @property
    def has_unsent(self) -> bool:
        """Whether the kernel's buffer was full: wait until the socket is writable, then call `flush`."""
        return bool(self._out)

    @property
    def unsent_bytes(self) -> int:
        """How much waits for the other side to read."""
        return self._out_bytes

    def send(self, message: Message) -> bool:
        """Send now as much as the kernel takes, the rest on `flush`. A broken connection swallows it.

        Returns: False if the other side surely gets nothing of it.
        """
        scratch = self._scratch
        encode_into(message, scratch, 4)
        _LENGTH.pack_into(scratch, 0, len(scratch) - 4)
        return self._send_bytes(scratch)

    def _send_bytes(self, frame: bytes | bytearray) -> bool:
        if self.is_closed:
            return False
        sent = 0
        if not self._out:
            try:
                sent = self.socket.send(frame)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError:
                # The reading side finds the end of the stream and reports it with its cause.
                return False
            if sent == len(frame):
                return True
        rest = memoryview(bytes(memoryview(frame)[sent:]))
        self._out.append(rest)
        self._out_bytes += len(rest)
        if self._out_bytes > UNSENT_BYTES_MAX:
            self._give_up()
        return True

    def _give_up(self) -> None:
        """The other side does not read: cut it off. Our reading side finds the end of the stream and reports it."""
        logger.error("a peer (%s) did not read %d bytes: its connection is closed", self.peer, self._out_bytes)
        self._out.clear()
        self._out_bytes = 0
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def flush(self) -> None:
        """Go on sending what had to wait."""
        out = self._out
        while out:
            try:
                sent = self.socket.send(out[0])
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                out.clear()
                self._out_bytes = 0
                return
            self._out_bytes -= sent
            if sent == len(out[0]):
                out.popleft()
            else:
                out[0] = out[0][sent:]

    def receive(self) -> tuple[list[bytes], bool]:
        """The whole frames that have arrived, and whether the stream has ended.

        Raises: ProtocolError when a length is beyond what we ever send.
        """
        try:
            buffer = _buffers.pop()
        except IndexError:
            buffer = bytearray(_RECEIVE_BYTES)
        try:
            return self._receive_into(buffer)
        finally:
            _buffers.append(buffer)

    def _receive_into(self, buffer: bytearray) -> tuple[list[bytes], bool]:
        ended = False
        while True:
            try:
                count = self.socket.recv_into(buffer)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                ended = True
                break
            if not count:
                ended = True
                break
            chunk = buffer[:count]
            if not self._in:
                frames, rest = split_frames(chunk, self.frame_bytes_max)
                if rest:
                    self._in += rest
            else:
                self._in += chunk
                frames = []
                if self._is_whole_frame_in():
                    frames, rest = split_frames(self._in, self.frame_bytes_max)
                    self._in = bytearray(rest)
            if frames:
                # More may be waiting: epoll is level-triggered and will say so.
                return frames, False
            if count < _RECEIVE_BYTES:
                break
        return [], ended

    def _is_whole_frame_in(self) -> bool:
        waiting = self._in
        if len(waiting) < 4:
            return False
        length = int(_LENGTH.unpack_from(waiting, 0)[0])
        # One that is too long counts as whole, so that `split_frames` refuses it before it is all in memory.
        return length > self.frame_bytes_max or len(waiting) >= 4 + length

    @property
    def is_mid_frame(self) -> bool:
        """Whether the other side has begun a message that is not here as a whole yet."""
        return bool(self._in)

    def close(self) -> None:
        """Close the socket; may be called twice."""
        if not self.is_closed:
            self.is_closed = True
            self._out.clear()
            self.socket.close()


def split_frames(received: bytes | bytearray, bytes_max: int = FRAME_BYTES_MAX) -> tuple[list[bytes], bytes]:
    """The whole frames at the start of `received`, and the rest.

    Raises: ProtocolError for a first frame longer than `bytes_max`, or another one longer than FRAME_BYTES_MAX.
    """
    frames: list[bytes] = []
    position, end = 0, len(received)
    if end >= 4 and _LENGTH.unpack_from(received, 0)[0] == end - 4:
        return [bytes(received[4:])], b""  # one whole frame: the rule when calls come one at a time
    view = memoryview(received)
    try:
        while end - position >= 4:
            (length,) = _LENGTH.unpack_from(received, position)
            # What comes right behind a greeting may be longer: `bytes_max` is raised when that has been handled.
            if length > (FRAME_BYTES_MAX if frames else bytes_max):
                raise ProtocolError(
                    f"a frame of {length} bytes was announced, {bytes_max} are allowed; "
                    "the other side is not clusterpool, or of another version"
                )
            if end - position - 4 < length:
                break
            frames.append(bytes(view[position + 4 : position + 4 + length]))
            position += 4 + length
        return frames, bytes(view[position:])
    finally:
        view.release()


def listen(path: Path | str) -> socket.socket:
    """A listening socket at `path`, which only this user can open."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108
        sock.bind(str(path))
        os.chmod(path, 0o600)  # noqa: PTH101
        sock.listen(512)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def accept(listener: socket.socket) -> list[Connection]:
    """The connections that are waiting. They take no more than a greeting until `frame_bytes_max` is raised."""
    accepted: list[Connection] = []
    while True:
        try:
            sock, _ = listener.accept()
        except OSError:
            return accepted
        connection = Connection(sock)
        connection.frame_bytes_max = GREETING_BYTES_MAX
        accepted.append(connection)


def connect(path: Path | str) -> Connection:
    """A connection to the process that listens at `path`.

    Raises: OSError when nobody does.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.connect(str(path))
    except OSError:
        sock.close()
        raise
    return Connection(sock)
