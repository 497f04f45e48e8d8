"""Lives and checkpoints of actors: what every control store must do; run on the fake and on a real server."""

from __future__ import annotations

import pytest

from clusterpool.control_store.port import ActorDefinition, CallLog, ControlStorePort
from tests.contracts.test_control_store_contract import Connect, connect, record

__all__ = ["connect"]


@pytest.fixture
def store(connect: Connect) -> ControlStorePort:
    store = connect()
    for node_id in ("n1", "n2", "n3"):
        store.register_node(record(node_id))
    return store


def field(store: ControlStorePort, name: str) -> str:
    entry = store.get_actor("a1")
    assert entry is not None
    return entry.state if name == "state" else entry.fields.get(name, "")


def kill_node(store: ControlStorePort, node_id: str) -> int:
    """Returns: its incarnation."""
    incarnation = next(node.incarnation for node in store.list_nodes().nodes if node.record.node_id == node_id)
    assert store.declare_node_dead(node_id, incarnation, "silent")
    return incarnation


def test_a_life_is_ended_once_and_its_ender_starts_the_next(store: ControlStorePort) -> None:
    store.create_actor(ActorDefinition("a1", b"{}", restarts=1, is_detached=True, creation=b"how"), keeper="n1")
    assert store.start_life("a1", 0, "n1,w1", keeper="n1")
    assert store.end_life("a1", 0, "killed", teller="host", keeper="n1", address="n1,w1") == "restart"
    # Asked again because the answer was lost; asked by another.
    assert store.end_life("a1", 0, "killed", teller="host", keeper="n1", address="n1,w1") == "restart"
    assert store.end_life("a1", 0, "killed", teller="host", keeper="n2") == "none"
    assert (field(store, "state"), field(store, "life"), field(store, "address")) == ("restarting", "1", "")
    assert not store.start_life("a1", 0, "n1,w1"), "a former life"
    assert store.start_life("a1", 1, "n2,w2", keeper="n2")
    assert store.end_life("a1", 0, "killed", teller="host", keeper="n1", address="n1,w1") == "none"
    assert store.get_creation("a1") == b"how"
    assert store.end_life("a1", 1, "killed again", teller="host", keeper="n2", address="n2,w2") == "dead"
    assert field(store, "state") == "dead"
    assert "killed again" in field(store, "text") and "after: killed" in field(store, "text")
    assert store.get_creation("a1") == b""
    assert not store.start_life("a1", 1, "n2,w2")


def test_a_life_whose_start_the_store_has_forgotten_is_ended_by_its_node(store: ControlStorePort) -> None:
    """The last second may be lost with a server; nobody else would ever tell of that end."""
    store.create_actor(ActorDefinition("a1", b"{}", restarts=2, is_detached=True), keeper="n1")
    assert store.end_life("a1", 0, "killed", teller="host", keeper="n2", address="n2,w1") == "restart"
    assert store.start_life("a1", 1, "n1,w2", keeper="n1")
    assert store.end_life("a1", 1, "killed", teller="host", keeper="n2", address="n2,w2") == "none", "not there"
    store.create_actor(ActorDefinition("a2", b"{}"), keeper="n1")
    assert store.end_life("a2", 0, "killed", teller="host", keeper="n2", address="n2,w1") == "none", "its creator tells"


def test_the_next_life_of_an_ordinary_actor_is_its_creators_to_start(store: ControlStorePort) -> None:
    store.create_actor(ActorDefinition("a1", b"{}", restarts=-1), keeper="n1")
    store.start_life("a1", 0, "n2,w1")
    assert store.end_life("a1", 0, "killed", teller="host", keeper="n2", address="n2,w1") == "none"
    for life in range(3):
        assert store.end_life("a1", life, "killed", teller="creator", keeper="n1") == "restart"
        store.start_life("a1", life + 1, f"n2,w{life}")
    store.create_actor(ActorDefinition("a2", b"{}"), keeper="n1")
    store.start_life("a2", 0, "n2,w1")
    assert store.end_life("a2", 0, "killed", teller="host", keeper="n2", address="n2,other") == "none"
    assert store.end_life("a2", 0, "killed", teller="host", keeper="n2", address="n2,w1") == "dead"
    assert store.end_life("a9", 0, "killed", teller="host", keeper="n2") == "none"


def test_the_detached_actors_of_a_dead_node_are_one_others_and_the_ordinary_ones_end(store: ControlStorePort) -> None:
    store.create_actor(ActorDefinition("a1", b"{}", restarts=2, is_detached=True), keeper="n1")
    store.start_life("a1", 0, "n2,w1", keeper="n2")
    store.create_actor(ActorDefinition("a2", b"{}", restarts=2), keeper="n2")
    assert store.orphaned_actors() == {}
    assert store.end_life("a1", 0, "no", teller="orphan", keeper="n3") == "none"
    incarnation = kill_node(store, "n2")
    assert store.orphaned_actors() == {"a1": "n2", "a2": "n2"}
    assert store.orphaned_actors([f"n2:{incarnation}"]) == {}, "who knows better than the store"
    outcomes = [store.end_life("a1", 0, "gone", teller="orphan", keeper=node_id) for node_id in ("n2", "n3", "n1")]
    assert outcomes == ["none", "restart", "none"], "n2 is no member, n3 was first"
    assert store.end_life("a2", 0, "gone", teller="orphan", keeper="n3") == "dead"
    assert store.orphaned_actors() == {}
    kill_node(store, "n3")
    store.register_node(record("n3"))
    assert store.orphaned_actors() == {"a1": "n3"}, "the node that comes back is another one"


def test_calls_are_logged_once_in_order_and_by_the_present_life_only(store: ControlStorePort) -> None:
    store.create_actor(ActorDefinition("a1", b"{}", restarts=-1, is_detached=True), keeper="n1")
    assert store.load_calls("a1") == CallLog(b"", 0, [])
    assert store.append_calls("a1", 0, 1, [b"one", b"two"]) == "ok"
    assert store.append_calls("a1", 0, 2, [b"two", b"three"]) == "ok"
    assert store.append_calls("a1", 0, 5, [b"five"]) == "gap"
    assert store.load_calls("a1") == CallLog(b"", 0, [b"one", b"two", b"three"])
    assert store.end_life("a1", 0, "killed", teller="host", keeper="n1") == "restart"
    assert store.append_calls("a1", 0, 4, [b"four"]) == "fenced"
    assert store.store_checkpoint("a1", 0, 3, b"state") == "fenced"
    assert store.append_calls("a1", 1, 4, [b"four"]) == "ok"
    assert store.load_calls("a1") == CallLog(b"", 0, [b"one", b"two", b"three", b"four"])


def test_a_life_that_is_told_of_after_a_loss_of_memory_makes_up_for_its_calls_by_a_checkpoint(
    store: ControlStorePort,
) -> None:
    for actor_id in ("a1", "a2"):
        definition = ActorDefinition(actor_id, b"{}", restarts=-1)
        assert store.restore_actor(definition, keeper=("n1", 1), life=3, address="n1,w1")
        assert store.load_calls(actor_id).lost, "should its process die before"
    for calls in (1, 7):
        assert store.append_calls("a1", 3, calls, [b"call"]) == "gap"
    assert store.store_checkpoint("a1", 3, 7, b"state") == "ok"
    assert store.append_calls("a1", 3, 8, [b"eight"]) == "ok"
    assert store.load_calls("a1") == CallLog(b"state", 7, [b"eight"])
    assert store.restore_actor(ActorDefinition("a3", b"{}", restarts=-1), keeper=("n1", 1))
    assert store.load_calls("a3") == CallLog(b"", 0, []), "it has not begun to live"


@pytest.mark.parametrize("size_bytes", [10, 9_000_000])
def test_a_checkpoint_takes_the_place_of_the_calls_that_it_covers(store: ControlStorePort, size_bytes: int) -> None:
    store.create_actor(ActorDefinition("a1", b"{}", restarts=-1, is_detached=True), keeper="n1")
    store.append_calls("a1", 0, 1, [b"one", b"two", b"three"])
    content = bytes(range(10)) * (size_bytes // 10)
    assert [store.store_checkpoint("a1", 0, 2, content) for _ in range(2)] == ["ok", "ok"]
    assert store.load_calls("a1") == CallLog(content, 2, [b"three"])
    assert store.store_checkpoint("a1", 0, 4, b"later") == "ok"  # the fourth call was never logged
    assert store.load_calls("a1") == CallLog(b"later", 4, [])
    assert store.append_calls("a1", 0, 5, [b"five"]) == "ok"
    assert store.load_calls("a1") == CallLog(b"later", 4, [b"five"])
    assert store.update_actor("a1", [], "dead")
    assert store.load_calls("a1").log == []
    assert store.load_calls("nobody") == CallLog(b"", 0, [])
    assert store.append_calls("a1", 0, 6, [b"six"]) == "gone"


def test_a_store_that_lost_its_memory_is_told_of_actors_as_they_are(store: ControlStorePort) -> None:
    actor = ActorDefinition("a1", b"{}", "one", "ns", restarts=3, is_detached=True, creation=b"how")
    assert store.restore_actor(actor, keeper=("n1", 1), life=1, address="n2,w1")
    assert not store.restore_actor(actor, keeper=("n1", 1), life=0)
    assert (field(store, "state"), field(store, "life"), field(store, "address")) == ("alive", "1", "n2,w1")
    found = store.find_actor("ns", "one")
    assert found is not None and found.actor_id == "a1"
    assert store.start_life("a1", 1, "n2,w1"), "it lives there"
    # One of three restarts was used before.
    assert store.end_life("a1", 1, "killed", teller="host", keeper="n1", address="n2,w1") == "restart"
    assert store.start_life("a1", 2, "n1,w2")
    assert store.end_life("a1", 2, "killed", teller="host", keeper="n1", address="n1,w2") == "restart"
    assert store.get_creation("a1") == b"how"
    assert store.start_life("a1", 3, "n1,w3")
    assert store.end_life("a1", 3, "killed", teller="host", keeper="n1", address="n1,w3") == "dead"


def test_a_name_that_is_anothers_by_now_stays_the_others(store: ControlStorePort) -> None:
    store.create_actor(ActorDefinition("a2", b"{}", name="one", namespace="ns"))
    assert store.restore_actor(ActorDefinition("a1", b"{}", name="one", namespace="ns"), keeper=("n1", 1))
    found = store.find_actor("ns", "one")
    assert found is not None and found.actor_id == "a2"
    assert field(store, "state") == "pending"
    assert store.update_actor("a1", (), "dead")
    found = store.find_actor("ns", "one")
    assert found is not None and found.actor_id == "a2"


def test_a_keeper_that_is_over_when_an_actor_is_restored_has_left_an_orphan(store: ControlStorePort) -> None:
    actor = ActorDefinition("a1", b"{}", is_detached=True, creation=b"how")
    assert store.restore_actor(actor, keeper=("n2", 77), address="n2,w1")
    assert store.orphaned_actors() == {"a1": "n2"}
