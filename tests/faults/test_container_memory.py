"""A program in a container (a memory group of 800 MB): its node is quicker than the kernel, and tells of the kernel."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import wait_for

LIMIT_BYTES = 800 << 20

SCRIPT = """
import clusterpool, numpy as np

def grow():
    blocks = [np.ones(100 << 20, np.uint8) for _ in range(40)]

clusterpool.init(num_cpus=2, object_store_bytes=64 << 20)
try:
    clusterpool.get(clusterpool.remote(retries=0)(grow).remote(), timeout=40)
except clusterpool.errors.WorkerDied as exc:
    print(exc)
print(clusterpool.get(clusterpool.remote(len).remote("abc"), timeout=20))
clusterpool.shutdown()
"""


def own_group() -> tuple[Path, str] | None:
    """The memory group of this process, and the name of its limit."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            top, limit = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        elif not controllers:
            top, limit = Path("/sys/fs/cgroup"), "memory.max"
        else:
            continue
        # In a container the path may be the host's, which is not to be seen here.
        for folder in (top / path.lstrip("/"), top):
            if (folder / "memory.stat").exists():
                return folder, limit
    return None


@pytest.fixture
def container() -> Iterator[Path]:
    """The file that a process writes its pid to in order to be in it."""
    found = own_group() if sys.platform == "linux" else None
    if found is None:
        pytest.skip("there are no memory groups")
    folder = found[0] / f"cpt-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / found[1]).write_text(str(LIMIT_BYTES))
    except OSError as exc:
        with contextlib.suppress(OSError):
            folder.rmdir()
        pytest.skip(f"a memory group cannot be made: {exc}")
    yield folder / "cgroup.procs"
    wait_for(lambda: is_removed(folder), "nothing runs in it any more")


def is_removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True


def run_in(container: Path, **env: str) -> str:
    """What the program in the container printed."""
    enter = f'echo $$ > "{container}" && exec "$@"'
    command = ["sh", "-c", enter, "sh", sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=55, check=False, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("3\n")
    return done.stdout


@pytest.mark.usefixtures("fresh")
def test_the_node_is_quicker_than_the_kernel(container: Path) -> None:
    shown = run_in(container)
    assert "was ended by its node because memory was about to run out" in shown
    assert "of 839 MB of the container's memory were in use" in shown


@pytest.mark.usefixtures("fresh")
def test_what_the_kernel_does_is_told(container: Path) -> None:
    shown = run_in(container, CLUSTERPOOL_MEMORY_THRESHOLD="1")
    assert "was killed by signal 9 (SIGKILL)" in shown
    assert "the kernel has just ended a process for want of memory" in shown
