"""Two stand-ins for node shells in this process, whose messages to each other go through a queue, and their loop."""

from __future__ import annotations

import select
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from clusterpool.core import wire
from clusterpool.core.messages import Address
from clusterpool.node.descriptors import Descriptors


class FakeShell:
    """What `Descriptors` and `TunnelEnds` use of a shell."""

    def __init__(self, node_id: str, folder: Path, nodes: Nodes) -> None:
        self.node_id = node_id
        self.paths = SimpleNamespace(folder=folder)
        self.epoll = nodes.epoll
        self._nodes = nodes
        self.rejected: list[str] = []  # causes
        self.descriptors = Descriptors(self)  # type: ignore[arg-type]
        self.tunnels = self.descriptors.tunnels

    def reject(self, cause: str, text: str) -> None:
        self.rejected.append(cause)

    def watch(self, fd: int, on_ready: Callable[[int], None]) -> None:
        self._nodes.by_fd[fd] = on_ready
        self.epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        if self._nodes.by_fd.pop(fd, None) is not None:
            self.epoll.unregister(fd)

    def send(self, destination: Address, message: Any) -> None:
        if destination.node_id in self._nodes.lost:
            self.tunnels.node_gone(destination.node_id)
        else:
            self._nodes.on_way.append((self.node_id, destination.node_id, wire.encode(message)))


class Nodes:
    """Nodes `na` and `nb`; turn their loop until something holds, or in a thread."""

    def __init__(self, folder: Path) -> None:
        self.epoll = select.epoll()
        self.by_fd: dict[int, Callable[[int], None]] = {}
        self.on_way: deque[tuple[str, str, bytes]] = deque()
        self.lost: set[str] = set()
        self.turns = 0
        self.shells = {}
        for node_id in ("na", "nb"):
            (folder / node_id).mkdir()
            self.shells[node_id] = FakeShell(node_id, folder / node_id, self)
            self.shells[node_id].descriptors.open()

    def turn(self, timeout_s: float = 0.01) -> None:
        self.turns += 1
        while self.on_way:
            source, destination, frame = self.on_way.popleft()
            assert self.shells[destination].tunnels.take(source, wire.decode(frame))
        for fd, mask in self.epoll.poll(0 if self.on_way else timeout_s):
            on_ready = self.by_fd.get(fd)
            if on_ready is not None:
                on_ready(mask)

    def run_until(self, condition: Callable[[], Any], within_s: float = 20.0) -> None:
        deadline_s = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline_s, "it did not come true in time"
            self.turn()

    def settle(self) -> None:
        """Until nothing is on its way and nothing is ready."""
        quiet = 0
        while quiet < 3:
            before = len(self.on_way)
            self.turn(0.005)
            quiet = quiet + 1 if not before and not self.on_way else 0

    def close(self) -> None:
        for shell in self.shells.values():
            shell.descriptors.close()
        self.epoll.close()


class Turning:
    """The nodes' loop in a thread, for tests that block."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._is_stopped:
            self._nodes.turn()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_stopped = True
        self._thread.join()
