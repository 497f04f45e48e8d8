"""Everything that one node decides: the composite of its parts.

shell --event--> NodeMachine --command--> shell
                   |- Scheduler     leases, workers, resources
                   |- Environments  forks that wait for packages
                   |- NodeObjects   store, transfers
                   |- NodeActors    registry of actors
                   |- CoordinationMachine  semaphores, channels, cells
                   |- Membership    the other nodes
                   |- MemoryMonitor which worker ends when memory runs out
                   |- JobEnds       what of a job goes, and when
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from clusterpool.core import coordination_events as ce
from clusterpool.core import environments as env
from clusterpool.core import membership as ms
from clusterpool.core import messages as m
from clusterpool.core import node_events as e
from clusterpool.core import store_messages as s
from clusterpool.core.capacity import CapacityWatch
from clusterpool.core.cluster_description import candidate_of, part_of
from clusterpool.core.cluster_view import NodeEntry, NodeLoad, NodeRecord, NodeView, view_of_entry
from clusterpool.core.coordination import CoordinationMachine
from clusterpool.core.coordination_messages import CoordinationMessage
from clusterpool.core.job_ends import JobEnds
from clusterpool.core.memory_monitor import THRESHOLD_DEFAULT, MemoryMonitor
from clusterpool.core.messages import Address
from clusterpool.core.node_actors import NodeActors
from clusterpool.core.node_objects import NodeObjects
from clusterpool.core.peer_messages import AskAlive, EndJob, JobEnded, LoadChanged, StillAlive
from clusterpool.core.rejections import Rejections
from clusterpool.core.resources import to_numbers
from clusterpool.core.scheduler import Scheduler

TICK_S = 0.5
Commands = list[Any]


class Process:
    """A process of this node that has said who it is."""

    __slots__ = ("address", "is_leaving", "job_id", "kind", "pid", "waits_for", "wants_logs")

    def __init__(self, event: e.ProcessJoined) -> None:
        self.address = event.address
        self.kind = event.kind
        self.pid = event.pid
        self.job_id = event.job.job_id if event.job is not None else ""
        self.wants_logs = event.wants_logs
        self.is_leaving = False
        self.waits_for: set[str] = set()  # nodes whose workers of its job are being ended, while it leaves


class NodeMachine:
    """One node. `is_embedded`: it belongs to one driver and ends with it."""

    def __init__(
        self,
        record: NodeRecord,
        *,
        arena_bytes: int,
        is_embedded: bool,
        is_head: bool,
        process_ids: Iterator[str],
        driver_pid: int | None = None,
        memory_threshold: float = THRESHOLD_DEFAULT,
    ) -> None:
        self.record = record
        self.node_id = record.node_id
        self.address = Address(record.node_id, record.node_id)
        self.is_embedded = is_embedded
        self.driver_pid = driver_pid  # whose node it is, when embedded; other drivers may come and go
        self.is_head = is_head
        self.processes: dict[str, Process] = {}
        self.scheduler = Scheduler(self.node_id, record.host_name, record.resources, process_ids=process_ids)
        self.memory = MemoryMonitor(self.scheduler, threshold=memory_threshold)
        self.objects = NodeObjects(self.node_id, arena_bytes, self.scheduler.watch, self.processes)
        self.actors = NodeActors(self.node_id, self.scheduler, lambda: self.membership.living)
        self.membership = ms.Membership(self.node_id)
        self.capacity = CapacityWatch(record, self.membership.view)
        self.environments = env.Environments()
        self.coordination = CoordinationMachine(
            self.node_id,
            lambda: [each.address for each in self.processes.values() if each.kind != "tool"],
            lambda: None if is_embedded else self.membership.incarnation,
        )
        self.jobs = JobEnds()
        self.rejections = Rejections()
        self._watchers: dict[str, set[Address]] = {}  # by process id
        self._departing: dict[Address, Address] = {}  # by driver elsewhere, the node to tell when its job has ended
        self._told: dict[str, tuple[Any, ...]] = {}  # by node that has sent requests here, the last load it was told
        self._load_number = 0
        self._fencing: set[str] | None = None  # workers that must end before this node may join anew
        self._handlers: dict[type, Callable[[Any, float], Commands]] = {
            e.ProcessJoined: self._process_joined,
            e.ProcessLeft: self._process_left,
            e.MessageArrived: self._message_arrived,
            e.WorkerEnded: self._worker_ended,
            e.MemoryRead: self.memory.handle,
            e.ForkFailed: lambda event, _: self._fork_failed(event.process_id, event.text, "start_failed"),
            env.PackageUnpacked: lambda event, _: self.environments.unpacked(event),
            env.PackageFailed: self._package_failed,
            env.PackageAnswered: lambda event, _: [e.Send(event.address, event.answer)],
            e.PagesReserved: lambda event, now_s: self.objects.pages_reserved(event, now_s),
            e.StoreReturned: lambda event, _: self.actors.answered(event),
            e.StoreRaised: lambda event, _: self.actors.answered(event),
            e.ActorEventRead: lambda event, _: self.actors.event_read(event),
            e.TimePassed: self._time_passed,
            e.FrameRejected: lambda event, _: [e.Warn(event.text)] if self.rejections.note(event.cause) else [],
        }
        self._message_handlers = self._handlers_of_messages()

    def _handlers_of_messages(self) -> dict[type, Callable[[Address, Any, float], Commands]]:
        return {
            m.RequestWorkers: self._workers_requested,
            m.CancelRequest: lambda source, message, _: self.scheduler.cancelled(source, message),
            m.ReleaseWorkers: lambda source, message, _: self.scheduler.released(source, message),
            m.KillWorker: lambda source, message, now_s: self.scheduler.kill(source, message, now_s),
            **self.scheduler.handlers_of_lending(),
            m.WatchProcess: self._watch,
            m.ProcessEnded: self._remote_ended,
            m.Undeliverable: self._remote_ended,
            m.LeaveNode: self._leave,
            **self.actors.message_handlers(),
            **self.capacity.message_handlers(),
            m.DescribeCluster: self._describe,
            m.StopNode: self._stop,
            LoadChanged: self._load_changed,
            EndJob: self._end_job,
            JobEnded: self._job_ended,
            AskAlive: self._asked_alive,
            StillAlive: lambda source, message, now_s: self._membership(
                ms.NodeHeard(source.node_id, message.incarnation), now_s
            ),
        }

    def handle(self, event: Any, now_s: float) -> Commands:
        """Take note of `event` at `now_s` (monotonic seconds); what to do about it, in order."""
        handler = self._handlers.get(type(event))
        if handler is not None:
            commands = self._admitted(handler(event, now_s))
        elif isinstance(event, ce.CoordinationEvent):
            return self.coordination.handle(event, now_s)
        elif isinstance(event, s.StoreEvent):
            return self.objects.store_event(event, now_s)
        else:
            commands = self._admitted(self._membership(event, now_s))
        for over in self.jobs.take_over(self.scheduler.has_workers_of):
            commands += [*self.objects.job_ended(over.job_id, now_s), e.RemoveJob(over.job_id)]
            commands += self.coordination.handle(over, now_s)
        return commands + self._tell_load() if self._told else commands

    # --- forks that wait for packages

    def _admitted(self, commands: Commands) -> Commands:
        """The same commands, but for workers whose environment is not unpacked yet: those are forked later."""
        if not any(type(command) in (e.ForkWorker, e.EndWorker) for command in commands):
            return commands
        admitted: Commands = []
        left = deque(commands)
        while left:
            command = left.popleft()
            if isinstance(command, e.ForkWorker) and command.job.runtime_env:
                try:
                    admitted += self.environments.admit(command)
                except msgspec.MsgspecError as exc:
                    text = f"the job's runtime_env is malformed ({exc}); its driver is of another version"
                    left.extend(self._fork_failed(command.process_id, text, "environment"))
            elif isinstance(command, e.EndWorker) and self.environments.cancel(command.process_id):
                left.extend(self._fork_failed(command.process_id, "its owner let it go", "start_failed"))
            else:
                admitted.append(command)
        return admitted

    def _package_failed(self, event: env.PackageFailed, _now_s: float) -> Commands:
        commands: Commands = []
        for process_id in self.environments.failed(event):
            commands += self._fork_failed(process_id, event.text, "environment")
        return commands

    def _fork_failed(self, process_id: str, text: str, kind: str) -> Commands:
        self.environments.worker_ended(process_id)
        worker = self.scheduler.workers.get(process_id)
        commands: Commands = list(self.scheduler.fork_failed(process_id, text, kind))
        if worker is not None:
            commands += self._workers_gone(worker.job.job_id)
        return commands

    def _workers_gone(self, job_id: str) -> Commands:
        """A worker of this job is no more: its driver may have waited for that to leave."""
        commands: Commands = []
        for process in self.processes.values():
            if process.is_leaving and process.job_id == job_id:
                commands += self._maybe_left(process)
        for owner, home in list(self._departing.items()):
            commands += self._maybe_job_ended(owner, home)
        return commands

    # --- processes

    def registration_fault(self, address: Address, kind: str) -> str:
        """Why a process that has greeted cannot belong to this node: empty if it can."""
        if address.process_id in self.processes:
            return f"{address.process_id} has registered already"
        if kind == "worker" and address.process_id not in self.scheduler.workers:
            return f"the worker {address.process_id} was not started by this node, or has ended"
        return ""

    def _process_joined(self, event: e.ProcessJoined, _now_s: float) -> Commands:
        process_id = event.address.process_id
        self.processes[process_id] = Process(event)
        if event.kind == "worker":
            return self.scheduler.worker_joined(process_id, event.pid)
        if event.job is not None:
            self.jobs.seen(event.address, event.job.job_id)
            arguments = {"job": event.job, "pid": event.pid}
            return self.actors.call("register_job", arguments, is_stubborn=True)
        return []

    def _process_left(self, event: e.ProcessLeft, now_s: float) -> Commands:
        process = self.processes.pop(event.address.process_id, None)
        if process is None:
            return []
        commands = self._owner_gone(process, now_s)
        if event.address.process_id not in self.scheduler.workers:  # else how it ended will be known soon
            commands += self._tell_watchers(event.address, "the process has ended")
        elif event.sent_rubbish:
            # It was cut off: nobody could end it in good order.
            text = "it sent bytes that are no message of clusterpool's"
            commands += self.scheduler.end_worker(event.address.process_id, text)
        for watchers in self._watchers.values():  # else an actor that lives long would gather all who ever called it
            watchers.discard(event.address)
        self.capacity.watchers.discard(event.address)
        if process.kind == "driver" and self.is_embedded and process.pid == self.driver_pid:
            commands.append(e.StopNode("its driver has ended"))
        return commands

    def _tell_watchers(self, address: Address, text: str) -> Commands:
        watchers = sorted(self._watchers.pop(address.process_id, ()))
        return [e.Send(watcher, m.ProcessEnded(address, text)) for watcher in watchers]

    def _owner_gone(self, process: Process, now_s: float) -> Commands:
        ends_job = process.job_id if process.kind == "driver" else ""
        commands: Commands = list(self.scheduler.owner_ended(process.address, ends_job=ends_job))
        commands += self.objects.process_left(process.address.process_id, now_s)
        commands += self.actors.process_left(process.address)
        self.jobs.process_ended(process.address)
        commands += self.coordination.handle(ce.ProcessGone(process.address), now_s)
        if ends_job and not process.is_leaving:
            commands += self.actors.call("finish_job", {"job_id": ends_job}, is_stubborn=True)
        return commands

    def _leave(self, source: Address, _message: m.LeaveNode, _now_s: float) -> Commands:
        process = self.processes.get(source.process_id)
        if process is None or process.is_leaving:
            return []
        process.is_leaving = True
        nodes = [watcher for watcher in sorted(self._watchers.get(source.process_id, ())) if watcher.is_node]
        process.waits_for = {node.node_id for node in nodes}
        commands: Commands = [e.Send(node, EndJob(source)) for node in nodes]
        commands += self.scheduler.owner_ended(source, ends_job=process.job_id)
        commands += self.actors.call("finish_job", {"job_id": process.job_id}, is_stubborn=True)
        return commands + self._maybe_left(process)

    def _workers_requested(self, source: Address, message: m.RequestWorkers, _now_s: float) -> Commands:
        if source.node_id != self.node_id:
            self._told.setdefault(source.node_id, ())
        origin = message.origin or source
        if origin.node_id == self.node_id and origin.process_id not in (*self.processes, self.node_id):
            return []  # it came home by way of another node, and its owner has ended meanwhile
        if self._fencing is not None and origin.process_id in self._fencing:
            return []  # from a worker that is being killed; to watch its driver would be said in a life that is over
        home, driver = message.job.owner.node_id, self.processes.get(message.job.owner.process_id)
        is_over = home == self.node_id if driver is None else driver.is_leaving
        if (is_over or message.job.owner in self._departing) and not message.job.detached:
            # Sent before its owner knew of the end: replacements for the workers that end with the job.
            return []
        if not message.job.detached:
            self.jobs.seen(message.job.owner, message.job.job_id)
        return list(self.scheduler.requested(source, message))

    def _maybe_left(self, process: Process) -> Commands:
        """Answer a leaving driver once its last worker, and all that it printed, has been heard."""
        if process.waits_for or self.scheduler.has_workers_of(process.address):
            return []
        return [e.Send(process.address, m.LeftNode())]

    def _end_job(self, source: Address, message: EndJob, _now_s: float) -> Commands:
        self._departing[message.owner] = source
        self.jobs.process_ended(message.owner)
        return [*self.scheduler.owner_ended(message.owner), *self._maybe_job_ended(message.owner, source)]

    def _maybe_job_ended(self, owner: Address, home: Address) -> Commands:
        if self.scheduler.has_workers_of(owner):
            return []
        self._departing.pop(owner, None)
        return [e.Send(home, JobEnded(owner))]

    def _job_ended(self, source: Address, message: JobEnded, _now_s: float) -> Commands:
        process = self.processes.get(message.owner.process_id)
        if process is None or source.node_id not in process.waits_for:
            return []
        process.waits_for.discard(source.node_id)
        return self._maybe_left(process)

    def _worker_ended(self, event: e.WorkerEnded, now_s: float) -> Commands:
        worker = self.scheduler.workers.get(event.process_id)
        if worker is None:
            return []
        text = worker.end_text or event.text
        commands = self._process_left(e.ProcessLeft(Address(self.node_id, event.process_id)), now_s)
        commands += self._tell_watchers(Address(self.node_id, event.process_id), text)
        commands += self.actors.worker_ended(worker, event.exit_code, text)
        commands += self.scheduler.worker_ended(event)
        self.environments.worker_ended(event.process_id)
        return commands + self._workers_gone(worker.job.job_id)

    def _watch(self, source: Address, message: m.WatchProcess, _now_s: float) -> Commands:
        if message.process_id not in self.processes:
            text = f"process {message.process_id} is not on node {self.node_id} any more"
            return [e.Send(source, m.ProcessEnded(Address(self.node_id, message.process_id), text))]
        self._watchers.setdefault(message.process_id, set()).add(source)
        return []

    def _remote_ended(self, _source: Address, message: m.ProcessEnded | m.Undeliverable, now_s: float) -> Commands:
        """A process of another node, whose leases or objects may be here, has ended; or a whole node is not there."""
        if message.address.is_node:
            node_id = message.address.node_id
            lost = [*self.objects.node_lost(node_id, now_s), *self._expect_no_answer(node_id)]
            for owner in self.scheduler.owners_on(node_id):  # what they have here came when the node had been lost
                lost += self.scheduler.owner_ended(owner) + self.objects.process_left(owner.process_id, now_s)
            return lost + self.coordination.handle(ce.NodeUnreachable(node_id), now_s)
        self.jobs.process_ended(message.address, is_known=isinstance(message, m.ProcessEnded))
        commands: Commands = list(self.scheduler.owner_ended(message.address))
        return commands + self.objects.process_left(message.address.process_id, now_s)

    # --- messages

    def _message_arrived(self, event: e.MessageArrived, now_s: float) -> Commands:
        handler = self._message_handlers.get(type(event.message))
        if handler is not None:
            return handler(event.source, event.message, now_s)
        if isinstance(event.message, CoordinationMessage):
            return self.coordination.handle(event, now_s)
        return self.objects.message(event.source, event.message, now_s) or []

    # --- the cluster

    def _time_passed(self, _event: e.TimePassed, now_s: float) -> Commands:
        commands = self.objects.time_passed(now_s) + self.actors.time_passed(now_s) + self.scheduler.time_passed(now_s)
        commands += self.coordination.handle(ce.TimeToLook(), now_s)
        if self._fencing is not None and self._fencing.isdisjoint(self.scheduler.workers):
            self._fencing = None
            commands += self._membership(ms.WorkEnded(), now_s)
        return commands + self._membership(ms.HeartbeatDue(self.load()), now_s)

    def _tell_load(self) -> Commands:
        """Who sends requests here hears of each change at once: by heartbeats alone it would pile them up."""
        scheduler = self.scheduler
        current = (len(scheduler.leases), len(scheduler.pending), *scheduler.pool.free.values())
        commands: Commands = []
        for node_id, told in self._told.items():
            if told != current:
                self._told[node_id] = current
                commands.append(e.Send(Address(node_id, node_id), LoadChanged(self.node_id, self.load())))
        return commands

    def _load_changed(self, _source: Address, message: LoadChanged, _now_s: float) -> Commands:
        if not self.membership.view.hear(message.node_id, message.load):
            return []
        return list(self.scheduler.peers_changed(candidate_of(view) for view in self._peers()))

    def load(self) -> NodeLoad:
        """What the node says about itself, with a heartbeat or in between."""
        stats = self.objects.store.stats()
        self._load_number += 1
        return NodeLoad(
            available=to_numbers(self.scheduler.pool.free),
            queue_length=sum(pending.count for pending in self.scheduler.pending),
            workers=len(self.scheduler.workers),
            leases=len(self.scheduler.leases),
            number=self._load_number,
            arena_used_bytes=stats.used_bytes,
            arena_size_bytes=stats.capacity_bytes,
            spilled_bytes=stats.spilled_bytes,
        )

    def _membership(self, event: Any, now_s: float) -> Commands:
        commands: Commands = []
        version, was_member = self.membership.view.version, self._is_member
        for command in self.membership.handle(event, now_s):
            if isinstance(command, (ms.NodeDied, ms.NodeLeft)):
                reason = command.reason if isinstance(command, ms.NodeDied) else "it left the cluster"
                commands += self._node_lost(command.node_id, reason, now_s)
            elif isinstance(command, ms.NodeJoined):
                node_id = command.view.node_id
                commands += [e.PeerJoined(node_id), *self.scheduler.peer_joined(node_id)]
            elif isinstance(command, ms.FenceSelf):
                commands += self._fenced(command.reason, now_s)
            elif isinstance(command, ms.ProbeNode):
                commands.append(e.Send(Address(command.node_id, command.node_id), AskAlive(command.incarnation)))
            elif isinstance(command, ms.RefuseSelf):
                commands.append(e.StopNode(command.reason))
            elif not isinstance(command, (ms.NodeSuspected, ms.NodeTrusted)):
                commands.append(command)
        if isinstance(event, (ms.Registered, ms.Restored)):
            # Until then others may have ended waits of this node's processes, as those of a dead one.
            commands += self.coordination.handle(ce.StoreChanged(), now_s)
        commands += self.actors.membership_heard(event, is_alone=self.is_embedded)
        if self.membership.view.version != version or self._is_member != was_member:
            commands += self.scheduler.peers_changed(candidate_of(view) for view in self._peers())
            commands += self.capacity.look()
        return commands

    def _asked_alive(self, source: Address, message: AskAlive, _now_s: float) -> Commands:
        membership = self.membership
        if membership.state is not ms.State.MEMBER or membership.incarnation != message.incarnation:
            return []
        return [e.Send(source, StillAlive(message.incarnation))]

    @property
    def _is_member(self) -> bool:
        return self.membership.state is ms.State.MEMBER

    def _peers(self) -> Iterable[NodeView]:
        # Whom we would pass a request on to drops what comes from a life that is over; the next has not begun yet.
        return self.membership.view.trusted_peers() if self._is_member else ()

    def _node_lost(self, node_id: str, reason: str, now_s: float) -> Commands:
        commands: Commands = [e.PeerLost(node_id, reason), *self.objects.node_lost(node_id, now_s)]
        self._told.pop(node_id, None)
        self.jobs.node_lost(node_id, is_known=self._is_member)
        if all(self.node_id <= view.node_id for view in self.membership.view):  # one node is enough for that
            commands += self.actors.reconcile_jobs(is_for_all=True)
        gone = ce.NodeGone(node_id, self.membership.ended_incarnation(node_id))
        commands += self.coordination.handle(gone, now_s) + self.actors.node_lost(node_id, reason)
        for owner in self.scheduler.owners_on(node_id):
            self._departing.pop(owner, None)
            commands += self.scheduler.owner_ended(owner)
            commands += self.objects.process_left(owner.process_id, now_s)
        for process_id, watchers in list(self._watchers.items()):
            self._watchers[process_id] = {watcher for watcher in watchers if watcher.node_id != node_id}
        commands += self.scheduler.peer_lost(node_id)
        lost = m.NodeLost(node_id, reason)
        commands += [e.Send(process.address, lost) for process in self.processes.values()]
        return commands + self._expect_no_answer(node_id)

    def _expect_no_answer(self, node_id: str) -> Commands:
        """A node is not there to say that it has ended a job."""
        commands: Commands = []
        for process in self.processes.values():
            if node_id in process.waits_for:
                process.waits_for.discard(node_id)
                commands += self._maybe_left(process)
        return commands

    def _fenced(self, reason: str, now_s: float) -> Commands:
        """The others take this node for dead: they have given up what it held for them, and it does the same."""
        commands: Commands = self.coordination.handle(ce.SelfFenced(), now_s)  # the others below are gone for us alone
        for view in list(self.membership.view):
            commands += self._node_lost(view.node_id, reason, now_s)
        commands += self.actors.fenced()
        commands += self.objects.fenced(set(self.processes))
        self._fencing = set(self.scheduler.workers)
        return commands + self.scheduler.end_all(f"its node was taken for dead: {reason}")

    def _stop(self, _source: Address, message: m.StopNode, _now_s: float) -> Commands:
        commands: Commands = []
        if message.all_nodes:
            others = [view.node_id for view in self.membership.view if view.node_id != self.node_id]
            commands = [e.Send(Address(node_id, node_id), m.StopNode(False)) for node_id in others]
        return [*commands, e.StopNode("it was told to by `clusterpool stop` or `clusterpool down`")]

    def _describe(self, source: Address, message: m.DescribeCluster, _now_s: float) -> Commands:
        nodes = [self._own_part()]
        for view in self.membership.view:
            if view.node_id != self.node_id:
                nodes.append(part_of(view))
        return [e.Send(source, m.ClusterDescribed(message.request, nodes))]

    def _own_part(self) -> m.NodePart:
        entry = NodeEntry(self.record, self.membership.incarnation, 0, 0.0, self.load())
        return msgspec.structs.replace(
            part_of(view_of_entry(entry, is_suspect=False)),
            is_head=self.is_head,
            details={
                **self.scheduler.counts_by_state(),
                **self.objects.counts_by_state(),
                **self.rejections.figures(),
                "is_member": float(self.membership.state is ms.State.MEMBER),
            },
        )
