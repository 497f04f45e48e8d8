"""Runs tests of one unittest class, in a process that the harness starts for it.

With `"list"` in the request it prints a suite's classes and tests as JSON instead.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
import unittest
from pathlib import Path
from typing import Any

from compat_tests.events import FAILED, PASSED, SKIPPED, EventWriter
from compat_tests.subject import Subject

# Interpreter flags with which a script of a test would not see the environment, hence not what is tested.
_ISOLATING_FLAGS = ("-E", "-I")
_DETAIL_MAX = 4000


def classes_of(module_names: list[str], class_filter: str = "") -> dict[str, list[str]]:
    """`module:Class` -> names of its tests, in the order in which unittest runs them."""
    found = {}
    for module_name in module_names:
        module = importlib.import_module(module_name)
        for name, member in vars(module).items():
            if not isinstance(member, type) or not issubclass(member, unittest.TestCase):
                continue
            tests = unittest.defaultTestLoader.getTestCaseNames(member)
            # What a module only imports belongs to the module that defines it.
            if tests and class_filter in name and member.__module__ == module_name:
                found[f"{module_name}:{name}"] = list(tests)
    return found


class _Result(unittest.TestResult):
    """Reports each test as it starts and ends; a test with failing subtests has failed."""

    def __init__(self, writer: EventWriter) -> None:
        super().__init__()
        self._writer = writer
        self._outcome = PASSED
        self._detail = ""

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self._outcome, self._detail = PASSED, ""
        self._writer.start(test._testMethodName)

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        self._writer.end(test._testMethodName, self._outcome, self._detail)

    def addError(self, test: Any, err: Any) -> None:
        self._note(test, FAILED, _text_of(err))

    def addFailure(self, test: Any, err: Any) -> None:
        self._note(test, FAILED, _text_of(err))

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self._note(test, FAILED, f"{subtest}\n{_text_of(err)}")

    def addSkip(self, test: Any, reason: str) -> None:
        # A test of which only some subtests were skipped counts by the others.
        if type(test).__name__ != "_SubTest":
            self._note(test, SKIPPED, reason)

    def addExpectedFailure(self, test: Any, err: Any) -> None:
        self._note(test, SKIPPED, "marked as an expected failure by its author")

    def addUnexpectedSuccess(self, test: Any) -> None:
        self._note(test, FAILED, "passes, though its author marked it as an expected failure")

    def _note(self, test: Any, outcome: str, detail: str) -> None:
        if not isinstance(test, unittest.TestCase):  # setUpModule, setUpClass, ...
            self._writer.fixture(str(test).partition(" ")[0], outcome, detail[-_DETAIL_MAX:])
        elif self._outcome != FAILED:
            self._outcome, self._detail = outcome, detail[-_DETAIL_MAX:]


def _text_of(err: Any) -> str:
    return "".join(traceback.format_exception(*err))


class _PatchedSubprocess:
    """The module `subprocess` for tests that start Python scripts: what is tested is put in place in those, too."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)

    def Popen(self, command: Any, **options: Any) -> Any:
        return subprocess.Popen(*self._prepared(command, options), **options)

    def check_output(self, command: Any, **options: Any) -> Any:
        return subprocess.check_output(*self._prepared(command, options), **options)

    def _prepared(self, command: Any, options: dict[str, Any]) -> tuple[Any]:
        # Without site (-S) there is no clusterpool to import; such scripts look at the interpreter's flags only.
        if isinstance(command, list) and command[0] == sys.executable and "-S" not in command:
            command = [word for word in command if word not in _ISOLATING_FLAGS]
            environment = options.get("env")
            options["env"] = {
                **(os.environ if environment is None else environment),
                "COMPAT_TESTS_SUBJECT": str(self._subject),
                # A test that passes an environment of its own must not lose the folders of the run.
                **{name: os.environ[name] for name in ("PYTHONPATH", "COMPAT_TESTS_SUITE") if name in os.environ},
            }
        return (command,)


def _patch_scripts_of_tests(module: Any, subject: Subject) -> None:
    from test.support import script_helper

    patched = _PatchedSubprocess(subject)
    script_helper.subprocess = patched
    for part in {module, sys.modules.get("test._test_multiprocessing")}:
        if part is not None and hasattr(part, "subprocess"):
            part.subprocess = patched


def run(class_id: str, tests: list[str], subject: Subject, writer: EventWriter) -> None:
    subject.put_in_place()
    module_name, _, class_name = class_id.partition(":")
    module = importlib.import_module(module_name)
    if not subject.is_reference or "COMPAT_TESTS_SUITE" in os.environ:
        with contextlib.suppress(ImportError):
            _patch_scripts_of_tests(module, subject)
    test_class = getattr(module, class_name)
    unittest.TestSuite(test_class(name) for name in tests).run(_Result(writer))
    writer.done()


def main() -> None:
    request = json.loads(sys.argv[1])
    # The scripts and workers of tests look at it, as they do at that of `python -m test`.
    sys.argv[1:] = []
    if request.get("list"):
        print(json.dumps(classes_of(request["modules"], request["class_filter"])))
        return
    # A shell that starts the harness in the background has it ignored, and tests interrupt themselves.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Path(request["hang_log"]).open("a") as hang_log:
        writer = EventWriter(request["events_fd"], test_limit_s=request["test_limit_s"], hang_log=hang_log)
        run(request["class_id"], request["tests"], Subject.parse(request["subject"]), writer)


if __name__ == "__main__":
    main()
