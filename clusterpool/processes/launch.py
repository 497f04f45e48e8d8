"""Start a node process, and hand over to it what it needs: its config, its locks, and a pipe to say that it
is ready.

    driver or command                                  node process
    launch_node(config) --argv: node.json, 3 descriptors--> receive_start(sys.argv)
    wait_ready() <------------- one line of JSON ---------- NodeStart.report_ready() or .report_failure(text)

The node is told by a file rather than through a pipe: writing it takes 0.1 ms, and the sweep after a crash
reads it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusterpool.config import NodeConfig, NodePaths, write_private_file
from clusterpool.errors import StartFailed
from clusterpool.processes.death import record_process
from clusterpool.processes.session_folder import NodeFolderLock, make_node_folder
from clusterpool.processes.sweep import SESSION_VARIABLE, sweep_stale_sessions

NODE_MODULE = "clusterpool.node.__main__"
_LOG_TAIL_BYTES = 4096
_READY_LINE_BYTES_MAX = 1 << 20

# Not `-m`: that would put the working folder first on the path, where a user's `queue.py` would hide the
# standard one (`-P` needs Python 3.11), and runpy costs 10 ms. Not `-S`, `-E` or `-I`: they lose the
# virtual environment or PYTHONPATH. Our own folder goes last on the path, so that a checkout that is not
# installed works too.
_BOOTSTRAP = "import sys; sys.path[:1] = []; sys.path.append({parent!r}); from {module} import main; sys.exit(main())"


def launch_node(config: NodeConfig, *, node_module: str = NODE_MODULE) -> NodeProcess:
    """Start a node, detached from the terminal; it runs `main()` of `node_module`, which calls
    `receive_start`.

    Returns before the node is ready. On any failure nothing stays behind.

    Raises: StartFailed, PermissionError, ValueError, as `make_node_folder` does; StartFailed if Python
    cannot start.
    """
    lock = make_node_folder(config)
    ready_read, ready_write = os.pipe()  # both close on exec; the child gets its end through pass_fds
    try:
        write_private_file(lock.paths.config_file, config.to_json())
        if config.driver_pid is not None:
            record_process(lock.paths.pid_file("driver"), config.driver_pid)
        process = _spawn(lock, ready_write, node_module)
    except BaseException as error:
        os.close(ready_read)
        lock.remove(config.spill_path)
        if isinstance(error, OSError):
            raise StartFailed(f"node {config.node_id} could not be started: {error}") from error
        raise
    finally:
        os.close(ready_write)
    # From here on the locks are the node's alone, so that they end with it and not with us.
    lock.close()
    with contextlib.suppress(FileNotFoundError):  # it may have failed, and removed its folder, already
        record_process(lock.paths.pid_file("node"), process.pid)
    return NodeProcess(config, process, ready_read)


class NodeProcess:
    """A node that this process started: to be waited for, and ended."""

    def __init__(self, config: NodeConfig, process: subprocess.Popen[bytes], ready_fd: int) -> None:
        self.config = config
        self.paths: NodePaths = config.paths
        self.pid = process.pid
        self._process = process
        self._ready_fd = ready_fd
        self._launcher_pid = os.getpid()

    def fileno(self) -> int:
        """Readable once the node is ready or has failed; -1 after `wait_ready`."""
        return self._ready_fd

    def wait_ready(self, timeout_s: float = 30.0) -> dict[str, Any]:
        """What the node passed to `report_ready`.

        Raises: StartFailed, with the end of the node's log, if it failed, ended, or is not ready in time;
        it is killed.
        """
        try:
            line = self._read_ready_line(timeout_s)
        except BaseException:  # Ctrl-C too: nobody else would end it
            self._give_up()
            raise
        message: dict[str, Any] = json.loads(line) if line else {}
        if "ready" in message:
            self._close_ready_fd()
            ready: dict[str, Any] = message["ready"]
            return ready
        # Asked before it is killed, but after it had the time to end by itself.
        status = self.wait(0.5) if line == b"" else None
        log = log_tail(self.paths.node_log)
        self._give_up()
        if "failed" in message:
            reason = f"it said: {message['failed']}"
        elif line is None:
            reason = f"it was not ready after {timeout_s:g} s"
        else:
            reason = f"it ended before it was ready ({describe_exit(status)})"
        raise StartFailed(
            f"node {self.config.node_id} did not start: {reason}\nThe end of its log:\n{log or '(empty)'}"
        )

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it lives."""
        return self._process.poll()

    def wait(self, timeout_s: float | None = None) -> int | None:
        """The exit code once it has ended; None if it has not within `timeout_s`."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def terminate(self, timeout_s: float = 5.0) -> int | None:
        """Ask it to end (SIGTERM), and kill it if it has not after `timeout_s`. Does nothing in a fork of
        the launcher.
        """
        if os.getpid() != self._launcher_pid:
            return None
        if self.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            if self.wait(timeout_s) is None:
                return self.kill()
        return self.poll()

    def kill(self) -> int | None:
        """End it at once. Does nothing in a fork of the launcher: a child's exit must not end its parent's
        node.
        """
        if os.getpid() != self._launcher_pid:
            return None
        self._process.kill()
        return self.wait(5.0)

    def detach(self) -> None:
        """Leave it running when this process ends, and say nothing about it."""
        self._close_ready_fd()
        # Popen warns when it is dropped while its process runs, which here is what was asked for.
        self._process.returncode = 0

    def _read_ready_line(self, timeout_s: float) -> bytes | None:
        """The line; b"" if the node ended without one; None if it took too long."""
        deadline_s = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._ready_fd, select.POLLIN)
        received = b""
        while not received.endswith(b"\n"):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not poll.poll(left_s * 1000):
                return None
            part = os.read(self._ready_fd, 65536)
            if not part or len(received) > _READY_LINE_BYTES_MAX:
                return b""
            received += part
        return received

    def _give_up(self) -> None:
        self._close_ready_fd()
        self.kill()
        # Killed, it could not remove its files; the sweep does, and also knows what it started.
        with contextlib.suppress(OSError):
            sweep_stale_sessions([self.paths.session.folder.parent])

    def _close_ready_fd(self) -> None:
        if self._ready_fd >= 0:
            os.close(self._ready_fd)
            self._ready_fd = -1


@dataclass
class NodeStart:
    """What a node process was started with. Its `lock` must stay open, in this process only, as long as the
    node lives.
    """

    config: NodeConfig
    lock: NodeFolderLock
    _ready_fd: int = -1

    def report_ready(self, **facts: Any) -> None:
        """Tell the launcher, with facts (JSON) such as the port; does nothing if the launcher has gone."""
        self._report({"ready": facts})

    def report_failure(self, text: str) -> None:
        """The launcher raises StartFailed with this text."""
        self._report({"failed": text})

    def remove_files(self) -> None:
        """At the node's orderly end, as its last act: remove all that it wrote, and let go of the locks."""
        self.lock.remove(self.config.spill_path)

    def _report(self, message: dict[str, Any]) -> None:
        if self._ready_fd < 0:
            return
        with contextlib.suppress(BrokenPipeError), os.fdopen(self._ready_fd, "wb") as pipe:
            pipe.write(json.dumps(message).encode() + b"\n")
        self._ready_fd = -1


def receive_start(argv: list[str]) -> NodeStart:
    """In the node process: take over what `launch_node` passed; `argv` as in sys.argv."""
    config_file, *numbers = argv[1:]
    ready_fd, session_fd, node_fd = (int(number) for number in numbers)
    for descriptor in (ready_fd, session_fd, node_fd):
        os.set_inheritable(descriptor, False)  # a control store that kept them would keep the node alive
    config = NodeConfig.from_json(Path(config_file).read_text())
    return NodeStart(config, NodeFolderLock(config.paths, session_fd, node_fd), ready_fd)


def log_tail(log_file: Path, bytes_max: int = _LOG_TAIL_BYTES) -> str:
    """The last lines of a log; empty if there is none."""
    try:
        with log_file.open("rb") as file:
            size_bytes = file.seek(0, os.SEEK_END)
            file.seek(max(0, size_bytes - bytes_max))
            tail = file.read()
    except OSError:
        return ""
    if size_bytes > bytes_max:
        tail = tail.partition(b"\n")[2]
    return tail.decode(errors="replace").rstrip()


def describe_exit(exit_code: int | None) -> str:
    """In words: `exit code 1`, `killed by signal 9 (SIGKILL)`."""
    if exit_code is None:
        return "exit code unknown"
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = "unknown"
    return f"killed by signal {-exit_code} ({name})"


def _spawn(lock: NodeFolderLock, ready_fd: int, node_module: str) -> subprocess.Popen[bytes]:
    descriptors = (ready_fd, *lock.descriptors)
    parent = str(Path(__file__).parents[2])
    command = [
        sys.executable,
        "-c",
        _BOOTSTRAP.format(parent=parent, module=node_module),
        str(lock.paths.config_file),
        *map(str, descriptors),
    ]
    environment = {**os.environ, SESSION_VARIABLE: lock.paths.session.session_id}
    log_fd = os.open(lock.paths.node_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        # close_fds rules out posix_spawn, but CPython then uses vfork, which is as quick; and it keeps what
        # the user's program made inheritable (pipes of its shell, sockets) out of a node that may outlive
        # it by days.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            env=environment,
            pass_fds=descriptors,
            start_new_session=True,
        )
    finally:
        os.close(log_fd)
