"""The contenders' clusters: four nodes on this machine, who can be killed in them, and how a node is replaced."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.parse
from pathlib import Path
from typing import IO, Any

from clusterpool.config import SessionPaths
from clusterpool.node.store_server import LOCK_NAME

psutil: Any = importlib.import_module("psutil")

ROOT = Path(__file__).parents[2]
NODES = 4
NODE_CPUS = 2
STORE_BYTES = 1_500_000_000
COMMAND_TIMEOUT_S = 180


class Cluster:
    """Base: a folder of its own, an environment that marks every process, and how to end them all."""

    name = ""
    is_shared = True  # a second program may use it
    ends_workers_of_dead_drivers = False  # so that nothing of a killed driver goes on

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = ""  # for drivers, from `start` on
        self.log: IO[str] = (folder / "cluster.log").open("w")
        self.environment = {
            **os.environ,
            "SOAK_MARK": folder.name,
            "CLUSTERPOOL_HOME": str(folder / "home"),
            "CLUSTERPOOL_TMPDIR": str(folder / "t"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEDUP_LOGS": "0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_TMPDIR": str(folder / "r"),
            "DO_NOT_TRACK": "1",
            "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1000",
            "PYTHONWARNINGS": "ignore",
        }
        self.environment.pop("CLUSTERPOOL_ADDRESS", None)
        for name in ("home", "t", "r"):
            (folder / name).mkdir(mode=0o700)

    def start(self) -> None:
        """Start the nodes."""

    def driver_environment(self) -> dict[str, str]:
        """For programs on the cluster."""
        return {**self.environment, "PYTHONPATH": f"{ROOT}:{self.environment.get('PYTHONPATH', '')}"}

    def workers(self) -> list[int]:
        """Processes that run users' code now, or will."""
        return []

    def nodes(self) -> list[int]:
        """Nodes that may be killed, but for the head's: never the one where the drivers are."""
        return []

    def heads(self) -> list[int]:
        """The head's node, where its cluster is promised to survive that."""
        return []

    def stores(self) -> list[int]:
        """Control stores that may be killed: only where somebody starts them again."""
        return []

    def kill_node(self, pid: int) -> None:
        """Kill all of a node at once."""
        for victim in [pid, *self.below(pid)]:
            kill(victim)

    def add_node(self) -> None:
        """Start a node in the place of one that was killed."""

    def stop(self) -> None:
        """End all in good order."""

    def call(self, *command: str) -> str:
        """Run a command to its end; its output."""
        done = subprocess.run(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=self.log, text=True,
            timeout=COMMAND_TIMEOUT_S, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode:
            said = Path(self.log.name).read_text()[-1500:]
            raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}: {done.stdout[-1500:]} {said}")
        return done.stdout

    def spawn(self, *command: str) -> int:
        """Start a process that goes on; its pid."""
        process = subprocess.Popen(
            command, env=self.environment, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        return process.pid

    def below(self, pid: int) -> list[int]:
        """All descendants."""
        try:
            return [child.pid for child in psutil.Process(pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def living(self) -> list[Any]:
        """All processes that carry the mark."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get("SOAK_MARK") == self.folder.name and process.status() != "zombie":
                    found.append(process)
        return found

    def named(self, *names: str) -> list[int]:
        """Processes of ours by the start of their name or command."""
        found = []
        for process in self.living():
            with contextlib.suppress(psutil.Error):
                first = (process.cmdline() or [""])[0].rsplit("/", 1)[-1]
                if process.name().startswith(names) or first.startswith(names):
                    found.append(process.pid)
        return found

    def clear(self) -> None:
        """Kill what `stop` left."""
        for process in self.living():
            kill(process.pid)


class ClusterpoolCluster(Cluster):
    """`clusterpool up` with a file, `clusterpool start` for a node that takes the place of a killed one."""

    name = "clusterpool"
    ends_workers_of_dead_drivers = True

    def command(self, *arguments: str) -> str:
        """The command line."""
        return self.call(sys.executable, "-m", "clusterpool.cli", *arguments)

    def start(self) -> None:
        node = f"{{num_cpus: {NODE_CPUS}, object_store_memory: {STORE_BYTES}}}"
        file = self.folder / "cluster.yaml"
        file.write_text(f"head: {node}\nnodes:\n" + f"  - {node}\n" * (NODES - 1))
        started = json.loads(self.command("up", str(file), "--json"))
        self.session = SessionPaths(Path(started["session_folder"]))
        self.store_port = urllib.parse.urlsplit(started["control_store"]).port
        self.head = next(int(node["pid"]) for node in started["nodes"] if node["is_head"])
        keepers = self.keepers()
        home = next(node for node in started["nodes"] if node["pid"] not in (self.head, *keepers))
        self.home = int(home["pid"])
        self.address = str(self.session.node(home["node_id"]).node_socket)

    def status(self) -> list[dict[str, Any]]:
        """What the cluster says of its nodes."""
        said = self.command("status", "--json", "--address", self.address)
        nodes: list[dict[str, Any]] = json.loads(said)["nodes"]
        return nodes

    def nodes(self) -> list[int]:
        spared = [self.home, *self.heads()]
        return [node["pid"] for node in self.status() if node["pid"] not in spared and node["alive"]]

    def heads(self) -> list[int]:
        if psutil.pid_exists(self.head):
            return [self.head]
        return [pid for pid in self.keepers() if pid != self.home]

    def keepers(self) -> list[int]:
        """The node that starts the control store again when that has died: it holds this lock, at first the head."""
        inode = (self.session.folder / LOCK_NAME).stat().st_ino
        fields = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        return [int(line[4]) for line in fields if line[1] == "FLOCK" and line[5].endswith(f":{inode}")]

    def workers(self) -> list[int]:
        found = []
        for process in self.living():
            with contextlib.suppress(psutil.Error):
                parent = process.parent()
                grandparent = parent.parent() if parent is not None else None
                # A node's child is its zygote, and that one's children are the workers.
                if grandparent is not None and "clusterpool.node" in " ".join(grandparent.cmdline()):
                    found.append(process.pid)
        return found

    def stores(self) -> list[int]:
        # By its port and not by the mark: such a server writes over its environment.
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_server = process.name().startswith(("valkey", "redis"))
                if is_server and f":{self.store_port}" in " ".join(process.cmdline()):
                    found.append(process.pid)
        return found

    def add_node(self) -> None:
        join = self.folder / "home" / "join.json"
        self.command(
            "start", "--address", str(join), "--num-cpus", str(NODE_CPUS), "--object-store-memory", str(STORE_BYTES)
        )

    def stop(self) -> None:
        self.command("down")


class RayCluster(Cluster):
    """`ray start`, several raylets on one machine. Its control store (GCS) is only started again with outside help."""

    name = "ray"

    def start(self) -> None:
        # Its sockets lie deep, and the path of a UNIX socket has 107 bytes at the most.
        self.environment["RAY_TMPDIR"] = f"/tmp/{self.folder.name}"
        self.port = free_port()
        self.ray("--head", f"--port={self.port}", "--include-dashboard=false", "--node-ip-address=127.0.0.1")
        for _ in range(NODES - 1):
            self.add_node()
        self.head_raylet = min(self.named("raylet"))

    def ray(self, *arguments: str) -> None:
        """`ray start`."""
        script = str(Path(sys.executable).with_name("ray"))
        command = [script] if Path(script).exists() else [sys.executable, "-m", "ray.scripts.scripts"]
        self.call(
            *command, "start", *arguments, f"--num-cpus={NODE_CPUS}", f"--object-store-memory={STORE_BYTES}",
            "--disable-usage-stats",
        )  # fmt: skip

    def nodes(self) -> list[int]:
        return [pid for pid in self.named("raylet") if pid != self.head_raylet]

    def workers(self) -> list[int]:
        return self.named("ray::")

    def add_node(self) -> None:
        self.ray(f"--address=127.0.0.1:{self.port}", "--node-ip-address=127.0.0.1")

    def stop(self) -> None:
        for pid in self.named("raylet", "gcs_server"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        shutil.rmtree(f"/tmp/{self.folder.name}", ignore_errors=True)


class DaskCluster(Cluster):
    """A scheduler and four workers with two processes each, under nannies. The scheduler cannot be replaced."""

    name = "dask"

    def start(self) -> None:
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self.spawn(sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", self.address, "--no-dashboard")
        for _ in range(NODES):
            self.add_node()

    def nodes(self) -> list[int]:
        return [process.pid for process in self.living() if self.is_worker_command(process)]

    @staticmethod
    def is_worker_command(process: Any) -> bool:
        """Whether this is a `dask worker` itself, not a process below it."""
        try:
            return "distributed.cli.dask_worker" in process.cmdline()
        except psutil.Error:
            return False

    def workers(self) -> list[int]:
        return [
            process.pid
            for process in self.living()
            if process.parent() is not None and self.is_worker_command(process.parent())
            if "resource_tracker" not in " ".join(process.cmdline())
        ]

    def add_node(self) -> None:
        folder = str(self.folder / "t")
        self.spawn(
            sys.executable, "-m", "distributed.cli.dask_worker", self.address, "--nworkers", str(NODE_CPUS),
            "--nthreads", "1", "--no-dashboard", "--memory-limit", "3GB", "--local-directory", folder,
            "--host", "127.0.0.1",
        )  # fmt: skip

    def stop(self) -> None:
        for pid in self.nodes():
            self.kill_node(pid)


class LokyCluster(Cluster):
    """No cluster: the workers are the driver's own."""

    name = "loky"
    is_shared = False

    def workers(self) -> list[int]:
        return [
            process.pid for process in self.living() if "loky.backend.popen_loky_posix" in " ".join(process.cmdline())
        ]


CLUSTERS: dict[str, type[Cluster]] = {
    kind.name: kind for kind in (ClusterpoolCluster, RayCluster, DaskCluster, LokyCluster)
}


def kill(pid: int) -> None:
    """kill -9, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
