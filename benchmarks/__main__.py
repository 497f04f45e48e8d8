"""The command line: `python -m benchmarks [--quick] [--only FIGURE] [--contenders NAMES]`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks import chart, report
from benchmarks.figures import CONTENDERS, FIGURE_BY_NAME, FIGURES, OURS
from benchmarks.machine import describe_machine
from benchmarks.runner import run_all

RESULTS = Path(__file__).parent / "results"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Smaller amounts and two rounds: does it all work?")
@click.option("--only", multiple=True, type=click.Choice(list(FIGURE_BY_NAME)), help="This figure; may be repeated.")
@click.option("--contenders", default=",".join(CONTENDERS), show_default=True, help="Whom to measure, with commas.")
@click.option("--repeats", type=click.IntRange(min=1), help="Rounds; 3 unless --quick.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, help="Folder for the results.")
@click.option("--strict", is_flag=True, help="Exit with 1 if a bar is missed.")
def main(quick: bool, only: tuple[str, ...], contenders: str, repeats: int | None, output: Path, strict: bool) -> None:
    """Measures clusterpool against the others on this machine, in one run.

    A complete run writes latest.json, latest.md and latest.png, any other partial.*. The exit code is 1 if
    clusterpool itself failed at a figure, or with --strict if it missed a bar.
    """
    names = [name.strip() for name in contenders.split(",") if name.strip()]
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise click.BadParameter(f"{', '.join(unknown)}; known are {', '.join(CONTENDERS)}", param_hint="--contenders")
    figures = [figure for figure in FIGURES if not only or figure.name in only]
    rounds = repeats or (2 if quick else 3)
    console = Console()
    started_s = time.monotonic()
    results = run_all(
        figures,
        names,
        repeats=rounds,
        quick=quick,
        report=lambda line: console.print(line, style="bright_black"),
    )
    note = f"{rounds} interleaved rounds, each sample in a process of its own."
    if quick:
        note += " A quick run: the amounts are a fraction of what the titles say."
    is_complete = not quick and not only and set(names) == set(CONTENDERS)
    rows = report.rows_of(figures, results, read_previous(output / "latest.json"))
    machine = describe_machine()
    output.mkdir(parents=True, exist_ok=True)
    stem = output / ("latest" if is_complete else "partial")
    stem.with_suffix(".json").write_text(json.dumps(report.json_of(rows, results, machine, note=note), indent=1))
    stem.with_suffix(".md").write_text(report.markdown_of(rows, results, machine, note=note))
    try:
        title = f"clusterpool and others on {machine['cpus']} CPUs, median cost"
        chart.draw(rows, stem.with_suffix(".png"), title=title)
    except ImportError as error:
        console.print(f"no chart: {error}; ./dev bench installs what it needs")
    # Wide enough that the table is not squeezed when standard output is a file.
    wide = console if console.is_terminal else Console(width=200)
    wide.print(report.table_of(rows))
    for figure, failures in results.failures.items():
        for contender, text in failures.items():
            wide.print(f"{contender} failed at {figure}:\n{text}", markup=False)
    wide.print(f"{report.summary_of(rows)}; {time.monotonic() - started_s:.0f} s; {stem}.{{json,md,png}}")
    ours_failed = any(OURS in failures for failures in results.failures.values())
    is_missed = any(verdict.is_met is not True for row in rows for verdict in row.verdicts)
    raise SystemExit(1 if ours_failed or (strict and is_missed) else 0)


def read_previous(path: Path) -> dict[str, Any]:
    """The run before this one, if there was any."""
    try:
        previous: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return previous


if __name__ == "__main__":
    main()
