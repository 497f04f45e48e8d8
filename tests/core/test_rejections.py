from __future__ import annotations

import pytest

from clusterpool.core.messages import Address
from clusterpool.core.rejections import CAUSES_MAX, Rejections, greeting_fault

OURS = Address("n1", "d1")
NODE = Address("n1", "n1")
W1 = Address("n1", "w1")


def test_each_cause_is_told_once_and_counted_always() -> None:
    rejections = Rejections()
    assert [rejections.note(cause) for cause in ("a", "a", "b", "a")] == [True, False, True, False]
    assert rejections.figures() == {"rejected": 4.0, "rejected: a": 3.0, "rejected: b": 1.0}


def test_no_stranger_makes_the_table_grow() -> None:
    rejections = Rejections()
    for number in range(10 * CAUSES_MAX):
        rejections.note(f"cause {number}")
    assert len(rejections.count_by_cause) == CAUSES_MAX + 1
    assert rejections.figures()["rejected"] == 10 * CAUSES_MAX


@pytest.mark.parametrize(
    ("claimed", "connected_to", "is_taken", "is_refused"),
    [
        (W1, None, False, False),
        (W1, None, True, True),  # somebody else has that name
        (OURS, None, False, True),
        (NODE, None, False, True),  # nodes are called, they do not call
        (Address("n2", "w1"), None, False, True),
        (NODE, NODE, False, False),
        (W1, W1, True, False),  # each called the other at the same time
        (W1, NODE, False, True),
        (NODE, W1, False, True),
    ],
)
def test_who_can_be_who(claimed: Address, connected_to: Address | None, is_taken: bool, is_refused: bool) -> None:
    assert bool(greeting_fault(OURS, claimed, connected_to, is_taken=is_taken)) is is_refused
