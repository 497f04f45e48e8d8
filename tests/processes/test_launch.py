"""Launching, on real processes; launched_node.py plays the node."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from clusterpool.config import SessionPaths, is_folder_locked
from clusterpool.errors import StartFailed
from clusterpool.processes.launch import NodeProcess, describe_exit, log_tail
from clusterpool.processes.sweep import sweep_stale_sessions
from tests.processes.launching import config_of, launch
from tests.waiting import HANGS_AFTER_S, wait_for

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def test_a_node_starts_detached_and_says_when_it_is_ready(session: SessionPaths, launched: list[NodeProcess]) -> None:
    config = config_of(session, "serve")
    inheritable = os.open(__file__, os.O_RDONLY)
    os.set_inheritable(inheritable, True)
    try:
        process = launch(config)
        launched.append(process)
        ready = process.wait_ready()
    finally:
        os.close(inheritable)
    assert ready["pid"] == process.pid
    assert ready["session"] == session.session_id
    assert ready["session_leader"]
    assert ready["stdin"] == ""
    assert __file__ not in ready["fds"].values()
    assert ready["inheritable"] == []
    assert os.getcwd() not in ready["path"][:1]
    assert "" not in ready["path"]
    assert is_folder_locked(config.paths.folder)
    assert config.paths.config_file.stat().st_mode & 0o777 == 0o600


def test_an_orderly_end_removes_everything(session: SessionPaths) -> None:
    process = launch(config_of(session, "serve"))
    process.wait_ready()
    assert process.terminate() == 0
    assert not session.folder.exists()
    assert process.poll() == 0


def test_two_nodes_share_a_session_and_the_last_removes_it(session: SessionPaths) -> None:
    first, second = launch(config_of(session, "serve")), launch(config_of(session, "serve"))
    first.wait_ready()
    second.wait_ready()
    first.terminate()
    assert session.nodes() == [second.paths]
    second.terminate()
    assert not session.folder.exists()


def test_a_node_cannot_be_launched_twice(session: SessionPaths, launched: list[NodeProcess]) -> None:
    config = config_of(session, "serve")
    launched.append(launch(config))
    launched[0].wait_ready()
    with pytest.raises(StartFailed, match="in use"):
        launch(config)
    assert session.nodes() == [config.paths]
    assert launched[0].poll() is None


@pytest.mark.parametrize(
    ("do", "patterns"),
    [
        ("fail", ["no port is free", "a line of the log"]),
        ("crash", ["ended before it was ready", "exit code 1", "LookupError: of the node's own"]),
        ("hang", ["not ready after 1 s", "hanging"]),
    ],
)
def test_a_failed_start_says_why_and_leaves_nothing(session: SessionPaths, do: str, patterns: list[str]) -> None:
    process = launch(config_of(session, do))
    if do == "hang":
        wait_for(lambda: "hanging" in log_tail(process.paths.node_log), "the node runs")
    with pytest.raises(StartFailed) as raised:
        process.wait_ready(timeout_s=1 if do == "hang" else HANGS_AFTER_S)
    for pattern in patterns:
        assert pattern in str(raised.value)
    assert process.poll() is not None
    assert not session.folder.exists()


def test_a_missing_python_leaves_nothing(session: SessionPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(StartFailed, match="could not be started"):
        launch(config_of(session, "serve"))
    assert not session.folder.exists()


def test_a_folder_that_is_too_deep_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    session = SessionPaths(tmp_path / ("a" * 100) / "s-12345678")
    with pytest.raises(ValueError, match="UNIX sockets"):
        launch(config_of(session, "serve"))
    assert list(tmp_path.iterdir()) == []


def test_a_node_that_does_not_end_is_killed(session: SessionPaths) -> None:
    process = launch(config_of(session, "stubborn"))
    process.wait_ready()
    assert process.terminate(timeout_s=0.2) == -signal.SIGKILL
    assert sweep_stale_sessions([session.folder.parent]).session_ids == [session.session_id]


def test_a_fork_of_the_launcher_does_not_end_the_node(session: SessionPaths, launched: list[NodeProcess]) -> None:
    process = launch(config_of(session, "serve"))
    launched.append(process)
    process.wait_ready()
    pid = os.fork()
    if pid == 0:
        process.terminate()
        process.kill()
        os._exit(0)
    os.waitpid(pid, 0)
    assert process.wait(0.2) is None


def test_a_detached_node_outlives_the_process_that_launched_it(session: SessionPaths) -> None:
    config = config_of(session, "serve")
    program = (
        "import sys; from clusterpool.config import NodeConfig\n"
        "from clusterpool.processes.launch import launch_node\n"
        "node = launch_node(NodeConfig.from_json(sys.argv[1]), node_module='launched_node')\n"
        "node.wait_ready(); node.detach(); print(node.pid)"
    )
    completed = subprocess.run(
        [sys.executable, "-W", "always", "-c", program, config.to_json()],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])},
        timeout=50,
    )
    assert completed.stderr == ""
    pid = int(completed.stdout)
    assert is_folder_locked(config.paths.folder)
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not session.folder.exists(), "its files are gone")


def test_a_detached_node_gives_no_warning(session: SessionPaths) -> None:
    process = launch(config_of(session, "serve"))
    process.wait_ready()
    pid = process.pid
    process.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del process
    os.kill(pid, signal.SIGTERM)
    os.waitpid(pid, 0)


def test_the_tail_of_a_log_starts_at_a_line(tmp_path: Path) -> None:
    log = tmp_path / "node.log"
    assert log_tail(log) == ""
    log.write_text("first line\nsecond\nthird\n")
    assert log_tail(log) == "first line\nsecond\nthird"
    assert log_tail(log, 15) == "second\nthird"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (None, "exit code unknown"),
        (3, "exit code 3"),
        (-9, "killed by signal 9 (SIGKILL)"),
        (-63, "killed by signal 63"),
    ],
)
def test_an_exit_is_described(code: int | None, text: str) -> None:
    assert describe_exit(code).startswith(text)
