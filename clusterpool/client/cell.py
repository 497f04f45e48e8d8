"""Bytes that processes share: one mapping on each host, kept the same between hosts by the lock that guards them.

    file   | content (size_bytes) | padding to 8 | version, 8 bytes |    clusterpool-<node id>-<name>, beside the arena

At home the file is the cell, and nothing is ever copied. Once a process on another node has unpickled it, the control
store holds its newest bytes: whoever acquires the guard first brings the file of its host up to date, and whoever
releases it stores what has changed (Semaphore calls `refresh` and `publish`). The version in the file says what its
bytes are, to all processes of the host.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clusterpool.client import api, current, host_bound
from clusterpool.errors import ObjectLost
from clusterpool.processes.thin_files import cell_path

if TYPE_CHECKING:
    from clusterpool.client.coordination import Coordination
    from clusterpool.client.runtime import Runtime
    from clusterpool.client.semaphore import Semaphore

_VERSION_BYTES = 8
# A cell that is unpickled twice is one mapping.
_known: weakref.WeakValueDictionary[str, Cell] = weakref.WeakValueDictionary()


class Cell:
    """`size_bytes` of shared memory, zero at first; pickles at any time.

    Without a guard it cannot leave its node. Views of `create_memoryview` keep the mapping, not the file: keep the
    cell as long as they are to be shared.
    Raises: ValueError, OverflowError for sizes that cannot be; OSError when there is no room.
    """

    _coordination: Coordination | None
    _finalizer: weakref.finalize[..., Cell] | None

    def __init__(self, size_bytes: int) -> None:
        if size_bytes < 0:
            raise ValueError(f"Size {size_bytes:n} out of range")
        if size_bytes > _SIZE_BYTES_MAX:
            raise OverflowError(f"Size {size_bytes:n} too large")
        runtime = api.runtime()
        coordination = runtime.coordination
        self._set(coordination.new_name(), coordination.node_id, size_bytes, _arena_path(runtime))
        path = self._path(self.home)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Pages now: a write to a hole of a full tmpfs would kill the writer with SIGBUS.
            os.posix_fallocate(fd, 0, _file_bytes(size_bytes))
            self._map(fd)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(fd)
        self._finalizer = weakref.finalize(self, _remove, path, os.getpid())
        self._coordination = coordination
        _known[self.name] = self

    def _set(self, name: str, home: str, size_bytes: int, arena_path: str) -> None:
        self.name = name
        self.home = home
        self.size_bytes = size_bytes
        self.guard: Semaphore | None = None
        self._coordination = None
        self._arena_path = arena_path
        self._finalizer = None
        self._is_moved = False
        self._before: bytes | None = None  # what it held when its guard was acquired

    def _path(self, node_id: str) -> Path:
        return cell_path(self._arena_path, node_id, self.name)

    def _map(self, fd: int) -> None:
        anchor = _map_shared(fd, _file_bytes(self.size_bytes))
        view = memoryview(anchor).cast("B")
        self._view = view[: self.size_bytes]
        self._version = view[-_VERSION_BYTES:].cast("Q")

    def create_memoryview(self) -> memoryview:
        """The bytes, writable (named as in `multiprocessing.heap`)."""
        return self._view

    def guard_by(self, semaphore: Semaphore) -> None:
        """Say which lock guards the bytes; with one they can be used on every node."""
        self.guard = semaphore
        semaphore.guard(self)

    # --- called by the guard, while this process holds it

    def refresh(self) -> None:
        """The guard was acquired: make the bytes the newest that any node has stored."""
        if not self._looks_moved():
            return
        assert self._coordination is not None
        found = self._coordination.read_cell(self.name, self._version[0])
        if found is not None:
            version, content = found
            self._view[:] = content[: self.size_bytes]
            self._version[0] = version
        self._before = bytes(self._view)

    def publish(self, token: int = 0, *, is_thin: bool = False) -> None:
        """The guard is about to be released: store the bytes if they have changed.

        Also if it is not known what they were, since it moved while the guard was held. `token`, `is_thin`: as in
        `Coordination.write_cell`.
        Raises: LockLost when the guard was taken from this process: the bytes of its last holder stay.
        """
        before, self._before = self._before, None
        if not self._looks_moved():
            return
        content = bytes(self._view)
        if content != before:
            assert self._coordination is not None
            guard = self.guard
            assert guard is not None, "only its guard has it published"
            self._version[0] = self._coordination.write_cell(self.name, content, guard.name, token, is_thin=is_thin)

    def _looks_moved(self) -> bool:
        if not self._is_moved and self._coordination is not None:
            self._is_moved = self._coordination.is_moved(self.name)
        return self._is_moved

    # --- passing it on

    def __reduce__(self) -> tuple[Any, ...]:
        # From here on others may use it when this process no longer does: it lives as long as its job.
        if self._finalizer is not None:
            self._finalizer.detach()
        if self.guard is None:
            host_bound.keep_child_on(self.home)
        return _unpickled, (self.name, self.home, self.size_bytes, self._arena_path, self.guard)

    def _open_at_home(self) -> bool:
        try:
            fd = os.open(self._path(self.home), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            self._map(fd)
        finally:
            os.close(fd)
        return True

    def _adopt(self, coordination: Coordination) -> None:
        """On another node than its home: have it moved, and map this host's file of it, made if need be."""
        coordination.adopt("cell", self.name, self.home)
        self._is_moved = True
        path = self._path(coordination.node_id)
        if not path.exists():
            self._make_copy(path, coordination)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._map(fd)
        finally:
            os.close(fd)

    def _make_copy(self, path: Path, coordination: Coordination) -> None:
        version, content = coordination.read_cell(self.name, 0) or (0, b"")
        content = content[: self.size_bytes]
        size_bytes = _file_bytes(self.size_bytes)
        # It appears whole, and at once: afterwards only those who hold the guard write to it, and this process does
        # not hold it.
        part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size_bytes)
            os.pwrite(fd, content, 0)
            os.pwrite(fd, struct.pack("Q", version), size_bytes - _VERSION_BYTES)
            with contextlib.suppress(FileExistsError):  # another process of this node was faster
                os.link(part, path)
        finally:
            os.close(fd)
            part.unlink()


def _unpickled(name: str, home: str, size_bytes: int, arena_path: str, guard: Semaphore | None) -> Cell:
    """The cell of that name, in this host's memory.

    Raises: TypeError on another node than its home when no lock guards it; ObjectLost when its job or home has ended.
    """
    known = _known.get(name)
    if known is not None:
        return known
    made = Cell.__new__(Cell)
    made._set(name, home, size_bytes, arena_path)
    # A child that the standard library started on the host of a cluster belongs to none, and need not.
    if current.get_if_any() is not None or not made._open_at_home():
        runtime = api.runtime()
        made._arena_path = _arena_path(runtime)
        made._coordination = coordination = runtime.coordination
        if coordination.node_id == home:
            if made._open_at_home():
                pass
            elif coordination.is_moved(name):  # and then this node was taken for dead
                made._adopt(coordination)
            else:
                raise ObjectLost(f"the shared memory {name} is gone: the job that made it has ended")
        elif guard is None:
            raise TypeError(
                f"shared memory without a lock cannot leave its host: it was made on node {home}, and this is node "
                f"{coordination.node_id}; use Value() or Array() with a lock, or a task that runs on {home}"
            )
        else:
            made._adopt(coordination)
    if guard is not None:
        made.guard_by(guard)
        if guard._is_mine():
            # Else its release would store what this host had long before as the newest.
            made.refresh()
            made._before = None  # an object of ours that has gone may have changed them since
    return _known.setdefault(name, made)


def _arena_path(runtime: Runtime) -> str:
    registered = runtime.client.registered
    assert registered is not None, "the client has not joined its node"
    return registered.arena_path


def _remove(path: Path, pid: int) -> None:
    if os.getpid() == pid:
        path.unlink(missing_ok=True)  # its job may have ended before


# --- mapping --------------------------------------------------------------------------------------------------------

_SIZE_BYTES_MAX = (1 << 62) - 1
_MAP_FAILED = ctypes.c_void_p(-1).value


def _load_libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    ]  # fmt: skip
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


_libc = _load_libc()


def _file_bytes(size_bytes: int) -> int:
    return -(-size_bytes // _VERSION_BYTES) * _VERSION_BYTES + _VERSION_BYTES


def _map_shared(fd: int, length: int) -> Any:
    """The file as a buffer, which is unmapped with the last view of it."""
    # Through libc: an `mmap.mmap` keeps a descriptor, of which a process has 1,024 by default, and a program may have
    # thousands of Values.
    address = _libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    if address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot map {length} bytes of shared memory: {os.strerror(number)}")
    anchor = (ctypes.c_ubyte * length).from_address(address)
    # Not at the end of the process, where others may still look at it.
    weakref.finalize(anchor, _libc.munmap, address, length).atexit = False
    return anchor


def _forget_in_child() -> None:
    for cell in list(_known.values()):
        cell._coordination = None  # the parent's client; what is at home is shared all the same


os.register_at_fork(after_in_child=_forget_in_child)
