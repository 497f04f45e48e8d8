"""Shared memory of one host, by name, that goes when its job ends.

`SharedMemory` and `ShareableList` are the standard library's, without its resource tracker: a process that only
attaches never removes a segment that somebody else has made, and what a job made and did not unlink its node removes.
Source: https://docs.python.org/3/library/multiprocessing.shared_memory.html, https://bugs.python.org/issue38119
"""

from __future__ import annotations

import _posixshmem  # type: ignore[import-not-found]
import contextlib
import errno
import mmap
import os
import re
import types
from collections.abc import Callable
from multiprocessing import shared_memory as _standard
from pathlib import Path
from typing import Any

from clusterpool.client import api, current, host_bound
from clusterpool.processes.named_segments import record_segment

__all__ = ["ShareableList", "SharedMemory"]

_USE_POSIX = True
_SHM_NAME_PREFIX = "/clusterpool-"
_NODE_IN_NAME = re.compile(r"/?clusterpool-(n[0-9a-f]+)-")


def _make_filename() -> str:
    return f"/{_name_of_job()}"


def _name_of_job() -> str:
    """A name of what goes with this job."""
    coordination = api.runtime().coordination
    return f"clusterpool-{coordination.node_id}-{coordination.new_name()}"


class SharedMemory(_standard.SharedMemory):
    """A segment, made or attached to; `track=False` (as of Python 3.13): it outlives the job that makes it.

    Raises: FileNotFoundError where the segment is not; it says where it is, if it has a name of ours or was pickled.
    """

    _flags: int
    _mode: int
    _name: str | None
    _size: int

    def __init__(self, name: str | None = None, create: bool = False, size: int = 0, *, track: bool = True) -> None:
        if not size >= 0:
            raise ValueError("'size' must be a positive integer")
        if create:
            self._flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
            if size == 0:
                raise ValueError("'size' must be a positive number different from zero")
        if name is None and not self._flags & os.O_EXCL:
            raise ValueError("'name' can only be None if create=True")
        self._track = False  # by the resource tracker
        self._record: Path | None = None
        self._fd = self._open_new(track) if name is None else self._open(f"/{name}")
        try:
            if create and size:
                os.ftruncate(self._fd, size)
            status = os.fstat(self._fd)
            self._mmap = mmap.mmap(self._fd, status.st_size)
            if create and track:
                self._set_record(status.st_ino)
        except OSError:
            if create:
                self.unlink()
            raise
        self._size = status.st_size
        self._buf = memoryview(self._mmap)

    def _open_new(self, track: bool) -> int:
        while True:
            name = _make_filename() if track else f"/psm_{os.urandom(8).hex()}"
            with contextlib.suppress(FileExistsError):
                return self._open(name)

    def _open(self, name: str) -> int:
        if not self._flags & os.O_CREAT:
            _check_is_here(name)
        try:
            fd: int = _posixshmem.shm_open(name, self._flags, mode=self._mode)
        except FileNotFoundError:
            raise _not_found(name, None) from None
        self._name = name
        return fd

    def _set_record(self, inode: int) -> None:
        assert self._name is not None
        if not _NODE_IN_NAME.match(self._name):
            self._record = record_segment(_name_of_job(), self._name.lstrip("/"), inode)

    def unlink(self) -> None:
        """Remove the segment; those who have it open can go on using it."""
        if self._name:
            _posixshmem.shm_unlink(self._name)
        if self._record is not None:
            self._record.unlink(missing_ok=True)
            self._record = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _bound_to_here(self.__class__, self.name)


def _with_our_segments(function: Any) -> Callable[..., None]:
    """The same function, for which the global name `SharedMemory` means ours."""
    namespace = {**vars(_standard), "SharedMemory": SharedMemory}
    ours = types.FunctionType(function.__code__, namespace, function.__name__, function.__defaults__)
    ours.__kwdefaults__ = function.__kwdefaults__
    return ours


class ShareableList(_standard.ShareableList[Any]):
    """A list of fixed length in a segment."""

    # The standard class makes its segment within its constructor, by that name.
    __init__ = _with_our_segments(_standard.ShareableList.__init__)

    def __reduce__(self) -> tuple[Any, ...]:
        return _bound_to_here(self.__class__, self.shm.name)


def _bound_to_here(kind: Any, name: str) -> tuple[Any, ...]:
    home = _here()
    if home:
        host_bound.keep_child_on(home)
    return _attach, (kind, name, home)


def _attach(kind: Any, name: str, home: str) -> Any:
    here = _here()
    if home and here and home != here:
        raise _not_found(name, home)
    return kind(name=name)


def _here() -> str:
    """The node of this process, if it belongs to one: attaching needs no cluster."""
    runtime = current.get_if_any()
    return runtime.client.address.node_id if runtime is not None else ""


def _check_is_here(name: str) -> None:
    # Nodes that share a host for a test would find it. They must not: nodes of two hosts will not.
    found = _NODE_IN_NAME.match(name)
    here = _here()
    if found is not None and here and found[1] != here:
        raise _not_found(name, found[1])


def _not_found(name: str, home: str | None) -> FileNotFoundError:
    found = _NODE_IN_NAME.match(name)
    home = home or (found[1] if found is not None else None)
    here = _here()
    text = os.strerror(errno.ENOENT)
    if home is not None and here and home != here:
        text = (
            f"the shared memory is on node {home}, and this is node {here}: only processes of one host share it; "
            f"send the bytes, or put() them, or run the task on {home}"
        )
    return FileNotFoundError(errno.ENOENT, text, name)
