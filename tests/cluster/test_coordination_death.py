"""What becomes of semaphores and locks when a node is killed that made or held them."""

from __future__ import annotations

import pytest

import clusterpool
from clusterpool import errors
from clusterpool.processes.sweep import sweep_stale_sessions
from clusterpool.processes.thin_files import semaphore_path
from tests.cluster.clusters import Cluster
from tests.cluster.coordination_party import LIMIT_S, UNBOUNDED, coordination, do, new_thin, party

pytestmark = pytest.mark.cluster


def test_a_killed_node_gives_its_locks_back_and_loses_what_had_not_moved(mortal_nodes: Cluster, driver: None) -> None:
    here = coordination()
    third = party(mortal_nodes.third)
    lock, home = new_thin(1)
    do(third, "adopt", "lock", lock, home, 1)
    assert do(third, "acquire", lock, None) > 0
    moved, _ = clusterpool.get(third.make.remote(1), timeout=LIMIT_S)
    thin, _ = clusterpool.get(third.make.remote(1), timeout=LIMIT_S)
    here.adopt("semaphore", moved, mortal_nodes.third, UNBOUNDED)
    mortal_nodes.kill(mortal_nodes.third)
    # Others find a node dead within 4.75 s.
    assert here.acquire(lock, 12) > 0
    with pytest.raises(errors.ObjectLost, match="which is gone"):
        here.adopt("semaphore", thin, mortal_nodes.third, 1)
    second = party(mortal_nodes.second)
    do(second, "adopt", "semaphore", moved, mortal_nodes.third, UNBOUNDED)
    assert do(second, "acquire", moved, None) > 0
    # Its files are left to the next start on that host.
    sweep_stale_sessions([mortal_nodes.session_folder.parent])
    assert not semaphore_path(mortal_nodes.third, thin).exists()
