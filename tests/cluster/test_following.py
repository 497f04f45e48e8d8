"""Pools and executors without a size have a worker for each CPU of the cluster, while nodes come and go."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

import clusterpool
from clusterpool.futures import ProcessPoolExecutor
from tests.cluster import clusters
from tests.cluster.clusters import DEAD_WITHIN_S, Cluster, clusterpool_command, wait_for

pytestmark = pytest.mark.cluster

SLACK_S = 5.0  # of a machine that runs other things as well, and for the start of workers


def numbered(number: int) -> int:
    time.sleep(0.03)
    return number


def test_a_pool_grows_with_a_node_that_joins_and_shrinks_with_one_that_dies(
    mortal_nodes: Cluster, driver: None, run_of_tests: Any, tmp_path: Path
) -> None:
    def has_size(size: int) -> bool:
        return pool._processes == executor._max_workers == size and len(pool._workers.living()) == size

    with clusterpool.Pool() as pool, ProcessPoolExecutor(retries=1) as executor:
        wait_for(lambda: has_size(5), what="a worker for each of five CPUs")
        results = pool.imap(numbered, range(1000))
        done = clusterpool_command("start", "--address", mortal_nodes.join_file, "--json", "--num-cpus", "3")
        assert done.returncode == 0, done.stderr
        run_of_tests.held[-1] = run_of_tests.look()
        started = {node["node_id"] for node in json.loads(done.stdout)["nodes"]} - mortal_nodes.node_ids
        wait_for(lambda: has_size(8), what="three workers more")
        nodes = set(pool.starmap(clusters.node_of_meeting, [(str(tmp_path / "nodes"), 4)] * 40, chunksize=1))
        assert len(started) == 1 and started <= nodes
        mortal_nodes.kill(mortal_nodes.second)
        wait_for(lambda: has_size(6), within_s=DEAD_WITHIN_S + SLACK_S, what="two workers fewer")
        assert list(results) == list(range(1000))
        assert executor.submit(os.getpid).result(20)
