"""What the tests of launch and sweep share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from clusterpool.config import SessionPaths
from clusterpool.ids import new_session_id
from clusterpool.processes.launch import NodeProcess


@pytest.fixture
def session() -> SessionPaths:
    """The paths of one that is not there yet."""
    return SessionPaths.in_base(new_session_id())


@pytest.fixture
def launched() -> Iterator[list[NodeProcess]]:
    """What is put in here ends with the test."""
    processes: list[NodeProcess] = []
    yield processes
    for process in processes:
        process.terminate()
