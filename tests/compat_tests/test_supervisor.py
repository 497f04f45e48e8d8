"""The harness counts a suite rightly: tests that pass, fail, skip, hang, crash, and the fixtures around them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from compat_tests.events import FAILED, HUNG, PASSED, SKIPPED
from compat_tests.leftovers import MARK
from compat_tests.outcomes import ClassOutcome
from compat_tests.subject import Subject
from compat_tests.supervisor import Limits, Supervisor

SUITE = """
import os, signal, subprocess, sys, time, unittest

class TestAll(unittest.TestCase):
    def test_a_passes(self):
        print("nothing of this reaches the harness as an event")
    def test_b_fails(self):
        self.assertEqual(1, 2)
    def test_c_is_skipped(self):
        self.skipTest("not here")
    def test_d_hangs(self):
        while True:
            time.sleep(1)
    def test_e_crashes(self):
        os.kill(os.getpid(), signal.SIGSEGV)
    def test_f_has_a_failing_part(self):
        for number in (1, 2, 3):
            with self.subTest(number=number):
                self.assertNotEqual(number, 2)
    @unittest.expectedFailure
    def test_g_is_known_to_fail(self):
        self.fail()
    def test_h_leaves_the_interpreter(self):
        os._exit(3)
    def test_i_passes(self):
        pass

class TestSetUpFails(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        raise RuntimeError("no server")
    def test_a(self): pass
    def test_b(self): pass

class TestSetUpSkips(TestSetUpFails):
    @classmethod
    def setUpClass(cls):
        raise unittest.SkipTest("no server")

class TestTearDownFails(unittest.TestCase):
    def test_a(self): pass
    @classmethod
    def tearDownClass(cls):
        raise RuntimeError("still open")

class TestLeavesProcesses(unittest.TestCase):
    def test_in_the_session(self):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    def test_in_a_session_of_its_own(self):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)

class TestForks(unittest.TestCase):
    def test_child_comes_back(self):
        pid = os.fork()
        if pid == 0:
            self.fail("in the child")
        os.waitpid(pid, 0)
"""
TESTS = [
    "test_a_passes",
    "test_b_fails",
    "test_c_is_skipped",
    "test_d_hangs",
    "test_e_crashes",
    "test_f_has_a_failing_part",
    "test_g_is_known_to_fail",
    "test_h_leaves_the_interpreter",
    "test_i_passes",
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs tests of a class of SUITE; the limit is short, since one of them hangs."""
    module = tmp_path / "package" / "small_suite.py"
    module.parent.mkdir()
    module.write_text(SUITE)
    # `test` is the package that further modules may be added to; that is also how a suite elsewhere is found.
    supervisor = Supervisor(
        "compat_tests.class_process",
        Subject("module", "multiprocessing"),
        Limits(test_s=3.0, class_s=50.0),
        folder=tmp_path,
        suite_folder=str(module.parent),
    )
    return lambda class_name, tests: supervisor.run(f"test.small_suite:{class_name}", tests)


def outcomes(outcome: ClassOutcome) -> dict[str, str]:
    return {test.test: test.outcome for test in outcome.tests}


def test_each_test_gets_its_outcome_though_others_hang_and_crash(run) -> None:
    outcome = run("TestAll", TESTS)
    assert outcomes(outcome) == {
        "test_a_passes": PASSED,
        "test_b_fails": FAILED,
        "test_c_is_skipped": SKIPPED,
        "test_d_hangs": HUNG,
        "test_e_crashes": FAILED,
        "test_f_has_a_failing_part": FAILED,
        "test_g_is_known_to_fail": SKIPPED,
        "test_h_leaves_the_interpreter": FAILED,
        "test_i_passes": PASSED,
    }
    details = {test.test: test.detail for test in outcome.tests}
    assert details["test_b_fails"].endswith("AssertionError: 1 != 2\n")
    assert "test_d_hangs" in details["test_d_hangs"], "the traceback says where it hung"
    assert f"signal {int(signal.SIGSEGV)}" in details["test_e_crashes"]
    assert "exit code 3" in details["test_h_leaves_the_interpreter"]


def test_class_limit_ends_what_was_not_reached(tmp_path: Path, run) -> None:
    module = tmp_path / "package" / "small_suite.py"
    supervisor = Supervisor(
        "compat_tests.class_process",
        Subject("module", "multiprocessing"),
        Limits(test_s=60.0, class_s=8.0),
        folder=tmp_path,
        suite_folder=str(module.parent),
    )
    started_s = time.monotonic()
    outcome = supervisor.run("test.small_suite:TestAll", ["test_d_hangs", "test_i_passes"])
    assert outcomes(outcome) == {"test_d_hangs": HUNG, "test_i_passes": FAILED}
    assert time.monotonic() - started_s < 50


@pytest.mark.parametrize(
    ("class_name", "tests", "expected"),
    [
        ("TestSetUpFails", ["test_a", "test_b"], {"test_a": FAILED, "test_b": FAILED}),
        ("TestSetUpSkips", ["test_a", "test_b"], {"test_a": SKIPPED, "test_b": SKIPPED}),
        ("TestTearDownFails", ["test_a"], {"test_a": PASSED, "tearDownClass": FAILED}),
        ("TestForks", ["test_child_comes_back"], {"test_child_comes_back": PASSED}),
        ("TestThatIsNotThere", ["test_a"], {"test_a": FAILED}),
    ],
)
def test_fixtures_and_forks(run, class_name: str, tests: list[str], expected: dict[str, str]) -> None:
    assert outcomes(run(class_name, tests)) == expected


def test_processes_of_a_class_are_ended_in_whichever_session_they_are(run) -> None:
    outcome = run("TestLeavesProcesses", ["test_in_the_session", "test_in_a_session_of_its_own"])
    assert set(outcomes(outcome).values()) == {PASSED}
    assert len(outcome.leftovers) == 2
    assert all("sleep(300)" in command for command in outcome.leftovers)
    assert [pid for pid in os.listdir("/proc") if pid.isdigit() and is_of_a_class(pid)] == []


def is_of_a_class(pid: str) -> bool:
    try:
        return f"{MARK}=".encode() in Path(f"/proc/{pid}/environ").read_bytes() and b"sleep(300)" in (
            Path(f"/proc/{pid}/cmdline").read_bytes()
        )
    except OSError:
        return False
