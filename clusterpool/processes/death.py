"""Whether a process is still the one we mean, how to learn that it ended, and how to kill it and no other.

A pid alone names nothing for long: the kernel gives it out again. A pid with its start time does, and so
does a pidfd.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import select
import signal
from dataclasses import dataclass
from pathlib import Path

from clusterpool.config import write_private_file

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
# The same numbers on every architecture. Some builds of Python (made with old kernel headers) lack the
# functions.
_SYS_PIDFD_SEND_SIGNAL = 424
_SYS_PIDFD_OPEN = 434


@dataclass(frozen=True)
class ProcessIdentity:
    """One process, never to be mistaken for a later one with its pid.

    `pid_namespace`: of whoever wrote this down. In another container the same number is another process.
    """

    pid: int
    start_ticks: int
    pid_namespace: int

    def __str__(self) -> str:
        return f"{self.pid} {self.start_ticks} {self.pid_namespace}"

    @classmethod
    def parse(cls, text: str) -> ProcessIdentity:
        """Raises: ValueError for a text that `str` did not make."""
        pid, start_ticks, pid_namespace = (int(word) for word in text.split())
        return cls(pid, start_ticks, pid_namespace)


def process_identity(pid: int) -> ProcessIdentity | None:
    """None if no such process lives; one that ended and was not waited for is dead as well."""
    try:
        line = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # The name, in brackets, may itself hold spaces and brackets.
    state, *numbers = line[line.rindex(b")") + 2 :].split()
    if state in (b"Z", b"X"):
        return None
    return ProcessIdentity(pid, int(numbers[18]), _own_pid_namespace())


def is_same_process(identity: ProcessIdentity) -> bool:
    """Whether it lives. True also where we cannot see it (another PID namespace): never touch what may be
    alive.
    """
    if identity.pid_namespace != _own_pid_namespace():
        return True
    return process_identity(identity.pid) == identity


def open_pidfd(pid: int) -> int:
    """A descriptor that becomes readable when the process ends; the caller closes it.

    Raises: ProcessLookupError if there is no such process, OSError (ENOSYS) before Linux 5.3.
    """
    if hasattr(os, "pidfd_open"):
        return os.pidfd_open(pid)
    descriptor: int = _libc().syscall(_SYS_PIDFD_OPEN, pid, 0)
    if descriptor < 0:
        raise _os_error()
    return descriptor


def open_pidfd_of(identity: ProcessIdentity) -> int | None:
    """As `open_pidfd`, of exactly this process; None if it is dead."""
    try:
        descriptor = open_pidfd(identity.pid)
    except ProcessLookupError:
        return None
    # The descriptor was opened first, so what it names is what is compared.
    if process_identity(identity.pid) == identity:
        return descriptor
    os.close(descriptor)
    return None


def has_exited(pidfd: int, timeout_s: float = 0) -> bool:
    """Whether the process ends within `timeout_s`."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def send_signal(pidfd: int, signal_number: int) -> bool:
    """False if the process is gone."""
    try:
        if hasattr(signal, "pidfd_send_signal"):
            signal.pidfd_send_signal(pidfd, signal_number)
        elif _libc().syscall(_SYS_PIDFD_SEND_SIGNAL, pidfd, signal_number, None, 0) < 0:
            raise _os_error()
    except ProcessLookupError:
        return False
    return True


def kill_process(identity: ProcessIdentity, signal_number: int = signal.SIGKILL, *, timeout_s: float = 0) -> bool:
    """Signal exactly this process, and wait up to `timeout_s` for its end. False if it was dead or is not
    to be seen.
    """
    if identity.pid_namespace != _own_pid_namespace():
        return False
    try:
        descriptor = open_pidfd_of(identity)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        # An old kernel: between this check and the signal the pid could change hands, in theory.
        if process_identity(identity.pid) != identity:
            return False
        os.kill(identity.pid, signal_number)
        return True
    if descriptor is None:
        return False
    try:
        was_sent = send_signal(descriptor, signal_number)
        if was_sent and timeout_s > 0:
            has_exited(descriptor, timeout_s)
        return was_sent
    finally:
        os.close(descriptor)


def record_process(pid_file: Path, pid: int) -> ProcessIdentity | None:
    """Write down who `pid` is, for the sweep after a crash. None, and no file, if it has ended."""
    identity = process_identity(pid)
    if identity is not None:
        write_private_file(pid_file, f"{identity}\n")
    return identity


def read_process(pid_file: Path) -> ProcessIdentity | None:
    """What `record_process` wrote; None if there is nothing to be read."""
    try:
        return ProcessIdentity.parse(pid_file.read_text())
    except (OSError, ValueError):
        return None


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that forked it ends; end now if it already has.

    `parent_pid`: read by the parent before it forked, to notice that it died before this took effect.
    """
    if _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise _os_error()
    if os.getppid() != parent_pid:
        os._exit(1)


def set_process_name(name: str) -> None:
    """What `ps` and `top` show, at most 15 bytes of it."""
    _libc().prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()), 0, 0, 0)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _os_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _own_pid_namespace() -> int:
    # Not cached: a process can be forked into another namespace.
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0
