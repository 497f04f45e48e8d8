"""Readings of memory for the node's machine: of the machine, of the container, and of the node's own limit."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from clusterpool.config import SHARED_MEMORY_FOLDER, cgroup_folders
from clusterpool.core import node_events as e
from clusterpool.core.memory_monitor import INTERVAL_MAX_S

if TYPE_CHECKING:
    from clusterpool.node.shell import NodeShell

logger = logging.getLogger(__name__)

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Use(NamedTuple):
    """So many bytes of so many are in use."""

    used_bytes: int
    limit_bytes: int
    where: str

    @property
    def part(self) -> float:
        """1 when all are."""
        return self.used_bytes / max(self.limit_bytes, 1)


class MemoryReader:
    """Reads what the kernel says. `root` is for tests."""

    def __init__(self, *, root: Path = Path("/")) -> None:
        self._root = root
        # Only those that set a limit: a machine may have a hundred nested ones.
        self._cgroups = [folder for folder in cgroup_folders(root, "memory") if _cgroup_limit(folder) is not None]

    def tightest(self) -> Use:
        """Of the machine and of each container around us, the one with the largest part in use."""
        return max([self.machine(), *self._cgroup_uses()], key=lambda use: use.part)

    def machine(self) -> Use:
        """What is not available is in use, shared memory too; caches of files are available."""
        sizes: dict[str, int] = {}
        with (self._root / "proc/meminfo").open() as file:
            for line in file:
                name, _, rest = line.partition(":")
                if name in ("MemTotal", "MemAvailable"):
                    sizes[name] = int(rest.split()[0]) * 1024
                    if len(sizes) == 2:
                        break
        return Use(sizes["MemTotal"] - sizes["MemAvailable"], sizes["MemTotal"], "the machine's memory")

    def _cgroup_uses(self) -> list[Use]:
        uses = []
        for folder in self._cgroups:
            limit_bytes = _cgroup_limit(folder)
            used_bytes = _cgroup_used(folder)
            if limit_bytes is not None and used_bytes is not None:
                uses.append(Use(used_bytes, limit_bytes, "the container's memory"))
        return uses

    def kernel_kills(self) -> int:
        """How many processes the kernel has ended for want of memory, on this machine and in its containers."""
        try:
            with (self._root / "proc/vmstat").open() as file:
                return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
        except OSError:
            return 0

    def process_bytes(self, pid: int) -> int:
        """What a process has for itself: without files and shared memory, hence without the object store; 0 if gone.

        Pages that it still shares with the zygote count, some 10 MB: to leave them out, the kernel would have to look
        at every page of the process (`smaps_rollup`, 0.1 s for 10 GB).
        """
        try:
            words = (self._root / f"proc/{pid}/statm").read_text().split()
        except OSError:
            return 0
        return (int(words[1]) - int(words[2])) * _PAGE_BYTES

    def group_bytes(self, pids: Iterable[int]) -> dict[int, int]:
        """What the other members of process groups have for themselves, by the group's leader.

        Programs that a task has started are such members. A look at all processes of the machine: some milliseconds.
        """
        sizes = dict.fromkeys(pids, 0)
        for name in os.listdir(self._root / "proc"):  # noqa: PTH208 (names, not a path object for each process)
            if not name.isdigit() or int(name) in sizes:
                continue
            try:
                line = (self._root / "proc" / name / "stat").read_bytes()
            except OSError:
                continue  # it has just ended
            group = int(line[line.rindex(b")") + 2 :].split()[2])
            if group in sizes:
                sizes[group] += self.process_bytes(int(name))
        return sizes


class MemoryWatch:
    """The node's loop calls `look`; readings go to the machine when they are due."""

    def __init__(self, shell: NodeShell, *, reader: MemoryReader | None = None) -> None:
        self._shell = shell
        self._reader = reader or MemoryReader()
        self._limit_bytes = shell.config.memory_limit_bytes
        self._is_off = shell.config.memory_threshold >= 1
        self._with_workers = False
        self._kernel_kills = self._reader.kernel_kills()
        self._groups_read_s = -INTERVAL_MAX_S
        self._started_bytes: dict[int, int] = {}  # by worker's pid, what the programs that it has started have
        self.due_s = 0.0

    def look(self, now_s: float) -> None:
        """Read, if it is time to."""
        if now_s < self.due_s:
            return
        self.due_s = now_s + INTERVAL_MAX_S
        if self._is_off or not self._shell.machine.scheduler.workers:
            return  # nobody to end: an idle node costs nothing
        try:
            reading = self._read()
        except (OSError, ValueError, KeyError) as exc:
            logger.warning("memory cannot be watched here (%s: %s): no worker is ended for it", type(exc).__name__, exc)
            self._is_off = True
            return
        self._shell.handle(reading)

    def take(self, command: e.ReadMemory | e.WarnOfMemory) -> None:
        """What the machine says to a reading."""
        if isinstance(command, e.WarnOfMemory):
            logger.warning("node %s: %s", self._shell.node_id, command.text)
        else:
            self.due_s = monotonic() + command.after_s
            self._with_workers = command.with_workers

    def kernel_has_killed(self) -> bool:
        """Whether the kernel has ended a process for want of memory since this was last asked."""
        before, self._kernel_kills = self._kernel_kills, self._reader.kernel_kills()
        return self._kernel_kills > before

    def free_text(self) -> str:
        """How much the host, or the container, has left; for the text of a worker's death."""
        try:
            use = self._reader.tightest()
        except (OSError, ValueError, KeyError):
            return ""
        free_bytes = use.limit_bytes - use.used_bytes
        return f"{free_bytes / 1e9:.1f} of {use.limit_bytes / 1e9:.1f} GB of {use.where} were free"

    def _read(self) -> e.MemoryRead:
        use = self._reader.tightest()
        store_bytes = 0
        arena = self._shell.arena
        if SHARED_MEMORY_FOLDER in Path(arena.path).parents:  # else it is a file, which the kernel writes to disk
            store_bytes = arena.reserved_bytes
        sizes: dict[str, int] | None = None
        if self._with_workers or self._limit_bytes is not None:
            sizes = self._worker_sizes()
        if self._limit_bytes is not None and sizes is not None:
            others = [os.getpid(), self._shell.workers.zygote_pid]
            used_bytes = sum(sizes.values()) + sum(map(self._reader.process_bytes, others)) + store_bytes
            use = max(use, Use(used_bytes, self._limit_bytes, "this node's memory limit"), key=lambda use: use.part)
        return e.MemoryRead(use.used_bytes, use.limit_bytes, use.where, store_bytes, sizes)

    def _worker_sizes(self) -> dict[str, int]:
        pids = self._shell.workers.pids()
        now_s = monotonic()
        # Where only the machine is watched, it is read at the threshold only.
        if self._limit_bytes is None or now_s - self._groups_read_s >= INTERVAL_MAX_S:
            self._groups_read_s = now_s
            self._started_bytes = self._reader.group_bytes(pids.values())
        return {name: self._reader.process_bytes(pid) + self._started_bytes.get(pid, 0) for name, pid in pids.items()}


def _cgroup_limit(folder: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            word = (folder / name).read_text().strip()
        except OSError:
            continue
        # Version 1 writes a number beyond any memory for "no limit".
        return int(word) if word.isdigit() and int(word) < 1 << 60 else None
    return None


def _cgroup_used(folder: Path) -> int | None:
    """Without the cache of files, which the kernel gives up before it ends anybody."""
    for usage, fields in (
        ("memory.current", ("inactive_file", "active_file")),
        ("memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    ):
        try:
            used_bytes = int((folder / usage).read_text())
            lines = (folder / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):
            continue
        cached = sum(int(size) for name, _, size in (line.partition(" ") for line in lines) if name in fields)
        return max(0, used_bytes - cached)
    return None
