from __future__ import annotations

import pytest

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.messages import Address, Reference, StoredValue, TaskStatus, ValuePart
from tests.core.machines import DRIVER, NODE, Owner, make_result, make_task, of_type, sent

OTHER = Address("n1", "w9")
THEIRS = Reference(OTHER, 7)


@pytest.fixture
def owner() -> Owner:
    """An owner with a lease set (number 1)."""
    owner = Owner()
    owner.open_set()
    return owner


def submit_with(
    owner: Owner, number: int, *dependencies: Reference, references: list[Reference] | None = None
) -> list[e.Command]:
    arguments = e.TaskArguments(list(dependencies), references or [])
    task = make_task(number, sink=None, references=references or [])
    return owner.handle(e.TaskWithArgumentsSubmitted(1, "", task, arguments))


def known(commands: list[e.Command]) -> list[tuple[Address, int]]:
    return [key for command in of_type(commands, e.ValuesKnown) for key in command.keys]


# --- arguments


def test_a_task_starts_when_the_last_of_its_arguments_is_known(owner: Owner) -> None:
    owner.submit(make_task(1, sink=None), make_task(2, sink=None))
    submit_with(owner, 3, Reference(DRIVER, 1), Reference(DRIVER, 2))
    for lease, name in enumerate(("w1", "w2"), 1):
        owner.grant(1, name, lease=lease)
    assert not sent(owner.finish("w1", make_result(1, payload=b"a")), m.StartTasks)
    (start,) = sent(owner.finish("w2", make_result(2, payload=b"b")), m.StartTasks)
    (spec,) = start.tasks
    assert spec.extras is not None
    assert [value.payload for value in spec.extras.arguments] == [b"a", b"b"]


def test_the_same_argument_twice_is_two_arguments(owner: Owner) -> None:
    owner.submit(make_task(1, sink=None))
    submit_with(owner, 2, Reference(DRIVER, 1), Reference(DRIVER, 1))
    owner.grant(1, "w1")
    (start,) = sent(owner.finish("w1", make_result(1, payload=b"a")), m.StartTasks)
    assert start.tasks[0].extras is not None
    assert [value.payload for value in start.tasks[0].extras.arguments] == [b"a", b"a"]


def test_the_error_of_an_argument_becomes_the_error_of_the_task(owner: Owner) -> None:
    owner.submit(make_task(1, sink=None))
    submit_with(owner, 2, Reference(DRIVER, 1))
    owner.grant(1, "w1")
    commands = owner.finish("w1", make_result(1, TaskStatus.ERROR, b"error"))
    assert not sent(commands, m.StartTasks)
    value = owner.value_of(Reference(DRIVER, 2))
    assert value is not None
    assert value.error == b"error"
    assert owner.machine.tasks == {}


def test_an_argument_that_nobody_else_has_goes_once_with_the_task_that_fails_for_it(owner: Owner) -> None:
    owner.submit(make_task(1, sink=None))
    submit_with(owner, 2, Reference(DRIVER, 1))
    owner.handle(e.ReferencesDropped([(DRIVER, 1)]))
    owner.grant(1, "w1")
    owner.finish("w1", make_result(1, TaskStatus.ERROR, b"error"))
    assert list(owner.machine.objects.table.owned) == [2]


def test_a_question_to_a_process_that_has_died_is_forgotten(owner: Owner) -> None:
    owner.handle(e.ReferencesHeld([THEIRS]))
    owner.handle(e.ValueWanted(THEIRS))
    owner.handle(e.MessageArrived(NODE, m.ProcessEnded(OTHER, "killed")))
    owner.handle(e.ReferencesDropped([(OTHER, 7)]))
    assert owner.machine.objects._asked == {}


def test_a_cancelled_task_does_not_start_when_its_argument_comes(owner: Owner) -> None:
    owner.submit(make_task(1, sink=None))
    submit_with(owner, 2, Reference(DRIVER, 1))
    owner.handle(e.TaskCancelAsked(2, False))
    assert owner.machine.cancelled
    owner.grant(1, "w1")
    assert not sent(owner.finish("w1", make_result(1)), m.StartTasks)


# --- values of others


def test_the_owner_of_an_argument_is_asked_once(owner: Owner) -> None:
    owner.handle(e.ReferencesHeld([THEIRS]))
    first = submit_with(owner, 1, THEIRS)
    second = submit_with(owner, 2, THEIRS)
    (question,) = sent(first + second, m.ResolveObject, OTHER)
    assert question.number == THEIRS.number
    commands = owner.hear(OTHER, m.ObjectResolved(question.request, ValuePart(payload=b"v")))
    assert known(commands) == [(OTHER, 7)]
    assert sum(message.count for message in sent(commands, m.RequestWorkers)) == 2


def test_an_answer_for_what_was_let_go_lets_its_inner_references_go(owner: Owner) -> None:
    owner.handle(e.ReferencesHeld([THEIRS]))
    (question,) = sent(owner.handle(e.ValueWanted(THEIRS)), m.ResolveObject)
    owner.handle(e.ReferencesDropped([(OTHER, 7)]))
    inner = Reference(OTHER, 8)
    commands = owner.hear(OTHER, m.ObjectResolved(question.request, ValuePart(references=[inner])))
    assert sent(commands, m.RemoveBorrower, OTHER) == [m.RemoveBorrower([8], [1])]
    assert owner.machine.objects.table.borrowed == {}


def test_two_answers_for_one_object_do_not_hold_its_inner_references_twice(owner: Owner) -> None:
    inner = Reference(OTHER, 8)
    value = ValuePart(payload=b"v", references=[inner])
    questions = []
    for _ in range(2):  # let go and borrowed again while the first answer was on its way
        owner.handle(e.ReferencesHeld([THEIRS]))
        questions += sent(owner.handle(e.ValueWanted(THEIRS)), m.ResolveObject)
        if len(questions) == 1:
            owner.handle(e.ReferencesDropped([(OTHER, 7)]))
    for question in questions:
        owner.hear(OTHER, m.ObjectResolved(question.request, value))
    owner.handle(e.ReferencesDropped([(OTHER, 7)]))
    assert owner.machine.objects.table.borrowed == {}


def test_the_death_of_an_owner_loses_unknown_values_and_keeps_known_ones(owner: Owner) -> None:
    other_too = Reference(OTHER, 9)
    owner.handle(e.ReferencesHeld([THEIRS, other_too]))
    (question,) = sent(owner.handle(e.ValueWanted(other_too)), m.ResolveObject)
    owner.hear(OTHER, m.ObjectResolved(question.request, ValuePart(payload=b"v")))
    commands = owner.hear(NODE, m.ProcessEnded(OTHER, "killed"))
    assert known(commands) == [(OTHER, 7)]
    lost, kept = owner.value_of(THEIRS), owner.value_of(other_too)
    assert lost is not None
    assert kept is not None
    assert (lost.lost_kind, kept.payload) == ("owner_died", b"v")


# --- our values for others


def test_a_borrower_is_answered_when_the_value_is_there(owner: Owner) -> None:
    owner.submit(make_task(1, sink=None))
    owner.grant(1, "w1")
    assert not sent(owner.hear(OTHER, m.ResolveObject(5, 1)), m.ObjectResolved)
    commands = owner.finish("w1", make_result(1, payload=b"v"))
    assert sent(commands, m.ObjectResolved, OTHER) == [m.ObjectResolved(5, ValuePart(payload=b"v"))]


def test_references_in_an_answer_are_handed_over_before_it(owner: Owner) -> None:
    owner.handle(e.ReferencesHeld([THEIRS]))
    owner.handle(e.ReferencesMade([THEIRS]))
    owner.put(500, ValuePart(payload=b"[ref]", references=[THEIRS]))
    asker = Address("n2", "w8")
    commands = owner.hear(asker, m.ResolveObject(5, 500))
    messages = [command.message for command in of_type(commands, e.Send)]
    assert [type(message) for message in messages if not isinstance(message, m.WatchProcess)] == [
        m.AddBorrower,
        m.ObjectResolved,
    ]
    assert sent(commands, m.AddBorrower, OTHER) == [m.AddBorrower(asker, [7])]


def test_an_object_that_was_freed_is_reported_as_lost(owner: Owner) -> None:
    (answer,) = sent(owner.hear(OTHER, m.ResolveObject(5, 12345)), m.ObjectResolved, OTHER)
    assert answer.value.lost_kind == "object_lost"


def test_the_stored_copies_of_an_object_go_with_it(owner: Owner) -> None:
    owner.put(500, ValuePart(stored=StoredValue("d1.500", 10**6, ["n1", "n2"])))
    commands = owner.handle(e.ReferencesDropped([(DRIVER, 500)]))
    assert (
        sent(commands, m.FreeObjects, NODE)
        == sent(commands, m.FreeObjects, Address("n2", "n2"))
        == [m.FreeObjects(["d1.500"])]
    )


@pytest.mark.parametrize(("node_ids", "left"), [(["n1", "n2"], ["n1"]), (["n2", "n1", "n3"], ["n1", "n3"])])
def test_a_lost_node_is_forgotten_as_a_holder_of_copies(owner: Owner, node_ids: list[str], left: list[str]) -> None:
    reference = owner.put(500, ValuePart(stored=StoredValue("d1.500", 10**6, node_ids)))
    owner.hear(NODE, m.NodeLost("n2", "silent"))
    value = owner.value_of(reference)
    assert value is not None
    assert value.stored is not None
    assert value.stored.node_ids == left


# --- streams


def item(index: int, payload: bytes) -> m.StreamItem:
    return m.StreamItem(1, index, ValuePart(payload=payload))


def test_the_items_of_a_retried_generator_come_once(owner: Owner) -> None:
    stream = owner.machine.objects.open_stream(1)
    owner.submit(make_task(1, sink=None, returns=-1))
    owner.grant(1, "w1")
    worker = Address("n1", "w1")
    for index, payload in [(0, b"a"), (1, b"b"), (0, b"a"), (1, b"b"), (2, b"c")]:
        owner.hear(worker, item(index, payload))
    owner.finish("w1", make_result(1, TaskStatus.STREAM_END, b"3"))
    values = [owner.value_of(Reference(DRIVER, number)) for number in stream.items]
    assert [value.payload for value in values if value is not None] == [b"a", b"b", b"c"]
    assert (stream.is_ended, stream.count) == (True, 3)


def test_a_generator_that_raises_ends_with_its_error(owner: Owner) -> None:
    stream = owner.machine.objects.open_stream(1)
    owner.submit(make_task(1, sink=None, returns=-1))
    owner.grant(1, "w1")
    owner.hear(Address("n1", "w1"), item(0, b"a"))
    owner.finish("w1", make_result(1, TaskStatus.ERROR, b"error"))
    last = owner.value_of(Reference(DRIVER, stream.items[-1]))
    assert stream.is_ended
    assert last is not None
    assert last.error == b"error"


def test_items_of_a_closed_stream_let_go_of_their_references(owner: Owner) -> None:
    commands = owner.hear(OTHER, m.StreamItem(1, 0, ValuePart(references=[THEIRS])))
    assert sent(commands, m.RemoveBorrower, OTHER) == [m.RemoveBorrower([7], [1])]
    assert owner.machine.objects.table.borrowed == {}


# --- lives of nodes


def test_the_references_inside_an_object_that_is_lost_with_its_node_go_with_it(owner: Owner) -> None:
    stored = StoredValue("d1.5", 10**6, ["n2"])
    owner.handle(e.ReferencesHeld([THEIRS]))  # as it came inside the value
    owner.put(5, ValuePart(stored=stored, references=[THEIRS]))
    owner.handle(e.MessageArrived(NODE, m.NodeLost("n2", "silent")))
    owner.handle(e.ReferencesDropped([(DRIVER, 5)]))
    assert not owner.machine.objects.table.borrowed


def test_what_was_handed_out_in_a_former_life_is_not_given_back_in_the_next(owner: Owner) -> None:
    there = Address("n2", "d2")
    owner.handle(e.ReferencesHeld([Reference(there, 7)]))
    # Its node was taken for dead, and has counted us out as well; the process itself lives on.
    owner.handle(e.MessageArrived(NODE, m.NodeLost("n2", "silent")))
    (given_back,) = sent(owner.handle(e.ReferencesDropped([(there, 7)])), m.RemoveBorrower)
    assert given_back.counts == [0]
