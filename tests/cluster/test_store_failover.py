"""A cluster whose control store is a Sentinel set: its master is killed, and comes back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import clusterpool
from clusterpool import errors
from clusterpool.control_store.server import ServerProcess, find_server_binary
from clusterpool.control_store.store import ControlStore
from clusterpool.errors import NotConnected
from clusterpool.multiprocessing import Queue
from tests.cluster import clusters
from tests.cluster.clusters import Counting, clusterpool_command, numbered_node_of_task
from tests.cluster.coordination_party import coordination, do, new_thin, party

pytestmark = pytest.mark.cluster

LIMIT_S = 40.0
PASSWORD = "secret"


@dataclass
class SentinelSet:
    """A master, a replica, and a sentinel that takes the replica when the master has been gone for 0.3 s."""

    master: ServerProcess
    replica: ServerProcess
    url: str
    folder: Path

    def log(self) -> str:
        return (self.folder / "sentinel.log").read_text()

    def wait_for_log(self, text: str) -> None:
        clusters.wait_for(lambda: text in self.log(), within_s=LIMIT_S, what=f"the sentinel says {text!r}")


def port_of(server: ServerProcess) -> int:
    return int(server.url.removesuffix("/0").rpartition(":")[2])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def sentinel_set(tmp_path: Path) -> Iterator[SentinelSet]:
    with ExitStack() as stack:
        options: dict[str, Any] = {"host": "127.0.0.1", "password": PASSWORD, "appendonly": True}
        master = ServerProcess.start(tmp_path / "m", **options)
        stack.callback(master.stop)
        replica = ServerProcess.start(tmp_path / "r", replica_of=("127.0.0.1", port_of(master)), **options)
        stack.callback(replica.stop)
        master.wait_ready()
        replica.wait_ready()
        port = free_port()
        (tmp_path / "sentinel.conf").write_text(
            f'port {port}\nbind 127.0.0.1\ndir "{tmp_path}"\n'
            f"sentinel monitor main 127.0.0.1 {port_of(master)} 1\nsentinel auth-pass main {PASSWORD}\n"
            "sentinel down-after-milliseconds main 300\nsentinel failover-timeout main 3000\n"
        )
        with (tmp_path / "sentinel.log").open("wb") as log:
            command = [str(find_server_binary()), str(tmp_path / "sentinel.conf"), "--sentinel"]
            process = subprocess.Popen(command, stdout=log, stderr=log)
        stack.callback(process.wait)
        stack.callback(process.kill)
        found = SentinelSet(master, replica, f"redis+sentinel://127.0.0.1:{port}/main", tmp_path)
        found.wait_for_log(f"+slave slave 127.0.0.1:{port_of(replica)}")
        with closing(ControlStore.connect(found.url, password=PASSWORD, timeout_s=20)) as store:
            clusters.wait_for(lambda: store._online_replicas() == 1, within_s=LIMIT_S, what="the replica is there")
        yield found


@pytest.fixture
def node_ids(sentinel_set: SentinelSet, tmp_path: Path, run_of_tests: Any) -> Iterator[list[str]]:
    """A cluster of three nodes on it: head, second, third."""
    (tmp_path / "password").write_text(PASSWORD)
    file = tmp_path / "cluster.yaml"
    file.write_text(
        f"control_store: {{url: '{sentinel_set.url}', password_file: password}}\n"
        "head: {num_cpus: 2}\nnodes: [{num_cpus: 2, labels: {name: second}}, {num_cpus: 1}]\n"
    )
    done = clusterpool_command("up", str(file), "--json")
    assert done.returncode == 0, done.stderr
    nodes = json.loads(done.stdout)["nodes"]
    yield [node["node_id"] for node in sorted(nodes, key=lambda node: not node["is_head"])]
    done = clusterpool_command("down")
    assert done.returncode == 0, done.stdout + done.stderr


def put_numbers(queue: Any, count: int) -> None:
    for number in range(count):
        queue.put(number)
        time.sleep(0.02)


@pytest.mark.timeout(150)
def test_a_failover_loses_nothing_and_nobody_and_an_old_master_does_no_harm(
    sentinel_set: SentinelSet, node_ids: list[str]
) -> None:
    head, second, third = node_ids
    assert clusterpool.init()["node_id"] == head
    try:
        there = clusterpool.remote(num_cpus=0, scheduling=f"node:{third}")(Counting)
        other = party(third)
        lock, home = new_thin(1)
        do(other, "adopt", "lock", lock, home, 1)
        assert do(other, "acquire", lock, None) > 0
        queue: Any = Queue()
        putting = clusterpool.remote(num_cpus=0, scheduling=f"node:{second}")(put_numbers).remote(queue, 200)
        got = [queue.get(timeout=LIMIT_S)]
        # Acknowledged immediately before the master dies: the replica must have it.
        actors = [there.options(name="first").remote()]
        assert clusterpool.get(actors[0].add.remote(), timeout=LIMIT_S)[0] == 1
        os.kill(sentinel_set.master.pid, signal.SIGKILL)
        with clusterpool.Pool(5) as pool:
            results = pool.map(numbered_node_of_task, range(100), chunksize=1)
        assert [number for number, _ in results] == list(range(100))
        sentinel_set.wait_for_log("+switch-master main")
        with pytest.raises(errors.NameTaken):
            there.options(name="first").remote()
        actors.append(there.options(name="second").remote())
        assert clusterpool.get(actors[1].add.remote(), timeout=LIMIT_S)[0] == 1
        got += [queue.get(timeout=LIMIT_S) for _ in range(199)]
        assert got == list(range(200))
        clusterpool.get(putting, timeout=LIMIT_S)
        assert coordination().acquire(lock, 0.2) == 0, "the lock is held"
        # The old master comes back as the master that it was; the sentinel makes it a replica.
        sentinel_set.master.start_again()
        sentinel_set.wait_for_log(f"+convert-to-slave slave 127.0.0.1:{port_of(sentinel_set.master)}")
        do(other, "release", lock, 1)
        assert coordination().acquire(lock, LIMIT_S) > 0
        actors.append(there.options(name="third").remote())
        assert clusterpool.get(actors[2].add.remote(), timeout=LIMIT_S)[0] == 1
        clusters.wait_for(lambda: names_in(sentinel_set.master) == 3, within_s=LIMIT_S, what="it has all three actors")
        assert {node["node_id"] for node in clusterpool.nodes()} == set(node_ids)
        assert clusterpool.get(clusterpool.get_actor("first").add.remote(), timeout=LIMIT_S)[0] == 2
    finally:
        clusterpool.shutdown()


def names_in(server: ServerProcess) -> int:
    """How many names of actors this very server knows."""
    with closing(ControlStore.connect(server.url, password=PASSWORD)) as store:
        try:
            [key] = [key for key in store._run("KEYS", "*") if key.endswith(b":actor_names")]
            return int(store._run("HLEN", key))
        except (NotConnected, ValueError):
            return -1
