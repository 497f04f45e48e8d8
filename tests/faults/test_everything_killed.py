"""All processes of a cluster are killed at once: the next start removes what they left, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import clusterpool
from clusterpool.config import SessionPaths
from clusterpool.processes.death import process_identity, record_process
from clusterpool.processes.sweep import belongs_to_session
from tests.cluster.clusters import clusterpool_command, is_alive, wait_for
from tests.faults.hosts import Program

# Alone: it makes files that are nobody's, which other tests would take for something that they have left.
pytestmark = [pytest.mark.cluster, pytest.mark.alone]

SHARED_MEMORY = Path("/dev/shm")
TWO_NODES = {
    "head": {"num_cpus": 1, "object_store_memory": "32MiB"},
    "nodes": [{"num_cpus": 1, "object_store_memory": "32MiB"}],
}
# Leaves something of everything: arenas, semaphores, cells, channels, spilled objects, workers, children.
PROGRAM = """
import sys, time
from pathlib import Path
import clusterpool
import clusterpool.multiprocessing as mp

def work(lock, queue, value):
    with lock:
        queue.put(1)
        value.value = 1
    time.sleep(100)

if __name__ == "__main__":
    lock, queue, value = mp.Lock(), mp.Queue(), mp.Value("i")
    process = mp.Process(target=work, args=(lock, queue, value))
    process.start()
    queue.get()
    made = [clusterpool.put(bytes([number]) * 8_000_000) for number in range(8)]
    pool = clusterpool.Pool(4)
    pool.map(abs, range(100))
    pool.map_async(time.sleep, [100] * 4, chunksize=1)
    Path(sys.argv[1]).touch()
    time.sleep(100)
"""


def role_of(pid: int, node_pids: list[int]) -> str:
    if pid in node_pids:
        return "node"
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    return "store" if b"valkey" in command or b"redis" in command else "worker"


def pids_of(session: SessionPaths) -> list[int]:
    """What was started within the session, and the server, which holds the session's folder open."""
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()):
        with contextlib.suppress(OSError):
            open_files = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
            if belongs_to_session(pid, session.session_id) or str(session.folder) in open_files:
                found.append(pid)
    return [pid for pid in found if is_alive(pid)]


ORDERS = {
    "the store first": ["store", "node", "worker"],
    "the workers first": ["worker", "node", "store"],
    "the nodes first": ["node", "store", "worker"],
}


def kill_all(session: SessionPaths, node_pids: list[int], order: str) -> list[int]:
    """In one go: each is stopped before any is killed, so that none can clean up after another."""
    pids = pids_of(session)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    roles = {pid: role_of(pid, node_pids) for pid in pids}
    assert set(roles.values()) == {"store", "node", "worker"}
    if order == "any order":
        random.Random(3).shuffle(pids)
    else:
        pids.sort(key=lambda pid: ORDERS[order].index(roles[pid]))
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # the kernel ends a zygote with its node
            os.kill(pid, signal.SIGKILL)
    return pids


@pytest.fixture
def bystanders(run_of_tests: Any) -> Iterator[list[Path]]:
    """What looks like ours and is not: files, and a living process."""
    base = run_of_tests.tmpdir / f"clusterpool-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    node_id = "n0123456789"
    files = [
        SHARED_MEMORY / f"clusterpool-{os.getuid() + 1}-01234567-{node_id}",  # another user's
        SHARED_MEMORY / "clusterpool-notes",
        SHARED_MEMORY / "sem.clusterpool",
        SHARED_MEMORY / "sem.other-n0123456789",
        base / "s-notes.txt",
    ]
    for file in files:
        file.touch()
    link = base / "s-link"
    link.symlink_to(run_of_tests.home)
    run_of_tests.held.append(run_of_tests.look())
    yield [*files, link]
    run_of_tests.held.pop()
    for file in [*files, link]:
        file.unlink(missing_ok=True)


def remains(session: SessionPaths, node_ids: list[str], base: Path) -> list[str]:
    left = [str(session.folder)] if session.folder.exists() else []
    left += [name for name in os.listdir(SHARED_MEMORY) if any(node_id in name for node_id in node_ids)]
    return left + [str(path) for path in base.rglob("*") if any(node_id in path.name for node_id in node_ids)]


@pytest.mark.parametrize(
    ("order", "start"), [*((order, "up") for order in ORDERS), ("any order", "up"), ("any order", "embedded")]
)
def test_the_next_start_sweeps_the_dead_and_nothing_else(
    order: str, start: str, bystanders: list[Path], run_of_tests: Any, tmp_path: Path, fresh: None
) -> None:
    clusterpool.init(num_cpus=1, address="local")  # another cluster of this user, which goes on
    with clusterpool.Pool(1) as pool, subprocess.Popen(["sleep", "100"]) as stranger:
        assert pool.map(abs, [-1]) == [1]
        try:
            session, node_ids = die(tmp_path, order)
            # The number of a process that died may be a stranger's by now.
            record_process(session.node(node_ids[0]).pid_file("zygote"), process_identity(stranger.pid))
            assert len(remains(session, node_ids, run_of_tests.tmpdir)) > 3
            begin(start, tmp_path)
            left = remains(session, node_ids, run_of_tests.tmpdir)
            assert not left, left
            assert all(os.path.lexists(path) for path in bystanders)
            assert stranger.poll() is None, "a stranger was killed"
            assert pool.map(abs, [-2, -3]) == [2, 3]
        finally:
            stranger.kill()


def die(folder: Path, order: str) -> tuple[SessionPaths, list[str]]:
    """A cluster at work, killed."""
    file = folder / "cluster.yaml"
    file.write_text(json.dumps(TWO_NODES))
    done = clusterpool_command("up", str(file), "--json")
    assert done.returncode == 0, done.stderr
    started = json.loads(done.stdout)
    session = SessionPaths(Path(started["session_folder"]))
    (folder / "program.py").write_text(PROGRAM)
    with Program("program.py", str(folder / "ready"), address=started["address"], folder=folder) as program:
        try:
            wait_for((folder / "ready").exists, within_s=30, what="the program is at work")
        except AssertionError:
            raise AssertionError(program.said()) from None
        finally:
            pids = kill_all(session, [node["pid"] for node in started["nodes"]], order)
            program.process.kill()
    wait_for(lambda: not any(is_alive(pid) for pid in pids), within_s=5, what="all are dead")
    return session, [node["node_id"] for node in started["nodes"]]


def begin(start: str, folder: Path) -> None:
    """The next start, and its end."""
    if start == "up":
        done = clusterpool_command("up", "--num-cpus", "1", "--object-store-memory", "32MiB", "--json")
        assert done.returncode == 0, done.stderr
        done = clusterpool_command("down")
        assert done.returncode == 0, done.stderr
        return
    script = (
        "import clusterpool; clusterpool.init(num_cpus=1); print(clusterpool.get(clusterpool.remote(abs).remote(-5)))"
    )
    environment = {**os.environ, "CLUSTERPOOL_ADDRESS": "local"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=40, env=environment)
    assert (done.stdout, done.returncode) == ("5\n", 0), done.stderr
