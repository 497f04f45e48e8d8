"""`Process` on three nodes: children on other nodes are as those of this one."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest

import clusterpool.multiprocessing as mp
from tests.cluster import clusters
from tests.cluster.clusters import Cluster

pytestmark = pytest.mark.cluster
WAIT_S = 20.0


def tell_node_and(path: Path, what: str) -> None:
    parent = mp.parent_process()
    assert parent is not None
    path.with_suffix(".new").write_text(f"{os.environ['CLUSTERPOOL_NODE_ID']} {parent.is_alive()}")
    path.with_suffix(".new").rename(path)
    if what == "sleep":
        time.sleep(100)
    os._exit(int(what))


def have_children(folder: Path) -> None:
    for number in range(6):
        mp.Process(target=watch_parent, args=(folder / str(number),)).start()
    time.sleep(100)


def watch_parent(path: Path) -> None:
    parent = mp.parent_process()
    assert parent is not None
    path.with_suffix(".started").touch()
    parent.join(WAIT_S)
    path.write_text(f"{os.environ['CLUSTERPOOL_NODE_ID']} {parent.is_alive()}")


def all_there(paths: list[Path]) -> None:
    clusters.wait_for(lambda: all(path.exists() for path in paths), within_s=WAIT_S, what="the children's files")


def test_processes_spread_and_end_with_their_exit_codes(three_nodes: Cluster, driver: None, tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(6)]
    processes = [mp.Process(target=tell_node_and, args=(path, str(number))) for number, path in enumerate(paths)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(WAIT_S)
    assert [process.exitcode for process in processes] == list(range(6))
    facts = [path.read_text().split() for path in paths]
    assert {node for node, _ in facts} == three_nodes.node_ids
    assert {is_alive for _, is_alive in facts} == {"True"}


def test_signals_and_sentinels_work_from_node_to_node(three_nodes: Cluster, driver: None, tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(6)]
    processes = [mp.Process(target=tell_node_and, args=(path, "sleep")) for path in paths]
    for process in processes:
        process.start()
    all_there(paths)
    assert {path.read_text().split()[0] for path in paths} == three_nodes.node_ids
    assert wait([process.sentinel for process in processes], 0) == []
    for process in processes:
        process.terminate()
    for process in processes:
        assert wait([process.sentinel], WAIT_S) == [process.sentinel]
        assert process.exitcode == -signal.SIGTERM


def test_orphans_on_any_node_see_the_end_of_their_parent(three_nodes: Cluster, driver: None, tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(6)]
    parent = mp.Process(target=have_children, args=(tmp_path,))
    parent.start()
    all_there([path.with_suffix(".started") for path in paths])
    parent.kill()
    parent.join(WAIT_S)
    clusters.wait_for(
        lambda: all(path.exists() and path.read_text() for path in paths), within_s=WAIT_S, what="orphans"
    )
    facts = [path.read_text().split() for path in paths]
    assert {node for node, _ in facts} == three_nodes.node_ids
    assert {is_alive for _, is_alive in facts} == {"False"}


def fill(raw: Any, array: Any, segment: Any, node_ids: Any) -> None:
    raw.value = array[1] = segment.buf[0] = 7
    node_ids.put(os.environ["CLUSTERPOOL_NODE_ID"])


def fill_from_child(node_ids: Any) -> None:
    segment = mp.shared_memory.SharedMemory(create=True, size=1)
    raw, array = mp.RawValue("i"), mp.Array("i", 3, lock=False)
    for _ in range(4):
        raw.value = array[1] = segment.buf[0] = 0
        process = mp.Process(target=fill, args=(raw, array, segment, node_ids))
        process.start()
        process.join()
        assert (raw.value, array[1], segment.buf[0]) == (7, 7, 7)
    segment.close()
    segment.unlink()
    node_ids.put(os.environ["CLUSTERPOOL_NODE_ID"])


def test_processes_that_are_given_memory_of_a_host_run_on_it(three_nodes: Cluster, driver: None) -> None:
    queues = [mp.Queue() for _ in range(4)]
    processes = [mp.Process(target=fill_from_child, args=(queue,)) for queue in queues]
    for process in processes:
        process.start()
    ran_on = [{queue.get(timeout=WAIT_S) for _ in range(5)} for queue in queues]
    for process in processes:
        process.join(WAIT_S)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert [len(nodes) for nodes in ran_on] == [1, 1, 1, 1]
    assert len(set.union(*ran_on)) > 1, "all were started on one node, which shows nothing"
