"""Which shared-memory segments a job has made under names of the user's choosing, so that they go with the job.

    /dev/shm/clusterpool-<node id>-<job id>-<process id>-<n> -> <inode>/<name>      a link that leads nowhere

The record lies where the job's other files do, and is found as they are: by its name. The inode tells the segment from
another that was made under the same name since.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from clusterpool.config import SHARED_MEMORY_FOLDER


def record_segment(record_name: str, segment_name: str, inode: int) -> Path:
    """Note that the segment belongs to the job that `record_name` names; the record."""
    record = SHARED_MEMORY_FOLDER / record_name
    record.symlink_to(f"{inode}/{segment_name}")
    return record


def remove_recorded_segment(record: Path) -> None:
    """Remove the segment if `record` is a record and the segment is still the one that was meant; not the record."""
    try:
        inode, _, segment_name = os.readlink(record).partition("/")  # noqa: PTH115 (its target is no path)
    except OSError:  # no link: some other file
        return
    if not segment_name or "/" in segment_name:
        return
    with contextlib.suppress(OSError, ValueError):
        segment = SHARED_MEMORY_FOLDER / segment_name
        if segment.lstat().st_ino == int(inode):
            segment.unlink()
