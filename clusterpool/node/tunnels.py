"""The ends of tunnels: sockets and pipes of this node's processes whose bytes go to, and come from, another node.

    socket --readable--> Tunnels machine --TunnelData--> [other node]
    socket <--writes--- [unwritten] <------TunnelData--- [other node]

What an end is may be shared with the process that parked it, which expects it to block as before. So nothing here
sets an end non-blocking: sockets are asked not to wait by a flag of each call, and pipes are opened anew.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import stat
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

from clusterpool.core import tunnels as ct
from clusterpool.core.node_events import Send
from clusterpool.core.tunnel_messages import TunnelMessage

if TYPE_CHECKING:
    from clusterpool.node.shell import NodeShell

logger = logging.getLogger(__name__)

# Below the size at which the C library maps fresh pages for each buffer; more messages than that cost more than they.
_READ_BYTES = 64 * 1024
# How much one end may send before the others have their turn.
_READS_MAX = 4
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL

# (descriptor, None), or (None, (error number, text)); the descriptor is the callee's to close.
OnAnswer = Callable[[int | None, tuple[int, str] | None], None]


class _End:
    """One end of a tunnel. `sock`: None for a pipe, which goes one way. `is_shared`: other processes may have it."""

    __slots__ = ("fd", "is_closing", "is_finishing", "is_hung_up", "is_readable", "is_reading", "is_shared",
                 "is_watched", "is_writable", "sock", "tunnel", "unwritten")  # fmt: skip

    def __init__(self, tunnel: str, fd: int, sock: socket.socket | None, *, is_shared: bool = False) -> None:
        self.tunnel = tunnel
        self.fd = fd
        self.sock = sock
        self.is_shared = is_shared
        self.unwritten: deque[memoryview] = deque()
        self.is_readable = self.is_writable = True
        self.is_reading = False
        self.is_finishing = False  # shut it down for writing once all is written
        self.is_closing = False  # close it once all is written
        self.is_hung_up = False  # the other side of it is closed: poll would report that without end
        self.is_watched = False

    def read(self, size: int) -> bytes:
        """Raises: OSError, BlockingIOError among them."""
        return os.read(self.fd, size) if self.sock is None else self.sock.recv(size, _FLAGS)

    def write(self, data: memoryview) -> int:
        return os.write(self.fd, data) if self.sock is None else self.sock.send(data, _FLAGS)

    def is_closed_beyond(self) -> bool:
        """Whether the other side of it is closed altogether, not only shut down for writing."""
        poll = select.poll()
        poll.register(self.fd, 0)
        return any(mask & (select.POLLHUP | select.POLLERR) for _, mask in poll.poll(0))

    def close(self) -> None:
        if self.sock is None:
            os.close(self.fd)
        else:
            self.sock.close()


class TunnelEnds:
    """Used by the node's only thread. `take_parked(name)` gives a parked descriptor or None."""

    def __init__(self, shell: NodeShell, take_parked: Callable[[str], int | None]) -> None:
        self._shell = shell
        self._take_parked = take_parked
        self._machine = ct.Tunnels(shell.node_id)
        self._ends: dict[str, _End] = {}
        self._askers: dict[int, OnAnswer] = {}
        self._last_asker = 0
        self._events: deque[ct.TunnelEvent] = deque()
        self._is_handling = False

    def open(self, node_id: str, kind: str, name: str, on_answer: OnAnswer) -> None:
        """Open a tunnel to what `kind` ("fetch" or "connect") and `name` are on another node."""
        self._last_asker += 1
        self._askers[self._last_asker] = on_answer
        self._handle(ct.TunnelWanted(self._last_asker, node_id, kind, name))

    def take(self, node_id: str, message: Any) -> bool:
        """Handle a message of another node, if it is one of a tunnel."""
        if not isinstance(message, TunnelMessage):
            return False
        self._handle(ct.TunnelMessageArrived(node_id, message))
        return True

    def node_gone(self, node_id: str) -> None:
        """A node is gone, or cannot be reached; may be called while a message is sent."""
        self._handle(ct.NodeGone(node_id))

    def job_over(self, job_id: str) -> None:
        """Nobody reads or writes any more at what belongs to the job."""
        self._handle(ct.TunnelJobOver(job_id))

    def close(self) -> None:
        """Close all ends; the node ends."""
        for end in list(self._ends.values()):
            self._drop(end)

    # --- the machine

    def _handle(self, event: ct.TunnelEvent) -> None:
        """In order, although carrying out a command may bring the next event."""
        self._events.append(event)
        if self._is_handling:
            return
        self._is_handling = True
        try:
            while self._events:
                for command in self._machine.handle(self._events.popleft(), monotonic()):
                    self._execute(command)
        finally:
            self._is_handling = False

    def _execute(self, command: Any) -> None:
        kind = type(command)
        if kind is Send:
            self._shell.send(command.destination, command.message)
        elif kind is ct.OpenEnd:
            self._open_end(command)
        elif kind is ct.MakeEnd:
            self._make_end(command)
        elif kind is ct.RefuseAsker:
            self._askers.pop(command.asker)(None, (command.error_number, command.text))
        else:
            end = self._ends.get(command.tunnel)
            if end is not None:
                self._change(end, command)

    def _change(self, end: _End, command: Any) -> None:
        kind = type(command)
        if kind is ct.WriteEnd:
            end.unwritten.append(memoryview(command.data))
            if len(end.unwritten) == 1:
                self._write(end)
        elif kind is ct.StartReading:
            end.is_reading = True
        elif kind is ct.PauseReading:
            end.is_reading = False
        elif kind is ct.RefuseBytes:
            end.is_reading = False
            # Others who have the same socket may still be read from; they find out when all have closed it.
            if end.sock is not None and not end.is_shared:
                with contextlib.suppress(OSError):
                    end.sock.shutdown(socket.SHUT_RD)
        elif kind is ct.FinishWriting:
            end.is_finishing = True
        elif kind is ct.CloseEnd:
            end.is_closing = True
            end.is_reading = False
        self._settle(end)

    # --- making ends

    def _make_end(self, command: ct.MakeEnd) -> None:
        theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._add(_End(command.tunnel, ours.fileno(), ours))
        self._askers.pop(command.asker)(theirs.detach(), None)

    def _open_end(self, command: ct.OpenEnd) -> None:
        try:
            end = self._open_parked(command) if command.kind == "fetch" else self._connect(command)
        except OSError as exc:
            text = exc.strerror or str(exc)
            self._handle(ct.EndRefused(command.tunnel, exc.errno or errno.EIO, text))
            return
        self._add(end)
        self._handle(ct.EndOpened(command.tunnel, end.is_readable, end.is_writable))

    def _open_parked(self, command: ct.OpenEnd) -> _End:
        fd = self._take_parked(command.name)
        if fd is None:
            raise FileNotFoundError(errno.ENOENT, "the descriptor was fetched before, or its job has ended")
        try:
            mode = os.fstat(fd).st_mode
            if stat.S_ISFIFO(mode):
                return _open_pipe(command.tunnel, fd)
            if stat.S_ISSOCK(mode):
                sock = socket.socket(fileno=fd)
                if sock.type == socket.SOCK_STREAM and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    fd = -1
                    return _End(command.tunnel, sock.fileno(), sock, is_shared=True)
                sock.detach()
            raise OSError(errno.EINVAL, "only connected stream sockets and pipes can be used on another node")
        finally:
            if fd >= 0:
                os.close(fd)

    def _connect(self, command: ct.OpenEnd) -> _End:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(str(self._shell.paths.folder / "l" / command.name))
        except BaseException:
            sock.close()
            raise
        return _End(command.tunnel, sock.fileno(), sock)

    def _add(self, end: _End) -> None:
        self._ends[end.tunnel] = end
        self._settle(end)

    # --- bytes

    def _ready(self, end: _End, mask: int) -> None:
        if mask & (select.EPOLLHUP | select.EPOLLERR):
            # It may still hold bytes to be read; but what we write, nobody reads.
            end.is_hung_up = True
            end.unwritten.clear()
            self._handle(ct.ReaderGone(end.tunnel))
        elif mask & select.EPOLLOUT and end.unwritten:
            self._write(end)
        if end.is_reading and mask & ~select.EPOLLOUT:
            self._read(end)
        if self._ends.get(end.tunnel) is end:
            self._settle(end)

    def _read(self, end: _End) -> None:
        for _ in range(_READS_MAX):
            size = min(_READ_BYTES, self._machine.credit_of(end.tunnel))
            if not size or not end.is_reading:
                return
            try:
                data = end.read(size)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:  # such as ECONNRESET, after the last byte
                data = b""
            if not data:
                end.is_reading = False
                # In this order, so that the other side closes its end rather than shuts down what others share.
                if end.is_closed_beyond():
                    self._handle(ct.ReaderGone(end.tunnel))
                self._handle(ct.BytesEnded(end.tunnel))
                return
            self._handle(ct.BytesRead(end.tunnel, data))
            if len(data) < size:
                return

    def _write(self, end: _End) -> None:
        written = 0
        unwritten = end.unwritten
        is_reader_gone = False
        while unwritten:
            try:
                count = end.write(unwritten[0])
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                unwritten.clear()
                is_reader_gone = True
                break
            written += count
            if count == len(unwritten[0]):
                unwritten.popleft()
            else:
                unwritten[0] = unwritten[0][count:]
        if is_reader_gone:
            self._handle(ct.ReaderGone(end.tunnel))
        elif written:
            self._handle(ct.BytesWritten(end.tunnel, written))

    def _settle(self, end: _End) -> None:
        """Do what had to wait until all was written, and watch for what may happen next."""
        if not end.unwritten:
            if end.is_closing:
                self._drop(end)
                return
            if end.is_finishing:
                end.is_finishing = False
                if end.sock is not None:
                    with contextlib.suppress(OSError):
                        end.sock.shutdown(socket.SHUT_WR)
        mask = (select.EPOLLIN if end.is_reading else 0) | (select.EPOLLOUT if end.unwritten else 0)
        if end.is_hung_up and not mask:
            self._unwatch(end)
            return
        if not end.is_watched:
            end.is_watched = True
            self._shell.watch(end.fd, lambda ready, end=end: self._ready(end, ready))  # type: ignore[misc]
        self._shell.epoll.modify(end.fd, mask)

    def _unwatch(self, end: _End) -> None:
        if end.is_watched:
            end.is_watched = False
            self._shell.unwatch(end.fd)

    def _drop(self, end: _End) -> None:
        if self._ends.get(end.tunnel) is end:
            del self._ends[end.tunnel]
            self._unwatch(end)
            end.close()


def _open_pipe(tunnel: str, fd: int) -> _End:
    """The same pipe, opened once more, so that only this opening of it does not block.

    Raises: OSError, when the other side of a pipe for writing is closed among others.
    """
    import fcntl

    access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    end = _End(tunnel, os.open(f"/proc/self/fd/{fd}", access | os.O_NONBLOCK | os.O_CLOEXEC), None)
    end.is_readable = access != os.O_WRONLY
    end.is_writable = access != os.O_RDONLY
    return end
