"""What one process of a single node does with coordination: names, the moved page, waits that are given up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import clusterpool
from clusterpool import errors
from clusterpool.client import api
from clusterpool.processes.thin_files import semaphore_name, semaphore_path
from tests.client.engine import wait_for

UNBOUNDED = 2**31 - 1


def new_thin(value: int) -> str:
    from _multiprocessing import SemLock  # type: ignore[import-not-found]

    here = api.runtime().coordination
    name = here.new_name()
    SemLock(1, value, UNBOUNDED, semaphore_name(here.node_id, name), False)
    return name


def new_fat(value: int) -> str:
    """A node can be asked to move what is its own, as if another had asked."""
    name = new_thin(value)
    here = api.runtime().coordination
    here.adopt("semaphore", name, here.node_id, UNBOUNDED)
    return name


def test_what_is_thin_asks_nobody(fresh: None) -> None:
    here = api.runtime().coordination
    requests = api.runtime().client.requests
    before = next(requests)
    name = new_thin(1)
    assert bytes(here.page) == bytes(8)
    assert not here.is_moved(name)
    assert next(requests) == before + 1  # nothing was asked between
    here.forget(name)
    wait_for(lambda: not semaphore_path(here.node_id, name).exists())
    assert not semaphore_path(here.node_id, name).exists()


def test_the_first_fat_operation_starts_the_control_store_at_once(fresh: None) -> None:
    name = new_fat(1)
    assert api.runtime().coordination.acquire(name, 5) == 1


def test_a_fork_is_told_at_once_whatever_lock_another_thread_held(fresh: None) -> None:
    name = new_fat(1)
    here, client = api.runtime().coordination, api.connect()
    with client._lock:
        pid = os.fork()
        if pid == 0:
            signal.alarm(30)
            try:
                here.acquire(name, 1.0)
            except errors.NotConnected:
                os._exit(0)
            finally:
                os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_closed_client_says_so(fresh: None) -> None:
    name = new_fat(0)
    here = api.runtime().coordination
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            here.acquire(name, None)
        except BaseException as exc:
            failures.append(exc)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0)  # it may or may not wait by now: both must end
    clusterpool.shutdown()
    thread.join(20)
    assert not thread.is_alive()
    assert isinstance(failures[0], (errors.NotConnected, errors.ObjectLost))
    with pytest.raises(errors.NotConnected):
        here.value(name)


@pytest.mark.usefixtures("cluster")
class TestOnOneNode:
    def test_names_are_of_the_job_and_the_process(self) -> None:
        client = api.runtime().client
        names = [api.runtime().coordination.new_name() for _ in range(3)]
        assert len(set(names)) == 3
        job_id, process_id, number = names[0].split("-")
        assert (job_id, process_id) == (client.job.job_id, client.address.process_id)
        assert number.isdigit()

    def test_workers_of_a_job_make_names_of_their_own(self) -> None:
        def name() -> str:
            return api.runtime().coordination.new_name()

        theirs = clusterpool.get(clusterpool.remote(name).remote(), timeout=20)
        assert theirs.split("-")[0] == api.runtime().client.job.job_id
        assert theirs.split("-")[1] != api.runtime().client.address.process_id

    def test_the_page_grows_before_something_moves_and_only_then(self) -> None:
        here = api.runtime().coordination
        page = here.page.cast("Q")
        before = page[0]
        name = new_thin(1)
        assert page[0] == before and not here.is_moved(name)
        here.adopt("semaphore", name, here.node_id, UNBOUNDED)
        assert page[0] == before + 1 and here.is_moved(name)
        assert not here.is_moved(new_thin(1))

    def test_all_processes_of_the_node_see_the_page(self) -> None:
        def look() -> int:
            return int(api.runtime().coordination.page.cast("Q")[0])

        new_fat(0)
        here = int(api.runtime().coordination.page.cast("Q")[0])
        assert clusterpool.get(clusterpool.remote(look).remote(), timeout=20) == here > 0

    def test_an_interrupted_wait_takes_no_token(self) -> None:
        here = api.runtime().coordination
        name = new_fat(0)
        timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            here.acquire(name, 20)
        timer.join()
        here.release(name, UNBOUNDED)
        assert wait_for(lambda: here.value(name) == 1)

    def test_a_wait_in_another_thread_leaves_the_main_thread_free(self) -> None:
        here = api.runtime().coordination
        name = new_fat(0)
        tokens: list[int] = []
        thread = threading.Thread(target=lambda: tokens.append(here.acquire(name, 20)))
        thread.start()
        assert clusterpool.get(clusterpool.remote(abs).remote(-1), timeout=20) == 1
        here.release(name, UNBOUNDED)
        thread.join(20)
        assert tokens == [1]

    def test_an_item_that_nobody_waited_for_any_more_is_there_for_the_next(self) -> None:
        here = api.runtime().coordination
        name = here.new_name()
        here.adopt("channel", name, here.node_id)
        got = []
        for number in range(30):
            thread = threading.Thread(target=here.put, args=(name, b"%d" % number))
            thread.start()
            item = here.get(name, 0.0005)
            thread.join()
            if item is not None:
                got.append(item)
        while len(got) < 30 and (item := here.get(name, 20)) is not None:
            got.append(item)
        assert here.get(name, 0) is None
        assert sorted(got, key=int) == [b"%d" % number for number in range(30)]

    def test_the_waits_of_a_killed_worker_end(self) -> None:
        here = api.runtime().coordination
        name = new_fat(0)

        class Waiter:
            def wait(self, name: str) -> None:
                api.runtime().coordination.acquire(name, None)

        actor = clusterpool.remote(Waiter).options(num_cpus=0).remote()
        waiting = actor.wait.remote(name)
        assert clusterpool.wait([waiting], timeout=0.3)[0] == []
        clusterpool.kill(actor)
        with pytest.raises(errors.ActorDied):
            clusterpool.get(waiting, timeout=20)
        here.release(name, UNBOUNDED)
        assert wait_for(lambda: here.acquire(name, 0.1))

    def test_what_a_killed_driver_made_goes_with_its_job(self, tmp_path: Path) -> None:
        done = run_driver(
            tmp_path,
            """
            import os, signal
            from _multiprocessing import SemLock
            from clusterpool.client import api
            from clusterpool.processes.thin_files import semaphore_name, semaphore_path
            here = api.runtime().coordination
            name = here.new_name()
            SemLock(1, 1, 1, semaphore_name(here.node_id, name), False)
            print(semaphore_path(here.node_id, name), flush=True)
            assert semaphore_path(here.node_id, name).exists()
            os.kill(os.getpid(), signal.SIGKILL)
            """,
        )
        path = Path(done.stdout.strip())
        assert path.name.startswith("sem.clusterpool-"), done.stderr
        wait_for(lambda: not path.exists())
        assert not path.exists()


def run_driver(folder: Path, text: str) -> Any:
    """A second driver of this process's cluster."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(text))
    registered = api.runtime().client.registered
    assert registered is not None
    address = str(Path(registered.processes_folder).parent / "node.sock")
    environment = {**os.environ, "CLUSTERPOOL_ADDRESS": address, "PYTHONPATH": os.getcwd()}
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=50, env=environment)
