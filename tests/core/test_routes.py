"""Messages to nodes that are known, not known yet, or known to be over."""

from __future__ import annotations

from typing import Any

import pytest

from clusterpool.core import membership as ms
from clusterpool.core import wire
from clusterpool.core.cluster_view import NodeEntry, NodeRecord, NodesSnapshot
from clusterpool.core.membership import Membership
from clusterpool.core.messages import Address, LeaveNode, Relay
from clusterpool.core.routes import EARLY_BYTES_MAX, EARLY_HOLD_S, ENDED_HOLD_S, HELD_MAX, HOLD_S, Routes


class RecordedPeers:
    def __init__(self) -> None:
        self.sent: list[tuple[str, tuple[str, int], bytes]] = []
        self.lives: list[tuple[int, int]] = []
        self.forgotten: list[str] = []

    def send(self, node_id: str, address: tuple[str, int], frame: bytes) -> None:
        relay: Any = wire.decode(frame)
        self.sent.append((node_id, address, relay.body))
        self.lives.append((relay.from_life, relay.to_life))

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
        self.delivered: list[bytes] = []
        self.refused: list[str] = []
        self.sought: list[str] = []
        self.routes = Routes(
            self.peers, self.membership, self.returned.append, self.deliver,
            seek=self.sought.append, refuse=self.refused.append,
        )  # fmt: skip

    def deliver(self, relay: Relay) -> None:
        self.delivered.append(relay.body)

    def list_nodes(self, *node_ids: str, now_s: float = 0.0, life: int = 1) -> None:
        nodes = [NodeEntry(record(node_id), life, 1, 0.0) for node_id in node_ids]
        self.membership.handle(ms.NodesRead(NodesSnapshot(nodes)), now_s)

    def end(self, node_id: str, life: int = 1) -> None:
        self.membership.handle(ms.NodeEventRead("node_died", node_id, life, "it was silent"), 0.0)
        self.routes.lost(node_id)


def record(node_id: str) -> NodeRecord:
    return NodeRecord(node_id, "127.0.0.1", ord(node_id[1]), "", {"CPU": 1.0})


def relay(node_id: str, body: bytes) -> Relay:
    return Relay(Address(node_id, "w1"), Address("na", "d1"), body)


def from_there(from_life: int, to_life: int, body: bytes) -> Relay:
    return Relay(Address("na", "d1"), Address("nb", "w1"), body, from_life, to_life)


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


def test_what_is_meant_for_a_dead_node_comes_back_unless_it_joins_anew(setting: Setting) -> None:
    setting.list_nodes("nb")
    setting.end("nb")
    assert setting.peers.forgotten == ["nb"]
    setting.routes.send(relay("nb", b"1"), 0.0)
    setting.routes.time_passed(ENDED_HOLD_S)
    assert [each.body for each in setting.returned] == [b"1"]
    setting.routes.send(relay("nb", b"2"), 2.0)
    setting.list_nodes("nb", life=2)
    setting.routes.joined("nb")
    assert [body for _, _, body in setting.peers.sent] == [b"2"]


def test_the_second_message_to_a_dead_node_comes_back_at_once(setting: Setting) -> None:
    setting.list_nodes("nb")
    setting.end("nb")
    setting.routes.send(relay("nb", b"1"), 0.0)
    setting.routes.time_passed(ENDED_HOLD_S)
    setting.routes.send(relay("nb", b"2"), ENDED_HOLD_S + 0.1)
    assert [each.body for each in setting.returned] == [b"1", b"2"]
    # Not for ever: it may have joined anew meanwhile, and only we have not heard of that.
    setting.routes.send(relay("nb", b"3"), 2 * ENDED_HOLD_S)
    assert len(setting.returned) == 2
    setting.list_nodes("nb", life=2)
    setting.routes.joined("nb")
    assert [body for _, _, body in setting.peers.sent] == [b"3"]


def test_the_store_says_at_once_whether_a_dead_node_lives_again(setting: Setting) -> None:
    setting.list_nodes("nb")
    setting.end("nb")
    setting.routes.send(relay("nb", b"1"), 0.0)
    setting.routes.send(relay("nb", b"2"), 0.1)
    assert setting.sought == ["nb"], "asked once"
    setting.routes.absent("nb")
    assert [each.body for each in setting.returned] == [b"1"]
    assert setting.sought == ["nb", "nb"], "what came later may have come after the store had looked"
    setting.membership.handle(ms.NodeFound("nb", NodeEntry(record("nb"), 2, 1, 0.0)), 0.2)
    setting.routes.joined("nb")
    assert [body for _, _, body in setting.peers.sent] == [b"2"]
    setting.end("nb", life=2)
    setting.routes.send(relay("nb", b"3"), 0.3)
    assert setting.sought == ["nb"] * 3
    setting.routes.absent("nb")
    assert [each.body for each in setting.returned] == [b"1", b"3"]


def test_a_node_not_heard_of_yet_is_waited_for_whatever_the_store_lists(setting: Setting) -> None:
    # A store that lost its memory does not list those that have not restored themselves yet.
    setting.routes.send(relay("nb", b"1"), 0.0)
    setting.routes.absent("nb")
    assert setting.sought == [] and setting.returned == []


def test_a_message_to_a_dead_node_that_was_heard_again_is_held(setting: Setting) -> None:
    setting.list_nodes("nb", life=1)
    setting.end("nb", life=1)
    setting.routes.send(relay("nb", b"1"), 10.0)
    setting.routes.time_passed(10.0 + ENDED_HOLD_S)
    assert not setting.routes.arrived("nb", from_there(1, 1, b"old"), 0.0)
    setting.routes.send(relay("nb", b"2"), 11.1)
    assert [each.body for each in setting.returned] == [b"1", b"2"], "only its former life was heard"
    assert not setting.routes.arrived("nb", from_there(2, 1, b"new"), 0.0)
    setting.routes.send(relay("nb", b"3"), 11.2)
    setting.list_nodes("nb", life=2)
    setting.routes.joined("nb")
    assert [body for _, _, body in setting.peers.sent] == [b"3"] and setting.delivered == [b"new"]


def test_messages_name_the_lives_of_both_nodes(setting: Setting) -> None:
    setting.list_nodes("nb", life=4)
    setting.routes.send(relay("nb", b"1"), 0.0)
    assert setting.peers.lives == [(1, 4)]


def test_news_of_a_node_are_not_let_in_after_the_news_of_its_end(setting: Setting) -> None:
    setting.list_nodes("nb", life=2)
    assert setting.routes.arrived("nb", from_there(2, 1, b"1"), 0.0)
    setting.end("nb", life=2)
    assert not setting.routes.arrived("nb", from_there(2, 1, b"2"), 0.0)
    setting.list_nodes("nb", life=3)
    setting.routes.joined("nb")
    assert not setting.routes.arrived("nb", from_there(2, 1, b"3"), 0.0)  # it was under way for long
    assert setting.routes.arrived("nb", from_there(3, 1, b"4"), 0.0)
    assert setting.delivered == []


def test_news_of_a_life_not_heard_of_yet_wait_for_the_news_that_it_has_begun(setting: Setting) -> None:
    setting.list_nodes("nb", life=2)
    assert not setting.routes.arrived("nb", from_there(3, 1, b"1"), 0.0)
    assert not setting.routes.arrived("nb", from_there(3, 1, b"2"), 0.0)
    setting.list_nodes("nb", life=3)
    assert not setting.routes.arrived("nb", from_there(3, 1, b"3"), 0.0)  # it must not overtake the two
    setting.routes.joined("nb")
    assert setting.delivered == [b"1", b"2", b"3"]
    assert setting.routes.arrived("nb", from_there(3, 1, b"4"), 0.0)


def test_a_node_that_was_fenced_hears_nothing_meant_for_its_former_life_and_sends_nothing_from_it(
    setting: Setting,
) -> None:
    setting.list_nodes("nb", life=2)
    setting.membership.handle(ms.NodeEventRead("node_died", "na", 1, "it was silent"), 0.0)
    setting.routes.send(relay("nb", b"1"), 0.0)
    assert [each.body for each in setting.returned] == [b"1"] and setting.peers.sent == []
    assert not setting.routes.arrived("nb", from_there(2, 1, b"2"), 0.0)
    setting.membership.handle(ms.WorkEnded(), 0.0)
    assert not setting.routes.arrived("nb", from_there(2, 3, b"3"), 0.0)  # nb knows before we do
    setting.membership.handle(ms.Registered(3), 0.0)
    assert not setting.routes.arrived("nb", from_there(2, 1, b"4"), 0.0)
    setting.routes.time_passed(0.5)
    assert setting.delivered == [b"3"]
    setting.routes.send(relay("nb", b"5"), 0.0)
    assert setting.peers.lives == [(3, 2)]


def test_what_was_held_before_the_node_itself_was_a_member_goes_then(setting: Setting) -> None:
    setting.membership = Membership("na")
    setting.membership.handle(ms.JoinRequested(record("na")), 0.0)
    setting.routes = Routes(setting.peers, setting.membership, setting.returned.append, setting.deliver)
    setting.list_nodes("nb")
    setting.routes.send(relay("nb", b"1"), 0.0)
    assert setting.peers.sent == []
    setting.membership.handle(ms.Registered(1), 0.0)
    setting.routes.time_passed(0.5)
    assert [body for _, _, body in setting.peers.sent] == [b"1"]


@pytest.mark.parametrize(("from_life", "to_life"), [(2, 0), (1, 1), (0, 1), (0, 0)])
def test_what_comes_from_or_for_a_life_that_is_over_is_refused_and_told(
    from_life: int, to_life: int, setting: Setting
) -> None:
    setting.list_nodes("nb", life=2)
    setting.end("nb", life=1)
    assert not setting.routes.arrived("nb", from_there(from_life, to_life, b"again"), 0.0)
    (text,) = setting.refused
    assert f"from its life {from_life} to our life {to_life}" in text
    assert setting.routes.arrived("nb", from_there(2, 1, b"now"), 0.0) and len(setting.refused) == 1


def test_what_a_life_says_that_never_comes_is_held_for_so_long_and_no_more_of_it_than_fits(setting: Setting) -> None:
    setting.routes.time_passed(1.0)
    body = bytes(EARLY_BYTES_MAX // 4)
    for _ in range(5):
        assert not setting.routes.arrived("nb", from_there(7, 1, body), 0.0)
    assert len(setting.refused) == 1, "the fifth does not fit"
    setting.routes.time_passed(0.5 + EARLY_HOLD_S)
    assert len(setting.refused) == 1
    setting.routes.time_passed(1.0 + EARLY_HOLD_S)
    assert len(setting.refused) == 5
    assert not setting.routes.arrived("nb", from_there(7, 1, body), 0.0)
    assert len(setting.refused) == 5, "there is room again"


def test_what_waits_is_bounded(setting: Setting) -> None:
    for number in range(HELD_MAX + 1):
        setting.routes.send(relay("nb", str(number).encode()), 0.0)
    assert [each.body for each in setting.returned] == [str(HELD_MAX).encode()]


def test_the_body_is_not_looked_at(setting: Setting) -> None:
    setting.list_nodes("nb")
    message: Any = wire.encode(LeaveNode())
    setting.routes.send(relay("nb", message), 0.0)
    assert setting.peers.sent[0][2] == message


def test_what_comes_early_before_the_first_tick_is_kept_as_long_as_any(setting: Setting) -> None:
    up_s = 100_000.0  # of the host, long before this node began
    assert not setting.routes.arrived("nb", from_there(2, 1, b"early"), up_s)
    setting.routes.time_passed(up_s + 0.3)
    assert setting.refused == []
    setting.list_nodes("nb", life=2)
    setting.routes.joined("nb")
    assert setting.delivered == [b"early"]
