"""The soak: `./dev soak [--minutes 10] [--contenders clusterpool,ray,dask,loky] [--together]`.

A job of 200,000 tasks, arrays of 100 MB and 50 actors on four nodes of this machine, while workers, nodes, the control
store and a second driver are killed every few seconds. Every result is checked; the picture shows the throughput with
the kills.
"""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import click

from benchmarks.soak import picture, report
from benchmarks.soak.clusters import CLUSTERS, ROOT, Cluster
from benchmarks.soak.engines import OURS
from benchmarks.soak.job import MARK
from benchmarks.soak.leaks import Watch
from benchmarks.soak.monkey import Monkey
from benchmarks.soak.other_driver import OtherDriver

FOLDER = click.Path(path_type=Path, file_okay=False)
RESULTS = ROOT / "benchmarks" / "results"
TASKS = 200_000
# No kills at first, for something to compare with, and at the end, for it to recover.
CALM_S = 20.0
START_PATIENCE_S = 120.0
# Beyond its time, for a job that has not got enough done yet.
OVERTIME_S = 900.0


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--minutes", type=float, default=10.0, show_default=True, help="How long each job runs at least.")
@click.option("--contenders", default=",".join(CLUSTERS), show_default=True, help="Whom to run, with commas.")
@click.option("--together", is_flag=True, help="All at once, sharing the machine; else one after another.")
@click.option(
    "--tasks", type=int, default=TASKS, show_default=True, help="Small tasks that clusterpool's job must have done."
)
@click.option("--seed", type=int, default=4, show_default=True, help="Of the kills.")
@click.option("--results", type=FOLDER, default=RESULTS, help="Folder for the figures of each run.")
@click.option("--output", type=FOLDER, default=ROOT / "docs", help="Folder for soak.md and soak.png.")
@click.option("--join", "only_joins", is_flag=True, help="Run nobody: page and picture of what is there.")
def main(
    *, minutes: float, contenders: str, together: bool, tasks: int, seed: int, results: Path, output: Path,
    only_joins: bool,
) -> None:  # fmt: skip
    """A run replaces the contender's figures in the results folder; page and picture show all that are there.

    Exit code 1 if clusterpool gave a wrong result, lost or doubled one, raised an error, hung or left something.
    """
    names = [] if only_joins else [name.strip() for name in contenders.split(",") if name.strip()]
    if unknown := [name for name in names if name not in CLUSTERS]:
        raise click.BadParameter(f"{', '.join(unknown)}; known are {', '.join(CLUSTERS)}", param_hint="--contenders")
    results.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    how = f"beside {len(names) - 1} others" if together and len(names) > 1 else "alone"

    line = StartingLine(len(names) if together else 1)

    def run(name: str) -> None:
        tasks_min = tasks if name == OURS else 0
        kept = run_one(name, line, minutes=minutes, tasks_min=tasks_min, seed=seed, how=how)
        report.run_file(results, name).write_text(json.dumps(kept))
        click.echo(f"{name}: {report.summary(kept)}")
        for problem in kept["problems"]:
            click.echo(f"  {problem}")

    with ThreadPoolExecutor(max(len(names), 1) if together else 1) as threads:
        failures = [future.exception() for future in [threads.submit(run, name) for name in names]]
    runs = report.read_runs(results)
    (output / "soak.md").write_text(report.page(runs))
    with contextlib.suppress(ImportError):
        picture.draw([(run, report.summary(run)) for run in runs], output / "soak.png")
    for failure in filter(None, failures):
        raise failure
    sys.exit(any(run["problems"] for run in runs if run["contender"] == OURS and OURS in names))


class StartingLine:
    """Clusters are started one after another; the jobs of `count` begin when all of them are there, or have failed."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._turn = threading.Lock()
        self._are_all_there = threading.Event()

    def start(self, cluster: Cluster) -> None:
        """Start it; returns when the job may begin."""
        with self._turn:
            try:
                cluster.start()
            finally:
                self._left -= 1
                if self._left <= 0:
                    self._are_all_there.set()
        self._are_all_there.wait()


def run_one(name: str, line: StartingLine, *, minutes: float, tasks_min: int, seed: int, how: str) -> dict[str, Any]:
    """One contender's job on a cluster of its own."""
    click.echo(f"{name}: {minutes:g} minutes")
    with tempfile.TemporaryDirectory(prefix="sk-", ignore_cleanup_errors=True) as path:
        cluster = CLUSTERS[name](Path(path))
        watch = Watch(cluster)
        other = OtherDriver(cluster, name, Path(path))
        monkey = Monkey(cluster, other, seed, CALM_S)
        problems: list[str] = []
        try:
            line.start(cluster)
            lines, verdict = run_job(cluster, watch, monkey, seconds=minutes * 60, tasks_min=tasks_min)
            if verdict is not None:
                problems += [f"after the job: {left}" for left in watch.after_job()]
            cluster.stop()
            if name == OURS:  # the others have no command that ends one cluster and no other
                problems += [f"after all: {left}" for left in watch.after_all()]
        finally:
            cluster.clear()
    return report.kept(
        name,
        minutes,
        how,
        lines=lines,
        verdict=verdict,
        kills=monkey.kills,
        killed=monkey.counts(),
        gone_s=other.gone_s,
        problems=faults_of(verdict) + other.problems + problems,
        troubles=monkey.troubles,
        growth=watch.growth(),
    )


def run_job(
    cluster: Cluster, watch: Watch, monkey: Monkey, *, seconds: float, tasks_min: int
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The lines that the job printed, and its verdict: None if it hung or crashed."""
    command = [sys.executable, "-m", "benchmarks.soak.job", cluster.name, cluster.address, str(seconds), str(tasks_min)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=cluster.driver_environment(), stdout=subprocess.PIPE, stderr=cluster.log, text=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    printed: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=read_lines, args=(process.stdout, printed), daemon=True).start()
    lines: list[dict[str, Any]] = []
    verdict = None
    deadline_s = time.monotonic() + START_PATIENCE_S + seconds + OVERTIME_S
    is_started = is_calm_again = False
    while time.monotonic() < deadline_s:
        try:
            line = printed.get(timeout=5)
        except queue.Empty:
            continue
        if line is None:
            break
        if "verdict" in line:
            verdict = line["verdict"]
            break
        lines.append(line)
        if not is_started and line["tasks"]:
            is_started = True
            monkey.start(line["t"])
        if is_started and not is_calm_again and line["t"] > seconds - CALM_S and line["tasks"] > 0.95 * tasks_min:
            is_calm_again = True
            monkey.stop()
        if len(lines) % 5 == 0:
            watch.sample()
        if len(lines) % 30 == 0:
            click.echo(f"  {cluster.name}: {json.dumps({**line, 'kills': len(monkey.kills)})}")
    if is_started and not is_calm_again:
        monkey.stop()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return lines, verdict


def read_lines(output: IO[str], printed: queue.Queue[dict[str, Any] | None]) -> None:
    """Hand on what the job prints."""
    for line in output:
        if line.startswith(MARK):
            printed.put(json.loads(line.removeprefix(MARK)))
    printed.put(None)


def faults_of(verdict: dict[str, Any] | None) -> list[str]:
    """What must not be in a verdict."""
    if verdict is None:
        return ["the job ended without a verdict"]
    faults = [] if verdict["came_to_end"] else ["the job hung: nothing moved for minutes"]
    faults += [
        f"{verdict[name]} {text}"
        for name, text in (
            ("wrong", "wrong results"), ("missing", "results missing"), ("twice", "results delivered twice"),
            ("lost_states", "actors' answers that were not the sum of what they had been given"),
        )
        if verdict[name]
    ]  # fmt: skip
    faults += [f"{count} errors: {what}" for what, count in verdict["errors"].items()]
    return faults + [f"for example: {example}" for example in dict.fromkeys(verdict["examples"])][:8]


if __name__ == "__main__":
    main()
