"""Spilled objects: back as they were, or an error."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from clusterpool.errors import ObjectLost, StoreFull
from clusterpool.object_store import spill as spill_module
from clusterpool.object_store.spill import PIECE_BYTES, SpillFolder

NAME = "w0123456789ab.7"


@pytest.fixture
def folder(tmp_path: Path) -> SpillFolder:
    return SpillFolder(tmp_path / "session" / "spill", bytes_max=100 << 20)


def read_back(folder: SpillFolder, size: int) -> bytes:
    target = bytearray(size)
    folder.read(NAME, memoryview(target))
    return bytes(target)


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 3])
def test_what_was_written_comes_back(folder: SpillFolder, size: int) -> None:
    content = os.urandom(size)
    folder.write(NAME, memoryview(content))
    assert read_back(folder, size) == content
    assert folder.used_bytes == size + 8
    folder.delete(NAME)
    folder.delete(NAME)
    assert folder.used_bytes == 0
    assert os.listdir(folder.path) == []


def test_a_rebuilt_object_is_spilled_as_the_first_one_was(folder: SpillFolder) -> None:
    name = "d0123456789ab.1024~2"
    folder.write(name, memoryview(b"again"))
    assert (folder.path / name).read_bytes()[:5] == b"again"


def test_files_are_for_their_owner_alone(folder: SpillFolder) -> None:
    folder.write(NAME, memoryview(b"secret"))
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder.path / NAME).stat().st_mode) == 0o600


def test_the_limit_on_spilled_bytes_is_kept(tmp_path: Path) -> None:
    folder = SpillFolder(tmp_path, bytes_max=2_000)
    folder.write("a.1", memoryview(bytes(1_500)))
    with pytest.raises(StoreFull, match="limit on spilled objects"):
        folder.write("a.2", memoryview(bytes(500)))
    folder.delete("a.1")
    folder.write("a.2", memoryview(bytes(500)))


def test_some_of_the_disk_stays_free(tmp_path: Path) -> None:
    folder = SpillFolder(tmp_path, free_bytes_min=1 << 60)
    with pytest.raises(StoreFull, match="stay free"):
        folder.write(NAME, memoryview(b"x"))


def test_a_disk_that_fills_up_leaves_nothing_behind(folder: SpillFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = []

    def write(fd: int, piece: memoryview) -> int:
        writes.append(len(piece))
        if len(writes) == 2:
            raise OSError(errno.ENOSPC, "no space left on device")
        return len(piece)

    monkeypatch.setattr(spill_module.os, "write", write)
    with pytest.raises(StoreFull, match="became full"):
        folder.write(NAME, memoryview(bytes(PIECE_BYTES + 1)))
    assert os.listdir(folder.path) == []
    assert folder.used_bytes == 0


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreFull, match="could not be written"):
        SpillFolder(tmp_path / "file" / "spill").write(NAME, memoryview(b"x"))


@pytest.mark.parametrize("damage", ["gone", "short", "changed"])
def test_damage_is_noticed(folder: SpillFolder, damage: str) -> None:
    folder.write(NAME, memoryview(b"0123456789"))
    path = folder.path / NAME
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "short" else b"1" + content[1:])
    with pytest.raises(ObjectLost, match=NAME):
        read_back(folder, 10)


def test_a_reader_without_file_descriptors_takes_nothing_for_lost(
    folder: SpillFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write(NAME, memoryview(b"0123456789"))
    real, failures = os.open, [errno.EMFILE, errno.ENFILE]

    def open_later(*arguments: Any) -> int:
        if failures:
            raise OSError(failures.pop(), "too many open files")
        return real(*arguments)

    monkeypatch.setattr(spill_module.os, "open", open_later)
    assert read_back(folder, 10) == b"0123456789"
    failures += [errno.EMFILE] * 1000
    monkeypatch.setattr(spill_module, "PATIENCE_S", 0.0)
    with pytest.raises(OSError, match="too many open files"):
        read_back(folder, 10)


def test_a_file_that_cannot_be_removed_counts_no_more(folder: SpillFolder) -> None:
    folder.write(NAME, memoryview(b"x"))
    (folder.path / NAME).unlink()
    (folder.path / NAME).mkdir()
    with pytest.raises(OSError, match=NAME):
        folder.delete(NAME)
    assert folder.used_bytes == 0


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 300, "a.unfinished"])
def test_no_name_leads_out_of_the_folder(folder: SpillFolder, name: str) -> None:
    for access in (
        lambda: folder.write(name, memoryview(b"")),
        lambda: folder.read(name, memoryview(b"")),
        lambda: folder.delete(name),
    ):
        with pytest.raises(ValueError, match="not the name of an object"):
            access()


def test_clearing_removes_the_folder(folder: SpillFolder) -> None:
    folder.write(NAME, memoryview(b"x"))
    folder.clear()
    assert not folder.path.exists()
    folder.clear()
