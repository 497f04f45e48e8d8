"""What goes wrong in a simulated cluster, when, and for how long: drawn from the seed before the world starts.

Each fault has a seed of its own from which it draws its victim, so that leaving others out (to find the few that
matter) changes it as little as possible.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from clusterpool.simulation.node import SimulatedNode
    from clusterpool.simulation.party import Party
    from clusterpool.simulation.worker import Worker
    from clusterpool.simulation.world import World

KINDS = (
    "worker_crash", "worker_crash", "worker_crash", "worker_freeze", "node_crash", "node_freeze", "host_freeze",
    "partition", "store_cut", "store_crash", "store_pause", "disk", "driver_kill", "node_joins", "node_leaves",
)  # fmt: skip


# By when a node that alone is cut off from the control store must have reached it through a peer.
RELAYED_S = 4.2


class Fault(NamedTuple):
    """One fault. `duration_s`: of those that end."""

    time_s: float
    kind: str
    duration_s: float
    seed: int


def draw_faults(random: Random, *, count: int, from_s: float, until_s: float) -> list[Fault]:
    """A plan, in the order of time."""
    plan: list[Fault] = []
    for _ in range(count):
        duration_s = random.choice((0.05, 0.4, 1.5, 3.0, 4.5, 8.0))
        kind = random.choice(KINDS)
        plan.append(Fault(random.uniform(from_s, until_s), kind, duration_s, random.getrandbits(32)))
    return sorted(plan)


class Faults:
    """Carries out a plan, and at the end heals what is still broken."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._cures: dict[int, Callable[[], None]] = {}
        self._last = 0

    def plan(self, faults: list[Fault]) -> None:
        """Have these happen."""
        for fault in faults:
            self._world.timeline.at(fault.time_s, self._strike, fault)

    def heal_all(self) -> None:
        """Whatever lasts is over now."""
        for number in list(self._cures):
            self._cure(number)

    def _strike(self, fault: Fault) -> None:
        world = self._world
        random = Random(fault.seed)
        if getattr(self, f"_{fault.kind}")(random, fault.duration_s):
            world.monitor.happened.add(fault.kind)

    def _until(self, duration_s: float, cure: Callable[[], None]) -> None:
        self._last += 1
        self._cures[self._last] = cure
        self._world.timeline.after(duration_s, self._cure, self._last)

    def _cure(self, number: int) -> None:
        cure = self._cures.pop(number, None)
        if cure is not None:
            cure()

    def _say(self, what: str, detail: object) -> None:
        world = self._world
        world.trace.note(world.timeline.now_s, "fault", what, detail)

    def _node(self, random: Random) -> SimulatedNode | None:
        nodes = [node for node in self._world.nodes if node.is_alive]
        return random.choice(nodes) if nodes else None

    def _workers(self) -> list[Worker]:
        return [worker for node in self._world.nodes for worker in node.workers.values() if worker.is_alive]

    # --- processes

    def _worker_crash(self, random: Random, _duration_s: float) -> bool:
        workers = self._workers()
        if not workers:
            return False
        busy = [worker for worker in workers if worker.task_page]
        victim = random.choice(busy if busy and random.random() < 0.7 else workers)
        self._say("worker crashes", victim.name)
        victim.exit(random.choice((-9, -11, 3)), "fault")
        return True

    def _worker_freeze(self, random: Random, duration_s: float) -> bool:
        workers = self._workers()
        if not workers:
            return False
        self._freeze([random.choice(workers)], duration_s)
        return True

    def _node_crash(self, random: Random, _duration_s: float) -> bool:
        nodes = [node for node in self._world.nodes if node.is_alive]
        # The first node stays, so that there always is a cluster; drivers elsewhere go with their host.
        if len(nodes) < 2 or random.random() < 0.3:
            return False
        victim = random.choice(nodes[1:])
        self._say("host crashes", victim.name)
        self._world.crash_host(victim)
        return True

    def _node_freeze(self, random: Random, duration_s: float) -> bool:
        node = self._node(random)
        if node is None:
            return False
        self._freeze([node], duration_s)
        return True

    def _host_freeze(self, random: Random, duration_s: float) -> bool:
        node = self._node(random)
        if node is None:
            return False
        self._freeze([party for party in node.host.parties if party.is_alive], duration_s)
        return True

    def _freeze(self, parties: list[Party], duration_s: float) -> None:
        frozen = [party for party in parties if not party.is_frozen]
        for party in frozen:
            party.freeze()

        def thaw() -> None:
            for party in frozen:
                party.thaw()

        self._until(duration_s, thaw)

    def _driver_kill(self, random: Random, _duration_s: float) -> bool:
        drivers = [driver for driver in self._world.drivers if driver.is_alive and not driver.is_closed]
        if len(drivers) < 2:
            return False
        victim = random.choice(drivers)
        self._say("driver is killed", victim.name)
        victim.cause = "fault"
        victim.vanish()
        return True

    # --- the network

    def _partition(self, random: Random, duration_s: float) -> bool:
        nodes = [node.node_id for node in self._world.nodes if node.is_alive]
        if len(nodes) < 2:
            return False
        random.shuffle(nodes)
        split = random.randint(1, len(nodes) - 1)
        pairs = [(one, other) for one in nodes[:split] for other in nodes[split:]]
        self._say("partition", (nodes[:split], nodes[split:]))
        for one, other in pairs:
            self._world.fabric.cut(one, other)
        evidence = self._world.evidence
        for node_id in nodes:
            evidence.struck(node_id, "partition")

        def join() -> None:
            self._say("partition heals", None)
            for one, other in pairs:
                self._world.fabric.join(one, other)
            for node_id in nodes:
                evidence.mended(node_id, "partition")

        self._until(duration_s, join)
        return True

    def _store_cut(self, random: Random, duration_s: float) -> bool:
        node = self._node(random)
        if node is None:
            return False
        since_s = self._world.timeline.now_s
        if not self._break(node, "store_cut", duration_s, ("store unreachable", "store reachable")):
            return False
        # Before it is mended: by then it must have found a way through a peer.
        self._world.timeline.after(min(duration_s, RELAYED_S), self._world.evidence.check_relayed, node, since_s)
        return True

    def _break(self, node: SimulatedNode, kind: str, duration_s: float, story: tuple[str, str]) -> bool:
        """Set a flag of a part of a node for so long. `story`: what to say before and after."""
        broken, mended = story
        part: Any = node.store if kind == "store_cut" else node.disk
        flag = "is_cut" if kind == "store_cut" else "is_broken"
        if getattr(part, flag):
            return False

        def mend() -> None:
            self._say(mended, node.name)
            self._world.evidence.mended(node.name, kind)
            setattr(part, flag, False)

        self._say(broken, node.name)
        self._world.evidence.struck(node.name, kind)
        setattr(part, flag, True)
        self._until(duration_s, mend)
        return True

    # --- the control store and the disks

    def _store_crash(self, random: Random, duration_s: float) -> bool:
        store = self._world.store
        if store.is_down or store.is_paused:
            return False
        loses = random.choice(("nothing", "fsync", "everything"))
        self._say("store crashes", loses)
        store.crash()
        self._world.evidence.struck("store", "away")

        def restart() -> None:
            self._say("store restarts", loses)
            if loses != "nothing":
                self._world.monitor.happened.add("store_loss")
                self._world.evidence.mended("store", "loss")
            store.restart(loses=loses)
            self._world.evidence.mended("store", "away")

        self._until(duration_s, restart)
        return True

    def _store_pause(self, _random: Random, duration_s: float) -> bool:
        store = self._world.store
        if store.is_down or store.is_paused:
            return False
        self._say("store pauses", None)
        store.pause()
        self._world.evidence.struck("store", "away")

        def resume() -> None:
            self._say("store resumes", None)
            self._world.evidence.mended("store", "away")
            store.resume()

        self._until(duration_s, resume)
        return True

    def _disk(self, random: Random, duration_s: float) -> bool:
        node = self._node(random)
        if node is None:
            return False
        return self._break(node, "disk", duration_s, ("disk fails", "disk is repaired"))

    # --- nodes come and go

    def _node_joins(self, random: Random, _duration_s: float) -> bool:
        self._world.add_node(random).open()
        return True

    def _node_leaves(self, random: Random, _duration_s: float) -> bool:
        nodes = [node for node in self._world.nodes if node.is_alive and not node.is_frozen]
        free = [node for node in nodes[1:] if not any(driver.node_party is node for driver in self._world.drivers)]
        if not free:
            return False
        victim = random.choice(free)
        self._say("node leaves", victim.name)
        victim.leave()
        self._world.monitor.happened.add("node_crash")
        return True
