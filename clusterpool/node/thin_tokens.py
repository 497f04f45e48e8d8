"""The tokens of this host's thin semaphores, for the census (core/census.py) and for moving them."""

from __future__ import annotations

import logging
from typing import Any

from clusterpool.core import coordination_events as e
from clusterpool.processes.thin_files import semaphore_name
from clusterpool.processes.token_records import is_signal, read_records

logger = logging.getLogger(__name__)

_SEMAPHORE_KIND = 1  # of _multiprocessing.SemLock: not recursive


def open_semaphore(node_id: str, name: str) -> Any:
    """A thin semaphore.

    Raises: FileNotFoundError when there is none of this name.
    """
    import _multiprocessing  # type: ignore[import-not-found]

    sem_lock = _multiprocessing.SemLock
    return sem_lock._rebuild(0, _SEMAPHORE_KIND, sem_lock.SEM_VALUE_MAX, semaphore_name(node_id, name))


def drain_semaphore(node_id: str, name: str) -> int:
    """Take all tokens of a thin semaphore; how many there were.

    Raises: FileNotFoundError when there is none of this name.
    """
    semaphore = open_semaphore(node_id, name)
    count = 0
    while semaphore.acquire(False):
        count += 1
    return count


def read_tokens(node_id: str, name: str) -> e.ThinTokensRead | e.ThinTokensMissing:
    """Look at a thin semaphore: its free tokens, and what processes have written down that cannot be asked."""
    try:
        semaphore = open_semaphore(node_id, name)
    except (OSError, ValueError):
        return e.ThinTokensMissing(name)
    registrations, found = read_records(node_id, name)
    records = tuple(
        e.ThinRecord(f"{record.pid} {record.start_ticks}", record.held, record.given, record.is_busy)
        for record in found
    )
    return e.ThinTokensRead(name, semaphore._get_value(), is_signal(node_id, name), registrations, records)


def return_tokens(node_id: str, name: str, count: int) -> None:
    """Give tokens to a thin semaphore, which dead processes held."""
    logger.info("semaphore %s: %d tokens came free: the processes that held them have died", name, count)
    semaphore = open_semaphore(node_id, name)
    for _ in range(count):
        semaphore.release()
