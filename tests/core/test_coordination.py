"""The node's coordination machine, driven by events; where answers of a store matter, by those of the fake one."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from clusterpool.control_store.coordination import CarrierUnknown
from clusterpool.core import coordination_events as e
from clusterpool.core import coordination_messages as c
from clusterpool.core.coordination import CoordinationMachine
from clusterpool.core.coordination_events import GRANTED, LIFE_OVER, REFUSED, WAITING
from clusterpool.core.messages import Address, Message
from clusterpool.core.node_events import MessageArrived, Send
from clusterpool.simulation.fake_coordination import FakeCoordination
from tests.core.machines import T, of_type

W1, W2 = Address("na", "w1"), Address("na", "w2")
OTHER_NODE, THIRD_NODE = Address("nb", "nb"), Address("nc", "nc")
LOCK, CHANNEL, CELL = "j1-d1-1", "j1-d1-2", "j1-d1-3"
FOREIGN = "j1-wb-1"
NOW_S = 100.0


class Node:
    """A machine of node na, and shorthands for what happens to it."""

    def __init__(self, *processes: Address) -> None:
        self.incarnation: int | None = None
        self.machine = CoordinationMachine("na", lambda: processes, lambda: self.incarnation)

    def handle(self, event: Any) -> list[Any]:
        return self.machine.handle(event, NOW_S)

    def hear(self, source: Address, message: Message) -> list[Any]:
        return self.handle(MessageArrived(source, message))

    def answer(self, commands: list[Any], value: Any) -> list[Any]:
        """The store answers the one call among the commands that wants an answer."""
        (call,) = [call for call in of_type(commands, e.CallCoordination) if call.tag]
        return self.handle(e.OperationAnswered(call.tag, value))

    def fail(self, commands: list[Any], kind: str, text: str = "why") -> list[Any]:
        (call,) = [call for call in of_type(commands, e.CallCoordination) if call.tag]
        return self.handle(e.OperationFailed(call.tag, kind, text))

    def wait(self, message: c.AcquireToken | c.GetItem, source: Address = W1) -> list[Any]:
        """A process asks and has to wait; the question."""
        commands = self.hear(source, message)
        assert self.answer(commands, (WAITING, 0)) == []
        return commands


@pytest.fixture
def node() -> Node:
    return Node()


def sent(commands: list[Any], kind: type[T], to: Address | None = None) -> list[T]:
    return [
        command.message
        for command in of_type(commands, Send)
        if isinstance(command.message, kind) and to in (None, command.destination)
    ]


def calls(commands: list[Any]) -> list[tuple[Any, ...]]:
    return [(call.operation, *call.arguments) for call in of_type(commands, e.CallCoordination)]


def done(commands: list[Any], to: Address = W1) -> list[tuple[int, int, bytes]]:
    return [(message.request, message.number, message.content) for message in sent(commands, c.CoordinationDone, to)]


def failed(commands: list[Any], to: Address = W1) -> list[tuple[int, str]]:
    return [(message.request, message.kind) for message in sent(commands, c.CoordinationFailed, to)]


# --- waits


@pytest.mark.parametrize(
    ("answer", "number"),
    [((GRANTED, 7), 7), ((REFUSED, 0), 0)],
)
def test_what_the_store_decides_at_once_is_told_at_once(node: Node, answer: Any, number: int) -> None:
    commands = node.hear(W1, c.AcquireToken(1, LOCK, False))
    assert calls(commands) == [("acquire", LOCK, "na/w1/1", False)]
    assert done(node.answer(commands, answer)) == [(1, number, b"")]


def test_a_grant_that_is_read_again_changes_nothing(node: Node) -> None:
    node.wait(c.AcquireToken(1, LOCK, True))
    node.wait(c.AcquireToken(2, LOCK, True))
    assert done(node.handle(e.GrantRead("na/w1/1", LOCK, 9))) == [(1, 9, b"")]
    # The server was restarted before it heard that this was read: to give it back would take it from its holder.
    node.handle(e.StoreChanged())
    assert node.handle(e.GrantRead("na/w1/1", LOCK, 9)) == []
    node.hear(W1, c.ReleaseToken(3, LOCK, 1, acquired=1))
    assert node.handle(e.GrantRead("na/w1/1", LOCK, 9)) == []
    assert done(node.handle(e.GrantRead("na/w1/2", LOCK, 10))) == [(2, 10, b"")]
    assert node.handle(e.GrantRead("na/w1/1", LOCK, 9)) == []


def test_a_grant_that_nobody_waits_for_is_given_back_by_its_token(node: Node) -> None:
    node.wait(c.AcquireToken(1, LOCK, True))
    node.handle(e.GrantRead("na/w1/1", LOCK, 9))
    assert calls(node.handle(e.GrantRead("na/w1/1", LOCK, 10))) == [("give_back", LOCK, "na/w1/1", 10)]


def test_tokens_read_are_known_of_the_latest_carriers_only(node: Node) -> None:
    for number in range(10_001):
        node.handle(e.GrantRead("na/gone/1", f"j1-d1-{number}", 1))
    assert node.handle(e.GrantRead("na/gone/1", "j1-d1-10000", 1)) == []
    assert node.handle(e.GrantRead("na/gone/1", "j1-d1-0", 1)) != []


def test_a_grant_of_nothing_has_one_or_all_ask_again(node: Node) -> None:
    node.wait(c.AcquireToken(1, LOCK, True))
    node.wait(c.GetItem(2, CHANNEL, True))
    again = node.handle(e.GrantRead("na/w1/1", LOCK, 0))
    assert calls(again) == [("acquire", LOCK, "na/w1/1", True)]
    assert done(again) == [] and node.answer(again, (WAITING, 0)) == []
    assert calls(node.handle(e.GrantRead("", "", 0))) == [
        ("acquire", LOCK, "na/w1/1", True), ("get", CHANNEL, "na/w1/2", True)
    ]  # fmt: skip
    assert node.handle(e.GrantRead("na/w1/9", LOCK, 0)) == []
    node.wait(c.AcquireToken(3, LOCK, True))
    assert failed(node.fail(node.handle(e.GrantRead("na/w1/3", LOCK, 0)), "CarrierUnknown")) == [(3, "ObjectLost")]


def test_a_grant_may_overtake_the_news_that_one_has_to_wait(node: Node) -> None:
    commands = node.hear(W1, c.AcquireToken(1, LOCK, True))
    assert done(node.handle(e.GrantRead("na/w1/1", LOCK, 3))) == [(1, 3, b"")]
    assert node.answer(commands, (WAITING, 0)) == []


@pytest.mark.parametrize("is_read_first", [True, False])
def test_a_token_that_is_told_of_twice_stays_with_its_holder(node: Node, is_read_first: bool) -> None:
    node.wait(c.AcquireToken(1, LOCK, True))
    asked = node.handle(e.StoreChanged())
    assert calls(asked) == [("acquire", LOCK, "na/w1/1", True)]

    def read() -> list[Any]:
        return node.handle(e.GrantRead("na/w1/1", LOCK, 4))

    def answered() -> list[Any]:
        return node.answer(asked, (GRANTED, 4))

    first, second = (read, answered) if is_read_first else (answered, read)
    assert done(first()) == [(1, 4, b"")]
    assert second() == []
    node.hear(W1, c.ReleaseToken(2, LOCK, 1, acquired=1))
    assert read() == []


@pytest.mark.parametrize("is_read_first", [True, False])
def test_of_two_tokens_for_one_wait_the_second_is_given_back(node: Node, is_read_first: bool) -> None:
    # Those of a plain semaphore are nobody's: asked again, the store does not know that it had given one.
    node.wait(c.AcquireToken(1, LOCK, True))
    asked = node.handle(e.StoreChanged())
    first, second = (4, 5) if is_read_first else (5, 4)
    told = [lambda: node.handle(e.GrantRead("na/w1/1", LOCK, 4)), lambda: node.answer(asked, (GRANTED, 5))]
    for tell, token in zip(told if is_read_first else told[::-1], (first, second), strict=True):
        commands = tell()
        if token == first:
            assert done(commands) == [(1, first, b"")] and calls(commands) == []
        else:
            assert done(commands) == [] and calls(commands) == [("give_back", LOCK, "na/w1/1", second)]


def test_who_waits_for_long_asks_again_lest_its_grant_was_lost(node: Node) -> None:
    node.wait(c.AcquireToken(1, LOCK, True))
    node.wait(c.GetItem(2, CHANNEL, True))
    popping = node.handle(e.GrantRead("na/w1/2", CHANNEL, 1))
    asked = [command for _ in range(120) for command in node.handle(e.TimeToLook())]
    assert calls(asked) == [("acquire", LOCK, "na/w1/1", True)], "but nobody whose call is under way"
    assert done(node.answer(asked, (GRANTED, 4))) == [(1, 4, b"")]
    assert node.handle(e.GrantRead("na/w1/1", LOCK, 4)) == []
    assert done(node.answer(popping, b"item")) == [(2, 1, b"item")]


def test_a_cancelled_wait_ends_when_the_store_knows_of_it(node: Node) -> None:
    # Else a token that another process gives back now would go to nobody for a moment.
    node.wait(c.AcquireToken(1, LOCK, True))
    commands = node.hear(W1, c.CancelWait(1))
    assert (done(commands), calls(commands)) == ([], [("cancel", LOCK, "na/w1/1")])
    assert done(node.answer(commands, True)) == [(1, 0, b"")]
    given = calls(node.handle(e.GrantRead("na/w1/1", LOCK, 4)))
    assert given == [("give_back", LOCK, "na/w1/1", 4)], "nobody takes it"


@pytest.mark.parametrize("is_read", [False, True])
def test_what_was_granted_before_the_cancel_is_the_waiters(node: Node, is_read: bool) -> None:
    asked = node.hear(W1, c.AcquireToken(1, LOCK, True))
    cancel = node.hear(W1, c.CancelWait(1))
    if is_read:
        assert node.answer(cancel, False) == []
    late = node.handle(e.GrantRead("na/w1/1", LOCK, 4)) if is_read else node.answer(asked, (GRANTED, 4))
    assert (done(late), calls(late)) == ([(1, 4, b"")], [])
    if not is_read:
        assert node.answer(cancel, False) == []


@pytest.mark.parametrize("is_refused", [False, True])
def test_who_gives_up_waits_no_longer_for_a_store_that_is_silent(node: Node, is_refused: bool) -> None:
    node.wait(c.AcquireToken(1, LOCK, True))
    node.wait(c.AcquireToken(2, LOCK, True))
    cancel = node.hear(W1, c.CancelWait(1))
    if is_refused:
        assert done(node.fail(cancel, "NotConnected")) == [(1, 0, b"")]
    else:
        answers = [done(node.handle(e.TimeToLook())) for _ in range(4)]
        assert answers == [[], [], [(1, 0, b"")], []], "and the second still waits"
    assert calls(node.handle(e.StoreChanged())) == [("acquire", LOCK, "na/w1/2", True)]
    assert calls(node.handle(e.GrantRead("na/w1/1", LOCK, 4))) == [("give_back", LOCK, "na/w1/1", 4)]


def test_who_gives_up_does_not_ask_a_new_server(node: Node) -> None:
    node.wait(c.AcquireToken(1, LOCK, True))
    node.hear(W1, c.CancelWait(1))
    commands = node.handle(e.StoreChanged())
    assert (done(commands), calls(commands)) == ([(1, 0, b"")], [])


def test_a_cancel_that_crosses_its_answer_changes_nothing(node: Node) -> None:
    commands = node.hear(W1, c.AcquireToken(1, LOCK, True))
    node.answer(commands, (GRANTED, 4))
    assert node.hear(W1, c.CancelWait(1)) == []


def test_a_process_may_return_what_reached_it_too_late(node: Node) -> None:
    assert calls(node.hear(W1, c.ReturnToken(5, LOCK))) == [("give_back", LOCK, "na/w1/5", 0)]
    assert calls(node.hear(W1, c.ReturnItem(CHANNEL, b"x"))) == [("put_back", CHANNEL, b"x")]


def test_waits_of_two_processes_are_kept_apart(node: Node) -> None:
    node.wait(c.AcquireToken(1, LOCK, True), W1)
    node.wait(c.AcquireToken(1, LOCK, True), W2)
    commands = node.handle(e.GrantRead("na/w2/1", LOCK, 1))
    assert done(commands, W1) == [] and done(commands, W2) == [(1, 1, b"")]


def test_an_unknown_semaphore_is_an_error_of_the_process(node: Node) -> None:
    commands = node.hear(W1, c.AcquireToken(1, LOCK, True))
    commands = node.fail(commands, "CarrierUnknown")
    assert failed(commands) == [(1, "ObjectLost")]
    assert calls(commands) == []


def test_a_question_whose_answer_got_lost_is_cancelled(node: Node) -> None:
    commands = node.fail(node.hear(W1, c.AcquireToken(1, LOCK, True)), "NotConnected")
    assert failed(commands) == [(1, "NotConnected")]
    assert calls(commands) == [("cancel", LOCK, "na/w1/1")]


def test_a_release_beyond_the_maximum_is_a_value_error(node: Node) -> None:
    assert done(node.answer(node.hear(W1, c.ReleaseToken(1, LOCK, 1)), True)) == [(1, 0, b"")]
    assert failed(node.answer(node.hear(W1, c.ReleaseToken(2, LOCK, 1)), False)) == [(2, "ValueError")]


# --- channels and cells


def test_an_item_that_is_there_comes_with_the_answer(node: Node) -> None:
    commands = node.hear(W1, c.GetItem(1, CHANNEL, True))
    assert calls(commands) == [("get", CHANNEL, "na/w1/1", True)]
    assert done(node.answer(commands, (GRANTED, b""))) == [(1, 1, b"")]  # empty, and yet an item


def test_who_waits_for_an_item_gets_the_one_that_was_reserved(node: Node) -> None:
    node.wait(c.GetItem(1, CHANNEL, True))
    popping = node.handle(e.GrantRead("na/w1/1", CHANNEL, 2))
    assert calls(popping) == [("pop", CHANNEL, "na/w1/1")]
    assert done(node.answer(popping, b"item")) == [(1, 1, b"item")]


@pytest.mark.parametrize("is_popping", [False, True])
def test_an_item_that_was_reserved_before_the_cancel_is_the_waiters(node: Node, is_popping: bool) -> None:
    if is_popping:
        node.wait(c.GetItem(1, CHANNEL, True))
        late, value = node.handle(e.GrantRead("na/w1/1", CHANNEL, 2)), b"item"
    else:
        late, value = node.hear(W1, c.GetItem(1, CHANNEL, True)), (GRANTED, b"item")  # type: ignore[assignment]
    assert done(node.hear(W1, c.CancelWait(1))) == []
    assert done(node.answer(late, value)) == [(1, 1, b"item")]


@pytest.mark.parametrize("is_popping", [False, True])
def test_an_item_that_comes_when_nobody_is_there_is_put_back(node: Node, is_popping: bool) -> None:
    if is_popping:
        node.wait(c.GetItem(1, CHANNEL, True))
        late, value = node.handle(e.GrantRead("na/w1/1", CHANNEL, 2)), b"item"
    else:
        late, value = node.hear(W1, c.GetItem(1, CHANNEL, True)), (GRANTED, b"item")  # type: ignore[assignment]
    assert calls(node.handle(e.ProcessGone(W1))) == [("end_process", "na/w1/")]
    assert calls(node.answer(late, value)) == [("put_back", CHANNEL, b"item")]


def test_an_item_whose_reservation_was_given_back_is_asked_for_again(node: Node) -> None:
    node.wait(c.GetItem(1, CHANNEL, True))
    popping = node.handle(e.GrantRead("na/w1/1", CHANNEL, 2))
    assert calls(node.answer(popping, None)) == [("get", CHANNEL, "na/w1/1", True)]


def test_cells_are_read_and_written(node: Node) -> None:
    assert done(node.answer(node.hear(W1, c.ReadCell(1, CELL, 3)), None)) == [(1, 0, b"")]
    assert done(node.answer(node.hear(W1, c.ReadCell(2, CELL, 3)), (4, b"new"))) == [(2, 4, b"new")]
    assert done(node.answer(node.hear(W1, c.WriteCell(3, CELL, b"newer")), 5)) == [(3, 5, b"")]


# --- moving, at home


def drained(node: Node, name: str = LOCK) -> list[Any]:
    return node.handle(e.CarrierDrained(name, e.Contents(1)))


def test_a_carrier_is_drained_then_created_then_all_who_asked_are_told(node: Node) -> None:
    commands = node.hear(OTHER_NODE, c.MoveCarrier(LOCK, "lock", 1))
    assert commands == [e.DrainCarrier("lock", LOCK)]
    creating = drained(node)
    assert calls(creating) == [("create", LOCK, "lock", 1, e.Contents(1), "na")]
    assert node.hear(THIRD_NODE, c.MoveCarrier(LOCK, "lock", 1)) == []
    assert node.hear(W1, c.AdoptCarrier(4, "lock", LOCK, "na", 1)) == []
    told = node.answer(creating, True)
    assert sent(told, c.CarrierMoved, OTHER_NODE) == sent(told, c.CarrierMoved, THIRD_NODE) == [c.CarrierMoved(LOCK)]
    assert done(told) == [(4, 0, b"")]
    # From now on at once.
    assert sent(node.hear(OTHER_NODE, c.MoveCarrier(LOCK, "lock", 1)), c.CarrierMoved) == [c.CarrierMoved(LOCK)]


def test_a_carrier_counts_as_moved_from_when_the_store_has_it_and_until_then_nobody_is_told(node: Node) -> None:
    assert done(node.hear(W1, c.IsMoved(1, LOCK))) == [(1, 0, b"")]
    node.hear(OTHER_NODE, c.MoveCarrier(LOCK, "lock", 1))
    assert node.hear(W1, c.IsMoved(2, LOCK)) == []
    assert node.answer(drained(node), e.LIFE_OVER) == [], "the store has forgotten this node, or took it for dead"
    creating = node.hear(W2, c.IsMoved(3, LOCK))
    assert [operation for operation, *_ in calls(creating)] == ["create"]
    told = node.answer(creating, True)
    assert (done(told, W1), done(told, W2)) == ([(2, 1, b"")], [(3, 1, b"")])
    assert done(node.hear(W1, c.IsMoved(4, LOCK))) == [(4, 1, b"")]


def test_who_asks_for_a_carrier_that_the_store_will_not_have_hears_that(node: Node) -> None:
    node.hear(OTHER_NODE, c.MoveCarrier(LOCK, "lock", 1))
    creating = drained(node)
    node.hear(W1, c.IsMoved(2, LOCK))
    assert failed(node.answer(creating, False), W1) == [(2, "ObjectLost")]


def test_items_of_a_channel_move_in_order(node: Node) -> None:
    node.hear(OTHER_NODE, c.MoveCarrier(CHANNEL, "channel", 0))
    commands = node.handle(e.CarrierDrained(CHANNEL, e.Contents(items=[b"a", b"b"])))
    assert calls(commands) == [("create", CHANNEL, "channel", 0, e.Contents(items=[b"a", b"b"]), "na")]


def test_a_move_that_the_store_failed_is_finished_for_the_next_who_asks(node: Node) -> None:
    node.hear(OTHER_NODE, c.MoveCarrier(LOCK, "lock", 1))
    told = node.fail(drained(node), "NotConnected", "away")
    assert sent(told, c.CarrierMoved, OTHER_NODE) == [c.CarrierMoved(LOCK, "NotConnected", "away")]
    # It is not drained a second time: its tokens are here.
    creating = node.hear(THIRD_NODE, c.MoveCarrier(LOCK, "lock", 1))
    assert calls(creating) == [("create", LOCK, "lock", 1, e.Contents(1), "na")]
    assert sent(node.answer(creating, True), c.CarrierMoved, THIRD_NODE) == [c.CarrierMoved(LOCK)]


def test_a_move_that_the_store_failed_is_finished_before_the_next_operation(node: Node) -> None:
    node.hear(OTHER_NODE, c.MoveCarrier(LOCK, "lock", 1))
    node.fail(drained(node), "NotConnected", "away")
    commands = node.hear(W1, c.AcquireToken(1, LOCK, True))
    assert [operation for operation, *_ in calls(commands)] == ["create", "acquire"]
    assert [operation for operation, *_ in calls(node.hear(W2, c.AcquireToken(1, LOCK, True)))] == ["acquire"]


def test_a_carrier_that_is_not_there_is_lost(node: Node) -> None:
    node.hear(OTHER_NODE, c.MoveCarrier(LOCK, "lock", 1))
    (message,) = sent(node.handle(e.CarrierMissing(LOCK, "none")), c.CarrierMoved, OTHER_NODE)
    assert message.error_kind == "ObjectLost"
    assert done(node.hear(W1, c.IsMoved(1, LOCK))) == [(1, 0, b"")]


def test_a_job_that_has_ended_moves_nothing(node: Node) -> None:
    node.hear(OTHER_NODE, c.MoveCarrier(LOCK, "lock", 1))
    commands = node.answer(drained(node), False)
    (message,) = sent(commands, c.CarrierMoved, OTHER_NODE)
    assert message.error_kind == "ObjectLost"
    # Its end has been: nobody else removes the shut channel, say, that was made when it was drained.
    assert of_type(commands, e.RemoveCarriers) == [e.RemoveCarriers([LOCK])]


def test_a_carrier_of_a_node_that_was_taken_for_dead_is_made_in_its_next_life(node: Node) -> None:
    node.incarnation = 4
    assert of_type(node.hear(W1, c.AdoptCarrier(1, "lock", LOCK, "na", 1)), e.DrainCarrier)
    creating = drained(node)
    assert calls(creating) == [("create", LOCK, "lock", 1, e.Contents(1), "na@4")]
    assert node.answer(creating, LIFE_OVER) == [], "its job has not ended: the driver may be here"
    node.handle(e.SelfFenced())
    assert node.answer(node.handle(e.StoreChanged()), LIFE_OVER) == []  # another server, that is all
    node.incarnation = 5
    creating = node.handle(e.StoreChanged())
    assert calls(creating) == [("create", LOCK, "lock", 1, e.Contents(1), "na@5")]
    assert done(node.answer(creating, GRANTED)) == [(1, 0, b"")]


# --- adopting, elsewhere


def adopt(node: Node, request: int = 1, source: Address = W1) -> list[Any]:
    return node.hear(source, c.AdoptCarrier(request, "lock", FOREIGN, "nb", 1))


def test_what_the_store_has_is_adopted_without_its_home(node: Node) -> None:
    commands = adopt(node)
    assert calls(commands) == [("exists", FOREIGN)]
    commands = node.answer(commands, True)
    assert done(commands) == [(1, 0, b"")]
    assert of_type(commands, Send) == commands
    # The next one need not even ask the store.
    assert adopt(node, 2, W2) == [Send(W2, c.CoordinationDone(2))]


def test_several_who_adopt_at_once_cause_one_move(node: Node) -> None:
    looking = adopt(node)
    assert adopt(node, 1, W2) == []
    commands = node.answer(looking, False)
    assert sent(commands, c.MoveCarrier, OTHER_NODE) == [c.MoveCarrier(FOREIGN, "lock", 1)]
    assert adopt(node, 2, W2) == []
    commands = node.hear(OTHER_NODE, c.CarrierMoved(FOREIGN))
    assert done(commands, W1) == [(1, 0, b"")]
    assert done(commands, W2) == [(1, 0, b""), (2, 0, b"")]


def test_what_its_home_cannot_move_is_an_error(node: Node) -> None:
    node.answer(adopt(node), False)
    assert failed(node.hear(OTHER_NODE, c.CarrierMoved(FOREIGN, "ObjectLost", "gone"))) == [(1, "ObjectLost")]


@pytest.mark.parametrize("end", [e.NodeGone("nb", 3), e.NodeUnreachable("nb")])
@pytest.mark.parametrize("was_moved", [False, True])
def test_the_store_is_asked_again_when_the_home_is_gone(node: Node, end: Any, was_moved: bool) -> None:
    node.answer(adopt(node), False)
    commands = node.handle(end)
    assert ("exists", FOREIGN) in calls(commands)
    commands = node.answer(commands, was_moved)
    assert (done(commands), failed(commands)) == (([(1, 0, b"")], []) if was_moved else ([], [(1, "ObjectLost")]))


def test_a_home_that_goes_while_the_store_is_asked_is_not_asked(node: Node) -> None:
    looking = adopt(node)
    assert ("exists", FOREIGN) not in calls(node.handle(e.NodeGone("nb", 3)))
    commands = node.answer(looking, False)
    assert failed(commands) == [(1, "ObjectLost")]
    assert sent(commands, c.MoveCarrier) == []


@pytest.mark.parametrize("is_looking", [True, False])
def test_who_adopts_on_a_node_that_was_taken_for_dead_is_told_when_that_has_joined_anew(
    node: Node, is_looking: bool
) -> None:
    node.incarnation = 4
    looking = adopt(node)
    if not is_looking:
        assert sent(node.answer(looking, False), c.MoveCarrier)
    node.handle(e.SelfFenced())
    # To the node itself all others are gone.
    assert failed(node.handle(e.NodeGone("nb", 3))) == failed(node.handle(e.NodeUnreachable("nb"))) == []
    if is_looking:
        assert node.answer(looking, False) == []
    assert calls(adopt(node, 2, W2)) == []
    node.incarnation = 5
    looking = node.handle(e.StoreChanged())
    assert calls(looking) == [("exists", FOREIGN)]
    assert sent(node.answer(looking, False), c.MoveCarrier, OTHER_NODE) == [c.MoveCarrier(FOREIGN, "lock", 1)]
    commands = node.hear(OTHER_NODE, c.CarrierMoved(FOREIGN))
    assert done(commands, W1) == [(1, 0, b"")] and done(commands, W2) == [(2, 0, b"")]


def test_the_end_of_another_node_does_not_touch_adoptions(node: Node) -> None:
    node.answer(adopt(node), False)
    assert calls(node.handle(e.NodeGone("nc", 3))) == [("end_node_life", "nc@3", False)]
    assert done(node.hear(OTHER_NODE, c.CarrierMoved(FOREIGN))) == [(1, 0, b"")]


# --- ends


def test_the_end_of_a_process_gives_back_what_it_held_and_waited_for(node: Node) -> None:
    node.wait(c.AcquireToken(1, LOCK, True))
    assert calls(node.handle(e.ProcessGone(W1))) == [("end_process", "na/w1/")]
    late = node.handle(e.GrantRead("na/w1/1", LOCK, 4))
    assert done(late) == [] and calls(late) == [("give_back", LOCK, "na/w1/1", 4)]


def test_the_end_of_a_process_that_used_nothing_fat_is_no_matter(node: Node) -> None:
    node.hear(W1, c.IsMoved(1, LOCK))
    assert node.handle(e.ProcessGone(W1)) == []


def test_the_end_of_a_node_is_told_to_the_store_but_starts_none(node: Node) -> None:
    (call,) = of_type(node.handle(e.NodeGone("nb", 3)), e.CallCoordination)
    assert (call.operation, call.arguments, call.starts) == ("end_node_life", ("nb@3", False), False)


def test_a_node_that_was_taken_for_dead_gives_all_back_and_asks_again_in_its_next_life(node: Node) -> None:
    node.incarnation = 4
    waiting = node.wait(c.AcquireToken(1, LOCK, True))
    assert calls(waiting) == [("acquire", LOCK, "na@4/w1/1", True)]
    node.wait(c.GetItem(2, CHANNEL, True))
    unaware = node.hear(W1, c.AcquireToken(3, LOCK, True))
    assert node.answer(unaware, (LIFE_OVER, 0)) == []
    assert calls(node.handle(e.SelfFenced())) == [("end_node_life", "na@4", True)]
    node.incarnation = 5
    assert calls(node.handle(e.StoreChanged())) == [
        ("acquire", LOCK, "na@5/w1/1", True),
        ("get", CHANNEL, "na@5/w1/2", True),
        ("acquire", LOCK, "na@5/w1/3", True),
    ]
    # What was granted to the former life, and read only now, went with it.
    late = node.handle(e.GrantRead("na@4/w1/1", LOCK, 6))
    assert done(late) == [] and calls(late) == [("give_back", LOCK, "na@4/w1/1", 6)]
    assert done(node.handle(e.GrantRead("na@5/w1/1", LOCK, 7))) == [(1, 7, b"")]


def test_after_a_change_of_the_store_all_who_wait_ask_again(node: Node) -> None:
    node.wait(c.AcquireToken(1, LOCK, True))
    commands = node.handle(e.StoreChanged())
    assert failed(node.fail(commands, "CarrierUnknown")) == [(1, "ObjectLost")]


def test_a_call_under_way_when_the_store_changes_is_not_made_twice(node: Node) -> None:
    """Else it would take two items, and give the second back behind those that were got meanwhile."""
    node.wait(c.GetItem(1, CHANNEL, True))
    popping = node.handle(e.GrantRead("na/w1/1", CHANNEL, 1))
    assert calls(popping) == [("pop", CHANNEL, "na/w1/1")]
    assert node.handle(e.StoreChanged()) == []
    assert node.handle(e.GrantRead("na/w1/1", CHANNEL, 1)) == []
    assert done(node.answer(popping, b"item")) == [(1, 1, b"item")]
    assert node.handle(e.StoreChanged()) == []


@pytest.mark.parametrize("message", [c.GetItem(1, CHANNEL, True), c.AcquireToken(1, CHANNEL, True)])
def test_a_question_whose_answer_the_store_may_have_forgotten_is_put_again(node: Node, message: Any) -> None:
    asking = node.hear(W1, message)
    assert node.handle(e.StoreChanged()) == []
    again = node.answer(asking, (WAITING, 0))
    assert calls(again) == calls(asking)
    assert node.answer(again, (WAITING, 0)) == []
    assert calls(node.handle(e.StoreChanged())) == calls(asking)


def test_a_node_that_lost_sight_of_a_driver_lets_others_wait_on(node: Node) -> None:
    node.wait(c.AcquireToken(1, LOCK, True))
    assert failed(node.handle(e.JobGone("j1", is_known=False, home="nb"))) == []
    assert calls(node.handle(e.StoreChanged())) == [("acquire", LOCK, "na/w1/1", True)]
    assert failed(node.handle(e.JobGone("j1"))) == [(1, "ObjectLost")]


def test_the_end_of_a_job_forgets_everything_of_it(node: Node) -> None:
    node.answer(adopt(node), True)
    node.hear(OTHER_NODE, c.MoveCarrier(LOCK, "lock", 1))
    node.answer(drained(node), True)
    node.wait(c.AcquireToken(3, LOCK, True), W2)
    node.wait(c.AcquireToken(4, "j2-d1-1", True), W2)
    commands = node.handle(e.JobGone("j1"))
    assert of_type(commands, e.RemoveJobCarriers) == [e.RemoveJobCarriers("j1")]
    assert failed(commands, W2) == [(3, "ObjectLost")]
    (call,) = of_type(commands, e.CallCoordination)
    assert (call.operation, call.arguments, call.starts) == ("delete_job", ("j1", ""), False)
    machine = node.machine
    assert (machine._moves, machine._known, machine._adoptions, len(machine._waits)) == ({}, set(), {}, 1)


def test_a_node_that_only_supposes_that_a_job_has_ended_leaves_it_its_carriers(node: Node) -> None:
    assert node.handle(e.JobGone("j1", is_known=False)) == [e.RemoveJobCarriers("j1")]


@pytest.mark.parametrize("end", [e.JobGone("j1", is_known=False), e.JobGone("j1", home="nb"), e.JobGone("j1")])
def test_what_has_moved_is_known_to_its_home_when_a_job_comes_back(node: Node, end: e.JobGone) -> None:
    moved_while_held(node)
    node.hear(OTHER_NODE, c.MoveCarrier(CELL, "cell", 1))
    node.handle(end)
    may_come_back = end != e.JobGone("j1")
    assert done(node.hear(W1, c.IsMoved(1, LOCK))) == [(1, int(may_come_back), b"")]
    assert done(node.hear(W1, c.IsMoved(2, CELL))) == [(2, 0, b"")], "it was not in the store yet"
    assert node.handle(e.TimeToLook()) == [], "nothing is held here any more"


def test_the_store_is_told_that_only_the_loss_of_a_drivers_node_ends_a_job(node: Node) -> None:
    (call,) = of_type(node.handle(e.JobGone("j1", home=OTHER_NODE.node_id)), e.CallCoordination)
    assert (call.operation, call.arguments) == ("delete_job", ("j1", OTHER_NODE.node_id))


def test_carriers_that_nobody_knows_are_removed(node: Node) -> None:
    assert node.hear(W1, c.ForgetCarriers([LOCK, CELL])) == [e.RemoveCarriers([LOCK, CELL])]


# --- tokens are conserved, whatever comes in whatever order


class Cluster:
    """Three nodes' machines on one fake store, whose answers and grants come when chance wants."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.shared = FakeCoordination()
        self.names = ("na", "nb", "nc")
        self.machines = {name: CoordinationMachine(name) for name in self.names}
        self.stores = {name: self.shared.client(name) for name in self.names}
        self.numbers = itertools.count(1)
        self.requests = itertools.count(1)
        self.queues: dict[str, list[e.CallCoordination]] = {name: [] for name in self.names}
        self.answers: dict[str, list[Any]] = {name: [] for name in self.names}
        self.read_until = dict.fromkeys(self.names, "0")
        self.held: list[tuple[Address, int]] = []
        self.waiting: list[tuple[Address, int]] = []
        store = self.stores["na"]
        store.create(next(self.numbers), LOCK, "lock", 1, e.Contents(1))

    def handle(self, node_id: str, event: Any) -> None:
        for command in self.machines[node_id].handle(event, NOW_S):
            if isinstance(command, e.CallCoordination):
                self.queues[node_id].append(command)
            elif isinstance(command, Send) and isinstance(command.message, c.CoordinationDone):
                wait = (command.destination, command.message.request)
                if wait in self.waiting:
                    self.waiting.remove(wait)
                    if command.message.number:
                        self.held.append(wait)

    def step(self) -> None:
        node_id = self.random.choice(self.names)
        process = Address(node_id, self.random.choice(("w1", "w2", "w3")))
        action = self.random.random()
        if action < 0.2:
            request = next(self.requests)
            self.waiting.append((process, request))
            self.handle(node_id, MessageArrived(process, c.AcquireToken(request, LOCK, self.random.random() < 0.8)))
        elif action < 0.3 and self.waiting:
            waiter, request = self.random.choice(self.waiting)
            self.handle(waiter.node_id, MessageArrived(waiter, c.CancelWait(request)))
        elif action < 0.4 and self.held:
            holder, _ = self.held.pop()
            self.handle(holder.node_id, MessageArrived(holder, c.ReleaseToken(next(self.requests), LOCK, 1)))
        elif action < 0.45:
            self.held = [held for held in self.held if held[0] != process]
            self.waiting = [waiting for waiting in self.waiting if waiting[0] != process]
            self.handle(node_id, e.ProcessGone(process))
        elif action < 0.46:  # another server answers
            self.read_until[node_id] = "0"
            self.handle(node_id, e.StoreChanged())
        elif action < 0.65:
            self.call_store(node_id)
        elif action < 0.85 and self.answers[node_id]:
            self.handle(node_id, self.answers[node_id].pop(0))
        else:
            self.read_grant(node_id)

    def call_store(self, node_id: str) -> None:
        if not self.queues[node_id]:
            return
        call = self.queues[node_id].pop(0)
        number = next(self.numbers)
        operation = getattr(self.stores[node_id], call.operation)
        try:
            value = operation(number, *call.arguments)
            if self.random.random() < 0.2:  # the answer was lost, and the call is made again
                assert operation(number, *call.arguments) == value
            event: Any = e.OperationAnswered(call.tag, value)
        except CarrierUnknown as exc:
            event = e.OperationFailed(call.tag, "CarrierUnknown", str(exc))
        if call.tag:
            self.answers[node_id].append(event)

    def read_grant(self, node_id: str) -> None:
        grants = self.stores[node_id].read_grants(self.read_until[node_id])
        if grants:
            self.read_until[node_id] = grants[0].id
            self.handle(node_id, e.GrantRead(grants[0].waiter, grants[0].name, grants[0].token))

    def settle(self) -> None:
        for _ in range(200):
            for node_id in self.names:
                self.call_store(node_id)
                if self.answers[node_id]:
                    self.handle(node_id, self.answers[node_id].pop(0))
                for _ in range(20):
                    self.read_grant(node_id)


@pytest.mark.parametrize("seed", range(40))
def test_a_lock_has_one_holder_and_is_never_lost(seed: int) -> None:
    cluster = Cluster(seed)
    for _ in range(600):
        cluster.step()
        assert len(cluster.held) <= 1
    cluster.settle()
    carrier = cluster.shared.carriers[LOCK]
    assert carrier.value == 1 - len(cluster.held)
    assert not cluster.waiting or cluster.held, "somebody waits for a lock that nobody holds"
    # All who wait now give up, and the holder lets go, and who got it before it had given up: then it is free.
    for waiter, request in list(cluster.waiting):
        cluster.handle(waiter.node_id, MessageArrived(waiter, c.CancelWait(request)))
    for _ in range(2):
        for holder, _ in cluster.held:
            cluster.handle(holder.node_id, MessageArrived(holder, c.ReleaseToken(next(cluster.requests), LOCK, 1)))
        cluster.held.clear()
        cluster.settle()
    assert not cluster.waiting and not cluster.held
    assert (carrier.value, carrier.waiters, cluster.shared.holds) == (1, [], {})


# --- what was held at home when it moved


def moved_while_held(node: Node, kind: str = "lock", total: int = 1) -> None:
    node.hear(OTHER_NODE, c.MoveCarrier(LOCK, kind, 1, total))
    creating = node.handle(e.CarrierDrained(LOCK, e.Contents(tokens=0)))
    assert calls(creating) == [("create", LOCK, kind, 1, e.Contents(content=f"na {total}".encode()), "na")]
    node.answer(creating, 1)


def test_what_was_taken_thin_is_released_as_its_homes() -> None:
    node = Node()
    moved_while_held(node)
    released = node.hear(W1, c.ReleaseToken(5, LOCK, 1, is_thin=True))
    assert calls(released) == [("release", LOCK, 1, "na/thin")]
    assert node.handle(e.TimeToLook()) == [], "nobody here holds any of it any more"


def test_a_release_names_the_wait_that_brought_the_token(node: Node) -> None:
    assert calls(node.hear(W1, c.ReleaseToken(5, LOCK, 1, acquired=3))) == [("release", LOCK, 1, "na/w1/3")]
    assert calls(node.hear(W1, c.ReleaseToken(6, LOCK, 1))) == [("release", LOCK, 1, "")]
    writing = node.hear(W1, c.WriteCell(7, CELL, b"new", LOCK, acquired=3))
    assert calls(writing) == [("write_cell", CELL, b"new", LOCK, "na/w1/3")]
    assert failed(node.fail(writing, "LockLost")) == [(7, "LockLost")]


def test_while_no_fork_has_used_it_nobody_is_asked_at_each_tick() -> None:
    node = Node(W1)
    moved_while_held(node)
    assert node.handle(e.TimeToLook()) == [e.ReadThinTokens(LOCK)]
    assert node.handle(e.ThinTokensRead(LOCK, 0)) == []
    assert node.handle(e.ProcessGone(W2)) == [e.ReadThinTokens(LOCK)]
    assert sent(node.handle(e.ThinTokensRead(LOCK, 0)), c.CountHeld, W1)


def test_what_a_process_held_that_died_before_the_move_goes_to_the_store_within_seconds() -> None:
    # All who wait for it do so in the store, and cannot tell: found by the simulator.
    node = Node(W1)
    moved_while_held(node)
    for _ in range(3):
        assert node.handle(e.TimeToLook()) == [e.ReadThinTokens(LOCK)]
        assert node.handle(e.ThinTokensRead(LOCK, 0)) == []
    assert node.handle(e.TimeToLook()) == [e.ReadThinTokens(LOCK)]
    for _ in range(2):
        (question,) = sent(node.handle(e.ThinTokensRead(LOCK, 0)), c.CountHeld, W1)
        node.hear(W1, c.HeldCounted(question.request, LOCK, 0, 0))
    assert calls(node.handle(e.ThinTokensRead(LOCK, 0))) == [("release", LOCK, 1, "na/thin")]


@pytest.mark.parametrize("sign", [e.TimeToLook(), e.ProcessGone(W2)])
def test_what_the_dead_held_at_home_when_it_moved_goes_to_the_store(sign: Any) -> None:
    node = Node(W1)
    moved_while_held(node, "guard", 2)
    commands = node.handle(sign)
    for held in (1, 1):
        commands = node.handle(e.ThinTokensRead(LOCK, 0, registrations=1))
        (question,) = sent(commands, c.CountHeld, W1)
        commands = node.hear(W1, c.HeldCounted(question.request, LOCK, held, 0))
    assert calls(node.handle(e.ThinTokensRead(LOCK, 0, registrations=1))) == [("release", LOCK, 1, "na/thin")]
    # The other token is W1's: it gives it back itself.
    assert calls(node.hear(W1, c.ReleaseToken(5, LOCK, 1, is_thin=True))) == [("release", LOCK, 1, "na/thin")]
    assert node.handle(e.TimeToLook()) == []


def test_a_semaphore_of_signals_stays_one_when_it_moves(node: Node) -> None:
    node.hear(OTHER_NODE, c.MoveCarrier(LOCK, "guard", 9, 2))
    creating = node.handle(e.CarrierDrained(LOCK, e.Contents(tokens=1), is_signal=True))
    assert calls(creating) == [("create", LOCK, "semaphore", 9, e.Contents(tokens=1), "na")]


def test_who_waits_is_asked_for_again_once_the_node_is_a_member_again(node: Node) -> None:
    node.wait(c.AcquireToken(1, LOCK, True))
    assert calls(node.handle(e.StoreChanged())) == [("acquire", LOCK, "na/w1/1", True)]
