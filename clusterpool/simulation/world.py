"""A simulated cluster from its seed: what it consists of, its run, and its end.

start --programs and faults--> heal --all programs end--> quiet --nothing is left--> drivers leave
"""

from __future__ import annotations

import gc
import itertools
from dataclasses import dataclass
from random import Random
from typing import Any

from clusterpool.core import messages as m
from clusterpool.core import node_events as e
from clusterpool.core import wire
from clusterpool.core.membership import SMALL_MAX
from clusterpool.core.messages import Address, Message
from clusterpool.simulation.chance import Chance, Latencies
from clusterpool.simulation.client import Client
from clusterpool.simulation.control_store import StoreServer
from clusterpool.simulation.evidence import Evidence
from clusterpool.simulation.faults import Fault, Faults, draw_faults
from clusterpool.simulation.ledger import ActorLedger
from clusterpool.simulation.lock_programs import LockLedger
from clusterpool.simulation.monitor import Monitor
from clusterpool.simulation.node import SimulatedNode
from clusterpool.simulation.party import Fabric, Host
from clusterpool.simulation.stream_programs import StreamLedger
from clusterpool.simulation.sync_programs import MeetingLedger
from clusterpool.simulation.threads import Disconnected, Pause, Steps, Thread
from clusterpool.simulation.timeline import Timeline, Trace, Violation
from clusterpool.simulation.token_programs import TokenLedger
from clusterpool.simulation.workloads import Script

# After everything was healed, all work must end within this time: longer than any patience of the machines (a transfer
# waits 60 s for a source that says nothing, and may try three).
END_S = 400.0
QUIET_S = 12.0
LEAVE_S = 30.0


@dataclass(frozen=True)
class Plan:
    """What a world is made of, apart from what its seed decides."""

    seed: int
    nodes: int = 0  # 0: as many as the seed says, 1 to 8
    drivers: int = 0
    faults: int = -1  # how many; -1: as the seed says
    busy_s: float = 8.0  # for how long faults strike
    size: float = 1.0  # scales what each program does
    programs: tuple[str, ...] = ()  # what drivers do (workloads.PROGRAMS); none: any of them
    only: tuple[int, ...] | None = None  # positions of the faults that are not left out
    quiet_s: float = QUIET_S  # how long to wait before nothing may be left
    steps_max: int = 50_000_000


class World:
    """One run."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.timeline = Timeline()
        self.trace = Trace()
        self.monitor = Monitor(self)
        self.evidence = Evidence(self)
        self.ledger = ActorLedger(self)
        self.locks = LockLedger(self)
        self.streams = StreamLedger(self)
        self.tokens = TokenLedger(self)
        self.meetings = MeetingLedger()
        random = self.random("world")
        self._numbers = itertools.count(1)
        count = plan.nodes or random.choice((1, 2, 2, 3, 3, 4, 5, 8))
        self.is_large = count > 50
        self.latencies = Latencies(self.random("latencies"), remote_s=random.choice((0.0001, 0.0005, 0.005)))
        faults = plan.faults if plan.faults >= 0 else random.choice((0, 1, 2, 4, 8, 12))
        fork_failure = 0.02 if faults and random.random() < 0.2 else 0.0
        self.chance = Chance(self.random("chance"), fork_failure=fork_failure)
        self.faults: list[Fault] = draw_faults(self.random("faults"), count=faults, from_s=0.8, until_s=plan.busy_s)
        if plan.only is not None:
            self.faults = [self.faults[position] for position in plan.only]
        if fork_failure:
            self.monitor.happened.add("fork")
        self.has_store_outages = any(fault.kind.startswith("store") for fault in self.faults)
        self.store = StoreServer(self)
        self.fabric = Fabric(self)
        self.nodes: list[SimulatedNode] = []
        self.drivers: list[Client] = []
        self.clients: dict[str, Client] = {}
        self._striker = Faults(self)
        self._threads: list[Thread] = []
        self._arena_bytes = random.choice((128 << 10, 1 << 20, 8 << 20)) if not self.is_large else 256 << 10
        if self._arena_bytes < 1 << 20:
            self.monitor.happened.add("memory")
        self._has_skew = random.random() < 0.5
        # In a third of the small worlds, nodes watch each other as in a large one.
        self.small_max = self.random("membership").choice((SMALL_MAX, SMALL_MAX, 0))
        for _ in range(count):
            self.add_node(random)
        for _ in range(plan.drivers or random.choice((1, 1, 2, 3))):
            self._add_driver(random)

    def random(self, part: str) -> Random:
        """A source of chance of its own for each part, so that a change in one leaves the others alone."""
        return Random(f"{self.plan.seed}/{part}")

    def next_number(self) -> int:
        """A number that nobody else has."""
        return next(self._numbers)

    def sent(self, message: Message) -> Any:
        """What travels: bytes, so that two processes never share what one of them might change."""
        return message if self.is_large else wire.encode(message)

    def received(self, frame: Any) -> Message:
        """The reverse of `sent`."""
        return frame if self.is_large else wire.decode(frame)

    # --- making it

    def add_node(self, random: Random) -> SimulatedNode:
        """A host with a node; call its `open`."""
        number = len(self.nodes) + 1
        rate = random.uniform(0.999, 1.001) if self._has_skew else 1.0
        slowness = random.choice((1.0, 1.0, 1.0, 5.0))
        host = Host(f"h{number}", clock_offset_s=random.uniform(0.0, 1e5), clock_rate=rate, slowness=slowness)
        cpus = random.choice((1.0, 2.0, 4.0))
        disk_bytes = random.choice((0, 1 << 20, 1 << 30)) if "memory" in self.monitor.happened else 1 << 30
        node = SimulatedNode(self, host, f"n{number}", cpus=cpus, arena_bytes=self._arena_bytes, disk_bytes=disk_bytes)
        self.nodes.append(node)
        return node

    def _add_driver(self, random: Random) -> None:
        node = self.nodes[0] if not self.drivers else random.choice(self.nodes)
        number = len(self.drivers) + 1
        address = Address(node.node_id, f"d{number}")
        job = m.JobPart(f"j{number}", "", node.host.name, "/", [], "", {}, "", address)
        driver = Client(self, node.host, address, job, node)
        self.drivers.append(driver)
        self.clients[driver.name] = driver

    def crash_host(self, node: SimulatedNode) -> None:
        """Everything on the host is gone at once."""
        node.crash()
        for party in list(node.host.parties):
            party.cause = "host"
            party.vanish()

    # --- running it

    def run(self) -> None:
        """From the start to the end.

        Raises: Violation.
        """
        # Of the millions of things that a thousand nodes know of each other, hardly any is garbage before the end.
        if self.is_large and gc.isenabled():
            gc.disable()
            try:
                self._run()
            finally:
                gc.enable()
        else:
            self._run()

    def _run(self) -> None:
        for position, node in enumerate(self.nodes):
            self.timeline.at(0.0002 * position, node.open)
        for driver in self.drivers:
            self.timeline.at(self.random(driver.name).uniform(0.1, 0.6), self._start_driver, driver)
        self._striker.plan(self.faults)
        self._run_until(lambda: False, self.plan.busy_s, "")
        self._striker.heal_all()
        self._run_until(self._are_programs_done, END_S, "the programs have not ended")
        if self.ledger.has_detached:
            self._run_until(lambda: False, self.plan.quiet_s, "")  # some are only being registered
            self._end_detached_actors()
        self._run_until(lambda: False, self.plan.quiet_s, "")
        self.check_idle(is_empty=False)
        for driver in self.drivers:
            if driver.is_alive and not driver.is_closed:
                driver.send(driver.node, m.LeaveNode())
        self._run_until(self._have_drivers_left, LEAVE_S, "drivers have not left")
        for driver in self.drivers:
            driver.vanish()
        self._run_until(lambda: False, self.plan.quiet_s, "")
        self.check_idle(is_empty=True)

    def _run_until(self, is_over: Any, limit_s: float, failure: str) -> None:
        timeline = self.timeline
        end_s = timeline.now_s + limit_s
        steps = 0
        while timeline.now_s < end_s:
            steps += 1
            if steps % 16 == 0 and is_over():
                return
            if not timeline.step():
                break
            if timeline.steps > self.plan.steps_max:
                raise Violation(f"more than {self.plan.steps_max} steps: something goes in circles")
        if failure and not is_over():
            raise Violation(f"{failure} within {limit_s:.0f} s of virtual time: {self._unfinished()}")

    def _start_driver(self, driver: Client) -> None:
        if not driver.is_alive or not driver.node_party.is_alive:
            return
        driver.join()
        random = self.random(driver.name)
        for number in range(random.randint(1, 3)):
            large_bytes = min(self._arena_bytes // 4, random.choice((20_000, 300_000, 2_500_000)))
            script = Script(
                driver,
                self.random(f"{driver.name}/{number}"),
                name=f"{driver.name}p{number}",
                size=self.plan.size,
                large_bytes=large_bytes,
            )
            self._threads.append(driver.run(self._program(driver, script)))

    def _program(self, driver: Client, script: Script) -> Steps:
        try:
            yield from driver.wait_until(lambda: driver.is_registered)
            yield from script.run()
        except Disconnected:
            return
        yield Pause(0.0)

    def _end_detached_actors(self) -> None:
        """Those of drivers that have died."""
        node = next(node for node in self.nodes if node.is_alive)
        for actor in self.store.fake.list_actors():
            if self.ledger.is_detached(actor.actor_id):
                node.event(e.MessageArrived(node.address, m.KillActor(actor.actor_id, None, True, True)))

    def _are_programs_done(self) -> bool:
        return all(thread.is_done or not thread._process.is_alive for thread in self._threads)

    def _have_drivers_left(self) -> bool:
        return all(driver.is_closed or not driver.is_alive for driver in self.drivers)

    def _unfinished(self) -> str:
        stories = []
        for driver in self.drivers:
            if driver.is_alive and not driver.is_closed:
                tasks = [f"{number} at {task.worker or 'nobody'}" for number, task in driver.machine.tasks.items()]
                stories.append(f"{driver.name} has {len(tasks)} unfinished tasks ({', '.join(tasks[:5])})")
        return "; ".join(stories)

    def check_idle(self, *, is_empty: bool) -> None:
        """Nothing is left of what the programs did."""
        for driver in self.drivers:
            if driver.is_alive and not driver.is_closed:
                self.monitor.check_idle_owner(driver)
        for node in self.nodes:
            if node.is_alive:
                self.monitor.check_idle_node(node, is_empty=is_empty)
