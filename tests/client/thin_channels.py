"""Channels without a cluster: socket pairs of this process, and a control store that is a dictionary of lists."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import types
from collections import deque
from typing import Any

from clusterpool.client.channel import ChannelTable
from clusterpool.client.values import INLINE_BYTES_MAX
from clusterpool.core import messages as m
from clusterpool.core.messages import Address
from clusterpool.errors import NotConnected
from clusterpool.serialization.packing import loads

NODE, OTHER_NODE = "n1", "n2"


class FakeStore:
    """Node and control store in one: the pairs by name, and what has moved."""

    def __init__(self) -> None:
        self.pairs: dict[str, tuple[socket.socket, socket.socket]] = {}
        self.fat: dict[str, deque[bytes]] = {}
        self.moved_page = bytearray(8)
        self.changed = threading.Condition()
        self.objects: dict[str, bytes] = {}
        self.forgotten: list[str] = []

    def ends(self, name: str) -> tuple[int, int]:
        """As `descriptors.channel`."""
        receiver, sender = self.pair(name)
        return os.dup(receiver.fileno()), os.dup(sender.fileno())

    def pair(self, name: str) -> tuple[socket.socket, socket.socket]:
        if name not in self.pairs:
            self.pairs[name] = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return self.pairs[name]

    def move(self, name: str) -> None:
        """As a node does: the page, the end of the socket, what is left in it."""
        with self.changed:
            if name in self.fat:
                return
            page = memoryview(self.moved_page).cast("Q")
            page[0] += 1
            receiver, sender = self.pair(name)
            sender.shutdown(socket.SHUT_WR)
            left: deque[bytes] = deque()
            while message := receiver.recv(INLINE_BYTES_MAX * 2):
                left.append(message)
            self.fat[name] = left
            self.changed.notify_all()

    def close(self) -> None:
        for pair in self.pairs.values():
            for sock in pair:
                sock.close()


class FakeCoordination:
    """As client/coordination.py, for one node."""

    def __init__(self, store: FakeStore, node_id: str) -> None:
        self.node_id = node_id
        self.page = memoryview(store.moved_page)
        self._store = store
        self._numbers = itertools.count(1)

    def new_name(self) -> str:
        return f"j1-d1-{next(self._numbers)}"

    def is_moved(self, name: str) -> bool:
        return name in self._store.fat

    def adopt(self, kind: str, name: str, home: str, maximum: int = 0) -> None:
        assert kind == "channel"
        self._store.move(name)

    def put(self, name: str, payload: bytes) -> None:
        with self._store.changed:
            self._store.fat[name].append(payload)
            self._store.changed.notify_all()

    def get(self, name: str, timeout_s: float | None) -> bytes | None:
        with self._store.changed:
            self._store.changed.wait_for(lambda: self._store.fat[name], timeout_s)
            return self._store.fat[name].popleft() if self._store.fat[name] else None

    def length(self, name: str) -> int:
        return len(self._store.fat[name])

    def forget(self, name: str) -> None:
        self._store.forgotten.append(name)


class FakeValues:
    """As client/values.py: the object store."""

    def __init__(self, store: FakeStore, node_id: str) -> None:
        self._store = store
        self._node_id = node_id

    def store(self, serialized: Any, object_id: str) -> m.StoredValue:
        self._store.objects[object_id] = serialized.to_bytes()
        return m.StoredValue(object_id, serialized.size_bytes, [self._node_id])

    def load_stored(self, stored: m.StoredValue) -> Any:
        return loads(self._store.objects[stored.object_id])


class FakeClient:
    """As client/client.py, as far as channels know it."""

    def __init__(self, store: FakeStore, node_id: str, kind: str) -> None:
        self.address = Address(node_id, "d1")
        self.node = Address(node_id, node_id)
        self.kind = kind
        self.is_closed = False
        self.has_unsent = False
        self.loop = types.SimpleNamespace(wait_until=lambda predicate: predicate())
        self._store = store

    def send(self, destination: Address, message: m.FreeObjects) -> None:
        for object_id in message.object_ids:
            self._store.objects.pop(object_id, None)

    def check_open(self) -> None:
        if self.is_closed:
            raise NotConnected("closed by the test")


def make_table(store: FakeStore, node_id: str = NODE, *, kind: str = "worker") -> ChannelTable:
    """The channels of one process of a node."""
    runtime: Any = types.SimpleNamespace(
        coordination=FakeCoordination(store, node_id),
        client=FakeClient(store, node_id, kind),
        values=FakeValues(store, node_id),
        on_shutdown=[],
        after_shutdown=[],
    )

    def ends(name: str) -> tuple[int, int]:
        assert node_id == NODE, "another node would make another pair"
        return store.ends(name)

    return ChannelTable(runtime, ends)
