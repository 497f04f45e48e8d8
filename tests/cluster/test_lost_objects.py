"""Large values whose node is killed are had again: from another copy, or by running their tasks again."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy
import pytest

import clusterpool
from clusterpool import errors
from tests.cluster import clusters
from tests.cluster.clusters import Cluster

pytestmark = pytest.mark.cluster

SIZE = 1_000_000  # numbers of 8 bytes


@clusterpool.remote(num_cpus=0.5)
def made(value: float) -> Any:
    return numpy.full(SIZE, value)


@clusterpool.remote(num_cpus=0.5)
def plus_one(array: Any) -> Any:
    return array + 1


@clusterpool.remote(num_cpus=0.5)
def sum_of(*arrays: Any) -> Any:
    return sum(arrays)


@clusterpool.remote(num_cpus=0)
def mean_in_task(refs: list[Any]) -> tuple[float, str]:
    return float(clusterpool.get(refs[0]).mean()), clusterpool.node_id()


def near(node_id: str) -> dict[str, Any]:
    return {"scheduling": f"near:{node_id}"}


def test_chains_and_diamonds_are_rebuilt_while_other_work_goes_on(mortal_nodes: Cluster, driver: None) -> None:
    second = near(mortal_nodes.second)
    chains = []
    for value in range(3):
        array = made.options(**second).remote(value)
        for _ in range(3):
            array = plus_one.options(**second).remote(array)  # those before have no reference any more
        chains.append(array)
    top = made.options(**second).remote(10.0)
    arms = [plus_one.options(**second).remote(top) for _ in range(2)]
    diamond = sum_of.options(**second).remote(*arms)
    del top, arms
    clusterpool.wait([*chains, diamond], num_returns=4, timeout=30)
    done: list[float] = []
    is_over = threading.Event()

    def work() -> None:
        while not is_over.is_set():
            clusterpool.get(mean_in_task.remote([small]), timeout=30)
            done.append(time.monotonic())

    small = clusterpool.put(numpy.ones(3))
    other = threading.Thread(target=work)
    other.start()
    try:
        mortal_nodes.kill(mortal_nodes.second)
        assert clusterpool.get(diamond, timeout=40)[0] == 22.0
        assert [array[-1] for array in clusterpool.get(chains, timeout=40)] == [3.0, 4.0, 5.0]
    finally:
        is_over.set()
        other.join()
    assert done


def test_another_copy_spares_a_second_run(mortal_nodes: Cluster, driver: None, tmp_path: Any) -> None:
    @clusterpool.remote(num_cpus=0)
    def noted(value: float) -> Any:
        with open(tmp_path / "runs", "a") as file:
            file.write("run\n")
        return numpy.full(SIZE, value)

    array = noted.options(**near(mortal_nodes.second)).remote(5.0)
    mean, where = clusterpool.get(
        mean_in_task.options(scheduling=f"node:{mortal_nodes.third}").remote([array]), timeout=30
    )
    assert (mean, where) == (5.0, mortal_nodes.third)
    mortal_nodes.kill(mortal_nodes.second)
    clusters.wait_for(lambda: len(clusterpool.nodes()) == 2, what="the node is found dead")
    assert clusterpool.get(array, timeout=30).mean() == 5.0
    assert (tmp_path / "runs").read_text() == "run\n"


def test_whoever_asks_gets_the_rebuilt_value(mortal_nodes: Cluster, driver: None) -> None:
    second = near(mortal_nodes.second)
    pair = clusterpool.remote(num_cpus=0, num_returns=2)(lambda: (numpy.ones(SIZE), numpy.zeros(SIZE)))
    one, zero = pair.options(**second).remote()
    streamed = list(
        clusterpool.remote(num_cpus=0, num_returns="streaming")(lambda: (numpy.full(SIZE, i) for i in range(3)))
        .options(**second)
        .remote()
    )
    arrays = [made.options(**second).remote(value) for value in range(4)]
    clusterpool.wait([one, zero, *streamed, *arrays], num_returns=9, timeout=30)
    mortal_nodes.kill(mortal_nodes.second)
    # At once, so that some find out by themselves that the node is gone, and others are told.
    in_task = mean_in_task.remote([arrays[0]])
    argument = plus_one.remote(arrays[1])
    future = arrays[2].future()
    assert clusterpool.get(in_task, timeout=40)[0] == 0.0
    assert clusterpool.get(argument, timeout=40)[0] == 2.0
    assert future.result(timeout=40)[0] == 2.0
    ready, _ = clusterpool.wait([arrays[3]], timeout=40)
    assert ready and clusterpool.get(arrays[3])[0] == 3.0
    assert clusterpool.get(zero, timeout=40)[0] == 0.0
    assert clusterpool.get(one, timeout=40)[0] == 1.0
    assert [array[0] for array in clusterpool.get(streamed[::2], timeout=40)] == [0, 2]


def test_what_may_run_once_only_is_lost(mortal_nodes: Cluster, driver: None) -> None:
    array = made.options(retries=0, **near(mortal_nodes.second)).remote(1.0)
    clusterpool.wait([array], timeout=30)
    mortal_nodes.kill(mortal_nodes.second)
    with pytest.raises(errors.ObjectLost, match="retries"):
        clusterpool.get(array, timeout=40)
