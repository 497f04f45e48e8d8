"""What must hold at every moment of a simulated cluster, and at its end.

Cheap checks run after every step of a machine, dear ones after every so many, all of them at the end.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from clusterpool.core.store_invariants import check_store
from clusterpool.simulation.programs import Operation, Outcome
from clusterpool.simulation.timeline import Violation

if TYPE_CHECKING:
    from clusterpool.simulation.client import Client
    from clusterpool.simulation.node import SimulatedNode
    from clusterpool.simulation.world import World

DEAR_EVERY = 50


class Monitor:
    """Watches one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.happened: set[str] = set()  # kinds of faults; what each may explain, world.evidence knows
        self.losses: Counter[str] = Counter()
        self.outcomes = 0
        self._steps: Counter[str] = Counter()
        self._begun: Counter[int] = Counter()  # by salt
        self._deaths: Counter[int] = Counter()  # by salt, how often a task that ends its process has begun

    def check(self, condition: bool, text: str) -> None:
        """Raises: Violation."""
        if not condition:
            self.fail(text)

    def fail(self, text: str) -> None:
        """Raises: Violation."""
        raise Violation(text)

    # --- programs

    def judge(
        self, client: Client, what: str, outcome: Outcome, wanted: Outcome, *, was_cancelled: bool = False,
        subject: str = "",
    ) -> None:  # fmt: skip
        """A program has got something. `subject`: as in Evidence.doubt."""
        self.outcomes += 1
        if outcome.kind == wanted.kind and outcome.number == wanted.number:
            return
        story = f"{client.name}: {what} gave {outcome}, not {wanted}"
        self.check(outcome.is_lost, story)
        self.losses[outcome.kind] += 1
        if outcome.kind == "cancelled":
            self.check(was_cancelled, story)
            return
        doubt = self._world.evidence.doubt(outcome.kind, outcome.text, subject)
        self.check(not doubt, f"{story}; {doubt}")

    # --- workers

    def is_first(self, operation: Operation) -> bool:
        """Whether a task begins for the first time."""
        self._begun[operation.salt] += 1
        return self._begun[operation.salt] == 1

    def dies(self, operation: Operation) -> bool:
        """Whether a task ends its process this time."""
        self._deaths[operation.salt] += operation.deaths > 0
        if not 0 < self._deaths[operation.salt] <= operation.deaths:
            return False
        self.happened.add("worker_crash")
        return True

    # --- machines

    def node_stepped(self, node: SimulatedNode) -> None:
        """A node's machine has handled something."""
        self._check_resources(node)
        self._steps[node.name] += 1
        if self._steps[node.name] % DEAR_EVERY == 0:
            self.check_node(node)

    def _check_resources(self, node: SimulatedNode) -> None:
        scheduler = node.machine.scheduler
        taken: dict[str, int] = {}
        for lease in scheduler.leases.values():
            for name, amount in lease.amounts.items():
                if name != "CPU" or not lease.is_blocked:
                    taken[name] = taken.get(name, 0) + amount
        for name, total in scheduler.pool.total.items():
            free = scheduler.pool.free[name]
            self.check(
                free == total - taken.get(name, 0),
                f"{node.name}: {free} of {total} {name} are said to be free, {taken.get(name, 0)} are leased",
            )

    def check_node(self, node: SimulatedNode) -> None:
        """All that must hold of one node."""
        check_store(node.machine.objects.store)
        node.machine.objects.pulls.check_invariants()
        for lease in node.machine.scheduler.leases.values():
            self.check(
                lease.worker.lease is lease, f"{node.name}: lease {lease.number} has a worker with another lease"
            )

    def owner_stepped(self, client: Client) -> None:
        """An owner's machine has handled something."""
        self._steps[client.name] += 1
        if self._steps[client.name] % DEAR_EVERY == 0:
            self.check_owner(client)

    def check_owner(self, client: Client) -> None:
        """All that must hold of one owner."""
        machine = client.machine
        for worker_set in machine.sets.values():
            dispatcher = worker_set.dispatcher
            count = sum(len(slot.outstanding) for slot in dispatcher.slots.values())
            self.check(
                count == dispatcher.outstanding_count, f"{client.name}: {count} tasks are out, counted otherwise"
            )
            for process_id in worker_set.held:
                known = machine._set_by_process.get(process_id)
                self.check(known is worker_set, f"{client.name}: the set of {process_id} is forgotten")

    # --- the end

    def check_idle_owner(self, client: Client) -> None:
        """A driver that has let go of everything, and waited."""
        machine = client.machine
        self._nothing(client.name, "unfinished tasks", machine.tasks)
        self._nothing(client.name, "objects", machine.objects.table.owned)
        self._nothing(client.name, "borrowed objects", machine.objects.table.borrowed)
        self._nothing(client.name, "tasks that wait for arguments", machine.arguments.targets)
        self._nothing(client.name, "arguments", machine.objects._arguments)
        self._nothing(client.name, "streams", machine.objects.streams)
        self._nothing(client.name, "questions about objects", machine.objects._asked)
        recovery = machine.recovery
        self._nothing(client.name, "lineage", recovery.lineage.by_task)
        self._nothing(client.name, "lineage of objects", recovery.lineage.by_object)
        self._nothing(client.name, "tasks that are run again", recovery.running)
        self._nothing(client.name, "results that nobody has read", recovery.unread)
        self._nothing(client.name, "names of stored objects", recovery._number_by_name)
        for worker_set in machine.sets.values():
            self._nothing(client.name, "leases", worker_set.held)
            self._nothing(client.name, "requests for workers", list(worker_set.requested))

    def check_idle_node(self, node: SimulatedNode, *, is_empty: bool) -> None:
        """A node of a cluster in which nobody wants anything. `is_empty`: no driver is left either."""
        machine = node.machine
        self.check_node(node)
        scheduler, objects = machine.scheduler, machine.objects
        self._nothing(node.name, "leases", {number: _lease_story(lease) for number, lease in scheduler.leases.items()})
        self._nothing(node.name, "requests", [pending.key for pending in scheduler.pending])
        self._nothing(node.name, "objects", objects.store.objects)
        self._nothing(
            node.name, "bytes in use", [objects.store.allocator.used_bytes] * bool(objects.store.allocator.used_bytes)
        )
        self._nothing(node.name, "pins", objects.store.pins_by_client)
        self._nothing(node.name, "pulls", objects.pulls.pulls)
        self._nothing(node.name, "transfers out", objects.servings.serving_by_number)
        self._nothing(node.name, "pins asked for", objects._wanted)
        self._nothing(node.name, "owners of copies", objects._owners)
        self._nothing(node.name, "files on disk", node.disk.files)
        way = node.store.way
        self._nothing(node.name, "tunnels", [str(tunnel) for tunnel in way.tunnels._tunnels])
        self.check(not way.route.peer, f"{node.name} reaches the control store through {way.route.peer} still")
        if is_empty:
            self._nothing(node.name, "workers", scheduler.workers)
            self._nothing(node.name, "worker processes", node.workers)
            self._nothing(node.name, "idle lists", {job: idle for job, idle in scheduler.idle.items() if idle})
            self._nothing(node.name, "processes", machine.processes)
            self._nothing(node.name, "departing drivers", machine._departing)
            self._nothing(node.name, "jobs that end", machine.jobs._ending)
            watchers = {name: who for name, who in machine._watchers.items() if who}
            self._nothing(node.name, "watchers", watchers)

    def _nothing(self, who: str, what: str, left: Any) -> None:
        if left:
            shown = list(left.items()) if isinstance(left, dict) else left
            self.fail(f"{who} still has {what}: {str(shown[:5])[:600]}")


def _lease_story(lease: Any) -> str:
    return f"{lease.worker.process_id} for {lease.origin} (granted: {lease.is_granted})"
