"""Kills processes of a cluster at random, and puts new nodes and drivers in the place of killed ones."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from benchmarks.soak.clusters import Cluster, kill
from benchmarks.soak.other_driver import OtherDriver

PAUSE_S = (2.0, 5.0)
# Of twenty kills: a node is dear, for it takes its workers and objects with it, and the head is one of them.
KINDS = ("worker",) * 12 + ("node",) * 3 + ("head",) + ("store",) * 2 + ("driver",) * 2
NODE_AWAY_S = 2.0


@dataclass
class Monkey:
    """Kills in a thread of its own from `calm_s` after `start` on, until `stop`. `other`: the driver that may die."""

    cluster: Cluster
    other: OtherDriver
    seed: int
    calm_s: float
    kills: list[tuple[float, str]] = field(default_factory=list)  # seconds of the job, and what
    troubles: list[str] = field(default_factory=list)

    def start(self, at_s: float) -> None:
        """Begin with the calm; `at_s` is the job's time now, by which kills are noted."""
        self.other.start()
        self._is_over = threading.Event()
        self._started_s = time.monotonic() - at_s
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more kills but that of the other driver; waits until the cluster has all its nodes."""
        self._is_over.set()
        self._thread.join(120)
        self.other.end()

    def counts(self) -> str:
        """Who was killed how often, in words."""
        counts = Counter(kind for _, kind in self.kills)
        named = [f"{counts[kind]} {kind}{'s' * (counts[kind] > 1)}" for kind in dict.fromkeys(KINDS) if counts[kind]]
        return ", ".join(named) or "nobody"

    def _run(self) -> None:
        random = Random(self.seed)
        pause_s = self.calm_s
        while not self._is_over.wait(pause_s):
            kind = random.choice(KINDS)
            place = random.random()
            pause_s = random.uniform(*PAUSE_S)
            try:
                self._kill(kind, place)
            except Exception as exc:  # a victim that has just gone, or a cluster too busy to answer
                self.troubles.append(f"{kind}: {type(exc).__name__}: {exc}")

    def _kill(self, kind: str, place: float) -> None:
        find: dict[str, Callable[[], list[int]]] = {
            "worker": self.cluster.workers, "node": self.cluster.nodes, "head": self.cluster.heads,
            "store": self.cluster.stores, "driver": self.other.pids,
        }  # fmt: skip
        victims = find[kind]()
        if not victims:
            return
        victim = sorted(victims)[int(place * len(victims))]
        self.kills.append((time.monotonic() - self._started_s, kind))
        if kind == "driver":
            self.other.kill_and_start_anew()
        elif kind in ("node", "head"):
            self.cluster.kill_node(victim)
            time.sleep(NODE_AWAY_S)
            self.cluster.add_node()
        else:
            kill(victim)
