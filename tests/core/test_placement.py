from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterpool.core.messages import StoredValue, WorkerDemand, WorkerKind
from clusterpool.core.placement import Candidate, bytes_by_node, choose_node, spread_group
from clusterpool.core.resources import UNIT

CPU = {"CPU": UNIT}


def node(
    name: str, *, cpus: int = 4, free: float | None = None, queue: int = 0, workers: int = 0, is_self: bool = False
) -> Candidate:
    left = round((cpus if free is None else free) * UNIT)
    return Candidate(name, {"CPU": cpus * UNIT}, {"CPU": left}, queue, workers, is_self)


def demand(strategy: str = "", **bytes_on: int) -> WorkerDemand:
    stored = [StoredValue(f"o{name}", size_bytes, [name]) for name, size_bytes in bytes_on.items()]
    return WorkerDemand(WorkerKind.TASK, {"CPU": 1}, strategy=strategy, stored=stored)


@pytest.mark.parametrize(
    ("candidates", "wish", "chosen"),
    [
        ([node("a", is_self=True), node("b")], demand(), "a"),  # at home where it is possible
        ([node("a", free=0, is_self=True), node("b")], demand(), "b"),
        ([node("a", free=0, is_self=True), node("b", free=0)], demand(), "a"),  # full everywhere: wait at home
        ([node("a", free=0, queue=9, is_self=True), node("b", free=0)], demand(), "b"),  # a shorter wait
        ([node("a", is_self=True), node("b")], demand(b=10**6), "b"),  # where the bytes are
        ([node("a", is_self=True), node("b", free=0)], demand(b=10**6), "a"),  # unless there is no room
        ([node("a", is_self=True), node("b"), node("c")], demand(b=10, c=20), "c"),
        ([node("a", free=1, is_self=True), node("b")], demand("spread"), "b"),  # the emptiest
        ([node("a", workers=2, is_self=True), node("b", workers=1)], demand("spread"), "b"),  # also without CPUs
        ([node("a", is_self=True), node("b", free=0)], demand("node:b"), "b"),  # there and nowhere else
        ([node("a", is_self=True)], demand("node:b"), None),
        ([node("a", is_self=True), node("b")], demand("near:b"), "b"),
        ([node("a", is_self=True), node("b", free=0)], demand("near:b"), "a"),  # rather there, but not at any price
        ([node("a", cpus=0, is_self=True)], demand(), None),
        ([node("a", cpus=0, is_self=True), node("b", free=0)], demand(), "b"),  # only there it can ever run
    ],
)
def test_the_node_for_a_worker(candidates: list[Candidate], wish: WorkerDemand, chosen: str | None) -> None:
    assert choose_node(candidates, CPU, wish) == chosen


@pytest.mark.parametrize(
    ("candidates", "count", "counts"),
    [
        ([node("a", is_self=True), node("b"), node("c")], 6, {"a": 2, "b": 2, "c": 2}),
        # "a" and "b" are busy at the moment: "c" gets more, but not all.
        (
            [node("a", free=2, workers=2, is_self=True), node("b", free=2, workers=2), node("c")],
            6,
            {"c": 4, "a": 1, "b": 1},
        ),
        ([node("a", cpus=0, is_self=True), node("b"), node("c")], 6, {"b": 3, "c": 3}),  # a head for nothing else
        ([node("a", cpus=0, is_self=True), node("b", cpus=0)], 4, {"a": 2, "b": 2}),
    ],
)
def test_what_needs_no_cpu_is_spread_too(candidates: list[Candidate], count: int, counts: dict[str, int]) -> None:
    given: dict[str, int] = {}
    for _ in range(count):
        chosen = choose_node(candidates, {}, demand("spread"))
        assert chosen is not None
        given[chosen] = given.get(chosen, 0) + 1
        # As the scheduler does, until the node's next heartbeat.
        candidates = [item._replace(workers=item.workers + (item.node_id == chosen)) for item in candidates]
    assert given == counts


def test_bytes_of_copies_count_on_each_node_that_has_one() -> None:
    wish = WorkerDemand(WorkerKind.TASK, {}, stored=[StoredValue("o1", 5, ["a", "b"]), StoredValue("o2", 7, ["b"])])
    assert bytes_by_node(wish) == {"a": 5, "b": 12}


@pytest.mark.parametrize(
    ("candidates", "count", "counts"),
    [
        ([node("a", is_self=True)], 8, {"a": 8}),  # not bounded by CPUs
        ([node("a", is_self=True), node("b")], 1, {"a": 1}),
        ([node("a", is_self=True), node("b")], 4, {"a": 2, "b": 2}),
        ([node("a", cpus=2, is_self=True), node("b", cpus=6)], 8, {"a": 2, "b": 6}),
        ([node("a", workers=4, is_self=True), node("b")], 4, {"b": 4}),  # other groups' workers count
        ([node("a", cpus=0, is_self=True)], 4, {}),
    ],
)
def test_a_group_is_spread_by_load(candidates: list[Candidate], count: int, counts: dict[str, int]) -> None:
    assert spread_group(candidates, CPU, count) == counts


@given(st.lists(st.integers(1, 16), min_size=1, max_size=6), st.integers(1, 50))
def test_no_node_of_a_group_has_more_than_a_worker_too_many(cpus: list[int], count: int) -> None:
    candidates = [node(f"n{index}", cpus=number, is_self=index == 0) for index, number in enumerate(cpus)]
    counts = spread_group(candidates, CPU, count)
    assert sum(counts.values()) == count
    for name, assigned in counts.items():
        others = [(counts.get(f"n{index}", 0) + 1) / number for index, number in enumerate(cpus)]
        assert assigned / cpus[int(name[1:])] <= min(others)
