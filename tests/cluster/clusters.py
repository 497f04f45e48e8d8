"""Clusters of several nodes on this machine, started by the command line as a user would, and looks at them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import clusterpool
from tests.waiting import is_alive, wait_for  # noqa: F401  (is_alive: many take both from here)

LARGE_BYTES = 100_000_000
# A node is declared dead within 4.75 s (membership.py).
DEAD_WITHIN_S = 5.0
THREE_NODES = """
head: {num_cpus: 2, object_store_memory: 400MiB}
nodes:
  - {name: second, num_cpus: 2, resources: {ssd: 2}, object_store_memory: 400MiB}
  - {name: third, num_cpus: 1, labels: {zone: b}, object_store_memory: 400MiB}
"""


def clusterpool_command(*arguments: str, timeout_s: float = 50) -> subprocess.CompletedProcess[str]:
    """Run `clusterpool arguments`; its output as text."""
    command = [sys.executable, "-m", "clusterpool.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


@dataclass(frozen=True)
class Cluster:
    """What `clusterpool up --json` said; the ids of the nodes by their order in the file."""

    head: str
    second: str
    third: str
    pids: dict[str, int]
    address: str
    session_folder: Path
    join_file: str

    def kill(self, *node_ids: str) -> None:
        """Nodes, all at once."""
        for node_id in node_ids:
            os.kill(self.pids[node_id], signal.SIGKILL)

    @property
    def node_ids(self) -> set[str]:
        return {self.head, self.second, self.third}


@contextlib.contextmanager
def started_cluster(folder: Path, run_of_tests: Any) -> Iterator[Cluster]:
    """Three nodes of 2, 2 and 1 CPUs; the second has the resource `ssd`. Ended, and searched for remains, at last."""
    file = folder / "cluster.yaml"
    file.write_text(THREE_NODES)
    done = clusterpool_command("up", str(file), "--json")
    assert done.returncode == 0, done.stderr
    started = json.loads(done.stdout)
    held_before = list(run_of_tests.held)
    run_of_tests.held.append(run_of_tests.look())
    nodes = started["nodes"]
    try:
        yield Cluster(
            head=next(node["node_id"] for node in nodes if node["is_head"]),
            second=next(node["node_id"] for node in nodes if "ssd" in node["total"]),
            third=next(node["node_id"] for node in nodes if node["total"]["CPU"] == 1),
            pids={node["node_id"]: node["pid"] for node in nodes},
            address=started["address"],
            session_folder=Path(started["session_folder"]),
            join_file=started["join_file"],
        )
    finally:
        end_cluster(run_of_tests, held_before)


def end_cluster(run_of_tests: Any, held_before: list[Any]) -> None:
    """`clusterpool down`, and a search for remains of all that was not held before the cluster was started."""
    done = clusterpool_command("down")
    run_of_tests.held[:] = held_before
    assert done.returncode == 0, done.stdout + done.stderr
    leftovers = run_of_tests.wait_until_clean()
    if leftovers:
        description = leftovers.describe()
        run_of_tests.clear(leftovers)
        pytest.fail(f"`clusterpool down` left behind:\n{description}", pytrace=False)


def node_link(cluster: Cluster) -> Any:
    """A conversation with the head, to be used as a context manager."""
    from clusterpool.cli.node_link import NodeLink

    return NodeLink(cluster.address)


def children_of(pid: int) -> list[int]:
    """Of the process, and theirs."""
    found: list[int] = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            if int(Path(f"/proc/{int(name)}/stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found += [int(name), *children_of(int(name))]
    return found


def wait_for_free_cpus() -> None:
    """What a node knows of the others is up to a second old: wait until the leases of before are forgotten."""
    wait_for(
        lambda: clusterpool.available_resources()["CPU"] == clusterpool.cluster_resources()["CPU"],
        what="all CPUs are free",
    )


def run_script(folder: Path, text: str, *, timeout_s: float = 50) -> subprocess.CompletedProcess[str]:
    """Run a program as a user would, in `folder`."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(text))
    command = [sys.executable, str(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=folder)


# --- tasks


def node_of_task(_: object = None) -> str:
    """Where it runs; long enough for its worker not to get them all."""
    time.sleep(0.05)
    return os.environ["CLUSTERPOOL_NODE_ID"]


def node_of_meeting(folder: str, nodes_count: int) -> str:
    """Where it runs, when so many nodes run tasks of the same folder: so has also one part whose workers start late."""
    os.makedirs(folder, exist_ok=True)
    Path(folder, os.environ["CLUSTERPOOL_NODE_ID"]).touch()
    wait_for(lambda: len(os.listdir(folder)) >= nodes_count, f"{nodes_count} nodes take part")
    return os.environ["CLUSTERPOOL_NODE_ID"]


def numbered_node_of_task(number: int) -> tuple[int, str]:
    """The same, with what it got."""
    return number, node_of_task()


def large_array(value: float) -> Any:
    import numpy

    return numpy.full(LARGE_BYTES // 8, value)


class Counting:
    def __init__(self) -> None:
        self.count = 0

    def add(self, _: object = None) -> tuple[int, str]:
        self.count += 1
        return self.count, clusterpool.node_id()
