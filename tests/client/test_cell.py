"""Shared bytes: on one host they are one mapping; between hosts they follow the lock that guards them."""

from __future__ import annotations

import gc
import os
import pickle
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clusterpool.client import api, cell, current, semaphore
from clusterpool.client.cell import Cell
from clusterpool.client.semaphore import RECURSIVE_MUTEX, Semaphore
from clusterpool.errors import ObjectLost
from clusterpool.processes.thin_files import remove_thin_files
from tests.client.carriers import FakeCoordination, FakeStore, runtime_of

HOME, ELSEWHERE = "n0123456789", "n9876543210"


class Place:
    """A node in this process: `enter` makes everything that follows happen there."""

    def __init__(self, node_id: str, store: FakeStore, patch: pytest.MonkeyPatch, folder: Path) -> None:
        folder.mkdir()
        self.coordination = FakeCoordination(node_id, store)
        self.folder = folder
        self._runtime = runtime_of(self.coordination, folder)
        self._patch = patch
        self._known: Any = weakref.WeakValueDictionary(), weakref.WeakValueDictionary()

    def enter(self) -> None:
        self._patch.setattr(api, "runtime", lambda: self._runtime)
        self._patch.setattr(current, "get_if_any", lambda: self._runtime)
        self._patch.setattr(semaphore, "_known", self._known[0])
        self._patch.setattr(cell, "_known", self._known[1])

    def move(self, made: Cell) -> None:
        """The lock, then the cell, to the store."""
        assert made.guard is not None
        self.coordination.move_semaphore(made.guard.name)
        self.coordination.move_cell(made.name, str(self.folder / "arena"))


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Place, Place]]:
    """This node, which is entered, and another."""
    store = FakeStore()
    home = Place(HOME, store, monkeypatch, tmp_path / "home")
    elsewhere = Place(ELSEWHERE, store, monkeypatch, tmp_path / "elsewhere")
    home.enter()
    yield home, elsewhere
    remove_thin_files(HOME)
    remove_thin_files(ELSEWHERE)


def guarded(size_bytes: int = 4) -> tuple[Cell, Semaphore]:
    made = Cell(size_bytes)
    guard = Semaphore(1, 1, kind=RECURSIVE_MUTEX, is_lock=True)
    made.guard_by(guard)
    return made, guard


def content(made: Cell) -> bytes:
    return bytes(made.create_memoryview())


def write(made: Cell, text: bytes) -> None:
    made.create_memoryview()[:] = text


def test_it_starts_as_zeros_and_is_shared_by_name(places: tuple[Place, Place], monkeypatch: pytest.MonkeyPatch) -> None:
    made = Cell(5)
    assert content(made) == bytes(5)
    pickled = pickle.dumps(made)
    assert pickle.loads(pickled) is made
    monkeypatch.setattr(cell, "_known", weakref.WeakValueDictionary())
    copy = pickle.loads(pickled)
    write(copy, b"hello")
    assert content(made) == b"hello"


@pytest.mark.parametrize("size_bytes", [0, 1, 7, 8, 4096])
def test_any_size(places: tuple[Place, Place], size_bytes: int) -> None:
    assert content(Cell(size_bytes)) == bytes(size_bytes)


@pytest.mark.parametrize(("size_bytes", "error"), [(-1, ValueError), (1 << 62, OverflowError)])
def test_sizes_that_cannot_be(places: tuple[Place, Place], size_bytes: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="Size"):
        Cell(size_bytes)


def test_collected_its_file_is_removed_and_its_views_stay(places: tuple[Place, Place]) -> None:
    made = Cell(3)
    view = made.create_memoryview()
    assert len(list(places[0].folder.iterdir())) == 1
    del made
    gc.collect()
    assert list(places[0].folder.iterdir()) == []
    view[:] = b"abc"
    assert bytes(view) == b"abc"


def test_pickled_its_file_stays_until_the_job_ends(places: tuple[Place, Place]) -> None:
    pickled = pickle.dumps(Cell(3))
    gc.collect()
    assert len(content(pickle.loads(pickled))) == 3
    remove_thin_files(HOME, folders=[places[0].folder])
    gc.collect()
    with pytest.raises(ObjectLost, match="job"):
        pickle.loads(pickled)


def test_without_a_lock_it_cannot_leave_its_node(places: tuple[Place, Place]) -> None:
    pickled = pickle.dumps(Cell(3))
    places[1].enter()
    with pytest.raises(TypeError, match=f"made on node {HOME}, and this is node {ELSEWHERE}; use Value"):
        pickle.loads(pickled)


def test_whoever_holds_the_lock_sees_what_the_last_holder_wrote(places: tuple[Place, Place]) -> None:
    home, elsewhere = places
    here, guard = guarded()
    write(here, b"1111")
    pickled = pickle.dumps(here)
    home.move(here)
    elsewhere.enter()
    there = pickle.loads(pickled)
    assert content(there) == b"1111"
    assert [adopted[0] for adopted in elsewhere.coordination.adopted] == ["lock", "cell"]
    with there.guard:
        write(there, b"2222")
    with guard:
        assert content(here) == b"2222"
        with guard:
            write(here, b"3333")
    with there.guard:
        assert content(there) == b"3333"


def test_what_did_not_change_is_not_stored_again(places: tuple[Place, Place]) -> None:
    here, guard = guarded()
    places[0].move(here)
    with guard:
        write(here, b"1111")
    version = places[0].coordination.store.cells[here.name][0]
    for _ in range(3):
        with guard:
            pass
    assert places[0].coordination.store.cells[here.name][0] == version


def test_what_the_holder_wrote_while_it_moved_is_not_lost(places: tuple[Place, Place]) -> None:
    home, elsewhere = places
    here, guard = guarded()
    pickled = pickle.dumps(here)
    guard.acquire()
    write(here, b"11--")
    home.move(here)  # half written
    write(here, b"1111")
    elsewhere.enter()
    there = pickle.loads(pickled)
    assert there.guard.acquire(False) is False
    guard.release()
    with there.guard:
        assert content(there) == b"1111"


def test_ctrl_c_while_the_bytes_are_stored_does_not_keep_the_lock(
    places: tuple[Place, Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, _ = places
    made, guard = guarded()
    home.move(made)
    write_cell = home.coordination.write_cell

    def interrupted(*arguments: Any, **options: Any) -> int:
        write_cell(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(home.coordination, "write_cell", interrupted)
    guard.acquire()
    write(made, b"mine")
    with pytest.raises(KeyboardInterrupt):
        guard.release()
    assert home.coordination.store.tokens[guard.name] == 1
    assert guard._count() == 0


def test_who_gets_the_cell_while_it_holds_the_lock_does_not_undo_what_others_wrote(places: tuple[Place, Place]) -> None:
    home, elsewhere = places
    made, guard = guarded()
    pickled, pickled_guard = pickle.dumps(made), pickle.dumps(guard)
    home.move(made)
    elsewhere.enter()
    pickle.loads(pickled)  # now that host has a file of it, and this process no object
    home.enter()
    with guard:
        write(made, b"home")
    elsewhere.enter()
    found = pickle.loads(pickled_guard)
    with found:
        copy = pickle.loads(pickled)
        assert content(copy) == b"home"
    home.enter()
    with guard:
        assert content(made) == b"home"


def test_two_threads_may_unpickle_it_at_once(places: tuple[Place, Place], monkeypatch: pytest.MonkeyPatch) -> None:
    home, elsewhere = places
    made, _ = guarded()
    pickled = pickle.dumps(made)
    home.move(made)
    elsewhere.enter()
    link = os.link
    copies: list[Any] = []

    def link_second(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        thread = threading.Thread(target=lambda: copies.append(pickle.loads(pickled)))
        thread.start()
        thread.join(30)
        link(source, target)

    monkeypatch.setattr(os, "link", link_second)
    first = pickle.loads(pickled)
    (second,) = copies
    write(first, b"same")
    assert content(second) == b"same"


def test_processes_of_another_node_share_one_file(places: tuple[Place, Place], monkeypatch: pytest.MonkeyPatch) -> None:
    home, elsewhere = places
    here, _ = guarded()
    pickled = pickle.dumps(here)
    home.move(here)
    elsewhere.enter()
    first = pickle.loads(pickled)
    with first.guard:
        write(first, b"1111")
    monkeypatch.setattr(cell, "_known", weakref.WeakValueDictionary())
    monkeypatch.setattr(semaphore, "_known", weakref.WeakValueDictionary())
    second = pickle.loads(pickled)
    assert second is not first
    assert content(second) == b"1111"
    assert len(list(elsewhere.folder.iterdir())) == 1
    with second.guard:
        write(second, b"2222")
    assert content(first) == b"2222", "the same pages"
