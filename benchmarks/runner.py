"""Runs the samples, contender by contender and round by round, so that a busy minute hits all alike."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.figures import FIGURES, MEMCPY, Figure
from benchmarks.journal import Journal, Plan, Sample
from benchmarks.sample import MARK

ROOT = Path(__file__).parents[1]
# A contender that needs longer than this for one sample is reported as failed; the slowest need about 20 s.
SAMPLE_TIMEOUT_S = 180.0
# For what a killed sample had started: our own node, for one, finds its driver dead within a second, and tidies up.
END_PATIENCE_S = 10.0
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Results:
    """All samples: figure -> contender -> metric -> round -> value; and the end of what the failed ones printed."""

    by_round: dict[str, dict[str, dict[str, dict[int, float]]]] = field(default_factory=dict)
    failures: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, sample: Sample) -> None:
        """Notes the values of one sample."""
        metrics = self.by_round.setdefault(sample.figure, {}).setdefault(sample.contender, {})
        for metric, value in sample.costs.items():
            metrics.setdefault(metric, {})[sample.round_number] = value

    def _values(self, figure: str, contender: str, metric: str) -> dict[int, float]:
        return self.by_round.get(figure, {}).get(contender, {}).get(metric, {})

    def median(self, figure: str, contender: str, metric: str) -> float | None:
        """The median over the rounds; None where there is no sample."""
        values = self._values(figure, contender, metric)
        return statistics.median(values.values()) if values else None

    def ratio(self, figure: str, contender: str, metric: str, *, to: str) -> float | None:
        """The median over the rounds of a contender's cost divided by that of `to`; None where no round has both.

        Within a round the two are measured seconds apart, and what a shared machine is slow at for a minute concerns
        both. The medians of each may come from different minutes: of the same five rounds of map with chunksize=1
        these made 2.43, the rounds 2.91.
        """
        theirs, ours = self._values(figure, contender, metric), self._values(figure, to, metric)
        ratios = [theirs[round_number] / ours[round_number] for round_number in theirs if ours.get(round_number)]
        return statistics.median(ratios) if ratios else None

    def samples(self) -> dict[str, dict[str, dict[str, list[float]]]]:
        """figure -> contender -> metric -> values, first round first."""
        return {
            figure: {
                contender: {metric: [values[n] for n in sorted(values)] for metric, values in metrics.items()}
                for contender, metrics in contenders.items()
            }
            for figure, contenders in self.by_round.items()
        }


class SampleFailed(Exception):
    """The process of a sample failed or took too long; the text is the end of what it printed."""


def turns_of(plan: Plan) -> list[tuple[Figure, str, int]]:
    """Every figure for every contender that has it, in each round: figure, contender and the round's number."""
    return [
        (figure, contender, round_number)
        for figure in FIGURES
        if figure.name in plan.figures
        for round_number in range(1, plan.repeats + 1)
        for contender in figure.contenders
        if contender in plan.contenders or contender == MEMCPY
    ]


def run_all(plan: Plan, results: Results, journal: Journal, *, report: Callable[[str], None]) -> None:
    """Takes each turn of the plan of which the journal has no sample yet, and adds to both.

    A contender that fails at a figure is not asked again. No process of a sample is left, after Ctrl-C neither.
    """
    turns = turns_of(plan)
    known = {(sample.figure, sample.contender, sample.round_number): sample for sample in journal.samples}
    for figure, contender, round_number in turns:
        if sample := known.get((figure.name, contender, round_number)):
            results.add(sample)
    with private_environment() as environment:
        for figure, contender, round_number in turns:
            is_known = (figure.name, contender, round_number) in known
            if is_known or contender in results.failures.get(figure.name, {}):
                continue
            report(f"{figure.name}: {contender}, round {round_number} of {plan.repeats}")
            try:
                costs = run_sample(figure, contender, quick=plan.quick, environment=environment)
            except SampleFailed as error:
                results.failures.setdefault(figure.name, {})[contender] = str(error)
                report(f"{figure.name}: {contender} FAILED: {str(error).strip().splitlines()[-1]}")
            else:
                sample = Sample(figure.name, contender, round_number, costs)
                journal.append(sample)
                results.add(sample)


def run_sample(figure: Figure, contender: str, *, quick: bool, environment: dict[str, str]) -> dict[str, float]:
    """One fresh process, its group killed afterwards. Raises SampleFailed."""
    divisor = figure.divisors.get(contender, 1)
    amount = max((figure.quick_amount if quick else figure.amount) // divisor, 1)
    command = [sys.executable, "-m", "benchmarks.sample", contender, figure.name, str(amount)]
    with tempfile.TemporaryFile("w+") as output:
        # An interrupt while the process is being started would leave it behind: it comes when we can end it.
        signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
        process = None
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True,
                preexec_fn=_unblock_interrupts,
            )  # fmt: skip
            _unblock_interrupts()
            exit_code = process.wait(SAMPLE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            exit_code = None
        finally:
            if process is not None:
                end_tree(process)
            _unblock_interrupts()
        output.seek(0)
        printed = output.read()
    if exit_code != 0:
        what = f"took more than {SAMPLE_TIMEOUT_S:g} s" if exit_code is None else f"exit code {exit_code}"
        raise SampleFailed(f"{printed[-2000:]}\n({what}) {last_line(printed)}")
    return scaled(parse(printed), divisor)


def _unblock_interrupts() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPTS)


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Whatever the library forgot must not disturb the next sample, nor outlive a run that was interrupted."""
    started = []
    if process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # Those in groups of their own end by themselves where a library has thought of its user's death, and tidy up first.
    for forgotten in psutil.wait_procs(started, END_PATIENCE_S)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            forgotten.kill()


def last_line(printed: str) -> str:
    """The line that most likely says why."""
    lines = printed.strip().splitlines()
    return lines[-1] if lines else ""


def parse(printed: str) -> dict[str, float]:
    """The sample among whatever else was printed. Raises SampleFailed."""
    for line in printed.splitlines():
        if line.startswith(MARK):
            sample: dict[str, float] = json.loads(line.removeprefix(MARK))
            return sample
    raise SampleFailed(f"{printed[-2000:]}\nno sample was printed")


def scaled(sample: dict[str, float], divisor: int) -> dict[str, float]:
    """What the full amount would have cost. Costs per task or per call stay as they are."""
    return {metric: value * divisor if metric == "seconds" else value for metric, value in sample.items()}


@contextlib.contextmanager
def private_environment() -> Iterator[dict[str, str]]:
    """An environment in which every clusterpool is an embedded one, and no library phones home."""
    # Short, because the path of a UNIX socket has 107 bytes at the most.
    folder = tempfile.mkdtemp(prefix="cpb-")
    environment = dict(os.environ)
    environment.pop("CLUSTERPOOL_ADDRESS", None)
    environment.update(
        CLUSTERPOOL_HOME=f"{folder}/home",
        CLUSTERPOOL_TMPDIR=f"{folder}/tmp",
        TMPDIR=f"{folder}/tmp",
        DASK_TEMPORARY_DIRECTORY=f"{folder}/tmp",
        PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        RAY_USAGE_STATS_ENABLED="0",
        DO_NOT_TRACK="1",
    )
    for name in ("home", "tmp"):
        os.mkdir(f"{folder}/{name}", 0o700)
    try:
        yield environment
    finally:
        shutil.rmtree(folder, ignore_errors=True)
