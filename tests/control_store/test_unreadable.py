"""Whatever somebody else writes to the keys of the control store is left out and told, and the rest goes on."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from clusterpool.control_store.actor_registry import ActorRegistry
from clusterpool.control_store.coordination import GRANTED, WAITING, CoordinationStore
from clusterpool.control_store.job_registry import reconcile_jobs
from clusterpool.control_store.port import ActorDefinition, EventsLost, package_digest
from clusterpool.control_store.store import ControlStore
from clusterpool.core.cluster_view import NodeLoad, NodeRecord
from clusterpool.core.coordination_events import Contents
from clusterpool.core.membership import HeartbeatAnswer
from tests.control_store.servers import embedded_server

RECORD = NodeRecord("n1", "10.0.0.1", 7000, "key", {"CPU": 4.0})
OTHER = NodeRecord("n2", "10.0.0.2", 7000, "key", {"CPU": 4.0})
LOAD = NodeLoad(available={"CPU": 1.0})
GARBAGE = [
    b"", b"\0", b"\xff\xfe", b"{", b"{}", b"null", b"[]", b"-1", b"1e999", b"nan", b"9" * 30, b"9" * 5000,
    b"[" * 100_000, pickle.dumps(RECORD),
    b'{"node_id": "n2", "host": "h", "port": 99999999, "public_key": "", "resources": {}}',
    b'{"node_id": "n2", "host": "h", "port": 1, "public_key": "", "resources": {"CPU": 1e300}}',
    b'{"node_id": "n2", "host": "h", "port": 1, "public_key": "", "resources": {}, "pid": 99999999999999999999}',
    b'{"available": {"CPU": -1e300}}',
]  # fmt: skip


class Told:
    """A store, and what it had to leave out."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.kinds: list[str] = []
        store.on_unreadable = lambda kind, text: self.kinds.append(kind)

    def write(self, *command: Any) -> None:
        """As another program would."""
        self.store._client.execute_command(*command)


def connected(kind: type[ControlStore]) -> Iterator[Told]:
    with embedded_server() as server:
        store = kind.connect(server.url)
        try:
            yield Told(store)
        finally:
            store.close()


@pytest.fixture
def told() -> Iterator[Told]:
    yield from connected(ControlStore)


@pytest.fixture
def coordination() -> Iterator[Told]:
    yield from connected(CoordinationStore)


@pytest.mark.parametrize("key", ["nodes", "node_incarnations"])
def test_a_node_whose_record_is_garbage_is_left_out_and_the_others_are_there(key: str, told: Told) -> None:
    store = told.store
    for record in (RECORD, OTHER):
        store.register_node(record)
    for garbage in GARBAGE:
        told.kinds.clear()
        told.write("HSET", getattr(store.keys, key), "n2", garbage)
        assert [entry.record for entry in store.list_nodes().nodes] == [RECORD], garbage[:100]
        assert told.kinds == ["nodes"]
    told.write("HSET", store.keys.nodes, b"\xff\xfe", b"")
    assert [entry.record for entry in store.list_nodes().nodes] == [RECORD]


def test_a_node_stays_listed_whose_heartbeat_is_garbage(told: Told) -> None:
    store = told.store
    incarnation = store.register_node(RECORD)
    for score in ("-5", "inf", "-inf", "1e300"):
        told.kinds.clear()
        told.write("ZADD", store.keys.node_heartbeats, score, "n1")
        (entry,) = store.list_nodes().nodes
        assert entry.silence_s == 0 and entry.load is None
        assert told.kinds == ["node_heartbeats"], score
        assert store.silent_nodes(1.0).silent == []  # the node's next heartbeat tells
    told.write("ZADD", store.keys.node_heartbeats, "7", b"\xff")
    assert store.silent_nodes(1.0).silent == []
    store.heartbeat("n1", incarnation, LOAD)
    for garbage in GARBAGE:
        told.kinds.clear()
        told.write("HSET", store.keys.node_loads, "n1", garbage)
        (entry,) = store.list_nodes().nodes
        assert entry.load is None
        assert told.kinds == ["node_loads"], garbage[:100]
    assert store.heartbeat("n1", incarnation, LOAD) is HeartbeatAnswer.ACCEPTED
    assert store.list_nodes().nodes[0].load == LOAD


@pytest.mark.parametrize("garbage", [b"", b"\xff", b"one", b"-5", b"inf", b"9223372036854775807"])
def test_counters_go_on_after_garbage(garbage: bytes, told: Told) -> None:
    store = told.store
    first = store.register_node(RECORD)
    for key in (store.keys.incarnation, store.keys.event_number, store.keys.generation):
        told.write("SET", key, garbage)
    told.write("HSET", store.keys.node_registrations, "n2", garbage)
    assert store.heartbeat("n1", first, LOAD) is HeartbeatAnswer.ACCEPTED
    second = store.register_node(OTHER, 1)
    assert second > first
    assert len(store.list_nodes().nodes) == 2
    last_id = store.last_event_id()
    number = store.publish_event("greeting", {})
    assert [(event.id, event.kind) for event in store.read_events(last_id)] == [(number, "greeting")]


@pytest.mark.parametrize(
    "entry",
    [
        ("*", "kind", "greeting"),  # an id of the server's making, far above our numbers
        ("2-0", "no", "kind"),
        ("2-1", "kind", "greeting"),
        ("2-0", "kind", b"\xff"),
        ("18446744073709551615-1", "kind", "greeting"),
    ],
)
def test_what_others_put_into_the_stream_of_events_is_taken_out(entry: tuple[Any, ...], told: Told) -> None:
    store = told.store
    assert store.publish_event("greeting", {}) == 1
    told.write("XADD", store.keys.events, *entry)
    assert store.read_events(1) == []
    assert told.kinds == ["events"]
    assert store.read_events(1) == [], "read again"
    assert told.kinds == ["events"]
    number = store.publish_event("farewell", {})
    try:
        (event,) = store.read_events(1)
    except EventsLost:  # then the reader begins anew
        (event,) = store.read_events(number - 1)
    assert (event.id, event.kind) == (number, "farewell")


def test_a_stream_that_is_none_is_made_anew(told: Told) -> None:
    told.write("SET", told.store.keys.events, "mine")
    number = told.store.publish_event("greeting", {})
    assert told.store.read_events(number - 1)[0].kind == "greeting"


def test_jobs_that_are_garbage_are_left_alone(told: Told) -> None:
    store = told.store
    for garbage in GARBAGE:
        told.kinds.clear()
        told.write("HSET", store.keys.jobs, "j1", garbage, b"\xff\xfe", garbage)
        reconcile_jobs(store, "n1", [], is_for_all=True, tell=store.on_unreadable)
        assert told.kinds == ["jobs", "jobs"], garbage[:100]


@pytest.mark.parametrize("field", ["record", "field:life", "field:error", "state", "name"])
def test_an_actor_that_is_garbage_is_one_that_nobody_knows(field: str, told: Told) -> None:
    posted: list[Any] = []
    registry = ActorRegistry(told.store, "n1", posted.append)
    garbage = b"x" if field == "field:error" else b"\xff\xfe"
    told.store.create_actor(ActorDefinition("a1", b"{}", "name"), keeper="n1")
    told.write("HSET", told.store.keys.actor("a1"), field, garbage)
    assert registry.get_actor("a1") is None
    assert registry.find_actor("", "name") is None
    assert told.kinds or posted[0].cause == "control store: actors"
    registry.end_life("a1", 0, "over", "creator", None)
    registry.bury_actor("a1", "over", "")


def test_actors_without_anything_else_are_left_out(told: Told) -> None:
    store = told.store
    told.write("HSET", store.keys.actor("a1"), b"\xff", b"\xff", "checkpoint_chunks", "1000000000000000000")
    told.write("SADD", store.keys.actors, "a1", b"\xff\xfe")
    told.write("HSET", store.keys.actor_names, '["","name"]', b"\xff\xfe")
    told.write("HSET", store.keys.actor_keepers, "a1", b"\xff", b"\xff", b":")
    assert store.list_actors() == [] and store.find_actor("", "name") is None
    posted: list[Any] = []
    assert ActorRegistry(store, "n1", posted.append).adopt_orphans() == []
    assert store.load_calls("a1").checkpoint == b""
    assert store.append_calls("a1", 0, 1, [b"call"]) in ("gone", "fenced")


def test_a_package_whose_head_is_garbage_is_uploaded_again(told: Told) -> None:
    content = b"content"
    digest = package_digest(content)
    for garbage in [*GARBAGE, b"1000000000000 5", b"1 5 7"]:
        told.write("SET", told.store.keys.package(digest), garbage)
        assert told.store.get_package(digest) is None
        told.store.put_package(digest, content)
        assert told.store.get_package(digest) == content


def test_grants_that_are_garbage_are_taken_out(coordination: Told) -> None:
    store = coordination.store
    store.serve("n1")
    store.create(1, "j1-lock", "lock", 1, Contents(tokens=1))
    assert store.acquire(2, "j1-lock", "n1/w1/1", True)[0] == GRANTED
    assert store.acquire(3, "j1-lock", "n1/w1/2", True)[0] == WAITING
    for fields in (("waiter", "n1/w1/9"), ("waiter", b"\xff", "name", "j1-lock", "token", "1"), ("token", "x")):
        coordination.write("XADD", store._grants, "*", *fields)
    coordination.write("SET", store.keys.prefix + "token_base", b"\xff")
    store.release(4, "j1-lock", 1, "n1/w1/1")
    (grant,) = store.read_grants("0")
    assert (grant.waiter, grant.name) == ("n1/w1/2", "j1-lock")
    assert coordination.kinds == ["grants"] * 3
    assert len(store.read_grants("0")) == 1 and coordination.kinds == ["grants"] * 3
