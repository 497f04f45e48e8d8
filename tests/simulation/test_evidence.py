"""Which losses faults explain: only those of whom they have really ended."""

from __future__ import annotations

import pytest

from clusterpool.simulation.timeline import Violation
from clusterpool.simulation.world import Plan, World

DEATH = "task 7, attempt 1 of 1, ended with its worker: worker w1x1 on node n1 ended with -9"


@pytest.fixture
def world() -> World:
    return World(Plan(3, nodes=3, drivers=1, faults=0))


@pytest.mark.parametrize(
    ("cause", "is_explained"),
    [("fault", True), ("task", True), ("host", True), ("fenced", True), ("orphaned", True),
     ("asked", False), ("itself", False)],
)  # fmt: skip
def test_the_end_of_a_process_explains_a_loss_only_if_nobody_wanted_it(
    world: World, cause: str, is_explained: bool
) -> None:
    assert world.evidence.doubt("worker_died", DEATH), "a living worker is blamed"
    party = world.drivers[0]
    party.name, party.cause = "w1x1", cause
    world.evidence.ended(party)
    assert (world.evidence.doubt("worker_died", DEATH) == "") is is_explained
    assert world.evidence.doubt("worker_died", DEATH.replace("w1x1", "w1x2")), "another one is blamed"


def test_a_living_node_may_be_taken_for_dead_only_if_nobody_could_hear_it(world: World) -> None:
    world.run()  # so that all nodes know each other
    with pytest.raises(Violation, match="it could be heard"):
        world.evidence.taken_for_dead("n2", "it sent no heartbeat for 3.8 s")
    world.evidence.struck("n2", "store_cut")
    with pytest.raises(Violation, match="it could be heard"):
        world.evidence.taken_for_dead("n2", "it sent no heartbeat for 3.8 s")
    world.evidence.struck("n2", "partition")
    world.evidence.taken_for_dead("n2", "it sent no heartbeat for 3.8 s")
    world.evidence.struck("n3", "frozen")
    world.evidence.taken_for_dead("n3", "it sent no heartbeat for 3.8 s")


def test_a_task_may_not_be_given_up_before_its_last_attempt(world: World) -> None:
    from clusterpool.simulation.programs import Outcome

    world.evidence.submitted("d1", 7, 1)
    world.evidence.sent("d1", 7)
    with pytest.raises(Violation, match="after 1 attempts of 2"):
        world.evidence.check_attempts("d1", 7, Outcome("worker_died", 0))
    world.evidence.sent("d1", 7)
    world.evidence.check_attempts("d1", 7, Outcome("worker_died", 0))


def test_what_a_control_store_has_forgotten_explains_what_its_carriers_have_lost_and_nothing_else(world: World) -> None:
    world.evidence.forgotten({"j1-d1-4": "one", "j1-d1-5": "two"}, {"j1-d1-4": "one", "j1-d1-5": "one"})
    assert world.evidence.doubt("carrier_lost", "the cluster has no j1-d1-4 (any more)")
    assert world.evidence.doubt("carrier_lost", "the cluster has no j1-d1-5 (any more)") == ""
