"""Kills processes of a cluster at random, and puts new nodes in the place of killed ones."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from random import Random

from benchmarks.soak.clusters import Cluster, kill

PAUSE_S = (2.0, 5.0)
# Of ten kills: a node is dear, for it takes its workers and objects with it.
KINDS = ("worker",) * 7 + ("node",) * 2 + ("store",)
NODE_AWAY_S = 2.0


@dataclass
class Monkey:
    """Kills in a thread of its own from `calm_s` after `start` on, until `stop`."""

    cluster: Cluster
    seed: int
    calm_s: float
    kills: list[tuple[float, str]] = field(default_factory=list)  # seconds of the job, and what
    troubles: list[str] = field(default_factory=list)

    def start(self, at_s: float) -> None:
        """Begin with the calm; `at_s` is the job's time now, by which kills are noted."""
        self._is_over = threading.Event()
        self._started_s = time.monotonic() - at_s
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more kills; waits until the cluster has all its nodes."""
        self._is_over.set()
        self._thread.join(120)

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
        victims = {"worker": self.cluster.workers, "node": self.cluster.nodes, "store": self.cluster.stores}[kind]()
        if not victims:
            return
        victim = sorted(victims)[int(place * len(victims))]
        self.kills.append((time.monotonic() - self._started_s, kind))
        if kind != "node":
            kill(victim)
            return
        self.cluster.kill_node(victim)
        time.sleep(NODE_AWAY_S)
        self.cluster.add_node()
