"""Chunks whose worker died: they go on in spans of their items, so that one bad item does not cost the others.

    item 5 of 0..9 has killed the worker:   [0..9]  -->  [0..4] [5] [6..9]

The spans run one after another under the number of the chunk's task, with the same payload; `part` keeps the stored
results of different spans apart. Each item has as many retries as the task had. Results are kept until the last span
has ended, and go to the sink together, with an error in the place of each item that failed.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from clusterpool.core.dispatch import Task
from clusterpool.core.messages import ChunkSpan, LastTask, TaskExtras, TaskKind, TaskResult, TaskStatus, WorkerPart
from clusterpool.core.owner_events import ChunkPart, Command, DeliverChunk

# Object numbers of the results are numbered from the task's own number on, and these lie 1024 apart.
PARTS_MAX = 1000
_CHUNKS = (TaskKind.MAP, TaskKind.STARMAP)
_DONE = (TaskStatus.OK, TaskStatus.STORED)


class _Progress:
    """One chunk. `spans`: still to be run, in order; the first runs, or waits to."""

    __slots__ = ("deaths_by_item", "deaths_unknown", "parts", "parts_sent", "retries", "spans")

    def __init__(self, items: int, retries: int) -> None:
        self.spans: list[tuple[int, int]] = [(0, items)]
        self.parts: list[ChunkPart] = []
        self.parts_sent = 0
        self.retries = retries  # of each item
        self.deaths_by_item: dict[int, int] = {}
        self.deaths_unknown = 0  # of workers that did not say which item they ran


class ChunkTable:
    """The split chunks of one owner, by task number. `keep` and `discard`: of a result that nobody has yet."""

    def __init__(self, keep: Callable[[TaskResult], None], discard: Callable[[TaskResult], list[Command]]) -> None:
        self._keep = keep
        self._discard = discard
        self._progress: dict[int, _Progress] = {}

    def __bool__(self) -> bool:
        return bool(self._progress)

    def __contains__(self, number: int) -> bool:
        return number in self._progress

    def is_split(self, task: Task, last: LastTask) -> bool:
        """Whether a task that ended with its worker is to go on item by item."""
        number = task.spec.number
        if number in self._progress:
            return True
        is_known = last.running == number and 0 <= last.item < last.items
        return is_known and last.items > 1 and task.spec.kind in _CHUNKS

    def died(self, task: Task, last: LastTask, text: str) -> int:
        """The chunk ended with its worker; how often the item that is next has done so before."""
        number = task.spec.number
        progress = self._progress.get(number)
        if progress is None:
            progress = self._progress[number] = _Progress(last.items, task.retries_left)
        low, high = progress.spans.pop(0)
        item = last.item if last.running == number and low <= last.item < high else -1
        if high - low == 1:
            item = low
        elif item >= 0 and last.step > 1:
            # One of several tiny items, and nobody knows which: a chunk that has been split runs them one by one.
            after = min(item + last.step, high)
            spans = [(low, item), (item, after), (after, high)]
            progress.spans[:0] = [span for span in spans if span[0] < span[1]]
            self._aim(task, progress)
            return 0
        if item < 0:
            progress.deaths_unknown += 1
            deaths, item, after = progress.deaths_unknown, low, high
        else:
            deaths = progress.deaths_by_item[item] = progress.deaths_by_item.get(item, 0) + 1
            after = item + 1
        is_hopeless = deaths > progress.retries
        if is_hopeless:
            progress.parts.append(ChunkPart(item, after, None, text))
        spans = [(low, item), (item, after) if not is_hopeless else (after, after), (after, high)]
        progress.spans[:0] = [span for span in spans if span[0] < span[1]]
        if progress.parts_sent + len(progress.spans) > PARTS_MAX:  # hundreds of its items have killed their workers
            progress.parts += [ChunkPart(*span, None, text) for span in progress.spans]
            progress.spans.clear()
        self._aim(task, progress)
        return progress.deaths_by_item.get(progress.spans[0][0], 0) if progress.spans else 0

    def finished(self, task: Task, result: TaskResult) -> tuple[bool, list[Command]]:
        """A span has ended; whether the chunk goes on. If it does not, and `end_if_done` has nothing, the result is
        the whole chunk's.
        """
        progress = self._progress[task.spec.number]
        if result.status not in _DONE:  # an exception of the user's is the chunk's, as in the standard library
            return False, self.drop(task.spec.number)
        if result.extras is not None:
            self._keep(result)
        low, high = progress.spans.pop(0)
        progress.parts.append(ChunkPart(low, high, result, ""))
        self._aim(task, progress)
        return bool(progress.spans), []

    def resume(self, task: Task, low: int, high: int) -> None:
        """Of a chunk that had ended, the result of these items is lost: the task is to run them again."""
        progress = self._progress[task.spec.number] = _Progress(high, task.retries_left)
        progress.spans = [(low, high)]
        self._aim(task, progress)

    def end_if_done(self, task: Task, worker: WorkerPart | None, set_number: int = 0) -> DeliverChunk | None:
        """What to hand out once nothing of the chunk is left to run."""
        progress = self._progress.get(task.spec.number)
        if progress is None or progress.spans:
            return None
        del self._progress[task.spec.number]
        return DeliverChunk(task, sorted(progress.parts, key=lambda part: part.low), worker, set_number)

    def drop(self, number: int) -> list[Command]:
        """The chunk has ended as a whole, in another way: free what is there of it."""
        progress = self._progress.pop(number, None)
        if progress is None:
            return []
        kept = [part.result for part in progress.parts if part.result is not None and part.result.extras is not None]
        return [command for result in kept for command in self._discard(result)]

    def attempts_of(self, task: Task) -> tuple[int, int]:
        """Which attempt at its first item runs, and how many there are."""
        progress = self._progress.get(task.spec.number)
        if progress is None or not progress.spans:
            return 1, 1
        return progress.deaths_by_item.get(progress.spans[0][0], 0) + 1, progress.retries + 1

    def _aim(self, task: Task, progress: _Progress) -> None:
        if not progress.spans:
            return
        progress.parts_sent += 1
        span = ChunkSpan(*progress.spans[0], progress.parts_sent)
        extras = msgspec.structs.replace(task.spec.extras or TaskExtras(), span=span)
        task.spec = msgspec.structs.replace(task.spec, extras=extras)
