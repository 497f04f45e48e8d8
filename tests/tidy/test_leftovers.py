"""The proof that a test cleans up must itself be able to fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import wait_for

pytestmark = pytest.mark.alone  # it makes what other tests would take for something that they have left


def sleeper(**options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], **options)


def test_a_running_child_is_found_and_a_reaped_one_is_not(run_of_tests: Any) -> None:
    child = sleeper()
    assert child.pid in run_of_tests.look().pids
    child.kill()
    # Not yet waited for: still something that the test has left behind.
    wait_for(lambda: Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
    assert child.pid in run_of_tests.look().pids
    child.wait()
    assert not run_of_tests.look()


def test_an_orphan_is_found_by_the_marker_in_its_environment(run_of_tests: Any) -> None:
    program = (
        "import subprocess, sys\n"
        "command = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "nowhere = subprocess.DEVNULL\n"
        "child = subprocess.Popen(command, stdout=nowhere, stderr=nowhere, start_new_session=True)\n"
        "print(child.pid)\n"
    )
    orphan = int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    leftovers = run_of_tests.look()
    assert orphan in leftovers.pids
    assert "time.sleep(60)" in leftovers.describe()
    run_of_tests.clear(leftovers)
    wait_for(lambda: orphan not in run_of_tests.look().pids)


def test_a_session_folder_is_found(run_of_tests: Any) -> None:
    base = run_of_tests.tmpdir / "clusterpool-0"
    folder = base / "s-01234567"
    folder.mkdir(parents=True)
    assert run_of_tests.look().folders == {"clusterpool-0/s-01234567"}
    run_of_tests.clear(run_of_tests.look())
    assert not folder.exists()
    assert base.exists() and not run_of_tests.look()


def test_a_segment_is_found_unless_a_living_stranger_holds_it(run_of_tests: Any) -> None:
    segment = Path(f"/dev/shm/clusterpool-test-{os.getpid()}")
    segment.write_bytes(b"x" * 4096)
    try:
        assert run_of_tests.look().segments == {segment.name}
        # A stranger is a process without the marker that is no child of ours.
        program = (
            "import os, time\n"
            f"handle = open({str(segment)!r})\n"
            "if os.fork(): os._exit(0)\n"
            "print(os.getpid(), flush=True)\n"
            "time.sleep(60)\n"
        )
        stranger = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, env={"PATH": os.environ["PATH"]}
        )
        assert stranger.stdout is not None
        pid = int(stranger.stdout.readline())
        stranger.wait()
        stranger.stdout.close()
        try:
            assert not run_of_tests.look().segments
        finally:
            os.kill(pid, 9)
        wait_for(lambda: run_of_tests.look().segments == {segment.name})
    finally:
        segment.unlink()


def test_what_a_module_holds_is_allowed_with_all_that_it_starts(run_of_tests: Any) -> None:
    node = subprocess.Popen(
        [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '60'])"], start_new_session=True
    )
    try:
        held = run_of_tests.look()
        assert held.pids >= {node.pid}
        run_of_tests.held.append(held)
        wait_for(lambda: len(Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()) == 1)
        assert not run_of_tests.look()
        run_of_tests.held.remove(held)
        assert len(run_of_tests.look().pids) == 2
    finally:
        os.killpg(node.pid, 9)
        node.wait()


def test_a_process_of_others_is_looked_at_once_and_no_more(run_of_tests: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of_tests.look()
    looked_at: list[int] = []
    monkeypatch.setattr(type(run_of_tests), "_is_own", lambda _, pid: looked_at.append(pid))
    run_of_tests.look()
    assert 1 not in looked_at, "reading all environments before and after each test would cost more than the tests"
