"""What the driver's node holds while the job runs and after it, and what is left on the machine when all has ended."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.soak.clusters import Cluster, ClusterpoolCluster, psutil

SETTLE_S = 30.0


@dataclass
class Watch:
    """Looks at a clusterpool cluster; of others only what is left at the end. Made before the cluster."""

    cluster: Cluster
    samples: list[dict[str, float]] = field(default_factory=list)
    segments_before: set[str] = field(default_factory=lambda: segments())

    def sample(self) -> None:
        """Take note of the descriptors and memory of the one node that is never killed."""
        if not isinstance(self.cluster, ClusterpoolCluster):
            return
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.cluster.home)
            own_bytes = process.memory_full_info().uss
            self.samples.append({"fds": process.num_fds(), "own_mb": own_bytes / 1e6, "threads": process.num_threads()})

    def after_job(self) -> list[str]:
        """What is wrong once the driver has gone: workers, bytes in stores, leases."""
        if not isinstance(self.cluster, ClusterpoolCluster):
            return []
        deadline_s = time.monotonic() + SETTLE_S
        while True:
            nodes = self.cluster.status()
            left = [
                f"node {node['node_id']}: {node['workers']} workers, {node['store_used_bytes']} bytes in the store, "
                f"{node['queue_length']} requests"
                for node in nodes
                if node["workers"] or node["store_used_bytes"] or node["queue_length"] or not node["alive"]
            ]
            if not left or time.monotonic() > deadline_s:
                return left
            time.sleep(0.5)

    def after_all(self) -> list[str]:
        """What is left when the cluster has been stopped."""
        deadline_s = time.monotonic() + SETTLE_S
        while True:
            folder = Path(self.cluster.environment["CLUSTERPOOL_TMPDIR"])
            found = {
                "processes": [str(process.pid) for process in self.cluster.living()],
                "files in /dev/shm": sorted(segments() - self.segments_before),
                "session folders": [path.name for path in folder.glob("*/s-*")],
            }
            left = [f"{len(names)} {what} ({', '.join(names[:3])} ...)" for what, names in found.items() if names]
            if not left or time.monotonic() > deadline_s:
                return left
            time.sleep(0.5)

    def growth(self) -> dict[str, Any]:
        """First and last of what was sampled: after a tenth of the time, when all is warm, and at the end."""
        if len(self.samples) < 10:
            return {}
        first, last = self.samples[len(self.samples) // 10], self.samples[-1]
        return {name: [round(first[name], 1), round(last[name], 1)] for name in first}


def segments() -> set[str]:
    """What clusterpool has in shared memory: arenas, cells and semaphores."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(("clusterpool-", "sem.clusterpool-"))}
