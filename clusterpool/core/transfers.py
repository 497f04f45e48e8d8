"""Copies of other nodes' objects, on their way here: one pull an object, however many want it.

    requested --size known--> WAITING --budget--> ALLOCATING --room--> OPENING --> FETCHING --all--> sealed
        |                        ^                                        ^            |
        +--size not known--> SIZING                                       +------------+
                                                             another source; what came is kept

A source that has lost the object is not asked again; one that is slow or refuses is asked `TRIES_MAX` times.
A pull fails when no source is left.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from clusterpool.core.messages import Message
from clusterpool.core.transfer_messages import (
    AbortPull,
    AllocateForPull,
    ChunkData,
    CloseTransfer,
    FoundHere,
    OpenTransfer,
    PeerLost,
    PeerSpoke,
    PullCancelled,
    PullRequested,
    ReportPulled,
    ReportPullFailed,
    RoomGranted,
    RoomRefused,
    SealPull,
    SendChunk,
    SendToNode,
    TimePassed,
    TransferCommand,
    TransferEvent,
    TransferOpened,
    TransferRefused,
    WriteChunk,
)

# Larger chunks hold up small messages behind them on the same connection, smaller ones cost a message each.
CHUNK_BYTES = 1 << 20
# Chunks asked for ahead: 8 MiB in flight keep a link of 10 Gbit/s busy over a round trip of 6 ms.
WINDOW_CHUNKS = 8
# Room that pulls may claim at once; beyond it they wait in line, so that a burst of them does not empty the
# store.
PULL_BYTES_MAX = 512 << 20
# A dead node is reported by the membership within seconds; these are for a live one that does not answer.
# Opening takes longer as the object may have to come from the server's disk, into a store that is full.
OPEN_WAIT_S = 60.0
CHUNK_WAIT_S = 10.0
TRIES_MAX = 3


class Phase(Enum):
    """What a pull waits for; see the diagram."""

    SIZING = "sizing"
    WAITING = "waiting"
    ALLOCATING = "allocating"
    OPENING = "opening"
    FETCHING = "fetching"


TALKING = (Phase.SIZING, Phase.OPENING, Phase.FETCHING)
CLAIMING = (Phase.ALLOCATING, Phase.OPENING, Phase.FETCHING)


@dataclass(slots=True)
class Pull:
    """One object on its way."""

    object_id: str
    size_bytes: int
    phase: Phase
    requesters: dict[str, None]
    failures_by_source: dict[str, int]
    source: str = ""
    transfer: int = 0  # 0: no source is being talked to
    arena_offset: int = -1
    missing: deque[int] = field(default_factory=deque)  # offsets of chunks not asked for
    in_flight: set[int] = field(default_factory=set)
    progress_s: float = 0.0
    trouble: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)  # sources that said that they have no copy
    dead: list[str] = field(default_factory=list)  # sources that are taken for dead

    def chunk_bytes(self, offset: int) -> int:
        return min(CHUNK_BYTES, self.size_bytes - offset)


class TransferTable:
    """The pulls of one node. `handle` is the only way in.

    `pull_bytes_max`: a single larger pull goes alone.
    """

    def __init__(self, *, pull_bytes_max: int = PULL_BYTES_MAX, window_chunks: int = WINDOW_CHUNKS) -> None:
        self.pull_bytes_max = pull_bytes_max
        self.window_chunks = window_chunks
        self.pulls: dict[str, Pull] = {}
        self.claimed_bytes = 0  # Invariant: the sizes of the pulls in the phases CLAIMING
        self._waiting: OrderedDict[str, None] = OrderedDict()
        self._pull_by_transfer: dict[int, Pull] = {}
        self._transfers_by_source: Counter[str] = Counter()
        self._last_transfer = 0
        self._commands: list[TransferCommand] = []
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            PullRequested: self._on_requested,
            PullCancelled: self._on_cancelled,
            PeerSpoke: self._on_peer_spoke,
            PeerLost: self._on_peer_lost,
            RoomGranted: self._on_room_granted,
            RoomRefused: self._on_room_refused,
            FoundHere: self._on_found_here,
            TimePassed: self._on_time_passed,
        }

    def handle(self, event: TransferEvent, now_s: float) -> list[TransferCommand]:
        """Take in one event at `now_s` (monotonic seconds); say what to do."""
        self._handlers[type(event)](event, now_s)
        self._admit()
        commands, self._commands = self._commands, []
        return commands

    def check_invariants(self) -> None:
        """Raise AssertionError if the table contradicts itself: for tests and the simulator."""
        claimed = sum(pull.size_bytes for pull in self.pulls.values() if pull.phase in CLAIMING)
        assert claimed == self.claimed_bytes, f"{claimed} bytes are claimed, counted {self.claimed_bytes}"
        talking = {pull.transfer: pull for pull in self.pulls.values() if pull.phase in TALKING}
        assert talking == self._pull_by_transfer, "transfers and pulls differ"
        assert Counter(pull.source for pull in talking.values()) == +self._transfers_by_source
        waiting = [pull.object_id for pull in self.pulls.values() if pull.phase is Phase.WAITING]
        assert set(waiting) == set(self._waiting), "the waiting line is not those who wait"
        for pull in self.pulls.values():
            assert pull.requesters, f"{pull} is for nobody"
            assert len(pull.in_flight) <= self.window_chunks, f"{pull} asks for too much"
            assert not pull.in_flight or pull.phase is Phase.FETCHING, f"{pull} expects chunks from nobody"

    # --- requesters ----------------------------------------------------------------------------------------

    def _on_requested(self, event: PullRequested, now_s: float) -> None:
        pull = self.pulls.get(event.object_id)
        if pull is not None:
            pull.requesters[event.requester] = None
            for node_id in event.node_ids:
                if node_id not in pull.gone and node_id not in pull.dead:
                    pull.failures_by_source.setdefault(node_id, 0)
            return
        phase = Phase.WAITING if event.size_bytes else Phase.SIZING
        pull = Pull(
            event.object_id,
            event.size_bytes,
            phase,
            {event.requester: None},
            dict.fromkeys(event.node_ids, 0),
        )
        self.pulls[event.object_id] = pull
        if phase is Phase.SIZING:
            self._open_source(pull, now_s)
        elif not event.node_ids:
            self._fail(pull, "lost", self._lost_text(pull))
        else:
            self._waiting[pull.object_id] = None

    def _on_cancelled(self, event: PullCancelled, now_s: float) -> None:
        pull = self.pulls.get(event.object_id)
        if pull is not None and event.requester in pull.requesters:
            del pull.requesters[event.requester]
            if not pull.requesters:
                self._drop(pull)

    # --- the store -----------------------------------------------------------------------------------------

    def _on_room_granted(self, event: RoomGranted, now_s: float) -> None:
        pull = self.pulls.get(event.object_id)
        if pull is None or pull.phase is not Phase.ALLOCATING:
            return  # cancelled meanwhile; the AbortPull sent then gives the room back
        pull.arena_offset = event.offset
        pull.missing.extend(range(0, pull.size_bytes, CHUNK_BYTES))
        pull.phase = Phase.OPENING
        self._open_source(pull, now_s)

    def _on_room_refused(self, event: RoomRefused, now_s: float) -> None:
        pull = self.pulls.get(event.object_id)
        if pull is not None and pull.phase is Phase.ALLOCATING:
            self._end(pull)
            self._do(ReportPullFailed(pull.object_id, list(pull.requesters), event.kind, event.text))

    def _on_found_here(self, event: FoundHere, now_s: float) -> None:
        pull = self.pulls.get(event.object_id)
        if pull is not None and pull.phase is Phase.ALLOCATING:
            self._end(pull)
            self._do(ReportPulled(pull.object_id, list(pull.requesters)))

    # --- the sources ---------------------------------------------------------------------------------------

    def _on_peer_spoke(self, event: PeerSpoke, now_s: float) -> None:
        message = event.message
        if not isinstance(message, (TransferOpened, TransferRefused, ChunkData)):
            return
        pull = self._pull_by_transfer.get(message.transfer)
        if pull is None or pull.source != event.node_id:
            return  # of an attempt that was given up
        pull.progress_s = now_s
        if isinstance(message, TransferOpened):
            self._on_opened(pull, message, now_s)
        elif isinstance(message, TransferRefused):
            self._give_up_source(pull, message.text, now_s, is_gone=message.is_gone)
        else:
            self._on_chunk(pull, message, now_s)

    def _on_opened(self, pull: Pull, message: TransferOpened, now_s: float) -> None:
        if pull.phase is Phase.SIZING:
            self._close_source(pull)  # the room may take a while; nothing stays pinned over there meanwhile
            pull.size_bytes = message.size_bytes
            pull.phase = Phase.WAITING
            self._waiting[pull.object_id] = None
        elif message.size_bytes != pull.size_bytes:
            text = f"its copy has {message.size_bytes} bytes, not {pull.size_bytes}"
            self._give_up_source(pull, text, now_s, is_gone=True)
        elif pull.phase is Phase.OPENING:
            pull.phase = Phase.FETCHING
            self._ask_for_chunks(pull)

    def _on_chunk(self, pull: Pull, message: ChunkData, now_s: float) -> None:
        if message.offset not in pull.in_flight:
            return
        if len(message.chunk) != pull.chunk_bytes(message.offset):
            text = f"sent {len(message.chunk)} bytes for a chunk of {pull.chunk_bytes(message.offset)}"
            self._give_up_source(pull, text, now_s, is_gone=False)
            return
        pull.in_flight.remove(message.offset)
        self._do(WriteChunk(pull.object_id, pull.arena_offset + message.offset, message.chunk))
        self._ask_for_chunks(pull)

    def _on_peer_lost(self, event: PeerLost, now_s: float) -> None:
        for pull in list(self.pulls.values()):
            if event.node_id not in pull.failures_by_source:
                continue
            pull.dead.append(event.node_id)
            if pull.source == event.node_id and pull.transfer:
                self._give_up_source(pull, "the node is gone", now_s, is_gone=True)
            else:
                del pull.failures_by_source[event.node_id]
                pull.trouble.append(f"{event.node_id}: the node is gone")
                if not pull.failures_by_source and pull.phase is Phase.WAITING:
                    self._fail(pull, "lost", self._lost_text(pull))

    def _on_time_passed(self, event: TimePassed, now_s: float) -> None:
        for pull in list(self._pull_by_transfer.values()):
            limit_s = CHUNK_WAIT_S if pull.phase is Phase.FETCHING else OPEN_WAIT_S
            if now_s - pull.progress_s >= limit_s:
                self._give_up_source(pull, f"silent for {limit_s:.0f} s", now_s, is_gone=False)

    # --- steps ---------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while (object_id := next(iter(self._waiting), None)) is not None:
            pull = self.pulls[object_id]
            if self.claimed_bytes and self.claimed_bytes + pull.size_bytes > self.pull_bytes_max:
                return
            del self._waiting[object_id]
            pull.phase = Phase.ALLOCATING
            self.claimed_bytes += pull.size_bytes
            self._do(AllocateForPull(object_id, pull.size_bytes))

    def _open_source(self, pull: Pull, now_s: float) -> None:
        if not pull.failures_by_source:
            self._fail(pull, "lost", self._lost_text(pull))
            return
        # The one that failed least, then the least busy; the caller's order decides among equals.
        pull.source = min(
            pull.failures_by_source,
            key=lambda node_id: (pull.failures_by_source[node_id], self._transfers_by_source[node_id]),
        )
        self._last_transfer += 1
        pull.transfer = self._last_transfer
        pull.progress_s = now_s
        self._pull_by_transfer[pull.transfer] = pull
        self._transfers_by_source[pull.source] += 1
        self._do(SendToNode(pull.source, OpenTransfer(pull.transfer, pull.object_id)))

    def _ask_for_chunks(self, pull: Pull) -> None:
        while pull.missing and len(pull.in_flight) < self.window_chunks:
            offset = pull.missing.popleft()
            pull.in_flight.add(offset)
            self._tell(pull, SendChunk(pull.transfer, offset, pull.chunk_bytes(offset)))
        if not pull.in_flight:
            self._end(pull)
            # In this order: the requesters' pins wait for the seal, so that no other request can have
            # the copy evicted between the two.
            self._do(ReportPulled(pull.object_id, list(pull.requesters)))
            self._do(SealPull(pull.object_id))

    def _give_up_source(self, pull: Pull, text: str, now_s: float, *, is_gone: bool) -> None:
        pull.trouble.append(f"{pull.source}: {text}")
        pull.failures_by_source[pull.source] += 1
        if is_gone and pull.source not in pull.dead:
            pull.gone.append(pull.source)
        if is_gone or pull.failures_by_source[pull.source] >= TRIES_MAX:
            del pull.failures_by_source[pull.source]
        self._close_source(pull)
        pull.missing.extendleft(sorted(pull.in_flight, reverse=True))
        pull.in_flight.clear()
        if pull.phase is Phase.FETCHING:
            pull.phase = Phase.OPENING
        self._open_source(pull, now_s)

    def _close_source(self, pull: Pull) -> None:
        if pull.transfer:
            self._tell(pull, CloseTransfer(pull.transfer))
            del self._pull_by_transfer[pull.transfer]
            self._transfers_by_source[pull.source] -= 1
            pull.transfer = 0

    def _fail(self, pull: Pull, kind: str, text: str) -> None:
        self._drop(pull)
        self._do(ReportPullFailed(pull.object_id, list(pull.requesters), kind, text, pull.gone, pull.dead))

    def _drop(self, pull: Pull) -> None:
        if pull.phase in CLAIMING:
            self._do(AbortPull(pull.object_id))
        self._end(pull)

    def _end(self, pull: Pull) -> None:
        self._close_source(pull)
        self._waiting.pop(pull.object_id, None)
        if pull.phase in CLAIMING:
            self.claimed_bytes -= pull.size_bytes
        del self.pulls[pull.object_id]

    def _tell(self, pull: Pull, message: Message) -> None:
        self._do(SendToNode(pull.source, message))

    def _do(self, command: TransferCommand) -> None:
        self._commands.append(command)

    def _lost_text(self, pull: Pull) -> str:
        story = "; ".join(pull.trouble[-5:]) or "no node was said to have a copy"
        return f"object {pull.object_id} could not be copied here, no source is left ({story})"
