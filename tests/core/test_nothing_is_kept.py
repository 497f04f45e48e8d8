"""Nothing stays in a node's tables of what came and went: jobs, workers, objects and copies, actors, locks, queues."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sized
from typing import Any

import msgspec
import pytest

from clusterpool.core import coordination
from clusterpool.core import coordination_events as ce
from clusterpool.core import coordination_messages as c
from clusterpool.core import membership as ms
from clusterpool.core import messages as m
from clusterpool.core import node_events as e
from clusterpool.core import transfer_messages as t
from clusterpool.core.cluster_view import NodeEntry, NodeRecord, NodesSnapshot
from clusterpool.core.messages import Address, StoredValue, WorkerKind
from clusterpool.core.peer_messages import EndJob
from tests.core.machines import JOB
from tests.core.test_node import NOW_S, Node

N2, N3 = Address("n2", "n2"), Address("n3", "n3")
JOBS = 5
_TABLES = (dict, set, list, deque)


class Shell:
    """Carries out what the machine of node n1 says, as far as other machines must hear of it."""

    def __init__(self) -> None:
        self.node = Node()
        machine = self.node.machine
        machine.handle(ms.JoinRequested(machine.record), NOW_S)
        machine.handle(ms.Registered(1), NOW_S)
        names = ("n1", "n2", "n3")
        records = [NodeRecord(name, "h", 7000, "", {"CPU": 2.0}) for name in names]
        self.run(ms.NodesRead(NodesSnapshot([NodeEntry(record, 1, 1, 0.0) for record in records])))

    def run(self, event: Any) -> None:
        events = deque([event])
        while events:
            for command in self.node.handle(events.popleft()):
                events.extend(self._answers(command))

    def hear(self, source: Address, message: m.Message) -> None:
        self.run(e.MessageArrived(source, message))

    def end_worker(self, process_id: str) -> list[Any]:
        return [e.ProcessLeft(Address("n1", process_id)), e.WorkerEnded(process_id, -9, "killed")]

    def _answers(self, command: Any) -> list[Any]:
        if isinstance(command, e.ForkWorker):
            return [e.ProcessJoined(Address("n1", command.process_id), "worker", 1, None, False)]
        if isinstance(command, e.EndWorker):
            return self.end_worker(command.process_id)
        if isinstance(command, e.ReservePages):
            return [e.PagesReserved(*msgspec.structs.astuple(command))]
        if isinstance(command, e.CallStore):
            return [e.StoreReturned(command.tag, None)]
        if isinstance(command, ce.CallCoordination) and command.tag:
            waits = command.operation in ("acquire", "get")
            return [ce.OperationAnswered(command.tag, (ce.WAITING, 0) if waits else command.operation != "exists")]
        if isinstance(command, ce.DrainCarrier):
            return [ce.CarrierDrained(command.name, ce.Contents(1))]
        if isinstance(command, e.Send) and command.destination.node_id != "n1":
            return self._answers_of_others(command.destination, command.message)
        return []

    def _answers_of_others(self, node: Address, message: m.Message) -> list[Any]:
        if isinstance(message, t.OpenTransfer):
            return [e.MessageArrived(node, t.TransferOpened(message.transfer, 4096))]
        if isinstance(message, t.SendChunk):
            return [e.MessageArrived(node, t.ChunkData(message.transfer, message.offset, bytes(message.size_bytes)))]
        if isinstance(message, c.MoveCarrier):
            return [e.MessageArrived(node, c.CarrierMoved(message.name))]
        return []

    def sizes(self) -> dict[str, int]:
        """Of all that the machine keeps, by its place."""
        sizes: Counter[str] = Counter()
        seen: set[int] = set()

        def look(value: Any, place: str) -> None:
            if id(value) in seen:
                return
            seen.add(id(value))
            if isinstance(value, Sized) and isinstance(value, _TABLES):
                sizes[place] += len(value)
                for item in list(value.values() if isinstance(value, dict) else value):
                    look(item, f"{place}[]")
            elif type(value).__module__.startswith("clusterpool.core"):
                slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
                for name in (*getattr(value, "__dict__", ()), *slots):
                    look(getattr(value, name, None), f"{place}.{name}")

        look(self.node.machine, "node")
        return dict(sizes)


def work(shell: Shell, owner: Address, job: m.JobPart, number: int) -> None:
    """What a job does on node n1 before it ends."""
    source = owner if owner.node_id == "n1" else owner.node
    demand = m.WorkerDemand(WorkerKind.TASK, {"CPU": 1.0})
    shell.hear(source, m.RequestWorkers(1, 2, demand, job, 0 if source == owner else 1, owner))
    shell.hear(source, m.RequestWorkers(2, 3, demand, job, 3, owner))  # who have to wait
    leases = list(shell.node.machine.scheduler.leases.values())
    first, second = [Address("n1", lease.worker.process_id) for lease in leases[:2]]
    mine, elsewhere, lent = f"{owner.process_id}.1", f"{owner.process_id}.2", f"{first.process_id}.1"
    shell.hear(first, m.CreateObject(1, mine, 4096, owner))
    shell.hear(first, m.SealObject(mine))
    shell.hear(first, m.CreateObject(2, lent, 4096, first))  # never sealed
    shell.hear(second, m.PinObject(1, StoredValue(mine, 4096, ["n1"], owner)))
    shell.hear(second, m.PinObject(2, StoredValue(elsewhere, 4096, ["n3"], owner)))
    shell.hear(second, m.PinObject(3, StoredValue(f"{number}.9", 0, ["n4"], Address("n2", str(number)))))
    shell.hear(first, m.WatchCapacity())
    shell.hear(first, m.CreateObject(3, f"{job.job_id}-q.{first.process_id}-1", 4096))  # of a queue
    shell.hear(N3, m.WatchProcess(first.process_id))
    for transfer in (t.OpenTransfer(number, mine), t.CloseTransfer(number)):
        shell.hear(N3, transfer)
    actor = m.ActorPart(f"a{number}", "A", {}, None, "pending", job_id=job.job_id)
    shell.hear(first, m.RegisterActor(4, actor))
    shell.hear(second, m.LocateActor(5, f"a{number}", "", ""))
    for name, home in ((f"{job.job_id}-1", "n1"), (f"{job.job_id}-2", "n2")):
        shell.hear(first, c.AdoptCarrier(6, "lock", name, home, 1, 1))
        shell.hear(first, c.AcquireToken(7, name, True))
        shell.hear(second, c.AcquireToken(7, name, True))
        shell.run(ce.GrantRead(shell.node.machine.coordination._waits.waiter(first, 7), name, number + 1))
    shell.hear(second, c.ReportStuck(f"{job.job_id}-3", 1))
    for event in shell.end_worker(second.process_id):
        shell.run(event)
    shell.hear(source, m.CancelRequest(2, 1))


@pytest.mark.parametrize(
    ("home", "end"),
    [("n1", "leaves"), ("n1", "is killed"), ("n2", "leaves"), ("n2", "is killed"), ("n2", "its node dies")],
)
def test_jobs_that_come_and_go_leave_nothing(home: str, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordination, "MOVES_OF_LOST_JOBS_MAX", 1)
    shell = Shell()
    seen = []
    for number in range(JOBS):
        owner = Address(home, f"d{number}")
        job = msgspec.structs.replace(JOB, job_id=f"j{number}", owner=owner)
        if home == "n1":
            shell.run(e.ProcessJoined(owner, "driver", 1, job, False))
        work(shell, owner, job, number)
        if end == "leaves":
            shell.hear(*((owner, m.LeaveNode()) if home == "n1" else (N2, EndJob(owner))))
        if home == "n1":
            shell.run(e.ProcessLeft(owner))
        elif end == "its node dies":
            shell.run(ms.NodeEventRead("node_died", "n2", number + 1, "silent"))
            entries = [
                NodeEntry(NodeRecord(name, "h", 7000, "", {"CPU": 2.0}), life, 1, 0.0)
                for name, life in (("n1", 1), ("n2", number + 2), ("n3", 1))
            ]
            shell.run(ms.NodesRead(NodesSnapshot(entries)))
        else:
            shell.hear(N2, m.ProcessEnded(owner, "killed"))
        # What came too late: sent by a worker elsewhere before it knew.
        late = Address("n2", f"late{number}")
        shell.hear(N2, m.RequestWorkers(9, 1, m.WorkerDemand(WorkerKind.TASK, {"CPU": 1.0}), job, 1, late))
        for ended in (owner, late, Address("n2", str(number))):
            shell.hear(N2, m.ProcessEnded(ended, "killed"))
        shell.run(e.TimePassed())
        seen.append(shell.sizes())
    assert seen[-1] == seen[1]
    assert seen[1]["node.scheduler.workers"] == seen[1]["node.objects.store.objects"] == 0
