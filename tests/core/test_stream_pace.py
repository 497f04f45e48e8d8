from __future__ import annotations

import random
from typing import Any

import pytest

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.messages import Address, StoredValue, ValuePart
from clusterpool.core.stream_pace import BYTES_MAX, ITEMS_MAX, NO_BOUND, ProducerPace, step_for, step_of
from tests.core.machines import Owner, make_task, sent

WORKER = Address("n1", "w1")
OTHER = Address("n1", "w2")
MB = 10**6


def producer(buffer: int = 0) -> ProducerPace:
    pace = ProducerPace()
    pace.bound(buffer)
    return pace


def run_ahead(pace: ProducerPace, size_bytes: int = 100, at_most: int = 5000) -> int:
    """How many items go out until the generator pauses."""
    for count in range(at_most):
        if not pace.has_room:
            return count
        pace.sent(size_bytes)
    return at_most


@pytest.mark.parametrize(
    ("buffer", "size_bytes", "count"),
    [
        (0, 100, ITEMS_MAX),
        (0, 10 * MB, BYTES_MAX // (10 * MB) + 1),
        (0, 2 * BYTES_MAX, 1),  # a single item may be larger than the bound
        (3, 10 * MB, 3),
        (1, 100, 1),
        (-1, 10 * MB, 5000),
    ],
)
def test_how_far_a_generator_runs_ahead(buffer: int, size_bytes: int, count: int) -> None:
    assert run_ahead(producer(buffer), size_bytes) == count


def test_it_goes_on_when_items_are_taken() -> None:
    pace = producer(4)
    assert run_ahead(pace) == 4
    pace.taken(2)
    assert run_ahead(pace) == 2
    pace.taken(2)  # said twice
    pace.taken(1)  # late
    assert not pace.has_room
    pace.taken(NO_BOUND)
    assert run_ahead(pace) == 5000


def test_what_an_earlier_attempt_had_delivered_does_not_hold_up_the_next() -> None:
    pace = ProducerPace()
    pace.taken(10)  # said before it started
    pace.bound(2)
    assert run_ahead(pace) == 12


@pytest.mark.parametrize("seed", range(20))
def test_whoever_takes_by_steps_never_leaves_the_generator_waiting(seed: int) -> None:
    """With sizes at random: when all that was sent is taken, and told by the rule, there is room."""
    rng = random.Random(seed)
    buffer = rng.choice([0, 0, 1, 2, 3, 7])
    pace, step, told, taken, count = producer(buffer), step_of(buffer), 0, 0, 0
    for _ in range(3000):
        if pace.has_room and rng.random() < 0.7:
            size_bytes = rng.choice([10, 10, 1000, 50 * MB])
            pace.sent(size_bytes)
            step = step_for(step, size_bytes)
            count += 1
        elif taken < count:
            taken += 1
            if taken - told >= step:
                told = taken
                pace.taken(told)
        else:
            assert pace.has_room, (buffer, count, taken, told, step)


# --- the owner ------------------------------------------------------------------------------------------------------


def item(number: int, index: int, size_bytes: int = 10) -> m.StreamItem:
    stored = StoredValue(f"d1.{number}s{index}", size_bytes, ["n1"]) if size_bytes > 100_000 else None
    return m.StreamItem(number, index, ValuePart(b"" if stored else b"x" * size_bytes, stored))


def stream_of(owner: Owner, buffer: int = 0) -> Any:
    owner.open_set()
    stream = owner.machine.objects.open_stream(5000, buffer)
    owner.submit(make_task(5000, sink=None, returns=-1, stream_buffer=buffer))
    return stream


def test_the_generators_process_is_told_what_was_taken() -> None:
    owner = Owner()
    stream = stream_of(owner)
    assert stream.step == ITEMS_MAX // 2
    owner.hear(WORKER, item(5000, 0))
    assert sent(owner.handle(e.ItemsTaken(5000, 1)), m.StreamTaken, WORKER) == [m.StreamTaken(5000, 1)]
    assert owner.handle(e.ItemsTaken(5000, 1)) == []
    owner.hear(WORKER, item(5000, 1, 5 * MB))
    assert stream.step == 1  # of large items each counts


def test_an_attempt_that_repeats_what_was_delivered_is_not_held_up() -> None:
    owner = Owner()
    stream_of(owner, 2)
    for index in range(2):
        owner.hear(WORKER, item(5000, index))
    assert sent(owner.hear(OTHER, item(5000, 0)), m.StreamTaken, OTHER) == [m.StreamTaken(5000, 1)]
    assert sent(owner.hear(OTHER, item(5000, 1)), m.StreamTaken, OTHER) == [m.StreamTaken(5000, 2)]
    assert sent(owner.hear(OTHER, item(5000, 2)), m.StreamTaken) == []
    assert sent(owner.handle(e.ItemsTaken(5000, 3)), m.StreamTaken, OTHER) == [m.StreamTaken(5000, 3)]


def test_items_of_a_closed_stream_do_not_hold_up_its_generator() -> None:
    owner = Owner()
    stream_of(owner)
    owner.hear(WORKER, item(5000, 0))
    owner.handle(e.StreamClosed(5000, 1))
    assert sent(owner.hear(WORKER, item(5000, 1)), m.StreamTaken, WORKER) == [m.StreamTaken(5000, 2)]
    assert owner.handle(e.ItemsTaken(5000, 1)) == []
