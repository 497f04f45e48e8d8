from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks import chaos
from benchmarks.soak import picture, work
from benchmarks.soak.job import Job


class InThisProcess:
    """An engine that computes at once; `answer` may falsify what it gives."""

    def __init__(self, answer: Callable[[list[tuple[int, int]]], list[tuple[int, int]]] = lambda results: results):
        self.answer = answer

    def small_tasks(self, numbers: Iterator[int], failed: Callable[[str], None]) -> Iterator[tuple[int, int]]:
        first = [(number, work.expected(number)) for number in itertools.islice(numbers, 5)]
        yield from self.answer(first)
        yield from ((number, work.expected(number)) for number in numbers)

    def chain(self, number: int) -> tuple[float, float, int]:
        return work.expected_summary(number)

    def open_actors(self, count: int) -> bool:
        self.counters = [work.Counter() for _ in range(count)]
        return True

    def call_all(self, amounts: list[int]) -> list[int | Exception]:
        return [counter.add(amount) for counter, amount in zip(self.counters, amounts, strict=True)]

    def close(self) -> None:
        pass


def verdict_of(engine: Any, *, seconds: float = 0.0) -> dict[str, Any]:
    job = Job(engine, seconds=seconds, tasks_min=20)
    came_to_end = job.run()
    return {**job.tally.as_json(), "missing": job.seen.count(0), "came_to_end": came_to_end}


@pytest.mark.parametrize("number", [0, 1, 12345, 199_999])
def test_the_expected_value_is_what_the_task_computes(number: int) -> None:
    assert work.expected(number) == work.mix(number)


def test_a_job_without_faults_has_none() -> None:
    verdict = verdict_of(InThisProcess(), seconds=0.5)
    assert verdict["tasks"] >= 20 and verdict["chains"] and verdict["calls"] >= work.ACTORS
    assert chaos.faults_of(verdict) == []


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (lambda results: results[1:], "1 results missing"),
        (lambda results: [*results, results[0]], "1 results delivered twice"),
        (lambda results: [(results[0][0], -1), *results[1:]], "1 wrong results"),
    ],
)
def test_the_job_notices_what_is_wrong(answer: Any, fault: str) -> None:
    assert fault in chaos.faults_of(verdict_of(InThisProcess(answer)))


def test_an_actor_that_forgets_is_noticed() -> None:
    engine = InThisProcess()
    call_all = engine.call_all

    def forgets(amounts: list[int]) -> list[int | Exception]:
        answers = call_all(amounts)
        engine.counters[3].total = 0
        return answers

    engine.call_all = forgets  # type: ignore[method-assign]
    verdict = verdict_of(engine, seconds=1.5)
    assert any("not the sum" in fault for fault in chaos.faults_of(verdict))


def test_the_curve_shows_where_the_work_stopped() -> None:
    lines = [{"t": float(second), "tasks": 100 * min(second, 10)} for second in range(1, 21)]
    times, rates = picture.rate_curve(lines)
    assert rates[0] == pytest.approx(100) and rates[-1] == 0 and len(times) == len(rates) == 10
    recovered = chaos.recovery(lines, [(6.0, "node"), (14.0, "worker")], 20)
    assert recovered["before"] == pytest.approx(100) and recovered["after"] == 0
