"""One node's shared memory: a sparse file that each process of the node maps for itself.

    file    | object | object |      free      | object |            holes (no memory yet)             |
            ^ offsets come from core/allocator.py       ^ reserved_bytes                               ^
            capacity

    writers:  one shared mapping of the whole file in each process
    readers:  one private (copy-on-write) mapping for each read, of that object's pages alone;
              kept for the next read if nothing was written to it (spare_mappings.py)

Each read has a mapping of its own, because two reads of one object in one process must not see each other's
writes, which pages that were copied on write in one common private mapping would show.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clusterpool.errors import NotConnected, StoreFull
from clusterpool.object_store.memory_copy import BLOCK_BYTES, MemoryCopier, as_bytes_view
from clusterpool.object_store.spare_mappings import SpareMappings

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
# The arena takes at most this part of what is free in /dev/shm: others need some, and a full tmpfs kills
# with SIGBUS.
SHM_FRACTION_MAX = 0.9
# A store below this is not worth having in memory: a file on disk, cached by the kernel, serves better.
# Docker gives containers 64 MB of /dev/shm.
SHM_BYTES_MIN = 256 << 20
# Pages are reserved in steps, so that small objects do not cost a system call each; a step too large would
# claim memory that nobody uses.
RESERVE_STEP_BYTES = 4 << 20
# One fallocate call is undone when a signal interrupts it, so that a long one might never end.
RESERVE_CALL_BYTES = 64 << 20
MAP_NORESERVE = 0x4000  # absent from `mmap` before Python 3.13


class Arena:
    """The arena as one process sees it; only the node that created it reserves and unlinks.

    Opened and mapped at first use, so that a process that touches no large object pays nothing, and usually
    after the fork of a worker. Any thread may use it.
    """

    def __init__(self, path: Path, capacity_bytes: int) -> None:
        self.path = path
        self.capacity_bytes = capacity_bytes
        self.reserved_bytes = 0  # of the creator: [0, reserved_bytes) has pages behind it
        self._fd = -1
        self._mapping: mmap.mmap | None = None
        self._view: memoryview | None = None
        self._copier: MemoryCopier | None = None
        self._spares = SpareMappings(_libc.munmap)
        self._opening = threading.Lock()  # held while one of the four above is made

    @classmethod
    def create(
        cls,
        name: str,
        capacity_bytes: int,
        *,
        shared_memory: Path = SHARED_MEMORY,
        fallback_folder: Path | None = None,
    ) -> Arena:
        """Make the file of a node's arena, mode 0600; its `capacity_bytes` may be smaller than wished.

        Raises:
            StoreFull: neither shared memory nor the fallback folder has room for a store.
        """
        folder, capacity_bytes = _choose_folder(capacity_bytes, shared_memory, fallback_folder)
        arena = cls(folder / name, capacity_bytes)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        arena._fd = os.open(arena.path, flags, 0o600)
        os.ftruncate(arena._fd, capacity_bytes)
        return arena

    @classmethod
    def attach(cls, path: str | Path, capacity_bytes: int) -> Arena:
        """The arena that another process created; nothing is opened before the first use."""
        return cls(Path(path), capacity_bytes)

    # --- writing -------------------------------------------------------------------------------------------

    def reserve(self, offset: int, size_bytes: int) -> None:
        """Make sure that pages exist behind a range, before anybody writes to it; cheap where they do.

        A write to a hole of a full tmpfs kills the writer with SIGBUS; here it is an error. The node calls
        this for each grant, in the order of the grants: ranges grow from the start of the file.

        Raises:
            OSError: the file system is full; `reserved_bytes` says how far the arena can be used.
        """
        end = offset + size_bytes
        self._check_range(offset, size_bytes)
        while self.reserved_bytes < end:
            ahead = min(
                -(-end // RESERVE_STEP_BYTES) * RESERVE_STEP_BYTES,
                self.reserved_bytes + RESERVE_CALL_BYTES,
                self.capacity_bytes,
            )
            try:
                os.posix_fallocate(self._open(), self.reserved_bytes, ahead - self.reserved_bytes)
            except OSError as error:
                if error.errno != errno.ENOSPC or ahead <= end:
                    raise
                ahead = end  # the last pages of the file system
                os.posix_fallocate(self._open(), self.reserved_bytes, ahead - self.reserved_bytes)
            self.reserved_bytes = ahead

    def write_view(self, offset: int, size_bytes: int) -> memoryview:
        """The bytes themselves, shared with all processes: for the creator of an object until it seals it."""
        self._check_range(offset, size_bytes)
        return self._shared_view()[offset : offset + size_bytes]

    def write(self, offset: int, source: Any) -> None:
        """Copy any contiguous buffer to `offset`, as fast as the machine can."""
        view = as_bytes_view(source)
        self._check_range(offset, view.nbytes)
        self._get_copier().copy(offset, view)

    # --- reading -------------------------------------------------------------------------------------------

    def read_anchor(self, offset: int, size_bytes: int, on_release: Callable[[], None]) -> Any:
        """The object's bytes as a writable buffer whose changes nobody else sees.

        Returns an object for `memoryview(anchor).cast("B")`; what is built on that view (numpy arrays,
        slices) keeps the anchor alive. When the last of them goes, what was written is dropped and `on_release`
        is called, by whichever thread dropped it, perhaps within a garbage collection: it must not block.
        Not called at the end of the process, nor in a forked child.
        """
        self._check_range(offset, size_bytes)
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        length = max(offset + size_bytes - start, 1)
        address = self._spares.take(start, length) or _map_private(self._open(), start, length)
        if address is None:
            # The kernel allows 65,530 mappings a process: beyond that many live objects, copies.
            anchor = (ctypes.c_ubyte * size_bytes).from_buffer(self.read_copy(offset, size_bytes))
            on_release()
            return anchor
        anchor = (ctypes.c_ubyte * size_bytes).from_address(address + offset - start)
        mapped = (start, length, address)
        finalizer = weakref.finalize(anchor, _released, self._spares, mapped, on_release, os.getpid())
        finalizer.atexit = False
        return anchor

    def read_copy(self, offset: int, size_bytes: int) -> bytearray:
        """The object's bytes in memory of this process alone; the pin may go at once."""
        return bytearray(self.write_view(offset, size_bytes))

    # --- the end -------------------------------------------------------------------------------------------

    def forget_spares(self) -> None:
        """Keep no mapping for later reads any more: the node is gone, or we are about to leave it."""
        self._spares.close()

    def close(self) -> None:
        """Let go of the file and of the mapping, once no write is going on; views and anchors stay valid."""
        self.forget_spares()
        self._copier = None
        if self._view is not None:
            with contextlib.suppress(BufferError):
                self._view.release()
            self._view = None
        if self._mapping is not None:
            with contextlib.suppress(BufferError):  # a view lives on: the mapping goes with it
                self._mapping.close()
            self._mapping = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def unlink(self) -> None:
        """Remove the file; its memory goes when the last process has let go of it."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    # --- helpers -------------------------------------------------------------------------------------------

    def _check_range(self, offset: int, size_bytes: int) -> None:
        if offset < 0 or size_bytes < 0 or offset + size_bytes > self.capacity_bytes:
            raise ValueError(f"outside of the arena of {self.capacity_bytes} bytes: {offset=}, {size_bytes=}")

    def _open(self) -> int:
        if self._fd < 0:
            with self._opening:
                if self._fd < 0:
                    self._fd = _open_existing(self.path)
        return self._fd

    def _shared_view(self) -> memoryview:
        if self._view is None:
            fd = self._open()
            with self._opening:
                if self._view is None:
                    self._mapping = mmap.mmap(fd, self.capacity_bytes)
                    self._view = memoryview(self._mapping)
        return self._view

    def _get_copier(self) -> MemoryCopier:
        if self._copier is None:
            view = self._shared_view()
            with self._opening:
                if self._copier is None:
                    self._copier = MemoryCopier(view)
        return self._copier


def _open_existing(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotConnected(
            f"the object store of this node is gone ({path}): the node ended; start a new cluster"
        ) from error


def _choose_folder(wish_bytes: int, shared_memory: Path, fallback: Path | None) -> tuple[Path, int]:
    free_bytes = _free_bytes(shared_memory)
    allowed_bytes = int(free_bytes * SHM_FRACTION_MAX) // BLOCK_BYTES * BLOCK_BYTES
    if wish_bytes <= allowed_bytes:
        return shared_memory, wish_bytes
    if allowed_bytes >= SHM_BYTES_MIN:
        is_worth_telling = wish_bytes - allowed_bytes > wish_bytes // 50  # of the default, a bit was taken meanwhile
        logger.log(
            logging.WARNING if is_worth_telling else logging.DEBUG,
            "the object store got %.0f MB instead of %.0f MB: %s has %.0f MB free; objects beyond that go to disk",
            allowed_bytes / 1e6,
            wish_bytes / 1e6,
            shared_memory,
            free_bytes / 1e6,
        )
        return shared_memory, allowed_bytes
    folder = fallback if fallback is not None else Path(tempfile.gettempdir())
    # Half of the disk at the most: spilled objects and the user's own files go there, too.
    on_disk_bytes = min(wish_bytes, _free_bytes(folder) // 2 // BLOCK_BYTES * BLOCK_BYTES)
    if on_disk_bytes <= 0 and allowed_bytes <= 0:
        raise StoreFull(
            f"no room for an object store: {shared_memory} has {free_bytes / 1e6:.0f} MB free and {folder} "
            f"{_free_bytes(folder) / 1e6:.0f} MB; make room in one of them"
        )
    if on_disk_bytes <= allowed_bytes:
        return shared_memory, allowed_bytes
    logger.warning(
        "the object store is a file in %s, which is slower: %s has %.0f MB free, %.0f MB are wanted; "
        "in a container, give it more shared memory (docker run --shm-size)",
        folder,
        shared_memory,
        free_bytes / 1e6,
        wish_bytes / 1e6,
    )
    return folder, on_disk_bytes


def _free_bytes(folder: Path) -> int:
    try:
        status = os.statvfs(folder)
    except FileNotFoundError:
        return 0
    return status.f_bavail * status.f_frsize


def _load_libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


# Through libc, as an `mmap.mmap` keeps a duplicate of the file descriptor, of which a process has 1,024 by
# default.
_libc = _load_libc()
_MAP_FAILED = ctypes.c_void_p(-1).value


def _map_private(fd: int, start: int, length: int) -> int | None:
    # Not MAP_POPULATE: on a writable private mapping it would copy every page.
    address: int = _libc.mmap(
        None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | MAP_NORESERVE, fd, start
    )
    if address != _MAP_FAILED:
        return address
    number = ctypes.get_errno()
    if number == errno.ENOMEM:
        return None
    raise OSError(number, f"cannot map {length} bytes of the object store: {os.strerror(number)}")


def _released(spares: SpareMappings, mapped: tuple[int, int, int], on_release: Callable[[], None], pid: int) -> None:
    spares.give(*mapped)
    # In a forked child the pin is the parent's, which still reads.
    if os.getpid() == pid:
        on_release()
