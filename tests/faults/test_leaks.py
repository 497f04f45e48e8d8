"""What a program starts and ends again and again leaves nothing: not in it, nor in its node, nor on disk."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import clusterpool
from clusterpool.client import current
from tests.client.engine import MIB, check_nothing_left, wait_for

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture
def cluster_of_one(fresh: None) -> None:
    clusterpool.init(num_cpus=2, object_store_bytes=128 * MIB)
    assert wait_for(lambda: "valkey.sock" in session_files(), 20)  # the control store starts a little later


def session_files() -> list[str]:
    folder = Path(current.get().client._node_socket).parent
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def counts() -> dict[str, Any]:
    """Of everything that may be forgotten, in the driver, its node and its folder."""
    gc.collect()
    client = current.get().client

    def look(machine: Any) -> dict[str, int]:
        objects, actors = machine.objects, machine.actors
        tables = {
            "tasks": machine.tasks, "sets": machine.sets, "functions": machine.functions.payloads,
            "set_by_process": machine._set_by_process, "owned": objects.table.owned,
            "borrowed": objects.table.borrowed, "lifetimes": objects.lifetimes, "streams": objects.streams,
            "asked": objects._asked, "channels": actors.channels, "channel_of_process": actors.channel_of_process,
        }  # fmt: skip
        return {name: len(table) for name, table in tables.items()}

    node = clusterpool.nodes()[0]
    connections = client._connections
    return {
        **client.ask_machine(look),
        "connections": len(connections.by_process),
        "sockets": len(connections.by_fd),
        "replies": len(client._replies),
        "set_sinks": len(client.deliveries.set_sinks),
        "watchers": len(client.deliveries.watchers),
        "store_bytes": node["store_used_bytes"] + node["spilled_bytes"],
        "workers": node["workers"],
        "descriptors": psutil.Process().num_fds(),
        "threads": psutil.Process().num_threads(),
        "node_descriptors": psutil.Process(node["pid"]).num_fds(),
        "node_threads": psutil.Process(node["pid"]).num_threads(),
        "files": session_files(),
    }


def check_level(repeat: Callable[[int], None], few: int, many: int) -> None:
    """After many rounds no count stays above what it was after a few.

    Below is right: threads that earlier tests of this process had ended may take until now to go.
    """
    repeat(few)
    seen: list[dict[str, Any]] = []

    def is_settled() -> bool:
        seen.append(counts())
        return len(seen) > 1 and seen[-1] == seen[-2]

    # An idle lease, for example, goes back after a moment.
    time.sleep(0.5)
    assert wait_for(is_settled)
    before = seen[-1]
    repeat(many)
    wait_for(lambda: not grown(before, counts()))
    assert not grown(before, counts())


def grown(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What there is more of than before, as (before, now); files count by name."""
    pairs = {name: (before[name], now[name]) for name in now}
    return {
        name: (old, new)
        for name, (old, new) in pairs.items()
        if (not set(new) <= set(old) if isinstance(new, list) else new > old)
    }


def test_tasks_with_large_arguments_and_results(cluster_of_one: None) -> None:
    @clusterpool.remote
    def add(array: Any) -> Any:
        return array + 1

    def repeat(rounds: int) -> None:
        for _ in range(rounds):
            refs = [add.remote(np.full(300_000, number, np.uint8)) for number in range(20)]
            assert [int(array[0]) for array in clusterpool.get(refs, timeout=30)] == list(range(1, 21))

    check_level(repeat, 5, 100)
    check_nothing_left()


def test_pools_that_are_opened_and_closed(cluster_of_one: None) -> None:
    def repeat(rounds: int) -> None:
        for _ in range(rounds):
            with clusterpool.Pool(2, initializer=abs, initargs=(1,)) as pool:
                assert pool.map(abs, [-1, -2]) == [1, 2]

    check_level(repeat, 5, 100)


def test_actors_that_are_made_and_dropped(cluster_of_one: None) -> None:
    class Counter:
        def size(self, data: bytes) -> int:
            return len(data)

    actor_class = clusterpool.remote(num_cpus=0)(Counter)

    def repeat(rounds: int) -> None:
        for _ in range(rounds):
            actors = [actor_class.remote() for _ in range(10)]
            sizes = clusterpool.get([actor.size.remote(b"x" * 200_000) for actor in actors], timeout=30)
            assert sizes == [200_000] * 10

    check_level(repeat, 2, 20)
    check_nothing_left()


def test_processes_that_are_killed(cluster_of_one: None) -> None:
    """A killed worker removes nothing itself."""

    def die() -> None:
        os.kill(os.getpid(), 9)

    task = clusterpool.remote(retries=0)(die)

    def repeat(rounds: int) -> None:
        for _ in range(rounds):
            with pytest.raises(clusterpool.errors.WorkerDied):
                clusterpool.get(task.remote(), timeout=30)

    check_level(repeat, 2, 30)
