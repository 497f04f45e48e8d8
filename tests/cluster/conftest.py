"""Clusters of three nodes, for a module or for one test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.clusters import Cluster, started_cluster, wait_for_free_cpus


@pytest.fixture(scope="module")
def three_nodes(run_of_tests: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of three nodes that the tests of the module share."""
    with started_cluster(tmp_path_factory.mktemp("cluster"), run_of_tests) as cluster:
        yield cluster


@pytest.fixture
def mortal_nodes(run_of_tests: Any, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of three nodes for one test, which may kill them."""
    with started_cluster(tmp_path, run_of_tests) as cluster:
        yield cluster


@pytest.fixture
def driver() -> Iterator[None]:
    """This process as a driver of the recorded cluster; `three_nodes` or `mortal_nodes` must come first."""
    import clusterpool

    assert clusterpool.init()["is_embedded"] is False
    wait_for_free_cpus()
    yield
    clusterpool.shutdown()
