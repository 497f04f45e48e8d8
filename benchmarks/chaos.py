"""The soak: `python -m benchmarks.chaos [--minutes 10] [--contenders clusterpool,ray,dask,loky]`.

A job of 200,000 tasks, arrays of 100 MB and 50 actors on four nodes of this machine, while workers, nodes and the
control store are killed every few seconds. Every result is checked; the picture shows the throughput with the kills.
"""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

import click

from benchmarks.machine import describe_machine
from benchmarks.soak import picture
from benchmarks.soak.clusters import CLUSTERS, Cluster
from benchmarks.soak.job import MARK
from benchmarks.soak.leaks import Watch
from benchmarks.soak.monkey import Monkey

ROOT = Path(__file__).parents[1]
OURS = "clusterpool"
TASKS = 200_000
# No kills at first, for something to compare with, and at the end, for it to recover.
CALM_S = 20.0
START_PATIENCE_S = 120.0
# Beyond its time, for a job that has not got enough done yet.
OVERTIME_S = 900.0


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--minutes", type=float, default=10.0, show_default=True, help="How long clusterpool's job runs at least."
)
@click.option("--others-minutes", type=float, default=4.0, show_default=True, help="How long the others' jobs run.")
@click.option("--tasks", type=int, default=TASKS, show_default=True, help="Small tasks that ours must have done.")
@click.option("--contenders", default=",".join(CLUSTERS), show_default=True, help="Whom to run, with commas.")
@click.option("--seed", type=int, default=4, show_default=True, help="Of the kills.")
@click.option(
    "--output", type=click.Path(path_type=Path), default=ROOT / "docs", help="Folder for soak.md and soak.png."
)
def main(minutes: float, others_minutes: float, tasks: int, contenders: str, seed: int, output: Path) -> None:
    """Exit code 1 if clusterpool gave a wrong result, lost or doubled one, raised an error, hung or left something."""
    runs = []
    for name in contenders.split(","):
        is_ours = name == OURS
        click.echo(f"{name}: {minutes if is_ours else others_minutes:g} minutes")
        seconds = (minutes if is_ours else others_minutes) * 60
        runs.append(run_one(name, seconds=seconds, tasks_min=tasks if is_ours else 0, seed=seed))
        click.echo(f"{name}: {runs[-1]['summary']}")
        for problem in runs[-1]["problems"]:
            click.echo(f"  {problem}")
    output.mkdir(parents=True, exist_ok=True)
    (output / "soak.md").write_text(report(runs))
    with contextlib.suppress(ImportError):
        picture.draw(runs, output / "soak.png")
    ours = [run for run in runs if run["contender"] == OURS]
    sys.exit(any(run["problems"] for run in ours))


def run_one(name: str, *, seconds: float, tasks_min: int, seed: int) -> dict[str, Any]:
    """One contender's job on a cluster of its own."""
    with tempfile.TemporaryDirectory(prefix="sk-", ignore_cleanup_errors=True) as path:
        cluster = CLUSTERS[name](Path(path))
        watch = Watch(cluster)
        monkey = Monkey(cluster, seed, CALM_S)
        problems: list[str] = []
        lines: list[dict[str, Any]] = []
        verdict: dict[str, Any] | None = None
        try:
            address = cluster.start()
            watch.start()
            lines, verdict = run_job(cluster, watch, monkey, (name, address), seconds=seconds, tasks_min=tasks_min)
            if verdict is not None:
                problems += [f"after the job: {left}" for left in watch.after_job()]
            cluster.stop()
            if name == OURS:  # the others have no command that ends one cluster and no other
                problems += [f"after all: {left}" for left in watch.after_all()]
        finally:
            cluster.clear()
    problems = faults_of(verdict) + problems
    return {
        "contender": name,
        "lines": lines,
        "verdict": verdict,
        "kills": monkey.kills,
        "troubles": monkey.troubles,
        "problems": problems,
        "growth": watch.growth(),
        "rates": recovery(lines, monkey.kills, seconds),
        "summary": summary(lines, verdict, monkey),
    }


def run_job(
    cluster: Cluster, watch: Watch, monkey: Monkey, contender: tuple[str, str], *, seconds: float, tasks_min: int
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The lines that the job printed, and its verdict: None if it hung or crashed."""
    command = [sys.executable, "-m", "benchmarks.soak.job", *contender, str(seconds), str(tasks_min)]
    environment = {**cluster.environment, "PYTHONPATH": f"{ROOT}:{cluster.environment.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=cluster.log, text=True,
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
            click.echo(f"  {json.dumps({**line, 'kills': len(monkey.kills)})}")
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


def recovery(lines: list[dict[str, Any]], kills: list[tuple[float, str]], seconds: float) -> dict[str, float]:
    """Median small tasks a second before the first kill, under fire, and after the last."""
    times, rates = picture.rate_curve(lines)
    first_s = kills[0][0] if kills else seconds
    last_s = kills[-1][0] if kills else seconds
    parts = {
        "before": [rate for time_s, rate in zip(times, rates, strict=True) if 4 < time_s <= first_s],
        "under fire": [rate for time_s, rate in zip(times, rates, strict=True) if first_s < time_s <= last_s],
        "after": [rate for time_s, rate in zip(times, rates, strict=True) if time_s > last_s + 5],
    }
    return {name: round(statistics.median(part), 1) for name, part in parts.items() if part}


def summary(lines: list[dict[str, Any]], verdict: dict[str, Any] | None, monkey: Monkey) -> str:
    """One line."""
    last = verdict or (lines[-1] if lines else None)
    if last is None:
        return "nothing was done"
    kinds = [kind for _, kind in monkey.kills]
    killed = ", ".join(
        f"{kinds.count(kind)} {kind}{'s' * (kinds.count(kind) > 1)}"
        for kind in ("worker", "node", "store")
        if kind in kinds
    )
    errors = sum(last["errors"].values())
    wrong = last["wrong"] + last["twice"] + last.get("missing", 0)
    end = "" if verdict and verdict["came_to_end"] else "; DID NOT END"
    return (
        f"{last['tasks']:,} tasks, {last['chains']} chains of 100 MB arrays, {last['calls']:,} actor calls; "
        f"killed {killed or 'nobody'}; {wrong} wrong, missing or doubled, {last['lost_states']} lost actor states, "
        f"{errors} errors{end}"
    )


def report(runs: list[dict[str, Any]]) -> str:
    """The page."""
    machine = ", ".join(
        f"{name} {value}" for name, value in describe_machine().items() if isinstance(value, (str, int))
    )
    text = [
        "# The soak\n",
        "Made by `python -m benchmarks.chaos`: small tasks of about 2 ms, chains of arrays of 100 MB and calls of 50 "
        "actors, on four nodes of one machine, while processes are killed with `kill -9` every 2 to 5 seconds: "
        "7 of 10 times a worker, twice a node (not the head's), which is replaced, once the control store, where the "
        "tool starts that again. The tool's own retries are on; what reaches the program nevertheless is an error.\n",
        f"{machine}\n",
        "![Throughput with the kills marked](soak.png)\n",
        "| | time | tasks | chains | calls | killed | wrong, missing, twice | lost actor states | errors | "
        "tasks/s before, under fire, after |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        last = run["verdict"] or (run["lines"][-1] if run["lines"] else None)
        if last is None:
            text.append(f"| {run['contender']} | did not start | | | | | | | | |")
            continue
        seconds = run["lines"][-1]["t"] if run["lines"] else 0
        ended = "" if run["verdict"] and run["verdict"]["came_to_end"] else " (did not end)"
        rates = ", ".join(f"{run['rates'].get(part, 0):g}" for part in ("before", "under fire", "after"))
        text.append(
            f"| {run['contender']} | {seconds:.0f} s{ended} | {last['tasks']:,} | {last['chains']} | {last['calls']:,} "
            f"| {len(run['kills'])} | {last['wrong']}, {last.get('missing', '?')}, {last['twice']} "
            f"| {last['lost_states']} | {sum(last['errors'].values())} | {rates} |"
        )
    for run in runs:
        text.append(f"\n## {run['contender']}\n")
        text.append(f"{run['summary']}.\n")
        if run["growth"]:
            grown = ", ".join(f"{name} {first:g} → {last:g}" for name, (first, last) in run["growth"].items())
            text.append(f"The head node when all was warm and at the end: {grown}.\n")
        text += [f"- {problem}" for problem in run["problems"][:12]] or ["No problem was found."]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
