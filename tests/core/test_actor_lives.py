"""Lives of actors, as their callers, their creators and the nodes see them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from clusterpool.core import membership as ms
from clusterpool.core import messages as m
from clusterpool.core import node_events as ne
from clusterpool.core import owner_events as e
from clusterpool.core.actor_messages import ActorCreation, ActorLoaded, CallsResumed, LoadActor, encode_creation
from clusterpool.core.messages import Address, Reference, TaskStatus, WorkerKind
from clusterpool.core.node_actors import NEXT_LIFE_WAIT_S, UNKNOWN_WAIT_S
from tests.core.machines import DRIVER, JOB, NODE, Owner, T, make_result, make_task, make_worker, of_type
from tests.core.test_actors import HOME, PENDING, calls, lost, started
from tests.core.test_node import NOW_S, REMOTE, W1, Node

ALIVE = msgspec.structs.replace(PENDING, address=HOME, state="alive", restarts=2)
AGAIN = Address("n3", "w9")


def sent(commands: list[Any], kind: type[T], to: Address | None = None) -> list[T]:
    """The messages of this type, of an owner or a node."""
    sends = [command for command in commands if isinstance(command, (e.Send, ne.Send))]
    return [send.message for send in sends if isinstance(send.message, kind) and to in (None, send.destination)]


def retrying(*numbers: int, retries: int = 1) -> list[Any]:
    tasks = calls(*numbers)
    for task in tasks:
        task.retries_left = retries
    return tasks


def started_at(commands: list[Any], address: Address) -> list[int]:
    return [spec.number for message in sent(commands, m.StartTasks, address) for spec in message.tasks]


# --- a caller


def test_calls_under_way_go_to_the_next_life_in_order_before_newer_ones_and_others_fail() -> None:
    owner = Owner()
    owner.handle(e.ActorMet(ALIVE))
    (first, second), (third,) = retrying(1, 2), calls(3)
    assert started(owner.handle(e.ActorCallsSubmitted("a1", [first, third, second]))) == [1, 3, 2]
    (question,) = sent(owner.hear(NODE, m.ProcessEnded(HOME, "killed")), m.LocateActor, NODE)
    assert (question.actor_id, question.life) == ("a1", 1)
    assert lost(owner, 1, 2, 3) == ["pending", "pending", "actor_unavailable"]
    assert started(owner.handle(e.ActorCallsSubmitted("a1", calls(4)))) == []
    assert owner.finish("w1", make_result(1)) == [], "what a former life says is not heard"
    there = msgspec.structs.replace(ALIVE, address=AGAIN, life=1)
    commands = owner.hear(NODE, m.ActorLocated(question.request, there))
    assert started_at(commands, AGAIN) == [1, 2, 4]
    owner.hear(AGAIN, m.TasksFinished([make_result(1)], 1))
    (question,) = sent(owner.hear(NODE, m.NodeLost("n3", "silent")), m.LocateActor, NODE)
    assert question.life == 2
    assert lost(owner, 1, 2, 4) == ["", "actor_unavailable", "actor_unavailable"], "each is sent again once"


def test_a_call_that_never_got_to_its_actor_goes_to_the_next_life_and_keeps_its_retries() -> None:
    owner = Owner()
    owner.handle(e.ActorMet(ALIVE))
    (begun, unsent, plain) = [*retrying(1, 2), *calls(3)]
    owner.handle(e.ActorCallsSubmitted("a1", [begun, unsent, plain]))
    assert owner.hear(Address("n1", "w1"), m.TasksUnsent(HOME, [2, 3])) == []
    (question,) = sent(owner.hear(NODE, m.ProcessEnded(HOME, "killed")), m.LocateActor, NODE)
    commands = owner.hear(NODE, m.ActorLocated(question.request, msgspec.structs.replace(ALIVE, address=AGAIN, life=1)))
    assert started_at(commands, AGAIN) == [1, 2, 3]
    (question,) = sent(owner.hear(NODE, m.ProcessEnded(AGAIN, "killed")), m.LocateActor, NODE)
    assert lost(owner, 1, 2, 3) == ["actor_unavailable", "pending", "actor_unavailable"]


def test_calls_that_do_not_get_to_a_next_life_with_checkpoints_are_known_not_to_have_begun() -> None:
    owner = Owner()
    logged = msgspec.structs.replace(ALIVE, is_logged=True)
    owner.handle(e.ActorMet(logged))
    owner.handle(e.ActorCallsSubmitted("a1", retrying(1)))
    (question,) = sent(owner.hear(NODE, m.ProcessEnded(HOME, "killed")), m.LocateActor, NODE)
    owner.handle(e.ActorCallsSubmitted("a1", calls(2)))
    there = msgspec.structs.replace(logged, address=AGAIN, life=1)
    commands = owner.hear(NODE, m.ActorLocated(question.request, there))
    told = [type(message) for message in sent(commands, m.Message, AGAIN)]
    assert told == [m.StartTasks, CallsResumed], "our node hands back in this order what it cannot send on"
    assert sent(commands, CallsResumed, AGAIN) == [CallsResumed([1, 2])]
    owner.hear(NODE, m.TasksUnsent(AGAIN, [1, 2]))
    (question,) = sent(owner.hear(NODE, m.Undeliverable(AGAIN)), m.LocateActor, NODE)
    assert lost(owner, 1, 2) == ["pending", "pending"]
    assert sent(owner.hear(NODE, m.Undeliverable(AGAIN)), m.LocateActor, NODE) == []


def test_an_actor_that_does_not_return_is_the_end_of_the_calls_that_wait_for_it() -> None:
    owner = Owner()
    owner.handle(e.ActorMet(ALIVE))
    owner.handle(e.ActorCallsSubmitted("a1", retrying(1, retries=-1)))
    (question,) = sent(owner.hear(NODE, m.ProcessEnded(HOME, "killed")), m.LocateActor, NODE)
    owner.hear(NODE, m.ActorLocated(question.request, msgspec.structs.replace(ALIVE, state="dead", text="no more")))
    owner.handle(e.ActorCallsSubmitted("a1", calls(2)))
    assert lost(owner, 1, 2) == ["actor_died", "actor_died"]


@pytest.mark.parametrize(("retries", "attempt"), [(2, "attempt 3 of 3"), (-1, "attempt 3")])
def test_the_error_of_a_call_says_how_often_it_was_tried(retries: int, attempt: str) -> None:
    owner = Owner()
    owner.handle(e.ActorMet(msgspec.structs.replace(ALIVE, retries=retries)))
    owner.handle(e.ActorCallsSubmitted("a1", retrying(1, retries=retries)))
    where = HOME
    for life in (1, 2):
        (question,) = sent(owner.hear(NODE, m.ProcessEnded(where, "killed")), m.LocateActor, NODE)
        where = Address("n1", f"w{life + 1}")
        owner.hear(NODE, m.ActorLocated(question.request, msgspec.structs.replace(ALIVE, address=where, life=life)))
    commands = owner.handle(e.ClientClosed("cancelled", "shut down"))
    value = owner.value_of(Reference(DRIVER, 1))
    assert commands and value is not None
    assert value.lost == f"task 1 (Counter.add), {attempt}, was at worker w3 of node n1: shut down"


# --- a creator


class Creator(Owner):
    def __init__(self) -> None:
        super().__init__()
        actor = msgspec.structs.replace(PENDING, restarts=2)
        self.handle(e.FunctionAdded(1, b"class"))
        demand = m.WorkerDemand(WorkerKind.ACTOR, {}, actor_id="a1")
        commands = self.handle(e.ActorOpened(actor, demand, e.SetupPlan(), make_task(10, sink=None, name="C"), None))
        self.be_granted(commands)

    def be_granted(self, commands: list[Any], address: Address = HOME) -> list[Any]:
        (request,) = sent(commands, m.RequestWorkers)
        worker = make_worker(address.process_id, node_id=address.node_id)
        return self.hear(NODE, m.WorkerGranted(request.request, worker))


def test_a_creator_asks_the_registry_and_makes_the_actor_again() -> None:
    owner = Creator()
    owner.finish("w1", make_result(10))
    owner.handle(e.ActorCallsSubmitted("a1", retrying(1)))
    (ended,) = sent(owner.hear(NODE, m.WorkerExited(1, HOME, -9, "killed")), m.LifeEnded, NODE)
    assert (ended.actor_id, ended.life) == ("a1", 0)
    answer = msgspec.structs.replace(PENDING, restarts=2, state="restarting", life=1)
    commands = owner.hear(NODE, m.ActorLocated(ended.request, answer))
    assert [request.demand.actor_life for request in sent(commands, m.RequestWorkers)] == [1]
    (start, rest) = sent(owner.be_granted(commands, AGAIN), m.StartTasks, AGAIN)
    assert start.functions == [m.FunctionPart(1, b"class")]
    assert [spec.number for spec in [*start.tasks, *rest.tasks]] == [10, 1]
    (changed,) = sent(owner.hear(AGAIN, m.TasksFinished([make_result(10)], 1)), m.ActorChanged)
    assert (changed.actor.state, changed.actor.life, changed.actor.address) == ("alive", 1, AGAIN)


def test_calls_behind_a_constructor_that_never_returned_cost_no_retry() -> None:
    owner = Creator()
    owner.handle(e.ActorCallsSubmitted("a1", calls(1)))
    assert sent(owner.hear(NODE, m.WorkerExited(1, HOME, -9, "killed")), m.LifeEnded)
    assert lost(owner, 1) == ["pending"]


@pytest.mark.parametrize("is_alive", [True, False])
def test_a_creator_that_is_told_of_a_death_ends_what_it_has(is_alive: bool) -> None:
    owner = Creator()
    owner.finish("w1", make_result(10))
    if not is_alive:
        (ended,) = sent(owner.hear(NODE, m.WorkerExited(1, HOME, -9, "killed")), m.LifeEnded)
        restarting = msgspec.structs.replace(PENDING, state="restarting", life=1)
        owner.hear(NODE, m.ActorLocated(ended.request, restarting))
    dead = msgspec.structs.replace(PENDING, state="dead", text="killed with kill()")
    commands = owner.hear(NODE, m.ActorLocated(0, dead))
    assert bool(sent(commands, m.KillWorker, NODE)) is is_alive
    assert bool(sent(commands, m.CancelRequest, NODE)) is not is_alive
    owner.handle(e.ActorCallsSubmitted("a1", calls(2)))
    assert lost(owner, 2) == ["actor_died"]


def test_a_worker_lost_with_its_node_before_the_constructor_ran_costs_no_life() -> None:
    owner = Owner()
    owner.open_set()
    owner.submit(make_task(500, sink=None))
    owner.handle(e.FunctionAdded(1, b"class"))
    demand = m.WorkerDemand(WorkerKind.ACTOR, {}, actor_id="a1")
    arguments = e.TaskArguments([m.Reference(DRIVER, 500)], [])
    creation = make_task(10, sink=None, name="C")
    commands = owner.handle(e.ActorOpened(PENDING, demand, e.SetupPlan(), creation, arguments))
    (request,) = sent(commands, m.RequestWorkers)
    owner.hear(NODE, m.WorkerGranted(request.request, make_worker("w7", node_id="n2")))
    assert len(sent(owner.hear(NODE, m.NodeLost("n2", "silent")), m.RequestWorkers)) >= 1
    assert owner.machine.actors.channels["a1"].actor.state == "pending"


# --- a node


DETACHED = msgspec.structs.replace(PENDING, detached=True, restarts=-1, name="kept")
CREATION = encode_creation(
    ActorCreation(
        m.WorkerDemand(WorkerKind.ACTOR, {}, actor_id="a1"), msgspec.structs.replace(JOB, detached=True), {"A": "b"},
        "kept", b"class", m.TaskSpec(1, 1, m.TaskKind.CREATE_ACTOR, b"payload", m.TaskExtras()),
    )
)  # fmt: skip


def calls_of(commands: list[Any], operation: str) -> list[ne.CallStore]:
    return [call for call in of_type(commands, ne.CallStore) if call.operation == operation]


def answer(node: Node, call: ne.CallStore, value: Any) -> list[Any]:
    return node.handle(ne.StoreReturned(call.tag, value))


def begin(node: Node, life: int = 0) -> m.RequestWorkers:
    """The node is given a life of the actor to start."""
    actor = msgspec.structs.replace(DETACHED, life=life)
    if life == 0:
        (call,) = calls_of(node.hear(DRIVER, m.RegisterActor(7, actor, False, CREATION)), "create_actor")
        commands = answer(node, call, None)
    else:
        (call,) = calls_of(node.handle(ms.EventsMissed()), "adopt_orphans")
        commands = answer(node, call, [("restart", actor, CREATION)])
    (request,) = sent(commands, m.RequestWorkers)
    return request


@pytest.fixture
def node() -> Node:
    node = Node()
    node.join(DRIVER, "driver")
    return node


@pytest.mark.parametrize("life", [0, 3])
def test_a_node_makes_a_detached_actor_without_its_creator(node: Node, life: int) -> None:
    request = begin(node, life)
    assert (request.demand.actor_life, request.job.detached) == (life, True)
    commands = node.hear(NODE, m.WorkerGranted(request.request, make_worker("w9", node_id="n3")))
    assert [setup.env for setup in sent(commands, m.SetupWorker, AGAIN)] == [{"A": "b"}]
    (start,) = sent(commands, m.StartTasks, AGAIN)
    assert (start.functions, start.tasks[0].payload) == ([m.FunctionPart(1, b"class")], b"payload")
    (alive,) = calls_of(node.hear(AGAIN, m.TasksFinished([make_result(1)], 1)), "start_life")
    assert alive.arguments == {"actor_id": "a1", "life": life, "address": AGAIN, "is_kept": True}
    assert sent(answer(node, alive, False), m.KillWorker), "the registry has another life by now"


@pytest.mark.parametrize(
    "message",
    [m.WorkerExited(1, AGAIN, -9, "killed"), m.NodeLost("n3", "silent")],
)
def test_a_life_that_ends_before_it_began_is_the_registrys_to_judge(node: Node, message: m.Message) -> None:
    request = begin(node)
    node.hear(NODE, m.WorkerGranted(request.request, make_worker("w9", node_id="n3")))
    commands = (
        node.machine.actors.node_lost("n3", "silent") if isinstance(message, m.NodeLost) else node.hear(NODE, message)
    )
    (ended,) = calls_of(commands, "end_life")
    assert (ended.arguments["life"], ended.arguments["teller"], ended.arguments["address"]) == (0, "host", None)
    again = msgspec.structs.replace(DETACHED, life=1)
    assert len(sent(answer(node, ended, ("restart", again, CREATION)), m.RequestWorkers)) == 1
    assert node.machine.actors.keeper.creations["a1"].actor.life == 1


def test_the_constructors_error_is_the_end_of_a_detached_actor(node: Node) -> None:
    request = begin(node)
    node.hear(NODE, m.WorkerGranted(request.request, make_worker("w9", node_id="n3")))
    commands = node.hear(AGAIN, m.TasksFinished([make_result(1, TaskStatus.ERROR, b"error")], 1))
    (buried,) = calls_of(commands, "bury_actor")
    assert buried.arguments["error"]
    assert sent(commands, m.KillWorker)


def test_workers_of_a_former_life_and_of_the_dead_are_ended(node: Node) -> None:
    for number, (actor_id, life) in enumerate([("a1", 0), ("a1", 1), ("a2", 0)], 1):
        demand = m.WorkerDemand(WorkerKind.ACTOR, {}, actor_id=actor_id, actor_life=life)
        node.hear(REMOTE, m.RequestWorkers(number, 1, demand, JOB))
    (read,) = calls_of(node.handle(ne.ActorEventRead("a1", "restarting")), "get_actor")
    commands = answer(node, read, msgspec.structs.replace(ALIVE, state="restarting", life=1))
    assert [command.process_id for command in of_type(commands, ne.EndWorker)] == ["w1"]
    (read,) = calls_of(node.handle(ne.ActorEventRead("a2", "dead")), "get_actor")
    commands = answer(node, read, msgspec.structs.replace(ALIVE, actor_id="a2", state="dead"))
    assert [command.process_id for command in of_type(commands, ne.EndWorker)] == ["w3"]
    assert not node.handle(ne.ActorEventRead("a9", "dead")), "nobody here cares"


def test_who_waits_for_a_life_is_not_told_of_a_former_one(node: Node) -> None:
    (read,) = calls_of(node.hear(DRIVER, m.LocateActor(5, "a1", "", "", 1)), "get_actor")
    assert not sent(answer(node, read, ALIVE), m.ActorLocated)
    (read,) = calls_of(node.handle(ne.ActorEventRead("a1", "restarting")), "get_actor")
    assert not sent(answer(node, read, msgspec.structs.replace(ALIVE, state="restarting", life=1)), m.ActorLocated)
    (read,) = calls_of(node.handle(ne.ActorEventRead("a1", "alive")), "get_actor")
    (located,) = sent(answer(node, read, msgspec.structs.replace(ALIVE, life=1)), m.ActorLocated, DRIVER)
    assert (located.request, located.actor.life) == (5, 1)


def test_who_was_wrongly_told_that_a_life_is_over_hears_that_it_goes_on(node: Node) -> None:
    # A message to it came back, because two nodes had lost sight of one another.
    actors = node.machine.actors
    (read,) = calls_of(node.hear(DRIVER, m.LocateActor(5, "a1", "", "", 1)), "get_actor")
    assert not sent(answer(node, read, ALIVE), m.ActorLocated)
    (read,) = calls_of(actors.time_passed(NOW_S + 2), "get_actor")
    assert not sent(answer(node, read, ALIVE), m.ActorLocated)
    (read,) = calls_of(actors.time_passed(NOW_S + NEXT_LIFE_WAIT_S), "get_actor")
    assert [located.actor.life for located in sent(answer(node, read, ALIVE), m.ActorLocated, DRIVER)] == [0]


def test_an_actor_that_is_not_known_yet_is_waited_for(node: Node) -> None:
    actors = node.machine.actors
    (read,) = calls_of(node.hear(DRIVER, m.LocateActor(5, "a1", "", "")), "get_actor")
    assert not sent(answer(node, read, None), m.ActorLocated)
    (read,) = calls_of(actors.time_passed(NOW_S + 2), "get_actor")
    assert not sent(answer(node, read, None), m.ActorLocated)
    (read,) = calls_of(actors.time_passed(NOW_S + UNKNOWN_WAIT_S), "get_actor")
    assert [located.actor.state for located in sent(answer(node, read, None), m.ActorLocated, DRIVER)] == ["unknown"]


def test_the_actors_of_a_creator_end_with_it(node: Node) -> None:
    node.hear(DRIVER, m.RegisterActor(0, PENDING))
    (ended,) = calls_of(node.handle(ne.ProcessLeft(DRIVER)), "end_actors")
    assert ended.arguments["actor_ids"] == ["a1"]


def test_a_node_that_joins_anew_gives_up_the_lives_that_it_was_making(node: Node) -> None:
    # The registry may have entered the actor while this node was not a member: then nobody takes it for an orphan.
    (call,) = calls_of(node.hear(DRIVER, m.RegisterActor(7, DETACHED, False, CREATION)), "create_actor")
    answer(node, call, None)
    actors = node.machine.actors
    actors.fenced()
    (ended,) = calls_of(actors.membership_heard(ms.Registered(2), is_alone=False), "end_life")
    assert (ended.arguments["life"], ended.arguments["teller"]) == (0, "host")
    again = msgspec.structs.replace(DETACHED, life=1)
    assert len(sent(answer(node, ended, ("restart", again, CREATION)), m.RequestWorkers)) == 1
    assert not calls_of(actors.membership_heard(ms.Registered(3), is_alone=False), "end_life")


def test_a_creator_hears_that_its_actor_was_killed(node: Node) -> None:
    node.hear(DRIVER, m.RegisterActor(0, ALIVE))
    (buried,) = calls_of(node.hear(REMOTE, m.KillActor("a1", HOME, True, True)), "bury_actor")
    answer(node, buried, None)
    (read,) = calls_of(node.handle(ne.ActorEventRead("a1", "dead")), "get_actor")
    dead = msgspec.structs.replace(ALIVE, state="dead", text="killed")
    assert [located.request for located in sent(answer(node, read, dead), m.ActorLocated, DRIVER)] == [0]


@pytest.mark.parametrize("kind", ["NotConnected", "StoreFull", "AuthenticationFailed"])
def test_what_must_be_known_is_asked_until_the_store_answers(node: Node, kind: str) -> None:
    (ended,) = calls_of(node.hear(DRIVER, m.LifeEnded(3, "a1", 0, "killed")), "end_life")
    assert node.handle(ne.StoreRaised(ended.tag, kind, "not now")) == []
    assert node.machine.actors.time_passed(NOW_S) == [ended]
    again = msgspec.structs.replace(ALIVE, state="restarting", life=1)
    (located,) = sent(answer(node, ended, ("restart", again, b"")), m.ActorLocated, DRIVER)
    assert (located.request, located.actor.life) == (3, 1)


def test_an_actor_that_dies_as_soon_as_it_lives_is_noticed_by_its_node(node: Node) -> None:
    (read,) = calls_of(node.handle(ne.ActorEventRead("a1", "alive", W1)), "get_actor")
    there = msgspec.structs.replace(DETACHED, state="alive", address=W1)
    assert len(calls_of(answer(node, read, there), "end_life")) == 1


def test_an_actor_whose_calls_the_store_has_lost_does_not_begin_anew_without_them(node: Node) -> None:
    node.join(W1)
    (loading,) = calls_of(node.hear(W1, LoadActor(1, "a1")), "load_calls")
    commands = answer(node, loading, (b"", 0, [], "2 calls are lost"))
    assert sent(commands, ActorLoaded) == [] and of_type(commands, ne.Warn)
    (buried,) = calls_of(commands, "bury_actor")
    assert buried.arguments["text"] == "2 calls are lost"
