"""What the samples say: medians, ratios, bars met or missed; for the terminal, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.figures import OURS, Ceiling, Figure, Metric, Speedup
from benchmarks.runner import Results


@dataclass(frozen=True)
class Verdict:
    """One bar and what was measured. is_met None: there is no sample to judge by."""

    bar: str
    measured: str
    is_met: bool | None

    def __str__(self) -> str:
        mark = {True: "met", False: "MISSED", None: "?"}[self.is_met]
        return f"{self.bar}: {self.measured} {mark}".replace(":  ", ": ")


def judge(bar: Speedup | Ceiling, ours: float | None, ratio: float | None, unit: str) -> Verdict:
    """Whether the bar is met by our median cost, or by the ratio of the other's to ours."""
    if isinstance(bar, Ceiling):
        text = f"at most {bar.at_most:g} {unit}"
        return Verdict(text, "", None) if ours is None else Verdict(text, show(ours), ours <= bar.at_most)
    text = f"{bar.at_least:g} x {bar.against}"
    return Verdict(text, "", None) if ratio is None else Verdict(text, f"{ratio:.2f} x", ratio >= bar.at_least)


def show(value: float) -> str:
    """Three significant digits, and no exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class Row:
    """One metric of one figure, with everybody's median."""

    figure: Figure
    metric: Metric
    costs: dict[str, float]
    verdicts: list[Verdict]
    previous: float | None

    def cell(self, contender: str) -> str:
        """The cost with its unit; a tilde where it was scaled up from fewer tasks."""
        if contender not in self.costs:
            return "-"
        is_scaled = self.metric.name == "seconds" and contender in self.figure.divisors
        return f"{'~' if is_scaled else ''}{show(self.costs[contender])} {self.metric.unit}"

    def judgement(self) -> str:
        """The bars, or for a figure without any, our value of the run before."""
        if self.verdicts:
            return "; ".join(str(verdict) for verdict in self.verdicts)
        return "reported" if self.previous is None else f"reported; was {show(self.previous)} {self.metric.unit}"


def rows_of(figures: Sequence[Figure], results: Results, previous: Mapping[str, Any]) -> list[Row]:
    """One row a metric. previous: the JSON of an earlier run, or nothing."""
    rows = []
    for figure in figures:
        for metric in figure.metrics:
            costs = {
                contender: cost
                for contender in figure.contenders
                if (cost := results.median(figure.name, contender, metric.name)) is not None
            }
            before = previous.get("medians", {}).get(figure.name, {}).get(metric.name, {}).get(OURS)
            verdicts = [verdict_on(bar, figure, metric, results) for bar in metric.bars]
            rows.append(Row(figure, metric, costs, verdicts, before))
    return rows


def verdict_on(bar: Speedup | Ceiling, figure: Figure, metric: Metric, results: Results) -> Verdict:
    """The bar of a metric, judged by the samples."""
    ratio = None
    if isinstance(bar, Speedup):
        ratio = results.ratio(figure.name, bar.against, metric.name, to=OURS)
    return judge(bar, results.median(figure.name, OURS, metric.name), ratio, metric.unit)


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The contenders that have a sample, in the order of the figures."""
    names: list[str] = []
    for row in rows:
        names += [name for name in row.costs if name not in names]
    return names


def table_of(rows: Sequence[Row], *, is_incomplete: bool = False) -> Table:
    """For the terminal."""
    columns = columns_of(rows)
    title = "Medians; less is better. A ratio is the median over the rounds of the other's cost / clusterpool's"
    table = Table(title=f"INCOMPLETE. {title}" if is_incomplete else title, show_lines=True)
    table.add_column("figure")
    for name in columns:
        table.add_column(name, justify="right", style="bold" if name == OURS else "")
    table.add_column("bar: measured")
    for row in rows:
        judgement = "\n".join(colour(verdict) for verdict in row.verdicts) or row.judgement()
        table.add_row(row.metric.title, *(row.cell(name) for name in columns), judgement)
    return table


def colour(verdict: Verdict) -> str:
    """For rich: green, red, or grey."""
    style = {True: "green", False: "red", None: "bright_black"}[verdict.is_met]
    return f"[{style}]{verdict}[/{style}]"


def summary_of(rows: Sequence[Row]) -> str:
    """One line: how many bars are met."""
    verdicts = [verdict for row in rows for verdict in row.verdicts]
    met = sum(verdict.is_met is True for verdict in verdicts)
    missed = sum(verdict.is_met is False for verdict in verdicts)
    return f"{met} bars met, {missed} missed, {len(verdicts) - met - missed} without a sample"


def markdown_of(rows: Sequence[Row], results: Results, machine: Mapping[str, str], *, note: str) -> str:
    """The same table for a page, with the machine it was made on."""
    columns = columns_of(rows)
    lines = ["# Benchmarks", "", note, "", ", ".join(f"{key} {value}" for key, value in machine.items()), ""]
    lines += ["| figure | " + " | ".join(columns) + " | bar: measured |"]
    lines += ["|---|" + "---:|" * len(columns) + "---|"]
    lines += [
        f"| {row.metric.title} | " + " | ".join(row.cell(name) for name in columns) + f" | {row.judgement()} |"
        for row in rows
    ]
    lines += [
        "",
        f"{summary_of(rows)}. Medians over the rounds, of costs (less is better) and of ratios; ~ scaled up from "
        "fewer tasks.",
    ]
    for figure, failures in results.failures.items():
        lines += [f"\nFailed: {contender} at {figure}." for contender in failures]
    return "\n".join(lines) + "\n"


def json_of(rows: Sequence[Row], results: Results, machine: Mapping[str, str], *, note: str) -> dict[str, Any]:
    """For programs: medians, bars and every sample."""
    medians: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        medians.setdefault(row.figure.name, {})[row.metric.name] = row.costs
    bars: list[dict[str, Any]] = [
        {
            "figure": row.figure.name,
            "metric": row.metric.name,
            "bar": verdict.bar,
            "measured": verdict.measured,
            "met": verdict.is_met,
        }
        for row in rows
        for verdict in row.verdicts
    ]
    return {
        "note": note,
        "machine": dict(machine),
        "medians": medians,
        "bars": bars,
        "samples": results.samples(),
        "failures": results.failures,
    }
