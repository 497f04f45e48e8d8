"""The way of a node to the control store: direct, or through a peer."""

from __future__ import annotations

from clusterpool.core.store_route import REST_S, AttemptFailed, AttemptWorked, DirectWorked, StoreRoute, UseWay

PEERS = ("head", "second", "third", "fourth")
SILENT = AttemptFailed(PEERS, had_no_answer=True)
REFUSED = AttemptFailed(PEERS, had_no_answer=False)


def test_a_silent_store_is_tried_through_a_peer_at_once_and_a_refusing_one_after_the_second_time() -> None:
    assert StoreRoute().handle(SILENT, 0) == [UseWay("head")]
    route = StoreRoute()
    assert route.handle(REFUSED, 0) == []
    assert route.handle(REFUSED, 1) == [UseWay("head")]
    assert route.peer == "head"


def test_failures_with_successes_between_them_do_not_count() -> None:
    route = StoreRoute()
    for now_s in range(10):
        assert route.handle(REFUSED, now_s) == []
        assert route.handle(AttemptWorked(), now_s) == []


def test_a_peer_is_kept_while_it_works_and_left_when_the_direct_way_does() -> None:
    route = StoreRoute()
    route.handle(SILENT, 0)
    for now_s in range(10):
        assert route.handle(AttemptWorked(), now_s) == []
    assert route.peer == "head"
    assert route.handle(DirectWorked(), 10) == [UseWay("")]
    assert route.handle(DirectWorked(), 10) == []


def test_a_peer_that_dies_is_followed_by_another() -> None:
    route = StoreRoute()
    route.handle(SILENT, 0)
    route.handle(AttemptWorked(), 1)
    left = AttemptFailed(("second", "third"), had_no_answer=False)
    assert route.handle(left, 2) == [UseWay("second")]


def test_when_no_peer_helps_the_store_itself_is_away_and_is_tried_directly() -> None:
    route = StoreRoute()
    ways = [command.peer for now_s in range(4) for command in route.handle(SILENT, now_s)]
    assert ways == ["head", "second", "third", ""]
    assert route.handle(SILENT, 3 + REST_S / 2) == []
    assert route.handle(SILENT, 4 + REST_S) == [UseWay("head")]


def test_a_node_without_peers_stays_with_the_direct_way() -> None:
    route = StoreRoute()
    alone = AttemptFailed((), had_no_answer=True)
    assert [command for now_s in range(20) for command in route.handle(alone, now_s)] == []
