"""The zygote on real processes; each scenario runs in a process of its own that plays the node
(zygote_node.py).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from clusterpool.processes.zygote import Zygote
from tests.waiting import is_alive

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def play(scenario: str, *, exit_code: int = 0) -> Any:
    completed = subprocess.run(
        [sys.executable, str(HERE / "zygote_node.py"), scenario],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)])},
    )
    assert completed.returncode == exit_code, completed.stderr
    return json.loads(completed.stdout.splitlines()[-1])


def wait_until_gone(pids: list[int], timeout_s: float = 30) -> None:
    deadline_s = time.monotonic() + timeout_s
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline_s, f"still running: {alive}"
        time.sleep(0.01)


def test_a_workers_end_is_reported_as_the_standard_library_would() -> None:
    found = play("exits")
    codes = {name: result["code"] for name, result in found.items() if name != "zygote"}
    assert codes == {
        "none": 0,
        "zero": 0,
        "three": 3,
        "sys_exit": 4,
        "sys_exit_text": 1,
        "raise": 1,
        "segfault": -signal.SIGSEGV,
        "handlers": 0,
        "print": 0,
        "allocate": 0,
    }
    assert "text of sys.exit" in found["sys_exit_text"]["stderr"]
    assert "LookupError: of the worker's own" in found["raise"]["stderr"]
    assert "Segmentation fault" in found["segfault"]["stderr"]
    assert "do_segfault" in found["segfault"]["stderr"]
    assert found["handlers"]["stdout"] == "main thread\natexit\n"
    assert found["print"] | {"peak_rss_bytes": 0, "code": 0} == {
        "code": 0,
        "stdout": "to stdout: ä\nraw\n",
        "stderr": "to stderr\n",
        "peak_rss_bytes": 0,
    }
    assert 150 << 20 < found["allocate"]["peak_rss_bytes"] < 1 << 30
    assert found["zygote"] == 0


def test_a_worker_starts_clean() -> None:
    found = play("describe")
    first, second = found["runs"]
    for run in (first, second):
        assert sorted(run["fds"]) == ["0", "1", "2"]
        assert run["fds"]["0"] == "/dev/null"
        assert run["fds"]["1"].startswith("pipe:")
        assert run["environment"] == {"SET_HERE": "yes", "REMOVED_HERE": None}
        assert run["stdin"] == ""
        assert run["session_id"] == found["zygote_pid"] != found["own_session_id"]
        assert run["group_is_own"]
        assert "default_int_handler" in run["int_handler"]
        assert run["chld_handler"] in ("Handlers.SIG_DFL", "0")
        assert run["wakeup_fd"] == -1
        assert run["threads"] == ["Threads:\t1"]
        assert run["line_buffering"]
    assert first["random"] != second["random"]


def test_signals_reach_the_worker_that_was_meant() -> None:
    found = play("kills")
    assert found == {"codes": [-signal.SIGKILL, 7], "output": "interrupted\n", "is_gone": True}


def test_thousands_of_requests_at_once_leak_no_descriptor_and_no_process() -> None:
    found = play("many")
    assert found["after"] == found["before"]
    assert found["codes"] == [0]
    assert found["children"].strip() == ""
    assert found["failed"] == 0


def test_a_fork_that_fails_is_reported_and_the_next_one_works() -> None:
    found = play("fork_fails")
    assert "too many open files" in found["reason"].lower()
    assert found["again"] == 0


def test_a_worker_whose_pipes_the_node_has_no_room_for_is_killed_and_reported_once() -> None:
    found = play("no_room_for_pipes")
    assert "ulimit -n" in found["reason"]
    assert found["again"] == 0
    assert found["exited"] == ["w1", "w3"]


def test_when_the_zygote_dies_the_node_is_told_and_the_workers_die() -> None:
    found = play("zygote_dies")
    assert found["code"] == -signal.SIGKILL
    assert found["fileno"] == -1
    assert "ended" in found["error"]
    wait_until_gone(found["pids"])


def test_a_zygote_that_is_stopped_is_seen_to_be_silent_and_ended_with_its_workers() -> None:
    found = play("zygote_stopped")
    assert found["asked"] == [False, True]
    assert found["is_silent"]
    assert found["answers"] == 3  # to both requests, and the worker's end
    assert found["reason"] == "it did not answer"
    wait_until_gone(found["pids"])


def test_when_the_node_dies_all_die() -> None:
    wait_until_gone(play("node_dies", exit_code=-signal.SIGKILL))


def test_close_ends_all_workers() -> None:
    assert play("close_ends_all") == {"code": 0, "alive": []}


def test_worker_code_that_cannot_be_imported_ends_the_zygote_with_the_reason() -> None:
    found = play("bad_module")
    assert found["code"] == 1
    assert "No module named 'module_that_is_not_there'" in found["reason"]


def test_modules_are_preloaded_unless_they_fail_or_start_threads() -> None:
    found = play("preloads")
    assert (found["before"], found["after"]) == (False, True)
    assert found["reasons"]["colorsys"] == ""
    assert "threads" in found["reasons"]["zygote_threaded_module"]
    assert "failed" in found["reasons"]["module_that_is_not_there"]
    assert found["threads"] == 1
    assert found["still_forks"] == 0


def test_a_spec_that_cannot_be_sent_is_refused_at_the_call() -> None:
    found = play("refuses")
    assert "at most" in found["errors"][0]
    assert "unmarshallable" in found["errors"][1]
    assert found["still_forks"] == 0


def test_a_process_with_threads_cannot_fork_the_zygote() -> None:
    import threading

    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="before the process starts threads"):
            Zygote.start()
    finally:
        done.set()
        thread.join()


def test_a_fork_takes_milliseconds_and_an_idle_worker_little_memory() -> None:
    found = play("measure")
    times_ms = found["times_ms"]
    # On an idle machine 1 ms. The quickest of fifty: a machine that runs other tests as well is not idle all the time.
    assert times_ms[0] < 20
    assert found["sizes_kib"]["Pss:"] < 20 * 1024
