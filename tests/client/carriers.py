"""A node and a control store in one object, for semaphores and cells that move within one process."""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from clusterpool.node.thin_tokens import drain_semaphore
from clusterpool.processes.thin_files import cell_path


class FakeCoordination:
    """`client.coordination.Coordination`, as a process of `node_id` sees it; `move` is what its node does."""

    def __init__(self, node_id: str, store: FakeStore) -> None:
        self.node_id = node_id
        self.page = memoryview(bytearray(8))
        self.store = store
        self.adopted: list[tuple[str, str, str, int]] = []
        self.questions = 0
        self.stuck: list[tuple[str, int]] = []
        self.counts = SimpleNamespace(slept=lambda semaphore: None, settle_at_exit=lambda semaphore: None)
        self._prefix = f"jtest{os.getpid()}-d{os.urandom(4).hex()}-"
        self._numbers = itertools.count(1)

    def new_name(self) -> str:
        return self._prefix + str(next(self._numbers))

    def is_moved(self, name: str) -> bool:
        self.questions += 1
        return name in self.store.tokens or name in self.store.cells

    def adopt(self, kind: str, name: str, home: str, maximum: int = 0, total: int = -1) -> None:
        self.adopted.append((kind, name, home, maximum))
        assert name in self.store.tokens or name in self.store.cells, "in these tests it has moved before"

    def move_semaphore(self, name: str) -> None:
        self._bump()
        self.store.tokens[name] = drain_semaphore(self.node_id, name)

    def move_cell(self, name: str, arena_path: str) -> None:
        self._bump()
        self.store.cells[name] = (1, cell_path(arena_path, self.node_id, name).read_bytes())

    def _bump(self) -> None:
        self.page.cast("Q")[0] += 1

    def acquire(self, name: str, timeout_s: float | None) -> int:
        return self.store.acquire(name, timeout_s)

    def release(self, name: str, maximum: int, token: int = 0, *, is_thin: bool = False) -> None:
        self.store.release(name, maximum)

    def report_stuck(self, name: str, total: int) -> None:
        self.stuck.append((name, total))

    def value(self, name: str) -> int:
        return self.store.tokens[name]

    def read_cell(self, name: str, known_version: int) -> tuple[int, bytes] | None:
        version, content = self.store.cells[name]
        return (version, content) if version != known_version else None

    def write_cell(self, name: str, content: bytes, guard: str = "", token: int = 0, *, is_thin: bool = False) -> int:
        version = self.store.cells[name][0] + 1
        self.store.cells[name] = (version, content)
        return version


class FakeStore:
    """Tokens and cells of the control store."""

    def __init__(self) -> None:
        self.tokens: dict[str, int] = {}
        self.cells: dict[str, tuple[int, bytes]] = {}
        self.acquires = 0
        self._changed = threading.Condition()

    def acquire(self, name: str, timeout_s: float | None) -> int:
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            self.acquires += 1
            while self.tokens[name] == 0:
                left_s = None if deadline_s is None else deadline_s - time.monotonic()
                if (left_s is not None and left_s <= 0) or not self._changed.wait(left_s):
                    return 0
            self.tokens[name] -= 1
            return self.acquires

    def release(self, name: str, maximum: int) -> None:
        with self._changed:
            if self.tokens[name] >= maximum:
                raise ValueError("semaphore or lock released too many times")
            self.tokens[name] += 1
            self._changed.notify()


def runtime_of(coordination: FakeCoordination, folder: Path) -> Any:
    """What `api.runtime()` returns in a process of that node."""
    registered = SimpleNamespace(arena_path=str(folder / "arena"))
    return SimpleNamespace(coordination=coordination, client=SimpleNamespace(registered=registered, is_closed=False))
