"""File systems that are too small: a disk that fills up with spilled objects, and 64 MB of shared memory.

Each runs in a mount namespace of its own, with a small tmpfs in the place in question.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL_DISK = """
import numpy as np, clusterpool
from clusterpool import errors
MIB = 1 << 20

def value(ref):
    array = clusterpool.get(ref, timeout=30)
    assert array.nbytes == 10 * MIB and array[0] == array[-1]
    return int(array[0])

def make(number):
    return np.full(10 * MIB, number, np.uint8)

clusterpool.init(num_cpus=2, object_store_bytes=64 * MIB)
refs = []
try:
    while len(refs) < 40:
        refs.append(clusterpool.put(make(len(refs))))
except errors.StoreFull as exc:
    print("put:", exc)
try:
    clusterpool.get(clusterpool.remote(retries=0)(make).remote(1), timeout=30)
except errors.StoreFull as exc:
    print("task:", exc)
print("kept", len(refs), [value(ref) for ref in refs] == list(range(len(refs))))
# Whoever takes what is there, one after the other, makes room again.
numbers = []
while refs:
    numbers.append(value(refs.pop(0)))
print("taken", numbers == list(range(len(numbers))))
more = [clusterpool.put(make(number)) for number in range(8)]
print("again", [value(ref) for ref in more] == list(range(8)))
clusterpool.shutdown()
"""

SMALL_SHARED_MEMORY = """
import os, numpy as np, clusterpool
from clusterpool.client import current
MIB = 1 << 20
clusterpool.init(num_cpus=2)
folder = os.path.dirname(current.get().client._node_socket)
refs = [clusterpool.put(np.full(10 * MIB, number, np.uint8)) for number in range(20)]
make = clusterpool.remote(lambda number: np.full(10 * MIB, number, np.uint8))
refs += [make.remote(number) for number in range(20, 30)]
print([int(clusterpool.get(ref, timeout=30)[-1]) for ref in refs] == list(range(30)))
with open(folder + "/logs/node.log") as log:
    print(log.read().count("the object store is a file in"))
print([name for name in os.listdir("/dev/shm") if name.startswith("clusterpool")])
clusterpool.shutdown()
"""

NO_ROOM_FOR_WORKERS = """
import os, clusterpool
from clusterpool import errors
clusterpool.init(num_cpus=2)
filler = os.environ["CLUSTERPOOL_TMPDIR"] + "/filler"
with open(filler, "wb", 0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
pool = clusterpool.Pool(2)
try:
    pool.map_async(abs, [-1]).get(40)
except errors.StartFailed as exc:
    print(exc)
os.unlink(filler)
print(clusterpool.Pool(2).map_async(abs, [-1]).get(40))
clusterpool.shutdown()
"""

CAN_MOUNT = (
    sys.platform == "linux"
    and os.geteuid() == 0
    and subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0
)
pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.skipif(not CAN_MOUNT, reason="mounting a small file system needs root"),
]


def run_with_small(folder: Path | str, size: str, script: str) -> list[str]:
    """Run a program for which `folder` is a file system of `size`; the lines it prints."""
    mount = f'mount -t tmpfs -o size={size} tmpfs "{folder}" && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=55, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_a_full_disk_is_an_error_for_who_creates_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # Short, for the sockets, and gone with the namespace.
    folder = Path(os.environ["CLUSTERPOOL_TMPDIR"])
    put, task, kept, taken, again = run_with_small(folder, "200m", FULL_DISK)
    for text in (put, task):
        assert "objects could not be moved to disk" in text
        assert "make room on that disk, choose another folder to spill to, or keep fewer results" in text
    assert kept.startswith("kept ") and kept.endswith(" True")
    assert int(kept.split()[1]) > 10  # six in memory, and the rest on disk
    assert (taken, again) == ("taken True", "again True")


def test_64_mb_of_shared_memory_are_replaced_by_a_file_and_that_is_said_once() -> None:
    assert run_with_small("/dev/shm", "64m", SMALL_SHARED_MEMORY) == ["True", "1", "[]"]


def test_workers_that_find_no_room_on_the_disk_are_an_error_and_no_hang() -> None:
    failure, after = run_with_small(Path(os.environ["CLUSTERPOOL_TMPDIR"]), "20m", NO_ROOM_FOR_WORKERS)[-2:]
    assert "ended while it started" in failure and "may be full" in failure
    assert after == "[1]"
