"""What every control store must do; run on the fake and on a real server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from clusterpool.control_store.port import ActorDefinition, ControlStorePort, EventsLost, package_digest
from clusterpool.control_store.store import ControlStore
from clusterpool.core.cluster_view import NodeLoad, NodeRecord
from clusterpool.core.membership import HeartbeatAnswer
from clusterpool.errors import NameTaken
from clusterpool.simulation.fake_control_store import FakeControlStore

LOAD = NodeLoad(available={"CPU": 1.5}, queue_length=3, workers=2, arena_used_bytes=10, arena_size_bytes=100)
Connect = Callable[[], ControlStorePort]


def record(node_id: str = "n1") -> NodeRecord:
    return NodeRecord(node_id, "10.0.0.1", 7000, "key", {"CPU": 4.0}, labels={"zone": "é"})


@pytest.fixture(params=["fake", "real"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """A function that makes one more client of the same, empty store."""
    opened: list[ControlStorePort] = []
    if request.param == "fake":
        fake = FakeControlStore(time.monotonic)
        yield lambda: fake
        return
    url = request.getfixturevalue("server_url")
    cluster_id = f"c{time.monotonic_ns()}"

    def connect_real() -> ControlStorePort:
        opened.append(ControlStore.connect(url, cluster_id=cluster_id))
        return opened[-1]

    yield connect_real
    for store in opened:
        store.close()


@pytest.fixture
def store(connect: Connect) -> ControlStorePort:
    return connect()


def kinds(store: ControlStorePort, after_id: int = 0) -> list[str]:
    return [event.kind for event in store.read_events(after_id)]


# Nodes


def test_registered_node_is_listed_with_its_record(store: ControlStorePort) -> None:
    incarnation = store.register_node(record())
    (entry,) = store.list_nodes().nodes
    assert entry.record == record()
    assert entry.incarnation == incarnation
    assert entry.load is None
    assert 0 <= entry.silence_s < 5


def test_one_node_is_found_by_its_name(store: ControlStorePort) -> None:
    assert store.find_node("n1") is None
    incarnation = store.register_node(record("n1"))
    store.register_node(record("n2"))
    found = store.find_node("n1")
    assert found is not None
    assert (found.record, found.incarnation) == (record("n1"), incarnation) and 0 <= found.silence_s < 5
    store.declare_node_dead("n1", incarnation, "")
    assert store.find_node("n1") is None


def test_registration_that_is_made_again_is_the_same_one(store: ControlStorePort) -> None:
    first = store.register_node(record(), 1)
    assert store.register_node(record(), 1) == first
    assert store.heartbeat("n1", first, LOAD) is HeartbeatAnswer.ACCEPTED
    assert [event.kind for event in store.read_events(0)] == ["node_joined"]
    second = store.register_node(record(), 2)
    assert second > first
    assert store.register_node(record(), 1) == second  # it was late
    # That of a life that has ended meanwhile begins another.
    assert store.declare_node_dead("n1", second, "silent")
    assert store.register_node(record(), 2) > second


def test_incarnations_grow_over_all_nodes(store: ControlStorePort) -> None:
    incarnations = [store.register_node(record(node_id)) for node_id in ("n1", "n2", "n1", "n3")]
    assert incarnations == sorted(set(incarnations))


def test_heartbeat_brings_the_load_and_ends_the_silence(store: ControlStorePort) -> None:
    incarnation = store.register_node(record())
    before = store.list_nodes().nodes[0].heartbeat_us
    time.sleep(0.5)
    silent_s = store.list_nodes().nodes[0].silence_s
    assert silent_s >= 0.5
    assert store.heartbeat("n1", incarnation, LOAD) is HeartbeatAnswer.ACCEPTED
    entry = store.list_nodes().nodes[0]
    assert entry.load == LOAD
    assert entry.silence_s < silent_s
    assert entry.heartbeat_us >= before + 500_000


def test_silent_nodes_are_told_with_how_many_there_are(store: ControlStorePort) -> None:
    first = store.register_node(record("n1"))
    second = store.register_node(record("n2"))
    time.sleep(0.5)
    assert store.heartbeat("n2", second, LOAD) is HeartbeatAnswer.ACCEPTED
    report = store.silent_nodes(0.45)
    (silent,) = report.silent
    assert (silent.node_id, silent.incarnation) == ("n1", first)
    assert silent.heartbeat_us == store.list_nodes().nodes[0].heartbeat_us
    assert silent.silence_s >= 0.5
    assert (report.nodes, report.incarnation) == (2, second)
    assert store.remove_node("n1", first)
    assert (store.silent_nodes(0.45).silent, store.silent_nodes(0.0).nodes) == ([], 1)


def test_one_of_two_declares_a_node_dead_and_it_is_fenced(connect: Connect) -> None:
    one, two = connect(), connect()
    incarnation = one.register_node(record())
    assert [
        one.declare_node_dead("n1", incarnation, "silent"),
        two.declare_node_dead("n1", incarnation, "silent"),
    ] == [
        True,
        False,
    ]
    assert one.list_nodes().nodes == []
    assert one.heartbeat("n1", incarnation, LOAD) is HeartbeatAnswer.FENCED
    assert not one.restore_node(record(), incarnation)
    died = two.read_events(0)[-1]
    assert died.kind == "node_died"
    assert died.fields == {"node_id": "n1", "incarnation": str(incarnation), "reason": "silent"}


def test_death_of_an_old_incarnation_does_not_hit_the_new_one(store: ControlStorePort) -> None:
    old = store.register_node(record())
    new = store.register_node(record())
    assert store.heartbeat("n1", old, LOAD) is HeartbeatAnswer.FENCED
    assert not store.declare_node_dead("n1", old, "silent")
    assert store.heartbeat("n1", new, LOAD) is HeartbeatAnswer.ACCEPTED


def test_node_that_leaves_is_told_as_such(store: ControlStorePort) -> None:
    incarnation = store.register_node(record())
    assert not store.remove_node("n1", incarnation + 1)
    assert store.remove_node("n1", incarnation)
    assert kinds(store) == ["node_joined", "node_left"]


def test_restoring_a_node_that_is_still_listed_changes_nothing(store: ControlStorePort) -> None:
    incarnation = store.register_node(record())
    assert store.restore_node(record(), incarnation)
    assert kinds(store) == ["node_joined"]


def test_snapshot_and_events_meet_without_a_gap(store: ControlStorePort) -> None:
    store.register_node(record("n1"))
    snapshot = store.list_nodes()
    store.register_node(record("n2"))
    assert [event.fields["node_id"] for event in store.read_events(snapshot.last_event_id)] == ["n2"]


# Jobs


def test_job_is_listed_until_it_is_finished_once(store: ControlStorePort) -> None:
    store.register_job("j1", b'{"a":1}')
    store.register_job("j1", b'{"a":2}')  # as when the answer got lost
    assert store.list_jobs() == {"j1": b'{"a":2}'}
    assert [store.finish_job("j1", "done"), store.finish_job("j1", "done")] == [True, False]
    assert store.list_jobs() == {}
    assert kinds(store) == ["job_started", "job_finished"]


# Actors


def test_name_of_a_living_actor_is_taken(connect: Connect) -> None:
    one, two = connect(), connect()
    one.create_actor(ActorDefinition("a1", b"{}", name="counter", namespace="here"))
    with pytest.raises(NameTaken, match="a1"):
        two.create_actor(ActorDefinition("a2", b"{}", name="counter", namespace="here"))
    assert two.get_actor("a2") is None
    two.create_actor(ActorDefinition("a3", b"{}", name="counter", namespace="elsewhere"))
    found = two.find_actor("here", "counter")
    assert found is not None
    assert found.actor_id == "a1"


def test_creating_the_same_actor_twice_succeeds(store: ControlStorePort) -> None:
    for _ in range(2):  # as when the answer got lost
        store.create_actor(ActorDefinition("a1", b"{}", name="counter"))
    assert kinds(store) == ["actor_created"]


@pytest.mark.parametrize(
    ("first", "second"), [(("a", "b/c"), ("a/b", "c")), (('a"', "b"), ("a", '"b')), (("", "x"), ("x", ""))]
)
def test_names_are_not_confused_over_the_border_of_the_namespace(
    store: ControlStorePort, first: tuple[str, str], second: tuple[str, str]
) -> None:
    store.create_actor(ActorDefinition("a1", b"{}", namespace=first[0], name=first[1]))
    assert store.find_actor(*second) is None
    store.create_actor(ActorDefinition("a2", b"{}", namespace=second[0], name=second[1]))


def test_actor_changes_its_state_only_from_an_expected_one(store: ControlStorePort) -> None:
    store.create_actor(ActorDefinition("a1", b'{"class":"C"}'), state="pending")
    assert not store.update_actor("a1", ["alive"], "restarting")
    assert store.update_actor("a1", ["pending", "restarting"], "alive", {"node_id": "n1", "process_id": "w1"})
    assert store.update_actor("a1", [], "alive", {"process_id": "w2"})
    entry = store.get_actor("a1")
    assert entry is not None
    assert entry.record == b'{"class":"C"}'
    assert (entry.state, entry.fields) == ("alive", {"life": "0", "node_id": "n1", "process_id": "w2"})
    event = store.read_events(0)[1]
    assert event.fields == {
        "actor_id": "a1",
        "state": "alive",
        "previous_state": "pending",
        "node_id": "n1",
        "process_id": "w1",
    }
    assert not store.update_actor("a9", [], "alive")


def test_death_of_an_actor_frees_its_name_and_is_final(store: ControlStorePort) -> None:
    store.create_actor(ActorDefinition("a1", b"{}", name="counter"))
    assert store.update_actor("a1", ["pending"], "dead", {"reason": "killed"})
    assert store.find_actor("", "counter") is None
    assert store.list_actors() == []
    assert not store.update_actor("a1", [], "alive")
    entry = store.get_actor("a1")
    assert entry is not None
    assert entry.fields == {"life": "0", "reason": "killed"}
    store.create_actor(ActorDefinition("a2", b"{}", name="counter"))
    assert store.update_actor("a1", [], "dead")  # again: must not free the successor's name
    assert [actor.actor_id for actor in store.list_actors()] == ["a2"]
    assert store.find_actor("", "counter") is not None


def test_one_of_many_threads_gets_the_name(connect: Connect) -> None:
    stores = [connect() for _ in range(6)]
    winners: list[int] = []
    barrier = threading.Barrier(len(stores))

    def claim(number: int) -> None:
        barrier.wait()
        try:
            stores[number].create_actor(ActorDefinition(f"a{number}", b"{}", name="only"))
            winners.append(number)
        except NameTaken:
            pass

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1


# Packages


@pytest.mark.parametrize("size_bytes", [0, 1, (4 << 20) - 1, 4 << 20, 9_000_001])
def test_package_comes_back_whole(store: ControlStorePort, size_bytes: int) -> None:
    content = (b"0123456789\x00\xff" * (size_bytes // 12 + 1))[:size_bytes]
    digest = package_digest(content)
    assert not store.has_package(digest)
    assert store.get_package(digest) is None
    store.put_package(digest, content)
    store.put_package(digest, content)
    assert store.has_package(digest)
    assert store.get_package(digest) == content


def test_package_under_a_false_name_is_refused(store: ControlStorePort) -> None:
    with pytest.raises(ValueError, match="SHA-256"):
        store.put_package(package_digest(b"other"), b"content")


# Events


def test_events_come_in_order_and_number(store: ControlStorePort) -> None:
    assert store.last_event_id() == 0
    assert store.read_events(0) == []
    for number in range(1, 6):
        assert store.publish_event("worker_died", {"process_id": f"w{number}", "reason": "signal 9, é"}) == number
    events = store.read_events(1, count=3)
    assert [event.id for event in events] == [2, 3, 4]
    assert events[0].kind == "worker_died"
    assert events[0].fields == {"process_id": "w2", "reason": "signal 9, é"}
    assert store.last_event_id() == 5


def test_reader_behind_the_trimmed_stream_is_told(store: ControlStorePort) -> None:
    for _ in range(10_300):
        store.publish_event("tick", {})
    with pytest.raises(EventsLost):
        store.read_events(0)
    with pytest.raises(EventsLost):
        store.read_events(100)
    last_id = store.last_event_id()
    assert store.read_events(last_id) == []
    assert len(store.read_events(last_id - 10)) == 10


def test_reader_ahead_of_the_store_is_told(store: ControlStorePort) -> None:
    store.publish_event("tick", {})
    with pytest.raises(EventsLost):
        store.read_events(7)
