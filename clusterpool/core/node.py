"""Everything that one node decides: the composite of its parts.

    shell --event--> NodeMachine --command--> shell
                       |- Scheduler    leases, workers, resources
                       |- NodeObjects  store, transfers
                       |- NodeActors   registry of actors
                       |- Membership   the other nodes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from clusterpool.core import membership as ms
from clusterpool.core import messages as m
from clusterpool.core import node_events as e
from clusterpool.core import store_messages as s
from clusterpool.core.cluster_view import NodeLoad, NodeRecord, NodeView
from clusterpool.core.messages import Address
from clusterpool.core.node_actors import NodeActors
from clusterpool.core.node_objects import NodeObjects
from clusterpool.core.placement import Candidate
from clusterpool.core.resources import to_amounts, to_numbers
from clusterpool.core.scheduler import Scheduler

TICK_S = 0.5
Commands = list[Any]


class Process:
    """A process of this node that has said who it is."""

    __slots__ = ("address", "is_leaving", "job_id", "kind", "pid", "wants_logs")

    def __init__(self, event: e.ProcessJoined) -> None:
        self.address = event.address
        self.kind = event.kind
        self.pid = event.pid
        self.job_id = event.job.job_id if event.job is not None else ""
        self.wants_logs = event.wants_logs
        self.is_leaving = False


class NodeMachine:
    """One node. `is_embedded`: it belongs to one driver and ends with it."""

    def __init__(
        self, record: NodeRecord, *, arena_bytes: int, is_embedded: bool, is_head: bool, process_ids: Iterator[str]
    ) -> None:
        self.record = record
        self.node_id = record.node_id
        self.address = Address(record.node_id, record.node_id)
        self.is_embedded = is_embedded
        self.is_head = is_head
        self.processes: dict[str, Process] = {}
        self.scheduler = Scheduler(self.node_id, record.host_name, record.resources, process_ids=process_ids)
        self.objects = NodeObjects(self.node_id, arena_bytes)
        self.actors = NodeActors(self.node_id)
        self.membership = ms.Membership(self.node_id)
        self._watchers: dict[str, set[Address]] = {}  # by process id
        self._watched_by_node: dict[str, set[Address]] = {}  # owners elsewhere whose leases are here
        self._details: dict[str, m.NodePart] = {}
        self._handlers: dict[type, Callable[[Any, float], Commands]] = {
            e.ProcessJoined: self._process_joined,
            e.ProcessLeft: self._process_left,
            e.MessageArrived: self._message_arrived,
            e.WorkerEnded: self._worker_ended,
            e.ForkFailed: lambda event, _: self.scheduler.fork_failed(event.process_id, event.text),
            e.PagesReserved: lambda event, now_s: self.objects.pages_reserved(event, now_s),
            e.StoreReturned: lambda event, _: self.actors.answered(event),
            e.StoreRaised: lambda event, _: self.actors.answered(event),
            e.ActorEventRead: lambda event, _: self.actors.event_read(event.actor_id),
            e.TimePassed: self._time_passed,
        }
        self._message_handlers: dict[type, Callable[[Address, Any, float], Commands]] = {
            m.RequestWorkers: lambda source, message, _: self.scheduler.requested(source, message),
            m.CancelRequest: lambda source, message, _: self.scheduler.cancelled(source, message),
            m.ReleaseWorkers: lambda _, message, __: self.scheduler.released(message),
            m.KillWorker: lambda source, message, _: self.scheduler.kill(source, message),
            m.WorkerBlocked: lambda source, _, __: self.scheduler.blocked(source.process_id),
            m.WorkerUnblocked: lambda source, _, __: self.scheduler.unblocked(source.process_id),
            m.WatchProcess: self._watch,
            m.ProcessEnded: self._remote_ended,
            m.Undeliverable: self._remote_ended,
            m.LeaveNode: self._leave,
            m.RegisterActor: lambda source, message, _: self.actors.registered(source, message),
            m.ActorChanged: lambda _, message, __: self.actors.changed(message),
            m.LocateActor: lambda source, message, _: self.actors.located(source, message),
            m.KillActor: self._kill_actor,
            m.DescribeCluster: self._describe,
            m.StopNode: lambda _, message, __: [e.StopNode("stopped by `clusterpool stop` or `down`")],
        }

    def handle(self, event: Any, now_s: float) -> Commands:
        """Take note of `event` at `now_s` (monotonic seconds); what to do about it, in order."""
        handler = self._handlers.get(type(event))
        if handler is not None:
            return handler(event, now_s)
        if isinstance(event, s.StoreEvent):
            return self.objects.store_event(event, now_s)
        return self._membership(event, now_s)

    # --- processes

    def _process_joined(self, event: e.ProcessJoined, _now_s: float) -> Commands:
        process_id = event.address.process_id
        self.processes[process_id] = Process(event)
        if event.kind == "worker":
            return self.scheduler.worker_joined(process_id, event.pid)
        if event.job is not None:
            arguments = {"job": event.job, "pid": event.pid}
            return self.actors.call("register_job", arguments)
        return []

    def _process_left(self, event: e.ProcessLeft, now_s: float) -> Commands:
        process = self.processes.pop(event.address.process_id, None)
        if process is None:
            return []
        commands = self._owner_gone(process, now_s)
        for watcher in sorted(self._watchers.pop(event.address.process_id, ())):
            commands.append(e.Send(watcher, m.ProcessEnded(event.address, "the process has ended")))
        if process.kind == "driver" and self.is_embedded:
            commands.append(e.StopNode("its driver has ended"))
        return commands

    def _owner_gone(self, process: Process, now_s: float) -> Commands:
        ends_job = process.job_id if process.kind == "driver" else ""
        commands: Commands = list(self.scheduler.owner_ended(process.address, ends_job=ends_job))
        commands += self.objects.process_left(process.address.process_id, now_s)
        self.actors.process_left(process.address)
        if ends_job and not process.is_leaving:
            commands += self.actors.call("finish_job", {"job_id": ends_job})
        return commands

    def _leave(self, source: Address, _message: m.LeaveNode, _now_s: float) -> Commands:
        process = self.processes.get(source.process_id)
        if process is None or process.is_leaving:
            return []
        process.is_leaving = True
        commands: Commands = list(self.scheduler.owner_ended(source, ends_job=process.job_id))
        commands += self.actors.call("finish_job", {"job_id": process.job_id})
        return commands + self._maybe_left(process)

    def _maybe_left(self, process: Process) -> Commands:
        """Answer a leaving driver once its last worker, and all that it printed, has been heard."""
        if any(worker.job.job_id == process.job_id and not worker.job.detached for worker in self.scheduler.workers.values()):
            return []
        return [e.Send(process.address, m.LeftNode())]

    def _worker_ended(self, event: e.WorkerEnded, now_s: float) -> Commands:
        worker = self.scheduler.workers.get(event.process_id)
        if worker is None:
            return []
        text = worker.end_text or event.text
        commands = self._process_left(e.ProcessLeft(Address(self.node_id, event.process_id)), now_s)
        commands += self.actors.worker_ended(worker.actor_id, text)
        commands += self.scheduler.worker_ended(event.process_id, event.exit_code, event.text)
        for process in self.processes.values():
            if process.is_leaving and process.job_id == worker.job.job_id:
                commands += self._maybe_left(process)
        return commands

    def _watch(self, source: Address, message: m.WatchProcess, _now_s: float) -> Commands:
        if message.process_id not in self.processes:
            ended = m.ProcessEnded(Address(self.node_id, message.process_id), "no such process is on its node")
            return [e.Send(source, ended)]
        self._watchers.setdefault(message.process_id, set()).add(source)
        return []

    def _remote_ended(self, _source: Address, message: m.ProcessEnded | m.Undeliverable, now_s: float) -> Commands:
        """A process of another node, whose leases or objects may be here, has ended."""
        commands: Commands = list(self.scheduler.owner_ended(message.address))
        return commands + self.objects.process_left(message.address.process_id, now_s)

    def _kill_actor(self, _source: Address, message: m.KillActor, _now_s: float) -> Commands:
        address = message.address
        if address is not None and address.node_id != self.node_id:
            return [e.Send(Address(address.node_id, address.node_id), message)]
        return list(self.scheduler.kill_actor(message.actor_id))

    # --- messages

    def _message_arrived(self, event: e.MessageArrived, now_s: float) -> Commands:
        handler = self._message_handlers.get(type(event.message))
        if handler is not None:
            return handler(event.source, event.message, now_s)
        return self.objects.message(event.source, event.message, now_s) or []

    # --- the cluster

    def _time_passed(self, _event: e.TimePassed, now_s: float) -> Commands:
        commands = self.objects.time_passed(now_s)
        return commands + self._membership(ms.HeartbeatDue(self.load()), now_s)

    def load(self) -> NodeLoad:
        """What the node says about itself with a heartbeat."""
        stats = self.objects.store.stats()
        return NodeLoad(
            available=to_numbers(self.scheduler.pool.free),
            queue_length=sum(pending.count for pending in self.scheduler.pending),
            workers=len(self.scheduler.workers),
            arena_used_bytes=stats.used_bytes,
            arena_size_bytes=stats.capacity_bytes,
        )

    def _membership(self, event: Any, now_s: float) -> Commands:
        commands: Commands = []
        version = self.membership.view.version
        for command in self.membership.handle(event, now_s):
            if isinstance(command, (ms.NodeDied, ms.NodeLeft)):
                reason = command.reason if isinstance(command, ms.NodeDied) else "it left the cluster"
                commands += self._node_lost(command.node_id, reason, now_s)
            elif not isinstance(command, (ms.NodeJoined, ms.NodeSuspected, ms.NodeTrusted)):
                commands.append(command)
        if self.membership.view.version != version:
            commands += self.scheduler.peers_changed([_candidate(view) for view in self._peers()])
        return commands

    def _peers(self) -> list[NodeView]:
        return self.membership.view.trusted_peers()

    def _node_lost(self, node_id: str, reason: str, now_s: float) -> Commands:
        commands = self.objects.node_lost(node_id, now_s)
        origins = {lease.origin for lease in self.scheduler.leases.values() if lease.origin.node_id == node_id}
        for origin in sorted(origins):
            commands += self.scheduler.owner_ended(origin)
            commands += self.objects.process_left(origin.process_id, now_s)
        lost = m.NodeLost(node_id, reason)
        commands += [e.Send(process.address, lost) for process in self.processes.values()]
        return commands

    def _describe(self, source: Address, message: m.DescribeCluster, _now_s: float) -> Commands:
        nodes = [self._own_part()]
        for view in self.membership.view:
            if view.node_id != self.node_id:
                nodes.append(_part_of_view(view))
        return [e.Send(source, m.ClusterDescribed(message.request, nodes))]

    def _own_part(self) -> m.NodePart:
        stats = self.objects.store.stats()
        load = self.load()
        record = self.record
        return m.NodePart(
            node_id=self.node_id,
            host=record.host_name or record.host,
            alive=True,
            is_head=self.is_head,
            total=record.resources,
            available={name: load.available.get(name, 0.0) for name in record.resources},
            workers=load.workers,
            queue_length=load.queue_length,
            store_bytes=stats.capacity_bytes,
            store_used_bytes=stats.used_bytes,
            spilled_bytes=stats.spilled_bytes,
            pid=record.pid,
            address=f"{record.host}:{record.port}" if record.port else "",
            details=self.scheduler.counts_by_state(),
        )


def _candidate(view: NodeView) -> Candidate:
    free = {name: round(amount * 10_000) for name, amount in view.available.items()}
    return Candidate(view.node_id, to_amounts(view.total), free, view.queue_length, view.workers, False)


def _part_of_view(view: NodeView) -> m.NodePart:
    host, port = view.address
    return m.NodePart(
        node_id=view.node_id,
        host=host,
        alive=not view.is_suspect,
        is_head=view.labels.get("head") == "yes",
        total=view.total,
        available={name: view.available.get(name, 0.0) for name in view.total},
        workers=view.workers,
        queue_length=view.queue_length,
        store_bytes=view.arena_size_bytes,
        store_used_bytes=view.arena_used_bytes,
        spilled_bytes=0,
        pid=0,
        address=f"{host}:{port}",
    )
