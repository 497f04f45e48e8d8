"""Connections in what is loaded more than once: initializers, functions, tasks that are run again."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import clusterpool
from clusterpool import errors
from clusterpool.client import api, descriptors
from clusterpool.multiprocessing import Lock, Pipe, Pool, Queue
from tests.client.engine import wait_for

pytestmark = pytest.mark.usefixtures("cluster")

kept_end: Any = None


def node_descriptors() -> int:
    """How many of its descriptors the node has open."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with sock:
        sock.connect(str(descriptors._node_folder(api.connect()) / "fd.sock"))
        pid = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), "little")
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.fixture
def pipe() -> Iterator[tuple[Any, Any]]:
    first, second = Pipe(duplex=False)
    yield first, second
    first.close()
    second.close()


def take(end: Any) -> None:
    global kept_end
    kept_end = end
    end.send(os.getpid())


def pid_of(_: Any) -> int:
    return os.getpid()


def send_item(end: Any, item: Any) -> int:
    end.send(item)
    return os.getpid()


def is_at_its_end(end: Any) -> bool:
    assert end.poll(20), "the end did not come"
    try:
        end.recv()
    except EOFError:
        return True
    return False


def test_an_initializers_connection_reaches_all_workers_and_those_that_replace_them(pipe: Any) -> None:
    ours, theirs = pipe
    with Pool(3, initializer=take, initargs=(theirs,)) as pool:
        pids = {ours.recv() for _ in range(3)}
        assert len(pids) == 3
        os.kill(min(pids), signal.SIGKILL)
        assert ours.poll(20)
        assert ours.recv() not in pids
        pool.close()
        pool.join()
    theirs.close()
    assert is_at_its_end(ours)


def test_a_partial_functions_connection_reaches_all_who_run_it(pipe: Any) -> None:
    ours, theirs = pipe
    with Pool(3) as pool:
        pool.map(partial(send_item, theirs), range(10), chunksize=1)
        assert sorted(ours.recv() for _ in range(10)) == list(range(10))
        theirs.close()
        # The workers live on: what they had of the function has gone with it.
        assert pool.map(pid_of, range(3), chunksize=1)
        pool.close()
        pool.join()
    assert is_at_its_end(ours)


def test_a_closures_connection_reaches_all_who_run_it(pipe: Any) -> None:
    ours, theirs = pipe
    before = node_descriptors()

    def send(item: int) -> None:
        theirs.send(item)

    with Pool(3) as pool:
        for _ in range(3):
            pool.map(send, range(10), chunksize=1)
        assert sorted(ours.recv() for _ in range(30)) == sorted([*range(10)] * 3)
        assert node_descriptors() <= before + 12  # it was parked once, not at each look whether it has changed
        pool.close()
        pool.join()
    del send
    gc.collect()
    theirs.close()
    assert is_at_its_end(ours)


def test_a_socket_and_a_connection_in_a_tasks_arguments_arrive_again_when_it_is_run_again(
    pipe: Any, tmp_path: Path
) -> None:
    ours, theirs = pipe
    near, far = socket.socketpair()

    @clusterpool.remote(retries=1)
    def die_first(ends: list[Any]) -> int:
        marker = tmp_path / "died"
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        ends[0].send("again")
        ends[1].sendall(b"x")
        return os.getpid()

    with near:
        answer = die_first.remote([theirs, far])
        theirs.close()
        far.close()
        assert clusterpool.get(answer, timeout=30)
        assert ours.recv() == "again"
        assert is_at_its_end(ours)
        near.settimeout(20)
        assert near.recv(10) == b"x"
        assert near.recv(10) == b""


def test_what_is_not_loaded_is_let_go_too(pipe: Any) -> None:
    ours, theirs = pipe

    @clusterpool.remote(resources={"nowhere": 1})
    def never(end: Any) -> None:
        pass

    answer = never.remote(theirs)
    theirs.close()
    clusterpool.cancel(answer)
    del answer
    gc.collect()
    assert is_at_its_end(ours)


def test_what_a_worker_has_leased_goes_with_the_worker(pipe: Any) -> None:
    ours, theirs = pipe

    def lease_and_die(end: Any) -> None:
        _lease = descriptors.lease(end.fileno())
        os.kill(os.getpid(), signal.SIGKILL)

    with Pool(1, retries=0) as pool:
        with pytest.raises(errors.WorkerDied):
            pool.apply(lease_and_die, (theirs,))
        theirs.close()
        assert is_at_its_end(ours)


def test_an_item_of_a_queue_can_still_be_loaded_once_and_leaves_nothing(pipe: Any) -> None:
    ours, theirs = pipe
    queue = Queue()
    queue.put(theirs)
    theirs.close()
    with queue.get(timeout=20) as arrived:
        arrived.send("x")
    assert ours.recv() == "x"
    assert is_at_its_end(ours)


def test_the_node_keeps_nothing_of_what_was_leased() -> None:
    with Pool(2) as pool:

        def one_round() -> None:
            ours, theirs = Pipe(duplex=False)
            pool.map(partial(send_item, theirs), range(2), chunksize=1)
            pool.apply(send_item, (theirs, 2))
            theirs.close()
            assert sorted(ours.recv() for _ in range(3)) == [0, 1, 2]
            assert is_at_its_end(ours)
            ours.close()

        one_round()
        before = wait_for(node_descriptors)
        for _ in range(50):
            one_round()
        assert wait_for(lambda: node_descriptors() <= before), (node_descriptors(), before)


def test_a_forked_child_does_not_let_go_of_what_its_parent_has_leased(pipe: Any) -> None:
    theirs = pipe[1]
    lease = descriptors.lease(theirs.fileno())
    child = os.fork()
    if child == 0:
        del lease
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    for _ in range(2):
        os.close(descriptors.fetch(lease.ticket))
    ticket = lease.ticket
    del lease

    def is_gone() -> bool:
        try:
            os.close(descriptors.fetch(ticket))
        except FileNotFoundError:
            return True
        return False

    assert wait_for(is_gone)


def test_the_methods_of_locks_can_be_sent() -> None:
    lock = Lock()
    with Pool(1) as pool:
        assert pool.apply(lock.acquire, (False,)) is True
        assert lock.acquire(False) is False
        assert pool.apply(lock.acquire, (), {"timeout": 0.01}) is False
        pool.apply(lock.release)
        assert lock.acquire(False) is True
    lock.release()
    process = clusterpool.multiprocessing.Process(target=lock.acquire)
    process.start()
    process.join(30)
    assert process.exitcode == 0


PROGRAM = """
import os
from clusterpool.multiprocessing import Pipe, Pool

ours, theirs = Pipe(duplex=False)

def send(item):
    theirs.send((item, os.getpid()))

def helper(item):
    return send(item)

if __name__ == "__main__":
    for _ in range(2):
        with Pool(3) as pool:
            pool.map(helper, range(6), chunksize=1)
            print(sorted(ours.recv()[0] for _ in range(6)))
            pool.close()
            pool.join()
    theirs.close()
    assert ours.poll(20)
    try:
        ours.recv()
    except EOFError:
        print("end")
"""


def test_a_connection_that_is_a_global_of_the_program_reaches_the_workers_of_pool_after_pool(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=50, cwd=Path.cwd())
    assert (done.stdout, done.stderr) == ("[0, 1, 2, 3, 4, 5]\n" * 2 + "end\n", "")
