"""Pipes, listeners and managers between nodes: what is sent arrives, and every end is noticed at the other side."""

from __future__ import annotations

import hashlib
import os
import signal
from functools import partial
from typing import Any

import pytest

import clusterpool
from clusterpool.multiprocessing import connection, managers
from tests.cluster.clusters import Cluster

pytestmark = pytest.mark.cluster


def on(node_id: str, function: Any) -> Any:
    """The function as a remote one of that node."""
    return clusterpool.remote(function).options(scheduling=f"node:{node_id}", retries=0)


def digest_all(end: connection.Connection) -> tuple[str, str]:
    """Of all messages up to the end, and where."""
    digest = hashlib.sha256()
    while True:
        try:
            digest.update(end.recv_bytes())
        except EOFError:
            return digest.hexdigest(), clusterpool.node_id()


@pytest.mark.parametrize("duplex", [True, False])
def test_a_hundred_megabytes_through_a_pipe_to_another_node(three_nodes: Cluster, driver: None, duplex: bool) -> None:
    theirs, ours = connection.Pipe(duplex)
    result = on(three_nodes.second, digest_all).remote(theirs)
    theirs.close()
    block, digest = os.urandom(10_000_000), hashlib.sha256()
    for _ in range(10):
        ours.send_bytes(block)
        digest.update(block)
    ours.close()
    assert clusterpool.get(result, timeout=40) == (digest.hexdigest(), three_nodes.second)


def test_a_pipe_between_two_other_nodes_that_meets_here(three_nodes: Cluster, driver: None) -> None:
    def talk(end: connection.Connection, word: str) -> Any:
        end.send((word, clusterpool.node_id()))
        heard = end.recv()
        with pytest.raises(EOFError):
            end.send("bye")
            end.recv()
            end.recv()
        return heard

    def talk_and_close(end: connection.Connection, word: str) -> Any:
        end.send((word, clusterpool.node_id()))
        heard = end.recv()
        end.recv()
        end.send("bye")
        end.close()
        return heard

    first, second = connection.Pipe()
    heard = [
        on(three_nodes.second, talk).remote(first, "a"),
        on(three_nodes.third, talk_and_close).remote(second, "b"),
    ]
    first.close()
    second.close()
    assert clusterpool.get(heard, timeout=30) == [("b", three_nodes.third), ("a", three_nodes.second)]


def test_an_end_that_goes_from_node_to_node_keeps_its_order(three_nodes: Cluster, driver: None) -> None:
    def pass_on(end: connection.Connection) -> connection.Connection:
        end.send(clusterpool.node_id())
        return end

    ours, end = connection.Pipe()
    for node_id in (three_nodes.second, three_nodes.third, three_nodes.head):
        end = clusterpool.get(on(node_id, pass_on).remote(end), timeout=20)
    end.send("here")
    assert [ours.recv() for _ in range(4)] == [three_nodes.second, three_nodes.third, three_nodes.head, "here"]
    ours.send("and back")
    assert end.recv() == "and back"
    end.close()
    with pytest.raises(EOFError):
        ours.recv()


def test_a_listener_of_another_node(three_nodes: Cluster, driver: None) -> None:
    def serve(told: connection.Connection) -> str:
        with connection.Listener(authkey=b"k") as listener:
            told.send(listener.address)
            with listener.accept() as accepted:
                accepted.send(accepted.recv() * 2)
        return clusterpool.node_id()

    ours, theirs = connection.Pipe()
    served = on(three_nodes.third, serve).remote(theirs)
    theirs.close()
    address = ours.recv()
    assert connection.parse_address(address)[0] == three_nodes.third
    with connection.Client(address, authkey=b"k") as client:
        client.send(21)
        assert client.recv() == 42
        with pytest.raises(EOFError):
            client.recv()
    assert clusterpool.get(served, timeout=20) == three_nodes.third
    with pytest.raises(FileNotFoundError):
        connection.Client(address)


def test_proxies_of_one_manager_on_every_node(three_nodes: Cluster, driver: None) -> None:
    def work(counts: Any, items: Any, lock: Any) -> None:
        for _ in range(10):
            with lock:
                counts["all"] += 1
        items.append(clusterpool.node_id())

    with managers.SyncManager() as manager:
        assert connection.parse_address(manager.address)[0] == three_nodes.head  # where its driver is
        counts, items, lock = manager.dict(all=0), manager.list(), manager.Lock()
        done = [on(node_id, work).remote(counts, items, lock) for node_id in three_nodes.node_ids]
        clusterpool.get(done, timeout=30)
        assert counts["all"] == 30
        assert set(items) == three_nodes.node_ids


def test_a_worker_that_is_killed_ends_its_connections(three_nodes: Cluster, driver: None) -> None:
    def hold(end: connection.Connection) -> None:
        end.send(os.getpid())
        end.recv()

    ours, theirs = connection.Pipe()
    on(three_nodes.second, hold).remote(theirs)
    theirs.close()
    os.kill(ours.recv(), signal.SIGKILL)
    assert ours.poll(20)
    with pytest.raises((EOFError, ConnectionResetError)):
        ours.recv()


def test_an_initializers_connection_reaches_workers_of_other_nodes(three_nodes: Cluster, driver: None) -> None:
    ours, theirs = connection.Pipe(duplex=False)

    def send(end: connection.Connection, item: int) -> None:
        end.send((item, clusterpool.node_id()))

    for node_id in (three_nodes.second, three_nodes.third):
        for item in range(2):
            clusterpool.get(on(node_id, partial(send, theirs)).remote(item), timeout=30)
    theirs.close()
    nodes = [three_nodes.second, three_nodes.third]
    assert sorted(ours.recv() for _ in range(4)) == sorted((item, node) for node in nodes for item in range(2))
    with pytest.raises(EOFError):
        ours.recv()
    ours.close()
