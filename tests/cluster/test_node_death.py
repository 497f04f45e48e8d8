"""Nodes that are killed, taken for dead, or stopped, while programs run on them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

import clusterpool
from clusterpool import errors
from tests.cluster import clusters
from tests.cluster.clusters import Cluster, Counting, large_array, node_of_task, numbered_node_of_task

pytestmark = pytest.mark.cluster

# A node is declared dead within 4.75 s (membership.py); what hangs on it follows at once.
DEAD_WITHIN_S = 5.0
SLACK_S = 2.0  # of a machine that runs other things as well


@pytest.mark.alone  # it measures time
def test_a_killed_node_hangs_nobody(mortal_nodes: Cluster, driver: None) -> None:
    on_second = {"num_cpus": 0, "scheduling": f"node:{mortal_nodes.second}"}
    actor = clusterpool.remote(**on_second)(Counting).options(name="lost", lifetime="detached").remote()
    value = clusterpool.remote(**on_second)(large_array).remote(1.0)
    clusterpool.get(actor.add.remote(), timeout=20)
    clusterpool.wait([value], timeout=20)
    waiting = [clusterpool.remote(resources={"ssd": 2})(time.sleep).remote(60) for _ in range(2)]
    children = clusters.children_of(mortal_nodes.pids[mortal_nodes.second])
    assert children
    results = []
    killed_s = last_s = longest_s = 0.0
    count = 0

    def numbers() -> Iterator[int]:
        """Until all nodes have had a part in it and one of them has been killed, and 150 more."""
        nonlocal count
        left = 150
        while left:
            left -= killed_s > 0
            yield count
            count += 1

    with clusterpool.Pool(6) as pool:
        clusters.wait_for(lambda: len(pool._pool) == 6, what="all workers are ready")
        for result in pool.imap_unordered(numbered_node_of_task, numbers()):
            if killed_s:
                longest_s = max(longest_s, time.monotonic() - last_s)
            last_s = time.monotonic()
            results.append(result)
            if not killed_s and len(results) >= 30 and {node_id for _, node_id in results} == mortal_nodes.node_ids:
                mortal_nodes.kill(mortal_nodes.second)
                killed_s = time.monotonic()
        # Every task once, and the pool went on with the other nodes meanwhile.
        assert sorted(number for number, _ in results) == list(range(count))
        clusters.wait_for(
            lambda: len(clusterpool.nodes()) == 2,
            within_s=max(0.1, killed_s + DEAD_WITHIN_S + SLACK_S - time.monotonic()),
            what="the dead node leaves the list",
        )
        assert longest_s < DEAD_WITHIN_S + SLACK_S
        # The pool has its size again, on the nodes that are left.
        left = {mortal_nodes.head, mortal_nodes.third}
        clusters.wait_for(lambda: set(pool.map(node_of_task, range(60), chunksize=1)) == left, "both have a part in it")
        clusters.wait_for(lambda: len(pool._pool) == 6, "the pool has its size again")
    assert not any(clusters.is_alive(pid) for pid in children)
    with pytest.raises(errors.ActorDied):
        clusterpool.get(actor.add.remote(), timeout=20)
    with pytest.raises(errors.ObjectLost):
        clusterpool.get(value, timeout=20)
    for ref in waiting:
        with pytest.raises((errors.WorkerDied, errors.TaskInfeasible)):
            clusterpool.get(ref, timeout=20)
    with pytest.raises(errors.ActorNotFound):
        clusterpool.get_actor("lost")
    again = clusterpool.remote(num_cpus=0)(Counting).options(name="lost").remote()
    assert clusterpool.get(again.add.remote(), timeout=20)[0] == 1


@pytest.mark.alone  # it measures time
def test_a_node_that_was_taken_for_dead_joins_anew(mortal_nodes: Cluster, driver: None) -> None:
    pid = mortal_nodes.pids[mortal_nodes.third]
    where = clusterpool.remote(node_of_task)
    on_third = where.options(scheduling=f"node:{mortal_nodes.third}", num_cpus=0)
    assert clusterpool.get(on_third.remote(), timeout=20) == mortal_nodes.third
    os.kill(pid, signal.SIGSTOP)
    try:
        clusters.wait_for(
            lambda: len(clusterpool.nodes()) == 2, within_s=DEAD_WITHIN_S + SLACK_S, what="it is taken for dead"
        )
    finally:
        os.kill(pid, signal.SIGCONT)
    clusters.wait_for(lambda: len(clusterpool.nodes()) == 3, what="it joins anew")
    assert clusterpool.get(on_third.remote(), timeout=20) == mortal_nodes.third


def test_a_stopped_node_leaves_at_once(mortal_nodes: Cluster, driver: None) -> None:
    with clusterpool.Pool(6) as pool:
        pool.map(abs, range(100))
        done = clusters.clusterpool_command("stop", "--node", mortal_nodes.third)
        assert done.returncode == 0, done.stderr
        clusters.wait_for(lambda: len(clusterpool.nodes()) == 2, what="the others hear of it")
        left = {mortal_nodes.head, mortal_nodes.second}
        clusters.wait_for(lambda: set(pool.map(node_of_task, range(40), chunksize=1)) == left, "both have a part in it")
