"""Which task a worker runs, written where its node can read it even after a crash.

Results of tiny tasks gather in the worker before they are sent, and go with it when it is killed. Without this its
owner could not tell the task that ended the process from those before it, and would give up the wrong one. A store to a
shared page costs some 50 ns; a message for each task would cost a hundred times as much.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

_NUMBER_BYTES = 8
# What `read_task_page` says when the worker was gone before it had a page.
UNKNOWN = -1


def task_page_path(processes_folder: str | Path, process_id: str) -> Path:
    """Where the page of a worker is: beside its socket."""
    return Path(processes_folder) / f"{process_id}.task"


def make_task_page(path: Path) -> memoryview:
    """The page as one number: the worker's task, 0 for none. It lasts as long as the process."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, _NUMBER_BYTES)
        return memoryview(mmap.mmap(fd, _NUMBER_BYTES)).cast("Q")
    finally:
        os.close(fd)


def read_task_page(path: Path) -> int:
    """The task that a worker ran when it ended; the page is removed."""
    try:
        content = path.read_bytes()
    except OSError:
        return UNKNOWN
    with contextlib.suppress(OSError):
        path.unlink()
    return int.from_bytes(content, "little") if len(content) == _NUMBER_BYTES else UNKNOWN
