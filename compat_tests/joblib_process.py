"""Runs tests of one module of joblib's suite under pytest, in a process that the harness starts for it.

The tests are the installed ones. What joblib's own `conftest.py` (which is not in the wheel) does with
JOBLIB_TESTS_DEFAULT_PARALLEL_BACKEND, the plugin here does with the subject: it becomes the default backend. It is
registered before the tests are collected, so that those which run with every known backend run with it as well. Tests
that name another backend are left out.

With `"list"` in the request it prints the tests as JSON instead.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from compat_tests.events import FAILED, NOT_INVOLVED, PASSED, SKIPPED, EventWriter
from compat_tests.subject import Subject

_DETAIL_MAX = 4000
# No configuration file, no cache folder; the traceback of a hanging test is the harness's.
_OPTIONS = ["-q", "-c", os.devnull, "-p", "no:cacheprovider", "-p", "no:faulthandler", "-p", "no:asyncio"]
_OTHER_BACKENDS = re.compile("loky|multiprocessing|threading|sequential|dask|spawn|back_compat")
# The subject's name in the names of tests, so that they are the same for every subject. It is also what loky is
# registered as, next to its own name, so that it runs the same tests as the others.
_ANY_NAME = "subject"


class _Plugin:
    """Makes the subject the default backend, chooses the tests, and tells the harness of each."""

    def __init__(self, subject: Subject, wanted: set[str] | None, writer: EventWriter | None) -> None:
        self._subject = subject
        self._wanted = wanted
        self._writer = writer
        self._outcome = PASSED
        self._detail = ""
        self._is_involved = False
        self.tests_by_module: dict[str, list[str]] = {}

    def pytest_configure(self, config: pytest.Config) -> None:
        from joblib import parallel

        standard = parallel.BACKENDS.copy()
        if self._subject.is_ours:
            from clusterpool.joblib.hook import register

            register()
        elif self._subject.name == "ray":
            from ray.util.joblib import register_ray

            register_ray()
        name = _ANY_NAME if self._subject.name in standard else self._subject.name
        if name == _ANY_NAME:
            parallel.register_parallel_backend(name, standard[self._subject.name])
        parallel.DEFAULT_BACKEND = name
        self._name = name
        self._backend_class = type(parallel.BACKENDS[name](nesting_level=0))
        self._watch(parallel)

    def _watch(self, parallel: Any) -> None:
        """Note whether a test asks joblib for the backend to use: others say nothing about the subject."""
        choose = parallel._get_active_backend

        def noting_choose(*args: Any, **options: Any) -> Any:
            self._is_involved = True
            return choose(*args, **options)

        parallel._get_active_backend = noting_choose

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = []
        for item in items:
            test = self._test_of(item.nodeid)
            if self._is_of_another(item, test) or (self._wanted is not None and test not in self._wanted):
                continue
            self.tests_by_module.setdefault(item.path.stem, []).append(test)
            chosen.append(item)
        items[:] = chosen

    def _is_of_another(self, item: pytest.Item, test: str) -> bool:
        """By its name, or because its parameter is the instance of another backend, or a context for one."""
        callspec = getattr(item, "callspec", None)
        backend = callspec.params.get("backend") if callspec is not None else None
        is_named = backend is None or isinstance(backend, (str, self._backend_class))
        return not is_named or _OTHER_BACKENDS.search(test) is not None

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._outcome, self._detail, self._is_involved = PASSED, "", False
        if self._writer is not None:
            self._writer.start(self._test_of(nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome == "passed" or self._outcome == FAILED:
            return
        self._outcome = SKIPPED if report.outcome == "skipped" else FAILED
        text = str(report.longrepr)
        # pytest marks the lines of the error itself with an E; the last says what was wrong, as in a traceback.
        errors = [line.removeprefix("E ").strip() for line in text.splitlines() if line.startswith("E ")]
        self._detail = "\n".join([text[-_DETAIL_MAX:], *errors[:1]])

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if self._writer is not None:
            detail = self._detail or ("" if self._is_involved else NOT_INVOLVED)
            self._writer.end(self._test_of(nodeid), self._outcome, detail)

    def _test_of(self, nodeid: str) -> str:
        """`test_x[2-subject]`: without the module, and whichever the subject is."""
        test = nodeid[nodeid.index("::") + 2 :]
        function, bracket, parameters = test.partition("[")
        words = [_ANY_NAME if word == self._name else word for word in parameters.removesuffix("]").split("-")]
        return f"{function}[{'-'.join(words)}]" if bracket else function


def main() -> None:
    request: dict[str, Any] = json.loads(sys.argv[1])
    sys.argv[1:] = []
    subject = Subject.parse(request["subject"])
    import joblib.test

    folder = Path(joblib.test.__file__).parent
    if request.get("list"):
        plugin = _Plugin(subject, None, None)
        files = [str(folder / f"{name}.py") for name in request["modules"]]
        with contextlib.redirect_stdout(io.StringIO()):
            pytest.main([*_OPTIONS, "--collect-only", *files], plugins=[plugin])
        print(json.dumps(plugin.tests_by_module))
        return
    # A shell that starts the harness in the background has it ignored, and tests interrupt themselves.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Path(request["hang_log"]).open("a") as hang_log:
        writer = EventWriter(request["events_fd"], test_limit_s=request["test_limit_s"], hang_log=hang_log)
        plugin = _Plugin(subject, set(request["tests"]), writer)
        # Failed tests are no failure of this process: the harness knows them.
        if pytest.main([*_OPTIONS, str(folder / f"{request['class_id']}.py")], plugins=[plugin]) <= 1:
            writer.done()


if __name__ == "__main__":
    main()
