"""Messages to nodes that are known, not known yet, or known to be over."""

from __future__ import annotations

from typing import Any

import pytest

from clusterpool.core import membership as ms
from clusterpool.core import wire
from clusterpool.core.cluster_view import NodeEntry, NodeRecord, NodesSnapshot
from clusterpool.core.membership import Membership
from clusterpool.core.messages import Address, LeaveNode, Relay
from clusterpool.core.routes import HELD_MAX, HOLD_S, Routes


class RecordedPeers:
    def __init__(self) -> None:
        self.sent: list[tuple[str, tuple[str, int], bytes]] = []
        self.forgotten: list[str] = []

    def send(self, node_id: str, address: tuple[str, int], frame: bytes) -> None:
        self.sent.append((node_id, address, wire.decode(frame).body))  # type: ignore[attr-defined]

    def forget(self, node_id: str) -> None:
        self.forgotten.append(node_id)


class Setting:
    """Node `na`, a member of a cluster, and what its routes did."""

    def __init__(self) -> None:
        self.peers = RecordedPeers()
        self.membership = Membership("na")
        self.membership.handle(ms.JoinRequested(record("na")), 0.0)
        self.membership.handle(ms.Registered(1), 0.0)
        self.returned: list[Relay] = []
        self.let_in: list[Relay] = []
        self.routes = Routes(self.peers, self.membership, self.returned.append, self.let_in.append)

    def list_nodes(self, *node_ids: str, now_s: float = 0.0) -> None:
        nodes = [NodeEntry(record(node_id), 1, 1, 0.0) for node_id in ("na", *node_ids)]
        self.membership.handle(ms.NodesRead(NodesSnapshot(nodes)), now_s)

    def end(self, node_id: str) -> None:
        self.membership.handle(ms.NodeEventRead("node_died", node_id, 1, "it was silent"), 0.0)
        self.routes.lost(node_id)


def record(node_id: str) -> NodeRecord:
    return NodeRecord(node_id, "127.0.0.1", ord(node_id[1]), "", {"CPU": 1.0})


def relay(node_id: str, body: bytes) -> Relay:
    return Relay(Address(node_id, "w1"), Address("na", "d1"), body)


@pytest.fixture
def setting() -> Setting:
    return Setting()


def test_a_known_node_is_sent_to_at_once(setting: Setting) -> None:
    setting.list_nodes("nb")
    setting.routes.send(relay("nb", b"1"), 0.0)
    assert setting.peers.sent == [("nb", ("127.0.0.1", ord("b")), b"1")]


def test_messages_to_a_node_not_heard_of_yet_wait_for_it_and_keep_their_order(setting: Setting) -> None:
    setting.routes.send(relay("nb", b"1"), 0.0)
    setting.routes.send(relay("nb", b"2"), 0.1)
    assert setting.peers.sent == [] and setting.returned == []
    setting.list_nodes("nb")
    setting.routes.send(relay("nb", b"3"), 0.2)  # before the news of its joining has been carried out
    setting.routes.joined("nb")
    assert [body for _, _, body in setting.peers.sent] == [b"1", b"2", b"3"]


def test_a_node_that_never_comes_is_waited_for_only_so_long(setting: Setting) -> None:
    setting.routes.send(relay("nb", b"1"), 1.0)
    setting.routes.time_passed(1.0 + HOLD_S - 0.1)
    assert setting.returned == []
    setting.routes.time_passed(1.0 + HOLD_S)
    assert [each.body for each in setting.returned] == [b"1"]


def test_what_is_meant_for_a_dead_node_comes_back_at_once(setting: Setting) -> None:
    setting.list_nodes("nb")
    setting.end("nb")
    assert setting.peers.forgotten == ["nb"]
    setting.routes.send(relay("nb", b"1"), 0.0)
    assert [each.body for each in setting.returned] == [b"1"]


def frame(incarnation: int, body: bytes = b"") -> Relay:
    return Relay(Address("na", "d1"), Address("nb", "w1"), body, incarnation)


def test_news_of_a_node_are_not_let_in_after_the_news_of_its_end(setting: Setting) -> None:
    assert setting.routes.admits("nb", frame(1), 0.0)  # not heard of yet
    setting.list_nodes("nb")
    assert setting.routes.admits("nb", frame(1), 0.0)
    setting.end("nb")
    assert not setting.routes.admits("nb", frame(1), 0.0)


@pytest.mark.parametrize("has_ended", [False, True])
def test_what_a_node_sends_in_its_next_life_waits_until_that_is_known(setting: Setting, has_ended: bool) -> None:
    setting.list_nodes("nb")
    if has_ended:
        setting.end("nb")
    assert not setting.routes.admits("nb", frame(2, b"1"), 0.0)
    assert not setting.routes.admits("nb", frame(2, b"2"), 0.0)
    assert setting.let_in == []
    nodes = [NodeEntry(record("na"), 1, 1, 0.0), NodeEntry(record("nb"), 2, 1, 0.0)]
    setting.membership.handle(ms.NodesRead(NodesSnapshot(nodes)), 0.0)
    setting.routes.joined("nb")
    assert [each.body for each in setting.let_in] == [b"1", b"2"]
    assert setting.routes.admits("nb", frame(2), 0.0)
    assert not setting.routes.admits("nb", frame(1), 0.0)


def test_a_life_that_never_begins_is_forgotten(setting: Setting) -> None:
    setting.list_nodes("nb")
    assert not setting.routes.admits("nb", frame(2), 1.0)
    setting.routes.time_passed(1.0 + HOLD_S)
    nodes = [NodeEntry(record("na"), 1, 1, 0.0), NodeEntry(record("nb"), 2, 1, 0.0)]
    setting.membership.handle(ms.NodesRead(NodesSnapshot(nodes)), 8.0)
    setting.routes.joined("nb")
    assert setting.let_in == []


def test_what_waits_is_bounded(setting: Setting) -> None:
    for number in range(HELD_MAX + 1):
        setting.routes.send(relay("nb", str(number).encode()), 0.0)
    assert [each.body for each in setting.returned] == [str(HELD_MAX).encode()]


def test_the_body_is_not_looked_at(setting: Setting) -> None:
    setting.list_nodes("nb")
    message: Any = wire.encode(LeaveNode())
    setting.routes.send(relay("nb", message), 0.0)
    assert setting.peers.sent[0][2] == message
