"""What is kept of a run, and the page that is made of all runs that are kept."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.soak.clusters import CLUSTERS
from benchmarks.soak.picture import rate_curve

INTRODUCTION = """# The soak

Made by `./dev soak`: small tasks of about 2 ms, chains of arrays of 100 MB and calls of 50 actors, on four nodes of
one machine, while processes are killed with `kill -9` every 2 to 5 seconds. Of twenty, on average: twelve are workers,
three nodes, one the head's node (or the one that has taken over its part), two the control store, two a second driver,
whose workers must be gone within 5 s while the first driver sees nothing of it. Nodes and drivers are replaced; only
the node of the drivers is spared. The others are spared what they do not promise to survive: Ray the head and the
control store, which nobody starts again for it, Dask its scheduler; loky has one driver and no nodes. Each tool's own
retries are on; what reaches the program nevertheless is an error. Ray and Dask keep no state of an actor that is
started again.
"""


def kept(name: str, minutes: float, how: str, **parts: Any) -> dict[str, Any]:
    """A run as it is kept: of the job's lines only the curve, and the last."""
    lines: list[dict[str, Any]] = parts.pop("lines")
    curve = [[line["t"], line["tasks"]] for line in lines]
    return {
        "contender": name,
        "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "minutes": minutes,
        "how": how,
        "machine": {key: value for key, value in describe_machine().items() if isinstance(value, (str, int))},
        "curve": curve,
        "last": parts["verdict"] or (lines[-1] if lines else None),
        "rates": recovery(curve, parts["kills"], minutes * 60),
        **parts,
    }


def recovery(curve: list[list[float]], kills: list[tuple[float, str]], seconds: float) -> dict[str, float]:
    """Median small tasks a second before the first kill, under fire, and after the last."""
    times, rates = rate_curve(curve)
    first_s = kills[0][0] if kills else seconds
    last_s = kills[-1][0] if kills else seconds
    parts = {
        "before": [rate for time_s, rate in zip(times, rates, strict=True) if 4 < time_s <= first_s],
        "under fire": [rate for time_s, rate in zip(times, rates, strict=True) if first_s < time_s <= last_s],
        "after": [rate for time_s, rate in zip(times, rates, strict=True) if time_s > last_s + 5],
    }
    return {name: round(statistics.median(part), 1) for name, part in parts.items() if part}


def summary(run: dict[str, Any]) -> str:
    """One line."""
    last = run["last"]
    if last is None:
        return "nothing was done"
    errors = sum(last["errors"].values())
    wrong = last["wrong"] + last["twice"] + last.get("missing", 0)
    return (
        f"{last['tasks']:,} tasks, {last['chains']} chains of 100 MB arrays, {last['calls']:,} actor calls; "
        f"killed {run['killed']}; {wrong} wrong, missing or doubled, {last['lost_states']} lost actor states, "
        f"{errors} errors{'' if came_to_end(run) else '; DID NOT END'}"
    )


def came_to_end(run: dict[str, Any]) -> bool:
    """Whether the job ended as it should."""
    return bool(run["verdict"] and run["verdict"]["came_to_end"])


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """The kept run of each contender."""
    paths = [run_file(folder, name) for name in CLUSTERS]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def run_file(folder: Path, name: str) -> Path:
    """Where the run of a contender is kept."""
    return folder / f"soak-{name}.json"


def page(runs: list[dict[str, Any]]) -> str:
    """The page."""
    text = [
        INTRODUCTION,
        "![Throughput with the kills marked](soak.png)\n",
        "| | time | tasks | chains | calls | killed | wrong, missing, twice | lost actor states | errors | "
        "tasks/s before, under fire, after |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(row(run) for run in runs),
    ]
    for run in runs:
        text.append(f"\n## {run['contender']}\n")
        text.append(f"{summary(run)}.\n")
        if run["gone_s"]:
            text.append(
                f"What killed drivers had was gone after {statistics.median(run['gone_s']):.2f} s (median of "
                f"{len(run['gone_s'])}), {max(run['gone_s']):.2f} s at most.\n"
            )
        if run["growth"]:
            grown = ", ".join(f"{name} {first:g} → {last:g}" for name, (first, last) in run["growth"].items())
            text.append(f"The drivers' node when all was warm and at the end: {grown}.\n")
        text += [f"- {problem}" for problem in run["problems"][:12]] or ["No problem was found."]
        machine = ", ".join(f"{key} {value}" for key, value in run["machine"].items())
        text.append(f"\nRun {run['how']} on {run['at']}: {machine}")
    return "\n".join(text) + "\n"


def row(run: dict[str, Any]) -> str:
    """A line of the table."""
    last = run["last"]
    if last is None:
        return f"| {run['contender']} | did not start | | | | | | | | |"
    seconds = run["curve"][-1][0] if run["curve"] else 0
    ended = "" if came_to_end(run) else " (did not end)"
    rates = ", ".join(f"{run['rates'].get(part, 0):g}" for part in ("before", "under fire", "after"))
    return (
        f"| {run['contender']} | {seconds:.0f} s{ended} | {last['tasks']:,} | {last['chains']} | {last['calls']:,} "
        f"| {len(run['kills'])}: {run['killed']} | {last['wrong']}, {last.get('missing', '?')}, {last['twice']} "
        f"| {last['lost_states']} | {sum(last['errors'].values())} | {rates} |"
    )
