from __future__ import annotations

import itertools
from typing import Any

import pytest

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.chunks import ChunkTable
from clusterpool.core.dispatch import NODE_LOSSES_ONLY
from clusterpool.core.lease_needs import REQUESTED_MAX
from clusterpool.core.messages import Address, TaskStatus, WorkerKind
from clusterpool.core.rescue import NODE_LOSSES_MAX, Rescue
from clusterpool.core.setup_failures import SETUP_FAILURES_MAX
from clusterpool.core.stopping import SIGKILL
from clusterpool.core.worker_set import (
    LINGER_S,
    SIGTERM,
    START_FAILURES_MAX,
    WorkerSet,
)
from tests.core.machines import JOB, NODE, Owner, make_result, make_task, make_worker, of_type, sent

NOW_S = 100.0


class Set:
    """A worker set with the bookkeeping of its owner."""

    def __init__(
        self,
        *,
        size: int | None = None,
        runs_max: int | None = None,
        env: bool = False,
        setup: e.SetupPlan | None = None,
        demand: m.WorkerDemand | None = None,
    ) -> None:
        self.set_by_process: dict[str, WorkerSet] = {}
        kind = WorkerKind.TASK if size is None else WorkerKind.GROUP
        self.set = WorkerSet(
            1,
            node=NODE,
            job=JOB,
            demand=demand or m.WorkerDemand(kind, {}),
            setup=setup or e.SetupPlan(env={"A": "1"} if env else {}),
            size=size,
            runs_max=runs_max,
            requests=itertools.count(1),
            functions={1: b"one", 2: b"two"},
            set_by_process=self.set_by_process,
            rescue=Rescue({1: "work"}, ChunkTable(lambda _: None, lambda _: [])),
        )
        self.opened = self.set.advance(NOW_S)

    def join(self, *names: str, request: int = 1, now_s: float = NOW_S) -> list[Any]:
        """Workers are granted, set up and ready."""
        commands: list[Any] = []
        for name in names:
            commands += self.set.granted(request, make_worker(name, lease=int(name[1:])), now_s)
            commands += self.set.worker_ready(name, now_s)
        return commands

    def finish(self, name: str, *results: m.TaskResult, now_s: float = NOW_S) -> list[Any]:
        self.set.finished(name, m.TasksFinished(list(results), 10**8), now_s)
        return self.set.advance(now_s)

    def exit(self, name: str, exit_code: int = -9, *, ran: int = -1) -> list[Any]:
        return self.set.exited(name, exit_code, "it was killed", NOW_S, task=m.LastTask(ran, ran))

    def submit(self, *numbers: int, retries: int = 0) -> list[Any]:
        return self.set.submit([make_task(number, retries=retries) for number in numbers], NOW_S)


def failed(commands: list[Any]) -> list[tuple[str, list[int]]]:
    return [(command.kind, [task.spec.number for task in command.tasks]) for command in of_type(commands, e.FailTasks)]


def started(commands: list[Any]) -> list[tuple[int, int]]:
    """Which tasks are sent, and which attempt each is."""
    specs = [spec for message in sent(commands, m.StartTasks) for spec in message.tasks]
    return [(spec.number, spec.extras.attempt if spec.extras is not None else 1) for spec in specs]


def counts(commands: list[Any]) -> list[int]:
    """How many workers the commands ask for."""
    return [message.count for message in sent(commands, m.RequestWorkers)]


def retired(commands: list[Any]) -> list[str]:
    return [
        command.destination.process_id
        for command in of_type(commands, e.Send)
        if isinstance(command.message, m.RetireWorker)
    ]


# --- groups


def test_a_worker_that_lingers_counts_as_ended() -> None:
    """It stays for what others may need of it, and nobody waits for it: neither its group's end nor the next worker."""
    owner = Owner()
    owner.open_set(size=1, runs_max=1)
    owner.grant(1, "w1")
    owner.submit(make_task(1), make_task(2))
    assert retired(owner.finish("w1", make_result(1))) == ["w1"]
    commands = owner.hear(Address("n1", "w1"), m.WorkerLingers())
    (left,) = of_type(commands, e.SetWorkerLeft)
    assert (left.worker.address.process_id, left.exit_code, left.was_expected) == ("w1", 0, True)
    owner.grant(2, "w2", lease=2)
    owner.finish("w2", make_result(2))
    owner.handle(e.SetClosed(1))
    assert of_type(owner.hear(Address("n1", "w2"), m.WorkerLingers()), e.SetEnded)
    assert owner.hear(NODE, m.WorkerExited(1, Address("n1", "w1"), 0, "")) == []


def test_a_group_asks_for_its_size_at_once() -> None:
    assert counts(Set(size=3).opened) == [3]


def test_a_worker_of_a_group_gets_no_task_before_its_setup_is_done() -> None:
    group = Set(size=1)
    group.submit(7)
    granted = group.set.granted(1, make_worker("w1"), NOW_S)
    assert len(sent(granted, m.SetupWorker)) == 1
    assert not sent(granted, m.StartTasks)
    ready = group.set.worker_ready("w1", NOW_S)
    assert [command.worker.address.process_id for command in of_type(ready, e.SetWorkerJoined)] == ["w1"]
    assert [spec.number for message in sent(ready, m.StartTasks) for spec in message.tasks] == [7]
    assert group.set.worker_ready("w1", NOW_S) == [], "ready twice"


def test_a_worker_whose_request_was_cancelled_is_given_back() -> None:
    group = Set(size=2)
    group.join("w1")
    commands = group.set.resize(1, NOW_S)
    assert [(message.request, message.count) for message in sent(commands, m.CancelRequest)] == [(1, 1)]
    late = group.set.granted(1, make_worker("w2", lease=2), NOW_S)
    assert sent(late, m.ReleaseWorkers) == [m.ReleaseWorkers([2], False)]
    assert "w2" not in group.set.held


@pytest.mark.parametrize(("name", "is_expected"), [("w1", True), ("w2", False)])
def test_an_exit_that_nobody_wished_for_is_told_from_one_that_was(name: str, is_expected: bool) -> None:
    group = Set(size=2)
    group.join("w1", "w2")
    assert retired(group.set.resize(1, NOW_S)) == ["w1"]
    (left,) = of_type(group.exit(name), e.SetWorkerLeft)
    assert left.was_expected is is_expected


def test_a_worker_that_dies_is_replaced() -> None:
    group = Set(size=2)
    group.join("w1", "w2")
    assert counts(group.exit("w1")) == [1]


def test_a_closed_group_replaces_its_dead_while_tasks_are_left() -> None:
    group = Set(size=1)
    group.join("w1")
    group.submit(1, 2)
    assert not retired(group.set.close(NOW_S))
    commands = group.exit("w1")
    assert failed(commands) == [("worker_died", [1])]
    assert counts(commands) == [1], "task 2 would never run"
    joined = group.join("w2", request=2)
    assert [spec.number for message in sent(joined, m.StartTasks) for spec in message.tasks] == [2]
    assert retired(group.finish("w2", make_result(2))) == ["w2"]
    assert of_type(group.exit("w2", 0), e.SetEnded)


def test_a_closed_group_of_workers_that_run_one_task_each_runs_all() -> None:
    group = Set(size=1, runs_max=1)
    group.submit(1, 2, 3)
    group.set.close(NOW_S)
    request = 1
    for number in (1, 2, 3):
        joined = group.join(f"w{number}", request=request)
        assert [spec.number for message in sent(joined, m.StartTasks) for spec in message.tasks] == [number]
        commands = group.finish(f"w{number}", make_result(number))
        assert retired(commands) == [f"w{number}"]
        requests = sent(commands, m.RequestWorkers)
        assert len(requests) == (number < 3)
        request = requests[0].request if requests else 0
        ended = group.exit(f"w{number}", 0)
    assert of_type(ended, e.SetEnded)


def test_closing_an_idle_group_retires_its_workers_and_ends_with_the_last() -> None:
    group = Set(size=3)
    group.join("w1", "w2")
    commands = group.set.close(NOW_S)
    assert retired(commands) == ["w1", "w2"]
    assert [message.count for message in sent(commands, m.CancelRequest)] == [1]
    assert not of_type(group.exit("w1", 0), e.SetEnded)
    assert of_type(group.exit("w2", 0), e.SetEnded)


def test_a_group_that_is_closed_at_once_has_its_initializer_run_all_the_same() -> None:
    group = Set(size=2, setup=e.SetupPlan("pool", {}, b"initializer"))
    assert group.set.close(NOW_S) == []
    joined = group.join("w1")
    assert sent(joined, m.SetupWorker)
    assert not retired(joined), "another one is still to come"
    assert retired(group.join("w2")) == ["w1", "w2"]
    group.exit("w1", 0)
    assert of_type(group.exit("w2", 0), e.SetEnded)


def test_a_closed_group_does_not_wait_for_workers_that_wait_for_resources() -> None:
    demand = m.WorkerDemand(m.WorkerKind.GROUP, {"GPU": 1.0}, "pool")
    group = Set(size=2, setup=e.SetupPlan("pool", {}, b"initializer"), demand=demand)
    commands = group.set.close(NOW_S)
    assert [message.count for message in sent(commands, m.CancelRequest)] == [2]
    assert of_type(commands, e.SetEnded)


def test_a_worker_in_setup_is_retired_as_well() -> None:
    group = Set(size=1)
    group.set.granted(1, make_worker("w1"), NOW_S)
    assert retired(group.set.close(NOW_S)) == ["w1"]


def test_terminate_kills_all_cancels_all_and_ends_when_all_are_gone() -> None:
    group = Set(size=3)
    group.join("w1", "w2")
    group.submit(1, 2, 3, 4)
    commands = group.set.terminate()
    assert [message.signal for message in sent(commands, m.KillWorker)] == [SIGTERM, SIGTERM]
    assert failed(commands) == [("cancelled", [3, 4, 1, 2])]
    assert sent(commands, m.CancelRequest)
    assert failed(group.submit(5)) == [("cancelled", [5])], "submitted a moment too late"
    assert counts(group.exit("w1")) == []
    assert of_type(group.exit("w2"), e.SetEnded)


def test_a_group_that_shrinks_while_it_starts_keeps_its_new_size() -> None:
    group = Set(size=3)
    for lease in (1, 2, 3):
        group.set.granted(1, make_worker(f"w{lease}", lease=lease), NOW_S)
    assert retired(group.set.resize(1, NOW_S)) == ["w1", "w2"]
    group.submit(7)
    assert not sent(group.set.worker_ready("w1", NOW_S), m.StartTasks), "it is about to end"
    assert sent(group.set.worker_ready("w3", NOW_S), m.StartTasks)
    assert counts(group.exit("w1", 0)) == counts(group.exit("w2", 0)) == []


def test_shrinking_lets_the_least_busy_go() -> None:
    group = Set(size=2)
    group.join("w1", "w2")
    group.submit(1)
    assert retired(group.set.resize(1, NOW_S)) == ["w2"]


def test_growing_asks_for_the_difference() -> None:
    group = Set(size=1)
    group.join("w1")
    assert counts(group.set.resize(4, NOW_S)) == [3]


def test_an_initializer_that_always_fails_fails_the_tasks() -> None:
    group = Set(size=1)
    group.submit(1)
    commands: list[Any] = []
    request = 1
    for lease in range(1, SETUP_FAILURES_MAX + 1):
        group.set.granted(request, make_worker(f"w{lease}", lease=lease), NOW_S)
        commands = group.set.setup_failed(f"w{lease}", b"error", NOW_S)
        assert of_type(commands, e.SetSetupFailed)
        exited = group.exit(f"w{lease}", 1)
        request += len(counts(exited))
    assert failed(commands) == [("setup_failed", [1])]
    assert counts(exited) == [], "no worker is tried again"
    assert failed(group.submit(2)) == [("setup_failed", [2])]


def test_workers_that_always_end_in_their_setup_fail_the_tasks() -> None:
    group = Set(size=2, setup=e.SetupPlan(payload=b"initializer"))
    group.submit(1)
    for lease in range(1, 2 * SETUP_FAILURES_MAX):
        group.set.granted(1 if lease < 3 else lease - 1, make_worker(f"w{lease}", lease=lease), NOW_S)
        exited = group.exit(f"w{lease}", 3)
        assert counts(exited) == [1] and not failed(exited) and not of_type(exited, e.SetSetupFailed)
    group.set.granted(2 * SETUP_FAILURES_MAX - 1, make_worker("w99", lease=99), NOW_S)
    exited = group.exit("w99", 3)
    assert (counts(exited), failed(exited)) == ([], [("setup_failed", [1])])
    (told,) = of_type(exited, e.SetSetupFailed)
    assert not told.error and "8 workers" in told.text and "it was killed" in told.text
    assert failed(group.submit(2)) == [("setup_failed", [2])]


def test_a_worker_that_is_ready_forgives_those_that_ended_in_their_setup() -> None:
    group = Set(size=1, setup=e.SetupPlan(payload=b"initializer"))
    for round_ in range(3):
        for death in range(SETUP_FAILURES_MAX - 1):
            lease = 10 * round_ + death + 1
            group.set.granted(next(iter(group.set.requested)), make_worker(f"w{lease}", lease=lease), NOW_S)
            assert counts(group.exit(f"w{lease}")) == [1]
        group.join(f"w{10 * round_ + 9}", request=next(iter(group.set.requested)))
        assert counts(group.exit(f"w{10 * round_ + 9}")) == [1], "a death after the setup is none in it"


def test_the_loss_of_nodes_is_no_failure_of_a_setup() -> None:
    group = Set(size=1, setup=e.SetupPlan(payload=b"initializer"))
    for lease in range(1, 2 * SETUP_FAILURES_MAX):
        group.set.granted(next(iter(group.set.requested)), make_worker(f"w{lease}", lease=lease), NOW_S)
        assert not of_type(group.set.node_lost(NODE.node_id, "no heartbeat", NOW_S), e.SetSetupFailed)
        assert counts(group.set.advance(NOW_S)) == [1]


def test_a_task_without_retries_may_survive_the_loss_of_its_node_and_not_of_its_worker() -> None:
    group = Set(size=1)
    group.submit(1, retries=NODE_LOSSES_ONLY)
    for lease in range(1, NODE_LOSSES_MAX + 1):
        commands = group.join(f"w{lease}", request=next(iter(group.set.requested)))
        assert started(commands) == [(1, lease)], "task and attempt"
        commands = group.set.node_lost(NODE.node_id, "no heartbeat", NOW_S)
        (left,) = of_type(commands, e.SetWorkerLeft)
        assert left.is_node_lost and not failed(commands)
        group.set.advance(NOW_S)
    group.join("w8", request=next(iter(group.set.requested)))
    assert failed(group.set.node_lost(NODE.node_id, "no heartbeat", NOW_S)) == [("worker_died", [1])], "once too often"
    group.set.advance(NOW_S)
    group.join("w9", request=next(iter(group.set.requested)))
    group.submit(2, retries=NODE_LOSSES_ONLY)
    assert failed(group.exit("w9", ran=2)) == [("worker_died", [2])]


def test_without_any_retries_the_loss_of_a_node_is_as_that_of_a_worker() -> None:
    group = Set(size=1)
    group.join("w1")
    group.submit(1)
    assert failed(group.set.node_lost(NODE.node_id, "no heartbeat", NOW_S)) == [("worker_died", [1])]


def test_one_worker_that_cannot_start_is_asked_for_again() -> None:
    group = Set(size=1)
    group.submit(1)
    for request in range(1, START_FAILURES_MAX):
        commands = group.set.request_failed(request, 1, "start_failed", "no memory", NOW_S)
        assert (counts(commands), failed(commands)) == ([1], [])
    commands = group.set.request_failed(START_FAILURES_MAX, 1, "start_failed", "no memory", NOW_S)
    assert failed(commands) == [("start_failed", [1])]
    assert failed(group.submit(2)) == [("start_failed", [2])]


def test_workers_that_are_there_go_on_when_no_other_can_be_started() -> None:
    group = Set(size=2)
    group.join("w1")
    group.submit(1, 2)
    request = 1
    for _ in range(START_FAILURES_MAX):
        commands = group.set.request_failed(request, 1, "start_failed", "no memory", NOW_S)
        assert not failed(commands)
        request += len(counts(commands))
    assert counts(group.finish("w1", make_result(1))) == [], "a fork for each event, all in vain"
    assert counts(group.exit("w1")) == [2], "a last try"


def test_a_closed_group_that_cannot_be_started_ends() -> None:
    group = Set(size=1)
    group.submit(1)
    group.set.close(NOW_S)
    commands = group.set.request_failed(1, 1, "infeasible", "no GPU anywhere", NOW_S)
    assert failed(commands) == [("infeasible", [1])]
    assert of_type(commands, e.SetEnded)


def test_what_was_asked_of_a_lost_node_is_asked_for_again() -> None:
    group = Set(size=2)
    commands = group.set.cancel_requests() + group.set.advance(NOW_S)
    assert [(message.request, message.count) for message in sent(commands, m.CancelRequest)] == [(1, 2)]
    assert [(message.request, message.count) for message in sent(commands, m.RequestWorkers)] == [(2, 2)]
    assert sent(group.set.granted(1, make_worker("w1"), NOW_S), m.ReleaseWorkers)


# --- workers that die


@pytest.mark.parametrize(
    ("retries", "kind", "again"),
    [(0, [("worker_died", [1])], [2, 3]), (2, [], [1, 2, 3])],
)
def test_the_first_task_of_a_dead_worker_is_blamed_and_the_others_run_elsewhere(
    retries: int, kind: list[tuple[str, list[int]]], again: list[int]
) -> None:
    group = Set(size=1)
    group.join("w1")
    group.set.dispatcher._mean_s[1] = 1e-6
    group.submit(1, 2, 3, retries=retries)
    commands = group.exit("w1", ran=1)
    assert failed(commands) == kind
    assert [task.spec.number for task in group.set.dispatcher.queue] == again
    assert [task.retries_left for task in group.set.dispatcher.queue] == [
        retries - (task.spec.number == 1) for task in group.set.dispatcher.queue
    ]


def test_a_running_task_is_stopped_by_ending_its_worker() -> None:
    group = Set(size=1)
    group.join("w1")
    group.submit(1)
    (task,) = group.set.dispatcher.slots["w1"].outstanding.values()
    assert [message.signal for message in sent(group.set.stopping.kill_running(task), m.KillWorker)] == [SIGKILL]
    assert failed(group.exit("w1")) == [("cancelled", [1])]


def test_a_task_behind_another_is_dropped_without_ending_the_worker() -> None:
    group = Set(size=1)
    group.join("w1")
    group.set.dispatcher._mean_s[1] = 1e-6
    group.submit(1, 2)
    task = group.set.dispatcher.slots["w1"].outstanding[2]
    commands = group.set.stopping.kill_running(task)
    assert sent(commands, m.CancelTasks) == [m.CancelTasks([2], True)]
    assert not sent(commands, m.KillWorker), "task 1 would have to die for it"


# --- leases


def test_a_lease_set_asks_for_as_many_workers_as_it_has_tasks_and_no_more_than_a_bound() -> None:
    leases = Set()
    assert counts(leases.opened) == []
    assert counts(leases.submit(1, 2)) == [2]
    assert counts(leases.submit(*range(3, 1000))) == [REQUESTED_MAX - 2]


def test_requests_are_cancelled_once_tasks_prove_tiny() -> None:
    leases = Set()
    leases.submit(*range(100))
    leases.join("w1")
    leases.set.finished("w1", m.TasksFinished([make_result(0)], 10_000), NOW_S)
    commands = leases.set.advance(NOW_S)
    assert sum(message.count for message in sent(commands, m.CancelRequest)) == 99
    assert not leases.set.requested


def test_an_idle_lease_lingers_and_is_returned() -> None:
    leases = Set()
    leases.submit(1)
    leases.join("w1")
    commands = leases.finish("w1", make_result(1), now_s=NOW_S + 60)
    assert not sent(commands, m.ReleaseWorkers), "a loop of calls would lease each time"
    wakeup_s = leases.set.next_wakeup_s(NOW_S + 60)
    assert wakeup_s == NOW_S + 60 + LINGER_S
    commands = leases.set.advance(wakeup_s + 0.001)
    assert sent(commands, m.ReleaseWorkers) == [m.ReleaseWorkers([1], False)]
    assert (leases.set.held, leases.set_by_process) == ({}, {})
    assert leases.set.next_wakeup_s(wakeup_s) is None


def test_a_returned_worker_is_told_to_forget_our_functions_first() -> None:
    leases = Set()
    leases.submit(1)
    leases.join("w1")
    leases.finish("w1", make_result(1))
    commands = leases.set.give_back_idle()
    assert [type(command.message) for command in of_type(commands, e.Send)] == [m.ForgetFunctions, m.ReleaseWorkers]


def test_only_idle_leases_are_given_back_to_those_who_wait() -> None:
    leases = Set()
    leases.submit(1, 2)
    leases.join("w1", "w2")
    leases.finish("w2", make_result(2))
    assert sent(leases.set.give_back_idle(), m.ReleaseWorkers) == [m.ReleaseWorkers([2], False)]


def test_a_lease_with_environment_variables_is_told_them_before_its_first_task() -> None:
    leases = Set(env=True)
    leases.submit(1)
    commands = leases.set.granted(1, make_worker("w1"), NOW_S)
    kinds = [type(command.message) for command in of_type(commands, e.Send)]
    assert kinds.index(m.SetupWorker) < kinds.index(m.StartTasks)


def test_a_blocked_worker_gives_back_its_backlog_and_gets_nothing_until_it_goes_on() -> None:
    leases = Set()
    leases.set.dispatcher._mean_s[1] = 1e-6
    leases.submit(1, 2)
    leases.join("w1")
    leases.set.finished("w1", m.TasksFinished([make_result(2, TaskStatus.RETURNED)], 0, True), NOW_S)
    assert not sent(leases.set.advance(NOW_S), m.StartTasks)
    leases.set.finished("w1", m.TasksFinished([], 0, False), NOW_S)
    assert [spec.number for message in sent(leases.set.advance(NOW_S), m.StartTasks) for spec in message.tasks] == [2]


def test_only_functions_that_a_worker_has_are_forgotten_there() -> None:
    leases = Set()
    leases.submit(1)
    leases.join("w1")
    assert sent(leases.set.forget_functions({1, 2}), m.ForgetFunctions, Address("n1", "w1")) == [m.ForgetFunctions([1])]
    assert leases.set.forget_functions({1, 2}) == []
