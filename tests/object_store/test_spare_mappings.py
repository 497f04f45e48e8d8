"""Which mappings are kept for the next read, and which are not."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import pytest

from clusterpool.object_store import spare_mappings
from clusterpool.object_store.spare_mappings import SPARE_BYTES_MAX, SPARE_BYTES_MIN, SPARES_MAX, SpareMappings

PAGES = 8


@pytest.fixture(autouse=True)
def written(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Addresses of mappings that were written to; the tests' mappings are numbers only."""
    addresses: set[int] = set()
    monkeypatch.setattr(spare_mappings, "is_untouched", lambda address, _: address not in addresses)
    return addresses


def spares() -> tuple[SpareMappings, list[tuple[int, int]]]:
    unmapped: list[tuple[int, int]] = []
    return SpareMappings(lambda address, length: unmapped.append((address, length))), unmapped


def test_a_spare_is_taken_once_and_for_just_its_pages() -> None:
    kept, unmapped = spares()
    kept.give(0, SPARE_BYTES_MIN, 111)
    assert kept.take(0, SPARE_BYTES_MIN + 1) is None
    assert kept.take(4096, SPARE_BYTES_MIN) is None
    assert kept.take(0, SPARE_BYTES_MIN) == 111
    assert kept.take(0, SPARE_BYTES_MIN) is None
    assert unmapped == []


def test_what_was_written_to_is_unmapped(written: set[int]) -> None:
    kept, unmapped = spares()
    written.add(111)
    kept.give(0, SPARE_BYTES_MIN, 111)
    assert kept.take(0, SPARE_BYTES_MIN) is None
    assert unmapped == [(111, SPARE_BYTES_MIN)]


@pytest.mark.parametrize("length", [SPARE_BYTES_MIN - 1, SPARE_BYTES_MAX + 1])
def test_the_small_and_the_huge_are_unmapped(length: int) -> None:
    kept, unmapped = spares()
    kept.give(0, length, 111)
    assert unmapped == [(111, length)]


def test_one_spare_for_the_same_pages_is_enough() -> None:
    kept, unmapped = spares()
    kept.give(0, SPARE_BYTES_MIN, 111)
    kept.give(0, SPARE_BYTES_MIN, 222)
    assert unmapped == [(222, SPARE_BYTES_MIN)]
    assert kept.take(0, SPARE_BYTES_MIN) == 111


def test_the_oldest_goes_when_there_are_too_many() -> None:
    kept, unmapped = spares()
    for number in range(SPARES_MAX + 1):
        kept.give(number * SPARE_BYTES_MIN, SPARE_BYTES_MIN, 1000 + number)
    assert unmapped == [(1000, SPARE_BYTES_MIN)]


def test_the_oldest_go_when_they_are_too_large_together() -> None:
    kept, unmapped = spares()
    half = SPARE_BYTES_MAX // 2
    kept.give(0, half, 1)
    kept.give(half, half, 2)
    kept.give(2 * half, SPARE_BYTES_MAX, 3)
    assert unmapped == [(1, half), (2, half)]


def test_after_the_end_none_is_kept() -> None:
    kept, unmapped = spares()
    kept.give(0, SPARE_BYTES_MIN, 1)
    kept.close()
    kept.give(0, SPARE_BYTES_MIN, 2)
    assert unmapped == [(1, SPARE_BYTES_MIN), (2, SPARE_BYTES_MIN)]


@pytest.mark.parametrize("page", [0, 3, PAGES - 1])
def test_the_kernel_says_whether_a_page_was_written_to(
    tmp_path: Path, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    length = PAGES * mmap.PAGESIZE
    path = tmp_path / "file"
    path.write_bytes(bytes(length))
    with path.open("r+b") as file:
        mapping = mmap.mmap(file.fileno(), length, flags=mmap.MAP_PRIVATE)
    anchor = (ctypes.c_ubyte * length).from_buffer(mapping)
    address = ctypes.addressof(anchor)
    assert spare_mappings.is_untouched(address, length)
    assert bytes(anchor) == bytes(length)  # read, every page
    assert spare_mappings.is_untouched(address, length)
    anchor[page * mmap.PAGESIZE + 5] = 1
    assert not spare_mappings.is_untouched(address, length)
    assert not spare_mappings.is_untouched(address, length - mmap.PAGESIZE) or page == PAGES - 1
    del anchor
    mapping.close()


def test_a_system_that_does_not_tell_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(spare_mappings.os, "open", refuse)
    assert not spare_mappings.is_untouched(0, 4096)
