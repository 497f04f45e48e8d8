"""What a node tells a control store again that has lost its memory."""

from __future__ import annotations

from typing import Any

import pytest

from clusterpool.core.messages import ActorPart, Address, JobPart
from clusterpool.core.store_facts import CREATION_BYTES_MAX, StoreFacts

DRIVER = Address("n1", "d1")
HERE, THERE = Address("n1", "w1"), Address("n2", "w2")
JOB = JobPart("j1", "", "host", "/", [], "", {}, "", DRIVER)
ACTOR = ActorPart("a1", "Box", {}, None, "pending", "", name="box", namespace="ns")


def facts_with_actor() -> StoreFacts:
    facts = StoreFacts()
    facts.called("create_actor", {"actor": ACTOR, "creation": b"how"})
    return facts


def actor_call(
    *, life: int = 0, address: Address | None = None, creation: bytes = b"how"
) -> tuple[str, dict[str, Any]]:
    return ("restore_actor", {"actor": ACTOR, "creation": creation, "life": life, "address": address})


def test_running_jobs_are_told_again_and_finished_ones_are_not() -> None:
    facts = StoreFacts()
    arguments = {"job": JOB, "pid": 7}
    facts.called("register_job", arguments)
    assert facts.restore() == [("register_job", arguments)]
    facts.called("finish_job", {"job_id": "j1"})
    assert facts.restore() == [] and len(facts) == 0


def test_an_actor_is_told_again_where_it_lives_by_what_this_node_or_the_feed_said_last() -> None:
    facts = facts_with_actor()
    assert facts.restore() == [actor_call()]
    facts.called("start_life", {"actor_id": "a1", "life": 0, "address": HERE, "is_kept": False})
    assert facts.restore() == [actor_call(address=HERE)]
    facts.actor_changed("a1", "restarting", None, 1)
    assert facts.restore() == [actor_call(life=1)]
    facts.actor_changed("a1", "alive", THERE, 1)
    facts.actor_changed("a1", "alive", HERE, 0)  # late news of a former life
    assert facts.restore() == [actor_call(life=1, address=THERE)]


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        ("bury_actor", {"actor_id": "a1", "text": "", "error": ""}),
        ("retire_actor", {"actor_id": "a1", "address": HERE, "text": ""}),
        ("end_actors", {"actor_ids": ["a0", "a1"], "text": ""}),
        ("update_actor", {"actor": ActorPart("a1", "", {}, None, "dead", "")}),
    ],
)
def test_an_actor_that_this_node_ends_is_not_told_again(operation: str, arguments: dict[str, Any]) -> None:
    facts = facts_with_actor()
    facts.called(operation, arguments)
    assert len(facts) == 0


def test_an_actor_that_others_say_is_dead_is_not_told_again_and_others_are_not_taken_up() -> None:
    facts = facts_with_actor()
    facts.actor_changed("a2", "alive", THERE, 0)
    facts.actor_changed("a1", "dead", None, 0)
    assert len(facts) == 0


def test_a_creation_without_bound_is_not_kept() -> None:
    facts = StoreFacts()
    facts.called("create_actor", {"actor": ACTOR, "creation": b"x" * (CREATION_BYTES_MAX + 1)})
    assert facts.restore() == [actor_call(creation=b"")]
