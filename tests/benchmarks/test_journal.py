"""A run goes on from the samples that it has written, and only where they were measured as the rest will be."""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec
import pytest

from benchmarks.figures import MEMCPY
from benchmarks.journal import Journal, NotResumable, Plan, Sample, read_plan
from benchmarks.machine import commit
from benchmarks.runner import Results, run_all, turns_of

PLAN = Plan(("submit", "apply"), ("clusterpool", "futures"), 2, True, {"python": "3.11.7", "commit": "1234567"})
FIRST = Sample("submit", "clusterpool", 1, {"seconds": 0.5, "cpu_us": 7.0})
SECOND = Sample("submit", "futures", 1, {"seconds": 1.5, "cpu_us": 8.0})


def journal_with(folder: Path, *samples: Sample) -> Path:
    journal = Journal.start(folder, PLAN)
    for sample in samples:
        journal.append(sample)
    journal.close()
    return journal.path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = journal_with(tmp_path / "new", FIRST, SECOND)
    assert read_plan(path) == PLAN
    again = Journal.resume(path, msgspec.structs.replace(PLAN, repeats=5))
    assert (again.samples, again.starts) == ([FIRST, SECOND], 2)
    assert read_plan(path).repeats == 5, "the plan of the last start counts"


def test_a_line_that_was_broken_off_is_measured_again(tmp_path: Path) -> None:
    path = journal_with(tmp_path, FIRST)
    whole = path.read_bytes()
    path.write_bytes(whole + msgspec.json.encode(SECOND)[:-5])
    again = Journal.resume(path, PLAN)
    assert again.samples == [FIRST]
    again.append(SECOND)
    again.close()
    assert Journal.resume(path, PLAN).samples == [FIRST, SECOND]
    assert path.read_bytes().startswith(whole)


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (msgspec.structs.replace(PLAN, machine={**PLAN.machine, "commit": "7654321"}), "commit 1234567 there, 7654321"),
        (msgspec.structs.replace(PLAN, machine={**PLAN.machine, "python": "3.12.0"}), "python 3.11.7 there, 3.12.0"),
        (msgspec.structs.replace(PLAN, machine={**PLAN.machine, "ray": "2.60"}), "ray none there, 2.60 here"),
        (msgspec.structs.replace(PLAN, quick=False), "it is a --quick run"),
    ],
)
def test_samples_that_were_measured_otherwise_are_refused(tmp_path: Path, plan: Plan, text: str) -> None:
    path = journal_with(tmp_path, FIRST)
    before = path.read_bytes()
    with pytest.raises(NotResumable, match=text):
        Journal.resume(path, plan)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "does not say what was measured"),
        ("benchmarks\n", "line 1 is no line"),
        ('{"type": "plan", "figures": 3}\n', "line 1 is no line"),
        (msgspec.json.encode(FIRST).decode() + "\n", "does not say what was measured"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str, text: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(content)
    with pytest.raises(NotResumable, match=text):
        read_plan(path)
    with pytest.raises(NotResumable, match="cannot be read"):
        read_plan(tmp_path / "nothing.jsonl")


def test_only_what_is_missing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(figure: object, contender: str, **options: object) -> dict[str, float]:
        asked.append(contender)
        return {"seconds": 9.0}

    monkeypatch.setattr("benchmarks.runner.run_sample", answer)
    plan = msgspec.structs.replace(PLAN, figures=("submit",))
    results = Results()
    path = journal_with(tmp_path, FIRST, Sample("apply", "futures", 1, {"round_trip_us": 1.0}))
    run_all(plan, results, Journal.resume(path, plan), report=lambda line: None)
    assert asked == ["futures", "clusterpool", "futures"], "one of the first round, both of the second"
    assert results.samples()["submit"]["clusterpool"]["seconds"] == [0.5, 9.0]
    assert "apply" not in results.samples(), "it is not asked for this time"


def test_rounds_are_interleaved_and_only_who_has_the_figure_takes_part() -> None:
    plan = Plan(("put_get", "queue"), ("clusterpool", "multiprocessing"), 2, False, {})
    turns = [(figure.name, contender, number) for figure, contender, number in turns_of(plan)]
    assert turns[:4] == [
        ("put_get", "clusterpool", 1), ("put_get", MEMCPY, 1), ("put_get", "clusterpool", 2), ("put_get", MEMCPY, 2),
    ]  # fmt: skip
    assert turns[4:6] == [("queue", "clusterpool", 1), ("queue", "multiprocessing", 1)]
    assert len(turns) == 8


def test_the_commit_names_changes_but_not_those_of_results(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    code, result = tmp_path / "code.py", tmp_path / "benchmarks" / "results" / "latest.md"
    result.parent.mkdir(parents=True)
    for path in (code, result):
        path.write_text("one")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    clean = commit(tmp_path)
    assert clean and "+" not in clean
    result.write_text("two")
    assert commit(tmp_path) == clean
    names = set()
    for text in ("two", "three"):
        code.write_text(text)
        names.add(commit(tmp_path))
    assert len(names) == 2 and all(name.startswith(f"{clean}+") for name in names)
    assert commit(tmp_path.parent) == "unknown"
