"""Who gathers the parts of a split chunk, on a runtime that loads what it is told to."""

from __future__ import annotations

from typing import Any

from clusterpool import errors
from clusterpool.client.split_chunk import ChunkGatherer, ItemFailure, chunk_text
from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.dispatch import Task
from clusterpool.core.messages import TaskKind, TaskResult, TaskSpec, TaskStatus, ValuePart

SPEC = TaskSpec(1024, 1, TaskKind.MAP, b"items")


class Sink:
    def __init__(self) -> None:
        self.done: list[Any] = []

    def item_index(self, index: int, position: int) -> int:
        return index * 100 + position

    def task_done(self, index: int, value: Any, error: BaseException | None, worker: Any) -> None:
        self.done.append((index, value if error is None else error))

    def chunk_done(self, index: int, values: list[Any], worker: Any) -> None:
        self.done.append((index, values))


class FakeRuntime:
    """Parts in messages are loaded at once; stored ones when the test says so."""

    def __init__(self) -> None:
        self.client = self
        self.events: list[e.Event] = []
        self.stored: list[Task] = []

    def handle_event(self, event: e.Event) -> None:
        self.events.append(event)

    def load_result(self, task: Task, result: TaskResult, worker: Any) -> None:
        if result.status == TaskStatus.STORED:
            self.stored.append(task)
        else:
            task.sink.task_done(task.index, list(result.payload), None, worker)


def stored(low: int, high: int) -> e.ChunkPart:
    value = ValuePart(stored=m.StoredValue("d1.1025", 10**6, ["n2"]))
    return e.ChunkPart(low, high, TaskResult(1024, TaskStatus.STORED, b"", m.ResultExtras(value)), "")


def inline(low: int, high: int) -> e.ChunkPart:
    return e.ChunkPart(low, high, TaskResult(1024, TaskStatus.OK, bytes(range(low, high))), "")


def test_parts_are_read_in_order_and_then_the_owner_is_told() -> None:
    runtime, sink = FakeRuntime(), Sink()
    chunk = e.DeliverChunk(Task(SPEC, sink, 7), [inline(0, 2), stored(2, 3), inline(3, 5)], None)
    ChunkGatherer(runtime, chunk, None).start()  # type: ignore[arg-type]
    assert not sink.done and not runtime.events
    (part,) = runtime.stored
    part.sink.task_done(part.index, [2], None, None)
    assert sink.done == [(7, [0, 1, 2, 3, 4])] and runtime.events == [e.ChunkRead(1024)]


def test_a_part_that_was_lost_may_come_back_in_parts_one_of_which_failed() -> None:
    runtime, sink = FakeRuntime(), Sink()
    chunk = e.DeliverChunk(Task(SPEC, sink, 1), [stored(0, 3), inline(3, 4)], None)
    ChunkGatherer(runtime, chunk, None).start()  # type: ignore[arg-type]
    lost = runtime.stored[0]
    again = e.DeliverChunk(Task(SPEC, lost.sink, lost.index), [inline(0, 2), e.ChunkPart(2, 3, None, "crashed")], None)
    ChunkGatherer(runtime, again, None).start()  # type: ignore[arg-type]
    ((index, values),) = sink.done
    assert index == 1 and values[:2] == [0, 1] and values[3:] == [3]
    assert type(values[2]) is ItemFailure and isinstance(values[2].error, errors.WorkerDied)
    assert str(values[2].error) == "item 102 of the iterable was not done: crashed"


def test_a_chunk_that_is_not_run_again_names_the_item_that_ended_its_worker() -> None:
    task = Task(SPEC, Sink(), 1)
    text = chunk_text(task, "crashed", m.LastTask(1024, 1024, 2, 10))
    assert text.startswith("item 102 of the iterable ended its worker") and "items 100 to 109" in text
    assert text.endswith(": crashed")
    text = chunk_text(task, "crashed", m.LastTask(1024, 1024, 8, 10, 4))
    assert text.startswith("one of the items 108 to 109 of the iterable ended its worker")
    assert chunk_text(task, "crashed", None) == "item 100 of the iterable was not done: crashed"
    assert chunk_text(Task(SPEC, object(), 1), "crashed", m.LastTask(1024, 1024, 2, 10)) == "crashed"
