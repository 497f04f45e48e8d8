"""What semaphores, channels and cells in every control store must do; run on the fake and on a real server."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from clusterpool.control_store.coordination import CarrierUnknown, CoordinationPort, CoordinationStore
from clusterpool.core.cluster_view import NodeRecord
from clusterpool.core.coordination_events import GRANTED, LIFE_OVER, REFUSED, WAITING, Contents
from clusterpool.errors import LockLost
from clusterpool.simulation.fake_coordination import FakeCoordination

Connect = Callable[[str], Any]
A1, A2, B1, B2 = "na/w1/1", "na/w2/1", "nb/w1/1", "nb/w1/2"
LOCK, SEMAPHORE, CHANNEL, CELL = "j1-d1-1", "j1-d1-2", "j1-d1-3", "j1-d1-4"
UNBOUNDED = 2**31 - 1


class Numbered:
    """Counts the operations for the tests; `again` sends the last one once more, as after a lost answer."""

    QUESTIONS = frozenset({"exists", "value", "length", "read_cell", "read_grants", "drop_grants"})

    def __init__(self, port: CoordinationPort) -> None:
        self._port = port
        self._numbers = itertools.count(1)
        self.again: Callable[[], Any] = lambda: None

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._port, name)
        if name in self.QUESTIONS:
            return operation

        def call(*arguments: Any) -> Any:
            number = next(self._numbers)
            self.again = lambda: operation(number, *arguments)
            return operation(number, *arguments)

        return call


class Stores:
    """Two nodes' ways to one store."""

    def __init__(self, connect: Connect, enlist: Callable[[str], int], keys: Callable[[], list[str]]) -> None:
        self.a = Numbered(connect("na"))
        self.b = Numbered(connect("nb"))
        self.enlist = enlist  # begin a life of this node; its incarnation
        self.keys = keys  # what of the job j1 is left


@pytest.fixture(params=["fake", "real"])
def stores(request: pytest.FixtureRequest) -> Iterator[Stores]:
    if request.param == "fake":
        fake = FakeCoordination()
        numbers = itertools.count(1)

        def enlist_fake(node_id: str) -> int:
            fake.incarnations[node_id] = next(numbers)
            return fake.incarnations[node_id]

        yield Stores(fake.client, enlist_fake, lambda: [*fake.carriers, *fake.holds])
        return
    url = request.getfixturevalue("server_url")
    cluster_id = f"c{time.monotonic_ns()}"
    opened: list[CoordinationStore] = []

    def connect(node_id: str) -> CoordinationStore:
        store = CoordinationStore.connect(url, cluster_id=cluster_id)
        opened.append(store)
        store.serve(node_id)
        return store

    def enlist(node_id: str) -> int:
        return opened[0].register_node(NodeRecord(node_id, "10.0.0.1", 7000, "key", {"CPU": 4.0}))

    def keys() -> list[str]:
        prefix = opened[0].keys.prefix
        names = [key.decode().removeprefix(prefix) for key in opened[0]._run("KEYS", f"{prefix}*")]
        return [name for name in names if name.split(":")[0] in ("carrier", "waiters", "items", "waits", "carriers")]

    yield Stores(connect, enlist, keys)
    for store in opened:
        store.close()


@pytest.fixture
def a(stores: Stores) -> Any:
    """The store as node na has it, with a lock, an empty semaphore, a channel and a cell."""
    a = stores.a
    assert a.create(LOCK, "lock", 1, Contents(1))
    assert a.create(SEMAPHORE, "semaphore", UNBOUNDED, Contents())
    assert a.create(CHANNEL, "channel", 0, Contents(items=[b"first", b"\x80second\0"]))
    assert a.create(CELL, "cell", 0, Contents(content=b"\0bytes"))
    return a


@pytest.fixture
def b(stores: Stores, a: Any) -> Any:
    """The same store as node nb has it."""
    return stores.b


def grants(store: Any) -> list[tuple[str, str]]:
    return [(grant.waiter, grant.name) for grant in store.read_grants("0")]


# Semaphores


def test_a_token_is_taken_and_given_back(a: Any, b: Any) -> None:
    assert a.value(LOCK) == 1
    assert a.acquire(LOCK, A1, True) == (GRANTED, 1)
    assert b.acquire(LOCK, B1, False) == (REFUSED, 0)
    assert b.value(LOCK) == 0
    assert a.release(LOCK, 1)
    assert b.acquire(LOCK, B1, False) == (GRANTED, 2)


def test_who_waits_gets_the_token_of_a_release_in_the_order_of_coming(a: Any, b: Any) -> None:
    assert a.acquire(SEMAPHORE, A1, True) == (WAITING, 0)
    assert b.acquire(SEMAPHORE, B1, True) == (WAITING, 0)
    assert a.acquire(SEMAPHORE, A2, True) == (WAITING, 0)
    for _ in range(4):
        assert b.release(SEMAPHORE, UNBOUNDED)
    first, third = a.read_grants("0")
    (second,) = b.read_grants("0")
    assert [first.waiter, second.waiter, third.waiter] == [A1, B1, A2]
    assert [first.token, second.token, third.token] == [1, 2, 3]
    assert a.value(SEMAPHORE) == 1


def test_grants_are_kept_until_they_are_dropped(a: Any, b: Any) -> None:
    for waiter in (A1, A2):
        a.acquire(SEMAPHORE, waiter, True)
        b.release(SEMAPHORE, UNBOUNDED)
    first, second = a.read_grants("0")
    assert a.read_grants(first.id) == [second]
    a.drop_grants(first.id)
    assert a.read_grants("0") == [second]
    a.drop_grants(second.id)
    assert a.read_grants("0") == []


def test_a_release_beyond_the_maximum_is_refused(a: Any) -> None:
    assert not a.release(LOCK, 1)
    assert a.value(LOCK) == 1


@pytest.mark.parametrize("operation", ["release", "acquire", "value", "put", "get", "length", "read_cell"])
def test_what_was_never_created_is_unknown(a: Any, operation: str) -> None:
    arguments = {"release": (1,), "acquire": (A1, True), "put": (b"x",), "get": (A1, True), "read_cell": (0,)}
    with pytest.raises(CarrierUnknown):
        getattr(a, operation)("j1-d1-99", *arguments.get(operation, ()))


def test_creating_again_changes_nothing(a: Any, b: Any) -> None:
    a.acquire(LOCK, A1, True)
    assert b.create(LOCK, "lock", 1, Contents(1))
    assert a.value(LOCK) == 0
    assert a.exists(LOCK) and not a.exists("j1-d1-99")


@pytest.mark.parametrize("name", [SEMAPHORE, LOCK])
def test_an_operation_that_is_sent_twice_takes_effect_once(a: Any, b: Any, name: str) -> None:
    a.acquire(LOCK, "na/d1/1", True)
    assert a.acquire(name, A1, True) == a.again() == (WAITING, 0)
    assert b.release(name, UNBOUNDED) and b.again()
    assert grants(a) == [(A1, name)]
    assert a.value(name) == 0
    assert b.acquire(name, B1, False) == b.again() == (REFUSED, 0)
    assert a.release(name, UNBOUNDED) and a.again()
    assert b.acquire(name, B1, False) == b.again() == (GRANTED, 3 if name == LOCK else 2)


def test_a_waiter_that_asks_again_is_not_entered_twice(a: Any, b: Any) -> None:
    a.acquire(LOCK, "na/d1/1", True)
    assert a.acquire(LOCK, A1, True) == (WAITING, 0)
    assert a.acquire(LOCK, A1, True) == (WAITING, 0)
    b.release(LOCK, 1)
    assert a.acquire(LOCK, A1, True) == (GRANTED, 2)
    a.release(LOCK, 1)
    assert a.value(LOCK) == 1


def test_a_cancelled_wait_is_skipped(a: Any, b: Any) -> None:
    a.acquire(SEMAPHORE, A1, True)
    b.acquire(SEMAPHORE, B1, True)
    assert a.cancel(SEMAPHORE, A1)
    a.release(SEMAPHORE, UNBOUNDED)
    assert grants(a) == [] and grants(b) == [(B1, SEMAPHORE)]


@pytest.mark.parametrize("name", [SEMAPHORE, LOCK, CHANNEL])
def test_a_grant_that_came_too_late_goes_to_the_next(a: Any, b: Any, name: str) -> None:
    if name == LOCK:
        a.acquire(LOCK, "na/d1/1", True)
    if name == CHANNEL:
        a.get(CHANNEL, A1, True), a.get(CHANNEL, A1, True)
    wait = a.get if name == CHANNEL else a.acquire
    assert wait(name, A2, True)[0] == WAITING
    assert (b.get if name == CHANNEL else b.acquire)(name, B1, True)[0] == WAITING
    if name == CHANNEL:
        a.put(CHANNEL, b"third")
    else:
        a.release(name, UNBOUNDED)
    assert grants(a) == [(A2, name)]
    assert not a.cancel(name, A2)
    assert a.give_back(name, A2)
    assert grants(b) == [(B1, name)]


def test_only_the_token_that_a_waiter_holds_is_given_back_for_it(a: Any) -> None:
    assert a.acquire(LOCK, A1, True) == (GRANTED, 1) == a.acquire(LOCK, A1, True)
    assert not a.give_back(LOCK, A1, 2)
    assert a.value(LOCK) == 0
    assert a.give_back(LOCK, A1, 1) and not a.give_back(LOCK, A1, 1)
    assert a.value(LOCK) == 1
    a.release(SEMAPHORE, UNBOUNDED)
    assert a.acquire(SEMAPHORE, A2, True)[0] == GRANTED
    assert a.give_back(SEMAPHORE, A2, 7), "nobody holds them"
    assert a.value(SEMAPHORE) == 1


def test_who_asks_again_for_a_token_that_it_has_is_told_the_same_one(stores: Stores) -> None:
    a = stores.a
    a.create("j1-d1-5", "guard", 3, Contents(3))
    assert [a.acquire("j1-d1-5", waiter, True) for waiter in (A1, A2, A1)] == [(GRANTED, 1), (GRANTED, 2), (GRANTED, 1)]


def test_a_lock_given_back_by_one_who_does_not_hold_it_stays_locked(a: Any, b: Any) -> None:
    a.acquire(LOCK, A1, True)
    assert not b.give_back(LOCK, B1)
    assert a.value(LOCK) == 0


# Channels


def test_items_come_out_in_order_with_those_that_had_been_there(a: Any, b: Any) -> None:
    b.put(CHANNEL, b"third")
    assert a.length(CHANNEL) == 3
    items = [a.get(CHANNEL, A1, False), b.get(CHANNEL, B1, False), a.get(CHANNEL, A1, False)]
    assert items == [(GRANTED, b"first"), (GRANTED, b"\x80second\0"), (GRANTED, b"third")]
    assert a.get(CHANNEL, A1, False) == (REFUSED, b"")
    assert a.length(CHANNEL) == 0


def test_who_waits_for_an_item_is_told_and_pops_it(a: Any, b: Any) -> None:
    a.get(CHANNEL, A1, True), a.get(CHANNEL, A1, True)
    assert b.get(CHANNEL, B1, True) == (WAITING, b"")
    a.put(CHANNEL, b"x")
    # It is reserved: who comes later does not get it.
    assert a.get(CHANNEL, A2, False) == (REFUSED, b"")
    assert grants(b) == [(B1, CHANNEL)]
    assert b.pop(CHANNEL, B1) == b"x"
    assert b.again() == b"x"
    assert b.pop(CHANNEL, B1) is None


def test_who_waits_again_cannot_pop_what_was_given_back(a: Any, b: Any) -> None:
    a.get(CHANNEL, A1, True), a.get(CHANNEL, A1, True)
    b.get(CHANNEL, B1, True)
    a.put(CHANNEL, b"x")
    assert b.end_node_life("nb", True) == 1
    assert a.get(CHANNEL, A1, True) == (GRANTED, b"x")
    assert b.get(CHANNEL, B1, True) == (WAITING, b"")
    assert b.pop(CHANNEL, B1) is None
    assert b.get(CHANNEL, B1, True) == (WAITING, b"")
    a.put(CHANNEL, b"y"), a.put(CHANNEL, b"z")
    assert b.pop(CHANNEL, B1) == b"y"
    assert a.get(CHANNEL, A1, True) == (GRANTED, b"z")
    assert a.length(CHANNEL) == 0


def test_an_item_put_back_is_the_first_again(a: Any) -> None:
    _, item = a.get(CHANNEL, A1, False)
    a.put_back(CHANNEL, item)
    assert a.get(CHANNEL, A1, False) == (GRANTED, b"first")


# Cells


def test_a_cell_is_read_only_if_it_changed(a: Any, b: Any) -> None:
    assert b.read_cell(CELL, 0) == (1, b"\0bytes")
    assert b.read_cell(CELL, 1) is None
    assert a.write_cell(CELL, b"others") == 2
    assert b.read_cell(CELL, 1) == (2, b"others")


# Ends


def test_the_end_of_a_process_gives_back_its_locks_and_ends_its_waits(a: Any, b: Any) -> None:
    a.acquire(LOCK, A1, True)
    a.acquire(SEMAPHORE, "na/w1/2", True)
    b.acquire(LOCK, B1, True)
    b.acquire(SEMAPHORE, B2, True)
    assert a.end_process("na/w1/") == 2
    assert grants(b) == [(B1, LOCK)]
    a.release(SEMAPHORE, UNBOUNDED)
    assert grants(b) == [(B1, LOCK), (B2, SEMAPHORE)]


def test_the_tokens_of_a_plain_semaphore_are_nobodys(a: Any, b: Any) -> None:
    # As in the standard library, where any process may release what another one has acquired.
    a.release(SEMAPHORE, UNBOUNDED)
    a.acquire(SEMAPHORE, A1, True)
    assert a.end_process("na/w1/") == 0
    assert a.value(SEMAPHORE) == 0


def test_a_lock_that_another_process_has_released_is_not_given_back_twice(a: Any, b: Any) -> None:
    a.acquire(LOCK, A1, True)
    b.release(LOCK, 1)
    b.acquire(LOCK, B1, True)
    assert a.end_process("na/w1/") == 0
    assert b.value(LOCK) == 0


def test_the_end_of_a_node_gives_back_all_that_its_processes_had(stores: Stores, a: Any, b: Any) -> None:
    a.acquire(LOCK, A1, True)
    a.acquire(SEMAPHORE, A2, True)
    b.release(SEMAPHORE, UNBOUNDED)  # granted, and never read
    a.get(CHANNEL, "na/w1/3", True), a.get(CHANNEL, "na/w1/4", True)
    a.get(CHANNEL, "na/w1/5", True)
    b.put(CHANNEL, b"reserved")
    b.acquire(LOCK, B1, True)
    assert b.end_node_life("na", False) == 2
    assert grants(b) == [(B1, LOCK)]
    assert b.value(SEMAPHORE) == 1
    assert b.get(CHANNEL, B2, False) == (GRANTED, b"reserved")
    assert b.end_node_life("na", False) == 0
    assert grants(a) == []


def test_a_node_that_lives_is_not_ended_by_others(stores: Stores, a: Any, b: Any) -> None:
    stores.enlist("na")
    a.acquire(LOCK, A1, True)
    assert b.end_node_life("na", False) == 0
    assert a.value(LOCK) == 0
    assert a.end_node_life("na", True) == 1
    assert a.value(LOCK) == 1


def test_the_end_of_a_job_leaves_nothing(stores: Stores, a: Any, b: Any) -> None:
    a.acquire(LOCK, A1, True)
    b.acquire(LOCK, B1, True)
    b.acquire(SEMAPHORE, B2, True)
    b.create("j2-d1-1", "lock", 1, Contents(1))
    a.create("j1-d1-9", "guard", 3, Contents(1, b"na 2"))
    b.acquire("j1-d1-9", "nb/w9/1", False)
    assert a.delete_job("j1") == 5
    assert b.end_process("nb/w9/") <= 1
    assert a.end_node_life("na", True) == 0, "nothing is given back to what is gone"
    assert not a.exists(LOCK) and a.exists("j2-d1-1")
    assert not b.create(LOCK, "lock", 1, Contents(1))
    assert a.delete_job("j2") == 1
    assert stores.keys() == []


def test_a_job_whose_home_was_lost_ends_unless_that_is_listed_again(stores: Stores, a: Any, b: Any) -> None:
    stores.enlist("na")
    assert b.acquire(LOCK, B1, True)[0] == GRANTED
    a.acquire(LOCK, A1, True)
    assert b.delete_job("j1", "na") == 0, "na has come back, and its driver's job goes on"
    b.release(LOCK, 1, B1)
    assert [grant.waiter for grant in a.read_grants("0")] == [A1]
    assert b.delete_job("j1") == 4, "its driver has ended"
    assert not a.create(LOCK, "lock", 1, Contents(1))


def test_a_home_that_comes_back_makes_new_carriers(stores: Stores, a: Any, b: Any) -> None:
    assert b.delete_job("j1", "na") == 4
    assert not a.create(LOCK, "lock", 1, Contents(1))
    stores.enlist("na")
    assert a.create(LOCK, "lock", 1, Contents(1))
    assert b.delete_job("j1", "na") == 0 and a.exists(LOCK)


# --- who holds what


THIN_A = "na/thin"


def test_a_holder_that_was_taken_for_dead_can_release_nothing(stores: Stores) -> None:
    a, b = stores.a, stores.b
    a.create(LOCK, "lock", 1, Contents(tokens=1))
    a.acquire(LOCK, A1, True)
    a.end_node_life("na", True)
    assert b.acquire(LOCK, B1, True)[0] == GRANTED
    with pytest.raises(LockLost):
        a.release(LOCK, 1, A1)
    assert b.value(LOCK) == 0, "B1 holds it as before"
    assert b.acquire(LOCK, B2, False)[0] == REFUSED
    assert b.release(LOCK, 1, B1)
    assert b.value(LOCK) == 1
    with pytest.raises(LockLost):
        a.release(LOCK, 1, A1)


def test_only_the_holder_of_its_lock_writes_a_cell(stores: Stores) -> None:
    a, b = stores.a, stores.b
    a.create(LOCK, "lock", 1, Contents(tokens=1))
    a.create(CELL, "cell", 0, Contents(content=b"old"))
    a.acquire(LOCK, A1, True)
    assert a.write_cell(CELL, b"first", LOCK, A1) == 2
    a.end_node_life("na", True)
    b.acquire(LOCK, B1, True)
    with pytest.raises(LockLost):
        a.write_cell(CELL, b"late", LOCK, A1)
    assert b.read_cell(CELL, 0) == (2, b"first")
    assert b.write_cell(CELL, b"second", LOCK, B1) == 3


def test_the_tokens_of_a_guard_are_held(stores: Stores) -> None:
    a, b = stores.a, stores.b
    a.create(SEMAPHORE, "guard", 3, Contents(tokens=3))
    for waiter in (A1, A2):
        assert a.acquire(SEMAPHORE, waiter, True)[0] == GRANTED
    assert b.acquire(SEMAPHORE, B1, True)[0] == GRANTED
    assert b.acquire(SEMAPHORE, B2, True)[0] == WAITING
    assert a.end_process("na/w1/") == 1
    assert [grant.waiter for grant in b.read_grants("0")] == [B2]
    with pytest.raises(LockLost):
        a.release(SEMAPHORE, 3, A1)
    assert a.release(SEMAPHORE, 3, A2)
    assert a.value(SEMAPHORE) == 1


def test_a_guard_that_another_releases_is_nobodys_for_ever(stores: Stores) -> None:
    a, b = stores.a, stores.b
    a.create(SEMAPHORE, "guard", UNBOUNDED, Contents(tokens=1))
    a.acquire(SEMAPHORE, A1, True)
    assert b.release(SEMAPHORE, UNBOUNDED)
    assert a.value(SEMAPHORE) == 1
    a.end_process("na/w1/")
    assert a.value(SEMAPHORE) == 1, "what it took is gone for good"
    assert b.release(SEMAPHORE, UNBOUNDED, B1)
    assert a.value(SEMAPHORE) == 2


@pytest.mark.parametrize(("name", "kind", "total"), [(LOCK, "lock", 1), (SEMAPHORE, "guard", 2)])
def test_what_was_held_at_its_home_when_it_moved_comes_back_once(
    stores: Stores, name: str, kind: str, total: int
) -> None:
    a, b = stores.a, stores.b
    a.create(name, kind, total, Contents(tokens=0, content=f"na {total}".encode()))
    for free in range(total):
        assert a.value(name) == free
        assert a.release(name, total, THIN_A)
    with pytest.raises(LockLost):
        a.release(name, total, THIN_A)
    assert b.value(name) == total


def test_the_end_of_its_home_frees_what_was_held_there(stores: Stores) -> None:
    a, b = stores.a, stores.b
    a.create(LOCK, "lock", 1, Contents(tokens=0, content=b"na 1"))
    a.create(CELL, "cell", 0, Contents(content=b"old"))
    assert a.write_cell(CELL, b"first", LOCK, THIN_A) == 2
    assert b.acquire(LOCK, B1, True)[0] == WAITING
    a.end_node_life("na", True)
    assert [grant.waiter for grant in b.read_grants("0")] == [B1]
    for late in (lambda: a.write_cell(CELL, b"late", LOCK, THIN_A), lambda: a.release(LOCK, 1, THIN_A)):
        with pytest.raises(LockLost):
            late()


# --- lives of a node


def test_what_ends_a_life_late_does_not_touch_the_next_one(stores: Stores) -> None:
    first, second = f"na@{stores.enlist('na')}", f"na@{stores.enlist('na')}"
    a, b = stores.a, stores.b
    a.create(LOCK, "lock", 1, Contents(tokens=1))
    a.create(CHANNEL, "channel", 0, Contents())
    a.create(SEMAPHORE, "semaphore", UNBOUNDED, Contents())
    assert a.acquire(LOCK, f"{second}/w1/1", True)[0] == GRANTED
    assert a.get(CHANNEL, f"{second}/w1/2", True) == (WAITING, b"")
    assert a.acquire(SEMAPHORE, f"{second}/w1/3", True) == (WAITING, 0)
    b.release(SEMAPHORE, UNBOUNDED)
    for is_forced in (False, True):
        assert b.end_node_life(first, is_forced) == 0
    assert b.end_node_life(second, False) == 0, "it goes on"
    assert grants(a) == [(f"{second}/w1/3", SEMAPHORE)]
    b.put(CHANNEL, b"x")
    assert a.pop(CHANNEL, f"{second}/w1/2") == b"x"
    assert a.release(LOCK, 1, f"{second}/w1/1")


def test_a_life_that_is_over_gets_nothing_more(stores: Stores) -> None:
    first = f"na@{stores.enlist('na')}"
    a, b = stores.a, stores.b
    a.create(LOCK, "lock", 1, Contents(tokens=1))
    a.create(CHANNEL, "channel", 0, Contents(items=[b"x"]))
    assert a.acquire(LOCK, f"{first}/w1/1", True)[0] == GRANTED
    second = f"na@{stores.enlist('na')}"
    assert b.end_node_life(first, False) == 1
    assert a.acquire(LOCK, f"{first}/w1/2", True) == (LIFE_OVER, 0)
    assert a.again() == (LIFE_OVER, 0)
    assert a.get(CHANNEL, f"{first}/w1/3", True) == (LIFE_OVER, b"")
    assert (b.value(LOCK), b.length(CHANNEL)) == (1, 1)
    with pytest.raises(LockLost):
        a.release(LOCK, 1, f"{first}/w1/1")
    assert a.acquire(LOCK, f"{second}/w1/2", True)[0] == GRANTED
    assert a.get(CHANNEL, f"{second}/w1/3", True) == (GRANTED, b"x")


def test_a_life_that_is_over_makes_no_carrier(stores: Stores) -> None:
    life = f"na@{stores.enlist('na')}"
    assert stores.a.create(LOCK, "lock", 1, Contents(1), life) == GRANTED
    stores.enlist("na")
    assert stores.a.create(CHANNEL, "channel", 0, Contents(), life) == LIFE_OVER and not stores.a.exists(CHANNEL)


def test_grants_of_a_life_that_is_over_come_back(stores: Stores) -> None:
    first = f"na@{stores.enlist('na')}"
    a, b = stores.a, stores.b
    a.create(SEMAPHORE, "semaphore", UNBOUNDED, Contents())
    a.acquire(SEMAPHORE, f"{first}/w1/1", True)
    b.release(SEMAPHORE, UNBOUNDED)
    second = f"na@{stores.enlist('na')}"
    assert a.acquire(SEMAPHORE, f"{second}/w1/1", True) == (WAITING, 0)
    a.end_node_life(first, True)
    assert grants(a) == [(f"{second}/w1/1", SEMAPHORE)]
