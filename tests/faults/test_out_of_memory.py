"""Memory runs out: the node ends the worker that matters before the kernel does, says so, and all else goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

import clusterpool
from clusterpool import errors
from tests.client.engine import MIB, wait_for

LIMIT_MIB = 600


@pytest.fixture
def small_memory(fresh: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A node that may use 600 MiB, 64 of them for objects."""
    monkeypatch.setenv("CLUSTERPOOL_MEMORY_LIMIT", f"{LIMIT_MIB}MiB")
    clusterpool.init(num_cpus=3, object_store_bytes=64 * MIB)
    yield
    clusterpool.shutdown()


pytestmark = pytest.mark.usefixtures("small_memory")


def grow(mib: int, then_s: float = 30.0, until: Path | None = None) -> int:
    blocks = []
    for _ in range(mib // 10):
        blocks.append(np.ones(10 * MIB, np.uint8))
        time.sleep(0.005)
    deadline_s = time.monotonic() + then_s
    while time.monotonic() < deadline_s and not (until and until.exists()):
        time.sleep(0.05)
    return len(blocks)


def test_a_task_that_takes_too_much_is_ended_with_the_figures() -> None:
    with pytest.raises(errors.WorkerDied) as caught:
        clusterpool.get(clusterpool.remote(retries=0)(grow).remote(2000), timeout=50)
    text = str(caught.value)
    assert "was ended by its node because memory was about to run out" in text
    assert "629 MB of this node's memory limit were in use" in text
    assert "grow (pid" in text
    assert "memory=" in text
    assert clusterpool.get(clusterpool.remote(len).remote("abc"), timeout=20) == 3


def test_only_the_one_that_grows_is_ended() -> None:
    """A small task and an actor that run at the same time see nothing of it."""

    class Kept:
        def __init__(self) -> None:
            self.block = np.ones(100 * MIB, np.uint8)

        def total(self) -> int:
            return int(self.block[0])

    actor = clusterpool.remote(Kept).remote()
    assert clusterpool.get(actor.total.remote(), timeout=20) == 1
    small = clusterpool.remote(retries=0)(grow).remote(20, 6.0)
    large = clusterpool.remote(retries=0)(grow).remote(2000)
    with pytest.raises(errors.WorkerDied, match="memory was about to run out"):
        clusterpool.get(large, timeout=50)
    assert clusterpool.get(small, timeout=50) == 2
    assert clusterpool.get(actor.total.remote(), timeout=20) == 1


def test_a_task_is_tried_again_where_that_is_allowed(tmp_path: Path) -> None:
    """Two that do not fit together: the newer one is ended, and done by another worker."""

    def take(name: str) -> str:
        mark = tmp_path / name
        is_second_try = mark.exists()
        mark.touch()
        # Whichever is left waits for the other, which may have started late.
        if is_second_try:
            (tmp_path / "again").touch()
        grow(20 if is_second_try else 350, 25.0, until=tmp_path / "again")
        return f"{name} again" if is_second_try else name

    with clusterpool.Pool(2) as pool:
        results = pool.map(take, ["a", "b"], chunksize=1)
    assert sorted(results) in (["a", "b again"], ["a again", "b"])


def test_objects_count_as_used_once() -> None:
    """The store's memory is not counted again in each worker that reads it."""
    array = np.ones(50 * MIB, np.uint8)
    ref = clusterpool.put(array)

    def read(value: np.ndarray) -> int:
        time.sleep(0.5)
        return int(value.sum())

    task = clusterpool.remote(retries=0)(read)
    refs = [task.remote(ref) for _ in range(12)]
    assert clusterpool.get(refs, timeout=50) == [50 * MIB] * 12


def test_a_program_that_a_task_has_started_counts_with_it_and_ends_with_it(tmp_path: Path) -> None:
    import subprocess
    import sys

    def start(path: Path) -> int:
        program = (
            "import time\nblocks = []\nfor _ in range(200):\n  blocks.append(b'x' * 10_000_000); time.sleep(0.005)"
        )
        process = subprocess.Popen([sys.executable, "-c", program])
        (path / "part").write_text(str(process.pid))
        (path / "part").rename(path / "pid")
        return process.wait()

    with pytest.raises(errors.WorkerDied, match="memory was about to run out"):
        clusterpool.get(clusterpool.remote(retries=0)(start).remote(tmp_path), timeout=50)
    pid = int((tmp_path / "pid").read_text())
    assert wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
