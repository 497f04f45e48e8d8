"""What is swept after kill -9, and above all what is not; on real processes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusterpool.config import NodePaths, SessionPaths
from clusterpool.control_store.server import ServerProcess
from clusterpool.errors import StartFailed
from clusterpool.ids import new_session_id
from clusterpool.processes import sweep
from clusterpool.processes.death import process_identity, record_process
from clusterpool.processes.launch import NodeProcess
from clusterpool.processes.session_folder import make_node_folder, try_lock
from clusterpool.processes.sweep import SweepReport, belongs_to_session, sweep_stale_sessions
from tests.processes.launching import config_of, launch
from tests.waiting import wait_for

HERE = Path(__file__).parent


@contextlib.contextmanager
def running(
    *command: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block, however that ends."""
    with subprocess.Popen(command, env=env, cwd=cwd) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))


@pytest.fixture
def user_folder(session: SessionPaths) -> Path:
    return session.folder.parent


def test_a_killed_session_is_swept_with_its_processes_and_files(
    session: SessionPaths, user_folder: Path, tmp_path: Path
) -> None:
    config = config_of(session, "serve_with_child", spill_folder=str(tmp_path))
    (tmp_path / "of the user").touch()
    process = launch(config)
    child_pid = process.wait_ready()["child_pid"]
    assert config.paths.arena_file.exists()
    assert (config.spill_path / "spilled").exists()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process_identity(child_pid) is not None

    report = sweep_stale_sessions([user_folder])

    assert report == SweepReport([session.session_id], [config.node_id], [child_pid])
    assert process_identity(child_pid) is None
    assert not config.paths.arena_file.exists()
    assert not user_folder.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["of the user"]
    assert sweep_stale_sessions([user_folder]) == SweepReport()


def test_the_control_store_of_a_killed_cluster_is_ended_with_it(session: SessionPaths, user_folder: Path) -> None:
    process = launch(config_of(session))
    process.wait_ready()
    server = ServerProcess.start(session.store_folder, host="127.0.0.1", password="x" * 32)
    server.wait_ready()
    assert sweep_stale_sessions([user_folder]).pids_killed == []  # it has a living node
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    host, port = server.url.removeprefix("redis://").removesuffix("/0").split(":")
    with socket.create_connection((host, int(port))):  # a node of another host
        wait_for(lambda: sweep._has_clients(process_identity(server.pid)))  # type: ignore[arg-type]
        assert sweep_stale_sessions([user_folder]) == SweepReport()
    wait_for(lambda: not sweep._has_clients(process_identity(server.pid)))  # type: ignore[arg-type]
    with running("sleep", "60", cwd=session.store_folder) as bystander:
        assert sweep_stale_sessions([user_folder]).pids_killed == [server.pid]
        assert bystander.poll() is None
    assert process_identity(server.pid) is None
    assert not user_folder.exists()


def test_a_living_session_is_left_alone(session: SessionPaths, user_folder: Path, launched: list[NodeProcess]) -> None:
    config = config_of(session, "serve")
    launched.append(launch(config))
    # Before it is ready as well: no moment of a start is open to a sweep.
    assert sweep_stale_sessions([user_folder]) == SweepReport()
    launched[0].wait_ready()
    config.paths.arena_file.touch()
    assert sweep_stale_sessions([user_folder]) == SweepReport()
    assert launched[0].poll() is None
    assert config.paths.folder.exists()
    assert config.paths.arena_file.exists()


def test_a_dead_node_of_a_living_session_is_swept_alone(
    session: SessionPaths, user_folder: Path, launched: list[NodeProcess]
) -> None:
    living, dead = launch(config_of(session, "serve")), launch(config_of(session, "serve_with_child"))
    launched.append(living)
    living.wait_ready()
    child_pid = dead.wait_ready()["child_pid"]
    dead.kill()
    report = sweep_stale_sessions([user_folder])
    assert report == SweepReport([], [dead.config.node_id], [child_pid])
    assert session.nodes() == [living.paths]
    assert not dead.paths.arena_file.exists()
    assert living.poll() is None


def test_a_recorded_process_that_is_another_now_is_not_killed(session: SessionPaths, user_folder: Path) -> None:
    lock = make_node_folder(config_of(session))
    paths = lock.paths
    lock.close()
    environment = {**os.environ, "CLUSTERPOOL_SESSION": session.session_id}
    with (
        running("sleep", "60") as stranger,
        running("sleep", "60", env=environment) as recycled,
        running("sleep", "60", env=environment) as driver,
    ):
        record_process(paths.pid_file("node"), stranger.pid)  # the same process, but not of this session
        identity = process_identity(recycled.pid)
        assert identity is not None
        # Of this session, but started at another time than the one that was written down.
        paths.pid_file("valkey").write_text(f"{recycled.pid} {identity.start_ticks - 1} {identity.pid_namespace}")
        record_process(paths.pid_file("driver"), driver.pid)
        paths.pid_file("zygote").write_text("not a pid")
        report = sweep_stale_sessions([user_folder])
        assert report.session_ids == [session.session_id]
        assert report.pids_killed == []
        assert [stranger.poll(), recycled.poll(), driver.poll()] == [None, None, None]


def test_an_embedded_node_that_outlives_its_driver_is_ended_after_a_while(
    session: SessionPaths, user_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running("sleep", "60") as driver:
        process = launch(config_of(session, "stubborn", is_embedded=True, driver_pid=driver.pid))
        process.wait_ready()
        assert sweep_stale_sessions([user_folder]) == SweepReport()
        assert list(process.paths.folder.glob("orphaned")) == []
        driver.kill()
    assert sweep_stale_sessions([user_folder]) == SweepReport()  # seen for the first time: it may be about to end
    assert sweep_stale_sessions([user_folder]) == SweepReport()
    assert process.poll() is None
    monkeypatch.setattr(sweep, "ORPHAN_GRACE_S", -1)
    assert sweep_stale_sessions([user_folder]).pids_killed == [process.pid]
    assert process.wait(30) == -signal.SIGKILL
    sweep_stale_sessions([user_folder])
    assert not user_folder.exists()


def test_folders_on_their_way_in_or_out_are_removed_once_their_maker_is_dead(user_folder: Path) -> None:
    for name in (".new-fresh", ".new-old", ".new-held", ".dead-1", "of-the-user"):
        (user_folder / name).mkdir()
        (user_folder / name / "file").touch()
    for name in (".new-old", ".new-held"):
        os.utime(user_folder / name, (1, 1))
    held = try_lock(user_folder / ".new-held")
    assert held is not None
    sweep_stale_sessions([user_folder])
    os.close(held)
    assert sorted(path.name for path in user_folder.iterdir()) == [".new-fresh", ".new-held", "of-the-user"]
    for path in user_folder.iterdir():
        (path / "file").unlink()
        path.rmdir()
    user_folder.rmdir()


def test_a_folder_of_somebody_else_is_not_swept(
    session: SessionPaths, user_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_node_folder(config_of(session)).close()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: 12345678)
        assert sweep_stale_sessions([user_folder]) == SweepReport()
    assert sweep_stale_sessions([user_folder]).session_ids == [session.session_id]


def test_what_lies_elsewhere_is_not_reached_by_links(session: SessionPaths, user_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "n-0123456789").mkdir()
    (tmp_path / "precious").touch()
    (user_folder / "s-99999999").symlink_to(tmp_path)
    lock = make_node_folder(config_of(session))
    (lock.paths.logs_folder / "link").symlink_to(tmp_path)
    lock.close()
    assert sweep_stale_sessions([user_folder]).session_ids == [session.session_id]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n-0123456789", "precious"]
    (user_folder / "s-99999999").unlink()
    user_folder.rmdir()


def test_nobody_joins_a_session_that_is_being_swept(session: SessionPaths, user_folder: Path) -> None:
    make_node_folder(config_of(session)).close()
    sweeping = try_lock(session.folder)
    assert sweeping is not None
    with pytest.raises(StartFailed, match="is being removed"):
        make_node_folder(config_of(session))
    os.close(sweeping)
    sweep_stale_sessions([user_folder])


def test_sweeps_and_starts_at_the_same_time_never_harm_a_living_session(user_folder: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from clusterpool.config import NodeConfig; from clusterpool.ids import new_node_id, new_session_id\n"
        "from clusterpool.processes.session_folder import make_node_folder\n"
        "from clusterpool.processes.sweep import sweep_stale_sessions\n"
        "folder = Path(sys.argv[1])\n"
        "for number in range(60):\n"
        "    config = NodeConfig(str(folder / f's-{new_session_id()}'), new_node_id(), 'c1')\n"
        "    lock = make_node_folder(config)\n"
        "    sweep_stale_sessions([folder])\n"
        "    assert config.paths.logs_folder.is_dir(), 'swept while alive'\n"
        "    lock.remove() if number % 2 else lock.close()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, "-c", program, str(user_folder)]
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=50)
        assert process.returncode == 0, errors
    sweep_stale_sessions([user_folder])
    assert not user_folder.exists()


def test_a_sweep_with_nothing_to_do_takes_under_two_milliseconds(session: SessionPaths, user_folder: Path) -> None:
    locks = [make_node_folder(config_of(session)) for _ in range(3)]
    times_s = []
    for _ in range(20):
        started_s = time.perf_counter()
        assert sweep_stale_sessions([user_folder]) == SweepReport()
        times_s.append(time.perf_counter() - started_s)
    for lock in locks:
        lock.remove()
    assert min(times_s) < 0.002


def test_a_process_belongs_to_its_session_by_environment_or_command_line(tmp_path: Path) -> None:
    environment = {**os.environ, "CLUSTERPOOL_SESSION": "12345678"}
    folder = tmp_path / "s-87654321" / "n-1"
    folder.mkdir(parents=True)
    (folder / "f").touch()
    with (
        running("sleep", "60", env=environment) as first,
        running("tail", "-f", str(folder / "f")) as second,
    ):
        # Just after exec there is a moment in which a process shows neither.
        wait_for(lambda: all(Path(f"/proc/{p.pid}/cmdline").read_bytes() for p in (first, second)))
        found = [[belongs_to_session(p.pid, s) for s in ("12345678", "87654321", "1234567")] for p in (first, second)]
    assert found == [[True, False, False], [False, True, False]]
    assert not belongs_to_session(1 << 30, "12345678")


def test_what_cannot_be_removed_is_reported_and_the_rest_is_swept(
    session: SessionPaths, user_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = SessionPaths.in_base(new_session_id())
    for each in (session, other):
        make_node_folder(config_of(each)).close()
    remove_node_files = sweep.remove_node_files

    def fail_once(paths: NodePaths, spill_path: Path | None) -> None:
        if paths.session == session:
            raise PermissionError(13, "not allowed")
        remove_node_files(paths, spill_path)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "remove_node_files", fail_once)
        report = sweep_stale_sessions([user_folder])
    assert report.session_ids == [other.session_id]
    assert [str(session.folder) in failure for failure in report.failures] == [True]
    assert sweep_stale_sessions([user_folder]).session_ids == [session.session_id]
