"""The files of thin semaphores and cells: how they are named, and how those of a job or of a node are removed.

    /dev/shm/sem.clusterpool-<node id>-<job id>-<process id>-<n>    a POSIX semaphore
    /dev/shm/clusterpool-<node id>-<job id>-<...>.held, .signal, .moved    what is known of a semaphore
    <arena's folder>/clusterpool-<node id>-<job id>-...             a cell

Processes make them without telling anybody, so that they are found by their names alone, after kill -9 too.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from clusterpool.config import SHARED_MEMORY_FOLDER
from clusterpool.processes.named_segments import remove_recorded_segment

# The C library puts this before the names of semaphores.
_SEMAPHORE_PREFIX = "sem."


def semaphore_name(node_id: str, name: str) -> str:
    """What `sem_open` calls the thin semaphore."""
    return f"/clusterpool-{node_id}-{name}"


def semaphore_path(node_id: str, name: str) -> Path:
    """Where the thin semaphore lies."""
    return SHARED_MEMORY_FOLDER / f"{_SEMAPHORE_PREFIX}clusterpool-{node_id}-{name}"


def records_path(node_id: str, name: str) -> Path:
    """Where processes that belong to no cluster write down what they hold of a thin semaphore."""
    return SHARED_MEMORY_FOLDER / f"clusterpool-{node_id}-{name}.held"


def signal_path(node_id: str, name: str) -> Path:
    """What is there when a thin semaphore's tokens are nobody's."""
    return SHARED_MEMORY_FOLDER / f"clusterpool-{node_id}-{name}.signal"


def moved_path(node_id: str, name: str) -> Path:
    """What is there when a thin semaphore has moved to the control store."""
    return SHARED_MEMORY_FOLDER / f"clusterpool-{node_id}-{name}.moved"


def cell_path(arena_path: str | Path, node_id: str, name: str) -> Path:
    """The file of a thin cell: beside the arena, whose folder is known to take memory."""
    return Path(arena_path).parent / f"clusterpool-{node_id}-{name}"


def remove_thin_files(node_id: str, job_id: str = "", *, folders: Iterable[Path] = (SHARED_MEMORY_FOLDER,)) -> None:
    """Remove those of a job, or all, of one node. Who has them open can go on using them."""
    begin = f"clusterpool-{node_id}-" + (f"{job_id}-" if job_id else "")
    beginnings = (begin, _SEMAPHORE_PREFIX + begin)
    for folder in {SHARED_MEMORY_FOLDER, *folders}:
        try:
            names = os.listdir(folder)  # noqa: PTH208
        except OSError:
            continue
        for name in names:
            if name.startswith(beginnings):
                remove_recorded_segment(folder / name)
                with contextlib.suppress(OSError):
                    (folder / name).unlink()
