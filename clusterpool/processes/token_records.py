"""What processes that nobody can ask hold of a thin semaphore: a small file beside it, that the node reads.

    file   | registrations | unused | slot | slot | ...        each slot | pid | start | busy | held | given | unused |

Forks of a process, and children that the standard library started, have no connection to a node. Each takes a slot
before it uses the semaphore for the first time; the slot of a process that has ended is taken again by another. Only
its own process writes to a slot, `busy` first and last, so that who reads (`given`, `held`, then `busy`) never takes
half a change for a whole one.

That a semaphore's tokens are signals, which are nobody's, or that it has moved, is said by an empty file beside it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path
from typing import NamedTuple

from clusterpool.processes.death import process_identity
from clusterpool.processes.thin_files import moved_path, records_path, signal_path

PID, START, BUSY, HELD, GIVEN, _UNUSED = range(6)
_SLOT_WORDS = 6
_HEADER_WORDS = 2
# Grown by so much; a page has 85 slots.
_GROWTH_BYTES = 4096
_WORD_BYTES = 8


class Record(NamedTuple):
    """One living process. `is_busy`: it is just taking or giving a token."""

    pid: int
    start_ticks: int
    held: int
    given: int
    is_busy: bool


def register(node_id: str, name: str) -> memoryview:
    """Take a slot for this process: 6 numbers (PID to GIVEN). Its mapping stays for as long as the view."""
    fd = os.open(records_path(node_id, name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        size_bytes = os.fstat(fd).st_size
        index = _free_slot(fd, size_bytes)
        end_bytes = (_HEADER_WORDS + (index + 1) * _SLOT_WORDS) * _WORD_BYTES
        if end_bytes > size_bytes:
            # Pages now: a write to a hole of a full tmpfs would kill the writer.
            size_bytes += _GROWTH_BYTES
            os.posix_fallocate(fd, 0, size_bytes)
        words = memoryview(mmap.mmap(fd, size_bytes)).cast("q")
        identity = process_identity(os.getpid())
        assert identity is not None, "this process lives"
        begin = _HEADER_WORDS + index * _SLOT_WORDS
        slot = words[begin : begin + _SLOT_WORDS]
        slot[BUSY] = 1
        slot[PID], slot[START], slot[HELD], slot[GIVEN] = identity.pid, identity.start_ticks, 0, 0
        words[0] += 1
        slot[BUSY] = 0
        return slot
    finally:
        os.close(fd)


def read_records(node_id: str, name: str) -> tuple[int, list[Record]]:
    """How many processes have ever registered, and those of them that live."""
    try:
        fd = os.open(records_path(node_id, name), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0, []
    try:
        size_bytes = os.fstat(fd).st_size
        if not size_bytes:
            return 0, []
        words = memoryview(mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ)).cast("q")
    finally:
        os.close(fd)
    registrations = words[0]
    records = []
    for begin in range(_HEADER_WORDS, len(words) - _SLOT_WORDS + 1, _SLOT_WORDS):
        slot = words[begin : begin + _SLOT_WORDS]
        pid, start_ticks = slot[PID], slot[START]
        if not pid:
            break
        given, held, is_busy = slot[GIVEN], slot[HELD], bool(slot[BUSY])
        if _is_alive(pid, start_ticks):
            records.append(Record(pid, start_ticks, held, given, is_busy))
    return registrations, records


def mark_as_signal(node_id: str, name: str) -> None:
    """Say that the tokens of this semaphore belong to nobody, for ever."""
    _touch(signal_path(node_id, name))


def mark_as_moved(node_id: str, name: str) -> None:
    """Say that this semaphore is in the control store, for those who have no node to ask."""
    _touch(moved_path(node_id, name))


def has_moved(node_id: str, name: str) -> bool:
    """Whether somebody has said so."""
    return moved_path(node_id, name).exists()


def is_signal(node_id: str, name: str) -> bool:
    """Whether somebody has said so."""
    return signal_path(node_id, name).exists()


def remove_records(node_id: str, name: str) -> None:
    """Remove all of these files that are there."""
    for path in (records_path(node_id, name), signal_path(node_id, name), moved_path(node_id, name)):
        path.unlink(missing_ok=True)


def _touch(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _free_slot(fd: int, size_bytes: int) -> int:
    index = 0
    while True:
        begin_bytes = (_HEADER_WORDS + index * _SLOT_WORDS) * _WORD_BYTES
        if begin_bytes + _SLOT_WORDS * _WORD_BYTES > size_bytes:
            return index
        slot = memoryview(os.pread(fd, _SLOT_WORDS * _WORD_BYTES, begin_bytes)).cast("q")
        if not slot[PID] or not _is_alive(slot[PID], slot[START]):
            return index
        index += 1


def _is_alive(pid: int, start_ticks: int) -> bool:
    identity = process_identity(pid)
    return identity is not None and identity.start_ticks == start_ticks
