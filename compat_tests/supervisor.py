"""Runs a class's tests in a process of its own, ends what hangs, and goes on with the tests after it.

supervisor ── starts ──► class process ── starts ──► whatever the tests start
    ◄── events (a pipe) ─────┘
no `end` within the limit: the test hung ┐ everything is killed, and the tests after it
the process ends in a test: it crashed   ┘ run in a new process
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compat_tests import leftovers
from compat_tests.events import FAILED, HUNG, SKIPPED
from compat_tests.outcomes import ClassOutcome
from compat_tests.subject import Subject

ROOT = Path(__file__).parents[1]
# What lies around the tests: imports and set-up before the first, clean-up after the last and between two.
_AROUND_LIMIT_S = 60.0
_POLL_S = 0.2
_PRINTED_MAX = 2000


@dataclass(frozen=True)
class Limits:
    """Seconds for one test, for one that is expected to fail, and for all processes of one class together."""

    test_s: float = 60.0
    class_s: float = 900.0
    expected_s: float = 15.0


@dataclass
class _Attempt:
    """One process, and what it has said so far."""

    todo: list[str]
    current: str = ""
    is_done: bool = False
    # Why no test could run, by a fixture that failed or skipped.
    fixture: tuple[str, str, str] | None = None
    last_event_s: float = field(default_factory=time.monotonic)
    unread: bytes = b""

    def take(self, event: dict[str, Any], outcome: ClassOutcome) -> None:
        self.last_event_s = time.monotonic()
        kind = event["event"]
        if kind == "start":
            self.current = event["test"]
        elif kind == "end":
            outcome.add(event["test"], event["outcome"], event["detail"], event["seconds"])
            self.current = ""
            if event["test"] in self.todo:
                self.todo.remove(event["test"])
        elif kind == "fixture":
            self.fixture = (event["test"], event["outcome"], event["detail"])
        else:
            self.is_done = True


class Supervisor:
    """`module`: the program that runs tests, "compat_tests.class_process" or "compat_tests.joblib_process".

    `expected`: names of tests that are expected to fail; one that does so by hanging need not take long.
    """

    def __init__(
        self,
        module: str,
        subject: Subject,
        limits: Limits,
        *,
        folder: Path,
        suite_folder: str = "",
        expected: frozenset[str] = frozenset(),
    ) -> None:
        self._module = module
        self._subject = subject
        self._limits = limits
        self._folder = folder
        self._suite_folder = suite_folder
        self._expected = expected

    def run(self, class_id: str, tests: list[str]) -> ClassOutcome:
        """Every test of `tests` is in the outcome, whatever happens. Any thread."""
        started_s = time.monotonic()
        outcome = ClassOutcome(class_id.rpartition(":")[2])
        todo = list(tests)
        while todo:
            before = len(todo)
            todo = self._run_process(class_id, todo, outcome, started_s + self._limits.class_s)
            assert len(todo) < before, f"{class_id}: a process ended without an outcome for any test"
        outcome.seconds = time.monotonic() - started_s
        return outcome

    def _run_process(self, class_id: str, todo: list[str], outcome: ClassOutcome, deadline_s: float) -> list[str]:
        """Returns: the tests that are still to be run, in another process."""
        attempt = _Attempt(list(todo))
        folder = Path(tempfile.mkdtemp(prefix=f"{outcome.class_name}-"[:40], dir=self._folder))
        mark = uuid.uuid4().hex
        with (folder / "printed.txt").open("w") as printed:
            reading, writing = os.pipe()
            request = {
                "class_id": class_id,
                "tests": todo,
                "subject": str(self._subject),
                "events_fd": writing,
                "test_limit_s": self._limits.test_s,
                "hang_log": str(folder / "hang.txt"),
            }
            (folder / "cwd").mkdir()
            process = subprocess.Popen(
                [sys.executable, "-m", self._module, json.dumps(request)],
                cwd=folder / "cwd",
                env=self._environment(mark),
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                pass_fds=[writing],
                start_new_session=True,
            )
            os.close(writing)
            try:
                ending = self._follow(process, reading, attempt, outcome, deadline_s)
            finally:
                has_ended = process.poll() is not None
                killed = leftovers.end_all(process.pid, mark, at_once=not has_ended)
                # What a process that had to be killed has started is no fault of the tests.
                outcome.leftovers += killed if has_ended else []
                process.wait()
                os.close(reading)
        return self._conclude(ending, attempt, outcome, folder, is_late=time.monotonic() > deadline_s)

    def _environment(self, mark: str) -> dict[str, str]:
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent / "hook")])
        # A cluster of the user's must not serve the tests, and what they leave must not lie among the user's files.
        environment.pop("CLUSTERPOOL_ADDRESS", None)
        environment["CLUSTERPOOL_TMPDIR"] = environment["CLUSTERPOOL_HOME"] = str(self._folder)
        environment[leftovers.MARK] = mark
        if self._suite_folder:
            environment["COMPAT_TESTS_SUITE"] = self._suite_folder
        return environment

    def _follow(
        self,
        process: subprocess.Popen[bytes],
        reading: int,
        attempt: _Attempt,
        outcome: ClassOutcome,
        deadline_s: float,
    ) -> str:
        """Take events until the process ends or exceeds a limit. Returns: how it ended; "" is well."""
        while True:
            # Before the pipe is read, so that nothing that was said before the end is missed.
            code = process.poll()
            readable, _, _ = select.select([reading], [], [], 0 if code is not None else _POLL_S)
            data = os.read(reading, 65536) if readable else b""
            *lines, attempt.unread = (attempt.unread + data).split(b"\n")
            for line in lines:
                attempt.take(json.loads(line), outcome)
            if code is not None and not data:
                if attempt.is_done and code == 0:
                    return ""
                return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            now_s = time.monotonic()
            limit_s = self._limit_s(f"{outcome.class_name}.{attempt.current}") if attempt.current else _AROUND_LIMIT_S
            if now_s - attempt.last_event_s > limit_s or now_s > deadline_s:
                return f"hung for {now_s - attempt.last_event_s:.0f} s"

    def _limit_s(self, test: str) -> float:
        return min(self._limits.expected_s, self._limits.test_s) if test in self._expected else self._limits.test_s

    def _conclude(
        self, ending: str, attempt: _Attempt, outcome: ClassOutcome, folder: Path, *, is_late: bool
    ) -> list[str]:
        """Give an outcome to what has none because of how the process ended."""
        is_hung = ending.startswith("hung")
        printed = _tail(folder / "printed.txt")
        traces = _tail(folder / "hang.txt") if is_hung else ""
        todo = attempt.todo
        if attempt.current:
            detail = f"{printed}\n{traces}\nthe process {ending} in this test"
            outcome.add(attempt.current, HUNG if is_hung else FAILED, detail)
            todo = [test for test in todo if test != attempt.current]
        elif attempt.fixture is not None or not attempt.is_done:
            name, kind, detail = attempt.fixture or (
                "set-up" if todo else "clean-up",
                HUNG if is_hung else FAILED,
                f"{printed}\nthe process {ending} outside of a test",
            )
            if todo:
                # A fixture before the tests: it is no use to start the others, they would meet it again.
                for test in todo:
                    outcome.add(test, kind, detail if kind == SKIPPED else f"{name}: {detail}")
                todo = []
            elif kind != SKIPPED:
                outcome.add(name, kind, detail)
        elif ending and not todo:
            outcome.add("exit", HUNG if is_hung else FAILED, f"{printed}\nthe process {ending} after the last test")
        if is_late:
            for test in todo:
                outcome.add(test, FAILED, "not reached within the class's time limit")
            todo = []
        return todo


def _tail(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[-_PRINTED_MAX:]
    except FileNotFoundError:
        return ""
