from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from clusterpool.core.memory_monitor import INTERVAL_MAX_S
from clusterpool.core.node_events import MemoryRead, ReadMemory
from clusterpool.node.memory import MemoryReader, MemoryWatch, Use

MIB = 1 << 20


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def machine(root: Path, *, total_kib: int = 1000, available_kib: int = 600, cgroup: str = "") -> None:
    write(root / "proc/meminfo", f"MemTotal: {total_kib} kB\nMemFree: 1 kB\nMemAvailable: {available_kib} kB\n")
    write(root / "proc/self/cgroup", cgroup)


def test_what_is_not_available_is_in_use(tmp_path: Path) -> None:
    machine(tmp_path)
    assert MemoryReader(root=tmp_path).tightest() == Use(400 * 1024, 1000 * 1024, "the machine's memory")


def test_a_container_of_version_2_counts_without_its_file_cache(tmp_path: Path) -> None:
    machine(tmp_path, total_kib=1 << 20, available_kib=1 << 19, cgroup="0::/box\n")
    folder = tmp_path / "sys/fs/cgroup/box"
    write(folder / "memory.max", f"{100 * MIB}\n")
    write(folder / "memory.current", f"{90 * MIB}\n")
    write(folder / "memory.stat", f"anon {1 * MIB}\ninactive_file {10 * MIB}\nactive_file {5 * MIB}\n")
    write(tmp_path / "sys/fs/cgroup/memory.max", "max\n")
    assert MemoryReader(root=tmp_path).tightest() == Use(75 * MIB, 100 * MIB, "the container's memory")


def test_a_container_of_version_1_counts_without_its_file_cache(tmp_path: Path) -> None:
    machine(tmp_path, total_kib=1 << 20, available_kib=1 << 19, cgroup="4:memory:/box\n3:cpu:/other\n")
    folder = tmp_path / "sys/fs/cgroup/memory/box"
    write(folder / "memory.limit_in_bytes", f"{100 * MIB}\n")
    write(folder / "memory.usage_in_bytes", f"{90 * MIB}\n")
    write(folder / "memory.stat", f"inactive_file 1\ntotal_inactive_file {10 * MIB}\ntotal_active_file {MIB}\n")
    assert MemoryReader(root=tmp_path).tightest() == Use(79 * MIB, 100 * MIB, "the container's memory")


def test_the_tighter_of_machine_and_container_counts(tmp_path: Path) -> None:
    machine(tmp_path, total_kib=1000, available_kib=10, cgroup="0::/\n")
    folder = tmp_path / "sys/fs/cgroup"
    write(folder / "memory.max", f"{100 * MIB}\n")
    write(folder / "memory.current", f"{50 * MIB}\n")
    write(folder / "memory.stat", "")
    assert MemoryReader(root=tmp_path).tightest().where == "the machine's memory"


def test_no_bound_in_version_1_is_no_container(tmp_path: Path) -> None:
    machine(tmp_path, cgroup="4:memory:/\n")
    folder = tmp_path / "sys/fs/cgroup/memory"
    write(folder / "memory.limit_in_bytes", "9223372036854771712\n")
    write(folder / "memory.usage_in_bytes", f"{90 * MIB}\n")
    write(folder / "memory.stat", "")
    assert MemoryReader(root=tmp_path).tightest().where == "the machine's memory"


def test_a_process_has_what_is_neither_file_nor_shared() -> None:
    reader = MemoryReader()
    before = reader.process_bytes(os.getpid())
    block = bytearray(50 * MIB)
    assert 45 * MIB < reader.process_bytes(os.getpid()) - before < 60 * MIB
    del block
    assert reader.process_bytes(2**22 + 1) == 0  # there is no such process


def test_what_the_kernel_has_ended_is_counted(tmp_path: Path) -> None:
    machine(tmp_path)
    reader = MemoryReader(root=tmp_path)
    assert reader.kernel_kills() == 0
    write(tmp_path / "proc/vmstat", "nr_free_pages 5\noom_kill 3\n")
    assert reader.kernel_kills() == 3


def test_the_real_machine_can_be_read() -> None:
    use = MemoryReader().tightest()
    assert 0 < use.used_bytes < use.limit_bytes


def watch_of(root: Path, *, limit_bytes: int | None = None) -> tuple[MemoryWatch, list[Any]]:
    """A watch of a node with one worker (this process), and what it has told the machine."""
    told: list[Any] = []
    shell: Any = SimpleNamespace(
        config=SimpleNamespace(memory_limit_bytes=limit_bytes, memory_threshold=0.95),
        machine=SimpleNamespace(scheduler=SimpleNamespace(workers={"w1": None})),
        workers=SimpleNamespace(pids=lambda: {"w1": os.getpid()}, zygote_pid=0),
        arena=SimpleNamespace(path=Path("/dev/shm/arena"), reserved_bytes=1000),
        handle=told.append,
    )
    return MemoryWatch(shell, reader=MemoryReader(root=root)), told


def test_readings_come_when_they_are_due(tmp_path: Path) -> None:
    machine(tmp_path)
    watch, told = watch_of(tmp_path)
    watch.look(100.0)
    watch.look(100.1)
    assert told == [MemoryRead(400 * 1024, 1000 * 1024, "the machine's memory", 1000, None)]
    watch.take(ReadMemory(0.0, True))
    watch.look(watch.due_s)
    assert list(told[-1].bytes_by_worker) == ["w1"]
    watch._shell.machine.scheduler.workers.clear()
    watch.look(watch.due_s + INTERVAL_MAX_S)
    assert len(told) == 2  # with nobody to end, nothing is read


def test_a_limit_of_the_node_counts_its_processes_and_its_store() -> None:
    watch, told = watch_of(Path("/"), limit_bytes=1000)
    watch.look(100.0)
    (reading,) = told
    assert (reading.limit_bytes, reading.where) == (1000, "this node's memory limit")
    assert reading.used_bytes > reading.store_bytes + reading.bytes_by_worker["w1"]


def test_where_memory_cannot_be_read_nobody_is_ended_and_that_is_said_once(tmp_path: Path, caplog: Any) -> None:
    write(tmp_path / "proc/meminfo", "MemTotal: 1000 kB\n")
    watch, told = watch_of(tmp_path)
    watch.look(100.0)
    watch.look(200.0)
    assert told == []
    assert caplog.text.count("memory cannot be watched here") == 1


def test_programs_that_a_worker_has_started_are_found_by_their_group(tmp_path: Path) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    for pid, group, pages in ((10, 10, 5), (11, 10, 7), (12, 12, 9), (13, 10, 1)):
        write(tmp_path / f"proc/{pid}/stat", f"{pid} (a (b) c) S 1 {group} 1 0 -1")
        write(tmp_path / f"proc/{pid}/statm", f"100 {pages + 2} 2 0 0 0 0")
    assert MemoryReader(root=tmp_path).group_bytes([10, 99]) == {10: 8 * page, 99: 0}
