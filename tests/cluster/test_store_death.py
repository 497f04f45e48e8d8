"""The control store's server is killed, loses its data, or hangs, while programs run on the cluster."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import clusterpool
from clusterpool import errors
from clusterpool.multiprocessing import Queue
from tests.cluster import clusters
from tests.cluster.clusters import Cluster, Counting, node_of_task, numbered_node_of_task
from tests.cluster.coordination_party import coordination, do, new_thin, party, store_of

pytestmark = pytest.mark.cluster

LIMIT_S = 30.0


def server_pid(folder: Path) -> int:
    pid: int = json.loads((folder / "store" / "control-store.json").read_text())["pid"]
    return pid


def kill_server(folder: Path) -> None:
    """Kill it, and wait until another one runs."""
    pid = server_pid(folder)
    os.kill(pid, signal.SIGKILL)
    clusters.wait_for(
        lambda: server_pid(folder) != pid and clusters.is_alive(server_pid(folder)),
        within_s=LIMIT_S,
        what="the server runs again",
    )


def here(node_id: str, **options: Any) -> Any:
    return clusterpool.remote(num_cpus=0, scheduling=f"node:{node_id}", **options)


def put_numbers(queue: Any, count: int) -> None:
    for number in range(count):
        queue.put(number)
        time.sleep(0.01)


@pytest.mark.timeout(120)
def test_a_killed_server_is_started_again_and_nobody_and_nothing_is_lost(mortal_nodes: Cluster, driver: None) -> None:
    folder = mortal_nodes.session_folder
    counting = here(mortal_nodes.third)(Counting)
    first = counting.options(name="first", lifetime="detached").remote()
    assert clusterpool.get(first.add.remote(), timeout=LIMIT_S)[0] == 1
    third = party(mortal_nodes.third)
    lock, home = new_thin(1)
    do(third, "adopt", "lock", lock, home, 1)
    assert do(third, "acquire", lock, None) > 0
    queue: Any = Queue()
    putting = here(mortal_nodes.second)(put_numbers).remote(queue, 300)
    got = [queue.get(timeout=LIMIT_S)]  # it has moved to the store by now
    with clusterpool.Pool(5) as pool:
        results = []
        for position, result in enumerate(pool.imap_unordered(numbered_node_of_task, range(300))):
            results.append(result[0])
            if position in (50, 120, 200):
                kill_server(folder)
                # What was acknowledged before is there, what is new can be made.
                assert clusterpool.get(clusterpool.get_actor("first").add.remote(), timeout=LIMIT_S)[0] > 1
                with pytest.raises(errors.NameTaken):
                    counting.options(name="first").remote()
                again = counting.options(name=f"again{position}").remote()
                assert clusterpool.get(again.add.remote(), timeout=LIMIT_S)[0] == 1
        assert sorted(results) == list(range(300))
    got += [queue.get(timeout=LIMIT_S) for _ in range(299)]
    assert got == list(range(300)), [pair for pair in enumerate(got) if pair[0] != pair[1]][:20]
    clusterpool.get(putting, timeout=LIMIT_S)
    assert coordination().acquire(lock, 0.2) == 0, "the lock is held"
    do(third, "release", lock, 1)
    assert coordination().acquire(lock, LIMIT_S) > 0
    assert {node["node_id"] for node in clusterpool.nodes()} == mortal_nodes.node_ids
    assert all(clusters.is_alive(pid) for pid in mortal_nodes.pids.values())
    assert clusterpool.get(first.add.remote(), timeout=LIMIT_S)[0] == 5
    clusterpool.kill(first)


@pytest.mark.timeout(90)
def test_a_server_that_loses_its_disk_gets_nodes_and_actors_back(mortal_nodes: Cluster, driver: None) -> None:
    folder = mortal_nodes.session_folder
    named = here(mortal_nodes.second)(Counting).options(name="named").remote()
    assert clusterpool.get(named.add.remote(), timeout=LIMIT_S)[0] == 1
    with clusterpool.Pool(3) as pool:
        result = pool.map_async(numbered_node_of_task, range(100), chunksize=1)
        pid = server_pid(folder)
        shutil.rmtree(folder / "store")
        os.kill(pid, signal.SIGKILL)
        clusters.wait_for(
            lambda: (folder / "store" / "control-store.json").exists(), within_s=LIMIT_S, what="the server runs again"
        )
        assert sorted(number for number, _ in result.get(LIMIT_S)) == list(range(100))
    assert {node["node_id"] for node in clusterpool.nodes()} == mortal_nodes.node_ids
    assert clusterpool.get(named.add.remote(), timeout=LIMIT_S)[0] == 2
    # The name is known again, and taken, and so is the job.
    clusters.wait_for(lambda: is_found("named"), within_s=LIMIT_S, what="its node tells the store of the actor")
    assert clusterpool.get(clusterpool.get_actor("named").add.remote(), timeout=LIMIT_S)[0] == 3
    with pytest.raises(errors.NameTaken):
        here(mortal_nodes.third)(Counting).options(name="named").remote()
    with store_of(mortal_nodes) as store:
        assert len(store.list_jobs()) == 1
    again = here(mortal_nodes.third)(Counting).options(name="again").remote()
    assert clusterpool.get(again.add.remote(), timeout=LIMIT_S)[0] == 1


def is_found(name: str) -> bool:
    try:
        clusterpool.get_actor(name)
    except errors.ActorNotFound:
        return False
    return True


@pytest.mark.timeout(120)
def test_what_died_while_the_server_hung_is_found_dead_when_it_is_back(mortal_nodes: Cluster, driver: None) -> None:
    folder = mortal_nodes.session_folder
    lost = here(mortal_nodes.third)(Counting).options(name="lost").remote()
    kept = here(mortal_nodes.second)(Counting).options(name="kept").remote()
    for actor in (lost, kept):
        assert clusterpool.get(actor.add.remote(), timeout=LIMIT_S)[0] == 1
    third = party(mortal_nodes.third)
    lock, home = new_thin(1)
    do(third, "adopt", "lock", lock, home, 1)
    assert do(third, "acquire", lock, None) > 0
    with store_of(mortal_nodes) as store:
        another = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import clusterpool, time; clusterpool.init(); print(1, flush=True); time.sleep(99)",
            ],
            stdout=subprocess.PIPE,
        )
        assert another.stdout is not None and another.stdout.readline() == b"1\n"
        clusters.wait_for(lambda: len(store.list_jobs()) == 2, within_s=LIMIT_S, what="both jobs are listed")
        os.kill(server_pid(folder), signal.SIGSTOP)
        stopped_s = time.monotonic()
        another.kill()
        another.wait()
        another.stdout.close()
        mortal_nodes.kill(mortal_nodes.third)
        with clusterpool.Pool(3) as pool:
            while time.monotonic() - stopped_s < 6.0:  # longer than a node may be silent
                assert pool.map(abs, range(10)) == list(range(10))
        os.kill(server_pid(folder), signal.SIGCONT)
        clusters.wait_for(lambda: len(clusterpool.nodes()) == 2, within_s=LIMIT_S, what="the dead node is found")
        clusters.wait_for(lambda: len(store.list_jobs()) == 1, within_s=LIMIT_S, what="the dead driver's job is over")
    assert coordination().acquire(lock, LIMIT_S) > 0
    with pytest.raises(errors.ActorDied):
        clusterpool.get(lost.add.remote(), timeout=LIMIT_S)
    assert clusterpool.get(kept.add.remote(), timeout=LIMIT_S)[0] == 2
    assert {node["node_id"] for node in clusterpool.nodes()} == {mortal_nodes.head, mortal_nodes.second}


@pytest.mark.timeout(150)
def test_a_server_that_hangs_for_half_a_minute_ends_nobody(mortal_nodes: Cluster, driver: None) -> None:
    folder = mortal_nodes.session_folder
    actor = here(mortal_nodes.second)(Counting).options(name="here").remote()
    assert clusterpool.get(actor.add.remote(), timeout=LIMIT_S)[0] == 1
    third = party(mortal_nodes.third)
    lock, home = new_thin(1)
    do(third, "adopt", "lock", lock, home, 1)
    assert do(third, "acquire", lock, None) > 0
    outcome: dict[str, Any] = {}

    def make_actor() -> None:
        new = here(mortal_nodes.third)(Counting).options(name="new").remote()
        outcome["new"] = clusterpool.get(new.add.remote(), timeout=90)[0]

    with clusterpool.Pool(4) as pool:
        os.kill(server_pid(folder), signal.SIGSTOP)
        stopped_s = time.monotonic()
        thread = threading.Thread(target=make_actor)
        thread.start()
        rounds = 0
        while time.monotonic() - stopped_s < 30.0:
            # Tasks, actors, new pools: none of it needs the store.
            assert len(pool.map(node_of_task, range(20), chunksize=1)) == 20
            assert clusterpool.get(actor.add.remote(), timeout=30)[0] > 1
            rounds += 1
        with clusterpool.Pool(2) as another:
            assert another.map(abs, [-1]) == [1]
        os.kill(server_pid(folder), signal.SIGCONT)
        assert rounds > 5
        thread.join(90)
        assert outcome == {"new": 1}
        do(third, "release", lock, 1)
        assert coordination().acquire(lock, LIMIT_S) > 0
        assert set(pool.map(node_of_task, range(40), chunksize=1))
    assert {node["node_id"] for node in clusterpool.nodes()} == mortal_nodes.node_ids
    for node_id in mortal_nodes.node_ids:
        [file] = folder.glob(f"{node_id[0]}-{node_id[1:]}/logs/node.log")
        log = file.read_text()
        assert "taken for dead" not in log and "is gone" not in log
        assert log.count("the control store is away") <= 2 >= log.count("the control store is back")


def test_an_embedded_cluster_survives_the_death_of_its_server(fresh: None) -> None:
    info = clusterpool.init(num_cpus=2)
    actor = clusterpool.remote(Counting).options(name="one").remote()
    assert clusterpool.get(actor.add.remote(), timeout=LIMIT_S)[0] == 1
    folder = Path(info["address"]).parent
    # It starts with the first actor, in the background.
    assert (folder / "store").is_dir()
    for number in range(2):
        kill_server(folder)
        assert clusterpool.get(clusterpool.get_actor("one").add.remote(), timeout=LIMIT_S)[0] == 2 + number


def test_a_cluster_whose_server_hangs_can_be_ended(fresh: None) -> None:
    folder = Path(clusterpool.init(num_cpus=2)["address"]).parent
    actor = clusterpool.remote(Counting).remote()
    assert clusterpool.get(actor.add.remote(), timeout=LIMIT_S)[0] == 1
    os.kill(server_pid(folder), signal.SIGSTOP)
    started_s = time.monotonic()
    clusterpool.shutdown()
    assert time.monotonic() - started_s < 10
    assert not folder.exists()


@pytest.mark.timeout(90)
def test_down_ends_a_cluster_whose_server_hangs(mortal_nodes: Cluster) -> None:
    os.kill(server_pid(mortal_nodes.session_folder), signal.SIGSTOP)
    # The fixture says `clusterpool down`, and looks for what it leaves behind.
