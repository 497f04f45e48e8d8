"""Which worker a node ends when memory runs out, before the kernel ends something less well chosen.

    calm --use at the threshold--> [who has what?] --a worker matters--> ending --gone, or PATIENCE_S--> calm
      ^                                  +--none does: say so-->+           (readings meanwhile change nothing)
      +---------------------------------------------------------+

One worker at a time, and a fresh reading after its end: what one reading shows may be the doing of one worker. Among
those whose end would help, the one whose loss costs least: idle ones, then tasks that are tried again, then other
tasks, and actors and processes last; of these the newest of the large ones, since what has run longest would take
longest to repeat. (Ray's policy, too, is retriable and newest first; its threshold is 95 % as well.)
"""

from __future__ import annotations

from typing import NamedTuple

from clusterpool.core import messages as m
from clusterpool.core.leases import Worker
from clusterpool.core.messages import WorkerKind
from clusterpool.core.node_events import Command, EndWorker, MemoryRead, ReadMemory, Send, WarnOfMemory
from clusterpool.core.scheduler import Scheduler
from clusterpool.sizes import memory_amount

# Lower wastes memory that tasks could use; higher leaves the kernel too little time on a machine of a few GB.
THRESHOLD_DEFAULT = 0.95
# Readings while there is room. A machine fills up at 1 to 2 GB/s (writing fresh pages, measured), so with less room
# than that gives in this time the next reading comes sooner; one costs about 0.1 ms.
INTERVAL_MAX_S = 0.25
INTERVAL_MIN_S = 0.02
GROWTH_BYTES_PER_S = 2e9
# For how long a worker that got SIGKILL is waited for; the kernel takes some 0.1 s a GB to free its memory.
PATIENCE_S = 5.0
# A worker with less than this part of the limit is not worth ending, unless it is among the largest.
GAIN_MIN = 0.05
# When all workers together have less than this, others use the memory, and ending workers would not help.
SHARE_MIN = 0.05
# That memory runs out through no fault of the workers is said again after so long.
WARNING_INTERVAL_S = 60.0
_SHOWN_MAX = 5


class _Candidate(NamedTuple):
    worker: Worker
    size_bytes: int
    rank: int  # lower goes first
    age: int  # the number of its lease: higher is newer


class MemoryMonitor:
    """One node's. `handle` gets a reading and says when to read next, and who has to go."""

    def __init__(self, scheduler: Scheduler, *, threshold: float = THRESHOLD_DEFAULT) -> None:
        self.threshold = threshold
        self._scheduler = scheduler
        self._ending = ""  # process id of the worker that was ended, until it is gone
        self._ended_s = 0.0
        self._warned_s: float | None = None

    def handle(self, event: MemoryRead, now_s: float) -> list[Command]:
        """Take in a reading."""
        headroom_bytes = self.threshold * event.limit_bytes - event.used_bytes
        if self._ending:
            if self._ending in self._scheduler.workers and now_s - self._ended_s < PATIENCE_S:
                return [ReadMemory(INTERVAL_MIN_S, False)]
            self._ending = ""
        if headroom_bytes > 0:
            wait_s = min(max(headroom_bytes / GROWTH_BYTES_PER_S, INTERVAL_MIN_S), INTERVAL_MAX_S)
            return [ReadMemory(wait_s, False)]
        if event.bytes_by_worker is None:
            return [ReadMemory(0.0, True)]
        chosen = self._choose(event.bytes_by_worker, event.limit_bytes)
        if chosen is None:
            return [*self._warn(event, now_s), ReadMemory(INTERVAL_MAX_S, False)]
        return [*self._end(chosen, event, now_s), ReadMemory(INTERVAL_MIN_S, False)]

    def _choose(self, bytes_by_worker: dict[str, int], limit_bytes: int) -> _Candidate | None:
        candidates = [
            _Candidate(worker, bytes_by_worker[process_id], _rank(worker), worker.lease.number if worker.lease else 0)
            for process_id, worker in self._scheduler.workers.items()
            if process_id in bytes_by_worker and not worker.is_ending
        ]
        if sum(candidate.size_bytes for candidate in candidates) < SHARE_MIN * limit_bytes or not candidates:
            return None
        largest_bytes = max(candidate.size_bytes for candidate in candidates)
        worthwhile = min(GAIN_MIN * limit_bytes, largest_bytes / 2)
        candidates = [candidate for candidate in candidates if candidate.size_bytes >= worthwhile]
        rank = min(candidate.rank for candidate in candidates)
        candidates = [candidate for candidate in candidates if candidate.rank == rank]
        largest_bytes = max(candidate.size_bytes for candidate in candidates)
        large = [candidate for candidate in candidates if candidate.size_bytes >= largest_bytes / 2]
        return max(large, key=lambda candidate: (candidate.age, candidate.size_bytes))

    def _end(self, chosen: _Candidate, event: MemoryRead, now_s: float) -> list[Command]:
        worker = chosen.worker
        node_id = self._scheduler.node_id
        text = (
            f"worker {worker.process_id} ({worker.name or 'task'}, pid {worker.pid}) on node {node_id} was ended by "
            f"its node because memory was about to run out: {self._use(event)}, {memory_amount(chosen.size_bytes)} of "
            f"them by this worker; {self._consumers(event)}; use fewer workers, or say memory= for each task, so that "
            "fewer run at once"
        )
        worker.is_ending = True
        worker.end_text = text
        worker.end_cause = m.EndCause.OUT_OF_MEMORY
        self._ending, self._ended_s = worker.process_id, now_s
        lines = m.LogLines(worker.name, worker.pid, node_id, 2, [text])
        return [EndWorker(worker.process_id, m.SIGKILL, True), WarnOfMemory(text), Send(worker.job.owner, lines)]

    def _warn(self, event: MemoryRead, now_s: float) -> list[Command]:
        if self._warned_s is not None and now_s - self._warned_s < WARNING_INTERVAL_S:
            return []
        self._warned_s = now_s
        text = (
            f"memory is about to run out: {self._use(event)}; no worker of this node is ended, since together they "
            f"have too little to matter ({self._consumers(event)}): something else on this machine uses it"
        )
        return [WarnOfMemory(text)]

    def _use(self, event: MemoryRead) -> str:
        percent = 100 * event.used_bytes / max(event.limit_bytes, 1)
        return (
            f"{memory_amount(event.used_bytes)} of {memory_amount(event.limit_bytes)} of {event.where} were in use "
            f"({percent:.0f} %; {100 * self.threshold:.0f} % are allowed)"
        )

    def _consumers(self, event: MemoryRead) -> str:
        sizes = sorted((event.bytes_by_worker or {}).items(), key=lambda item: (-item[1], item[0]))
        shown = []
        for process_id, size_bytes in sizes[:_SHOWN_MAX]:
            worker = self._scheduler.workers.get(process_id)
            if worker is not None:
                shown.append(f"{worker.name or 'task'} (pid {worker.pid}) {memory_amount(size_bytes)}")
        if len(sizes) > _SHOWN_MAX:
            shown.append(
                f"{len(sizes) - _SHOWN_MAX} more workers {memory_amount(sum(size for _, size in sizes[_SHOWN_MAX:]))}"
            )
        shown.append(f"the object store {memory_amount(event.store_bytes)}")
        return "the most memory had " + ", ".join(shown)


def _rank(worker: Worker) -> int:
    lease = worker.lease
    if lease is None:
        return 0
    if lease.kind == WorkerKind.ACTOR or lease.outlives_owner:
        return 3
    return 1 if lease.is_retriable else 2
