"""Many small clusters in virtual time, each from its seed, and what the simulator itself must do."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from clusterpool.core import messages as m
from clusterpool.core.messages import Address
from clusterpool.core.scheduler import Scheduler
from clusterpool.simulation.__main__ import attempt, command_of, main
from clusterpool.simulation.coverage import Coverage, machines
from clusterpool.simulation.faults import Fault
from clusterpool.simulation.timeline import Violation
from clusterpool.simulation.world import Plan, World

# Each of these found something once; what it was stands beside it.
FOUND = {
    523: "references in a result for which the store had no room were handed over, and never given back",
    79: "a node that had been fenced was not told of the end of a job again by those that had known it before",
    103: "a node that was fenced went on passing requests to others, which ended what they granted for its sake",
    164: "the same: messages of two lives of a node were mixed",
    282: "the references inside an object that was lost with its node were never let go",
    44: "questions to a borrowed object's owner that had died were kept for ever",
    150: "a request that came back from another node was granted to its owner, which had ended meanwhile",
    2038: "a worker that ended of itself had its leased workers killed, with the objects that they owned",
    3165: "a node that was fenced watched a driver for a dying worker's sake, unheard, and never again",
    3399: "a node wrote down the owner of an object that had been let go while it was being fetched",
    2018: "a node that was late to hear of another's death ended the job of a driver that had come back with its node",
    306: "a message of a node that was not known yet, come before the first tick, was dropped at that tick",
    114: "an object was freed twice when a task that waited for it failed for its value, nobody else having it",
}
# The same, by programs: (seed, programs).
FOUND_BY = {
    (44, ("restarts", "detached")): "a caller was told that an actor's life was over, wrongly, and waited for ever",
    (
        103,
        ("restarts", "detached"),
    ): "the same, of an actor that its creator starts again; and calls that had not got to "
    "an actor's next life failed as if they had begun there",
    (18, ("locks",)): "a node that was taken for dead removed the locks of living jobs from the control store",
    (40, ("locks",)): "a process died with a lock before that moved: nobody who waited could say so, for ever",
    (52, ("semaphores", "signals", "queues")): "a token that was told of twice was given back while it was held",
    (114, ("semaphores", "signals", "queues")): "the same, told of in the other order",
    (51, ("restarts", "detached")): "a store that had forgotten that a life had begun did not let it end",
    (66, ("conditions", "barriers", "children")): "what had left its home was asked for in a store that had not got it",
    (2, ("children",)): "a child whose parent died before it had said what to run waited for ever",
    (400, ("restarts", "detached")): "an actor that was entered while its node was taken for dead, nobody made",
}
# Programs that end no process themselves.
HARMLESS = ("flat", "graph", "nested", "boxes", "group", "actor", "objects", "cancelled", "shared")
# How many of the transitions the small worlds together take at least.
TAKEN_MIN = 0.6
BATCHES = 10
SEEDS_A_BATCH = 6


def run(plan: Plan) -> World:
    world = World(plan)
    error = attempt(world)
    if error is not None:
        raise AssertionError(f"again: {command_of(plan)}\n{error!r}") from error
    return world


@pytest.fixture(scope="module")
def reached() -> Coverage:
    """What the small worlds take."""
    return Coverage()


@pytest.mark.parametrize("batch", range(BATCHES))
def test_small_worlds_end_well(batch: int, reached: Coverage) -> None:
    with reached:
        for seed in range(batch * SEEDS_A_BATCH, (batch + 1) * SEEDS_A_BATCH):
            run(Plan(seed))


def test_the_small_worlds_take_most_transitions_and_none_that_is_not_foreseen(reached: Coverage) -> None:
    if not reached.known:
        pytest.skip("no small world has run")
    assert reached.unforeseen() == []
    total, taken = reached.counts()
    never = "\n".join(f"{machine}: {', '.join(left)}" for machine, left in reached.never_taken().items())
    assert taken > TAKEN_MIN * total, f"{taken} of {total} transitions were taken; never:\n{never}"


@pytest.mark.parametrize("seed", FOUND)
def test_what_was_found_once_is_gone(seed: int) -> None:
    run(Plan(seed))


@pytest.mark.parametrize(("seed", "programs"), FOUND_BY)
def test_what_some_programs_have_found_is_gone(seed: int, programs: tuple[str, ...]) -> None:
    run(Plan(seed, programs=programs))


def test_a_state_that_is_not_restored_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from clusterpool.simulation.actors import ActorLog

    # A next life that forgets the calls since the last checkpoint.
    monkeypatch.setattr(ActorLog, "load", lambda self, checkpoint, covered: None)
    assert main(["--seeds", "0-40", "--faults", "0", "--programs", "restarts"]) == 1


def test_a_generator_that_does_not_wait_for_its_taker_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from clusterpool.core.stream_pace import ProducerPace

    monkeypatch.setattr(ProducerPace, "has_room", True)
    assert main(["--seeds", "0-40", "--faults", "0", "--programs", "streams"]) == 1


def test_an_item_that_comes_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from clusterpool.core.owner_objects import OwnerObjects

    # An owner that takes what a second run of a generator repeats for new items.
    original = OwnerObjects.stream_item

    def stream_item(self: OwnerObjects, source: Address, message: m.StreamItem) -> list[Any]:
        stream = self.streams.get(message.number)
        index = max(message.index, len(stream.items) if stream is not None else 0)
        return original(self, source, m.StreamItem(message.number, index, message.value))

    monkeypatch.setattr(OwnerObjects, "stream_item", stream_item)
    assert main(["--seeds", "0-40", "--faults", "0", "--programs", "streams"]) == 1


def test_what_was_let_go_is_not_fetched_into_what_is_still_read() -> None:
    run(Plan(8171, nodes=3, faults=8))


def test_without_faults_nothing_is_lost() -> None:
    for seed in range(1000, 1010):
        world = run(Plan(seed, nodes=3, faults=0, programs=HARMLESS))
        assert world.monitor.outcomes > 0
        assert set(world.monitor.losses) <= {"cancelled", "store_full"}


@pytest.mark.timeout(180)  # some 30 s of CPU, more where others want it
def test_a_thousand_nodes_with_all_kinds_of_faults_do_the_work_of_three_drivers_and_agree() -> None:
    world = run(Plan(2138, nodes=1000, drivers=3, faults=12, busy_s=5.0, quiet_s=5.0, size=0.5))
    struck = {"node_crash", "worker_crash", "partition", "node_freeze", "store_crash", "store_pause", "store_cut"}
    assert struck <= world.monitor.happened
    living = {node.node_id for node in world.nodes if node.is_alive}
    assert len(living) >= 999
    for node in world.nodes:
        if node.is_alive:
            assert {view.node_id for view in node.machine.membership.view} == living
    assert world.monitor.outcomes > 20
    leased = {worker.address.node_id for worker in world.clients.values()}
    assert len(leased) > 3  # work was spread


def test_faults_strike_and_work_goes_on() -> None:
    world = run(Plan(7, nodes=4, faults=15))
    assert len(world.monitor.happened & {fault.kind for fault in world.faults}) >= 4
    assert world.monitor.outcomes > 20


def test_the_same_seed_is_the_same_world_under_any_hash_seed() -> None:
    def digest(hash_seed: str) -> str:
        script = (
            "from clusterpool.simulation.world import Plan, World\n"
            "for seed in (3, 4, 5):\n"
            "    world = World(Plan(seed, nodes=4, faults=8)); world.run(); print(world.trace.digest())\n"
        )
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        ran = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        return ran.stdout

    assert digest("1") == digest("2")


def test_another_seed_is_another_world() -> None:
    assert run(Plan(3, faults=0)).trace.digest() != run(Plan(4, faults=0)).trace.digest()


# --- the simulator itself


def test_a_lost_lease_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from clusterpool.core.scheduler import Scheduler

    # A node that forgets to take back what a lease had used.
    monkeypatch.setattr(Scheduler, "_free", lambda self, lease: self.leases.pop(lease.number, None))
    assert main(["--seed", "5", "--faults", "0"]) == 1
    printed = capsys.readouterr().out
    assert "are said to be free" in printed and "--seed 5" in printed


def test_an_object_freed_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from clusterpool.core.ownership import OwnedObject

    # An owner that forgets its borrowers.
    unused = property(lambda record: record.local <= 0 and record.pins == 0 and not record.askers)
    monkeypatch.setattr(OwnedObject, "is_unused", unused)
    assert main(["--seeds", "0-40", "--faults", "0"]) == 1


def test_a_leaked_pin_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from clusterpool.core.store_index import StoreIndex

    monkeypatch.setattr(StoreIndex, "_on_unpinned", lambda self, event, now_s: None)
    assert main(["--seeds", "0-40", "--faults", "0"]) == 1


def test_an_item_that_nobody_gets_is_found_whatever_else_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from clusterpool.core.coordination_waits import Waits

    # A node that drops what comes for somebody who does not wait any more.
    original = Waits._item_came

    def item_came(self: Waits, waiter: str, name: str, item: bytes | None) -> list[Any]:
        return original(self, waiter, name, item) if waiter in self._waits else []

    monkeypatch.setattr(Waits, "_item_came", item_came)
    assert main(["--seeds", "130-160", "--faults", "6", "--programs", "queues"]) == 1


def test_a_task_that_is_given_up_too_early_is_found_whatever_else_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from clusterpool.core.rescue import Rescue

    original = Rescue.save

    def save(self: Rescue, tasks: list[Any], *arguments: Any) -> Any:
        for task in tasks:
            task.retries_left = 0
        return original(self, tasks, *arguments)

    monkeypatch.setattr(Rescue, "save", save)
    assert main(["--seeds", "0-40", "--faults", "6", "--programs", "flat,nested"]) == 1


def test_a_failure_shrinks_to_the_faults_that_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from clusterpool.core.rescue import Rescue

    # An owner that forgets the tasks of a worker that has died.
    monkeypatch.setattr(Rescue, "save", lambda self, tasks, gone, now_s: ([], []))
    options = ["--nodes", "2", "--drivers", "1", "--programs", "flat,group"]
    assert main(["--seed", "8", "--faults", "10", "--shrink", *options]) == 1
    printed = capsys.readouterr().out
    assert "--only" in printed
    assert printed.count("\nfault ") < 10


def test_the_command_says_which_transitions_a_search_has_never_taken(capsys: pytest.CaptureFixture[str]) -> None:
    def never_taken(*arguments: str) -> set[str]:
        assert main([*arguments, "--faults", "0", "--coverage"]) == 0
        lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
        return {
            f"{name}: {what}" for name, _, left in (line.partition(": ") for line in lines) for what in left.split("; ")
        }

    first, both = never_taken("--seed", "3"), never_taken("--seeds", "3-8")
    # Of a machine that was never made, single transitions are not told.
    assert {each for each in both if f"{each.partition(':')[0]}: never made" not in first} < first
    assert {"NodeMachine: StopNode", "Membership: member>fenced"} <= both


def test_the_command_says_which_lines_never_ran(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "3", "--faults", "0", "--size", "0.3", "--lines"]) == 0
    assert "never run: core/worker_set.py" in capsys.readouterr().out


def test_machines_are_watched_only_meanwhile() -> None:
    before = {kind: dict(vars(kind)) for kind in machines()}
    with Coverage() as coverage:
        assert vars(Scheduler)["requested"] is not before[Scheduler]["requested"]
        run(Plan(3, faults=0, size=0.3))
    assert {kind: dict(vars(kind)) for kind in machines()} == before
    assert "requested()" in coverage.taken["Scheduler"]


def test_a_node_that_alone_is_cut_off_from_the_store_finds_a_way_through_a_peer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from clusterpool.core.store_route import StoreRoute

    def cut_off(seed: int) -> World:
        world = World(Plan(seed, nodes=3, faults=0, programs=("flat",), size=0.3))
        world.faults, world.has_store_outages = [Fault(1.0, "store_cut", 8.0, seed)], True
        error = attempt(world)
        if error is not None:
            raise error
        return world

    assert all(cut_off(seed).evidence.relayed == 1 for seed in (1, 2, 3))
    monkeypatch.setattr(StoreRoute, "handle", lambda self, event, now_s: [])
    with pytest.raises(Violation, match="nobody has helped it"):
        cut_off(1)
