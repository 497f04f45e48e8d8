"""How the nodes of a large cluster spare the control store."""

from __future__ import annotations

from clusterpool.control_store.membership_calls import feed_pause_s
from clusterpool.core.membership import SMALL_MAX

WAKE_S = 12e-6  # of the server, for each reader of each batch


def test_readers_of_the_feed_leave_the_server_time_however_many_they_are() -> None:
    for nodes_count in (100, 1000, 4000):
        assert nodes_count / feed_pause_s(nodes_count) * WAKE_S < 0.2, nodes_count
        assert feed_pause_s(nodes_count) <= 0.5


def test_in_a_small_cluster_nobody_rests() -> None:
    assert feed_pause_s(1) == feed_pause_s(SMALL_MAX) == 0
