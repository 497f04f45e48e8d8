"""Processes that are stopped (SIGSTOP) read nothing: nobody's memory grows for their sake, and they find all when they
go on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import clusterpool
from clusterpool.client import current
from tests.client.engine import MIB, wait_for


def memory(pid: int) -> int:
    """Bytes that a process has for itself, without what is in shared memory."""
    used = psutil.Process(pid).memory_info()
    return int(used.rss - used.shared)


@pytest.fixture
def stopped() -> Iterator[Any]:
    """Stops processes, and lets them go on at the end."""
    pids: list[int] = []

    def stop(pid: int) -> None:
        pids.append(pid)
        os.kill(pid, signal.SIGSTOP)

    yield stop
    for pid in pids:
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            pass


PRINTING_DRIVER = """
import sys, time, clusterpool
from pathlib import Path
folder = Path(sys.argv[1])
clusterpool.init(num_cpus=1)

def speak(folder, lines):
    (folder / "speaks").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    for number in range(lines):
        print(f"{number:09d}" + "x" * 90)
    (folder / "spoken").touch()
    return lines

ref = clusterpool.remote(speak).remote(folder, int(sys.argv[2]))
(folder / "node").write_text(str(clusterpool.nodes()[0]["pid"]))
print("result", clusterpool.get(ref, timeout=50))
(folder / "got").touch()
while not (folder / "end").exists():
    time.sleep(0.01)
clusterpool.shutdown()
"""


@pytest.mark.usefixtures("fresh")
def test_output_for_a_stopped_driver_does_not_fill_its_nodes_memory(tmp_path: Path, stopped: Any) -> None:
    lines = 600_000  # 60 MB
    with (tmp_path / "out").open("wb") as out:
        command = [sys.executable, "-c", PRINTING_DRIVER, str(tmp_path), str(lines)]
        driver = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            assert wait_for((tmp_path / "node").exists, 20)
            assert wait_for((tmp_path / "speaks").exists, 20)
            node = int(wait_for((tmp_path / "node").read_text))
            stopped(driver.pid)
            before = memory(node)
            (tmp_path / "go").touch()
            assert wait_for((tmp_path / "spoken").exists, 50)  # the worker is not held up
            assert memory(node) - before < 20 * MIB
            os.kill(driver.pid, signal.SIGCONT)
            assert wait_for((tmp_path / "got").exists, 20)
            assert wait_for(lambda: b"lines of output are not shown" in (tmp_path / "out").read_bytes())
            (tmp_path / "end").touch()
            assert driver.wait(20) == 0
        finally:
            driver.kill()
            driver.wait()
    shown = (tmp_path / "out").read_text()
    assert f"result {lines}" in shown
    notices = [line for line in shown.splitlines() if "lines of output are not shown" in line]
    missing = sum(int(line.partition("[")[2].split()[0].replace(",", "")) for line in notices)
    assert missing + shown.count("x" * 90) == lines  # each line was shown or counted


@pytest.mark.usefixtures("fresh")
def test_results_for_a_stopped_driver_do_not_fill_its_workers_memory(tmp_path: Path, stopped: Any) -> None:
    """The stopped one is a task that owns tasks: it has all results when it goes on."""
    clusterpool.init(num_cpus=2)

    def own(folder: Path) -> int:
        def make(number: int) -> bytes:
            return bytes(90_000)

        with clusterpool.Pool(1) as pool:
            worker = pool.apply(os.getpid)
            results = pool.map_async(make, range(3000), chunksize=1)
            (folder / "part").write_text(f"{os.getpid()} {worker}")
            (folder / "part").rename(folder / "pids")
            return sum(map(len, results.get()))

    ref = clusterpool.remote(own).remote(tmp_path)
    assert wait_for((tmp_path / "pids").exists, 20)
    owner, worker = map(int, (tmp_path / "pids").read_text().split())
    stopped(owner)
    before = -1
    while (now := memory(worker)) > before:  # until it has nothing more to do
        before = now
        time.sleep(0.5)
    assert memory(worker) < 150 * MIB
    os.kill(owner, signal.SIGCONT)
    assert clusterpool.get(ref, timeout=40) == 3000 * 90_000


@pytest.mark.usefixtures("fresh")
def test_tasks_and_calls_for_a_stopped_worker_stay_with_their_owner(stopped: Any) -> None:
    clusterpool.init(num_cpus=2)

    class Sink:
        def __init__(self) -> None:
            self.size = 0

        def pid(self) -> int:
            return os.getpid()

        def add(self, data: bytes) -> int:
            self.size += len(data)
            return self.size

    def unsent() -> int:
        client = current.get().client
        return sum(connection.unsent_bytes for connection in client._connections.by_process.values())

    sink = clusterpool.remote(Sink).remote()
    pid = clusterpool.get(sink.pid.remote(), timeout=20)
    stopped(pid)
    refs = [sink.add.remote(bytes([number % 256]) * 90_000) for number in range(2000)]
    assert unsent() < 120 * MIB  # of 180 MB
    with clusterpool.Pool(1) as pool:
        worker = pool.apply(os.getpid)
        stopped(worker)
        results = pool.map_async(len, [bytes([number % 256]) * 90_000 for number in range(2000)], chunksize=1)
        time.sleep(0.5)
        assert unsent() < 150 * MIB
        os.kill(worker, signal.SIGCONT)
        assert results.get(30) == [90_000] * 2000
    os.kill(pid, signal.SIGCONT)
    assert clusterpool.get(refs[-1], timeout=30) == 2000 * 90_000
