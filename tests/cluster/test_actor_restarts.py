"""Actors that outlive their nodes: made again elsewhere, by their creators or by the nodes that are left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import clusterpool
from clusterpool import errors
from tests.cluster.clusters import Cluster, Counting

pytestmark = pytest.mark.cluster

# Death is declared within 4.75 s; then a worker is to be started on a busy machine.
AGAIN_WITHIN_S = 20


class Caller:
    """Calls an actor from another node."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def call(self) -> tuple[int, str]:
        count, node_id = clusterpool.get(self.handle.add.remote(), timeout=40)
        return count, node_id


def test_an_actor_is_made_again_on_another_node_for_all_its_callers(mortal_nodes: Cluster, driver: None) -> None:
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    actor = clusterpool.remote(**options)(Counting).options(scheduling=f"near:{mortal_nodes.second}").remote()
    on_third = {"num_cpus": 0, "scheduling": f"node:{mortal_nodes.third}"}
    caller = clusterpool.remote(**on_third)(Caller).remote(actor)
    assert clusterpool.get(actor.add.remote(), timeout=20) == (1, mortal_nodes.second)
    assert clusterpool.get(caller.call.remote(), timeout=20) == (2, mortal_nodes.second)
    mortal_nodes.kill(mortal_nodes.second)
    refs = [caller.call.remote(), actor.add.remote(), caller.call.remote()]
    answers = clusterpool.get(refs, timeout=40)
    assert sorted(count for count, _ in answers) == [1, 2, 3]
    assert mortal_nodes.second not in {node_id for _, node_id in answers}


MAKER = """
import sys, time
import clusterpool
from tests.cluster.clusters import Counting

clusterpool.init()
actor = clusterpool.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Counting).options(
    name="kept", lifetime="detached", scheduling=f"near:{sys.argv[1]}"
).remote()
print(*clusterpool.get(actor.add.remote(), timeout=20), flush=True)
time.sleep(600)
"""


def test_a_detached_actor_outlives_its_driver_and_its_node(mortal_nodes: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "maker.py"
    script.write_text(MAKER)
    command = [sys.executable, str(script), mortal_nodes.second]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as maker:
        try:
            assert maker.stdout is not None
            assert maker.stdout.readline().split() == ["1", mortal_nodes.second]
        finally:
            maker.kill()
    clusterpool.init()
    try:
        actor = clusterpool.get_actor("kept")
        assert clusterpool.get(actor.add.remote(), timeout=20) == (2, mortal_nodes.second)
        mortal_nodes.kill(mortal_nodes.second)
        count, node_id = clusterpool.get(actor.add.remote(), timeout=40)
        assert count == 1 and node_id in (mortal_nodes.head, mortal_nodes.third)
        clusterpool.kill(clusterpool.get_actor("kept"))
        with pytest.raises(errors.ActorDied, match="kill"):
            clusterpool.get(actor.add.remote(), timeout=20)
    finally:
        clusterpool.shutdown()


class Ledger:
    """State that must not be lost."""

    def __init__(self) -> None:
        self.values: list[int] = []

    def add(self, value: int) -> str:
        self.values.append(value)
        return clusterpool.node_id()

    def all(self) -> list[int]:
        return self.values


@pytest.mark.parametrize("is_detached", [False, True])
def test_a_checkpointed_actor_loses_nothing_with_its_node(
    mortal_nodes: Cluster, driver: None, is_detached: bool
) -> None:
    kept = {"name": "ledger", "lifetime": "detached"} if is_detached else {}
    where = f"near:{mortal_nodes.second}"
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "checkpoint_every": 7, "scheduling": where}
    actor = clusterpool.remote(Ledger).options(**options, **kept).remote()
    assert set(clusterpool.get([actor.add.remote(number) for number in range(20)], timeout=20)) == {mortal_nodes.second}
    refs = [actor.add.remote(number) for number in range(20, 40)]
    mortal_nodes.kill(mortal_nodes.second)
    refs += [actor.add.remote(number) for number in range(40, 60)]
    assert clusterpool.get(refs[-1], timeout=45) != mortal_nodes.second
    clusterpool.get(refs, timeout=20)
    assert clusterpool.get(actor.all.remote(), timeout=20) == list(range(60))
    clusterpool.kill(actor)


def test_a_handle_that_another_node_hears_of_before_the_registry_is_good(three_nodes: Cluster, driver: None) -> None:
    on_third = {"num_cpus": 0, "scheduling": f"node:{three_nodes.third}"}

    @clusterpool.remote(**on_third)
    def call(handles: list[Any]) -> int:
        return int(clusterpool.get(handles[0].add.remote(), timeout=30)[0])

    clusterpool.get([call.remote([clusterpool.remote(num_cpus=0)(Counting).remote()])], timeout=30)  # a warm worker
    started_s = time.monotonic()
    while time.monotonic() - started_s < 3:
        assert clusterpool.get(call.remote([clusterpool.remote(num_cpus=0)(Counting).remote()]), timeout=30) == 1
