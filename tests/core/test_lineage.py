"""Objects whose last copy is lost are made again by the tasks that made them."""

from __future__ import annotations

import pytest

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core import recovery_messages as r
from clusterpool.core.dispatch import NODE_LOSSES_ONLY
from clusterpool.core.messages import Address, Reference, ResultExtras, StoredValue, TaskResult, TaskStatus, ValuePart
from tests.core.machines import DRIVER, NODE, Owner, make_result, make_task, of_type, sent

N2, N3 = Address("n2", "n2"), Address("n3", "n3")
OTHER = Address("n3", "w9")
LOST_N2 = m.NodeLost("n2", "silent")


def stored(number: int, node_id: str = "n2", *, attempt: int = 1) -> ValuePart:
    name = f"d1.{number}" if attempt == 1 else f"d1.{number}~{attempt}"
    return ValuePart(stored=StoredValue(name, 10**6, [node_id], DRIVER))


def made(number: int, node_id: str = "n2", *, attempt: int = 1) -> TaskResult:
    part = stored(number, node_id, attempt=attempt)
    return TaskResult(number, TaskStatus.STORED, b"", ResultExtras(part))


def made_several(number: int, *parts: ValuePart) -> TaskResult:
    return TaskResult(number, TaskStatus.MULTIPLE, b"", ResultExtras(None, list(parts)))


def ref(number: int) -> Reference:
    return Reference(DRIVER, number)


class Lineages(Owner):
    """An owner with a lease set, whose tasks run on one worker on n2 (w2) or, later, on one on n3 (w3)."""

    def __init__(self) -> None:
        super().__init__()
        self.open_set()
        self.leases = 0

    @property
    def lineage(self):  # type: ignore[no-untyped-def]
        return self.machine.recovery.lineage

    def submit_with(
        self, number: int, *dependencies: Reference, retries: int = 3, references: list[Reference] | None = None,
        returns: int = 1, function: int = 1,
    ) -> list[e.Command]:  # fmt: skip
        arguments = e.TaskArguments(list(dependencies), references or [], None, "holders", "kept")
        task = make_task(
            number, sink=None, retries=retries, function=function, references=references or [], returns=returns
        )
        return self.handle(e.TaskWithArgumentsSubmitted(1, "", task, arguments))

    def run(self, *results: TaskResult, node_id: str = "n2") -> list[e.Command]:
        """Have the tasks that wait run, on a worker of that node."""
        commands: list[e.Command] = []
        for result in results:
            slots = self.machine.sets[1].dispatcher.slots
            name = next((name for name, slot in slots.items() if slot.address.node_id == node_id), None)
            if name is None:
                self.leases += 1
                name = f"w{self.leases}"
                request = next(iter(self.machine.sets[1].requested))
                commands += self.grant(request, name, lease=self.leases, node_id=node_id)
            assert result.number in slots[name].outstanding, f"task {result.number} is not at {name}"
            commands += self.finish(name, result, node_id=node_id)
        return commands

    def make_first(self) -> None:
        """Task 1 runs; its large result, to which there is a reference, lies on n2."""
        self.submit(make_task(1, sink=None, retries=3))
        self.run(made(1))

    def make_first_two(self) -> None:
        """And so does task 2, which takes the first one's."""
        self.make_first()
        self.submit_with(2, ref(1))
        self.run(made(2))

    def drop(self, *numbers: int) -> list[e.Command]:
        return self.handle(e.ReferencesDropped([(DRIVER, number) for number in numbers]))

    def lose(self) -> list[e.Command]:
        return self.hear(NODE, LOST_N2)

    def want(self, number: int) -> list[e.Command]:
        return self.handle(e.ValueWanted(ref(number)))

    def value(self, number: int) -> ValuePart:
        value = self.value_of(ref(number))
        assert value is not None
        return value

    def is_clean(self) -> bool:
        machine, recovery = self.machine, self.machine.recovery
        kept = (
            machine.tasks, machine.objects.table.owned, machine.objects.table.borrowed, machine.objects._arguments,
            self.lineage.by_task, self.lineage.by_object, self.lineage.functions, self.lineage.evicted,
            recovery.running, recovery.unread, recovery._number_by_name, recovery._lost_texts,
            machine.arguments.targets,
        )  # fmt: skip
        return not any(kept) and self.lineage.size_bytes == 0


@pytest.fixture
def owner() -> Lineages:
    return Lineages()


def specs(commands: list[e.Command]) -> list[m.TaskSpec]:
    return [spec for start in sent(commands, m.StartTasks) for spec in start.tasks]


def attempts(commands: list[e.Command]) -> list[tuple[int, int]]:
    return [(spec.number, spec.extras.attempt if spec.extras is not None else 1) for spec in specs(commands)]


def test_a_lost_object_is_made_again_when_it_is_wanted(owner: Lineages) -> None:
    owner.make_first()
    assert not specs(owner.lose())  # nobody wants it yet
    assert owner.value(1).stored == StoredValue("d1.1", 10**6, [], DRIVER)
    owner.want(1)
    assert owner.value_of(ref(1)) is None
    commands = owner.run(made(1, "n3", attempt=2), node_id="n3")
    assert attempts(commands) == [(1, 2)]
    assert of_type(commands, e.ValuesKnown)[0].keys == [(DRIVER, 1)]
    assert owner.value(1) == stored(1, "n3", attempt=2)
    assert sent(owner.drop(1), m.FreeObjects, N3) == [m.FreeObjects(["d1.1~2"])]
    assert owner.is_clean()


def test_a_chain_is_made_again_from_its_start_though_its_middle_was_freed(owner: Lineages) -> None:
    owner.make_first()
    for number in (2, 3):
        owner.submit_with(number, ref(number - 1))
        owner.run(made(number))
    owner.drop(1, 2)
    assert set(owner.machine.objects.table.owned) == {3}
    assert set(owner.lineage.by_task) == {1, 2, 3}
    owner.lose()
    owner.want(3)
    commands = owner.run(*(made(number, "n3", attempt=2) for number in (1, 2, 3)), node_id="n3")
    assert attempts(commands) == [(1, 2), (2, 2), (3, 2)]
    # Each got what the one before it has made anew, and that is freed as soon as it is used.
    values = [spec.extras.arguments for spec in specs(commands)[1:] if spec.extras is not None]
    assert values == [[stored(1, "n3", attempt=2)], [stored(2, "n3", attempt=2)]]
    assert sent(commands, m.FreeObjects, N3) == [m.FreeObjects(["d1.1~2"]), m.FreeObjects(["d1.2~2"])]
    owner.drop(3)
    assert owner.is_clean()


def test_a_long_chain_needs_no_deep_stack(owner: Lineages) -> None:
    count = 3000
    owner.make_first()
    for number in range(2, count + 1):
        owner.submit_with(number, ref(number - 1))
        owner.run(made(number))
        owner.drop(number - 1)
    owner.lose()
    owner.want(count)
    owner.run(*(made(number, "n3", attempt=2) for number in range(1, count + 1)), node_id="n3")
    assert owner.value(count) == stored(count, "n3", attempt=2)
    owner.drop(count)
    assert owner.is_clean()


def test_an_error_goes_down_a_long_chain_without_a_deep_stack(owner: Lineages) -> None:
    owner.submit(make_task(1, sink=None))
    for number in range(2, 2000):
        owner.submit_with(number, ref(number - 1))
    owner.run(make_result(1, TaskStatus.ERROR, b"error"))
    assert owner.value(1999).error == b"error"


def test_both_arms_of_a_diamond_use_one_rebuilt_top(owner: Lineages) -> None:
    owner.make_first()
    owner.submit_with(2, ref(1))
    owner.submit_with(3, ref(1))
    owner.run(made(2), made(3))
    owner.submit_with(4, ref(2), ref(3))
    owner.run(made(4))
    owner.drop(1, 2, 3)
    owner.lose()
    owner.want(4)
    commands = owner.run(*(made(number, "n3", attempt=2) for number in (1, 2, 3, 4)), node_id="n3")
    assert attempts(commands) == [(1, 2), (2, 2), (3, 2), (4, 2)]
    owner.drop(4)
    assert owner.is_clean()


def test_only_the_lost_results_of_a_task_are_replaced(owner: Lineages) -> None:
    owner.submit(make_task(1, sink=None, retries=3, returns=3))
    owner.run(made_several(1, stored(1), ValuePart(payload=b"small"), stored(3)))
    owner.hear(N3, r.CopyMade("d1.3"))
    assert sent(owner.lose(), r.PromoteCopy, N3) == [r.PromoteCopy("d1.3")]
    owner.want(1)
    again = made_several(1, stored(1, "n4", attempt=2), ValuePart(payload=b"other"), stored(3, "n4", attempt=2))
    commands = owner.run(again, node_id="n4")
    assert sent(commands, m.FreeObjects, Address("n4", "n4")) == [m.FreeObjects(["d1.3~2"])]
    assert [owner.value(number) for number in (1, 2)] == [stored(1, "n4", attempt=2), ValuePart(payload=b"small")]
    assert owner.value(3) == stored(3, "n3")
    owner.drop(1, 2, 3)
    assert owner.is_clean()


def test_a_node_that_has_lost_its_copy_leaves_the_others_theirs(owner: Lineages) -> None:
    owner.handle(e.ValuePut(1, stored(1)))
    owner.hear(N3, r.CopyMade("d1.1"))
    commands = owner.hear(Address("n2", "n2"), r.CopyGone("d1.1", "its file could not be read"))
    assert sent(commands, r.PromoteCopy, N3) == [r.PromoteCopy("d1.1")]
    assert not sent(commands, m.FreeObjects)
    owner.hear(N3, r.CopyGone("d1.1", "its file /spill/d1.1 is damaged"))
    value = owner.value(1)
    assert value is not None and value.lost_kind == "object_lost"
    assert "its last copy, on node n3, is gone: its file /spill/d1.1 is damaged; it cannot be rebuilt" in value.lost


def test_several_lost_results_need_one_run(owner: Lineages) -> None:
    owner.submit(make_task(1, sink=None, retries=3, returns=2))
    owner.run(made_several(1, stored(1), stored(2)))
    owner.lose()
    owner.want(1)
    owner.want(2)
    commands = owner.run(made_several(1, stored(1, "n3", attempt=2), stored(2, "n3", attempt=2)), node_id="n3")
    assert attempts(commands) == [(1, 2)]
    assert owner.value(2) == stored(2, "n3", attempt=2)


def test_what_is_lost_while_its_task_runs_again_for_another_comes_with_that(owner: Lineages) -> None:
    owner.submit(make_task(1, sink=None, retries=3, returns=2))
    owner.run(made_several(1, stored(1), stored(2, "n3")))
    owner.lose()
    owner.want(1)
    owner.hear(N3, r.CopyGone("d1.2"))
    owner.submit_with(3, ref(2))
    again = made_several(1, stored(1, "n3", attempt=2), stored(2, "n3", attempt=2))
    commands = owner.run(again, make_result(3), node_id="n3")
    assert attempts(commands)[-1] == (3, 1)
    owner.drop(1, 2, 3)
    assert owner.is_clean()


def test_what_was_lost_and_not_wanted_is_taken_from_a_run_for_another(owner: Lineages) -> None:
    owner.submit(make_task(1, sink=None, retries=3, returns=2))
    owner.run(made_several(1, stored(1, "n3"), stored(2)))
    owner.lose()
    owner.want(2)
    owner.hear(N3, r.CopyGone("d1.1"))
    owner.run(made_several(1, stored(1, "n3", attempt=2), stored(2, "n3", attempt=2)), node_id="n3")
    assert owner.value(1) == stored(1, "n3", attempt=2)
    owner.drop(1, 2)
    assert owner.is_clean()


def test_what_was_small_the_second_time_may_be_let_go_before_what_was_made_of_it(owner: Lineages) -> None:
    owner.make_first_two()
    owner.lose()
    owner.want(1)
    owner.run(make_result(1), node_id="n3")
    owner.drop(1)
    owner.want(2)
    commands = owner.run(make_result(1), made(2, "n3", attempt=2), node_id="n3")
    assert attempts(commands)[-1] == (2, 2)
    owner.drop(2)
    assert owner.is_clean()


# --- who asks


def test_a_borrower_that_asks_gets_the_rebuilt_value(owner: Lineages) -> None:
    owner.make_first()
    owner.hear(NODE, m.AddBorrower(OTHER, [1]))
    owner.lose()
    assert not sent(owner.hear(OTHER, m.ResolveObject(5, 1)), m.ObjectResolved)
    commands = owner.run(made(1, "n3", attempt=2), node_id="n3")
    assert sent(commands, m.ObjectResolved, OTHER) == [m.ObjectResolved(5, stored(1, "n3", attempt=2))]


def unreadable(number: int, *gone: str, attempt: int = 1) -> m.UnreadablePart:
    part = stored(number, attempt=attempt).stored
    assert part is not None
    return m.UnreadablePart(part.object_id, list(gone), "nobody has it")


def test_a_reader_that_says_it_is_gone_is_believed(owner: Lineages) -> None:
    owner.make_first()
    owner.hear(NODE, m.AddBorrower(OTHER, [1]))
    commands = owner.hear(OTHER, m.ResolveObject(5, 1, unreadable(1, "n2")))
    assert not sent(commands, m.ObjectResolved)
    assert attempts(owner.run(make_result(1))) == []  # sent already: the worker was idle
    assert owner.value(1).payload == b"value"  # small this time
    owner.drop(1)
    owner.hear(OTHER, m.RemoveBorrower([1], [1]))
    assert owner.is_clean()


def test_a_reader_that_takes_the_owners_own_node_for_dead_is_not_believed(owner: Lineages) -> None:
    value = ValuePart(stored=StoredValue("d1.500", 10**6, ["n1", "n3"], DRIVER))
    owner.put(500, value)
    claim = m.UnreadablePart("d1.500", [], "both are gone", ["n1", "n3"])
    commands = owner.hear(OTHER, m.ResolveObject(5, 500, claim))
    left = ValuePart(stored=StoredValue("d1.500", 10**6, ["n1"], DRIVER))
    assert sent(commands, m.ObjectResolved, OTHER) == [m.ObjectResolved(5, left)]
    # Should the other live after all, it need not keep its copy.
    assert sent(commands, m.FreeObjects, N3) == [m.FreeObjects(["d1.500"])]


def test_a_reader_gets_the_other_copy(owner: Lineages) -> None:
    owner.make_first()
    owner.hear(N3, r.CopyMade("d1.1"))
    commands = owner.hear(OTHER, m.ResolveObject(5, 1, unreadable(1, "n2")))
    assert sent(commands, m.ObjectResolved, OTHER) == [m.ObjectResolved(5, stored(1, "n3"))]
    assert sent(commands, r.PromoteCopy, N3) == [r.PromoteCopy("d1.1")]


def test_a_late_complaint_of_the_old_value_changes_nothing(owner: Lineages) -> None:
    owner.make_first()
    owner.lose()
    owner.want(1)
    owner.run(made(1, "n3", attempt=2), node_id="n3")
    commands = owner.hear(OTHER, m.ResolveObject(5, 1, unreadable(1, "n2", "n3")))
    assert sent(commands, m.ObjectResolved, OTHER) == [m.ObjectResolved(5, stored(1, "n3", attempt=2))]


def test_a_task_whose_argument_was_not_there_is_sent_again_with_the_rebuilt_one(owner: Lineages) -> None:
    owner.make_first()
    owner.submit_with(2, ref(1), retries=0)
    lost = TaskResult(2, TaskStatus.LOST, b"", ResultExtras(unreadable=unreadable(1, "n2")))
    commands = owner.finish("w1", lost, node_id="n2")
    assert attempts(commands) == [(1, 2)]
    commands = owner.run(made(1, "n2", attempt=2), make_result(2))
    assert attempts(commands) == [(2, 1)]
    assert owner.value(2).payload == b"value"
    owner.drop(1, 2)
    assert owner.is_clean()


def test_a_task_whose_argument_nobody_can_reach_fails_at_last(owner: Lineages) -> None:
    owner.make_first()
    owner.submit_with(2, ref(1), retries=1)
    lost = TaskResult(2, TaskStatus.LOST, b"", ResultExtras(unreadable=unreadable(1)))
    owner.finish("w1", lost, node_id="n2")
    assert owner.value_of(ref(2)) is None
    owner.finish("w1", lost, node_id="n2")
    assert owner.value(2).lost_kind == "object_lost"
    assert owner.value(1) == stored(1)
    owner.drop(1, 2)
    assert owner.is_clean()


def test_a_queued_task_is_not_sent_with_an_argument_that_went_with_its_node(owner: Lineages) -> None:
    owner.submit_with(1024)
    owner.run(made(1024))
    owner.submit_with(2048)  # its worker is busy with this one
    owner.submit_with(3072, ref(1024))
    owner.lose()
    again = owner.grant(next(iter(owner.machine.sets[1].requested)), "w9", lease=9, node_id="n3")
    again += owner.finish("w9", make_result(2048), node_id="n3")
    assert attempts(again) == [(2048, 2), (1024, 2)]
    sent_last = owner.finish("w9", made(1024, "n3", attempt=2), node_id="n3")
    (spec,) = specs(sent_last)
    assert spec.extras is not None and [v.stored and v.stored.node_ids for v in spec.extras.arguments] == [["n3"]]


def test_a_resting_task_whose_argument_went_with_its_node_has_it_made_again_at_once(owner: Lineages) -> None:
    owner.submit_with(1024)
    owner.run(made(1024))
    owner.submit_with(2048, ref(1024))
    owner.hear(NODE, m.WorkerExited(1, Address("n2", "w1"), -9, "killed"))
    owner.grant(next(iter(owner.machine.sets[1].requested)), "w8", lease=8, node_id="n3")
    owner.hear(NODE, m.WorkerExited(8, Address("n3", "w8"), -9, "killed"))
    assert owner.machine.sets[1].rescue.count() == 1
    owner.lose()
    again = owner.grant(next(iter(owner.machine.sets[1].requested)), "w9", lease=9, node_id="n3")
    assert attempts(again) == [(1024, 2)]
    (spec,) = specs(owner.finish("w9", made(1024, "n3", attempt=2), node_id="n3"))
    assert spec.extras is not None and (spec.number, spec.extras.attempt) == (2048, 3)
    assert [v.stored and v.stored.node_ids for v in spec.extras.arguments] == [["n3"]]


def actor_with_calls(owner: Lineages, *, is_met: bool, retries: int = 0) -> list[e.Command]:
    """Call 2048 of an actor takes object 1024, which is on n2, and stands before call 3072."""
    owner.submit_with(1024)
    owner.run(made(1024))
    address = Address("n3", "a1") if is_met else None
    actor = m.ActorPart("a1", "C", {"f": 1}, address, "alive" if is_met else "pending", retries=retries)
    commands = owner.handle(e.ActorMet(actor))
    first, second = (make_task(n, sink=None, function=0, method="f", retries=retries) for n in (2048, 3072))
    commands += owner.handle(e.TaskWithArgumentsSubmitted(0, "a1", first, e.TaskArguments([ref(1024)], [])))
    return commands + owner.handle(e.ActorCallsSubmitted("a1", [second]))


def test_a_call_that_waits_for_its_actor_has_an_argument_that_went_with_its_node_made_again(owner: Lineages) -> None:
    (question,) = sent(actor_with_calls(owner, is_met=False), m.LocateActor)
    owner.lose()
    actor = m.ActorPart("a1", "C", {"f": 1}, Address("n3", "a1"), "alive")
    assert specs(owner.hear(NODE, m.ActorLocated(question.request, actor))) == [], "the order of calls stays"
    calls = owner.run(made(1024, "n3", attempt=2), node_id="n3")
    (rebuilt, first, second) = specs(calls)
    assert (rebuilt.number, first.number, second.number) == (1024, 2048, 3072)
    assert first.extras is not None
    assert [v.stored and v.stored.node_ids for v in first.extras.arguments] == [["n3"]]


def test_the_creation_of_an_actor_has_an_argument_that_went_with_its_node_made_again(owner: Lineages) -> None:
    owner.submit_with(1024)
    owner.run(made(1024))
    demand = m.WorkerDemand(m.WorkerKind.ACTOR, {}, actor_id="a1")
    opened = e.ActorOpened(
        m.ActorPart("a1", "C", {"f": 1}, None, "pending"), demand, e.SetupPlan(), make_task(2048, sink=None, name="C"),
        e.TaskArguments([ref(1024)], []),
    )  # fmt: skip
    owner.handle(opened)
    commands = owner.lose()
    (request,) = [request for request in sent(commands, m.RequestWorkers) if request.demand == demand]
    assert specs(owner.grant(request.request, "a1", lease=7, node_id="n3")) == []
    assert [spec.number for spec in specs(owner.run(made(1024, "n3", attempt=2), node_id="n3"))] == [1024, 2048]


def test_calls_that_are_sent_again_without_limit_wait_for_lost_arguments_too(owner: Lineages) -> None:
    (spec, _) = specs(actor_with_calls(owner, is_met=True, retries=-1))
    actor = Address("n3", "a1")
    lost = TaskResult(spec.number, TaskStatus.LOST, b"", ResultExtras(unreadable=unreadable(1024, "n2")))
    commands = owner.hear(actor, m.TasksFinished([lost], 0))
    assert owner.value_of(ref(spec.number)) is None
    commands += owner.run(made(1024, attempt=2))
    assert [spec.number for spec in specs(commands)] == [1024, 2048]


def test_a_cancelled_task_whose_argument_went_with_its_node_does_not_hold_up_the_closing(owner: Lineages) -> None:
    owner.submit_with(1024)
    owner.run(made(1024))
    owner.submit_with(2048)
    owner.submit_with(3072, ref(1024))
    owner.handle(e.TaskCancelAsked(3072, False))
    owner.handle(e.SetClosed(1))
    owner.lose()
    (request,) = owner.machine.sets[1].requested
    owner.grant(request, "w9", lease=9, node_id="n3")
    assert of_type(owner.finish("w9", make_result(2048), node_id="n3"), e.SetEnded)


def test_a_queued_task_asks_the_owner_of_an_argument_that_went_with_its_node(owner: Lineages) -> None:
    theirs = Reference(OTHER, 5)
    owner.handle(e.ReferencesMade([theirs]))
    owner.submit_with(1024)
    owner.run(make_result(1024))
    owner.submit_with(2048)
    (question,) = sent(owner.submit_with(3072, theirs), m.ResolveObject, OTHER)
    value = ValuePart(stored=StoredValue("w9.5", 10**6, ["n2"], OTHER))
    owner.hear(OTHER, m.ObjectResolved(question.request, value))
    (again,) = sent(owner.lose(), m.ResolveObject, OTHER)
    assert again.unreadable is not None and again.unreadable.dead == ["n2"]


def test_a_task_submitted_with_a_lost_argument_waits_for_it(owner: Lineages) -> None:
    owner.make_first()
    owner.lose()
    owner.submit_with(2, ref(1))
    commands = owner.run(made(1, "n3", attempt=2), make_result(2), node_id="n3")
    assert attempts(commands) == [(1, 2), (2, 1)]


def test_an_argument_lost_while_the_task_waited_for_another_is_rebuilt(owner: Lineages) -> None:
    owner.make_first()
    owner.submit(make_task(2, sink=None))
    owner.submit_with(3, ref(1), ref(2))
    owner.handle(e.ValueUnreadable(ref(1), unreadable(1, "n2")))  # somebody else wants it
    commands = owner.run(make_result(2), made(1, attempt=2), make_result(3))
    assert [number for number, _ in attempts(commands)][-1] == 3


# --- its end


def test_a_task_that_may_run_once_only_is_not_run_again(owner: Lineages) -> None:
    owner.submit(make_task(1, sink=None, retries=0))
    owner.run(made(1))
    owner.lose()
    value = owner.value(1)
    assert value.lost_kind == "object_lost"
    assert "n2" in value.lost and "silent" in value.lost and "retries" in value.lost
    owner.drop(1)
    assert owner.is_clean()


def test_a_task_is_run_again_as_often_as_its_retries_allow(owner: Lineages) -> None:
    owner.submit(make_task(1, sink=None, retries=2))
    owner.run(made(1))
    for attempt in (2, 3):
        owner.hear(OTHER, m.ResolveObject(attempt, 1, unreadable(1, "n2", attempt=attempt - 1)))
        owner.run(made(1, attempt=attempt))
    commands = owner.hear(OTHER, m.ResolveObject(9, 1, unreadable(1, "n2", attempt=3)))
    (answer,) = sent(commands, m.ObjectResolved, OTHER)
    assert answer.value.lost_kind == "object_lost"
    assert "retries" in answer.value.lost
    owner.drop(1)
    assert owner.is_clean()


def test_the_node_is_lost_again_while_the_chain_is_rebuilt(owner: Lineages) -> None:
    owner.make_first_two()
    owner.drop(1)
    owner.lose()
    owner.want(2)
    owner.run(made(1, "n3", attempt=2), node_id="n3")
    # Task 2 is at w2 on n3, with its argument there: both go.
    commands = owner.hear(NODE, m.NodeLost("n3", "silent too"))
    assert owner.value_of(ref(2)) is None
    (request,) = {message.request for message in sent(commands, m.RequestWorkers)}
    assert attempts(owner.grant(request, "w4", lease=4, node_id="n4")) == [(1, 3)]
    owner.finish("w4", made(1, "n4", attempt=3), node_id="n4")
    owner.finish("w4", made(2, "n4", attempt=3), node_id="n4")
    assert owner.value(2) == stored(2, "n4", attempt=3)
    owner.drop(2)
    assert owner.is_clean()


def test_what_a_rebuilt_task_raises_is_the_value(owner: Lineages) -> None:
    owner.make_first_two()
    owner.drop(1)
    owner.lose()
    owner.want(2)
    owner.run(make_result(1, TaskStatus.ERROR, b"error"), node_id="n3")
    assert owner.value(2).error == b"error"
    owner.drop(2)
    assert owner.is_clean()


def test_values_that_cannot_be_had_again_are_kept_for_the_tasks_that_need_them(owner: Lineages) -> None:
    owner.put(500, ValuePart(stored=StoredValue("d1.500", 10**6, ["n1"], DRIVER)))
    owner.submit_with(1, ref(500))
    owner.run(made(1))
    assert not sent(owner.drop(500), m.FreeObjects)
    owner.lose()
    owner.want(1)
    (spec,) = specs(owner.run(made(1, "n3", attempt=2), node_id="n3"))
    assert spec.extras is not None and spec.extras.arguments[0].stored is not None
    assert sent(owner.drop(1), m.FreeObjects, NODE) == [m.FreeObjects(["d1.500"])]
    assert owner.is_clean()


def test_the_oldest_lineage_goes_when_there_is_too_much(owner: Lineages) -> None:
    owner.lineage.bytes_max = 2500
    for number in (1, 2, 3):
        owner.submit(make_task(number, sink=None, retries=3))
        owner.run(made(number))
    assert list(owner.lineage.by_task) == [2, 3]
    owner.lose()
    assert "LINEAGE_BYTES_MAX" in owner.value(1).lost
    assert owner.value(2).lost_kind == ""
    owner.drop(1, 2, 3)
    assert owner.is_clean()


def test_a_chain_whose_start_is_forgotten_says_so(owner: Lineages) -> None:
    owner.make_first_two()
    owner.drop(1)
    owner.lineage.bytes_max = 2500
    owner.submit(make_task(3, sink=None, retries=3))
    owner.run(made(3))
    owner.lose()
    owner.want(2)
    assert "argument" in owner.value(2).lost
    owner.drop(2, 3)
    assert owner.is_clean()


def test_a_function_lives_as_long_as_it_may_be_needed_again(owner: Lineages) -> None:
    owner.handle(e.FunctionAdded(7, b"seven"))
    owner.submit(make_task(1, sink=None, retries=3, function=7))
    owner.run(made(1))
    owner.handle(e.FunctionsDropped([7]))
    assert owner.machine.functions.payloads[7] == b"seven"
    owner.lose()
    owner.want(1)
    commands = owner.run(made(1, "n3", attempt=2), node_id="n3")
    assert m.FunctionPart(7, b"seven") in [part for start in sent(commands, m.StartTasks) for part in start.functions]
    owner.drop(1)
    assert 7 not in owner.machine.functions.payloads
    assert owner.machine.functions.dropped == {}
    assert owner.is_clean()


def test_what_references_inside_a_payload_name_is_rebuilt_when_the_task_asks(owner: Lineages) -> None:
    owner.make_first()
    owner.submit_with(2, references=[ref(1)])
    worker = Address("n2", "w1")
    owner.run(made(2))
    owner.hear(worker, m.RemoveBorrower([1], [1]))
    owner.drop(1)
    owner.lose()
    owner.want(2)
    request = next(iter(owner.machine.sets[1].requested))
    owner.grant(request, "w5", lease=5, node_id="n3")
    helper = Address("n3", "w5")
    assert not sent(owner.hear(helper, m.ResolveObject(8, 1)), m.ObjectResolved)
    request = next(iter(owner.machine.sets[1].requested))
    owner.grant(request, "w6", lease=6, node_id="n3")
    commands = owner.finish("w6", made(1, "n3", attempt=2), node_id="n3")
    assert sent(commands, m.ObjectResolved, helper) == [m.ObjectResolved(8, stored(1, "n3", attempt=2))]
    owner.finish("w5", made(2, "n3", attempt=2), node_id="n3")
    owner.hear(helper, m.RemoveBorrower([1], [1]))
    owner.drop(2)
    assert owner.is_clean()


# --- copies


def test_copies_are_freed_with_the_object(owner: Lineages) -> None:
    owner.make_first()
    owner.hear(N3, r.CopyMade("d1.1"))
    commands = owner.drop(1)
    assert [len(sent(commands, m.FreeObjects, node)) for node in (N2, N3)] == [1, 1]
    assert sent(owner.hear(N3, r.CopyMade("d1.1")), m.FreeObjects, N3) == [m.FreeObjects(["d1.1"])]
    assert owner.is_clean()


def test_a_copy_that_was_evicted_is_not_counted_on(owner: Lineages) -> None:
    owner.make_first()
    owner.hear(N3, r.CopyMade("d1.1"))
    owner.hear(N3, r.CopyGone("d1.1"))
    owner.lose()
    assert owner.value(1).stored == StoredValue("d1.1", 10**6, [], DRIVER)


def test_results_that_went_with_their_worker_are_freed(owner: Lineages) -> None:
    owner.submit(*(make_task(number, retries=3) for number in (1, 2)))
    owner.grant(1, "w1", node_id="n2")
    gone = m.WorkerExited(1, Address("n2", "w1"), -9, "killed", m.LastTask(0, 1))
    assert sent(owner.hear(N2, gone), m.FreeObjects, N2) == [m.FreeObjects(["d1.1"])]


# --- results for sinks


@pytest.mark.parametrize("retries", [3, NODE_LOSSES_ONLY])
def test_a_result_that_is_lost_before_it_was_read_is_made_again(owner: Lineages, retries: int) -> None:
    owner.submit(make_task(1, retries=retries))
    commands = owner.run(made(1))
    assert len(of_type(commands, e.DeliverResults)) == 1
    owner.lose()
    owner.handle(e.ResultUnreadable(make_task(1), "gone"))
    commands = owner.run(made(1, "n3", attempt=2), node_id="n3")
    assert attempts(commands) == [(1, 2)]
    assert len(of_type(commands, e.DeliverResults)) == 1
    owner.handle(e.ResultRead(1))
    assert owner.is_clean()


def test_a_result_that_may_not_be_made_again_fails_as_its_worker_would(owner: Lineages) -> None:
    owner.submit(make_task(1, retries=0))
    owner.run(made(1))
    (failure,) = of_type(owner.handle(e.ResultUnreadable(make_task(1), "gone")), e.FailTasks)
    assert (failure.kind, [task.spec.number for task in failure.tasks]) == ("worker_died", [1])
    assert owner.is_clean()


def test_a_closed_set_stays_until_its_results_are_read() -> None:
    owner = Lineages()
    owner.open_set(2, size=1)
    owner.grant(1, "w1")
    owner.submit(make_task(1, retries=1), set_number=2)
    owner.finish("w1", made(1))
    assert not sent(owner.handle(e.SetClosed(2)), m.RetireWorker)
    assert sent(owner.handle(e.ResultRead(1)), m.RetireWorker)


# --- streams


def item(index: int, attempt: int = 1, node_id: str = "n2") -> m.StreamItem:
    name = "d1.1" if attempt == 1 else f"d1.1~{attempt}"
    value = StoredValue(f"{name}s{index}", 10**6, [node_id], DRIVER)
    return m.StreamItem(1, index, ValuePart(stored=value))


def test_lost_items_of_a_stream_are_made_again_by_its_generator(owner: Lineages) -> None:
    stream = owner.machine.objects.open_stream(1)
    owner.submit(make_task(1, sink=None, returns=-1, retries=3))
    owner.grant(1, "w1", node_id="n2")
    for index in range(3):
        owner.hear(Address("n2", "w1"), item(index))
    owner.finish("w1", make_result(1, TaskStatus.STREAM_END, b"3"), node_id="n2")
    first, second, third = stream.items
    owner.drop(second)
    owner.handle(e.StreamClosed(1, 3))
    owner.lose()
    owner.want(third)
    request = next(iter(owner.machine.sets[1].requested))
    owner.grant(request, "w2", lease=2, node_id="n3")
    commands: list[e.Command] = []
    for index in range(3):
        commands += owner.hear(Address("n3", "w2"), item(index, 2, "n3"))
    assert sent(commands, m.FreeObjects, N3) == [m.FreeObjects(["d1.1~2s1"])]
    assert [owner.value(number).stored for number in (first, third)] == [
        StoredValue("d1.1~2s0", 10**6, ["n3"], DRIVER), StoredValue("d1.1~2s2", 10**6, ["n3"], DRIVER)
    ]  # fmt: skip
    owner.finish("w2", make_result(1, TaskStatus.STREAM_END, b"3"), node_id="n3")
    owner.drop(first, third)
    assert owner.is_clean()


def test_items_lost_while_the_generator_runs_come_with_its_next_attempt(owner: Lineages) -> None:
    stream = owner.machine.objects.open_stream(1)
    owner.submit(make_task(1, sink=None, returns=-1, retries=3))
    owner.grant(1, "w1", node_id="n2")
    owner.hear(Address("n2", "w1"), item(0))
    owner.lose()
    assert owner.value_of(ref(stream.items[0])) is None
    request = next(iter(owner.machine.sets[1].requested))
    owner.grant(request, "w2", lease=2, node_id="n3")
    owner.hear(Address("n3", "w2"), item(0, 1, "n3"))
    assert owner.value(stream.items[0]).stored == StoredValue("d1.1s0", 10**6, ["n3"], DRIVER)
