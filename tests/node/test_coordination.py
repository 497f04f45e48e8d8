"""The node's calls to a control store that is away for a while."""

from __future__ import annotations

import queue
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest

from clusterpool.core import coordination_events as e
from clusterpool.errors import NotConnected
from clusterpool.node import coordination
from clusterpool.node.coordination import _StoreCalls

PATIENCE_S = 0.3


class FakeStore:
    """Away until `is_there`; what was asked of it with numbers, in `made`."""

    server_run = "1"

    def __init__(self) -> None:
        self.is_there = threading.Event()
        self.made: list[tuple[Any, ...]] = []

    def _made(self, *arguments: Any) -> int:
        if not self.is_there.is_set():
            raise NotConnected("away")
        self.made.append(arguments)
        return 1

    value = end_process = _made

    def serve(self, node_id: str) -> None: ...

    def close(self) -> None: ...

    def read_grants(self, after_id: str, *, block_ms: int = 0) -> list[Any]:
        time.sleep(0.01)
        return []


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def answers() -> queue.SimpleQueue[Any]:
    return queue.SimpleQueue()


@pytest.fixture
def calls(store: FakeStore, answers: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[_StoreCalls]:
    monkeypatch.setattr(coordination, "PATIENCE_S", PATIENCE_S)
    monkeypatch.setattr(coordination, "_RETRY_S", 0.02)
    shell: Any = types.SimpleNamespace(
        node_id="na",
        config=types.SimpleNamespace(is_embedded=True),
        store=types.SimpleNamespace(start=lambda: None, connect_another=lambda _kind: store),
        post=answers.put,
    )
    made = _StoreCalls(shell)
    yield made
    made.stop()


def test_what_a_dead_process_held_is_given_back_when_the_store_returns(
    calls: _StoreCalls, store: FakeStore, answers: Any
) -> None:
    calls.put(e.CallCoordination(0, "end_process", ("na/w1/",)))
    calls.put(e.CallCoordination(1, "value", ("name",)))
    # Whoever waits for the answer to a call behind it is told all the same.
    failed = answers.get(timeout=30)
    assert (failed.tag, failed.kind) == (1, "NotConnected")
    store.is_there.set()
    calls.put(e.CallCoordination(2, "value", ("name",)))
    assert answers.get(timeout=30) == e.OperationAnswered(2, 1)
    assert store.made == [(1, "na/w1/"), ("name",)]


def test_calls_do_not_wait_for_one_another_to_fail(calls: _StoreCalls, answers: Any) -> None:
    begin_s = time.monotonic()
    for tag in range(1, 11):
        calls.put(e.CallCoordination(tag, "value", ("name",)))
    assert sorted(answers.get(timeout=30).tag for _ in range(10)) == list(range(1, 11))
    assert time.monotonic() - begin_s < 9 * PATIENCE_S  # one after another they would take ten
