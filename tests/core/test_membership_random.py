"""Clusters of membership machines on one fake store: nodes killed and paused, the store away or emptied.

Everything follows from the seed; a failure names it.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from clusterpool.control_store.membership_calls import MembershipCalls, feed_events
from clusterpool.control_store.port import EventsLost
from clusterpool.core.cluster_view import NodeLoad, NodeRecord
from clusterpool.core.membership import (
    SMALL_MAX,
    Command,
    EventsMissed,
    FenceSelf,
    HeartbeatDue,
    JoinRequested,
    Membership,
    NodeDied,
    NodeJoined,
    NodeLeft,
    NodeSuspected,
    NodeTrusted,
    ProbeNode,
    ReadNodes,
    State,
    StoreFailed,
    WorkEnded,
)
from clusterpool.errors import NotConnected
from clusterpool.simulation.fake_control_store import FakeControlStore

STEP_S = 0.05
LOAD = NodeLoad(available={"CPU": 1.0})
# Shorter pauses are promised to be harmless: the time to declare a death, less two periods and the steps.
HARMLESS_PAUSE_S = 2.5


class SimulatedNode:
    """Does what the shell does: carries out the commands on the store, reads the events after each tick."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.node_id = f"n{number}"
        self.machine = Membership(self.node_id)
        self.machine.small_max = world.small_max
        self.calls = MembershipCalls(self.node_id)
        self.is_alive = True
        self.paused_until_s = 0.0
        self.next_tick_s = world.now_s + world.chance.random() * 0.5
        self.event_id = world.store.last_event_id()
        self.fenced = 0
        self.lists = 0
        self.died_at_s: dict[str, float] = {}
        self.feed(JoinRequested(NodeRecord(self.node_id, "h", 1, "k", {"CPU": 4.0})))

    def step(self) -> None:
        now_s = self.world.now_s
        if not self.is_alive or now_s < max(self.paused_until_s, self.next_tick_s):
            return
        self.next_tick_s = now_s + 0.5 + self.world.chance.random() * 0.1
        self.feed(HeartbeatDue(LOAD))
        try:
            events = self.world.store.read_events(self.event_id)
        except NotConnected:
            self.feed(StoreFailed())
            return
        except EventsLost:
            self.event_id = self.world.store.last_event_id()
            self.feed(EventsMissed())
            return
        for event in feed_events(events):
            self.feed(event)
        self.event_id = events[-1].id if events else self.event_id

    def feed(self, event: Any) -> None:
        for command in self.machine.handle(event, self.world.now_s):
            try:
                answer = self.carry_out(command)
            except NotConnected as exc:
                answer = StoreFailed(str(exc))
            if answer is not None:
                self.feed(answer)

    def carry_out(self, command: Command) -> Any:
        match command:
            case FenceSelf():
                self.fenced += 1
                return WorkEnded()
            case NodeDied(node_id):
                self.died_at_s[node_id] = self.world.now_s
            case NodeJoined() | NodeLeft() | NodeSuspected() | NodeTrusted() | ProbeNode():
                pass
            case _:
                if isinstance(command, ReadNodes):
                    self.lists += 1
                answer = self.calls.carry_out(self.world.store, command)
                self.calls.answered(answer)
                return answer
        return None


class World:
    """`small_max`: of the memberships; 0 makes any number of nodes a large cluster."""

    def __init__(self, seed: int, nodes_count: int, small_max: int = SMALL_MAX) -> None:
        self.small_max = small_max
        self.chance = random.Random(seed)
        self.now_s = 1000.0
        self.store = FakeControlStore(lambda: self.now_s)
        self.nodes = [SimulatedNode(self, number) for number in range(nodes_count)]

    def run(self, duration_s: float) -> None:
        end_s = self.now_s + duration_s
        while self.now_s < end_s:
            self.now_s += STEP_S
            for node in self.nodes:
                node.step()

    def living(self) -> list[SimulatedNode]:
        return [node for node in self.nodes if node.is_alive]

    def check_agreement(self) -> None:
        """After a quiet time each living node knows exactly the living ones, under their own incarnations."""
        expected = {node.node_id: node.machine.incarnation for node in self.living()}
        for node in self.living():
            assert node.machine.state is State.MEMBER
            assert {view.node_id: view.incarnation for view in node.machine.view} == expected
            assert not any(view.is_suspect for view in node.machine.view)


small_and_large = pytest.mark.parametrize("small_max", [SMALL_MAX, 0], ids=["small", "large"])


@small_and_large
@pytest.mark.parametrize("seed", range(20))
def test_nobody_dies_of_short_pauses_or_of_the_store(seed: int, small_max: int) -> None:
    world = World(seed, nodes_count=6, small_max=small_max)
    world.run(3)
    for _ in range(12):
        match world.chance.randrange(3):
            case 0:
                world.chance.choice(world.nodes).paused_until_s = world.now_s + HARMLESS_PAUSE_S
            case 1:
                world.store.is_away = True
                world.run(world.chance.uniform(0.1, 30))
                world.store.is_away = False
            case 2:
                world.store.is_away = True
                world.run(world.chance.uniform(0.1, 3))
                world.store.lose_everything()
                world.store.is_away = False
        world.run(world.chance.uniform(3, 6))
    world.run(5)
    assert [(node.fenced, node.died_at_s) for node in world.nodes] == [(0, {})] * 6
    world.check_agreement()


@small_and_large
@pytest.mark.parametrize("seed", range(20))
def test_killed_node_is_dead_for_all_within_five_seconds(seed: int, small_max: int) -> None:
    world = World(seed, nodes_count=6, small_max=small_max)
    world.run(3 + world.chance.random())
    victim = world.chance.choice(world.nodes)
    victim.is_alive = False
    killed_s = world.now_s
    world.run(5)
    for node in world.living():
        assert list(node.died_at_s) == [victim.node_id]
        assert node.died_at_s[victim.node_id] - killed_s <= 5.0
    world.check_agreement()


@pytest.mark.parametrize("seed", range(3))
def test_half_of_a_large_cluster_dies_at_once_the_wardens_too_and_is_found_dead_within_five_seconds(seed: int) -> None:
    world = World(seed, nodes_count=50)
    world.run(4)
    victims = world.nodes[:20] + world.chance.sample(world.nodes[20:], 5)
    for victim in victims:
        victim.is_alive = False
    killed_s = world.now_s
    world.run(5)
    for node in world.living():
        assert set(node.died_at_s) == {victim.node_id for victim in victims}
        assert max(node.died_at_s.values()) - killed_s <= 5.0
    world.check_agreement()


def test_nodes_of_a_large_cluster_seldom_read_the_list() -> None:
    world = World(1, nodes_count=60)
    world.run(4)
    before = sum(node.lists for node in world.nodes)
    world.run(10)
    assert 100 <= sum(node.lists for node in world.nodes) - before <= 500  # instead of 1200
    world.check_agreement()


@small_and_large
@pytest.mark.parametrize("seed", range(30))
def test_survivors_agree_whatever_happened(seed: int, small_max: int) -> None:
    world = World(seed, nodes_count=8, small_max=small_max)
    for _ in range(25):
        node = world.chance.choice(world.living())
        match world.chance.randrange(5):
            case 0 if len(world.living()) > 3:
                node.is_alive = False
            case 1:
                node.paused_until_s = world.now_s + world.chance.uniform(0, 15)
            case 2:
                world.store.is_away = not world.store.is_away
            case 3:
                world.store.lose_everything()
            case 4 if not world.store.is_away:
                world.nodes.append(SimulatedNode(world, len(world.nodes)))
        world.run(world.chance.uniform(0, 6))
    world.store.is_away = False
    world.run(30)
    world.check_agreement()


def test_node_that_slept_through_its_death_is_fenced_and_joins_anew() -> None:
    world = World(0, nodes_count=3)
    world.run(3)
    sleeper = world.nodes[1]
    first = sleeper.machine.incarnation
    sleeper.paused_until_s = world.now_s + 8
    world.run(15)
    assert sleeper.fenced == 1
    assert sleeper.machine.incarnation > first
    world.check_agreement()
