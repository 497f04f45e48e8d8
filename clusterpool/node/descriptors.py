"""The descriptor service: hands out the node's channels, and keeps descriptors for whoever comes for them.

    process --fd.sock: request, descriptor--> Descriptors --answer, descriptors--> process
                                                 |- channels    by name: a SEQPACKET pair each
                                                 |- parked      by name: a descriptor each, until it is fetched
                                                 |- lines       of a process each: its leases, until it lets them go
                                                 +- Tunnels     what lies on another node

All names begin with the id of their job, so that what is left of a job can be removed when it ends, whoever made it.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import resource
import socket
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from clusterpool.core import descriptor_messages as d
from clusterpool.node.tunnels import TunnelEnds

if TYPE_CHECKING:
    from clusterpool.node.shell import NodeShell

logger = logging.getLogger(__name__)

# Asked for; the kernel grants twice what net.core.wmem_max allows. How deep a channel is before its putters wait.
CHANNEL_BYTES = 4 * 1024 * 1024
NOT_PARKED = "the descriptor was fetched before, or whoever parked it has let it go, or its job has ended"
# For how long a getter may be between its look at the moved page and its `recv`. If it took something while the channel
# is drained, what lies before that would come after it.
IN_FLIGHT_S = 0.005
_DRAIN_BYTES = 16 * 1024 * 1024  # more than any one message of a channel


class _Line:
    """A connection of a process that leases descriptors, for as long as it lives."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.names: set[str] = set()


class Descriptors:
    """Used by the node's only thread."""

    def __init__(self, shell: NodeShell) -> None:
        self._shell = shell
        self._folder = shell.paths.folder
        self._channels: dict[str, tuple[socket.socket, socket.socket]] = {}  # receiving, sending
        self._parked: dict[str, int] = {}  # by ticket's name
        self._leased: dict[str, int] = {}  # likewise
        self._lines: dict[str, _Line] = {}
        self._numbers = itertools.count(1)
        self._listener: socket.socket | None = None
        self._askers: set[socket.socket] = set()
        self.tunnels = TunnelEnds(shell, self.take_parked)

    def open(self) -> None:
        """Listen for requests."""
        # Each queue of each job costs the node two descriptors, and 1024, the usual limit, is soon used up.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        (self._folder / "l").mkdir(mode=0o700, exist_ok=True)
        path = self._folder / "fd.sock"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(512)
        self._listener.setblocking(False)
        self._shell.watch(self._listener.fileno(), lambda _: self._accept())

    def close(self) -> None:
        """Close everything; what was parked is lost."""
        self.tunnels.close()
        self._close_channels(list(self._channels))
        for line in list(self._lines):
            self._close_line(line)
        for parked in (self._parked, self._leased):
            _close_all(parked, list(parked))
        for sock in [*self._askers, *([self._listener] if self._listener is not None else [])]:
            self._shell.unwatch(sock.fileno())
            sock.close()
        self._askers.clear()

    # --- channels

    def channel(self, name: str) -> tuple[socket.socket, socket.socket]:
        """The receiving and the sending end of a channel; the node keeps both, so that no message is lost while
        nobody else has the channel.
        """
        ends = self._channels.get(name)
        if ends is None:
            receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHANNEL_BYTES)
            ends = self._channels[name] = (receiver, sender)
        return ends

    def drain_channel(self, name: str) -> list[bytes]:
        """Shut a channel for good and return what nobody has received, in order.

        From now on senders get EPIPE and receivers the end, also those who ask for the channel only later: so it
        is kept, empty, until its job ends.
        """
        receiver, sender = self.channel(name)
        # After this no message can come in, also of those who are sending at this moment.
        with contextlib.suppress(OSError):
            sender.shutdown(socket.SHUT_WR)
        if not _has_message(receiver):
            return []  # mostly: who gets from it waits
        # The page says that it moves: nobody begins to receive, and those who had begun take what is first.
        time.sleep(IN_FLIGHT_S)
        messages: list[bytes] = []
        while True:
            try:
                message = receiver.recv(_DRAIN_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return messages
            if not message:
                return messages
            messages.append(message)

    def forget_channel(self, name: str) -> None:
        """Nobody knows the channel any more."""
        self._close_channels([name])

    def _close_channels(self, names: list[str]) -> None:
        for name in names:
            for sock in self._channels.pop(name, ()):
                sock.close()

    # --- the end of a job

    def job_ended(self, job_id: str) -> None:
        """Remove all that belongs to a job that has ended."""
        self._close_channels([name for name in self._channels if name.startswith(f"{job_id}-")])
        for parked in (self._parked, self._leased):
            _close_all(parked, [name for name in parked if name.startswith(f"{job_id}-")])
        self.tunnels.job_over(job_id)
        # Not `glob`, which keeps what it has compiled for each of thousands of jobs.
        with contextlib.suppress(FileNotFoundError), os.scandir(self._folder / "l") as entries:
            for name in [entry.name for entry in entries if entry.name.startswith(f"{job_id}.")]:
                (self._folder / "l" / name).unlink(missing_ok=True)

    # --- requests

    def _accept(self) -> None:
        assert self._listener is not None
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setblocking(False)
            self._askers.add(sock)
            self._shell.watch(sock.fileno(), lambda _, sock=sock: self._asked(sock))  # type: ignore[misc]

    def _asked(self, sock: socket.socket) -> None:
        self._shell.unwatch(sock.fileno())
        fds: list[int] = []
        try:
            frame, fds, _, _ = socket.recv_fds(sock, d.REQUEST_BYTES_MAX, 1, socket.MSG_CMSG_CLOEXEC)
            if frame:
                self._handle(sock, d.decode_request(frame), fds)
                return
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            self._shell.reject("descriptors", f"dropped a request for descriptors that is none of ours: {exc}")
        except OSError as exc:  # such as too many open files
            logger.warning("a request for descriptors could not be met: %s", exc)
            reason = f"the node could not meet the request: {exc}{self._remedy(exc)}"
            self._answer(sock, d.Answer(exc.errno or errno.EIO, reason))
            return
        finally:
            for fd in fds:
                os.close(fd)
        self._hang_up(sock)

    def _remedy(self, error: OSError) -> str:
        if error.errno != errno.EMFILE or not self._channels:
            return ""
        return (
            f"; it has {len(self._channels)} queues, each with two descriptors (one that was passed to anything lives "
            "until its program ends): use some again, or start the node under a higher limit (`ulimit -n`)"
        )

    def _handle(self, sock: socket.socket, request: d.AnyRequest, fds: list[int]) -> None:
        if isinstance(request, d.GetChannel):
            receiver, sender = self.channel(request.name)
            self._answer(sock, d.Answer(0), [receiver.fileno(), sender.fileno()])
        elif isinstance(request, d.ParkDescriptor):
            if not fds:
                self._answer(sock, d.Answer(errno.EBADF, "no descriptor came with the request"))
                return
            self._park(sock, request, fds)
        elif isinstance(request, d.OpenLine):
            self._open_line(sock)
        elif isinstance(request, d.ReleaseLeases):
            self._answer(sock, d.Answer(errno.EINVAL, "leases are released on the line that they were made for"))
        elif isinstance(request, d.ConnectListener):
            if request.node_id == self._shell.node_id:
                self._answer(sock, d.Answer(errno.EINVAL, "a listener of one's own node is connected to directly"))
                return
            self._fetch(sock, request.node_id, "connect", request.name)
        elif request.node_id != self._shell.node_id:
            self._fetch(sock, request.node_id, "fetch", request.name)
        else:
            fd = self.take_parked(request.name)
            error = None if fd is not None else (errno.ENOENT, NOT_PARKED)
            self._answer_with(sock, fd, error)

    def _park(self, sock: socket.socket, request: d.ParkDescriptor, fds: list[int]) -> None:
        name = f"{request.job_id}-{next(self._numbers)}"
        if not request.line:
            self._parked[name] = fds.pop()
        elif request.line in self._lines:
            self._leased[name] = fds.pop()
            self._lines[request.line].names.add(name)
        else:
            self._answer(sock, d.Answer(errno.ESTALE, "there is no such line any more"))
            return
        self._answer(sock, d.Answer(0, name=name))

    def _fetch(self, sock: socket.socket, node_id: str, kind: str, name: str) -> None:
        """From another node: the answer comes when that one has answered, or is gone."""
        self.tunnels.open(node_id, kind, name, lambda fd, error: self._answer_with(sock, fd, error))

    def _answer_with(self, sock: socket.socket, fd: int | None, error: tuple[int, str] | None) -> None:
        if fd is None:
            assert error is not None, "neither a descriptor nor why there is none"
            self._answer(sock, d.Answer(*error))
            return
        self._answer(sock, d.Answer(0), [fd])
        os.close(fd)

    def take_parked(self, name: str) -> int | None:
        """A parked descriptor, or a duplicate of a leased one, which is the caller's from now on.

        Raises: OSError when it cannot be duplicated.
        """
        leased = self._leased.get(name)
        return self._parked.pop(name, None) if leased is None else os.dup(leased)

    # --- leases

    def _open_line(self, sock: socket.socket) -> None:
        line = f"l{next(self._numbers)}"
        try:
            socket.send_fds(sock, [d.encode(d.Answer(0, name=line))], [])
        except OSError:
            self._hang_up(sock)
            return
        self._askers.discard(sock)
        self._lines[line] = _Line(sock)
        self._shell.watch(sock.fileno(), lambda _: self._told(line))

    def _told(self, line: str) -> None:
        """Something came on a line, or it ended."""
        try:
            frame = self._lines[line].sock.recv(d.REQUEST_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            frame = b""
        try:
            request = d.decode_request(frame) if frame else None
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            self._shell.reject("descriptors", f"closed a line for leases that sent no request of ours: {exc}")
            request = None
        if not isinstance(request, d.ReleaseLeases):
            self._close_line(line)
            return
        names = self._lines[line].names.intersection(request.names)
        self._lines[line].names -= names
        _close_all(self._leased, names)

    def _close_line(self, line: str) -> None:
        closed = self._lines.pop(line)
        _close_all(self._leased, closed.names)
        self._shell.unwatch(closed.sock.fileno())
        closed.sock.close()

    # --- answers

    def _answer(self, sock: socket.socket, answer: d.Answer, fds: list[int] | None = None) -> None:
        try:
            socket.send_fds(sock, [d.encode(answer)], fds or [])
        except OSError as exc:
            logger.debug("whoever asked for a descriptor has gone: %s", exc)
        self._hang_up(sock)

    def _hang_up(self, sock: socket.socket) -> None:
        self._askers.discard(sock)
        sock.close()


def _close_all(descriptors: dict[str, int], names: Iterable[str]) -> None:
    for name in names:
        fd = descriptors.pop(name, None)
        if fd is not None:  # its job may have ended
            os.close(fd)


def _has_message(receiver: socket.socket) -> bool:
    try:
        return bool(receiver.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return False
