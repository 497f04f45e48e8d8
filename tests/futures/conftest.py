"""The executor on a group of threads, for the tests of its logic."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_group import FakeWorkerGroup, wait_until

from clusterpool.calls import engine
from clusterpool.futures import pool_state


@pytest.fixture
def fake(monkeypatch):
    """Executors made in the test get a `FakeWorkerGroup`; the value lists these, oldest first."""
    groups: list[FakeWorkerGroup] = []
    monkeypatch.setattr(FakeWorkerGroup, "opened", groups)
    monkeypatch.setattr(
        engine, "open_group", lambda size, address=None, **options: FakeWorkerGroup(size or 3, **options)
    )
    monkeypatch.setattr(engine, "wait_until", wait_until)
    monkeypatch.setattr(engine, "chunk_kind", lambda *, is_star: 2 if is_star else 1)
    # At the end of the test run there is no cluster on which to await what these tests left.
    monkeypatch.setattr(pool_state, "_live", weakref.WeakSet())
    yield groups
    for group in groups:
        group.terminate()
