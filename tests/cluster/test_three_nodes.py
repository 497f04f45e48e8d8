"""Programs on a cluster of three nodes on this machine: placement, transfers, actors, and the death of a node."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

import clusterpool
from clusterpool import errors
from tests.cluster import clusters
from tests.cluster.clusters import (
    LARGE_BYTES,
    Cluster,
    Counting,
    large_array,
    node_of_meeting,
    node_of_task,
    run_script,
    wait_for_free_cpus,
)

pytestmark = pytest.mark.cluster


def sum_of(array: Any) -> tuple[float, str]:
    return float(array.sum()), clusterpool.node_id()


class Making:
    def __init__(self) -> None:
        self.count = 0

    def make(self) -> Any:
        import numpy

        self.count += 1
        return numpy.ones(1 << 20)

    def made(self) -> int:
        return self.count


# --- placement


def test_an_unchanged_pool_script_uses_all_three_nodes(three_nodes: Cluster, tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        """
        import os, time
        from clusterpool.multiprocessing import Pool

        SEEN = os.path.abspath("seen")
        os.makedirs(SEEN, exist_ok=True)

        def where(number):
            time.sleep(0.05)
            print("seen", number)
            # The first wait for one another, so that each node has a part in it, however late its workers start.
            open(os.path.join(SEEN, os.environ["CLUSTERPOOL_NODE_ID"]), "w").close()
            while len(os.listdir(SEEN)) < 3:
                time.sleep(0.01)
            return os.environ["CLUSTERPOOL_NODE_ID"], number * number

        if __name__ == "__main__":
            with Pool(6) as pool:
                results = pool.map(where, range(60), chunksize=1)
            assert [square for _, square in results] == [number * number for number in range(60)]
            print(*sorted({node for node, _ in results}))
        """,
    )
    assert done.returncode == 0, done.stderr
    *lines, nodes = done.stdout.splitlines()
    assert set(nodes.split()) == three_nodes.node_ids
    # What workers print arrives, from wherever they are, before the program ends.
    lines += [line for line in done.stdout.splitlines() if "seen" in line and line not in lines]
    assert sorted(int(line.split()[-1]) for line in lines) == list(range(60))


def test_a_pool_without_a_size_has_a_worker_for_each_cpu_of_the_cluster(
    three_nodes: Cluster, driver: None, tmp_path: Path
) -> None:
    with clusterpool.Pool() as pool:
        assert pool._processes == 5
        nodes = pool.starmap(node_of_meeting, [(str(tmp_path / "nodes"), 3)] * 40, chunksize=1)
    assert set(nodes) == three_nodes.node_ids


def test_tasks_go_where_their_resource_is(three_nodes: Cluster, driver: None) -> None:
    where = clusterpool.remote(resources={"ssd": 1})(node_of_task)
    assert set(clusterpool.get([where.remote() for _ in range(6)], timeout=20)) == {three_nodes.second}


def test_a_task_that_no_node_can_ever_run_says_what_there_is(three_nodes: Cluster, driver: None) -> None:
    impossible = clusterpool.remote(resources={"ssd": 3})(node_of_task)
    with pytest.raises(errors.TaskInfeasible, match="3 ssd") as caught:
        clusterpool.get(impossible.remote(), timeout=20)
    assert "2 ssd" in str(caught.value)


def test_spread_tasks_go_to_all_nodes(three_nodes: Cluster, driver: None, tmp_path: Path) -> None:
    where = clusterpool.remote(scheduling="spread")(node_of_meeting)
    nodes = clusterpool.get([where.remote(str(tmp_path / "nodes"), 3) for _ in range(5)], timeout=40)
    assert set(nodes) == three_nodes.node_ids


def test_a_task_with_an_affinity_runs_on_that_node(three_nodes: Cluster, driver: None) -> None:
    where = clusterpool.remote(node_of_task)
    for node_id in three_nodes.node_ids:
        on_node = where.options(scheduling=f"node:{node_id}")
        assert clusterpool.get(on_node.remote(), timeout=20) == node_id


def test_more_tasks_than_the_driver_node_has_cpus_overflow_to_the_others(
    three_nodes: Cluster, driver: None, tmp_path: Path
) -> None:
    where = clusterpool.remote(node_of_meeting)
    nodes = set(clusterpool.get([where.remote(str(tmp_path / "nodes"), 2) for _ in range(30)], timeout=40))
    assert len(nodes) >= 2


def test_a_task_runs_where_its_large_argument_lies(three_nodes: Cluster, driver: None) -> None:
    array = clusterpool.remote(large_array).options(scheduling=f"node:{three_nodes.third}").remote(1.0)
    clusterpool.wait([array], timeout=20)
    wait_for_free_cpus()
    _, node_id = clusterpool.get(clusterpool.remote(sum_of).remote(array), timeout=20)
    assert node_id == three_nodes.third


def test_nested_tasks_of_a_remote_worker_run(three_nodes: Cluster, driver: None) -> None:
    def outer(number: int) -> tuple[int, str]:
        inner = clusterpool.remote(lambda x: x * x)
        return sum(clusterpool.get([inner.remote(number + i) for i in range(4)])), clusterpool.node_id()

    on_third = clusterpool.remote(outer).options(scheduling=f"node:{three_nodes.third}")
    assert clusterpool.get(on_third.remote(1), timeout=20) == (1 + 4 + 9 + 16, three_nodes.third)


# --- objects


def test_a_large_value_is_the_same_on_every_node(three_nodes: Cluster, driver: None) -> None:
    make, add = clusterpool.remote(large_array), clusterpool.remote(sum_of)
    for position, maker in enumerate(sorted(three_nodes.node_ids), start=1):
        array = make.options(scheduling=f"node:{maker}").remote(float(position))
        sums = [add.options(scheduling=f"node:{node_id}").remote(array) for node_id in sorted(three_nodes.node_ids)]
        expected = float(position * LARGE_BYTES // 8)
        assert clusterpool.get(sums, timeout=40) == [(expected, node_id) for node_id in sorted(three_nodes.node_ids)]
        here = clusterpool.get(array, timeout=20)
        here[0] = -1.0  # ours to write to, and nobody else's
        assert clusterpool.get(add.remote(array), timeout=20)[0] == expected


def test_a_value_put_here_is_read_elsewhere(three_nodes: Cluster, driver: None) -> None:
    array = clusterpool.put(large_array(2.0))
    add = clusterpool.remote(sum_of).options(scheduling=f"node:{three_nodes.second}")
    assert clusterpool.get(add.remote(array), timeout=20) == (2.0 * LARGE_BYTES / 8, three_nodes.second)


def test_a_reference_inside_a_value_is_good_on_another_node(three_nodes: Cluster, driver: None) -> None:
    def unwrap(box: dict[str, Any]) -> tuple[float, str]:
        return sum_of(clusterpool.get(box["array"]))

    box = {"array": clusterpool.put(large_array(3.0))}
    remote = clusterpool.remote(unwrap).options(scheduling=f"node:{three_nodes.third}")
    assert clusterpool.get(remote.remote(box), timeout=20) == (3.0 * LARGE_BYTES / 8, three_nodes.third)


# --- actors


def test_an_actor_lives_on_the_node_of_its_resource(three_nodes: Cluster, driver: None) -> None:
    actor = clusterpool.remote(resources={"ssd": 1})(Counting).remote()
    calls = clusterpool.get([actor.add.remote() for _ in range(100)], timeout=20)
    assert calls == [(number, three_nodes.second) for number in range(1, 101)]


def test_an_actor_is_called_from_every_node(three_nodes: Cluster, driver: None) -> None:
    actor = clusterpool.remote(resources={"ssd": 1})(Counting).remote()

    def call(handle: Any) -> int:
        return int(clusterpool.get(handle.add.remote())[0])

    calls = [clusterpool.remote(call).options(scheduling=f"node:{n}").remote(actor) for n in three_nodes.node_ids]
    assert sorted(clusterpool.get(calls, timeout=20)) == [1, 2, 3]


def test_another_driver_finds_a_named_actor(three_nodes: Cluster, driver: None, tmp_path: Path) -> None:
    actor = clusterpool.remote(resources={"ssd": 1})(Counting).options(name="shared").remote()
    assert clusterpool.get(actor.add.remote(), timeout=20)[0] == 1
    done = run_script(
        tmp_path,
        """
        import clusterpool
        actor = clusterpool.get_actor("shared")
        print(clusterpool.get(actor.add.remote(), timeout=20)[0])
        """,
    )
    assert (done.stdout, done.stderr) == ("2\n", "")
    assert clusterpool.get(actor.add.remote(), timeout=20)[0] == 3


# --- ends


def test_nothing_of_a_driver_stays_on_any_node(three_nodes: Cluster, tmp_path: Path) -> None:
    def workers() -> dict[str, int]:
        with clusters.node_link(three_nodes) as link:
            return {node.node_id: node.workers for node in link.describe()}

    clusters.wait_for(lambda: not any(workers().values()), what="the workers of earlier tests end")
    done = run_script(
        tmp_path,
        """
        import os, signal, time
        import clusterpool
        with clusterpool.Pool(6) as pool:
            pool.map(abs, range(100))
            clusterpool.get([clusterpool.remote(abs).options(scheduling="spread").remote(-1) for _ in range(10)])
            os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    clusters.wait_for(lambda: not any(workers().values()), within_s=5, what="the workers of the killed driver end")


def test_copies_on_other_nodes_go_when_nobody_wants_the_value_any_more(three_nodes: Cluster, driver: None) -> None:
    def used_bytes() -> dict[str, int]:
        return {node["node_id"]: node["store_used_bytes"] for node in clusterpool.nodes()}

    before = used_bytes()
    array = large_array(3.0)
    reference = clusterpool.put(array)
    total = clusterpool.remote(sum_of).options(scheduling=f"node:{three_nodes.second}", num_cpus=0)
    assert clusterpool.get(total.remote(reference), timeout=30)[1] == three_nodes.second
    del reference
    clusters.wait_for(
        lambda: all(used <= before[node_id] for node_id, used in used_bytes().items()),
        what="the copies are gone",
    )


def test_the_results_of_an_actor_go_with_the_caller_that_had_them(
    three_nodes: Cluster, driver: None, tmp_path: Path
) -> None:
    def used_bytes() -> int:
        return sum(int(node["store_used_bytes"]) for node in clusterpool.nodes())

    options = {"num_cpus": 0, "scheduling": f"node:{three_nodes.second}", "namespace": "results"}
    actor = clusterpool.remote(Making).options(name="making", **options).remote()
    assert clusterpool.get(actor.made.remote(), timeout=30) == 0
    before = used_bytes()
    done = run_script(
        tmp_path,
        """
        import os, signal
        import clusterpool
        actor = clusterpool.get_actor("making", namespace="results")
        references = [actor.make.remote() for _ in range(3)]
        clusterpool.wait(references, num_returns=3, timeout=30)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert clusterpool.get(actor.made.remote(), timeout=30) == 3
    clusters.wait_for(lambda: used_bytes() <= before, what="the results are gone")
