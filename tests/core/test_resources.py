from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterpool.core.resources import UNIT, ResourcePool, to_amounts, to_numbers


def test_a_tenth_ten_times_is_a_whole() -> None:
    pool = ResourcePool({"CPU": 1})
    for _ in range(10):
        assert pool.fits(to_amounts({"CPU": 0.1}))
        pool.take(to_amounts({"CPU": 0.1}))
    assert pool.free == {"CPU": 0}
    assert not pool.fits(to_amounts({"CPU": 0.1}))


def test_zeros_are_left_out_and_negative_amounts_refused() -> None:
    assert to_amounts({"CPU": 0, "GPU": 2}) == {"GPU": 2 * UNIT}
    assert to_numbers({"GPU": UNIT // 2}) == {"GPU": 0.5}
    with pytest.raises(ValueError, match="CPU"):
        to_amounts({"CPU": -1})


@pytest.mark.parametrize(
    ("demand", "could_ever", "fits"),
    [
        ({}, True, True),
        ({"CPU": 2}, True, True),
        ({"CPU": 3}, False, False),
        ({"TPU": 1}, False, False),
        ({"CPU": 1, "TPU": 1}, False, False),
    ],
)
def test_what_a_node_has_not_it_can_never_give(demand: dict[str, float], could_ever: bool, fits: bool) -> None:
    pool = ResourcePool({"CPU": 2})
    assert (pool.could_ever_fit(to_amounts(demand)), pool.fits(to_amounts(demand))) == (could_ever, fits)


def test_whole_gpus_go_to_one_lease_each() -> None:
    pool = ResourcePool({"GPU": 2})
    assert [pool.take({"GPU": UNIT}), pool.take({"GPU": UNIT})] == [[0], [1]]
    pool.give_back({"GPU": UNIT}, [0])
    assert pool.take({"GPU": UNIT}) == [0]


def test_fractions_of_gpus_are_packed_so_that_whole_ones_stay_whole() -> None:
    pool = ResourcePool({"GPU": 2})
    half = to_amounts({"GPU": 0.5})
    assert [pool.take(half), pool.take(half)] == [[0], [0]]
    assert pool.take({"GPU": UNIT}) == [1]


def test_fractions_that_are_left_on_several_gpus_are_no_whole_one() -> None:
    pool = ResourcePool({"GPU": 2})
    pool.take(to_amounts({"GPU": 0.6}))
    pool.take(to_amounts({"GPU": 0.6}))
    assert pool.free["GPU"] == round(0.8 * UNIT)
    assert not pool.fits(to_amounts({"GPU": 0.5}))


DEMANDS = st.fixed_dictionaries(
    {}, optional={"CPU": st.integers(1, 3 * UNIT), "GPU": st.integers(1, 3 * UNIT), "memory": st.integers(1, UNIT)}
)


@given(st.lists(st.tuples(DEMANDS, st.integers(0, 5)), max_size=40))
def test_what_was_given_back_is_free_again(steps: list[tuple[dict[str, int], int]]) -> None:
    pool = ResourcePool({"CPU": 4, "GPU": 3, "memory": 1})
    full = dict(pool.free)
    taken: list[tuple[dict[str, int], list[int]]] = []
    for demand, choice in steps:
        if pool.fits(demand):
            assert pool.could_ever_fit(demand)
            taken.append((demand, pool.take(demand)))
        elif taken:
            pool.give_back(*taken.pop(choice % len(taken)))
        assert all(amount >= 0 for amount in pool.free.values())
        assert all(0 <= amount <= UNIT for amount in pool._gpu_free)
    for demand, gpu_ids in taken:
        pool.give_back(demand, gpu_ids)
    assert pool.free == full
    assert pool._gpu_free == [UNIT] * 3
