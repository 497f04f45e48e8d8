"""The picture: small tasks a second over time, a panel a contender, kills marked. After the Ray paper, figure 11."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

COLOURS = {"worker": "#b8bec6", "node": "#b3261e", "store": "#1f5fa8"}
LINE_COLOUR = "#0b6e4f"
BIN_S = 2.0


def rate_curve(lines: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Times in seconds and small tasks a second, in bins of BIN_S."""
    times: list[float] = []
    rates: list[float] = []
    last_s, last_tasks = 0.0, 0
    for line in lines:
        if line["t"] - last_s >= BIN_S:
            times.append(line["t"])
            rates.append((line["tasks"] - last_tasks) / (line["t"] - last_s))
            last_s, last_tasks = line["t"], line["tasks"]
    return times, rates


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Writes the PNG. Raises ImportError where matplotlib is not installed."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(len(runs), 1, figsize=(11, 2.4 * len(runs) + 0.8), squeeze=False)
    for (panel,), run in zip(axes, runs, strict=True):
        times, rates = rate_curve(run["lines"])
        panel.plot(times, rates, color=LINE_COLOUR, linewidth=1.2)
        for kill_s, kind in run["kills"]:
            panel.axvline(kill_s, color=COLOURS[kind], linewidth=0.8, alpha=0.7, zorder=0)
        panel.set_ylim(bottom=0)
        panel.set_xlim(0, max([*times, 1]))
        panel.set_title(f"{run['contender']}: {run['summary']}", fontsize=9, loc="left")
        panel.set_ylabel("tasks / s", fontsize=8)
        panel.tick_params(labelsize=7)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    axes[-1][0].set_xlabel("seconds", fontsize=8)
    handles = [pyplot.Line2D([], [], color=colour, label=f"{kind} killed") for kind, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="upper right", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
