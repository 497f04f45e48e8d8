from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.messages import Address, LastTask, TaskStatus
from clusterpool.core.stragglers import LATE_FACTOR, LATE_MIN_S, is_late
from tests.core.machines import NODE, Owner, make_result, make_task, of_type, sent

COPY = 1000  # the first number that the owner gives


@pytest.mark.parametrize(
    ("running_s", "mean_s", "late"),
    [
        (LATE_MIN_S - 0.01, 0.001, False),  # a second start would cost more than it saves
        (LATE_MIN_S, 0.001, True),
        (1.9, 1.0, False),
        (LATE_FACTOR, 1.0, True),
    ],
)
def test_twice_the_usual_time_is_late(running_s: float, mean_s: float, late: bool) -> None:
    assert is_late(running_s, mean_s) is late


class Pair:
    """A group of workers on two nodes, in which task 1 runs on w1; its function usually takes 0.1 s."""

    def __init__(self, *, workers: int = 2, retries: int = 0, safe: bool = True) -> None:
        self.owner = Owner()
        self.owner.handle(e.FunctionAdded(1, b"function", "work"))
        demand = m.WorkerDemand(m.WorkerKind.GROUP, {})
        self.owner.handle(e.SetOpened(1, demand, e.SetupPlan(), workers, None, safe))
        self.nodes = {"w1": "n1", "w2": "n1", "w3": "n2"}
        for lease in range(1, workers + 1):
            self.owner.grant(1, f"w{lease}", lease=lease, node_id=self.nodes[f"w{lease}"])
        self.set = self.owner.machine.sets[1]
        self.set.dispatcher._mean_s[1] = 0.1
        self.owner.submit(make_task(1, retries=retries))

    def pass_time(self) -> list[Any]:
        wakeup_s = self.owner.machine.next_wakeup_s(self.owner.now_s)
        assert wakeup_s is not None, "nothing is due"
        self.owner.now_s = max(self.owner.now_s, wakeup_s)
        return self.owner.handle(e.TimePassed())

    def finish(self, name: str, *results: m.TaskResult) -> list[Any]:
        return self.owner.finish(name, *results, node_id=self.nodes.get(name, "n1"))

    def exit(self, name: str, ran: int) -> list[Any]:
        node_id = self.nodes.get(name, "n1")
        message = m.WorkerExited(1, Address(node_id, name), -9, "it was killed", LastTask(ran, ran))
        return self.owner.hear(Address(node_id, node_id), message)


def starts(commands: list[Any]) -> list[tuple[str, list[int]]]:
    return [
        (command.destination.process_id, [spec.number for spec in command.message.tasks])
        for command in of_type(commands, e.Send)
        if isinstance(command.message, m.StartTasks)
    ]


def delivered(commands: list[Any]) -> list[tuple[int, bytes]]:
    return [
        (task.spec.number, result.payload)
        for command in of_type(commands, e.DeliverResults)
        for task, result in command.results
    ]


def failed(commands: list[Any]) -> list[tuple[str, list[int]]]:
    return [(command.kind, [task.spec.number for task in command.tasks]) for command in of_type(commands, e.FailTasks)]


def test_a_late_task_is_started_again_on_an_idle_worker_once_only() -> None:
    pair = Pair(workers=3)
    assert starts(pair.pass_time()) == [("w3", [COPY])], "the worker of another node comes first"
    assert pair.owner.now_s == pytest.approx(100.2)
    assert pair.owner.machine.next_wakeup_s(pair.owner.now_s) is None, "it would be started a third time"


def test_nothing_is_repeated_where_the_user_has_not_said_so() -> None:
    pair = Pair(safe=False)
    assert pair.owner.machine.next_wakeup_s(100.0) is None


def test_nothing_is_repeated_while_calls_wait_or_no_worker_is_idle_or_the_usual_time_is_unknown() -> None:
    busy = Pair()
    busy.owner.submit(make_task(2), make_task(3))
    assert busy.owner.machine.next_wakeup_s(100.0) is None
    unknown = Pair()
    unknown.set.dispatcher._mean_s.clear()
    assert unknown.owner.machine.next_wakeup_s(100.0) is None
    blocked = Pair()
    blocked.owner.hear(Address("n1", "w1"), m.TasksFinished([], 0, True))
    assert blocked.owner.machine.next_wakeup_s(100.0) is None, "it waits for tasks of its own"


def test_the_copys_result_is_the_tasks_and_the_original_is_stopped() -> None:
    pair = Pair()
    pair.pass_time()
    commands = pair.finish("w2", make_result(COPY, payload=b"copy"))
    assert delivered(commands) == [(1, b"copy")]
    assert [message.lease for message in sent(commands, m.KillWorker)] == [1]
    assert not pair.owner.machine.tasks
    assert delivered(pair.finish("w1", make_result(1))) == [], "it was told twice"
    (left,) = of_type(pair.exit("w1", 1), e.SetWorkerLeft)
    assert left.was_expected


def test_the_originals_result_stops_the_copy() -> None:
    pair = Pair()
    pair.pass_time()
    commands = pair.finish("w1", make_result(1, payload=b"original"))
    assert delivered(commands) == [(1, b"original")]
    assert [message.lease for message in sent(commands, m.KillWorker)] == [2]
    assert not pair.owner.machine.tasks
    late = m.TaskResult(COPY, TaskStatus.STORED, b"", m.ResultExtras(m.ValuePart(stored=m.StoredValue("x", 1, ["n1"]))))
    assert sent(pair.finish("w2", late), m.FreeObjects) == [m.FreeObjects(["x"])], "a stored result stayed for ever"


def test_a_copy_that_fails_leaves_the_matter_to_the_original() -> None:
    pair = Pair()
    pair.pass_time()
    assert delivered(pair.finish("w2", make_result(COPY, TaskStatus.ERROR))) == []
    assert delivered(pair.finish("w1", make_result(1, payload=b"original"))) == [(1, b"original")]
    assert not pair.owner.machine.tasks


def test_a_copy_whose_worker_dies_is_forgotten() -> None:
    pair = Pair()
    pair.pass_time()
    commands = pair.exit("w2", COPY)
    assert (failed(commands), starts(commands)) == ([], [])
    assert delivered(pair.finish("w1", make_result(1))) == [(1, b"value")]
    assert not pair.owner.machine.tasks


def test_an_original_whose_worker_dies_waits_for_its_copy() -> None:
    pair = Pair(retries=0)
    pair.pass_time()
    commands = pair.exit("w1", 1)
    assert (failed(commands), starts(commands)) == ([], [])
    assert delivered(pair.finish("w2", make_result(COPY, payload=b"copy"))) == [(1, b"copy")]
    assert not pair.owner.machine.tasks


@pytest.mark.parametrize(("retries", "expected"), [(0, [("worker_died", [1])]), (1, [])])
def test_when_both_workers_die_the_original_is_saved_or_fails(retries: int, expected: list[Any]) -> None:
    pair = Pair(retries=retries)
    pair.pass_time()
    pair.exit("w1", 1)
    assert failed(pair.exit("w2", COPY)) == expected
    if retries:
        assert starts(pair.owner.grant(2, "w9")) == [("w9", [1])]


def test_a_task_that_is_stopped_is_stopped_twice() -> None:
    pair = Pair()
    pair.pass_time()
    commands = pair.owner.handle(e.TaskCancelAsked(1, True))
    assert sorted(message.lease for message in sent(commands, m.KillWorker)) == [1, 2]
    assert failed(pair.exit("w1", 1)) == [("cancelled", [1])]
    assert failed(pair.exit("w2", COPY)) == []
    assert not pair.owner.machine.tasks


def test_terminating_tells_a_held_task() -> None:
    pair = Pair()
    pair.pass_time()
    pair.exit("w1", 1)
    commands = pair.owner.handle(e.SetTerminated(1))
    assert failed(commands) == [("cancelled", [1])]
    assert not pair.owner.machine.tasks


def test_references_of_arguments_are_handed_over_for_both_attempts() -> None:
    pair = Pair()
    pair.finish("w1", make_result(1))
    reference = pair.owner.put(5000)
    task = make_task(2, references=[reference])
    pair.owner.handle(e.TaskWithArgumentsSubmitted(1, "", task, e.TaskArguments([], [reference])))
    pair.owner.handle(e.ReferencesDropped([(reference.owner, reference.number)]))
    assert starts(pair.pass_time()) == [("w2", [COPY])]
    pair.finish("w2", make_result(COPY))
    record = pair.owner.machine.objects.table.owned[5000]
    assert sum(record.borrowers.values()) == 2, "each worker gives back what it was handed"
    for name in ("w1", "w2"):
        pair.owner.hear(Address("n1", name), m.RemoveBorrower([5000], [1]))
    assert 5000 not in pair.owner.machine.objects.table.owned


@given(
    st.lists(
        st.tuples(st.sampled_from(["time", "ok", "error", "retryable", "exit", "grant"]), st.integers(0, 2)),
        max_size=40,
    )
)
def test_whatever_happens_each_task_is_told_once(steps: list[tuple[str, int]]) -> None:
    pair = Pair(workers=3, retries=2)
    owner = pair.owner
    owner.submit(make_task(2, retries=0), make_task(3, retries=1))
    told: list[int] = []
    requests: dict[int, int] = {}
    names = 10

    def take(commands: list[Any]) -> None:
        told.extend(number for number, _ in delivered(commands))
        told.extend(
            task.spec.number
            for command in of_type(commands, e.FailTasks)
            for task in command.tasks
            if task.sink is not None
        )
        for message in sent(commands, m.RequestWorkers):
            requests[message.request] = message.count

    def step(kind: str, which: int) -> None:
        nonlocal names
        slots = list(pair.set.dispatcher.slots.values())
        busy = [slot for slot in slots if slot.outstanding]
        if kind == "time":
            owner.now_s += 0.25
            take(owner.handle(e.TimePassed()))
        elif kind == "grant" and requests:
            request = next(iter(requests))
            requests[request] -= 1
            if not requests[request]:
                del requests[request]
            names += 1
            take(owner.grant(request, f"w{names}", lease=names))
        elif busy and kind in ("ok", "error", "retryable", "exit"):
            slot = busy[which % len(busy)]
            number = next(iter(slot.outstanding))
            if kind == "exit":
                message = m.WorkerExited(1, slot.address, -9, "", LastTask(number, number))
                take(owner.hear(NODE, message))
                return
            status = TaskStatus.OK if kind == "ok" else TaskStatus.ERROR
            extras = m.ResultExtras(is_retryable=True) if kind == "retryable" else None
            result = m.TaskResult(number, status, b"", extras)
            take(owner.hear(slot.address, m.TasksFinished([result], 10**8)))

    for kind, which in steps:
        step(kind, which)
    for _ in range(200):
        if not owner.machine.tasks:
            break
        for kind in ("grant", "ok", "time"):
            step(kind, 0)
    assert sorted(told) == [1, 2, 3]
    assert not owner.machine.tasks
