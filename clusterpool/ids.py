"""Names of nodes, processes, jobs and objects: short, random, printable."""

from __future__ import annotations

import os


def new_node_id() -> str:
    """`n` and 10 hexadecimal digits."""
    return "n" + os.urandom(5).hex()


def new_process_id(kind: str) -> str:
    """`kind` (`w` for a worker, `d` for a driver) and 12 hexadecimal digits."""
    return kind + os.urandom(6).hex()


def new_job_id() -> str:
    """`j` and 10 hexadecimal digits."""
    return "j" + os.urandom(5).hex()


def new_session_id() -> str:
    """8 hexadecimal digits: socket paths must stay under 108 bytes."""
    return os.urandom(4).hex()
