from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.chunks import PARTS_MAX, ChunkTable
from clusterpool.core.dispatch import Task
from clusterpool.core.messages import Address, LastTask, TaskKind, TaskSpec, TaskStatus, ValuePart
from tests.core.machines import NODE, Owner, make_result, of_type, sent

NUMBER = 1024


def make_chunk(retries: int = 1) -> Task:
    return Task(TaskSpec(NUMBER, 1, TaskKind.MAP, b"items"), "sink", 0, retries)


def make_table() -> ChunkTable:
    return ChunkTable(lambda _: None, lambda _: [])


def span(task: Task) -> tuple[int, int] | None:
    assert task.spec.extras is not None and task.spec.extras.span is not None
    return task.spec.extras.span.low, task.spec.extras.span.high


def died_at(item: int, items: int = 10) -> LastTask:
    return LastTask(NUMBER, NUMBER, item, items)


@pytest.mark.parametrize(
    ("kind", "last", "is_split"),
    [
        (TaskKind.MAP, died_at(5), True),
        (TaskKind.STARMAP, died_at(0), True),
        (TaskKind.CALL, died_at(5), False),
        (TaskKind.MAP, died_at(0, 1), False),  # there is nothing to split
        (TaskKind.MAP, LastTask(NUMBER, NUMBER, -1, 0), False),  # it had not been loaded
        (TaskKind.MAP, LastTask(), False),
        (TaskKind.MAP, LastTask(2048, 2048, 5, 10), False),  # another one ran
    ],
)
def test_a_chunk_is_split_where_the_bad_item_is_known(kind: TaskKind, last: LastTask, is_split: bool) -> None:
    task = make_chunk()
    task.spec = TaskSpec(NUMBER, 1, kind, b"items")
    assert make_table().is_split(task, last) is is_split


def test_the_items_before_run_again_then_the_bad_one_alone_then_the_rest() -> None:
    table, task = make_table(), make_chunk()
    table.died(task, died_at(5), "crashed")
    seen = [span(task)]
    while table.finished(task, make_result(NUMBER))[0]:
        seen.append(span(task))
    assert seen == [(0, 5), (5, 6), (6, 10)]
    ended = table.end_if_done(task, None)
    assert ended is not None
    assert [(part.low, part.high, part.text) for part in ended.parts] == [(0, 5, ""), (5, 6, ""), (6, 10, "")]
    assert not table


def test_of_several_tiny_items_that_were_under_way_none_is_to_blame_until_it_ran_alone() -> None:
    table, task = make_table(), make_chunk(retries=0)
    assert table.died(task, LastTask(NUMBER, NUMBER, 4, 10, 4), "one of four") == 0
    seen = [span(task)]
    table.finished(task, make_result(NUMBER))
    seen.append(span(task))
    table.died(task, died_at(6), "this one")  # item by item now
    while span(task) not in seen:
        seen.append(span(task))
        table.finished(task, make_result(NUMBER))
    assert seen == [(0, 4), (4, 8), (4, 6), (7, 8), (8, 10)]
    ended = table.end_if_done(task, None)
    assert ended is not None
    assert [(part.low, part.high) for part in ended.parts if part.text] == [(6, 7)]


def test_an_item_without_retries_left_fails_and_the_others_do_not() -> None:
    table, task = make_table(), make_chunk(retries=1)
    table.died(task, died_at(0), "crashed once")
    assert span(task) == (0, 1)
    table.died(task, died_at(0), "crashed twice")
    assert span(task) == (1, 10)
    assert table.finished(task, make_result(NUMBER)) == (False, [])
    ended = table.end_if_done(task, None)
    assert ended is not None
    assert [(part.low, part.high, part.text) for part in ended.parts] == [(0, 1, "crashed twice"), (1, 10, "")]


def test_each_item_has_its_own_retries() -> None:
    table, task = make_table(), make_chunk(retries=1)
    assert table.died(task, died_at(0), "") == 1
    table.finished(task, make_result(NUMBER))
    assert table.died(task, died_at(1), "") == 1, "the death of another item counted"
    assert table.attempts_of(task) == (2, 2)


def test_a_span_alone_is_to_blame_even_if_its_worker_said_nothing() -> None:
    table, task = make_table(), make_chunk(retries=1)
    table.died(task, died_at(0), "")
    table.died(task, LastTask(), "")
    assert span(task) == (1, 10)


def test_deaths_that_nobody_can_explain_are_bounded() -> None:
    table, task = make_table(), make_chunk(retries=2)
    table.died(task, died_at(9), "")
    for _ in range(2):
        table.died(task, LastTask(), "")
        assert span(task) == (0, 9)
    table.died(task, LastTask(), "the node is gone")
    assert span(task) == (9, 10)


def test_spans_have_parts_of_their_own_and_not_too_many() -> None:
    table, task = make_table(), make_chunk(retries=1)
    items, item = 5000, 0
    parts: list[int] = []
    while table.end_if_done(task, None) is None:
        table.died(task, died_at(item, items), "crashed")
        assert task.spec.extras is not None and task.spec.extras.span is not None
        parts.append(task.spec.extras.span.part)
        item = task.spec.extras.span.low
    assert max(parts) <= PARTS_MAX


def test_an_exception_of_the_users_is_the_chunks_and_what_was_kept_is_freed() -> None:
    freed: list[m.TaskResult] = []

    def discard(result: m.TaskResult) -> list[e.Command]:
        freed.append(result)
        return []

    table, task = ChunkTable(lambda _: None, discard), make_chunk()
    table.died(task, died_at(5), "")
    stored = m.TaskResult(NUMBER, TaskStatus.STORED, b"", m.ResultExtras(ValuePart()))
    assert table.finished(task, stored) == (True, [])
    assert table.finished(task, make_result(NUMBER, TaskStatus.ERROR)) == (False, [])
    assert table.end_if_done(task, None) is None
    assert (freed, NUMBER in table) == ([stored], False)


@given(
    items=st.integers(2, 30),
    retries=st.integers(1, 3),
    bad=st.sets(st.integers(0, 29)),
    chance=st.randoms(use_true_random=False),
)
def test_every_item_ends_in_exactly_one_part(items: int, retries: int, bad: set[int], chance: Any) -> None:
    """Bad items always kill their worker; others now and then, or the worker says nothing."""
    table, task = make_table(), make_chunk(retries)
    first = min((item for item in bad if item < items), default=chance.randrange(items))
    table.died(task, died_at(first, items), "crashed")
    for _ in range(1000):
        low, high = span(task) or (0, 0)
        ill = [item for item in range(low, high) if item in bad]
        if ill:
            last = LastTask() if chance.random() < 0.1 else died_at(ill[0], items)
            table.died(task, last, "crashed")
        elif chance.random() < 0.2:
            table.died(task, died_at(chance.randrange(low, high), items), "killed")
        else:
            table.finished(task, make_result(NUMBER))
        ended = table.end_if_done(task, None)
        if ended is not None:
            break
    else:
        raise AssertionError("it never ended")
    position = 0
    for part in ended.parts:
        assert part.low == position < part.high
        position = part.high
        if part.result is not None:
            assert not bad & set(range(part.low, part.high)), "a bad item has a result"
    assert position == items
    assert not table


# --- through the owner's machine


def owner_with_chunk(retries: int = 1) -> Owner:
    owner = Owner()
    owner.open_set(size=1)
    owner.grant(1, "w1")
    owner.submit(make_chunk(retries))
    return owner


def exit_worker(owner: Owner, name: str, last: LastTask) -> list[Any]:
    return owner.hear(NODE, m.WorkerExited(1, Address("n1", name), -11, "it crashed", last))


def test_a_split_chunk_reaches_its_sink_once_and_lets_its_arguments_go() -> None:
    owner = owner_with_chunk()
    reference = owner.put(5000)
    task = Task(TaskSpec(2048, 1, TaskKind.MAP, b"items", m.TaskExtras(references=[reference])), "sink", 0, 1)
    owner.finish("w1", make_result(NUMBER))
    owner.handle(e.TaskWithArgumentsSubmitted(1, "", task, e.TaskArguments([], [reference])))
    owner.handle(e.ReferencesDropped([(reference.owner, reference.number)]))
    last = LastTask(2048, 2048, 3, 4)
    exit_worker(owner, "w1", last)
    for request, name in ((2, "w2"), (3, "w3")):
        owner.grant(request, name)
        if name == "w2":
            owner.finish(name, make_result(2048))
            assert owner.value_of(reference) is not None
            exit_worker(owner, name, last)
    assert not owner.machine.tasks and not owner.machine.chunks
    assert owner.value_of(reference).lost_kind == "object_lost"  # type: ignore[union-attr]


def test_a_chunk_that_is_cancelled_between_its_parts_frees_what_was_stored() -> None:
    owner = owner_with_chunk()
    exit_worker(owner, "w1", died_at(3))
    owner.grant(2, "w2")
    stored = m.StoredValue("d1.1025", 10**6, ["n1"])
    part = m.TaskResult(NUMBER, TaskStatus.STORED, b"", m.ResultExtras(ValuePart(stored=stored)))
    started = sent(owner.finish("w2", part), m.StartTasks)
    assert [message.tasks[0].extras.span.low for message in started] == [3]  # type: ignore[union-attr]
    owner.handle(e.TaskCancelAsked(NUMBER, True))
    commands = exit_worker(owner, "w2", died_at(3))
    assert ["d1.1025"] in [message.object_ids for message in sent(commands, m.FreeObjects)]
    assert [command.kind for command in of_type(commands, e.FailTasks)] == ["cancelled"]


# --- parts whose results are lost before they are read


def stored_part(part: int, node_id: str, attempt: int = 1) -> m.TaskResult:
    name = f"d1.{NUMBER + part}" + ("" if attempt == 1 else f"~{attempt}")
    value = ValuePart(stored=m.StoredValue(name, 10**6, [node_id]))
    return m.TaskResult(NUMBER, TaskStatus.STORED, b"", m.ResultExtras(value))


def owner_with_parts(retries: int = 1) -> tuple[Owner, e.DeliverChunk]:
    """A chunk of ten items in a closed set, whose fourth has killed a worker once; all three parts lie on n2."""
    owner = owner_with_chunk(retries)
    exit_worker(owner, "w1", died_at(3))
    owner.grant(2, "w2", node_id="n2")
    commands: list[Any] = []
    for part in (1, 2, 3):
        commands = owner.finish("w2", stored_part(part, "n2"), node_id="n2")
    (ended,) = of_type(commands, e.DeliverChunk)
    owner.handle(e.SetClosed(1))
    assert 1 in owner.machine.sets, "it may have to run something again"
    return owner, ended


def lose_part(owner: Owner, chunk: e.DeliverChunk, position: int) -> list[Any]:
    return owner.handle(e.ResultUnreadable(Task(chunk.task.spec, "gatherer", position), "its node is gone"))


def spans_of(commands: list[Any]) -> list[tuple[int, int, int]]:
    extras = [spec.extras for message in sent(commands, m.StartTasks) for spec in message.tasks]
    return [(each.span.low, each.span.high, each.attempt) for each in extras if each is not None and each.span]


def test_a_lost_part_runs_again_and_goes_to_whoever_gathers_the_parts() -> None:
    owner, chunk = owner_with_parts()
    assert spans_of(lose_part(owner, chunk, 2)) == [(4, 10, 2)]
    (again,) = of_type(owner.finish("w2", stored_part(1, "n2", 2), node_id="n2"), e.DeliverChunk)
    assert (again.task.sink, again.task.index) == ("gatherer", 2)
    assert [(part.low, part.high) for part in again.parts] == [(4, 10)]
    owner.handle(e.ChunkRead(NUMBER))
    assert 1 in owner.machine.sets
    retired = owner.handle(e.ChunkRead(NUMBER))
    assert sent(retired, m.RetireWorker)
    assert not owner.machine.recovery.unread and not owner.machine.tasks and not owner.machine.chunks


def test_a_lost_part_that_kills_its_worker_is_split_in_its_turn() -> None:
    owner, chunk = owner_with_parts(retries=2)
    lose_part(owner, chunk, 2)
    owner.hear(NODE, m.WorkerExited(1, Address("n2", "w2"), -11, "it crashed", died_at(6)))
    (request,) = owner.machine.sets[1].requested
    assert spans_of(owner.grant(request, "w3")) == [(4, 6, 2)]
    assert spans_of(owner.finish("w3", make_result(NUMBER))) == [(6, 7, 2)]
    assert spans_of(owner.finish("w3", make_result(NUMBER))) == [(7, 10, 2)]
    (again,) = of_type(owner.finish("w3", make_result(NUMBER)), e.DeliverChunk)
    assert [(part.low, part.high) for part in again.parts] == [(4, 6), (6, 7), (7, 10)]
    owner.handle(e.ChunkRead(NUMBER))
    assert not owner.machine.recovery.unread


def test_each_lost_part_costs_the_chunk_a_retry() -> None:
    owner, chunk = owner_with_parts()
    lose_part(owner, chunk, 0)
    owner.finish("w2", make_result(NUMBER), node_id="n2")
    (failed,) = of_type(lose_part(owner, chunk, 1), e.FailTasks)
    assert (failed.kind, failed.tasks[0].sink) == ("worker_died", "gatherer")


def test_the_arguments_of_a_chunk_stay_until_its_parts_are_read() -> None:
    owner = owner_with_chunk()
    reference = owner.put(5000)
    task = Task(TaskSpec(2048, 1, TaskKind.MAP, b"items", m.TaskExtras(references=[reference])), "sink", 0, 1)
    owner.finish("w1", make_result(NUMBER))
    owner.handle(e.TaskWithArgumentsSubmitted(1, "", task, e.TaskArguments([], [reference])))
    owner.handle(e.ReferencesDropped([(reference.owner, reference.number)]))
    exit_worker(owner, "w1", LastTask(2048, 2048, 0, 2))
    owner.grant(2, "w2", node_id="n2")
    value = ValuePart(stored=m.StoredValue("d1.2049", 10**6, ["n2"]))
    owner.finish("w2", m.TaskResult(2048, TaskStatus.STORED, b"", m.ResultExtras(value)), node_id="n2")
    owner.finish("w2", make_result(2048), node_id="n2")
    owner.hear(NODE, m.WorkerExited(1, Address("n2", "w2"), 0, "it has ended"))  # it had borrowed the reference
    assert owner.value_of(reference).lost_kind == ""  # type: ignore[union-attr]
    owner.handle(e.ChunkRead(2048))
    assert owner.value_of(reference).lost_kind == "object_lost"  # type: ignore[union-attr]
