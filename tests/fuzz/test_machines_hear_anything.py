"""A node's and an owner's machine, told anything that the wire lets pass: no lie may end a process of the cluster."""

from __future__ import annotations

import itertools
from random import Random
from typing import Any

import pytest

from clusterpool.core import messages as m
from clusterpool.core import node_events as ne
from clusterpool.core import owner_events as oe
from clusterpool.core.cluster_view import NodeRecord
from clusterpool.core.messages import Address
from clusterpool.core.node import NodeMachine
from tests.core.machines import DRIVER, JOB, Owner, make_task
from tests.fuzz.random_messages import Sampler
from tests.fuzz.searches import seeds

WORLDS = 100  # for each seed
STEPS = 60


class LiedToNode:
    """A node with a driver and some honest work."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.sampler = Sampler(random)
        self.now_s = 100.0
        names = (f"w{number}" for number in itertools.count(1))
        record = NodeRecord("n1", "host", 0, "", {"CPU": 2.0, "memory": 1e9})
        self.node = NodeMachine(
            record, arena_bytes=1 << 24, is_embedded=False, is_head=True, process_ids=names, driver_pid=4711
        )
        self.handle(ne.ProcessJoined(DRIVER, "driver", 4711, JOB, False))
        self.steps = [self.lie, self.lie, self.lie, self.lease, self.create, self.end_worker, self.pass_time, self.ask]

    def handle(self, event: Any) -> None:
        """Workers that are forked join, and pages that are reserved are there."""
        events = [event]
        while events:
            for command in self.node.handle(events.pop(), self.now_s):
                if isinstance(command, ne.ForkWorker):
                    address = Address("n1", command.process_id)
                    events.append(ne.ProcessJoined(address, "worker", 4712, None, False))
                elif isinstance(command, ne.ReservePages):
                    fields = (command.client, command.request, command.object_id, command.offset, command.size_bytes)
                    events.append(ne.PagesReserved(*fields))

    def lie(self) -> None:
        self.handle(ne.MessageArrived(self.sampler.address(), self.sampler.message()))

    def lease(self) -> None:
        demand = m.WorkerDemand(m.WorkerKind.TASK, {"CPU": 1.0})
        self.handle(ne.MessageArrived(DRIVER, m.RequestWorkers(1, self.random.randint(1, 3), demand, JOB)))

    def create(self) -> None:
        object_id = f"d1.{1024 * self.random.randint(1, 4)}"
        self.handle(ne.MessageArrived(DRIVER, m.CreateObject(1, object_id, 8192)))
        self.handle(ne.MessageArrived(DRIVER, m.SealObject(object_id)))

    def end_worker(self) -> None:
        process_id = self.random.choice(["w1", "w2"])
        self.handle(ne.ProcessLeft(Address("n1", process_id)))
        self.handle(ne.WorkerEnded(process_id, -9, "killed", 0))

    def pass_time(self) -> None:
        self.now_s += 0.5
        self.handle(ne.TimePassed())

    def ask(self) -> None:
        self.handle(ne.MessageArrived(DRIVER, m.DescribeCluster(1)))


class LiedToOwner:
    """An owner with a set of workers and objects."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.sampler = Sampler(random)
        self.owner = Owner()
        self.owner.open_set()
        self.numbers = itertools.count(1024, 1024)
        self.steps = [
            self.lie,
            self.lie,
            self.lie,
            self.submit,
            self.grant,
            self.finish,
            self.lose_node,
            self.pass_time,
        ]

    def lie(self) -> None:
        self.owner.hear(self.sampler.address(), self.sampler.message())

    def submit(self) -> None:
        self.owner.submit(make_task(next(self.numbers), sink=self.random.choice(["sink", None])))

    def grant(self) -> None:
        lease = self.random.randint(1, 3)
        self.owner.grant(self.random.randint(1, 5), f"w{lease}", lease=lease)

    def finish(self) -> None:
        self.owner.finish("w1", m.TaskResult(1024 * self.random.randint(1, 4), 0, b"value"))

    def lose_node(self) -> None:
        self.owner.hear(Address("n1", "n1"), m.NodeLost(self.random.choice(["n1", "n2"]), "gone"))

    def pass_time(self) -> None:
        self.owner.now_s += 0.5
        self.owner.handle(oe.TimePassed())


@pytest.mark.parametrize("world", [LiedToNode, LiedToOwner])
@pytest.mark.parametrize("seed", seeds(4))
def test_no_message_ends_a_machine(world: Any, seed: str) -> None:
    for number in range(WORLDS):
        random = Random(f"{seed}/{number}")
        lied_to = world(random)
        for _ in range(STEPS):
            random.choice(lied_to.steps)()
