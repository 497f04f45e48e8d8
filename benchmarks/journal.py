"""The samples of a run as a file of JSON lines, each written when it is made: a run broken off goes on from there.

A line is a `Plan`, the first one and one more each time that the run is taken up again, or a `Sample`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import msgspec


class Plan(msgspec.Struct, frozen=True, tag="plan", forbid_unknown_fields=True):
    """What a run measures, by name, and where: samples go together only if all of `machine` is the same."""

    figures: tuple[str, ...]
    contenders: tuple[str, ...]
    repeats: int
    quick: bool
    machine: dict[str, str]


class Sample(msgspec.Struct, frozen=True, tag="sample", forbid_unknown_fields=True):
    """What one contender's process said in one round: cost by metric."""

    figure: str
    contender: str
    round_number: int
    costs: dict[str, float]


class NotResumable(Exception):
    """A run cannot go on from this file; the text says why."""


class Journal:
    """Appends to the file; opened by `start` or `resume`."""

    def __init__(self, path: Path, file: BinaryIO, samples: Iterable[Sample] = ()) -> None:
        self.path = path
        self._file = file
        self.samples = list(samples)  # of all starts, oldest first
        self.starts = 1

    @classmethod
    def start(cls, folder: Path, plan: Plan) -> Journal:
        """A new file in the folder, named after the time."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / time.strftime("samples-%Y%m%d-%H%M%S.jsonl")
        journal = cls(path, path.open("xb"))
        journal._write(plan)
        return journal

    @classmethod
    def resume(cls, path: Path, plan: Plan) -> Journal:
        """Go on with a file of an earlier start.

        Raises: NotResumable if the plan is for another commit, Python or machine, or for other amounts.
        """
        plans, samples, size = _parse(path)
        earlier = plans[-1]
        if differences := _differences(earlier, plan):
            raise NotResumable(
                f"{path} was not measured as it would be now: {'; '.join(differences)}. Samples of both do not go"
                " together: go back there, or start anew without --resume"
            )
        file = path.open("r+b")
        file.truncate(size)
        file.seek(size)
        journal = cls(path, file, samples)
        journal.starts = len(plans) + 1
        journal._write(plan)
        return journal

    def append(self, sample: Sample) -> None:
        """It is in the file when this returns."""
        self.samples.append(sample)
        self._write(sample)

    def close(self) -> None:
        """The file stays."""
        self._file.close()

    def _write(self, line: Plan | Sample) -> None:
        self._file.write(msgspec.json.encode(line) + b"\n")
        self._file.flush()


def read_plan(path: Path) -> Plan:
    """What the run measured when it was last started.

    Raises: NotResumable if the file cannot be read or is no journal.
    """
    return _parse(path)[0][-1]


def _parse(path: Path) -> tuple[list[Plan], list[Sample], int]:
    """All lines, and the size of the file up to the end of the last whole one: a run may have died while it wrote."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise NotResumable(f"{path} cannot be read: {error.strerror}") from error
    size = content.rfind(b"\n") + 1
    plans: list[Plan] = []
    samples: list[Sample] = []
    for number, text in enumerate(content[:size].splitlines(), 1):
        try:
            line: Plan | Sample = msgspec.json.decode(text, type=Plan | Sample)
        except ValueError as error:
            raise NotResumable(f"{path}, line {number} is no line of a benchmark's samples: {error}") from error
        if isinstance(line, Plan):
            plans.append(line)
        else:
            samples.append(line)
    if not plans:
        raise NotResumable(f"{path} does not say what was measured: it is no file of a benchmark's samples")
    return plans, samples, size


def _differences(then: Plan, now: Plan) -> list[str]:
    found = [] if then.quick == now.quick else [f"it is {'a' if then.quick else 'no'} --quick run"]
    return found + differences_of_machines(then.machine, now.machine)


def differences_of_machines(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """In what two descriptions differ."""
    return [
        f"{key} {then.get(key, 'none')} there, {now.get(key, 'none')} here"
        for key in dict.fromkeys((*then, *now))
        if then.get(key) != now.get(key)
    ]
