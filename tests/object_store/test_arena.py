"""The arena: shared bytes, private reads, safe growth."""

from __future__ import annotations

import errno
import gc
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clusterpool.errors import NotConnected, StoreFull
from clusterpool.object_store import arena as arena_module
from clusterpool.object_store.arena import RESERVE_STEP_BYTES, SHM_BYTES_MIN, Arena

MB = 1 << 20
CAPACITY = 64 * MB


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    made = Arena.create("clusterpool-arena", CAPACITY, shared_memory=tmp_path)
    yield made
    made.close()
    made.unlink()


def nothing() -> None:
    """An `on_release` that does not matter."""


def read(arena: Arena, offset: int, size: int) -> np.ndarray:
    return np.frombuffer(memoryview(arena.read_anchor(offset, size, nothing)).cast("B"), np.uint8)


def in_child(function: object) -> int:
    """The exit code of a fork that runs `function` and nothing else: no exit handlers, no finalizers."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = function()  # type: ignore[operator]
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_the_file_is_sparse_and_for_its_owner_alone() -> None:
    name = f"clusterpool-test-{os.getpid()}"
    arena = Arena.create(name, 512 * MB)
    try:
        status = arena.path.stat()
        assert arena.path == Path("/dev/shm") / name
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert (status.st_size, status.st_blocks) == (512 * MB, 0)
        arena.read_anchor(0, 100 * MB, nothing)  # mapping for reading takes no memory
        assert arena.path.stat().st_blocks == 0
    finally:
        arena.close()
        arena.unlink()
    assert not arena.path.exists()


def test_attaching_opens_nothing_before_the_first_use(arena: Arena) -> None:
    before = len(os.listdir("/proc/self/fd"))
    other = Arena.attach(str(arena.path), CAPACITY)
    assert len(os.listdir("/proc/self/fd")) == before
    other.close()


@pytest.mark.parametrize("size", [0, 1, 300_000, MB, 3 * MB + 5, 20 * MB + 7])
@pytest.mark.parametrize("offset", [0, 4096, 7])
def test_every_size_is_copied_exactly(arena: Arena, size: int, offset: int) -> None:
    source = np.random.default_rng(size).integers(1, 256, size, np.uint8)
    arena.write(offset, source)
    assert np.array_equal(read(arena, offset, size), source)
    around = arena.write_view(0, CAPACITY)
    assert bytes(around[:offset]) == bytes(offset)
    assert bytes(around[offset + size : offset + size + MB]) == bytes(MB)


@pytest.mark.parametrize(
    "source",
    [
        b"x" * 400_000,  # read-only
        bytearray(b"y" * 400_000),
        memoryview(b"z" * 400_000)[5:],
        np.arange(90_000, dtype=np.float64).reshape(300, 300).T,  # Fortran order
    ],
)
def test_any_contiguous_buffer_can_be_written(arena: Arena, source: object) -> None:
    arena.write(4096, source)
    raw = source.tobytes("A") if isinstance(source, (np.ndarray, memoryview)) else bytes(source)  # type: ignore[call-overload]
    assert bytes(arena.write_view(4096, len(raw))) == raw


def test_a_buffer_in_pieces_is_refused(arena: Arena) -> None:
    with pytest.raises(BufferError):
        arena.write(0, np.zeros(100)[::2])


def test_what_one_process_writes_another_reads(arena: Arena) -> None:
    other = Arena.attach(arena.path, CAPACITY)

    def write() -> int:
        other.write(8192, b"\x07" * (2 * MB))
        return 0

    assert in_child(write) == 0
    assert read(arena, 8192, 2 * MB).tolist() == [7] * (2 * MB)


def test_a_readers_changes_are_its_own(arena: Arena) -> None:
    arena.write(4096, b"\x01" * 8192)
    first, second = read(arena, 4096, 8192), read(arena, 4096, 8192)
    first[:] = 9
    assert first.flags.writeable
    assert second.tolist() == [1] * 8192  # not even another read in the same process
    assert bytes(arena.write_view(4096, 8192)) == b"\x01" * 8192


def test_a_range_that_is_used_again_shows_its_new_bytes(arena: Arena) -> None:
    arena.write(4096, b"\x01" * 4096)
    old = read(arena, 4096, 4096)
    old[:] = 9
    del old
    arena.write(4096, b"\x02" * 4096)
    assert read(arena, 4096, 4096).tolist() == [2] * 4096


def test_the_pin_is_held_until_the_last_view_goes(arena: Arena) -> None:
    released: list[int] = []
    anchor = arena.read_anchor(4096, 80_000, lambda: released.append(1))
    array = np.frombuffer(memoryview(anchor).cast("B")[:8000], np.float64)
    del anchor
    part = array[3:7].reshape(2, 2)
    del array
    gc.collect()
    assert released == []
    assert part.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    del part
    assert released == [1]


def test_a_released_read_is_unmapped(arena: Arena) -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(str(arena.path))

    before = mappings()
    anchors = [arena.read_anchor(4096 * index, 100, nothing) for index in range(0, 20, 2)]
    assert mappings() == before + 10
    anchors.clear()
    assert mappings() == before


def test_a_large_read_leaves_its_mapping_to_the_next_reader_of_its_pages(arena: Arena) -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count(str(arena.path))

    arena.write(MB, np.full(4 * MB, 1, np.uint8))
    before = mappings()
    assert int(read(arena, MB, 4 * MB).sum()) == 4 * MB
    assert mappings() == before + 1
    arena.write(MB, np.full(4 * MB, 2, np.uint8))  # its place is another object's by now
    assert int(read(arena, MB, 4 * MB).sum()) == 8 * MB
    assert mappings() == before + 1
    arena.forget_spares()
    assert mappings() == before


def test_what_a_reader_wrote_is_seen_by_no_later_reader(arena: Arena) -> None:
    arena.write(MB, np.full(4 * MB, 1, np.uint8))
    for index in (0, 4 * MB - 1, 2 * MB + 17):
        array = read(arena, MB, 4 * MB)
        assert array.min() == array.max() == 1
        array[index] = 7
        del array
        gc.collect()
    assert read(arena, MB, 4 * MB).max() == 1


def test_reads_at_the_same_time_have_mappings_of_their_own(arena: Arena) -> None:
    arena.write(MB, np.full(4 * MB, 1, np.uint8))
    first, second = read(arena, MB, 4 * MB), read(arena, MB, 4 * MB)
    first[5] = 7
    assert second[5] == 1
    del first, second
    gc.collect()
    assert read(arena, MB, 4 * MB)[5] == 1


def test_a_read_from_a_mapping_left_behind_can_be_written_in_a_forked_child(arena: Arena) -> None:
    arena.write(MB, np.full(4 * MB, 1, np.uint8))
    assert read(arena, MB, 4 * MB)[5] == 1

    def write() -> int:
        array = read(arena, MB, 4 * MB)
        array[5] = 7
        del array
        return int(read(arena, MB, 4 * MB)[5])

    assert in_child(write) == 1
    assert read(arena, MB, 4 * MB)[5] == 1


def test_a_forked_child_does_not_take_back_its_parents_pin(arena: Arena) -> None:
    released: list[int] = []
    anchors = [arena.read_anchor(0, 100, lambda: released.append(1))]

    def drop() -> int:
        anchors.clear()
        return len(released)

    assert in_child(drop) == 0
    anchors.clear()
    assert released == [1]


def test_a_process_out_of_mappings_gets_a_copy(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_map_private", lambda *_: None)
    released: list[int] = []
    arena.write(4096, b"abc")
    anchor = arena.read_anchor(4096, 3, lambda: released.append(1))
    assert released == [1]
    assert bytes(memoryview(anchor).cast("B")) == b"abc"


def test_anchors_and_views_outlive_close(arena: Arena) -> None:
    arena.write(4096, b"abc")
    anchor, view = arena.read_anchor(4096, 3, nothing), arena.write_view(4096, 3)
    arena.close()
    assert bytes(memoryview(anchor).cast("B")) == bytes(view) == b"abc"


@pytest.mark.parametrize(("offset", "size"), [(-1, 5), (0, -1), (CAPACITY - 4, 5), (CAPACITY + 1, 0)])
def test_ranges_outside_of_the_arena_are_refused(arena: Arena, offset: int, size: int) -> None:
    for access in (
        lambda: arena.write_view(offset, size),
        lambda: arena.reserve(offset, size),
        lambda: arena.read_anchor(offset, size, nothing),
    ):
        with pytest.raises(ValueError, match="outside of the arena"):
            access()


def test_an_arena_whose_node_ended_says_so(arena: Arena) -> None:
    other = Arena.attach(arena.path, CAPACITY)
    arena.unlink()
    with pytest.raises(NotConnected, match="node ended"):
        other.read_copy(0, 1)


def test_reserving_goes_ahead_in_steps_and_only_once(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, offset, size: calls.append((offset, size)))
    arena.reserve(0, 10)
    arena.reserve(4096, 100)
    assert calls == [(0, RESERVE_STEP_BYTES)]
    arena.reserve(CAPACITY - 10, 10)
    assert calls[1:] == [(RESERVE_STEP_BYTES, CAPACITY - RESERVE_STEP_BYTES)]


def test_reserved_pages_exist(arena: Arena) -> None:
    arena.reserve(0, 10 * MB)
    assert arena.path.stat().st_blocks * 512 >= 10 * MB


def test_a_full_file_system_is_an_error_and_its_last_pages_are_used(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_bytes = 6 * MB

    def fallocate(fd: int, offset: int, size: int) -> None:
        if offset + size > disk_bytes:
            raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    arena.reserve(0, 5 * MB)  # the step to 8 MB does not fit, the object does
    assert arena.reserved_bytes == 5 * MB
    with pytest.raises(OSError, match="no space left"):
        arena.reserve(5 * MB, 2 * MB)
    assert arena.reserved_bytes == 5 * MB


@pytest.mark.parametrize(
    ("shm_mb", "disk_mb", "wish_mb", "place", "got_mb", "warnings"),
    [
        (10_000, 0, 1_000, "shm", 1_000, 0),
        (1_000, 50_000, 2_000, "shm", 900, 1),  # a smaller store in memory
        (64, 50_000, 2_000, "disk", 2_000, 1),  # a container's
        (64, 1_000, 2_000, "disk", 500, 1),  # half of the disk at the most
        (64, 60, 2_000, "shm", 57, 0),  # better than the disk
        (64, 1_000, 50, "shm", 50, 0),  # a small wish that fits
    ],
)
def test_where_the_arena_goes(
    shm_mb: int,
    disk_mb: int,
    wish_mb: int,
    place: str,
    got_mb: int,
    warnings: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folders = {name: tmp_path / name for name in ("shm", "disk")}
    for folder in folders.values():
        folder.mkdir()
    free = {folders["shm"]: shm_mb * MB, folders["disk"]: disk_mb * MB}
    monkeypatch.setattr(arena_module, "_free_bytes", lambda folder: free[folder])
    with caplog.at_level(logging.WARNING):
        arena = Arena.create("a", wish_mb * MB, shared_memory=folders["shm"], fallback_folder=folders["disk"])
    assert (arena.path, arena.capacity_bytes) == (folders[place] / "a", got_mb * MB)
    assert len(caplog.records) == warnings
    arena.close()


def test_no_room_anywhere_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_free_bytes", lambda folder: 0)
    with pytest.raises(StoreFull, match="make room"):
        Arena.create("a", SHM_BYTES_MIN, shared_memory=tmp_path, fallback_folder=tmp_path)


def test_a_second_arena_of_the_same_name_is_refused(arena: Arena) -> None:
    with pytest.raises(FileExistsError):
        Arena.create(arena.path.name, CAPACITY, shared_memory=arena.path.parent)
