from __future__ import annotations

import pytest

from clusterpool.processes.task_page import ITEM, STEP
from clusterpool.worker import calls


@pytest.mark.parametrize("step_max", [1, calls.STEP_MAX])
def test_each_item_is_in_one_part_and_the_page_says_which(step_max: int) -> None:
    items = list(range(2000))
    page = memoryview(bytearray(32)).cast("Q")
    seen: list[int] = []
    sizes: list[int] = []
    for part in calls._parts(items, page, 100, step_max):
        assert page[ITEM] == 100 + part[0]
        assert len(part) <= page[STEP] <= step_max
        seen += part
        sizes.append(len(part))
    assert seen == items
    assert sizes[0] == 1
    assert max(sizes) == step_max


def test_slow_items_are_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    times_ns = iter(range(0, 10**12, calls.PART_NS))  # each look at the clock is that much later
    monkeypatch.setattr(calls, "perf_counter_ns", lambda: next(times_ns))
    page = memoryview(bytearray(32)).cast("Q")
    assert [len(part) for part in calls._parts(range(5), page, 0, calls.STEP_MAX)] == [1] * 5
