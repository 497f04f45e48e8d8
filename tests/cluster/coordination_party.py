"""Processes of several nodes that use the same semaphores, and a look into the control store."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clusterpool
from clusterpool.client import api
from clusterpool.processes.thin_files import semaphore_name
from tests.cluster import clusters
from tests.cluster.clusters import Cluster

UNBOUNDED = 2**31 - 1
LIMIT_S = 20


def coordination() -> Any:
    return api.runtime().coordination


def new_thin(value: int) -> tuple[str, str]:
    """A thin semaphore of this process; its name and its home."""
    from _multiprocessing import SemLock  # type: ignore[import-not-found]

    here = coordination()
    name = here.new_name()
    SemLock(1, value, UNBOUNDED, semaphore_name(here.node_id, name), False)
    return name, here.node_id


def take_thin(name: str, home: str) -> bool:
    from _multiprocessing import SemLock

    return bool(SemLock._rebuild(0, 1, UNBOUNDED, semaphore_name(home, name)).acquire(False))


class Party:
    """A process on another node; an actor, so that it is the same one from call to call."""

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(coordination(), method)(*arguments)

    def acquire_and_die(self, name: str) -> None:
        coordination().acquire(name, None)
        os.kill(os.getpid(), signal.SIGKILL)

    def pair_s(self, name: str, count: int) -> float:
        """The quickest of so many pairs."""
        best_s = 1e9
        for _ in range(count):
            started_s = time.perf_counter()
            coordination().acquire(name, None)
            coordination().release(name, UNBOUNDED)
            best_s = min(best_s, time.perf_counter() - started_s)
        return best_s

    def make(self, value: int) -> tuple[str, str]:
        return new_thin(value)


def party(node_id: str) -> Any:
    # 0 CPUs: what waits in one must not keep another from running.
    return clusterpool.remote(Party).options(scheduling=f"node:{node_id}", num_cpus=0).remote()


def do(actor: Any, method: str, *arguments: Any) -> Any:
    return clusterpool.get(actor.call.remote(method, *arguments), timeout=LIMIT_S)


@contextlib.contextmanager
def store_of(cluster: Cluster) -> Iterator[Any]:
    """The control store, to look into."""
    from clusterpool.control_store.coordination import CoordinationStore

    config = json.loads(next(cluster.session_folder.glob("n-*/node.json")).read_text())
    password = Path(config["control_store_password_file"]).read_text().strip()
    store = CoordinationStore.connect(config["control_store_url"], cluster_id=config["cluster_id"], password=password)
    try:
        yield store
    finally:
        store.close()


def wait_for_waiters(store: Any, name: str, count: int) -> None:
    key = f"{store.keys.prefix}waiters:{name}"
    clusters.wait_for(lambda: store._run("LLEN", key) == count, what=f"{count} wait")
