"""The order in which outcomes are handed out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterpool.calls.ordering import AsTheyCome, InOrder


@given(st.permutations(range(12)))
def test_in_order_whatever_the_arrival(arrival: list[int]) -> None:
    outcomes: InOrder[int] = InOrder()
    handed_out = []
    for index in arrival:
        outcomes.add(index, index * 10)
        while outcomes.is_ready():
            handed_out.append(outcomes.take())
    assert handed_out == [index * 10 for index in range(12)]
    assert outcomes.taken == 12


def test_in_order_waits_for_the_first() -> None:
    outcomes: InOrder[str] = InOrder()
    outcomes.add(1, "second")
    assert not outcomes.is_ready()
    outcomes.add(0, "first")
    assert [outcomes.take(), outcomes.take()] == ["first", "second"]


def test_an_outcome_that_comes_twice_is_a_bug_not_a_result() -> None:
    outcomes: InOrder[str] = InOrder()
    outcomes.add(0, "a")
    with pytest.raises(AssertionError):
        outcomes.add(0, "b")
    outcomes.take()
    with pytest.raises(AssertionError):
        outcomes.add(0, "c")


@given(st.permutations(range(12)))
def test_as_they_come(arrival: list[int]) -> None:
    outcomes: AsTheyCome[int] = AsTheyCome()
    for index in arrival:
        outcomes.add(index, index)
    assert [outcomes.take() for _ in arrival] == list(arrival)
    assert not outcomes.is_ready()


@given(st.permutations(range(4)), st.integers(0, 4))
def test_the_last_comes_after_all_others(arrival: list[int], said_after: int) -> None:
    for outcomes in (InOrder[int](), AsTheyCome[int]()):
        handed_out = []
        for step in range(5):
            if step == said_after:
                outcomes.add_last(4, 99)
            if step < 4:
                outcomes.add(arrival[step], arrival[step])
            while outcomes.is_ready():
                handed_out.append(outcomes.take())
        assert sorted(handed_out[:4]) == [0, 1, 2, 3]
        assert handed_out[4:] == [99]
        assert not outcomes.is_ready()
