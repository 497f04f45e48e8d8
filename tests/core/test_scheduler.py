from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from clusterpool.core import messages as m
from clusterpool.core.messages import SIGKILL, Address, WorkerKind
from clusterpool.core.node_events import EndWorker, ForkWorker, Send, WorkerEnded
from clusterpool.core.placement import Candidate
from clusterpool.core.recovery_messages import RequestsLost
from clusterpool.core.resources import to_amounts
from clusterpool.core.scheduler import HOPS_MAX, TERMINATED_WITHIN_S, Scheduler
from tests.core.machines import DRIVER, JOB, T

OTHER = Address("n1", "d2")
NOW_S = 100.0
REMOTE = Address("n2", "d3")


class Node:
    """A scheduler, and shorthands for what happens to it."""

    def __init__(self, **total: float) -> None:
        names = (f"w{number}" for number in itertools.count(1))
        self.scheduler = Scheduler("n1", "h1", total or {"CPU": 2.0}, process_ids=names)
        self.requests = itertools.count(1)

    def request(
        self,
        count: int = 1,
        *,
        kind: int = WorkerKind.TASK,
        source: Address = DRIVER,
        hops: int = 0,
        job: m.JobPart = JOB,
        demand: m.WorkerDemand | None = None,
        **resources: float,
    ) -> list[Any]:
        demand = demand or m.WorkerDemand(kind, resources or {"CPU": 1.0})
        message = m.RequestWorkers(next(self.requests), count, demand, job, hops, source)
        return self.scheduler.requested(source, message)

    def lease(self, count: int = 1, **options: Any) -> list[m.WorkerPart]:
        """Request workers and let those that are forked join."""
        commands = self.request(count, **options)
        for fork in forks(commands):
            commands += self.join(fork)
        return [message.worker for message in messages(commands, m.WorkerGranted)]

    def join(self, process_id: str) -> list[Any]:
        return self.scheduler.worker_joined(process_id, 4711)

    def release(self, lease: int, source: Address = DRIVER, *, ends: bool = False) -> list[Any]:
        return self.scheduler.released(source, m.ReleaseWorkers([lease], ends))


def forks(commands: list[Any]) -> list[str]:
    return [command.process_id for command in commands if isinstance(command, ForkWorker)]


def ended(commands: list[Any]) -> list[str]:
    return [command.process_id for command in commands if isinstance(command, EndWorker)]


def messages(commands: list[Any], kind: type[T], to: Address | None = None) -> list[T]:
    return [
        command.message
        for command in commands
        if isinstance(command, Send) and isinstance(command.message, kind) and to in (None, command.destination)
    ]


def peer(name: str = "n2", *, free: float = 4.0, total: float = 4.0) -> Candidate:
    return Candidate(name, to_amounts({"CPU": total}), to_amounts({"CPU": free}), 0, 0, False)


# --- leases


def test_a_worker_is_granted_when_its_process_has_joined() -> None:
    node = Node()
    commands = node.request()
    assert forks(commands) == ["w1"]
    assert not messages(commands, m.WorkerGranted)
    (granted,) = messages(node.join("w1"), m.WorkerGranted, DRIVER)
    assert (granted.worker.address, granted.worker.pid) == (Address("n1", "w1"), 4711)


def test_leases_are_bounded_by_cpus_and_go_on_when_one_is_returned() -> None:
    node = Node(CPU=2)
    first, _ = node.lease(3)
    assert node.scheduler.counts_by_state()["pending"] == 1
    commands = node.release(first.lease)
    (granted,) = messages(commands, m.WorkerGranted)
    assert granted.worker.address == first.address, "the idle process is used again, nothing is forked"
    assert granted.worker.lease != first.lease


def test_a_second_return_of_a_lease_changes_nothing() -> None:
    node = Node(CPU=1)
    (worker,) = node.lease()
    node.release(worker.lease)
    assert node.release(worker.lease) == []
    assert node.scheduler.pool.free == node.scheduler.pool.total


def test_only_its_owner_may_return_or_kill_a_lease() -> None:
    node = Node(CPU=1)
    (worker,) = node.lease()
    assert node.release(worker.lease, OTHER) == []
    assert node.scheduler.kill(OTHER, m.KillWorker(worker.lease, SIGKILL, ""), NOW_S) == []
    assert list(node.scheduler.leases) == [worker.lease]


def test_groups_are_not_bounded_by_cpus() -> None:
    node = Node(CPU=1)
    demand = m.WorkerDemand(WorkerKind.GROUP, {})
    assert len(forks(node.request(4, demand=demand))) == len(forks(node.request(4, demand=demand))) == 4


@pytest.mark.parametrize(
    ("demand", "ends", "is_reused"),
    [
        (m.WorkerDemand(WorkerKind.TASK, {"CPU": 1.0}), False, True),
        (m.WorkerDemand(WorkerKind.TASK, {"CPU": 1.0}), True, False),
        (m.WorkerDemand(WorkerKind.TASK, {"CPU": 1.0}, env={"A": "1"}), False, False),  # it has the variables
        (m.WorkerDemand(WorkerKind.TASK, {"GPU": 1.0}), False, False),
        (m.WorkerDemand(WorkerKind.GROUP, {}), False, False),
        (m.WorkerDemand(WorkerKind.ACTOR, {}), False, False),
    ],
)
def test_only_a_plain_task_worker_is_used_again(demand: m.WorkerDemand, ends: bool, is_reused: bool) -> None:
    node = Node(CPU=1, GPU=1)
    (worker,) = node.lease(demand=demand)
    commands = node.release(worker.lease, ends=ends)
    # It ends by itself, when nobody needs what it owns.
    assert messages(commands, m.RetireWorker, worker.address) == (
        [] if is_reused else [m.RetireWorker(is_awaited=False)]
    )
    assert ended(commands) == []
    assert forks(node.request()) == ([] if is_reused else ["w2"])


def test_a_worker_that_is_being_killed_is_handed_to_nobody() -> None:
    node = Node()
    (worker,) = node.lease()
    node.scheduler.kill(DRIVER, m.KillWorker(worker.lease, SIGKILL, "cancelled"), NOW_S)
    node.release(worker.lease)
    assert forks(node.request()) == ["w2"]


def test_a_worker_that_ignores_being_terminated_is_killed_after_a_while_with_what_it_has_started() -> None:
    node = Node()
    first, second = *node.lease(), *node.lease()
    for worker in (first, second):
        commands = node.scheduler.kill(DRIVER, m.KillWorker(worker.lease, m.SIGTERM, "terminated"), NOW_S)
        assert commands == [EndWorker(worker.address.process_id, m.SIGTERM, with_group=True)]
    node.scheduler.worker_ended(WorkerEnded(second.address.process_id, -m.SIGTERM, ""))
    assert node.scheduler.time_passed(NOW_S + TERMINATED_WITHIN_S - 0.1) == []
    late_s = NOW_S + TERMINATED_WITHIN_S
    assert node.scheduler.time_passed(late_s) == [EndWorker(first.address.process_id, m.SIGKILL, with_group=True)]
    assert node.scheduler.time_passed(late_s + 1) == []


def test_a_process_of_the_users_decides_itself_what_a_signal_does() -> None:
    node = Node()
    demand = m.WorkerDemand(WorkerKind.GROUP, {}, outlives_owner=True)
    (worker,) = node.lease(demand=demand)
    commands = node.scheduler.kill(DRIVER, m.KillWorker(worker.lease, m.SIGTERM, "its parent"), NOW_S)
    assert commands == [EndWorker(worker.address.process_id, m.SIGTERM)]
    assert node.scheduler.time_passed(NOW_S + 2 * TERMINATED_WITHIN_S) == []


def test_an_idle_worker_is_not_used_for_another_job() -> None:
    node = Node()
    (worker,) = node.lease()
    node.release(worker.lease)
    job = msgspec.structs.replace(JOB, job_id="j2", owner=OTHER)
    assert forks(node.request(source=OTHER, job=job)) == ["w2"]


def test_gpu_indices_go_with_the_lease() -> None:
    node = Node(GPU=2)
    demand = m.WorkerDemand(WorkerKind.TASK, {"GPU": 1.0})
    assert [worker.gpu_ids for worker in node.lease(2, demand=demand)] == [[0], [1]]


def test_a_blocked_worker_lends_its_cpu_and_takes_it_back_at_once() -> None:
    node = Node(CPU=1)
    (worker,) = node.lease()
    assert forks(node.request()) == []
    assert forks(node.scheduler.blocked("w1")) == ["w2"]
    assert node.scheduler.blocked("w1") == []
    node.scheduler.unblocked("w1")
    assert node.scheduler.pool.free["CPU"] < 0
    node.release(worker.lease)
    node.scheduler.worker_ended(WorkerEnded("w2", 0, ""))
    assert node.scheduler.pool.free == node.scheduler.pool.total


def pinned_gpu(node: Node, *, source: Address = DRIVER, job_id: str = "j1") -> list[str]:
    job = msgspec.structs.replace(JOB, job_id=job_id, owner=source)
    return forks(node.request(source=source, job=job, demand=m.WorkerDemand(WorkerKind.TASK, {"GPU": 1.0})))


def test_a_gpu_is_kept_until_the_process_that_used_it_has_ended() -> None:
    node = Node(CPU=2, GPU=2)
    demand = m.WorkerDemand(WorkerKind.TASK, {"CPU": 1.0, "GPU": 1.0})
    first, _second = node.lease(2, demand=demand)
    node.release(first.lease)
    assert node.scheduler.pool.free["CPU"] == 10_000, "a CPU is free at once"
    assert pinned_gpu(node) == [], "its process may have memory there"
    assert forks(node.scheduler.worker_ended(WorkerEnded("w1", 0, ""))) == ["w3"]
    assert node.scheduler.leases[3].gpu_ids == first.gpu_ids


def test_a_gpu_that_a_lingering_worker_keeps_is_for_its_own_job_alone() -> None:
    node = Node(GPU=1)
    (worker,) = node.lease(demand=m.WorkerDemand(WorkerKind.TASK, {"GPU": 1.0}))
    node.release(worker.lease)
    assert pinned_gpu(node, source=OTHER, job_id="j2") == []
    assert node.scheduler.lingers("w1") == [], "the other job waits for its end"
    # A task that it has started needs one: it lingers for that, and would for ever.
    assert pinned_gpu(node) == ["w2"]
    assert forks(node.scheduler.worker_ended(WorkerEnded("w1", 0, ""))) == []
    assert forks(node.scheduler.worker_ended(WorkerEnded("w2", 0, ""))) == ["w3"]
    node.scheduler.worker_ended(WorkerEnded("w3", 0, ""))
    assert node.scheduler.pool.free == node.scheduler.pool.total


def test_a_worker_that_lingers_gives_back_all_that_its_lease_holds() -> None:
    # The tasks that it waits for may need just that.
    node = Node(CPU=1, GPU=1)
    demand = m.WorkerDemand(WorkerKind.ACTOR, {"CPU": 1.0, "GPU": 1.0})
    (worker,) = node.lease(demand=demand)
    assert forks(node.request(demand=demand)) == []
    assert forks(node.scheduler.lingers("w1")) == ["w2"]
    assert node.scheduler.lingers("w1") == [], "once"
    (exited,) = messages(node.scheduler.worker_ended(WorkerEnded("w1", 0, "")), m.WorkerExited)
    assert exited.lease == worker.lease, "its owner hears of its end all the same"
    node.scheduler.worker_ended(WorkerEnded("w2", 0, ""))
    assert node.scheduler.pool.free == node.scheduler.pool.total


# --- requests that wait


def test_requests_of_one_shape_are_met_in_their_order() -> None:
    node = Node(CPU=1)
    (worker,) = node.lease()
    node.request(source=OTHER)
    node.request(source=DRIVER)
    assert messages(node.release(worker.lease), m.WorkerGranted, OTHER)


def test_a_large_request_does_not_hold_up_a_small_one_of_another_shape() -> None:
    node = Node(CPU=2)
    node.lease()
    node.request(CPU=2.0)
    assert len(forks(node.request(CPU=1.0))) == 1


def test_a_request_pinned_to_this_node_does_not_keep_others_from_going_elsewhere() -> None:
    node = Node(CPU=1)
    node.scheduler.peers_changed([peer()])
    node.lease()
    node.request(demand=m.WorkerDemand(WorkerKind.TASK, {"CPU": 1.0}, strategy="node:n1"))
    assert messages(node.request(), m.RequestWorkers, Address("n2", "n2"))


def test_what_is_cancelled_is_not_granted_later() -> None:
    node = Node(CPU=1)
    (worker,) = node.lease()
    node.request(3)
    node.scheduler.cancelled(DRIVER, m.CancelRequest(2, 2))
    assert node.scheduler.counts_by_state()["pending"] == 1
    node.scheduler.cancelled(OTHER, m.CancelRequest(2, 1))
    assert node.scheduler.counts_by_state()["pending"] == 1, "it is somebody else's"
    node.scheduler.cancelled(DRIVER, m.CancelRequest(2, 5))
    assert not messages(node.release(worker.lease), m.WorkerGranted)


def test_owners_are_asked_once_for_leases_that_they_do_not_use() -> None:
    node = Node(CPU=1)
    node.lease(source=OTHER)
    assert len(messages(node.request(), m.ReclaimLeases, OTHER)) == 1
    assert not messages(node.request(), m.ReclaimLeases)


@pytest.mark.parametrize("resources", [{"CPU": 3.0}, {"TPU": 1.0}])
def test_what_no_node_could_ever_give_fails_at_once(resources: dict[str, float]) -> None:
    demand = m.WorkerDemand(WorkerKind.TASK, resources)
    (failure,) = messages(Node(CPU=2, memory=8e9, **{"node:n1": 1}).request(2, demand=demand), m.RequestFailed, DRIVER)
    assert (failure.count, failure.kind) == (2, "infeasible")
    assert failure.text.endswith("(n1: 2 CPU, 8.0 GB memory); ask for less, or add a node that has it")


# --- workers that end


def test_the_owner_hears_of_the_end_of_its_worker_and_the_cpu_is_free() -> None:
    node = Node(CPU=1)
    (worker,) = node.lease()
    commands = node.scheduler.worker_ended(WorkerEnded("w1", -9, "killed by signal 9"))
    (exited,) = messages(commands, m.WorkerExited, DRIVER)
    assert (exited.lease, exited.exit_code, exited.text) == (worker.lease, -9, "killed by signal 9")
    assert node.scheduler.pool.free == node.scheduler.pool.total


def test_a_worker_that_ends_before_it_joins_fails_its_request() -> None:
    node = Node(CPU=1)
    node.request()
    (failure,) = messages(node.scheduler.worker_ended(WorkerEnded("w1", 1, "import error")), m.RequestFailed, DRIVER)
    assert (failure.request, failure.kind) == (1, "start_failed")
    assert node.join("w1") == []


def test_a_fork_that_fails_gives_its_resources_back() -> None:
    node = Node(CPU=1)
    node.request()
    assert messages(node.scheduler.fork_failed("w1", "no memory"), m.RequestFailed, DRIVER)
    assert node.scheduler.pool.free == node.scheduler.pool.total
    assert node.scheduler.workers == {}


def test_an_idle_worker_that_ends_is_not_handed_out() -> None:
    node = Node(CPU=1)
    (worker,) = node.lease()
    node.release(worker.lease)
    node.scheduler.worker_ended(WorkerEnded("w1", -9, "killed"))
    assert forks(node.request()) == ["w2"]


def test_killing_an_actor_that_still_waits_for_resources_fails_its_request() -> None:
    node = Node(CPU=1)
    node.lease()
    node.request(demand=m.WorkerDemand(WorkerKind.ACTOR, {"CPU": 1.0}, actor_id="a1"))
    (failure,) = messages(node.scheduler.kill_actor("a1"), m.RequestFailed, DRIVER)
    assert failure.kind == "killed"
    assert node.scheduler.pending == []


def test_killing_an_actor_ends_its_worker() -> None:
    node = Node(CPU=1)
    node.lease(demand=m.WorkerDemand(WorkerKind.ACTOR, {}, actor_id="a1"))
    assert ended(node.scheduler.kill_actor("a1")) == ["w1"]
    assert node.scheduler.kill_actor("") == []


# --- owners that end


def test_the_workers_of_a_job_end_with_its_driver_idle_ones_too() -> None:
    node = Node(CPU=2)
    first, _ = node.lease(2)
    node.release(first.lease)
    node.request(5)
    commands = node.scheduler.owner_ended(DRIVER, ends_job="j1")
    assert ended(commands) == ["w1", "w2"]
    assert node.scheduler.pending == []


def test_idle_workers_of_a_driver_on_another_node_end_with_it() -> None:
    node = Node(CPU=2)
    job = msgspec.structs.replace(JOB, owner=REMOTE)
    (worker,) = node.lease(source=REMOTE, job=job)
    node.release(worker.lease, REMOTE)
    assert ended(node.scheduler.owner_ended(REMOTE)) == ["w1"]


def test_nothing_is_kept_of_a_job_whose_idle_workers_had_ended_before_it() -> None:
    node = Node(CPU=2)
    (worker,) = node.lease()
    node.release(worker.lease)
    node.scheduler.worker_ended(WorkerEnded("w1", 0, "done"))
    node.scheduler.owner_ended(DRIVER, ends_job="j1")
    assert node.scheduler.idle == {}


@pytest.mark.parametrize(
    ("has_joined", "ends", "ended_workers"),
    [
        (True, OTHER, []),  # its parent has died: an orphan goes on
        (True, DRIVER, ["w1"]),  # the job has ended
        (False, OTHER, ["w1"]),  # nobody will tell it what to run
    ],
)
def test_a_child_process_outlives_its_parent_but_not_its_job(
    has_joined: bool, ends: Address, ended_workers: list[str]
) -> None:
    node = Node()
    demand = m.WorkerDemand(WorkerKind.GROUP, {}, outlives_owner=True)
    [fork] = forks(node.request(source=OTHER, demand=demand))
    if has_joined:
        node.join(fork)
    job_id = "j1" if ends == DRIVER else ""
    commands = node.scheduler.owner_ended(ends, ends_job=job_id)
    assert ended(commands) == ended_workers
    # It may have been granted to a parent that died before it had said what to run: then it ends, and only then.
    assert any(isinstance(command, Send) and command.message == m.RetireWorker(False) for command in commands) is (
        not ended_workers
    )


def test_a_detached_actor_outlives_its_driver() -> None:
    node = Node(CPU=1)
    job = msgspec.structs.replace(JOB, detached=True)
    node.lease(demand=m.WorkerDemand(WorkerKind.ACTOR, {}, actor_id="a1"), job=job)
    assert ended(node.scheduler.owner_ended(DRIVER, ends_job="j1")) == []


def test_an_owner_on_another_node_is_watched_there_once() -> None:
    node = Node(CPU=4)
    job = msgspec.structs.replace(JOB, owner=REMOTE)
    commands = [*node.request(source=REMOTE, job=job), *node.request(source=REMOTE, job=job)]
    assert messages(commands, m.WatchProcess, Address("n2", "n2")) == [m.WatchProcess("d3")]


# --- other nodes


def test_a_full_node_passes_a_request_on_with_its_origin() -> None:
    node = Node(CPU=1)
    node.scheduler.peers_changed([peer(free=1)])
    node.lease()
    (passed,) = messages(node.request(), m.RequestWorkers, Address("n2", "n2"))
    assert (passed.count, passed.hops, passed.origin) == (1, 1, DRIVER)
    assert not messages(node.request(), m.RequestWorkers), "the peer is full too now, as far as we know"


def test_a_request_is_not_passed_on_for_ever() -> None:
    node = Node(CPU=1)
    node.lease()
    node.scheduler.peers_changed([peer()])
    assert not messages(node.request(hops=HOPS_MAX), m.RequestWorkers)
    assert node.scheduler.counts_by_state()["pending"] == 1


def test_what_waits_goes_to_a_node_that_gets_room() -> None:
    node = Node(CPU=1)
    node.scheduler.peers_changed([peer(free=0)])
    node.lease()
    assert not messages(node.request(), m.RequestWorkers)
    assert messages(node.scheduler.peers_changed([peer(free=2)]), m.RequestWorkers, Address("n2", "n2"))


def test_a_group_is_spread_when_it_is_asked_for_and_not_again_where_it_arrives() -> None:
    node = Node(CPU=4)
    node.scheduler.peers_changed([peer()])
    demand = m.WorkerDemand(WorkerKind.GROUP, {})
    commands = node.request(4, demand=demand)
    (passed,) = messages(commands, m.RequestWorkers, Address("n2", "n2"))
    assert (passed.count, len(forks(commands))) == (2, 2)
    assert len(forks(node.request(8, demand=demand, hops=1, source=REMOTE))) == 8


@pytest.mark.parametrize(("node_id", "is_passed_on"), [("n2", True), ("n1", False)])
def test_a_pinned_request_goes_to_its_node(node_id: str, is_passed_on: bool) -> None:
    node = Node(CPU=1)
    node.scheduler.peers_changed([peer()])
    demand = m.WorkerDemand(WorkerKind.TASK, {"CPU": 1.0}, strategy=f"node:{node_id}")
    assert bool(messages(node.request(demand=demand), m.RequestWorkers)) is is_passed_on


def test_the_owner_is_told_the_peak_memory_and_the_cause_of_a_workers_end() -> None:
    node = Node()
    node.lease()
    commands = node.scheduler.worker_ended(
        WorkerEnded("w1", -11, "crashed", m.LastTask(4), 12_000, m.EndCause.STACK_OVERFLOW)
    )
    (exited,) = messages(commands, m.WorkerExited, DRIVER)
    assert (exited.task, exited.peak_bytes, exited.cause) == (m.LastTask(4), 12_000, m.EndCause.STACK_OVERFLOW)


def test_owners_hear_when_a_node_is_lost_to_which_their_requests_were_passed_on() -> None:
    node = Node(CPU=1)
    node.scheduler.peers_changed([peer("n3")])
    elsewhere = Address("n9", "d9")
    for source in (elsewhere, elsewhere, DRIVER):
        node.request(source=source, hops=1, CPU=2.0)
    commands = node.scheduler.peer_lost("n3")
    # Those of this node hear of it from the node itself.
    assert messages(commands, RequestsLost) == messages(commands, RequestsLost, elsewhere) == [RequestsLost("n3")]
    assert node.scheduler.peer_lost("n3") == []


def test_an_owner_on_a_node_that_was_lost_is_watched_anew() -> None:
    node = Node()
    assert messages(node.request(source=REMOTE, hops=1), m.WatchProcess) == [m.WatchProcess("d3")]
    assert messages(node.request(source=REMOTE, hops=1), m.WatchProcess) == []
    node.scheduler.owner_ended(REMOTE)
    node.scheduler.peer_lost("n2")
    # Of its next life another node may have told first.
    assert messages(node.request(source=REMOTE, hops=1), m.WatchProcess) == [m.WatchProcess("d3")]
    assert messages(node.scheduler.peer_joined("n2"), m.WatchProcess) == [m.WatchProcess("d3")]
