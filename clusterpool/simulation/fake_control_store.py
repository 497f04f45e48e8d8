"""A control store in memory, for tests and simulations: passes the contract suite of the real one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import msgspec

from clusterpool.control_store.port import Event, EventsLost, package_digest
from clusterpool.core.cluster_view import (
    NodeEntry,
    NodeLoad,
    NodeRecord,
    NodesSnapshot,
    SilenceReport,
    SilentNode,
)
from clusterpool.core.membership import HeartbeatAnswer
from clusterpool.errors import NotConnected
from clusterpool.simulation.fake_actors import FakeActors


class FakeControlStore(FakeActors):
    """All clients share one object. `now_s` is the server's clock. Set `is_away` to make every call fail."""

    def __init__(self, now_s: Callable[[], float], *, events_max: int = 10_000) -> None:
        self.is_away = False
        self.on_death: Callable[[str, str], None] = lambda *_: None  # of a node that was declared dead, and why
        self._now_s = now_s
        self._events_max = events_max
        self._events: list[Event] = []
        self._event_number = 0
        self._losses = 0
        self._reset()

    def lose_everything(self) -> None:
        """As a server that restarts without its data."""
        self._losses += 1
        self._event_number = 0
        self._events = []
        self._reset()

    def _reset(self) -> None:
        self._generation = ""
        self._generation_by_node: dict[str, str] = {}
        self._incarnation = 0
        self._registration_by_node: dict[str, int] = {}
        self._entry_by_node: OrderedDict[str, NodeEntry] = OrderedDict()  # the one silent for longest first
        self._record_by_job: dict[str, bytes] = {}
        self._forget_actors()
        self._package_by_digest: dict[str, bytes] = {}

    def _reach(self) -> None:
        if self.is_away:
            raise NotConnected("the fake store is away")

    def _publish(self, kind: str, fields: Mapping[str, str]) -> int:
        self._event_number += 1
        self._events.append(Event(self._event_number, kind, dict(fields)))
        del self._events[: -self._events_max]
        return self._event_number

    # Nodes

    def _incarnation_of(self, node_id: str) -> int:
        entry = self._entry_by_node.get(node_id)
        return entry.incarnation if entry is not None else 0

    def register_node(self, record: NodeRecord, registration: int = 0, *, above: int = 0) -> int:
        self._reach()
        current = self._entry_by_node.get(record.node_id)
        if current is not None and 0 < registration <= self._registration_by_node.get(record.node_id, 0):
            return current.incarnation
        self._registration_by_node[record.node_id] = registration
        self._incarnation = max(self._incarnation, above) + 1
        self._enlist(record, self._incarnation)
        return self._incarnation

    def restore_node(self, record: NodeRecord, incarnation: int) -> bool:
        self._reach()
        current = self._entry_by_node.get(record.node_id)
        if current is not None and current.incarnation >= incarnation:
            return current.incarnation == incarnation
        if current is None and not self._has_forgotten(record.node_id, incarnation):
            return False
        self._incarnation = max(self._incarnation, incarnation)
        self._enlist(record, incarnation)
        return True

    def _enlist(self, record: NodeRecord, incarnation: int) -> None:
        self._generation = self._generation or f"generation-{self._losses}"
        self._generation_by_node[record.node_id] = self._generation
        self._hear(NodeEntry(record, incarnation, self._now_us(), 0.0))
        text = msgspec.json.encode(record).decode()
        fields = {"node_id": record.node_id, "incarnation": str(incarnation), "record": text}
        self._publish("node_joined", fields)

    def _hear(self, entry: NodeEntry) -> None:
        self._entry_by_node[entry.record.node_id] = entry
        self._entry_by_node.move_to_end(entry.record.node_id)

    def _now_us(self) -> int:
        return round(self._now_s() * 1e6)

    def _has_forgotten(self, node_id: str, incarnation: int) -> bool:
        return self._generation_by_node.get(node_id) != self._generation or self._incarnation < incarnation

    def heartbeat(self, node_id: str, incarnation: int, load: NodeLoad) -> HeartbeatAnswer:
        self._reach()
        current = self._entry_by_node.get(node_id)
        if current is None:
            has_forgotten = self._has_forgotten(node_id, incarnation)
            return HeartbeatAnswer.FORGOTTEN if has_forgotten else HeartbeatAnswer.FENCED
        if current.incarnation != incarnation:
            is_older = current.incarnation < incarnation  # than what it once held
            return HeartbeatAnswer.FORGOTTEN if is_older else HeartbeatAnswer.FENCED
        self._hear(NodeEntry(current.record, incarnation, self._now_us(), 0.0, load))
        return HeartbeatAnswer.ACCEPTED

    def declare_node_dead(self, node_id: str, incarnation: int, reason: str) -> bool:
        return self._end_node(node_id, incarnation, "node_died", reason)

    def remove_node(self, node_id: str, incarnation: int) -> bool:
        return self._end_node(node_id, incarnation, "node_left", "")

    def _end_node(self, node_id: str, incarnation: int, kind: str, reason: str) -> bool:
        self._reach()
        current = self._entry_by_node.get(node_id)
        if current is None or current.incarnation != incarnation:
            return False
        del self._entry_by_node[node_id]
        self._registration_by_node.pop(node_id, None)
        if kind == "node_died":
            self.on_death(node_id, reason)
        self._publish(kind, {"node_id": node_id, "incarnation": str(incarnation), "reason": reason})
        return True

    def list_nodes(self) -> NodesSnapshot:
        self._reach()
        now_us = self._now_us()
        nodes = [
            NodeEntry(each.record, each.incarnation, each.heartbeat_us, (now_us - each.heartbeat_us) / 1e6, each.load)
            for _, each in sorted(self._entry_by_node.items())
        ]
        return NodesSnapshot(nodes, self._event_number, self._generation)

    def find_node(self, node_id: str) -> NodeEntry | None:
        return next((entry for entry in self.list_nodes().nodes if entry.record.node_id == node_id), None)

    def silent_nodes(self, silence_s: float) -> SilenceReport:
        self._reach()
        now_us, silent = self._now_us(), []
        for node_id, entry in self._entry_by_node.items():
            if now_us - entry.heartbeat_us <= silence_s * 1e6:
                break
            silent.append(
                SilentNode(node_id, entry.incarnation, entry.heartbeat_us, (now_us - entry.heartbeat_us) / 1e6)
            )
        return SilenceReport(silent, len(self._entry_by_node), self._incarnation)

    # Jobs

    def register_job(self, job_id: str, record: bytes) -> None:
        self._reach()
        if job_id not in self._record_by_job:
            self._publish("job_started", {"job_id": job_id})
        self._record_by_job[job_id] = record

    def finish_job(self, job_id: str, reason: str = "") -> bool:
        self._reach()
        if self._record_by_job.pop(job_id, None) is None:
            return False
        self._publish("job_finished", {"job_id": job_id, "reason": reason})
        return True

    def list_jobs(self) -> dict[str, bytes]:
        self._reach()
        return dict(sorted(self._record_by_job.items()))

    # Packages

    def put_package(self, digest: str, content: bytes) -> None:
        self._reach()
        if digest != package_digest(content):
            raise ValueError(f"{digest!r} is not the SHA-256 of these {len(content)} bytes")
        self._package_by_digest[digest] = content

    def has_package(self, digest: str) -> bool:
        self._reach()
        return digest in self._package_by_digest

    def get_package(self, digest: str) -> bytes | None:
        self._reach()
        return self._package_by_digest.get(digest)

    # Events

    def publish_event(self, kind: str, fields: Mapping[str, str]) -> int:
        self._reach()
        return self._publish(kind, fields)

    def read_events(self, after_id: int, *, block_ms: int = 0, count: int = 1000) -> list[Event]:
        self._reach()
        if self._event_number < after_id:
            raise EventsLost("the store lost some")
        first_id = self._event_number - len(self._events) + 1
        if self._events and first_id > after_id + 1:
            raise EventsLost("trimmed")
        return self._events[after_id + 1 - first_id :][:count]

    def last_event_id(self) -> int:
        self._reach()
        return self._event_number

    def close(self) -> None:
        pass
