"""Three hosts, each a network namespace: partitions, a node that only the store does not hear, a bad line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import clusterpool
from clusterpool.config import SessionPaths
from tests.cluster.clusters import DEAD_WITHIN_S, end_cluster, wait_for
from tests.faults.hosts import SLACK_S
from tests.faults.network import Network, made_network, why_impossible

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.alone,  # what is late here must be late for the network's sake
    pytest.mark.skipif(os.getuid() != 0, reason="network namespaces need root"),
]

# Well below the limit of suspicion (2 s), and well above that of death (4.75 s).
SHORT_S = 1.5
LONG_S = 8.0


@dataclass
class Hosts:
    """Node 0 is beside the control store; the driver is at node 1."""

    network: Network
    node_ids: list[str]
    session: SessionPaths
    store_port: int

    def deaths(self) -> int:
        """How often any node has taken another for dead."""
        return sum(self.session.node(node_id).node_log.read_text().count("is gone") for node_id in self.node_ids)


def start(network: Network, number: int, *arguments: str) -> dict[str, Any]:
    options = ["--host", network.addresses[number], "--num-cpus", "2", "--object-store-memory", "128MiB", "--json"]
    command = network.enter(number, sys.executable, "-m", "clusterpool.cli", "start", *arguments, *options)
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def hosts(run_of_tests: Any) -> Iterator[Hosts]:
    reason = why_impossible()
    if reason:
        pytest.skip(reason)
    with made_network(3) as network:
        try:
            head = start(network, 0, "--head")
            started = [head, *(start(network, number, "--address", head["join_file"]) for number in (1, 2))]
            run_of_tests.held.append(run_of_tests.look())
            node_ids = [one["nodes"][0]["node_id"] for one in started]
            port = urlsplit(head["control_store"]).port
            assert port is not None
            yield Hosts(network, node_ids, SessionPaths(Path(head["session_folder"])), port)
        finally:
            network.heal()
            assert network.switch is not None
            network.switch.loss = network.switch.delay_s = 0.0
            end_cluster(run_of_tests, [])


@pytest.fixture
def driver(hosts: Hosts) -> Iterator[None]:
    clusterpool.init(address=str(hosts.session.node(hosts.node_ids[1]).node_socket))
    wait_for(lambda: alive() == set(hosts.node_ids), within_s=20, what="all nodes are there")
    yield
    clusterpool.shutdown()


def alive() -> set[str]:
    return {node["node_id"] for node in clusterpool.nodes() if node["alive"]}


def slow_square(number: int) -> tuple[int, str]:
    time.sleep(0.05)
    return number * number, os.environ["CLUSTERPOOL_NODE_ID"]


def large(seed: int) -> bytes:
    return bytes([seed]) * 3_000_000


def later(after_s: float, action: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(after_s, action)
    timer.start()
    return timer


def squares(pool: Any, count: int) -> set[str]:
    """Each result right, and once; the nodes that made them."""
    results = pool.map(slow_square, range(count), chunksize=1)
    assert [square for square, _ in results] == [number * number for number in range(count)]
    return {node_id for _, node_id in results}


def test_a_short_partition_kills_nobody(hosts: Hosts, driver: None) -> None:
    deaths = hosts.deaths()
    on_last = clusterpool.remote(slow_square).options(scheduling=f"node:{hosts.node_ids[2]}", retries=0, num_cpus=0)
    with clusterpool.Pool(6) as pool:
        pool.map(abs, range(100))
        workers = {process.pid for process in pool._pool}
        hosts.network.isolate(2)
        timer = later(SHORT_S, hosts.network.heal)
        reference = on_last.remote(7)  # at most once: a death would fail it
        assert squares(pool, 240) == set(hosts.node_ids)
        assert clusterpool.get(reference, timeout=20) == (49, hosts.node_ids[2])
        timer.join()
        assert {process.pid for process in pool._pool} == workers
    assert alive() == set(hosts.node_ids)
    assert hosts.deaths() == deaths


def test_a_node_that_only_the_store_does_not_hear_is_not_dead(hosts: Hosts, driver: None) -> None:
    deaths = hosts.deaths()
    switch = hosts.network.switch
    assert switch is not None
    with clusterpool.Pool(6) as pool:
        pool.map(abs, range(100))
        switch.closed_ports = {frozenset((0, 2)): hosts.store_port}
        try:
            started_s = time.monotonic()
            while time.monotonic() - started_s < LONG_S:
                assert hosts.node_ids[2] in squares(pool, 60)
        finally:
            switch.closed_ports = {}
    assert hosts.deaths() == deaths
    wait_for(lambda: alive() == set(hosts.node_ids), within_s=10, what="all nodes are heard again")


def test_packets_are_lost_and_late(hosts: Hosts, driver: None) -> None:
    switch = hosts.network.switch
    assert switch is not None
    lost, deaths = switch.lost, hosts.deaths()
    switch.loss, switch.delay_s = 0.05, 0.05
    try:
        with clusterpool.Pool(6) as pool:
            assert squares(pool, 200) == set(hosts.node_ids)
        make = clusterpool.remote(large)
        made = [make.options(scheduling=f"node:{node_id}").remote(seed) for seed, node_id in enumerate(hosts.node_ids)]
        assert clusterpool.get(made, timeout=50) == [large(seed) for seed in range(3)]
    finally:
        switch.loss = switch.delay_s = 0.0
    assert switch.lost > lost, "nothing was lost"
    assert alive() == set(hosts.node_ids)
    assert hosts.deaths() == deaths


def test_a_long_partition_is_a_death_and_its_end_a_new_life(hosts: Hosts, driver: None) -> None:
    with clusterpool.Pool(6) as pool:
        assert squares(pool, 60) == set(hosts.node_ids)
        hosts.network.isolate(2)
        cut_s = time.monotonic()
        assert squares(pool, 120) <= set(hosts.node_ids)
        wait_for(
            lambda: alive() == set(hosts.node_ids[:2]), within_s=DEAD_WITHIN_S + SLACK_S, what="it is known to be dead"
        )
        assert time.monotonic() - cut_s < DEAD_WITHIN_S + SLACK_S
        assert squares(pool, 60) == set(hosts.node_ids[:2])
        hosts.network.heal()
        wait_for(lambda: alive() == set(hosts.node_ids), within_s=20, what="it has joined anew")
        assert len(squares(pool, 60)) >= 2
    on_last = clusterpool.remote(slow_square).options(scheduling=f"node:{hosts.node_ids[2]}", num_cpus=0)
    assert clusterpool.get(on_last.remote(3), timeout=20) == (9, hosts.node_ids[2])
