"""Drivers that are killed: nothing of them stays on any node, and nobody else notices."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

import clusterpool
from tests.cluster.clusters import is_alive, wait_for
from tests.faults.hosts import SLACK_S, Hosts, Program, kill

pytestmark = pytest.mark.cluster

GONE_WITHIN_S = 5.0

# Work on all nodes, large values on both, an actor of its own and one that shall outlive it.
PROGRAM = """
import os, sys, time
from pathlib import Path
import clusterpool

class Keeper:
    def __init__(self, kept):
        self.kept, self.count = kept, 0
    def add(self):
        self.count += 1
        return self.count, os.getpid(), len(self.kept)

def work(number):
    time.sleep(100)

def make(number):
    return bytes([number]) * 3_000_000

spot = {"num_cpus": 0, "resources": {"spot": 0.1}}
keeper = clusterpool.remote(**spot)(Keeper).options(name="keeper", lifetime="detached").remote(b"x" * 3_000_000)
mortal = clusterpool.remote(**spot)(Keeper).options(name="mortal").remote(b"")
assert clusterpool.get(keeper.add.remote())[0] == clusterpool.get(mortal.add.remote())[0] == 1
made = [clusterpool.remote(**spot)(make).remote(number) for number in range(8)]
clusterpool.wait(made, num_returns=8)
pool = clusterpool.Pool(6)
pool.map_async(work, range(12), chunksize=1)
Path(sys.argv[1]).touch()
time.sleep(100)
"""


def square(number: int) -> int:
    time.sleep(0.02)
    return number * number


class Background:
    """Another driver's pool at work all the time."""

    def __init__(self, pool: Any) -> None:
        self.rounds = 0
        self.is_stopping = False
        self.failure: BaseException | None = None
        self._pool = pool
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self.is_stopping:
                assert self._pool.map(square, range(40), chunksize=1) == [number * number for number in range(40)]
                self.rounds += 1
        except BaseException as exc:
            self.failure = exc

    def stop(self) -> None:
        self.is_stopping = True
        self._thread.join(20)
        assert self.failure is None, self.failure


def test_a_killed_driver_leaves_its_detached_actor_and_nothing_else(hosts: Hosts, tmp_path: Path) -> None:
    clusterpool.init(address=hosts.address("home"))
    (tmp_path / "program.py").write_text(PROGRAM)
    with clusterpool.Pool(4) as pool:
        pids = {process.pid for process in pool._pool}
        background = Background(pool)
        try:
            with Program(
                "program.py", str(tmp_path / "ready"), address=hosts.address("home"), folder=tmp_path
            ) as program:
                wait_for((tmp_path / "ready").exists, what="the program is at work")
                keeper = clusterpool.get_actor("keeper")
                count, keeper_pid, kept = clusterpool.get(keeper.add.remote(), timeout=30)
                assert (count, kept) == (2, 3_000_000)
                workers = {pid for role in hosts.parts for pid in hosts.worker_pids(role)}
                mortals = workers - pids - {keeper_pid}
                assert len(mortals) >= 7
                kill(program.pid)
                # The slack is this machine's, which may be busy with other things.
                within_s = GONE_WITHIN_S + SLACK_S
                wait_for(lambda: not any(map(is_alive, mortals)), within_s=within_s, what="its workers end")
            wait_for(
                lambda: all(hosts.detail(role, "objects") == 0 for role in hosts.parts),
                within_s=GONE_WITHIN_S + SLACK_S,
                what="its objects are freed",
            )
            rounds = background.rounds
            wait_for(lambda: background.rounds > rounds + 1, what="the other driver's work goes on")
        finally:
            background.stop()
        assert {process.pid for process in pool._pool} == pids, "the other driver lost workers"
        with pytest.raises(clusterpool.errors.ActorNotFound):
            clusterpool.get_actor("mortal")
        assert clusterpool.get(keeper.add.remote(), timeout=30) == (3, keeper_pid, 3_000_000)
        clusterpool.kill(keeper)
        wait_for(lambda: not is_alive(keeper_pid), what="the detached actor ends when told to")
    clusterpool.shutdown()
    hosts.assert_healthy()
