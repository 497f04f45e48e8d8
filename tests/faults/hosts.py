"""A cluster of four nodes to kill things in: looked at from its head, which is spared, and mended after each death.

head                 nobody works there; the tests ask it what the others do
home                 where the drivers are
left, right          `spot: 2` each: where tasks and actors run that ask for it, in a store of 96 MiB
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clusterpool.cli.node_link import NodeLink
from clusterpool.config import NodePaths, SessionPaths
from clusterpool.core.messages import NodePart
from clusterpool.errors import ClusterpoolError
from tests.cluster.clusters import DEAD_WITHIN_S, children_of, clusterpool_command, end_cluster, is_alive, wait_for

# This machine may have other things to do as well.
SLACK_S = 5.0
ROLES = ("head", "home", "left", "right")
OPTIONS = {
    "head": {"num_cpus": 0, "object_store_memory": "64MiB"},
    "home": {"num_cpus": 1, "object_store_memory": "512MiB", "resources": {"home": 1}},
    "left": {"num_cpus": 2, "object_store_memory": "96MiB", "resources": {"spot": 2, "left": 1}},
    "right": {"num_cpus": 2, "object_store_memory": "96MiB", "resources": {"spot": 2, "right": 1}},
}


@dataclass
class Hosts:
    """The nodes of one cluster by their roles."""

    run_of_tests: Any
    session: SessionPaths
    join_file: str
    parts: dict[str, NodePart] = field(default_factory=dict)

    def paths(self, role: str) -> NodePaths:
        return self.session.node(self.parts[role].node_id)

    def node_id(self, role: str) -> str:
        return self.parts[role].node_id

    def role_of(self, node_id: str) -> str:
        return next(role for role, part in self.parts.items() if part.node_id == node_id)

    def node_pid(self, role: str) -> int:
        return self.parts[role].pid

    def zygote_pid(self, role: str) -> int:
        return next(pid for pid in children_of(self.node_pid(role)) if parent_of(pid) == self.node_pid(role))

    def worker_pids(self, role: str) -> list[int]:
        zygote = self.zygote_pid(role)
        return [pid for pid in children_of(zygote) if parent_of(pid) == zygote]

    def store_pid(self) -> int:
        """The control store's server as it was started last; 0 while the record is being written."""
        try:
            return int(json.loads((self.session.folder / "store" / "control-store.json").read_text())["pid"])
        except (OSError, ValueError):
            return 0

    def address(self, role: str) -> str:
        """As CLUSTERPOOL_ADDRESS names it."""
        return str(self.paths(role).node_socket)

    def ask(self, role: str) -> NodePart | None:
        """What a node says of itself; None if it does not answer, or is no member."""
        try:
            with NodeLink(self.address(role), timeout_s=2.0) as link:
                part = link.describe()[0]
        except ClusterpoolError:
            return None
        return part if part.details["is_member"] else None

    def detail(self, role: str, name: str) -> float:
        part = self.ask(role)
        return part.details[name] if part is not None else 0.0

    def spilled_bytes(self, role: str) -> int:
        part = self.ask(role)
        return part.spilled_bytes if part is not None else 0

    def known(self, role: str = "head") -> list[NodePart]:
        """The cluster as one of its nodes sees it."""
        with NodeLink(self.address(role)) as link:
            return link.describe()

    def wait_until_home_knows_all(self) -> None:
        """What is placed before that is placed on those that it knows."""
        everybody = {part.node_id for part in self.parts.values()}
        wait_for(
            lambda: {part.node_id for part in self.known("home") if part.alive} == everybody,
            what="the drivers' node knows all others",
        )

    # --- deaths

    def mend(self) -> None:
        """Wait until the dead are known, and start others in their places; nothing of the dead may be left."""
        wait_for(lambda: is_alive(self.store_pid()), within_s=20, what="the control store is started again")
        # It is a child of the node that started it again, and outlives that.
        self.run_of_tests.held.append(type(self.run_of_tests.look())(frozenset([self.store_pid()])))
        dead = {self.node_id(role): role for role in ROLES if not is_alive(self.node_pid(role))}
        for node_id, role in dead.items():
            folder = self.paths(role).folder
            self._start(role)
            assert not folder.exists(), "the next start has not swept the dead node's folder"
            left = [name for name in os.listdir("/dev/shm") if node_id in name]
            assert not left, f"the next start has not swept {left}"
        wait_for(
            lambda: dead.keys().isdisjoint(part.node_id for part in self.known()),
            within_s=DEAD_WITHIN_S + SLACK_S,
            what=f"{list(dead.values())} are known to be dead",
        )
        self.wait_until_home_knows_all()

    def _start(self, role: str) -> None:
        held = self.run_of_tests.look()
        options = OPTIONS[role]
        arguments = [
            "start", "--address", self.join_file, "--json", "--num-cpus", str(options["num_cpus"]),
            "--object-store-memory", str(options["object_store_memory"]),
            "--resources", json.dumps(options["resources"]),
        ]  # fmt: skip
        done = clusterpool_command(*arguments)
        assert done.returncode == 0, done.stderr
        self.parts[role] = NodePart(**json.loads(done.stdout)["nodes"][0])
        new = self.run_of_tests.look()
        leftovers = type(new)(new.pids - held.pids, new.segments - held.segments, new.folders - held.folders)
        self.run_of_tests.held.append(leftovers)

    def assert_healthy(self) -> None:
        """Every node is a member, all resources are free, the stores are empty and no worker is left."""
        seen: dict[str, Any] = {}

        def is_idle() -> bool:
            for role in ROLES:
                part = self.ask(role)
                seen[role] = part
                if part is None or part.workers or part.store_used_bytes or part.spilled_bytes or part.queue_length:
                    return False
                if part.available != part.total or part.details["leases"] or part.details["objects"]:
                    return False
            return {part.node_id for part in self.known() if part.alive} == {p.node_id for p in self.parts.values()}

        try:
            wait_for(is_idle, within_s=DEAD_WITHIN_S + SLACK_S, what="all is free again")
        except AssertionError as exc:
            raise AssertionError(f"{exc}: {seen}") from None


@contextlib.contextmanager
def started_hosts(folder: Path, run_of_tests: Any) -> Iterator[Hosts]:
    """The cluster; ended, and searched for remains, at last."""
    nodes = [{"name": role, **options} for role, options in OPTIONS.items() if role != "head"]
    file = folder / "cluster.yaml"
    file.write_text(json.dumps({"head": OPTIONS["head"], "nodes": nodes}))  # JSON is YAML
    done = clusterpool_command("up", str(file), "--json")
    assert done.returncode == 0, done.stderr
    started = json.loads(done.stdout)
    hosts = Hosts(run_of_tests, SessionPaths(Path(started["session_folder"])), started["join_file"])
    for part in (NodePart(**fields) for fields in started["nodes"]):
        hosts.parts["head" if part.is_head else next(role for role in ROLES if role in part.total)] = part
    held_before = list(run_of_tests.held)
    run_of_tests.held.append(run_of_tests.look())
    try:
        hosts.wait_until_home_knows_all()
        yield hosts
    finally:
        end_cluster(run_of_tests, held_before)


class Program:
    """A program of a test as a process of its own, which is killed at the end if it has not ended."""

    def __init__(self, *arguments: str, address: str, folder: Path) -> None:
        environment = {**os.environ, "CLUSTERPOOL_ADDRESS": address}
        self.output = folder / "output"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *arguments], env=environment, cwd=folder, stdout=output, stderr=output
            )
        self.pid = self.process.pid

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def wait(self, timeout_s: float) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the program hangs; it had said: {self.said()}") from None


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    os.kill(pid, number)
