"""Whatever somebody else writes to the keys of the control store is left out and told, and the rest goes on."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from clusterpool.control_store.actor_registry import ActorRegistry
from clusterpool.control_store.coordination import CarrierUnknown, CoordinationStore
from clusterpool.control_store.foreign_keys import kind_of, type_of
from clusterpool.control_store.job_registry import reconcile_jobs
from clusterpool.control_store.port import ActorDefinition, CallLog, EventsLost, package_digest
from clusterpool.control_store.store import ControlStore
from clusterpool.core.cluster_view import NodeLoad, NodeRecord
from clusterpool.core.coordination_events import GRANTED, WAITING, Contents
from clusterpool.core.membership import HeartbeatAnswer
from clusterpool.errors import LockLost
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
    assert ActorRegistry(store, "n1", posted.append).adopt_orphans([]) == []
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


# --- keys of other types than ours

OPERATIONS: list[tuple[str, Any]] = [
    ("register_node", lambda s: s.register_node(RECORD)),
    ("restore_node", lambda s: s.restore_node(RECORD, 1)),
    ("heartbeat", lambda s: s.heartbeat("n1", 1, LOAD)),
    ("list_nodes", lambda s: s.list_nodes()),
    ("find_node", lambda s: s.find_node("n1")),
    ("silent_nodes", lambda s: s.silent_nodes(1.0)),
    ("register_job", lambda s: s.register_job("j1", b"{}")),
    ("list_jobs", lambda s: s.list_jobs()),
    ("finish_job", lambda s: s.finish_job("j1")),
    ("create_actor", lambda s: s.create_actor(ACTOR, keeper="n1")),
    ("restore_actor", lambda s: s.restore_actor(ACTOR, keeper=("n1", 1))),
    ("update_actor", lambda s: s.update_actor("a1", (), "alive", {"address": "n1,w1"})),
    ("start_life", lambda s: s.start_life("a1", 0, "n1,w1", keeper="n1")),
    ("append_calls", lambda s: s.append_calls("a1", 0, 1, [b"call"])),
    ("store_checkpoint", lambda s: s.store_checkpoint("a1", 0, 1, b"state")),
    ("load_calls", lambda s: s.load_calls("a1")),
    ("get_creation", lambda s: s.get_creation("a1")),
    ("get_actor", lambda s: s.get_actor("a1")),
    ("find_actor", lambda s: s.find_actor("", "name")),
    ("list_actors", lambda s: s.list_actors()),
    ("orphaned_actors", lambda s: s.orphaned_actors()),
    ("end_life", lambda s: s.end_life("a1", 0, "over", teller="creator", keeper="n1")),
    ("put_package", lambda s: s.put_package(package_digest(b"p"), b"p")),
    ("get_package", lambda s: s.get_package(package_digest(b"p"))),
    ("publish_event", lambda s: s.publish_event("greeting", {})),
    ("last_event_id", lambda s: s.last_event_id()),
    ("read_events", lambda s: s.read_events(0)),
    ("create", lambda s: s.create(0, "j1-l", "lock", 1, Contents(tokens=1))),
    ("acquire", lambda s: s.acquire(0, "j1-l", "n1@1/w1/1", True)),
    ("waiting", lambda s: s.acquire(0, "j1-l", "n1@1/w2/1", True)),
    ("exists", lambda s: s.exists("j1-l")),
    ("value", lambda s: s.value("j1-l")),
    ("release", lambda s: s.release(0, "j1-l", 1, "n1@1/w1/1")),
    ("channel", lambda s: s.create(0, "j1-c", "channel", 0, Contents())),
    ("get", lambda s: s.get(0, "j1-c", "n1@1/w1/2", True)),
    ("put", lambda s: s.put(0, "j1-c", b"item")),
    ("length", lambda s: s.length("j1-c")),
    ("pop", lambda s: s.pop(0, "j1-c", "n1@1/w1/2")),
    ("cell", lambda s: s.create(0, "j1-v", "cell", 0, Contents(content=b"0"))),
    ("write_cell", lambda s: s.write_cell(0, "j1-v", b"1")),
    ("read_cell", lambda s: s.read_cell("j1-v", 0)),
    ("read_grants", lambda s: s.read_grants("0")),
    ("end_process", lambda s: s.end_process(0, "n1@1/w1/")),
    ("declare_node_dead", lambda s: s.declare_node_dead("n1", 1, "")),
    ("end_node_life", lambda s: s.end_node_life(0, "n1@1", True)),
    ("delete_job", lambda s: s.delete_job(0, "j1")),
]  # fmt: skip
ACTOR = ActorDefinition("a1", b"{}", "name", "", -1, True, b"creation")


def all_keys(store: Any) -> list[bytes]:
    return sorted(store._client.keys(store.keys.prefix + "*"))


def dumps(store: Any, keys: list[bytes]) -> list[bytes]:
    with store._client.pipeline() as pipeline:
        for key in keys:
            pipeline.dump(key)
        return list(pipeline.execute())


def set_back(store: Any, keys: list[bytes], contents: list[bytes]) -> None:
    with store._client.pipeline() as pipeline:
        pipeline.delete(*all_keys(store))
        for key, content in zip(keys, contents, strict=True):
            pipeline.restore(key, 0, content)
        pipeline.execute()


def test_no_operation_fails_whatever_type_of_key_it_finds(coordination: Told) -> None:
    """Before each operation, each key that is there in turn becomes one of another type."""
    store = coordination.store
    store.serve("n1")
    numbers = iter(range(1, 1 << 30))
    plain_do = store._do
    store._do = lambda script, _, name, *rest: plain_do(script, next(numbers), name, *rest)
    seen = set()
    for name, operation in OPERATIONS:
        keys = all_keys(store)
        contents = dumps(store, keys)
        for key in keys:
            is_string = type_of(key.decode()) == "string"
            coordination.write("DEL", key)
            coordination.write(*(("RPUSH", key, "x") if is_string else ("SET", key, "x")))
            coordination.kinds.clear()
            with contextlib.suppress(CarrierUnknown, LockLost, EventsLost):
                operation(store)
            if coordination.kinds:
                kind = kind_of(key.decode())
                seen.add(kind)
                assert coordination.kinds == [kind], (name, key)
                assert store._client.type(key).decode() in ("none", type_of(key.decode())), (name, key)
            set_back(store, keys, contents)
        operation(store)
    unused = {"ended_job", "package", "coordination_run"}  # not looked at, or only by a new connection
    assert seen >= {kind_of(key.decode()) for key in keys} - unused


@pytest.mark.parametrize(
    "kind", ["nodes", "node_incarnations", "node_heartbeats", "node_registrations", "jobs", "actors"]
)
def test_nodes_are_forgotten_and_not_fenced_when_a_key_of_theirs_is_lost(kind: str, told: Told) -> None:
    store = told.store
    incarnation = store.register_node(RECORD, 1)
    told.write("DEL", getattr(store.keys, kind))
    told.write("SET", getattr(store.keys, kind), "x")
    store.list_nodes()
    store.list_jobs()
    store.list_actors()
    other = ControlStore.connect(store.address)
    other.on_unreadable = store.on_unreadable
    other.register_node(OTHER, 1)
    other.close()
    assert store.heartbeat("n1", incarnation, LOAD) is HeartbeatAnswer.FORGOTTEN
    assert store.restore_node(RECORD, incarnation)
    assert store.heartbeat("n1", incarnation, LOAD) is HeartbeatAnswer.ACCEPTED
    assert [entry.record for entry in store.list_nodes().nodes] == [RECORD, OTHER]
    assert set(told.kinds) == {kind}


def test_counters_that_were_replaced_go_on_above_what_they_gave(coordination: Told) -> None:
    store = coordination.store
    store.serve("n1")
    first = store.register_node(RECORD)
    store.publish_event("greeting", {})
    for key in (store.keys.incarnation, store.keys.event_number, store.keys.prefix + "token_base"):
        coordination.write("DEL", key)
        coordination.write("RPUSH", key, "x")
    last_id = store.last_event_id()
    with pytest.raises(EventsLost):
        store.read_events(1)
    assert store.read_events(last_id) == []
    assert store.register_node(OTHER) > first
    store.create(1, "j1-l", "lock", 1, Contents(tokens=1))
    assert store.acquire(2, "j1-l", "n1/w1/1", False)[1] > 1 << 40
    assert sorted(coordination.kinds) == ["event_number", "token_base"]


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (("SET", "{}", "x"), "actor_log:a1"),
        (("DEL", "{}"), "actor_log:a1"),
        (("LPOP", "{}"), "actor_log:a1"),
        (("DEL", "{}"), "actor_creation:a1:1:0"),
    ],
)
@pytest.mark.parametrize("is_appended", [True, False])
def test_calls_of_an_actor_that_were_acknowledged_are_not_lost_untold(
    command: tuple[str, ...], key: str, is_appended: bool, coordination: Told
) -> None:
    store = coordination.store
    store.create_actor(ACTOR, keeper="n1")
    store.store_checkpoint("a1", 0, 1, b"state")
    store.append_calls("a1", 0, 2, [b"two", b"three"])
    assert store.load_calls("a1") == CallLog(b"state", 1, [b"two", b"three"])
    name = store.keys.prefix + key
    assert store._client.exists(name)
    coordination.write(*(word.format(name) for word in command))
    if is_appended:
        assert store.append_calls("a1", 0, 4, [b"four"]) == ("gap" if key == "actor_log:a1" else "ok")
    assert name in store.load_calls("a1").lost
    # The next checkpoint of the same life makes up for it.
    assert store.store_checkpoint("a1", 0, 4, b"newer") == "ok"
    assert store.append_calls("a1", 0, 5, [b"five"]) == "ok"
    assert store.load_calls("a1") == CallLog(b"newer", 4, [b"five"])


@pytest.mark.parametrize("kind", ["carrier", "waiters", "waits"])
def test_who_waits_for_what_was_lost_is_told_so(kind: str, coordination: Told) -> None:
    store = coordination.store
    store.serve("n1")
    life = f"n1@{store.register_node(RECORD)}"
    store.register_job("j1", b"{}")
    store.create(1, "j1-l", "lock", 1, Contents(tokens=1))
    assert store.acquire(2, "j1-l", f"{life}/w1/1", True)[0] == GRANTED
    assert store.acquire(3, "j1-l", f"{life}/w2/1", True)[0] == WAITING
    key = {"carrier": "carrier:j1-l", "waiters": "waiters:j1-l", "waits": f"waits:{life}"}[kind]
    coordination.write("DEL", store.keys.prefix + key)
    coordination.write("SET", store.keys.prefix + key, "x")
    with pytest.raises((CarrierUnknown, LockLost)):
        store.release(4, "j1-l", 1, f"{life}/w1/1")
        store.acquire(5, "j1-l", f"{life}/w3/1", True)
    told = {(grant.waiter, grant.token) for grant in store.read_grants("0")}
    assert (f"{life}/w2/1", 0) in told
    with pytest.raises(CarrierUnknown):
        store.acquire(6, "j1-l", f"{life}/w2/1", True)
