"""The death of a node, as a pipe to it sees it."""

from __future__ import annotations

import threading

import pytest

import clusterpool
from clusterpool.multiprocessing import connection
from tests.cluster.clusters import Cluster

pytestmark = pytest.mark.cluster


def test_a_node_that_is_killed_ends_its_connections(mortal_nodes: Cluster, driver: None) -> None:
    def flood(end: connection.Connection) -> None:
        end.send("ready")
        while True:
            end.recv()

    ours, theirs = connection.Pipe()
    on_second = clusterpool.remote(flood).options(scheduling=f"node:{mortal_nodes.second}", retries=0)
    on_second.remote(theirs)
    theirs.close()
    assert ours.recv() == "ready"
    broken: list[BaseException] = []

    def send() -> None:
        try:
            while True:
                ours.send_bytes(bytes(100_000))
        except OSError as exc:
            broken.append(exc)

    sender = threading.Thread(target=send)
    sender.start()
    mortal_nodes.kill(mortal_nodes.second)
    sender.join(20)
    assert broken
    assert isinstance(broken[0], ConnectionError)
    with pytest.raises((EOFError, ConnectionResetError)):
        ours.recv()
