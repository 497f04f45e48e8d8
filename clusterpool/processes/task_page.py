"""What a worker is at, written where its node can read it even after a crash.

Results of tiny tasks gather in the worker before they are sent, and go with it when it is killed. Without this its
owner could not tell the task that ended the process from those before it, and would give up the wrong one. A store to a
shared page costs some 50 ns; a message for each task would cost a hundred times as much.

Four numbers: the task started last, its lowest bit set once it has ended (task numbers are even); of a chunk, the
index of the item that runs, how many items there are, and how many from that one on are run before the page is written
again: a store for each item would take half as long as the tiniest of them.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from pathlib import Path

from clusterpool.core.messages import LastTask

TASK, ITEM, ITEMS, STEP = range(4)
# Set in the number of a task that has ended.
ENDED = 1
_PAGE = struct.Struct("=QQQQ")


def task_page_path(processes_folder: str | Path, process_id: str) -> Path:
    """Where the page of a worker is: beside its socket."""
    return Path(processes_folder) / f"{process_id}.task"


def make_task_page(path: Path) -> memoryview:
    """The page as four numbers. It lasts as long as the process.

    Raises: OSError where the disk is full.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, _PAGE.size)
        # Else the first store to the page of a full file system would be a SIGBUS, in the middle of each task.
        os.posix_fallocate(fd, 0, _PAGE.size)
        return memoryview(mmap.mmap(fd, _PAGE.size)).cast("Q")
    finally:
        os.close(fd)


def read_task_page(path: Path) -> LastTask:
    """What a worker was at when it ended; the page is removed."""
    try:
        content = path.read_bytes()
    except OSError:
        return LastTask()  # it was gone before it had a page
    with contextlib.suppress(OSError):
        path.unlink()
    if len(content) != _PAGE.size:
        return LastTask()
    number, item, items, step = _PAGE.unpack(content)
    if number & ENDED:
        return LastTask(0, number - ENDED)
    return LastTask(number, number, item if items else -1, items, max(1, min(step, items - item)))
