"""Named shared memory: whose it is, who removes it, and when."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap
from multiprocessing import shared_memory as standard
from pathlib import Path
from typing import Any

import pytest

import clusterpool
from clusterpool.multiprocessing.shared_memory import ShareableList, SharedMemory
from tests.waiting import wait_for

SHM = Path("/dev/shm")


@pytest.fixture(scope="module", autouse=True)
def _cluster(cluster: None) -> None:
    """Of this module."""


@pytest.fixture
def name() -> Any:
    """A name of the user's own."""
    chosen = f"cp_test_{os.getpid()}"
    yield chosen
    (SHM / chosen).unlink(missing_ok=True)


def test_made_attached_pickled_and_unlinked() -> None:
    made = SharedMemory(create=True, size=100)
    assert isinstance(made, standard.SharedMemory)
    assert f"clusterpool-{clusterpool.node_id()}-" in made.name
    made.buf[:5] = b"hello"
    attached, unpickled = SharedMemory(made.name), pickle.loads(pickle.dumps(made))
    assert bytes(attached.buf[:5]) == bytes(unpickled.buf[:5]) == b"hello"
    assert repr(made) == f"SharedMemory({made.name!r}, size=100)"
    made.unlink()
    with pytest.raises(FileNotFoundError):
        SharedMemory(made.name)
    with pytest.raises(FileNotFoundError):
        attached.unlink()
    for segment in (made, attached, unpickled):
        segment.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"create": True, "size": -1}, "positive integer"),
        ({"create": True}, "different from zero"),
        ({}, "can only be None if create=True"),
    ],
)
def test_wrong_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharedMemory(**arguments)


def test_a_name_is_taken_once(name: str) -> None:
    made = SharedMemory(name, create=True, size=10)
    with pytest.raises(FileExistsError):
        SharedMemory(name, create=True, size=10)
    assert made.name == name
    made.close()
    made.unlink()
    assert not [entry for entry in SHM.iterdir() if entry.is_symlink() and name in os.readlink(entry)]


def test_a_list() -> None:
    made = ShareableList(["a", 1, 2.5, None, b"bytes"])
    assert isinstance(made.shm, SharedMemory)
    copy = pickle.loads(pickle.dumps(made))
    copy[1] = 7
    assert list(made) == ["a", 7, 2.5, None, b"bytes"]
    assert list(ShareableList(name=made.shm.name)) == list(made)
    made.shm.unlink()


def attach_and_die(name: str) -> int:
    segment = SharedMemory(name)
    segment.buf[0] = 7
    from multiprocessing.resource_tracker import _resource_tracker

    assert getattr(_resource_tracker, "_pid", None) is None, "no tracker was started"
    return os.getpid()


def make_and_leave(name: str) -> str:
    return SharedMemory(name, create=True, size=10).name


def test_a_process_that_attaches_removes_nothing_at_its_end(name: str) -> None:
    made = SharedMemory(name, create=True, size=10)
    with clusterpool.Pool(1) as pool:
        pool.apply(attach_and_die, (name,))
    assert made.buf[0] == 7 and (SHM / name).exists()
    made.close()
    made.unlink()


def test_what_a_worker_made_outlives_the_worker(name: str) -> None:
    with clusterpool.Pool(1) as pool:
        assert pool.apply(make_and_leave, (name,)) == name
    segment = SharedMemory(name)
    segment.close()
    # The record is the job's, and there until it ends: the fixture of the test would take it for left behind.
    for entry in SHM.iterdir():
        if entry.is_symlink() and name in os.readlink(entry):
            entry.unlink()


SCRIPT = """
    import os, sys
    from clusterpool.multiprocessing.shared_memory import ShareableList, SharedMemory

    if __name__ == "__main__":
        name = sys.argv[1]
        kept = [
            SharedMemory(create=True, size=10), SharedMemory(name, create=True, size=10), ShareableList([1]),
        ]
        replaced = SharedMemory(name + "_replaced", create=True, size=10)
        SharedMemory(replaced.name).unlink()
        with open("/dev/shm/" + replaced.name, "w") as file:
            file.write("somebody else's")
        untracked = SharedMemory(create=True, size=10, track=False)
        print(untracked.name, *(getattr(each, "shm", each).name for each in kept))
        sys.stdout.flush()
        if sys.argv[2] == "kill":
            os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_what_a_job_leaves_goes_with_the_job(name: str, end: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    replaced = SHM / f"{name}_replaced"
    command = [sys.executable, str(script), name, end]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, env=environment)
    untracked, *kept = done.stdout.split()
    try:
        assert done.returncode == (0 if end == "exit" else -9), done.stderr
        assert "leaked" not in done.stderr
        assert len(kept) == 3
        wait_until_gone([SHM / each for each in kept])
        assert (SHM / untracked).exists(), "track=False"
        assert replaced.read_text() == "somebody else's"
    finally:
        (SHM / untracked).unlink(missing_ok=True)
        replaced.unlink(missing_ok=True)


def wait_until_gone(paths: list[Path]) -> None:
    wait_for(lambda: not any(path.exists() for path in paths), f"{paths} are gone")
