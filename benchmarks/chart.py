"""The chart: one panel a metric, one bar a contender, logarithmic, since costs differ a thousandfold."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import OURS
from benchmarks.report import Row, show

COLUMNS = 3
PANEL_INCHES = (5.2, 2.3)
OUR_COLOUR, OTHER_COLOUR, MISSED_COLOUR = "#0b6e4f", "#b8bec6", "#b3261e"


def draw(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Writes the PNG. Raises ImportError where matplotlib is not installed."""
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    shown = [row for row in rows if row.costs]
    lines = max(-(-len(shown) // COLUMNS), 1)
    figure, axes = pyplot.subplots(
        lines, COLUMNS, figsize=(PANEL_INCHES[0] * COLUMNS, PANEL_INCHES[1] * lines + 0.6), squeeze=False
    )
    panels = list(axes.flat)
    for panel, row in zip(panels, shown, strict=False):
        draw_panel(panel, row)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    figure.suptitle(title, fontsize=13, fontweight="bold")
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_panel(panel: Any, row: Row) -> None:
    """Ours on top and coloured: green, or red where a bar is missed."""
    names = list(row.costs)
    costs = [row.costs[name] for name in names]
    is_missed = any(verdict.is_met is False for verdict in row.verdicts)
    ours = MISSED_COLOUR if is_missed else OUR_COLOUR
    positions = range(len(names))
    panel.barh(positions, costs, color=[ours if name == OURS else OTHER_COLOUR for name in names], height=0.68)
    panel.set_yticks(list(positions), names, fontsize=8)
    panel.invert_yaxis()
    panel.set_xscale("log")
    panel.minorticks_off()
    # Room on the right for the longest bar's label, on the left so that the shortest bar is still seen.
    panel.set_xlim(min(costs) / 4, max(costs) * 8)
    for position, cost in zip(positions, costs, strict=True):
        label = f" {show(cost)} {row.metric.unit}"
        if row.costs.get(OURS) and names[position] != OURS:
            label += f"  ({show(cost / row.costs[OURS])} x)"
        panel.text(cost, position, label, va="center", fontsize=7.5)
    panel.set_title(row.metric.title, fontsize=9, loc="left")
    if row.verdicts:
        panel.set_xlabel("; ".join(str(verdict) for verdict in row.verdicts), fontsize=7)
    panel.tick_params(axis="x", labelsize=7)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
