"""Joining, silence, death, fencing and the outage of the store; no clock and no store."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from clusterpool.core.cluster_view import NodeEntry, NodeLoad, NodeRecord, NodesSnapshot
from clusterpool.core.membership import (
    DEAD_AFTER_S,
    ENDED_MAX,
    HEARTBEAT_PERIOD_S,
    SUSPECT_AFTER_S,
    Command,
    DeclareNodeDead,
    EventsMissed,
    FenceSelf,
    FindNode,
    HeartbeatAnswer,
    HeartbeatAnswered,
    HeartbeatDue,
    JoinRequested,
    LeaveRequested,
    Membership,
    NodeAbsent,
    NodeDied,
    NodeEventRead,
    NodeFound,
    NodeHeard,
    NodeJoined,
    NodeLeft,
    NodeSought,
    NodesRead,
    NodeSuspected,
    NodeTrusted,
    ProbeNode,
    ReadNodes,
    RefuseSelf,
    Registered,
    RegisterNode,
    RemoveNode,
    Restored,
    RestoreNode,
    SendHeartbeat,
    State,
    StoreFailed,
    WorkEnded,
)
from clusterpool.errors import InvalidTransition

LOAD = NodeLoad(available={"CPU": 1.0}, queue_length=2, arena_used_bytes=7)
GOOD, FENCED, FORGOTTEN = HeartbeatAnswer.ACCEPTED, HeartbeatAnswer.FENCED, HeartbeatAnswer.FORGOTTEN


def record(node_id: str) -> NodeRecord:
    return NodeRecord(node_id, f"host-{node_id}", 7000, f"key-{node_id}", {"CPU": 4.0}, {"zone": "a"})


def entry(node_id: str, beat: int = 0, *, incarnation: int = 1, silence_s: float = 0.0) -> NodeEntry:
    return NodeEntry(record(node_id), incarnation, beat, silence_s, LOAD)


def member(node_id: str = "n1", incarnation: int = 1) -> Membership:
    machine = Membership(node_id)
    machine.handle(JoinRequested(record(node_id)), 0.0)
    machine.handle(Registered(incarnation), 0.0)
    return machine


class Peers:
    """Lets a member read one snapshot per heartbeat period, in which the `beating` peers beat.

    `answering`: those that answer when they are asked whether they live; the questions are in `probes`.
    """

    def __init__(self, machine: Membership, peers: list[str]) -> None:
        self.machine = machine
        self.now_s = 0.0
        self.beat_by_node = dict.fromkeys(peers, 0)
        self.silent_since_s = dict.fromkeys(peers, 0.0)
        self.answering: dict[str, int] = {}
        self.probes: list[ProbeNode] = []

    def read(self, beating: list[str], *, after_s: float = HEARTBEAT_PERIOD_S) -> list[Command]:
        self.now_s += after_s
        for node_id in beating:
            self.beat_by_node[node_id] += 1
            self.silent_since_s[node_id] = self.now_s
        entries = [
            entry(node_id, beat, silence_s=self.now_s - self.silent_since_s[node_id])
            for node_id, beat in self.beat_by_node.items()
        ]
        commands = self.machine.handle(NodesRead(NodesSnapshot(entries)), self.now_s)
        self.probes = [command for command in commands if isinstance(command, ProbeNode)]
        for probe in self.probes:
            if probe.node_id in self.answering:
                heard = NodeHeard(probe.node_id, self.answering[probe.node_id])
                assert self.machine.handle(heard, self.now_s) == []
        return [command for command in commands if not isinstance(command, ProbeNode)]

    def read_until(self, kind: type[Any], beating: list[str], limit_s: float = 60.0) -> list[Command]:
        end_s = self.now_s + limit_s
        while self.now_s < end_s:
            found = [command for command in self.read(beating) if isinstance(command, kind)]
            if found:
                return found
        raise AssertionError(f"no {kind.__name__} within {limit_s} s")


def watching(*peers: str) -> Peers:
    machine = member()
    group = Peers(machine, list(peers))
    group.read(list(peers))
    return group


# Joining and the heartbeat


def versioned(node_id: str, python: str, clusterpool: str = "1", *, incarnation: int = 1) -> NodeEntry:
    node = msgspec.structs.replace(record(node_id), python_version=python, clusterpool_version=clusterpool)
    return NodeEntry(node, incarnation, 0, 0.0, LOAD)


@pytest.mark.parametrize(
    ("python", "clusterpool", "is_refused"),
    [
        ("3.11.2", "1", False),  # bug-fix releases may be mixed
        ("3.12.0", "1", True),
        ("3.11.9", "2", True),
    ],
)
def test_a_node_of_other_versions_than_those_before_it_leaves(python: str, clusterpool: str, is_refused: bool) -> None:
    machine = Membership("n2")
    machine.handle(JoinRequested(versioned("n2", python, clusterpool).record), 0.0)
    machine.handle(Registered(2), 0.0)
    assert not machine.is_settled
    snapshot = NodesSnapshot([versioned("n1", "3.11.9"), versioned("n2", python, clusterpool, incarnation=2)])
    commands = machine.handle(NodesRead(snapshot), 0.1)
    assert machine.is_settled is not is_refused
    if is_refused:
        remove, refuse = commands
        assert remove == RemoveNode(2)
        assert isinstance(refuse, RefuseSelf)
        for part in ("n1", "n2", python, "3.11.9"):
            assert part in refuse.reason
        assert machine.handle(HeartbeatDue(LOAD), 0.5) == []


def test_of_two_nodes_that_differ_only_the_later_one_leaves() -> None:
    machine = Membership("n1")
    machine.handle(JoinRequested(versioned("n1", "3.11.9").record), 0.0)
    machine.handle(Registered(1), 0.0)
    snapshot = NodesSnapshot([versioned("n1", "3.11.9"), versioned("n2", "3.12.0", incarnation=2)])
    machine.handle(NodesRead(snapshot), 0.1)
    assert machine.is_settled


def test_joining_registers_then_reads_then_beats() -> None:
    machine = Membership("n1")
    assert machine.handle(JoinRequested(record("n1")), 0.0) == [RegisterNode(record("n1"))]
    assert machine.handle(Registered(5), 0.1) == [ReadNodes()]
    machine.handle(NodesRead(NodesSnapshot([entry("n1", incarnation=5)])), 0.2)
    assert machine.handle(HeartbeatDue(LOAD), 0.5) == [SendHeartbeat(5, LOAD), ReadNodes()]


def test_only_one_heartbeat_and_one_read_are_under_way() -> None:
    machine = member()
    assert machine.handle(HeartbeatDue(LOAD), 0.5) == [SendHeartbeat(1, LOAD)]  # the first read is still under way
    assert machine.handle(HeartbeatDue(LOAD), 1.0) == []
    machine.handle(HeartbeatAnswered(GOOD, 1), 1.1)
    assert machine.handle(HeartbeatDue(LOAD), 1.5) == [SendHeartbeat(1, LOAD)]
    machine.handle(NodesRead(NodesSnapshot([])), 1.6)
    assert machine.handle(HeartbeatDue(LOAD), 2.0) == [ReadNodes()]


def test_registration_is_tried_again_when_the_store_was_away() -> None:
    machine = Membership("n1")
    machine.handle(JoinRequested(record("n1")), 0.0)
    assert machine.handle(HeartbeatDue(LOAD), 0.5) == [ReadNodes()]  # the question is still under way
    machine.handle(StoreFailed(), 0.6)
    assert machine.handle(HeartbeatDue(LOAD), 1.0) == [RegisterNode(record("n1"))]


def test_second_answer_to_a_repeated_registration_wins() -> None:
    machine = member(incarnation=3)
    assert machine.handle(Registered(4), 0.1) == []
    assert machine.incarnation == 4
    assert machine.handle(HeartbeatAnswered(FENCED, 3), 0.2) == []  # about the first


def test_machine_does_not_join_twice() -> None:
    with pytest.raises(InvalidTransition, match="JoinRequested"):
        member().handle(JoinRequested(record("n1")), 1.0)


# The view


def test_view_has_what_the_scheduler_needs() -> None:
    peers = watching("n2")
    view = peers.machine.view.get("n2")
    assert view is not None
    assert (view.address, view.public_key, view.labels) == (("host-n2", 7000), "key-n2", {"zone": "a"})
    assert (view.total, view.available) == ({"CPU": 4.0}, {"CPU": 1.0})
    assert (view.queue_length, view.arena_used_bytes, view.is_suspect) == (2, 7, False)


def test_node_without_a_heartbeat_yet_counts_as_wholly_free() -> None:
    machine = member()
    fresh = NodeEntry(record("n2"), 1, 1, 0.0, None)
    machine.handle(NodesRead(NodesSnapshot([fresh])), 0.5)
    view = machine.view.get("n2")
    assert view is not None
    assert view.available == {"CPU": 4.0}


def test_own_node_is_in_the_view_but_neither_announced_nor_a_peer() -> None:
    machine = member()
    commands = machine.handle(NodesRead(NodesSnapshot([entry("n1"), entry("n2")])), 0.5)
    assert [command.view.node_id for command in commands if isinstance(command, NodeJoined)] == ["n2"]
    assert [view.node_id for view in machine.view] == ["n1", "n2"]
    assert [view.node_id for view in machine.view.trusted_peers()] == ["n2"]
    assert (machine.view.total(), machine.view.available()) == ({"CPU": 8.0}, {"CPU": 2.0})


def test_version_of_the_view_grows_with_each_change() -> None:
    peers = watching("n2")
    before = peers.machine.view.version
    peers.machine.handle(NodeEventRead("node_died", "n2", 1), peers.now_s)
    assert peers.machine.view.version > before
    assert "n2" not in peers.machine.view


# Silence and death


def test_peer_that_beats_is_never_suspected() -> None:
    peers = watching("n2")
    assert [command for _ in range(100) for command in peers.read(["n2"])] == []


def test_silent_peer_is_suspected_then_declared_dead_within_five_seconds() -> None:
    peers = watching("n2", "n3")
    silent_since_s = peers.now_s
    assert peers.read_until(NodeSuspected, ["n3"]) == [NodeSuspected("n2")]
    assert peers.now_s - silent_since_s == pytest.approx(SUSPECT_AFTER_S)
    assert [view.node_id for view in peers.machine.view.trusted_peers()] == ["n3"]
    (declared,) = peers.read_until(DeclareNodeDead, ["n3"])
    assert (declared.node_id, declared.incarnation) == ("n2", 1)
    # The last heartbeat may have come a period before we first read it.
    assert peers.now_s - silent_since_s + HEARTBEAT_PERIOD_S < 5.0


def test_suspected_peer_that_beats_again_is_trusted() -> None:
    peers = watching("n2")
    peers.read_until(NodeSuspected, [])
    assert peers.read(["n2"]) == [NodeTrusted("n2")]
    assert [view.node_id for view in peers.machine.view.trusted_peers()] == ["n2"]


def test_death_is_declared_again_until_the_store_confirms_it() -> None:
    peers = watching("n2")
    peers.read_until(DeclareNodeDead, [])
    assert [type(command) for command in peers.read([])] == [DeclareNodeDead]
    event = NodeEventRead("node_died", "n2", 1, "it sent no heartbeat")
    assert peers.machine.handle(event, peers.now_s) == [NodeDied("n2", 1, "it sent no heartbeat")]
    assert peers.machine.handle(event, peers.now_s) == []


def test_a_peer_that_only_the_store_does_not_hear_is_neither_suspected_nor_declared_dead() -> None:
    peers = watching("n2", "n3")
    peers.answering = {"n2": 1}
    assert [command for _ in range(100) for command in peers.read(["n3"])] == []
    assert not any(view.is_suspect for view in peers.machine.view)
    # Its death is found as quickly as any other: counted from its last answer.
    peers.answering = {}
    silent_s = peers.now_s
    peers.read_until(DeclareNodeDead, ["n3"])
    assert peers.now_s - silent_s <= DEAD_AFTER_S + HEARTBEAT_PERIOD_S


def test_the_answer_of_another_life_of_a_peer_says_nothing() -> None:
    peers = watching("n2")
    peers.answering = {"n2": 7}
    peers.read_until(DeclareNodeDead, [], limit_s=DEAD_AFTER_S + 1)


def test_a_peer_that_beats_is_not_asked() -> None:
    peers = watching("n2")
    for _ in range(20):
        peers.read(["n2"])
        assert peers.probes == []


def test_a_peer_that_the_store_has_forgotten_is_kept_while_it_answers() -> None:
    peers = watching("n2")
    listed = peers.beat_by_node
    peers.beat_by_node = {}
    peers.answering = {"n2": 1}
    assert [command for _ in range(50) for command in peers.read([])] == []
    peers.beat_by_node = listed
    assert peers.read(["n2"]) == []  # at last it could restore itself


def test_silence_that_the_server_saw_before_our_read_counts() -> None:
    peers = watching("n2")
    peers.read([])
    # A heartbeat that came 0.4 s before this read.
    peers.beat_by_node["n2"] += 1
    peers.silent_since_s["n2"] = peers.now_s + 0.1
    peers.read([])
    heard_s = peers.now_s - 0.4
    peers.read_until(NodeSuspected, [])
    assert peers.now_s - heard_s < SUSPECT_AFTER_S + HEARTBEAT_PERIOD_S


def test_newcomer_does_not_believe_the_servers_clock_about_old_silence() -> None:
    machine = member()
    stale = entry("n2", beat=1, silence_s=3600.0)
    commands = machine.handle(NodesRead(NodesSnapshot([stale])), 0.5)
    assert [type(command) for command in commands] == [NodeJoined]


def test_node_that_is_no_member_declares_nobody_dead() -> None:
    machine = Membership("n1")
    peers = Peers(machine, ["n2"])
    commands = [command for _ in range(60) for command in peers.read([])]
    assert NodeSuspected("n2") in commands
    assert not any(isinstance(command, DeclareNodeDead) for command in commands)


# The store is away


@pytest.mark.parametrize("is_failure_reported", [True, False])
def test_nobody_is_declared_dead_because_the_store_was_away(is_failure_reported: bool) -> None:
    peers = watching("n2")
    if is_failure_reported:
        peers.machine.handle(StoreFailed("refused"), peers.now_s + 0.5)
    assert peers.read([], after_s=100.0) == []  # nobody could send a heartbeat in these 100 s
    assert peers.read([]) == []
    assert peers.read(["n2"]) == []


def test_short_failures_of_the_store_add_up_to_no_silence() -> None:
    peers = watching("n2")
    for _ in range(10):
        peers.machine.handle(StoreFailed("refused"), peers.now_s + 0.5)
        assert peers.read([], after_s=1.5) == []


def test_peer_that_was_nearly_dead_has_time_to_come_back_after_an_outage() -> None:
    peers = watching("n2")
    while peers.now_s < DEAD_AFTER_S - HEARTBEAT_PERIOD_S + 0.1:
        peers.read([])
    peers.machine.handle(StoreFailed(), peers.now_s)
    back_s = peers.now_s + 30.0
    peers.read([], after_s=30.0)
    peers.read_until(DeclareNodeDead, [])
    assert peers.now_s - back_s >= 2.0


def test_death_during_an_outage_is_found_after_it() -> None:
    peers = watching("n2", "n3")
    peers.machine.handle(StoreFailed(), peers.now_s)
    peers.read(["n3"], after_s=60.0)
    (declared,) = peers.read_until(DeclareNodeDead, ["n3"], limit_s=5.0)
    assert declared.node_id == "n2"


def test_our_own_long_pause_kills_nobody() -> None:
    peers = watching("n2")
    peers.read([])
    assert peers.read([], after_s=30.0) == []  # as after SIGSTOP and SIGCONT: the store never failed


# Leaving the list


def test_peer_that_vanished_without_an_event_is_dead_after_a_while() -> None:
    peers = watching("n2", "n3")
    del peers.beat_by_node["n2"]
    assert peers.read(["n3"]) == []
    (died,) = peers.read_until(NodeDied, ["n3"], limit_s=3.0)
    assert (died.node_id, died.incarnation) == ("n2", 1)


def test_store_that_lost_its_memory_kills_nobody_who_comes_back() -> None:
    peers = watching("n2")
    listed = peers.beat_by_node
    peers.beat_by_node = {}
    assert peers.read([], after_s=20.0) == []
    assert peers.read([]) == []
    peers.beat_by_node = listed
    assert peers.read(["n2"]) == []  # restored under the same incarnation: neither died nor joined
    assert [command for _ in range(10) for command in peers.read(["n2"])] == []


def test_leaving_is_no_death() -> None:
    peers = watching("n2")
    assert peers.machine.handle(NodeEventRead("node_left", "n2", 1), 1.0) == [NodeLeft("n2", 1)]


def test_snapshot_from_before_the_death_does_not_bring_the_node_back() -> None:
    peers = watching("n2")
    peers.machine.handle(NodeEventRead("node_died", "n2", 1, "silent"), peers.now_s)
    commands = peers.read(["n2"])
    assert [type(command) for command in commands] == [DeclareNodeDead]  # which the store ignores, if it knows
    assert "n2" not in peers.machine.view


def test_event_about_an_old_incarnation_does_not_hit_the_new_one() -> None:
    machine = member()
    machine.handle(NodesRead(NodesSnapshot([entry("n2", incarnation=7)])), 0.5)
    assert machine.handle(NodeEventRead("node_died", "n2", 6, "silent"), 0.6) == []
    assert "n2" in machine.view


def test_node_that_was_started_anew_died_and_joined() -> None:
    machine = member()
    machine.handle(NodesRead(NodesSnapshot([entry("n2", incarnation=7)])), 0.5)
    commands = machine.handle(NodesRead(NodesSnapshot([entry("n2", incarnation=8)])), 1.0)
    assert [type(command) for command in commands] == [NodeDied, NodeJoined]
    assert commands[0] == NodeDied("n2", 7, "it was started anew")


def test_ended_incarnations_that_are_remembered_are_bounded() -> None:
    machine = member()
    for number in range(ENDED_MAX + 10):
        machine.handle(NodeEventRead("node_died", f"x{number}", 1), 1.0)
    assert len(machine._ended_by_node) == ENDED_MAX


# Events of the stream


def test_join_event_makes_the_node_read_unless_it_already_does_or_knows() -> None:
    peers = watching("n2")
    machine = peers.machine
    assert machine.handle(NodeEventRead("node_joined", "n2", 1), 1.0) == []
    assert machine.handle(NodeEventRead("node_joined", "n3", 1), 1.0) == [ReadNodes()]
    assert machine.handle(NodeEventRead("node_joined", "n4", 1), 1.0) == []


def test_reader_that_missed_events_reads_the_nodes() -> None:
    peers = watching("n2")
    assert peers.machine.handle(EventsMissed(), 1.0) == [ReadNodes()]


# Fencing


@pytest.mark.parametrize(
    "event",
    [
        HeartbeatAnswered(FENCED, 3),
        NodeEventRead("node_died", "n1", 3, "it sent no heartbeat for 3.9 s"),
        NodesRead(NodesSnapshot([entry("n1", incarnation=4)])),
        Restored(False),
    ],
)
def test_fenced_node_ends_its_work_and_joins_anew(event: Any) -> None:
    machine = member(incarnation=3)
    machine.handle(NodesRead(NodesSnapshot([entry("n1", incarnation=3), entry("n2")])), 0.5)
    (fence,) = [command for command in machine.handle(event, 1.0) if isinstance(command, FenceSelf)]
    assert "n1 (incarnation 3)" in fence.reason
    assert machine.handle(event, 1.1) == [] or isinstance(event, NodesRead)
    assert machine.handle(HeartbeatDue(LOAD), 1.5) == []
    (register,) = machine.handle(WorkEnded(), 2.0)
    assert register in (RegisterNode(record("n1"), 3), RegisterNode(record("n1"), 4)), "above all that it has seen"
    assert machine.handle(Registered(9), 2.1)[-1:] in ([ReadNodes()], [])
    assert machine.state is State.MEMBER
    commands = machine.handle(NodesRead(NodesSnapshot([entry("n1", incarnation=9), entry("n2")])), 2.2)
    assert commands == [ProbeNode("n2", 1)]  # it neither mourns nor greets itself
    assert machine.handle(NodeEventRead("node_died", "n1", 3, "late"), 2.3) == []


def test_death_of_another_incarnation_of_ours_does_not_fence() -> None:
    machine = member(incarnation=3)
    assert machine.handle(NodeEventRead("node_died", "n1", 2, "old"), 1.0) == []
    assert machine.state is State.MEMBER


def test_forgotten_node_is_restored_and_keeps_its_work() -> None:
    machine = member(incarnation=3)
    machine.handle(HeartbeatDue(LOAD), 0.5)
    assert machine.handle(HeartbeatAnswered(FORGOTTEN, 3), 0.6) == [RestoreNode(record("n1"), 3)]
    assert machine.handle(Restored(True), 0.7) == []
    assert SendHeartbeat(3, LOAD) in machine.handle(HeartbeatDue(LOAD), 1.0)
    assert machine.incarnation == 3


# Leaving


def test_member_that_leaves_says_so_once_and_falls_silent() -> None:
    machine = member(incarnation=3)
    assert machine.handle(LeaveRequested(), 1.0) == [RemoveNode(3)]
    assert machine.handle(LeaveRequested(), 1.1) == []
    assert machine.handle(HeartbeatDue(LOAD), 1.5) == []
    assert machine.handle(HeartbeatAnswered(FENCED, 3), 1.6) == []
    assert machine.handle(NodeEventRead("node_left", "n1", 3), 1.7) == []


def test_registration_that_crossed_our_leaving_is_taken_back() -> None:
    machine = Membership("n1")
    machine.handle(JoinRequested(record("n1")), 0.0)
    assert machine.handle(LeaveRequested(), 0.1) == []
    assert machine.handle(Registered(3), 0.2) == [RemoveNode(3)]


@pytest.mark.parametrize(("suspect_after_s", "dead_after_s"), [(0, 1), (2, 2), (3, 2)])
def test_limits_must_be_in_order(suspect_after_s: float, dead_after_s: float) -> None:
    with pytest.raises(ValueError, match="suspect_after_s"):
        Membership("n1", suspect_after_s=suspect_after_s, dead_after_s=dead_after_s)


# --- one node that is sought


def test_a_sought_node_that_lives_again_has_joined_and_one_that_does_not_is_absent() -> None:
    machine = member()
    machine.handle(NodesRead(NodesSnapshot([entry("n1"), entry("n2")])), 0.0)
    machine.handle(NodeEventRead("node_died", "n2", 1), 0.0)
    assert machine.handle(NodeSought("n2"), 0.0) == [FindNode("n2")]
    assert machine.handle(NodeFound("n2", None), 0.0) == [NodeAbsent("n2")]
    assert machine.handle(NodeSought("n2"), 0.0) == [FindNode("n2")]
    (joined,) = machine.handle(NodeFound("n2", entry("n2", incarnation=2)), 0.0)
    assert isinstance(joined, NodeJoined) and joined.view.incarnation == 2
    assert machine.handle(NodeSought("n2"), 0.0) == [], "it is known"


def test_a_node_sought_again_before_the_answer_is_asked_for_again() -> None:
    machine = member()
    machine.handle(NodeEventRead("node_died", "n2", 1), 0.0)
    machine.handle(NodeSought("n2"), 0.0)
    assert machine.handle(NodeSought("n2"), 0.0) == []
    assert machine.handle(NodeFound("n2", None), 0.0) == [FindNode("n2")]
    assert machine.handle(NodeFound("n2", None), 0.0) == [NodeAbsent("n2")]
    machine.handle(NodeSought("n2"), 0.0)
    machine.handle(StoreFailed(), 0.0)
    assert machine.handle(NodeSought("n2"), 0.0) == [FindNode("n2")], "the store was away"


def test_a_sought_node_whose_ended_life_is_still_listed_is_absent() -> None:
    machine = member()
    machine.handle(NodeEventRead("node_died", "n2", 3), 0.0)
    machine.handle(NodeSought("n2"), 0.0)
    commands = machine.handle(NodeFound("n2", entry("n2", incarnation=3)), 0.0)
    assert commands[-1] == NodeAbsent("n2") and isinstance(commands[0], DeclareNodeDead)


def test_a_node_that_joins_anew_asks_for_a_number_above_all_that_it_has_seen() -> None:
    # The store may have been restored from a backup: what it gave since then it would give again.
    machine = member("n1", 4)
    machine.handle(NodesRead(NodesSnapshot([entry("n1", incarnation=4), entry("n2", incarnation=6)])), 0.0)
    machine.handle(NodeEventRead("node_died", "n3", 9), 0.0)
    machine.handle(HeartbeatAnswered(FENCED, 4), 0.0)
    assert machine.handle(WorkEnded(), 0.0) == [RegisterNode(record("n1"), 9)]


@pytest.mark.parametrize("has_heard_it", [False, True])
def test_a_newcomer_leaves_it_to_older_nodes_to_declare_dead_whom_it_has_never_heard(has_heard_it: bool) -> None:
    # A node that lost its way to the store before does not know of it, and cannot answer it. The others hear it.
    peers = Peers(member("n9", incarnation=9), ["n2", "n3"])
    if has_heard_it:
        peers.read(["n2", "n3"])
        peers.read(["n2", "n3"])
        (declared,) = peers.read_until(DeclareNodeDead, ["n2"], limit_s=DEAD_AFTER_S + 1)
        assert isinstance(declared, DeclareNodeDead) and declared.node_id == "n3"
        return
    for _ in range(30):
        assert not any(isinstance(command, DeclareNodeDead) for command in peers.read(["n2"]))
    declared_dead = set()
    for _ in range(20):  # nobody older is left
        declared_dead |= {each.node_id for each in peers.read([]) if isinstance(each, DeclareNodeDead)}
    assert declared_dead == {"n2", "n3"}
