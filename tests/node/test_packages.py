"""The node's side of runtime environments: packages are taken, fetched and unpacked."""

from __future__ import annotations

import hashlib
import io
import queue
import zipfile
from pathlib import Path
from typing import Any

import pytest

from clusterpool.client.packages import pack
from clusterpool.core import environments as env
from clusterpool.core import package_messages as p
from clusterpool.core.messages import Address
from clusterpool.errors import NotConnected
from clusterpool.node import packages
from clusterpool.node.packages import PackageThread, remove_package, unpack

DRIVER = Address("n1", "d1")


class FakeStore:
    """The control store's packages, in a dictionary; away for the first `away` calls."""

    def __init__(self, away: int = 0) -> None:
        self.contents: dict[str, bytes] = {}
        self.away = away
        self.gets = 0

    def _come_back(self) -> None:
        if self.away > 0:
            self.away -= 1
            raise NotConnected("the control store is away")

    def has_package(self, digest: str) -> bool:
        self._come_back()
        return digest in self.contents

    def put_package(self, digest: str, content: bytes) -> None:
        self._come_back()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError("another digest")
        self.contents[digest] = content

    def get_package(self, digest: str) -> bytes | None:
        self._come_back()
        self.gets += 1
        return self.contents.get(digest)

    def close(self) -> None:
        pass


class Bench:
    """A package thread on a fake store; `next_event` waits for what it posts."""

    def __init__(self, folder: Path, store: FakeStore) -> None:
        self.events: queue.Queue[Any] = queue.Queue()
        self.thread = PackageThread(folder, self.events.put, lambda: store)

    def next_event(self) -> Any:
        return self.events.get(timeout=30)

    def ask(self, message: p.OfferPackage | p.SendPackage, source: Address = DRIVER) -> p.PackageAnswer:
        self.thread.message(source, message)
        event = self.next_event()
        assert isinstance(event, env.PackageAnswered) and event.address == source
        return event.answer


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    made: list[Bench] = []

    def make(store: FakeStore) -> Bench:
        made.append(Bench(tmp_path / "packages", store))
        return made[-1]

    yield make
    for one in made:
        one.thread.stop()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.py").write_text("A = 1\n")
    (folder / "inner" / "run.sh").write_text("#!/bin/sh\n")
    (folder / "inner" / "run.sh").chmod(0o755)
    return folder


def test_a_package_goes_into_the_store_in_pieces_and_only_once(bench: Any, source: Path) -> None:
    package = pack(source, "")
    store = FakeStore()
    one = bench(store)
    size, half = len(package.content), len(package.content) // 2
    assert one.ask(p.OfferPackage(1, package.digest, size)) == p.PackageAnswer(1, False)
    assert one.ask(p.SendPackage(2, package.digest, 0, package.content[:half])) == p.PackageAnswer(2, False)
    assert not store.contents
    assert one.ask(p.SendPackage(3, package.digest, half, package.content[half:])) == p.PackageAnswer(3, True)
    assert store.contents == {package.digest: package.content}
    assert one.ask(p.OfferPackage(4, package.digest, size), Address("n1", "d2")).is_there


@pytest.mark.parametrize(
    "pieces",
    [
        [(5, b"12345")],  # not from the start
        [(0, b"12345"), (0, b"12345")],  # the same twice
        [(0, b"x" * 11)],  # more than was offered
    ],
)
def test_pieces_out_of_turn_are_refused(bench: Any, pieces: list[tuple[int, bytes]]) -> None:
    one = bench(FakeStore())
    digest = "0" * 64
    one.ask(p.OfferPackage(1, digest, 10))
    answers = [one.ask(p.SendPackage(2, digest, offset, chunk)) for offset, chunk in pieces]
    assert "out of turn" in answers[-1].error
    assert not answers[-1].is_there


def test_a_package_of_another_digest_is_refused(bench: Any) -> None:
    one = bench(FakeStore())
    one.ask(p.OfferPackage(1, "0" * 64, 3))
    assert "another digest" in one.ask(p.SendPackage(2, "0" * 64, 0, b"abc")).error


def test_what_a_dead_driver_had_begun_to_send_is_dropped(bench: Any) -> None:
    one = bench(FakeStore())
    one.ask(p.OfferPackage(1, "0" * 64, 10))
    one.thread.forget(DRIVER)
    assert "out of turn" in one.ask(p.SendPackage(2, "0" * 64, 0, b"12345")).error


@pytest.mark.parametrize("size_bytes", [0, p.PACKAGE_BYTES_MAX + 1])
def test_a_package_of_no_possible_size_is_refused(bench: Any, size_bytes: int) -> None:
    assert bench(FakeStore()).ask(p.OfferPackage(1, "0" * 64, size_bytes)).error


def test_a_fetched_package_is_unpacked_and_used_again(bench: Any, source: Path) -> None:
    package = pack(source, "")
    store = FakeStore()
    store.contents[package.digest] = package.content
    one = bench(store)
    for _ in range(2):
        one.thread.take(env.FetchPackage(package.digest))
        assert one.next_event() == env.PackageUnpacked(package.digest, 6 + 10)
    assert store.gets == 1
    unpacked = one.thread.folder / package.digest
    assert (unpacked / "a.py").read_text() == "A = 1\n"
    assert (unpacked / "inner" / "run.sh").stat().st_mode & 0o777 == 0o700
    assert (unpacked / "a.py").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in one.thread.folder.iterdir()] == [package.digest]


def test_a_fetch_waits_for_a_store_that_is_away(bench: Any, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_RETRY_S", 0.001)
    package = pack(source, "")
    store = FakeStore(away=3)
    store.contents[package.digest] = package.content
    one = bench(store)
    one.thread.take(env.FetchPackage(package.digest))
    assert isinstance(one.next_event(), env.PackageUnpacked)


@pytest.mark.parametrize("patience_s", [0.0])
def test_a_fetch_fails_when_the_store_stays_away(
    bench: Any, monkeypatch: pytest.MonkeyPatch, patience_s: float
) -> None:
    monkeypatch.setattr(packages, "PATIENCE_S", patience_s)
    one = bench(FakeStore(away=1000))
    one.thread.take(env.FetchPackage("0" * 64))
    event = one.next_event()
    assert isinstance(event, env.PackageFailed)
    assert "is away" in event.text


def test_a_package_that_the_store_has_not_is_a_clear_failure(bench: Any) -> None:
    one = bench(FakeStore())
    one.thread.take(env.FetchPackage("0" * 64))
    event = one.next_event()
    assert isinstance(event, env.PackageFailed)
    assert "start the program again" in event.text


def test_an_unpacked_package_can_be_dropped(bench: Any, source: Path) -> None:
    package = pack(source, "")
    folder = bench(FakeStore()).thread.folder
    unpack(package.content, package.digest, folder)
    remove_package(folder, package.digest)
    remove_package(folder, package.digest)  # twice does no harm
    assert list(folder.iterdir()) == []


def zip_of(name: str, content: bytes) -> tuple[str, bytes]:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return hashlib.sha256(file.getvalue()).hexdigest(), file.getvalue()


def test_a_file_never_leaves_the_package_folder(tmp_path: Path) -> None:
    digest, content = zip_of("../../outside.py", b"x")
    unpack(content, digest, tmp_path / "packages")
    assert not (tmp_path / "outside.py").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["packages"]


def test_a_package_that_would_fill_the_disk_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(p, "PACKAGE_BYTES_MAX", 100_000)
    digest, content = zip_of("zeros", bytes(100_001))
    assert len(content) < 1000
    with pytest.raises(ValueError, match="more than 100000 bytes"):
        unpack(content, digest, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_zip_file_leaves_nothing(tmp_path: Path) -> None:
    content = b"not a zip file"
    with pytest.raises(ValueError, match="no zip file"):
        unpack(content, hashlib.sha256(content).hexdigest(), tmp_path)
    with pytest.raises(ValueError, match="digest"):
        unpack(content, "0" * 64, tmp_path)
    assert list(tmp_path.iterdir()) == []
