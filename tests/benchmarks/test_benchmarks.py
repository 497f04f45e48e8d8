"""The benchmarks judge rightly, and their smallest run goes through."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.contenders import MODULE_BY_CONTENDER
from benchmarks.figures import CONTENDERS, FIGURES, MEMCPY, Ceiling, Speedup
from benchmarks.journal import Journal, Plan, Sample
from benchmarks.report import judge, rows_of, summary_of
from benchmarks.runner import Results, SampleFailed, parse, run_all, run_sample, scaled
from benchmarks.sample import MARK
from tests.waiting import is_alive, wait_for

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("bar", "ours", "ratio", "is_met"),
    [
        (Speedup("ray", 2), 1.0, 2.0, True),
        (Speedup("ray", 2), 1.0, 1.9, False),
        (Speedup("multiprocessing", 0.8), 1.2, 0.83, True),
        (Speedup("ray", 2), 1.0, None, None),
        (Speedup("ray", 2), None, None, None),
        (Ceiling(20), 20.0, 1.0, True),
        (Ceiling(20), 20.1, 9.0, False),
        (Ceiling(20), None, None, None),
    ],
)
def test_a_bar_is_judged_by_ratio_or_cost(
    bar: Speedup | Ceiling, ours: float | None, ratio: float | None, is_met: bool | None
) -> None:
    assert judge(bar, ours, ratio, "MB").is_met is is_met


def test_a_ratio_is_of_costs_of_the_same_round() -> None:
    results = Results()
    for round_number, (ours, theirs) in enumerate([(1.0, 3.0), (2.0, 6.2), (2.0, 6.4), (1.0, 3.4)], 1):
        results.add(Sample("submit", "clusterpool", round_number, {"seconds": ours}))
        results.add(Sample("submit", "ray", round_number, {"seconds": theirs}))
    results.add(Sample("submit", "ray", 5, {"seconds": 99.0}))
    assert results.ratio("submit", "ray", "seconds", to="clusterpool") == pytest.approx(3.15)
    assert results.ratio("submit", "dask", "seconds", to="clusterpool") is None


def test_the_median_is_over_the_rounds_and_rows_count_bars() -> None:
    results = Results()
    for round_number, seconds in enumerate((5.0, 1.0, 2.0), 1):
        results.add(Sample("map_chunk1", "clusterpool", round_number, {"seconds": seconds, "cpu_us": 1.0}))
        results.add(Sample("map_chunk1", "multiprocessing", round_number, {"seconds": 6.0, "cpu_us": 2.0}))
    assert results.median("map_chunk1", "clusterpool", "seconds") == 2.0
    figures = [figure for figure in FIGURES if figure.name == "map_chunk1"]
    previous = {"medians": {"map_chunk1": {"cpu_us": {"clusterpool": 3.0}}}}
    rows = rows_of(figures, results, previous)
    assert summary_of(rows) == "1 bars met, 0 missed, 0 without a sample"
    assert rows[1].judgement() == "reported; was 3 us"


def test_only_elapsed_seconds_are_scaled_up() -> None:
    assert scaled({"seconds": 2.0, "cpu_us": 3.0}, 10) == {"seconds": 20.0, "cpu_us": 3.0}


def test_a_sample_is_found_among_the_prints_of_a_library() -> None:
    assert parse(f"warning\n{MARK}" + '{"seconds": 1.5}\nbye\n') == {"seconds": 1.5}
    with pytest.raises(SampleFailed, match="no sample"):
        parse("warning\n")


def test_a_contender_that_fails_is_reported_and_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fail(figure: object, contender: str, **options: object) -> dict[str, float]:
        asked.append(contender)
        raise SampleFailed("the end of its output")

    monkeypatch.setattr("benchmarks.runner.run_sample", fail)
    plan = Plan((FIGURES[0].name,), ("loky",), 3, True, {})
    results = Results()
    run_all(plan, results, Journal.start(tmp_path, plan), report=lambda line: None)
    assert asked == ["loky"]
    assert results.failures == {"submit": {"loky": "the end of its output"}}


def test_an_unknown_figure_fails_with_the_end_of_the_output() -> None:
    figure = FIGURES[0]
    with pytest.raises(SampleFailed, match="KeyError"):
        run_sample(
            type(figure)("no_such_figure", figure.metrics, figure.contenders),
            "multiprocessing",
            quick=True,
            environment={"PYTHONPATH": str(ROOT)},
        )


def test_every_bar_is_against_somebody_who_is_measured() -> None:
    assert {*CONTENDERS, MEMCPY} == set(MODULE_BY_CONTENDER)
    for figure in FIGURES:
        for metric in figure.metrics:
            for bar in metric.bars:
                assert not isinstance(bar, Speedup) or bar.against in figure.contenders, (figure.name, bar)


def test_a_run_that_is_interrupted_leaves_its_samples_and_goes_on_from_them(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--output", str(tmp_path)]
    options = ["--quick", "--repeats", "1000", "--only", "apply", "--contenders", "multiprocessing,futures"]
    with subprocess.Popen([*command, *options], cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        try:
            wait_for(lambda: len(samples_in(tmp_path)) >= 2, "it has two samples")
            started = psutil.Process(first.pid).children(recursive=True)
            first.send_signal(signal.SIGINT)
            printed, _ = first.communicate(timeout=30)
        finally:
            first.kill()
    assert first.returncode == 130, printed
    assert not any(is_alive(process.pid) for process in started)
    before = samples_in(tmp_path)
    incomplete = f"INCOMPLETE: interrupted with {len(before)} samples of 2000."
    assert incomplete in (tmp_path / "partial.md").read_text() and incomplete in printed
    (journal,) = tmp_path.glob("samples-*.jsonl")
    assert f"--resume {journal}" in printed
    rounds = max(sample["round_number"] for sample in before) + 1
    again = [*command, "--resume", str(journal), "--repeats", str(rounds)]
    subprocess.run(again, cwd=ROOT, capture_output=True, text=True, timeout=50, check=True)
    after = samples_in(tmp_path)
    assert after[: len(before)] == before
    assert sorted((sample["round_number"], sample["contender"]) for sample in after) == [
        (number, contender) for number in range(1, rounds + 1) for contender in ("futures", "multiprocessing")
    ]
    assert "INCOMPLETE" not in (tmp_path / "partial.md").read_text()
    kept = json.loads((tmp_path / "partial.json").read_text())["samples"]["apply"]
    assert {len(values["round_trip_us"]) for values in kept.values()} == {rounds}


def samples_in(folder: Path) -> list[dict[str, Any]]:
    """Of the only journal in the folder."""
    lines = [line for path in folder.glob("samples-*.jsonl") for line in path.read_text().splitlines(keepends=True)]
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [line for line in whole if line["type"] == "sample"]


def test_the_smallest_run_goes_through(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--repeats", "1", "--only", "apply"]
    command += ["--contenders", "multiprocessing,futures", "--output", str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    medians = json.loads((tmp_path / "partial.json").read_text())["medians"]["apply"]["round_trip_us"]
    assert set(medians) == {"multiprocessing", "futures"} and all(value > 0 for value in medians.values())
    assert "| Pool.apply round trip, median |" in (tmp_path / "partial.md").read_text()
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "partial.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert "no chart" in process.stdout
