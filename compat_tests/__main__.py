"""The command line: `python -m compat_tests {multiprocessing|futures|joblib|report}`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from compat_tests import kept
from compat_tests.ci_part import CI_PART
from compat_tests.outcomes import Totals
from compat_tests.report import PAGE, make_page
from compat_tests.runner import Report, Request, closing_lines, run_suite
from compat_tests.subject import Subject
from compat_tests.suites import SUITES, SuiteMissing
from compat_tests.supervisor import Limits

_DEFAULTS = {
    "module": "clusterpool.multiprocessing",
    "executor": "clusterpool.futures.ProcessPoolExecutor",
    "backend": "clusterpool",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Runs the tests of CPython and of joblib, where they are installed, against clusterpool or another module."""


def _say(line: str) -> None:
    click.echo(line)
    sys.stdout.flush()


def _common_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option(
            "--only", multiple=True, metavar="CLASS", help="Part of a class's name, or Class.test; repeatable."
        ),
        click.option("--jobs", default=1, show_default=True, type=click.IntRange(min=1), help="Classes side by side."),
        click.option("--test-limit", default=60.0, show_default=True, help="Seconds for a test; longer is a hang."),
        click.option("--class-limit", default=900.0, show_default=True, help="Seconds for a class."),
        click.option("--retries", default=0, show_default=True, help="How often a test that failed is run again."),
        click.option("--baseline", is_flag=True, help="Run the reference first, instead of reading the kept baseline."),
        click.option("--save", is_flag=True, help="Keep the counts; of the reference, keep which tests it passes."),
        click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every outcome here."),
        click.option("--suite", "suite_folder", default="", help="A folder `test` for what this Python's lacks."),
    ):
        command = option(command)
    return command


@main.command("multiprocessing")
@click.option("--module", "name", default=_DEFAULTS["module"], show_default=True)
@_common_options
def multiprocessing_command(name: str, **options: Any) -> None:
    """`test._test_multiprocessing`, with the start method spawn, against a module."""
    _run_one("multiprocessing", name, **options)


@main.command("futures")
@click.option("--executor", "name", default=_DEFAULTS["executor"], show_default=True, help="package.module.Class")
@_common_options
def futures_command(name: str, **options: Any) -> None:
    """`test.test_concurrent_futures`, its tests of spawned process pools, against an executor."""
    _run_one("futures", name, **options)


@main.command("joblib")
@click.option("--backend", "name", default=_DEFAULTS["backend"], show_default=True)
@_common_options
def joblib_command(name: str, **options: Any) -> None:
    """joblib's own tests, with a backend as the default one."""
    _run_one("joblib", name, **options)


@main.command("all")
@_common_options
def all_command(**options: Any) -> None:
    """The three suites against clusterpool, one after the other."""
    _run_several([(name, ()) for name in SUITES], **options)


@main.command("ci")
@_common_options
def ci_command(**options: Any) -> None:
    """The part of the three suites that takes a few minutes (ci_part.py)."""
    _run_several(list(CI_PART.items()), **options)


def _run_several(parts: list[tuple[str, tuple[str, ...]]], **options: Any) -> None:
    if options.pop("only"):
        raise click.UsageError("--only is for one suite")
    totals, is_good = Totals(), True
    for suite_name, only in parts:
        try:
            report = _run(suite_name, _DEFAULTS[SUITES[suite_name].kind], only=only, **options)
        except SuiteMissing as error:
            _say(f"{suite_name} was left out: {error}")
            continue
        totals, is_good = totals + report.totals, is_good and report.is_good
    _say("")
    _say(str(totals))
    sys.exit(0 if is_good else 1)


def _run_one(suite_name: str, name: str, **options: Any) -> None:
    try:
        report = _run(suite_name, name, **options)
    except (SuiteMissing, ValueError) as error:
        raise click.ClickException(str(error)) from error
    sys.exit(0 if report.is_good else 1)


def _run(suite_name: str, name: str, *, baseline: bool, save: bool, json_file: Path | None, **options: Any) -> Report:
    """Raises: SuiteMissing; ValueError if `only` fits no test."""
    suite = SUITES[suite_name]
    request = Request(
        suite,
        Subject(suite.kind, name),
        only=options["only"],
        jobs=options["jobs"],
        limits=Limits(options["test_limit"], options["class_limit"]),
        retries=options["retries"],
        suite_folder=options["suite_folder"],
    )
    if save and request.only:
        raise click.UsageError("--save keeps a whole suite: leave out --only")
    known = _baseline_by_running(request) if baseline else kept.read_baseline(suite_name)
    started_s = time.monotonic()
    report = run_suite(request, _say, None if request.subject.is_reference else known)
    if json_file is not None:
        outcomes = [asdict(test) for test in report.tests]
        json_file.write_text(json.dumps({"suite": suite_name, "subject": name, "tests": outcomes}, indent=1))
    if save:
        _say(f"kept in {_keep(report)}")
    for line in closing_lines(report, time.monotonic() - started_s):
        _say(line)
    return report


def _baseline_by_running(request: Request) -> frozenset[str]:
    reference = Request(
        request.suite,
        request.suite.reference,
        only=request.only,
        jobs=request.jobs,
        limits=request.limits,
        suite_folder=request.suite_folder,
    )
    _say(f"first {reference.subject.name}, for the baseline")
    return kept.baseline_of(run_suite(reference, _say, None).tests)


def _keep(report: Report) -> Path:
    suite_name = report.request.suite.name
    if report.request.subject.is_reference:
        return kept.write_baseline(suite_name, kept.baseline_of(report.tests))
    if report.share is None:
        raise click.UsageError("there is no baseline to count against: run the reference with --save first")
    return kept.write_result(
        suite_name, report.request.subject.name, report.totals, report.share, by_class=report.share_by_class
    )


@main.command("report")
@click.option("--check", is_flag=True, help="Only say whether the page is up to date.")
def report_command(check: bool) -> None:
    """Makes docs/compatibility.md of compatibility/ and of the counts that --save kept."""
    page = make_page()
    if check:
        sys.exit(0 if PAGE.read_text() == page else f"{PAGE.name} is not up to date: run ./dev compat report")
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
