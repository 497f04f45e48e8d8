"""The picture: small tasks a second over time, a panel a contender, kills marked. After the Ray paper, figure 11."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

COLOURS = {"worker": "#c9ced5", "node": "#b3261e", "head": "#d8730d", "store": "#1f5fa8", "driver": "#7b3fa0"}
LINE_COLOUR = "#0b6e4f"
BIN_S = 2.0


def rate_curve(curve: list[list[float]]) -> tuple[list[float], list[float]]:
    """Times in seconds and small tasks a second, in bins of BIN_S; of seconds and tasks done by then."""
    times: list[float] = []
    rates: list[float] = []
    last_s, last_tasks = 0.0, 0.0
    for time_s, tasks in curve:
        if time_s - last_s >= BIN_S:
            times.append(time_s)
            rates.append((tasks - last_tasks) / (time_s - last_s))
            last_s, last_tasks = time_s, tasks
    return times, rates


def draw(runs: list[tuple[dict[str, Any], str]], path: Path) -> None:
    """Writes the PNG, of runs with their titles. Raises ImportError where matplotlib is not installed."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(len(runs), 1, figsize=(13, 2.4 * len(runs) + 0.8), squeeze=False)
    for (panel,), (run, title) in zip(axes, runs, strict=True):
        times, rates = rate_curve(run["curve"])
        panel.plot(times, rates, color=LINE_COLOUR, linewidth=1.2)
        for kill_s, kind in run["kills"]:
            panel.axvline(kill_s, color=COLOURS[kind], linewidth=0.8, alpha=0.7, zorder=0)
        panel.set_ylim(bottom=0)
        panel.set_xlim(0, max([*times, 1]))
        panel.set_title(f"{run['contender']}: {title}", fontsize=8, loc="left")
        panel.set_ylabel("tasks / s", fontsize=8)
        panel.tick_params(labelsize=7)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    axes[-1][0].set_xlabel("seconds", fontsize=8)
    handles = [pyplot.Line2D([], [], color=colour, label=f"{kind} killed") for kind, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="upper right", ncols=len(COLOURS), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
