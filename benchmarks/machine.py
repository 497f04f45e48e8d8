"""What the kernel says about processes and about the machine."""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
PACKAGES = ("clusterpool", "loky", "ray", "dask", "distributed", "joblib", "numpy")


def tree_cpu_s() -> float:
    """User and system seconds so far of this process and all its descendants, also those that have ended."""
    total_s = 0.0
    this = psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total_s += times.user + times.system + times.children_user + times.children_system
    return total_s


def proportional_set_size_mb(pid: int) -> float:
    """Memory of a process, shared pages divided by the number of processes that share them, in 10^6 bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(f"the kernel gave no Pss for process {pid}")


def own_memory_bytes() -> int:
    """What this process has for itself, without what is garbage."""
    gc.collect()
    used: int = psutil.Process().memory_full_info().uss
    return used


def describe_machine() -> dict[str, str]:
    """What a reader needs in order to compare two runs; nothing that names the machine."""
    description = {
        "cpu": processor_name(),
        "cpus": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": commit(),
    }
    for package in PACKAGES:
        try:
            description[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return description


def processor_name() -> str:
    """The model as the kernel names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit(root: Path = ROOT) -> str:
    """The commit that is measured; if the checkout differs from it, with a plus sign and a digest of how.

    Results of benchmarks do not count: they lie in the checkout, but are not what is measured.
    """
    named = git(root, "describe", "--always").decode().strip()
    changes = git(root, "diff", "HEAD", "--binary", "--", ".", ":(exclude)benchmarks/results")
    if changes:
        named += f"+{hashlib.sha256(changes).hexdigest()[:8]}"
    return named or "unknown"


def git(root: Path, *arguments: str) -> bytes:
    """What it prints; nothing where it fails, or is not there."""
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=False).stdout
    except OSError:
        return b""
