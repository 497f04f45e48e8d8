"""The node's side of the zygote, the process that forks workers.

    node --fork, before it has threads--> zygote --fork--> worker, worker, ...
      |                                     |  imports the worker's code once, and stays single-threaded
      +------ SOCK_SEQPACKET, marshal ------+

A fork of a process with threads may deadlock in the child, and a new interpreter takes 100 ms; hence a
process that does nothing but fork. It also is the workers' parent: a pid stays theirs until the zygote has
waited for it, so that a signal sent by the zygote never hits a stranger. When the node ends, the kernel
kills the zygote (PR_SET_PDEATHSIG), and with the zygote its workers. The zygote cannot be started again: by
then the node has threads.

Values go over as `marshal`, because both ends are the same interpreter, and it takes plain values only.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import signal
import socket
import sys
from collections import deque
from dataclasses import dataclass
from typing import Any, TypeAlias

from clusterpool.errors import StartFailed
from clusterpool.processes.death import has_exited, open_pidfd

WORKER_MODULE = "clusterpool.worker.main"
# One packet must fit the socket's buffer, which unprivileged processes cannot raise above 208 KiB.
REQUEST_BYTES_MAX = 128 * 1024
_EVENTS_MAX = 256
_EXIT_WAIT_S = 2.0
_ANSWERS = frozenset({"forked", "fork_failed", "preloaded", "acknowledged"})


@dataclass(frozen=True)
class WorkerForked:
    """The worker runs. The node owns both descriptors, the reading ends of the worker's stdout and stderr."""

    worker_id: str
    pid: int
    stdout_fd: int
    stderr_fd: int


@dataclass(frozen=True)
class WorkerExited:
    """The worker is gone and was waited for. `exit_code`: negative for a signal, as in multiprocessing."""

    worker_id: str
    pid: int
    exit_code: int
    peak_rss_bytes: int


@dataclass(frozen=True)
class ForkFailed:
    """There is no such worker, and none will come; no WorkerExited follows."""

    worker_id: str
    reason: str


@dataclass(frozen=True)
class Preloaded:
    """`reason`: empty if workers forked from now on have the modules, else why they were not imported."""

    modules: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class ZygoteDied:
    """The last event. All workers are dead, or die now; none is reported one by one."""

    exit_code: int | None
    reason: str


ZygoteEvent: TypeAlias = WorkerForked | WorkerExited | ForkFailed | Preloaded | ZygoteDied


class Zygote:
    """Forks workers in milliseconds, and says when they end. No call blocks but `start` and `close`; one
    thread.

    At most one request a packet waits in the kernel; what does not fit waits in `_unsent`, and is sent on
    when events come: each request is answered by one (a signal by an acknowledgement), so nothing is ever
    forgotten there.
    """

    def __init__(self, pid: int, control: socket.socket) -> None:
        control.setblocking(False)
        self.pid = pid
        self._control: socket.socket | None = control
        self._unsent: deque[bytes] = deque()
        self._reason = ""
        self._abandoned: set[str] = set()  # workers whose pipes could not be taken over: killed, and reported as failed
        self.heard = 0  # messages that have come from it
        self._unanswered = 0

    @classmethod
    def start(cls, worker_module: str = WORKER_MODULE) -> Zygote:
        """Fork the zygote; the node's first act, while it has one thread, few modules, and nothing open.

        `worker_module`: imported by the zygote; each worker runs its `main(spec)` and exits with what that
        returns.

        Raises: RuntimeError if the calling process has several threads.
        """
        threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208 (no Path in a hot or early path)
        if threads != 1:
            raise RuntimeError(f"the zygote must be forked before the process starts threads, but it has {threads}")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sys.stdout.flush()
        sys.stderr.flush()
        node_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            exit_code = 1
            try:
                from clusterpool.processes.zygote_loop import run_zygote

                exit_code = run_zygote(theirs.detach(), worker_module, node_pid)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(exit_code)
        theirs.close()
        return cls(pid, ours)

    def fileno(self) -> int:
        """Readable when `read_events` has something; -1 once the zygote is gone."""
        return -1 if self._control is None else self._control.fileno()

    def fork_worker(self, worker_id: str, spec: dict[str, Any]) -> None:
        """Ask for a worker that runs `main(spec)`; WorkerForked or ForkFailed follows.

        `spec`: plain values only (None, bool, int, float, str, bytes, tuple, list, dict). `spec["env"]`, if
        there, is a mapping of environment variables to set, or to remove where the value is None.

        Raises: ValueError for other values or more than 128 KiB; StartFailed if the zygote is gone.
        """
        self._request(("fork", worker_id, spec))

    def kill_worker(self, worker_id: str, signal_number: int, *, with_group: bool = False) -> None:
        """Send a signal to the worker; nothing happens if it has ended. For SIGKILL, WorkerExited follows.

        `with_group`: also to what it has started in its process group.
        """
        if self._control is not None:
            self._request(("kill", worker_id, int(signal_number), with_group))

    def preload(self, modules: tuple[str, ...]) -> None:
        """Import modules that the workers to come then share; Preloaded follows.

        They are tried in a child first: a module that starts threads (numpy, where its BLAS has several)
        must not get into the zygote, whose forks would copy the locks of those threads but not the threads.
        Forks wait for the import.
        """
        self._request(("preload", tuple(modules)))

    @property
    def is_asked(self) -> bool:
        """Whether a request waits for its answer."""
        return self._unanswered > 0 and self._control is not None

    def probe(self) -> None:
        """Ask what is answered by nothing but an acknowledgement."""
        if self._control is not None:
            self._request(("kill", "", 0, False))

    def end_stuck(self, reason: str) -> None:
        """Kill a zygote that does not answer; ZygoteDied with `reason` follows."""
        self._reason = reason
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)  # our child, not yet waited for: the pid is its own still

    def read_events(self) -> list[ZygoteEvent]:
        """What has happened since; does not block. After ZygoteDied, nothing more."""
        events: list[ZygoteEvent] = []
        while self._control is not None and len(events) < _EVENTS_MAX:
            try:
                packet, descriptors, _, _ = socket.recv_fds(
                    self._control, REQUEST_BYTES_MAX, 2, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                break
            except ConnectionResetError:
                # It ended before it read all our requests. Said once; then come its last words, and the end.
                continue
            if not packet:
                events.append(self._died())
                break
            event = self._event(marshal.loads(packet), descriptors)
            if event is not None:
                events.append(event)
        self._send_unsent()
        return events

    def close(self, timeout_s: float = _EXIT_WAIT_S) -> int | None:
        """End the zygote, and all workers with it (SIGKILL); returns its exit code once it is gone."""
        if self._control is None:
            return None
        self._control.close()  # it reads the end of the stream, kills its workers, and exits
        self._control = None
        return self._wait(timeout_s)

    def _request(self, request: tuple[Any, ...]) -> None:
        if self._control is None:
            raise StartFailed("no worker can be started: the process that forks workers has ended")
        packet = marshal.dumps(request)
        if len(packet) > REQUEST_BYTES_MAX:
            raise ValueError(
                f"a worker's spec must have at most {REQUEST_BYTES_MAX} bytes, this one has {len(packet)}; "
                "send what is large to the worker once it runs"
            )
        self._unsent.append(packet)
        self._unanswered += 1
        self._send_unsent()

    def _send_unsent(self) -> None:
        while self._unsent and self._control is not None:
            try:
                self._control.send(self._unsent[0])
            except BlockingIOError:
                return
            except OSError:
                return  # it has died, which read_events will find
            self._unsent.popleft()

    def _event(self, reply: tuple[Any, ...], descriptors: list[int]) -> ZygoteEvent | None:
        kind, *fields = reply
        self.heard += 1
        if kind in _ANSWERS:
            self._unanswered = max(0, self._unanswered - 1)
        if kind == "forked":
            worker_id, pid = fields
            return self._forked(worker_id, pid, descriptors)
        if kind == "exited":
            if fields[0] in self._abandoned:
                self._abandoned.remove(fields[0])
                return None
            return WorkerExited(*fields)
        if kind == "fork_failed":
            return ForkFailed(*fields)
        if kind == "preloaded":
            return Preloaded(*fields)
        if kind == "failed":
            self._reason = fields[0]
        return None  # "acknowledged"

    def _forked(self, worker_id: str, pid: int, descriptors: list[int]) -> ZygoteEvent:
        if len(descriptors) == 2:
            return WorkerForked(worker_id, pid, *descriptors)
        # The kernel drops descriptors that this process has no room for. Without its pipes a worker is of
        # no use.
        for descriptor in descriptors:
            os.close(descriptor)
        self._abandoned.add(worker_id)
        self._request(("kill", worker_id, int(signal.SIGKILL), False))
        return ForkFailed(worker_id, "the node has too many open files for the worker's output; raise `ulimit -n`")

    def _died(self) -> ZygoteDied:
        assert self._control is not None
        self._control.close()
        self._control = None
        self._unsent.clear()
        exit_code = self._wait(_EXIT_WAIT_S)
        return ZygoteDied(exit_code, self._reason or "the process that forks workers ended; see the node's log")

    def _wait(self, timeout_s: float) -> int | None:
        try:
            # Our child, not yet waited for: the pid is its own still.
            pidfd = open_pidfd(self.pid)
            try:
                if not has_exited(pidfd, timeout_s):
                    os.kill(self.pid, signal.SIGKILL)
            finally:
                os.close(pidfd)
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except (ChildProcessError, ProcessLookupError):
            return None  # somebody else in this process waited for it
