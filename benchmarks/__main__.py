"""The command line: `python -m benchmarks [--quick] [--only FIGURE] [--contenders NAMES] [--resume FILE]`."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks import chart, report
from benchmarks.figures import CONTENDERS, FIGURE_BY_NAME, FIGURES, OURS
from benchmarks.journal import Journal, NotResumable, Plan, read_plan
from benchmarks.machine import describe_machine
from benchmarks.runner import Results, run_all, turns_of

RESULTS = Path(__file__).parent / "results"
INTERRUPTED = 130  # as a shell says it of a program that SIGINT has ended


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Smaller amounts and two rounds: does it all work?")
@click.option("--only", multiple=True, type=click.Choice(list(FIGURE_BY_NAME)), help="This figure; may be repeated.")
@click.option("--contenders", help=f"Whom to measure, with commas.  [default: {','.join(CONTENDERS)}]")
@click.option("--repeats", type=click.IntRange(min=1), help="Rounds; 3 unless --quick.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, help="Folder for the results.")
@click.option("--strict", is_flag=True, help="Exit with 1 if a bar is missed.")
@click.option(
    "--resume",
    "resumed",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Go on with the run of which FILE has the samples, with its options where none are given.",
)
def main(
    *, quick: bool, only: tuple[str, ...], contenders: str | None, repeats: int | None, output: Path, strict: bool,
    resumed: Path | None,
) -> None:  # fmt: skip
    """Measures clusterpool against the others on this machine, in one run.

    A complete run writes latest.json, latest.md and latest.png, any other partial.*. Each sample is appended to
    samples-DATE-TIME.jsonl in the same folder as soon as it is made; --resume goes on from such a file, if commit,
    Python and machine are the same, and measures only what it has not got. With a higher --repeats that adds rounds.
    After Ctrl-C the table has what there is, and the exit code is 130. Else it is 1 if clusterpool itself failed at a
    figure, or with --strict if it missed a bar.
    """
    names = None if contenders is None else tuple(name.strip() for name in contenders.split(",") if name.strip())
    if unknown := [name for name in names or () if name not in CONTENDERS]:
        raise click.BadParameter(f"{', '.join(unknown)}; known are {', '.join(CONTENDERS)}", param_hint="--contenders")
    machine = describe_machine()
    figures = tuple(figure.name for figure in FIGURES if figure.name in only)
    try:
        if resumed is None:
            rounds = repeats or (2 if quick else 3)
            plan = Plan(figures or tuple(FIGURE_BY_NAME), names or CONTENDERS, rounds, quick, machine)
            journal = Journal.start(output, plan)
        else:
            before = read_plan(resumed)
            rounds, is_quick = repeats or before.repeats, quick or before.quick
            plan = Plan(figures or before.figures, names or before.contenders, rounds, is_quick, machine)
            journal = Journal.resume(resumed, plan)
    except NotResumable as error:
        raise click.ClickException(str(error)) from error
    raise SystemExit(run(plan, journal, output, is_strict=strict))


def run(plan: Plan, journal: Journal, output: Path, *, is_strict: bool) -> int:
    """Measures, writes and prints; returns the exit code."""
    console = Console()
    started_s = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    results = Results()
    is_interrupted = False
    try:
        run_all(plan, results, journal, report=lambda line: console.print(line, style="bright_black"))
    except KeyboardInterrupt:
        is_interrupted = True
    journal.close()
    note = note_of(plan, journal, is_interrupted=is_interrupted)
    figures = [FIGURE_BY_NAME[name] for name in plan.figures]
    rows = report.rows_of(figures, results, read_previous(output / "latest.json"))
    is_whole = not plan.quick and len(figures) == len(FIGURES) and set(plan.contenders) == set(CONTENDERS)
    stem = output / ("latest" if is_whole and not is_interrupted else "partial")
    output.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(report.json_of(rows, results, plan.machine, note=note), indent=1))
    stem.with_suffix(".md").write_text(report.markdown_of(rows, results, plan.machine, note=note))
    try:
        title = f"clusterpool and others on {plan.machine['cpus']} CPUs, median cost"
        chart.draw(rows, stem.with_suffix(".png"), title=f"{title} (incomplete)" if is_interrupted else title)
    except ImportError as error:
        console.print(f"no chart: {error}; ./dev bench installs what it needs")
    # Wide enough that the table is not squeezed when standard output is a file.
    wide = console if console.is_terminal else Console(width=200)
    wide.print(report.table_of(rows, is_incomplete=is_interrupted))
    for figure, failures in results.failures.items():
        for contender, text in failures.items():
            wide.print(f"{contender} failed at {figure}:\n{text}", markup=False)
    wide.print(f"{report.summary_of(rows)}; {time.monotonic() - started_s:.0f} s; {stem}.{{json,md,png}}")
    if is_interrupted:
        wide.print(f"{note}\nGo on with: ./dev bench --resume {journal.path}", markup=False, soft_wrap=True)
        return INTERRUPTED
    ours_failed = any(OURS in failures for failures in results.failures.values())
    is_missed = any(verdict.is_met is not True for row in rows for verdict in row.verdicts)
    return 1 if ours_failed or (is_strict and is_missed) else 0


def note_of(plan: Plan, journal: Journal, *, is_interrupted: bool) -> str:
    """What a reader of the table must know of the run."""
    note = f"{plan.repeats} interleaved rounds, each sample in a process of its own."
    if plan.quick:
        note += " A quick run: the amounts are a fraction of what the titles say."
    if journal.starts > 1:
        note += f" Measured in {journal.starts} goes."
    if is_interrupted:
        turns = {(figure.name, contender, number) for figure, contender, number in turns_of(plan)}
        made = turns.intersection((line.figure, line.contender, line.round_number) for line in journal.samples)
        note = f"INCOMPLETE: interrupted with {len(made)} samples of {len(turns)}. {note}"
    return note


def read_previous(path: Path) -> dict[str, Any]:
    """The run before this one, if there was any."""
    try:
        previous: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return previous


if __name__ == "__main__":
    main()
