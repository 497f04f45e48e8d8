"""Objects on disk: one file each, complete or absent, and checked when it comes back."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep

import xxhash

from clusterpool.errors import ObjectLost, StoreFull

# A file: the bytes, then their checksum. A disk that returns other bytes than it was given is rare, and a
# wrong result is worse than a lost object, which can be made again; the checksum takes a tenth of the time
# of the write.
CHECKSUM_BYTES = 8
# So much stays free on the disk, which others need as well.
FREE_BYTES_MIN = 128 << 20
PIECE_BYTES = 8 << 20  # what one system call writes or reads
UNFINISHED_SUFFIX = ".unfinished"
# The reader's own trouble, which says nothing of the file: tried again for so long before it is an error.
_READERS_TROUBLE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
PATIENCE_S = 2.0
_REST_S = 0.05
# "~": the name of a rebuilt object ends with the number of its making.
OBJECT_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.~-]{0,199}")


class SpillFolder:
    """The folder that one node spills to. Calls block for as long as the disk takes: not for the node's own
    thread.

    Several threads may use it, each for another object. A folder of an earlier, dead node is swept elsewhere.
    """

    def __init__(self, path: str | Path, *, bytes_max: int | None = None, free_bytes_min: int = FREE_BYTES_MIN) -> None:
        self.path = Path(path)
        self.bytes_max = bytes_max
        self.free_bytes_min = free_bytes_min
        self.used_bytes = 0
        self._size_by_id: dict[str, int] = {}
        self._lock = threading.Lock()

    def write(self, object_id: str, source: memoryview) -> None:
        """Put the object's bytes on disk; when this returns, they can be read back.

        Raises:
            StoreFull: the disk, or the part of it that we may use, has no room for it; nothing was written.
        """
        size = source.nbytes + CHECKSUM_BYTES
        path = self._path_of(object_id)
        self._claim(object_id, size)
        unfinished = path.with_name(path.name + UNFINISHED_SUFFIX)
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                _write_all(fd, source)
                _write_all(fd, memoryview(_checksum(source)))
            finally:
                os.close(fd)
            unfinished.replace(path)
        except OSError as error:
            self._unclaim(object_id)
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise StoreFull(self._failure_text(object_id, size, error)) from error

    def read(self, object_id: str, target: memoryview) -> None:
        """Fill `target`, which has the object's size, from disk.

        Raises:
            ObjectLost: the file is gone, has another size, or holds other bytes than were written.
            OSError: this process, or the machine, has no file descriptors or memory left; the file may be whole.
        """
        path = self._path_of(object_id)
        with _opened(path, object_id) as fd:
            size = os.fstat(fd).st_size
            if size != target.nbytes + CHECKSUM_BYTES:
                raise ObjectLost(
                    f"object {object_id}: its spilled file {path} has {size} bytes instead of "
                    f"{target.nbytes + CHECKSUM_BYTES}; "
                    "something else wrote to the folder, or the disk is damaged"
                )
            checksum = bytearray(CHECKSUM_BYTES)
            try:
                _read_all(fd, target)
                _read_all(fd, memoryview(checksum))
            except OSError as error:
                raise ObjectLost(f"object {object_id}: its spilled file {path} is damaged: {error}") from error
        if bytes(checksum) != _checksum(target):
            raise ObjectLost(
                f"object {object_id}: its spilled file {path} holds other bytes than were written; "
                "check the disk, or spill to another folder"
            )

    def delete(self, object_id: str) -> None:
        """Forget the object; no error if it is not here.

        Raises: OSError when its file cannot be removed; it is forgotten all the same.
        """
        path = self._path_of(object_id)
        self._unclaim(object_id)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()

    def clear(self) -> None:
        """Remove every file, and the folder if nobody else put anything there."""
        with self._lock:
            object_ids = list(self._size_by_id)
        for object_id in object_ids:
            self.delete(object_id)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def _claim(self, object_id: str, size: int) -> None:
        # Two writes at once must not both take the last room.
        with self._lock:
            assert object_id not in self._size_by_id, f"{object_id} is spilled twice"
            free_bytes = _free_bytes(self.path) - self.free_bytes_min
            if self.bytes_max is not None and self.used_bytes + size > self.bytes_max:
                raise StoreFull(
                    f"{_mb(size)} MB for object {object_id} would exceed the limit on spilled objects in "
                    f"{self.path}: {_mb(self.used_bytes)} of {_mb(self.bytes_max)} MB are used"
                )
            if size > free_bytes:
                raise StoreFull(
                    f"the disk of {self.path} has {_mb(max(free_bytes, 0))} MB left for spilled objects "
                    f"({_mb(self.free_bytes_min)} MB stay free), object {object_id} needs {_mb(size)} MB"
                )
            self._size_by_id[object_id] = size
            self.used_bytes += size

    def _unclaim(self, object_id: str) -> None:
        with self._lock:
            self.used_bytes -= self._size_by_id.pop(object_id, 0)

    def _path_of(self, object_id: str) -> Path:
        # Names come from other processes: none may lead out of the folder.
        if OBJECT_ID.fullmatch(object_id) is None or object_id.endswith(UNFINISHED_SUFFIX):
            raise ValueError(f"not the name of an object: {object_id!r}")
        return self.path / object_id

    def _failure_text(self, object_id: str, size: int, error: OSError) -> str:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk of {self.path} became full while object {object_id} of {_mb(size)} MB was written"
        return f"object {object_id} of {_mb(size)} MB could not be written to {self.path}: {error}"


@contextlib.contextmanager
def _opened(path: Path, object_id: str) -> Iterator[int]:
    ends_s = monotonic() + PATIENCE_S
    while True:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            break
        except OSError as error:
            if error.errno not in _READERS_TROUBLE:
                raise ObjectLost(f"object {object_id}: its spilled file cannot be opened: {error}") from error
            if monotonic() >= ends_s:
                raise
        sleep(_REST_S)
    try:
        yield fd
    finally:
        os.close(fd)


def _write_all(fd: int, source: memoryview) -> None:
    position = 0
    while position < source.nbytes:
        position += os.write(fd, source[position : position + PIECE_BYTES])


def _read_all(fd: int, target: memoryview) -> None:
    position = 0
    while position < target.nbytes:
        count = os.readv(fd, [target[position : position + PIECE_BYTES]])
        if count == 0:
            raise OSError(errno.EIO, "the file ended early")
        position += count


def _checksum(view: memoryview) -> bytes:
    return xxhash.xxh3_64_digest(view)


def _free_bytes(path: Path) -> int:
    # The folder is made at the first write; its nearest parent that exists is on the same disk.
    while not path.exists() and path != path.parent:
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f}"
