from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chaos
from benchmarks.soak import picture, report, work
from benchmarks.soak.job import Job
from benchmarks.work import Counter


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
        self.counters = [Counter() for _ in range(count)]
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
    curve = [[float(second), 100.0 * min(second, 10)] for second in range(1, 21)]
    times, rates = picture.rate_curve(curve)
    assert rates[0] == pytest.approx(100) and rates[-1] == 0 and len(times) == len(rates) == 10
    recovered = report.recovery(curve, [(6.0, "node"), (14.0, "worker")], 20)
    assert recovered["before"] == pytest.approx(100) and recovered["after"] == 0


def kept_run(name: str, **verdict: Any) -> dict[str, Any]:
    counts = {"tasks": 900, "chains": 2, "calls": 50, "wrong": 0, "missing": 0, "twice": 0, "lost_states": 0}
    lines = [{"t": float(second), "tasks": 90 * second} for second in range(1, 31)]
    return report.kept(
        name, 0.5, "alone", lines=lines, verdict={**counts, "errors": {}, "came_to_end": True, **verdict},
        kills=[(9.0, "head"), (15.0, "driver")], killed="1 head, 1 driver", gone_s=[0.1, 0.4], problems=[], troubles=[],
        growth={"fds": [70, 71]},
    )  # fmt: skip


def test_the_page_joins_the_runs_that_are_kept(tmp_path: Path) -> None:
    for name, wrong in (("ray", 3), ("clusterpool", 0)):
        report.run_file(tmp_path, name).write_text(json.dumps(kept_run(name, wrong=wrong)))
    runs = report.read_runs(tmp_path)
    assert [run["contender"] for run in runs] == ["clusterpool", "ray"]
    page = report.page(runs)
    assert "| clusterpool | 30 s | 900 | 2 | 50 | 2: 1 head, 1 driver | 0, 0, 0 | 0 | 0 | 90, 90, 90 |" in page
    assert "| ray | 30 s | 900 | 2 | 50 | 2: 1 head, 1 driver | 3, 0, 0 | 0 | 0 | 90, 90, 90 |" in page
    assert "gone after 0.25 s (median of 2), 0.40 s at most" in page
    pytest.importorskip("matplotlib")
    picture.draw([(run, report.summary(run)) for run in runs], tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 10_000


@pytest.mark.parametrize(("starts", "fails"), [(3, None), (3, 1), (1, None)])
def test_jobs_begin_when_all_clusters_are_there_or_have_failed(starts: int, fails: int | None) -> None:
    line = chaos.StartingLine(starts)
    started: list[int] = []
    begun: list[int] = []

    class Starts:
        def __init__(self, number: int) -> None:
            self.number = number

        def start(self) -> None:
            assert not begun
            if self.number == fails:
                raise RuntimeError("no port")
            started.append(self.number)

    def run(number: int) -> None:
        with contextlib.suppress(RuntimeError):
            line.start(Starts(number))  # type: ignore[arg-type]
            begun.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(starts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(begun) == sorted(started) == [number for number in range(starts) if number != fails]
