"""The backend on a group of threads, for the tests of its logic."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "futures"))

from fake_group import FakeWorkerGroup, wait_until


@pytest.fixture
def fake(monkeypatch):
    """Parallel calls run on `FakeWorkerGroup`s, of a cluster with 4 CPUs; gives these, oldest first."""
    from clusterpool.calls import engine
    from clusterpool.joblib import backend
    from clusterpool.joblib.warm_groups import WarmGroups

    groups: list[FakeWorkerGroup] = []
    monkeypatch.setattr(FakeWorkerGroup, "opened", groups)
    monkeypatch.setattr(
        engine,
        "open_exit_safe_group",
        lambda size, **options: FakeWorkerGroup(size, on_worker_died=lambda *_: None, **options),
    )
    monkeypatch.setattr(engine, "connect", lambda address: "client")
    monkeypatch.setattr(engine, "cluster_cpus", lambda address: 4)
    monkeypatch.setattr(engine, "wait_until", wait_until)
    monkeypatch.setattr(backend, "_warm_groups", WarmGroups())
    yield groups
    for group in groups:
        group.terminate()
