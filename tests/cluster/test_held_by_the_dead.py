"""What a killed process of a lock's home had taken before the lock moved to the control store."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import clusterpool
from clusterpool.multiprocessing import BoundedSemaphore, Lock, Process, Semaphore
from tests.cluster import clusters
from tests.cluster.clusters import Cluster

pytestmark = pytest.mark.cluster
LIMIT_S = 30


def take(lock: Any, ready: Path, count: int) -> None:
    for _ in range(count):
        lock.acquire()
    ready.touch()
    time.sleep(100)


@pytest.mark.parametrize("maker", [Lock, lambda: BoundedSemaphore(2), lambda: Semaphore(2)])
def test_a_killed_process_of_the_home_gives_back_what_it_held_before_the_move(
    three_nodes: Cluster, driver: None, maker: Any, tmp_path: Path
) -> None:
    lock = maker()
    count = lock._semlock.total
    holder = Process(target=take, args=(lock, tmp_path / "ready", count))
    holder.start()
    clusters.wait_for((tmp_path / "ready").exists, within_s=20, what="all is held")
    there = clusterpool.remote(num_cpus=0, scheduling=f"node:{three_nodes.second}")
    is_held = not clusterpool.get(there(lambda: lock.acquire(timeout=1)).remote(), timeout=LIMIT_S)
    waiting = there(lambda: [lock.acquire(timeout=15) for _ in range(count)]).remote()
    assert is_held
    holder.kill()
    assert clusterpool.get(waiting, timeout=LIMIT_S) == [True] * count
