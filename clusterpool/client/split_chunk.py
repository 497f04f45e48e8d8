"""A chunk that was run in parts, because some of its items killed their workers: its results, put together again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from clusterpool import errors
from clusterpool.client.group_worker import GroupWorker
from clusterpool.core import owner_events as e
from clusterpool.core.dispatch import Task
from clusterpool.core.messages import LastTask, TaskKind

if TYPE_CHECKING:
    from clusterpool.client.runtime import Runtime

CHUNK_KINDS = (TaskKind.MAP, TaskKind.STARMAP)


class ItemFailure(NamedTuple):
    """Stands among the results of a chunk for an item that has none."""

    error: BaseException


def item_text(task: Task, position: int, text: str) -> str:
    """`text` with the number of the user's item at this position of the chunk before it, if the sink can tell it."""
    item_index = getattr(task.sink, "item_index", None)
    if item_index is None:
        return text
    return f"item {item_index(task.index, position)} of the iterable was not done: {text}"


def chunk_text(task: Task, text: str, last: LastTask | None) -> str:
    """The same for a chunk that failed as a whole. `last`: at which item its worker ended, where that is known."""
    item_index = getattr(task.sink, "item_index", None)
    if item_index is None or last is None:
        return item_text(task, 0, text)
    bad = range(last.item, min(last.item + last.step, last.items))
    named = f"item {item_index(task.index, bad[0])}"
    if len(bad) > 1:
        named = f"one of the items {item_index(task.index, bad[0])} to {item_index(task.index, bad[-1])}"
    chunk = f"{item_index(task.index, 0)} to {item_index(task.index, last.items - 1)}"
    return (
        f"{named} of the iterable ended its worker, and without retries none of its chunk, items {chunk}, is started "
        f"twice (with retries=1 the others would be done, or with chunksize=1): {text}"
    )


class ChunkGatherer:
    """Loads the parts of a chunk, one after another, and calls its sink once. Also the sink of each part meanwhile."""

    def __init__(self, runtime: Runtime, chunk: e.DeliverChunk, worker: GroupWorker | None) -> None:
        self._runtime = runtime
        self._chunk = chunk
        self._worker = worker
        self._next = 0  # position of the part that is to be loaded
        self._is_loading = False
        self._values: list[Any] = []
        self._error: BaseException | None = None  # the first one
        self._failure: BaseException | None = None  # of loading: it is the whole chunk's

    def start(self) -> None:
        """Load what there is; the rest follows by itself."""
        if self._is_loading:
            return
        self._is_loading = True
        # A part that came in a message is loaded at once, and `task_done` called from within: hence a loop.
        parts, task = self._chunk.parts, self._chunk.task
        while self._next < len(parts):
            position = self._next
            result = parts[position].result
            if result is None:
                self._failed(parts[position])
                continue
            self._runtime.load_result(Task(task.spec, self, position), result, self._worker)
            if self._next == position:
                break  # it is stored, and comes later
        self._is_loading = False
        if self._next == len(parts):
            self._end()

    def _failed(self, part: e.ChunkPart) -> None:
        for item in range(part.low, part.high):
            error = errors.WorkerDied(item_text(self._chunk.task, item, part.text))
            self._error = self._error or error
            self._values.append(ItemFailure(error))
        self._next += 1

    def task_done(self, index: int, value: Any, error: BaseException | None, worker: GroupWorker | None) -> None:
        """A part is loaded."""
        if error is not None:
            self._failure = self._failure or error
        else:
            self._values.extend(value)
        self._next += 1
        self.start()

    def chunk_done(self, index: int, values: list[Any], worker: GroupWorker | None) -> None:
        """A part that had been lost was run again, and some of its items failed."""
        self._error = self._error or next(value.error for value in values if type(value) is ItemFailure)
        self.task_done(index, values, None, worker)

    def item_index(self, index: int, position: int) -> int:
        """Of a part that is run again; positions are the whole chunk's there, too."""
        task = self._chunk.task
        return task.sink.item_index(task.index, position) if hasattr(task.sink, "item_index") else position

    def _end(self) -> None:
        task = self._chunk.task
        if self._chunk.has_stored:
            self._runtime.client.handle_event(e.ChunkRead(task.spec.number))
        error = self._failure or self._error
        if error is None:
            task.sink.task_done(task.index, self._values, None, self._worker)
            return
        chunk_done = getattr(task.sink, "chunk_done", None)
        if chunk_done is not None and self._failure is None:
            chunk_done(task.index, self._values, self._worker)
        else:
            task.sink.task_done(task.index, None, error, self._worker)
