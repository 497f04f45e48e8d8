"""The three suites: where their tests are, and how the classes of each are found and run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from compat_tests.subject import REFERENCES, Subject

ROOT = Path(__file__).parents[1]
_LIST_LIMIT_S = 120.0


class SuiteMissing(Exception):
    """The installed Python or joblib does not have the suite; the message says what to install."""


@dataclass(frozen=True)
class Suite:
    """`program`: the module that runs the tests of one class. `kind`: that of the subjects which it can test."""

    name: str
    kind: str
    program: str
    description: str
    class_filter: str = ""

    @property
    def reference(self) -> Subject:
        return Subject(self.kind, REFERENCES[self.kind])

    def tests_by_class(self, subject: Subject, suite_folder: str = "") -> dict[str, list[str]]:
        """Class ids, as `program` takes them, and the names of their tests in order.

        Raises: SuiteMissing.
        """
        request = {
            "list": True,
            "modules": _modules_of(self.name, suite_folder),
            "class_filter": self.class_filter,
            # unittest's classes are listed with the standard names in place: they are the same, and nothing starts.
            "subject": str(subject if self.kind == "backend" else self.reference),
        }
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "compat_tests" / "hook")])}
        if suite_folder:
            environment["COMPAT_TESTS_SUITE"] = suite_folder
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-m", self.program, json.dumps(request)],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=_LIST_LIMIT_S,
            )
        if done.returncode != 0:
            raise SuiteMissing(f"the tests of {self.name} cannot be imported:\n{done.stderr[-3000:]}")
        found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
        return found


SUITES = {
    "multiprocessing": Suite(
        "multiprocessing",
        "module",
        "compat_tests.class_process",
        "`test._test_multiprocessing`, start method spawn",
    ),
    "futures": Suite(
        "futures",
        "executor",
        "compat_tests.class_process",
        "`test.test_concurrent_futures`, process pools with start method spawn",
        class_filter="ProcessPoolSpawn",
    ),
    "joblib": Suite(
        "joblib",
        "backend",
        "compat_tests.joblib_process",
        "`joblib/test`, tests that name no other backend",
    ),
}

# Those modules of joblib's suite whose tests run Parallel.
_JOBLIB_MODULES = ["test_config", "test_memmapping", "test_memory", "test_parallel"]
_FUTURES = "test_concurrent_futures"


def _modules_of(suite_name: str, suite_folder: str) -> list[str]:
    if suite_name == "joblib":
        return _JOBLIB_MODULES
    import test

    folders = [*map(Path, test.__path__), *([Path(suite_folder)] if suite_folder else [])]
    if suite_name == "multiprocessing":
        if not any((folder / "_test_multiprocessing.py").is_file() for folder in folders):
            raise SuiteMissing(_missing("test._test_multiprocessing"))
        return ["compat_tests.spawn_suite"]
    for folder in folders:
        if (folder / f"{_FUTURES}.py").is_file():
            return [f"test.{_FUTURES}"]
        # From 3.12 on, and in later 3.11s, a package.
        if (folder / _FUTURES / "__init__.py").is_file():
            return [f"test.{_FUTURES}.{path.stem}" for path in sorted((folder / _FUTURES).glob("test_*.py"))]
    raise SuiteMissing(_missing(f"test.{_FUTURES}"))


def _missing(module: str) -> str:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return (
        f"this Python ({sys.version.split()[0]} at {sys.base_prefix}) has no {module}, which some builds leave out."
        f" Install a Python that has it, or Debian's libpython{version}-testsuite, and pass the folder `test` of that"
        f" one by --suite, e.g. --suite /usr/lib/python{version}/test"
    )
