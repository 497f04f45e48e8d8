"""Clusters that are killed piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.hosts import Hosts, started_hosts


@pytest.fixture(scope="module")
def hosts(run_of_tests: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Four nodes that the tests of the module share; whoever kills one mends it."""
    with started_hosts(tmp_path_factory.mktemp("hosts"), run_of_tests) as hosts:
        yield hosts


@pytest.fixture
def mended_hosts(hosts: Hosts) -> Iterator[Hosts]:
    """The same, and whatever became of the test, the next one has four healthy nodes."""
    yield hosts
    hosts.mend()
    hosts.assert_healthy()
