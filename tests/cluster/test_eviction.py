"""Copies of objects of other nodes make way in a full store: they are dropped, not written to disk, and come again."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

import clusterpool
from tests.cluster.clusters import Cluster
from tests.waiting import wait_for

pytestmark = pytest.mark.cluster

SIZE_BYTES = 60_000_000
COUNT = 5  # on each of two nodes: 600 MB in all, for a store of 420 MB


def make(number: int) -> Any:
    return np.full(SIZE_BYTES, number, np.uint8)


def node_of(node_id: str) -> dict[str, Any]:
    return next(node for node in clusterpool.nodes() if node["node_id"] == node_id)


def test_copies_make_way_for_others_and_come_again(three_nodes: Cluster, driver: None) -> None:
    task = clusterpool.remote(make)
    homes = [three_nodes.second, three_nodes.third]
    refs = [task.options(scheduling=f"node:{homes[number % 2]}").remote(number) for number in range(2 * COUNT)]
    assert clusterpool.wait(refs, num_returns=len(refs), timeout=50)[1] == []

    for _ in range(2):  # the driver is on the head: each value is copied to there
        for number, ref in enumerate(refs):
            array = clusterpool.get(ref, timeout=30)
            assert array[0] == array[-1] == number
            del array
    head = node_of(three_nodes.head)
    assert head["store_used_bytes"] > head["store_bytes"] // 2  # what fits is kept
    assert head["spilled_bytes"] == 0  # a copy is not worth a write
    assert all(node_of(home)["spilled_bytes"] == 0 for home in homes)

    del refs, ref
    gc.collect()
    wait_for(
        lambda: sum(node["store_used_bytes"] for node in clusterpool.nodes()) == 0,
        what="no object is left anywhere",
    )
