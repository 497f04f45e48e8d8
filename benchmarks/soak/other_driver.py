"""A second program on the cluster, which is killed and started anew while the first goes on.

`python -m benchmarks.soak.other_driver CONTENDER ADDRESS FOLDER` is the program itself: small tasks and two actors,
until it is killed. Each process that works for it leaves its pid in FOLDER.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks.soak import work
from benchmarks.soak.clusters import ROOT, Cluster
from benchmarks.soak.engines import OURS, make_engine
from benchmarks.work import Counter

WORKERS = 2
ACTORS = 2
# What a killed driver had must be gone after so long; longer is looked at for so long.
GONE_WITHIN_S = 5.0
LOOK_FOR_S = 20.0


class OtherDriver:
    """Starts it, kills it, and looks what is left of it. `problems`: what should not have been."""

    def __init__(self, cluster: Cluster, contender: str, folder: Path) -> None:
        self.cluster = cluster
        self.contender = contender
        self.folder = folder
        self.problems: list[str] = []
        self.gone_s: list[float] = []  # after each kill: how long something of it was left
        self._process: subprocess.Popen[bytes] | None = None
        self._lives = 0

    def start(self) -> None:
        """Start it, where the contender's cluster is one that two programs can share."""
        if not self.cluster.is_shared:
            return
        self._lives += 1
        self._pids = self.folder / f"driver-{self._lives}"
        self._pids.mkdir()
        self._errors = (self._pids / "errors").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, self.contender, self.cluster.address, str(self._pids)],
            cwd=ROOT, env=self.cluster.driver_environment(), stdin=subprocess.DEVNULL,
            stdout=self.cluster.log, stderr=self._errors,
        )  # fmt: skip

    def pids(self) -> list[int]:
        """The process, if there is one."""
        return [self._process.pid] if self._process is not None else []

    def kill_and_start_anew(self) -> None:
        """Kill it, wait until nothing of it is left, and start it."""
        self.end()
        self.start()

    def end(self) -> None:
        """Kill it, and wait until nothing of it is left."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is not None:
            self._errors.seek(0)
            said = " ".join(self._errors.read()[-800:].split())
            self.problems.append(f"the second driver had ended by itself with {process.returncode}: {said}")
        process.kill()
        process.wait()
        if self.cluster.ends_workers_of_dead_drivers:
            self._look_until_gone(time.monotonic())

    def _look_until_gone(self, killed_s: float) -> None:
        while left := [pid for pid in self._workers() if is_running(pid)]:
            if time.monotonic() - killed_s > LOOK_FOR_S:
                self.problems.append(f"{len(left)} workers of a killed driver are still there after {LOOK_FOR_S:g} s")
                break
            time.sleep(0.02)
        self.gone_s.append(time.monotonic() - killed_s)
        if self.gone_s[-1] > GONE_WITHIN_S:
            self.problems.append(f"what a killed driver had was gone only after {self.gone_s[-1]:.1f} s")

    def _workers(self) -> list[int]:
        return [int(name) for name in os.listdir(self._pids) if name.isdigit()]


def is_running(pid: int) -> bool:
    """Whether the process is there, and more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def main() -> None:
    """The program. A wrong result or an error that its tool lets through ends it, which `OtherDriver` finds."""
    contender, address, folder = sys.argv[1:4]

    # Local names travel by value, and this folder with them.
    def mixed(number: int) -> tuple[int, int]:
        Path(folder, str(os.getpid())).touch()
        return work.mixed(number)

    class Noted(Counter):
        def add(self, amount: int) -> int:
            Path(folder, str(os.getpid())).touch()
            return super().add(amount)

    is_right = threading.Event()
    is_right.set()

    def fail(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        # What other tools let through is counted for the first driver; here it would only be noise.
        if contender == OURS:
            is_right.clear()

    def small_tasks() -> None:
        for number, value in engine.small_tasks(itertools.count(), fail):
            if value != work.expected(number):
                fail(f"mix({number}) gave {value}")

    engine = make_engine(contender, address, workers=WORKERS, task=mixed, actor=Noted)
    threading.Thread(target=small_tasks, daemon=True).start()
    total = 0
    has_actors = engine.open_actors(ACTORS)
    while is_right.is_set():
        total += 1
        answers = engine.call_all([1] * ACTORS) if has_actors else []
        if answers != [total] * ACTORS:
            fail(f"the actors answered {answers}, not {total}")
        time.sleep(0.2)
    os._exit(1)


if __name__ == "__main__":
    main()
