"""What a process holds whose node was taken for dead goes to another, and the process can do no harm when it wakes."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import clusterpool
from clusterpool.multiprocessing import Value
from tests.cluster.clusters import Cluster

pytestmark = pytest.mark.cluster
LIMIT_S = 30

# A driver of another node, which its node does not end when it is fenced: it takes the lock, and goes on when told to.
FROZEN_DRIVER = """
import pickle, sys
import clusterpool, faulthandler; faulthandler.dump_traceback_later(22)
from clusterpool.errors import LockLost

clusterpool.init(sys.argv[1])
folder = sys.argv[2]
lock, value = pickle.load(open(folder + "/pickled", "rb"))
lock.acquire()
value.get_obj().value = 7
print(lock.fencing_token, flush=True)
sys.stdin.readline()
try:
    lock.release()
    print("released", flush=True)
except LockLost as exc:
    print("lost", lock.fencing_token, flush=True)
with value:
    print(value.value, flush=True)
clusterpool.shutdown()
"""


def incremented(value: Any) -> int:
    with value:
        value.value += 1
        return int(value.value)


def test_a_holder_that_was_frozen_with_its_node_harms_nobody(
    mortal_nodes: Cluster, driver: None, tmp_path: Path
) -> None:
    there = clusterpool.remote(num_cpus=0, scheduling=f"node:{mortal_nodes.third}")
    made_there = clusterpool.get(there(lambda: Value("i", 5)).remote())
    with made_there:
        made_there.value += 1
    value = Value("i", 1)
    lock = value.get_lock()
    (tmp_path / "pickled").write_bytes(pickle.dumps((lock, value)))
    folder = next(mortal_nodes.session_folder.glob(f"n-{mortal_nodes.third.removeprefix('n')}"))
    frozen = subprocess.Popen(
        [sys.executable, "-c", FROZEN_DRIVER, str(folder), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert frozen.stdout is not None and frozen.stdin is not None
        token = int(frozen.stdout.readline())
        stopped = [frozen.pid, mortal_nodes.pids[mortal_nodes.third]]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            assert lock.acquire(timeout=15), "others find a node dead within 4.75 s"
            assert lock.fencing_token > token
            assert value.get_obj().value == 1, "what the frozen one wrote was not released with the lock"
            value.get_obj().value = 2
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        frozen.stdin.write("go on\n")
        frozen.stdin.flush()
        assert frozen.stdout.readline() == "lost None\n"
        assert lock._semlock._is_mine()
        lock.release()
        assert frozen.stdout.readline() == "2\n"
        assert frozen.wait(LIMIT_S) == 0
        # What was made there, and had moved before, is still its own.
        assert clusterpool.get(there(incremented).remote(made_there), timeout=LIMIT_S) == 7
        with made_there:
            assert made_there.value == 7
    finally:
        frozen.kill()
        frozen.wait()


@pytest.fixture(autouse=True)
def _nobody_is_left() -> Iterator[None]:
    yield
    assert not [child for child in psutil.Process().children() if child.status() == psutil.STATUS_STOPPED]
