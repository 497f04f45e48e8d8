"""Semaphores, channels and cells that processes of several nodes share; the raw carriers, without the facades."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

import clusterpool
from clusterpool import errors
from clusterpool.client import api
from clusterpool.processes.thin_files import cell_path, semaphore_path
from tests.cluster import clusters
from tests.cluster.clusters import Cluster
from tests.cluster.coordination_party import (
    LIMIT_S,
    UNBOUNDED,
    coordination,
    do,
    new_thin,
    party,
    store_of,
    take_thin,
    wait_for_waiters,
)

pytestmark = pytest.mark.cluster


@pytest.fixture
def second(three_nodes: Cluster, driver: None) -> Any:
    return party(three_nodes.second)


def test_a_semaphore_made_on_one_node_is_used_from_both(three_nodes: Cluster, second: Any) -> None:
    here = coordination()
    name, home = new_thin(2)
    page = here.page.cast("Q")
    before = page[0]
    assert not here.is_moved(name)
    do(second, "adopt", "semaphore", name, home, UNBOUNDED)
    assert page[0] > before
    assert here.is_moved(name)
    assert not take_thin(name, home)
    assert here.value(name) == 2
    assert do(second, "acquire", name, None) > 0
    assert here.acquire(name, None) > 0
    assert here.acquire(name, 0) == do(second, "acquire", name, 0) == 0
    do(second, "release", name, UNBOUNDED)
    here.release(name, UNBOUNDED)
    assert here.value(name) == do(second, "value", name) == 2
    # A third node finds it in the control store, and need not ask where it came from.
    third = party(three_nodes.third)
    do(third, "adopt", "semaphore", name, home, UNBOUNDED)
    assert do(third, "value", name) == 2


def test_all_nodes_may_adopt_at_the_same_time(three_nodes: Cluster, driver: None) -> None:
    name, home = new_thin(3)
    parties = [party(node_id) for node_id in (three_nodes.second, three_nodes.third) for _ in range(2)]
    adopted = [one.call.remote("adopt", "semaphore", name, home, UNBOUNDED) for one in parties]
    clusterpool.get(adopted, timeout=LIMIT_S)
    assert coordination().value(name) == 3


def test_tokens_go_to_nodes_in_the_order_of_asking(three_nodes: Cluster, driver: None) -> None:
    name, home = new_thin(0)
    parties = [party(node_id) for node_id in (three_nodes.third, three_nodes.second, three_nodes.third)]
    calls = []
    with store_of(three_nodes) as store:
        for count, one in enumerate(parties, start=1):
            do(one, "adopt", "semaphore", name, home, UNBOUNDED)
            calls.append(one.call.remote("acquire", name, LIMIT_S))
            wait_for_waiters(store, name, count)
    for number, call in enumerate(calls, start=1):
        ready, _ = clusterpool.wait(calls, num_returns=number, timeout=0.05)
        assert len(ready) == number - 1
        coordination().release(name, UNBOUNDED)
        assert clusterpool.get(call, timeout=LIMIT_S) == number


def test_a_wait_ends_when_its_time_is_up_and_takes_nothing(three_nodes: Cluster, second: Any) -> None:
    here = coordination()
    name, home = new_thin(0)
    do(second, "adopt", "semaphore", name, home, UNBOUNDED)
    started_s = time.monotonic()
    assert here.acquire(name, 0.2) == 0
    assert 0.2 <= time.monotonic() - started_s < 10
    for _ in range(20):
        do(second, "release", name, UNBOUNDED)
        assert here.value(name) == 1, "what was released is there for whoever asks afterwards"
        assert here.acquire(name, 0) > 0
        assert here.acquire(name, 0.01) == 0


def test_tokens_that_come_as_the_time_runs_out_are_not_lost(three_nodes: Cluster, second: Any) -> None:
    here = coordination()
    name, home = new_thin(0)
    do(second, "adopt", "semaphore", name, home, UNBOUNDED)
    got = 0
    for _ in range(20):
        released = second.call.remote("release", name, UNBOUNDED)
        got += bool(here.acquire(name, 0.001))
        clusterpool.get(released, timeout=LIMIT_S)
    clusters.wait_for(lambda: here.value(name) == 20 - got, what="all other tokens are there")


def test_the_lock_of_a_process_that_is_killed_is_free_again(three_nodes: Cluster, second: Any) -> None:
    here = coordination()
    name, home = new_thin(1)
    do(second, "adopt", "lock", name, home, 1)
    with pytest.raises(errors.ActorDied):
        clusterpool.get(second.acquire_and_die.remote(name), timeout=LIMIT_S)
    assert here.acquire(name, 5) > 0
    here.release(name, 1)
    with pytest.raises(ValueError, match="too many times"):
        here.release(name, 1)


def test_a_killed_process_that_waited_takes_no_token(three_nodes: Cluster, second: Any) -> None:
    here = coordination()
    name, home = new_thin(0)
    do(second, "adopt", "semaphore", name, home, UNBOUNDED)
    waiting = second.call.remote("acquire", name, None)
    with store_of(three_nodes) as store:
        wait_for_waiters(store, name, 1)
        clusterpool.kill(second)
        wait_for_waiters(store, name, 0)
    with pytest.raises(errors.ActorDied):
        clusterpool.get(waiting, timeout=LIMIT_S)
    here.release(name, UNBOUNDED)
    assert here.acquire(name, LIMIT_S) > 0


def test_a_channel_keeps_its_order_and_wakes_who_waits(three_nodes: Cluster, second: Any) -> None:
    here = coordination()
    name = here.new_name()
    do(second, "adopt", "channel", name, here.node_id)
    for number in range(50):
        here.put(name, b"%d" % number)
    assert do(second, "length", name) == 50
    assert [do(second, "get", name, 5) for _ in range(50)] == [b"%d" % number for number in range(50)]
    waiting = second.call.remote("get", name, LIMIT_S)
    with store_of(three_nodes) as store:
        wait_for_waiters(store, name, 1)
    here.put(name, b"")
    assert clusterpool.get(waiting, timeout=LIMIT_S) == b""
    assert here.get(name, 0) is None
    assert here.get(name, 0.05) is None


def test_a_cell_brings_its_bytes_and_its_changes(three_nodes: Cluster, second: Any) -> None:
    here = coordination()
    name = here.new_name()
    arena_path = api.runtime().client.registered.arena_path  # type: ignore[union-attr]
    cell_path(arena_path, here.node_id, name).write_bytes(b"\0first")
    do(second, "adopt", "cell", name, here.node_id)
    assert do(second, "read_cell", name, 0) == (1, b"\0first")
    assert do(second, "write_cell", name, b"second") == 2
    assert here.read_cell(name, 1) == (2, b"second")
    assert here.read_cell(name, 2) is None


def test_a_carrier_of_another_node_is_moved_for_the_driver(three_nodes: Cluster, second: Any) -> None:
    name, home = clusterpool.get(second.make.remote(1), timeout=LIMIT_S)
    assert home == three_nodes.second
    coordination().adopt("semaphore", name, home, UNBOUNDED)
    assert coordination().acquire(name, 0) > 0
    assert do(second, "is_moved", name)


def test_what_does_not_exist_is_lost(three_nodes: Cluster, second: Any) -> None:
    with pytest.raises(errors.ObjectLost, match="is not on node"):
        coordination().adopt("semaphore", "j0-d0-1", three_nodes.second, 1)
    with pytest.raises(errors.ObjectLost, match="has ended"):
        coordination().acquire("j0-d0-1", None)


def test_threads_of_one_process_wait_side_by_side(three_nodes: Cluster, second: Any) -> None:
    here = coordination()
    name, home = new_thin(0)
    do(second, "adopt", "semaphore", name, home, UNBOUNDED)
    tokens: list[int] = []
    threads = [threading.Thread(target=lambda: tokens.append(here.acquire(name, LIMIT_S))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for _ in threads:
        do(second, "release", name, UNBOUNDED)
    for thread in threads:
        thread.join(LIMIT_S)
    assert sorted(tokens) == [1, 2, 3, 4, 5]


def test_a_pair_takes_less_than_two_milliseconds(three_nodes: Cluster, second: Any) -> None:
    name, home = new_thin(1)
    do(second, "adopt", "semaphore", name, home, UNBOUNDED)
    # The quickest of many: the machine may be busy. The store runs on this machine, or it would be the network's time.
    clusters.wait_for(lambda: clusterpool.get(second.pair_s.remote(name, 300), timeout=LIMIT_S) < 0.002)


def test_the_end_of_a_job_removes_all_of_it_on_every_node(three_nodes: Cluster, driver: None) -> None:
    second, third = party(three_nodes.second), party(three_nodes.third)
    names = [new_thin(1)[0], clusterpool.get(second.make.remote(1), timeout=LIMIT_S)[0]]
    do(second, "adopt", "semaphore", names[0], three_nodes.head, 1)
    do(third, "adopt", "semaphore", names[1], three_nodes.second, 1)
    assert do(second, "acquire", names[0], None)
    job_id = api.runtime().client.job.job_id
    paths = [semaphore_path(three_nodes.head, names[0]), semaphore_path(three_nodes.second, names[1])]
    assert all(path.exists() for path in paths)
    clusterpool.shutdown()
    clusters.wait_for(lambda: not any(path.exists() for path in paths), what="the files are gone")
    with store_of(three_nodes) as store:

        def keys_left() -> list[Any]:
            return [key for key in store._run("KEYS", f"{store.keys.prefix}*") if job_id.encode() in key]

        clusters.wait_for(
            lambda: keys_left() == [f"{store.keys.prefix}ended_job:{job_id}".encode()],
            what="the control store has forgotten the job",
        )
        assert not any(b":waits:" in key for key in store._run("KEYS", f"{store.keys.prefix}*"))
