"""A simulated node: the shell around its NodeMachine, as node/shell.py and its parts are in production."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from clusterpool.core import messages as m
from clusterpool.core import node_events as e
from clusterpool.core import store_messages as s
from clusterpool.core import transfer_messages as t
from clusterpool.core import wire
from clusterpool.core.cluster_view import NodeRecord
from clusterpool.core.coordination_events import CoordinationCommand
from clusterpool.core.membership import JoinRequested, LeaveRequested, NodeAbsent, NodeSought, State
from clusterpool.core.messages import Address, Message
from clusterpool.core.node import TICK_S, NodeMachine
from clusterpool.core.routes import Routes
from clusterpool.core.tunnel_messages import TunnelMessage
from clusterpool.simulation.arena import SimulatedArena, SimulatedDisk
from clusterpool.simulation.control_store import StoreClient
from clusterpool.simulation.coordination import NodeCoordination
from clusterpool.simulation.party import End, Host, Party
from clusterpool.simulation.worker import Worker

if TYPE_CHECKING:
    from clusterpool.simulation.world import World


class SimulatedNode(Party):
    """One node, with its zygote, arena and disk."""

    def __init__(
        self, world: World, host: Host, node_id: str, *, cpus: float, arena_bytes: int, disk_bytes: int
    ) -> None:
        super().__init__(world, host, node_id)
        self.node_id = node_id
        self.address = Address(node_id, node_id)
        self.arena = SimulatedArena(arena_bytes)
        self.disk = SimulatedDisk(disk_bytes)
        self.workers: dict[str, Worker] = {}
        self.connections: dict[str, End] = {}
        self._registered: dict[int, m.Hello] = {}
        self._posted: deque[Any] = deque()
        self._disk_busy_s = 0.0
        resources = {"CPU": cpus, f"node:{node_id}": 1.0}
        self.record = NodeRecord(node_id, "host", world.next_number(), "", resources, host_name=host.name)
        self.machine = NodeMachine(
            self.record,
            arena_bytes=arena_bytes,
            is_embedded=False,
            is_head=False,
            process_ids=self._worker_names(),
        )
        self.machine.membership.small_max = world.small_max
        self.routes = Routes(
            self, self.machine.membership, self._hand_back, self._posted.append,
            seek=lambda node_id: self._posted.append(NodeSought(node_id)),
        )  # fmt: skip
        self.store = StoreClient(self)
        self.coordination = NodeCoordination(self)
        world.fabric.parties[node_id] = self
        world.fabric.receivers[node_id] = self._frame_arrived

    def _worker_names(self) -> Iterator[str]:
        return (f"w{self.node_id[1:]}x{number}" for number in itertools.count(1))

    def open(self) -> None:
        """Join the cluster."""
        self.event(JoinRequested(self.record))
        self.store.start_feed()
        self.world.timeline.after(self.host.world_delay_s(TICK_S), self.act, self._tick)

    def _tick(self) -> None:
        self.world.timeline.after(self.host.world_delay_s(TICK_S), self.act, self._tick)
        self.event(e.TimePassed())
        self.routes.time_passed(self.now_s())
        self._read_posted()

    def leave(self) -> None:
        """End in good order."""
        for worker in list(self.workers.values()):
            worker.exit(-9, "host")
        self.event(LeaveRequested())
        self.vanish()

    # --- the machine

    def event(self, event: Any) -> None:
        """Put an event to the machine and carry out what it says."""
        self._handle(event)
        self._read_posted()

    def hear(self, event: Any) -> None:
        """An event that answers a command while the machine's commands are being carried out."""
        self._handle(event)

    def _handle(self, event: Any) -> None:
        commands = self.machine.handle(event, self.now_s())
        for command in commands:
            self._execute(command)
        self.world.monitor.node_stepped(self)

    def _read_posted(self) -> None:
        while self._posted and self.is_alive:
            posted = self._posted.popleft()
            if isinstance(posted, m.Relay):
                self._relay(posted)
            else:
                self._handle(posted)

    def _execute(self, command: Any) -> None:
        if isinstance(command, e.Send):
            self._send(command.destination, command.message)
        elif isinstance(command, e.PeerJoined):
            self.routes.joined(command.node_id)
        elif isinstance(command, NodeAbsent):
            self.routes.absent(command.node_id)
        elif isinstance(command, e.ForkWorker):
            self._fork(command)
        elif isinstance(command, e.EndWorker):
            self._end_worker(command)
        elif isinstance(command, e.ReservePages):
            self._handle(self._reserve(command))
        elif isinstance(command, e.StopNode):
            self.note("stop", command.text)
            self.after(0.0, self.leave)
        elif isinstance(command, e.PeerLost):
            self.routes.lost(command.node_id)
            self.store.way.lost(command.node_id)
            if self.machine.membership.has_ended(command.node_id):  # else it is we who have lost all others
                self.world.evidence.told_of_death(command.node_id, self.name)
        elif isinstance(command, CoordinationCommand):
            self.coordination.take(command)
        elif isinstance(command, e.Warn):
            self.note("warn", command.text)
        elif isinstance(command, e.RemoveJob):
            pass
        elif not self._take(command):
            self.store.put(command)

    def tell(self, command: e.Send) -> None:
        """Send what is not the machine's."""
        self._send(command.destination, command.message)

    # --- processes of this host

    def accept(self, end: End) -> None:
        """A process has connected."""
        end.incoming.on_message = lambda message: self._heard(end, message)
        end.incoming.on_end = lambda: self._disconnected(end)

    def _heard(self, end: End, message: Message) -> None:
        if isinstance(message, m.Hello):
            end.peer = message.address
            self._registered[end.number] = message
            self.connections[message.address.process_id] = end
            return
        assert end.peer is not None, "a message came before the greeting"
        if isinstance(message, m.Relay):
            self._relay(message)
        elif isinstance(message, m.RegisterProcess):
            hello = self._registered[end.number]
            end.send(m.Registered(self.node_id, "c", self.host.name, "", self.arena.size_bytes, "", 1.0))
            self.note("joined", hello)
            self.event(e.ProcessJoined(hello.address, hello.kind, hello.pid, message.job, False))
        else:
            self.note(type(message).__name__, (end.peer, message))
            self.event(e.MessageArrived(end.peer, message))

    def _disconnected(self, end: End) -> None:
        end.close()
        hello = self._registered.pop(end.number, None)
        if hello is not None and self.connections.get(hello.address.process_id) is end:
            del self.connections[hello.address.process_id]
            self.note("left", hello.address)
            self.event(e.ProcessLeft(hello.address))

    # --- messages

    def _send(self, destination: Address, message: Message) -> None:
        if destination.node_id != self.node_id:
            self._send_to_node(m.Relay(destination, self.address, wire.encode(message)))
        elif destination.process_id == self.node_id:
            self._posted.append(e.MessageArrived(self.address, message))
        else:
            end = self.connections.get(destination.process_id)
            if end is not None:
                end.send(message)

    def _relay(self, relay: m.Relay) -> None:
        destination = relay.destination
        if destination.node_id != self.node_id:
            self._send_to_node(relay)
        elif destination.process_id == self.node_id:
            message = wire.decode(relay.body)
            if isinstance(message, TunnelMessage):
                self.store.way.arrived(relay.source.node_id, message)
                return
            self.note(type(message).__name__, (relay.source, message))
            self.event(e.MessageArrived(relay.source, message))
        else:
            end = self.connections.get(destination.process_id)
            if end is not None:
                end.send(relay)
            elif relay.source != self.address:
                self._tell_unsent(relay)
                self._send(relay.source, m.Undeliverable(destination))

    def _tell_unsent(self, relay: m.Relay) -> None:
        unsent = wire.unsent_tasks(relay.destination, relay.body)
        if unsent is not None:
            self._send(relay.source, unsent)

    def _send_to_node(self, relay: m.Relay) -> None:
        self.routes.send(relay, self.now_s())

    def _hand_back(self, relay: m.Relay) -> None:
        if relay.source.node_id != self.node_id:
            return
        if relay.source == self.address:
            self.store.way.lost(relay.destination.node_id)
            self._posted.append(e.MessageArrived(self.address, m.Undeliverable(relay.destination)))
        else:
            self._tell_unsent(relay)
            self._send(relay.source, m.Undeliverable(relay.destination))

    def send(self, node_id: str, address: tuple[str, int], frame: bytes) -> None:
        """Of `Routes`: a frame to another node."""
        self.world.fabric.send(self.node_id, node_id, frame)

    def forget(self, node_id: str) -> None:
        """Of `Routes`: drop what has not left."""
        self.world.fabric.forget(self.node_id, node_id)

    def _frame_arrived(self, node_id: str, frame: bytes) -> None:
        message = wire.decode(frame)
        assert isinstance(message, m.Relay)
        if self.routes.arrived(node_id, message, self.now_s()):
            self._relay(message)
        self._read_posted()

    # --- workers

    def _fork(self, command: e.ForkWorker) -> None:
        world = self.world
        if world.chance.fork_fails():
            self.after(world.chance.fork_s(), self.event, e.ForkFailed(command.process_id, "no more processes"))
            return
        address = Address(self.node_id, command.process_id)
        worker = Worker(world, self.host, address, command.job, self)
        self.workers[command.process_id] = worker
        world.clients[command.process_id] = worker
        worker.after(world.chance.fork_s(), worker.begin)

    def _end_worker(self, command: e.EndWorker) -> None:
        worker = self.workers.get(command.process_id)
        if worker is not None:
            self.note("kill", command)
            # A stopped process is killed all the same by SIGKILL.
            self.world.timeline.after(
                self.world.latencies.local_s(1.0), worker.exit, -command.signal, self._why_ended(command.process_id)
            )

    def _why_ended(self, process_id: str) -> str:
        """As in evidence.py."""
        if self.machine.membership.state is State.FENCED:
            return "fenced"
        worker = self.machine.scheduler.workers.get(process_id)
        if worker is None or worker.lease is None or worker.end_text != "its owner has ended":
            return "asked"
        return "orphaned" if self.world.evidence.has_ended_by_fault(worker.lease.origin) else "asked"

    def worker_is_gone(self, worker: Worker) -> None:
        """The zygote has waited for a worker."""
        self.after(self.world.latencies.local_s(1.0), self._worker_ended, worker)

    def _worker_ended(self, worker: Worker) -> None:
        process_id = worker.address.process_id
        if self.workers.pop(process_id, None) is None:
            return
        # Results that it had sent must arrive before the news of its end.
        end = self.connections.get(process_id)
        if end is not None:
            end.incoming.drain()
        text = f"worker {process_id} on node {self.node_id} ended with {worker.exit_code}"
        self.note("ended", (process_id, worker.exit_code, worker.task_page))
        self.event(e.WorkerEnded(process_id, worker.exit_code or 0, text, worker.last_task()))

    def crash(self) -> None:
        """The whole host is gone, or the node by kill -9 with what hangs on it; nobody is told."""
        for worker in list(self.workers.values()):
            worker.exit_code, worker.cause = -9, "host"
            worker.vanish()
        self.workers.clear()
        self.vanish()

    def vanish(self) -> None:
        """It is no more."""
        if self.is_alive:
            super().vanish()
            self.world.fabric.parties.pop(self.node_id, None)

    # --- the arena and the disk

    def _reserve(self, command: e.ReservePages) -> Any:
        if command.offset + command.size_bytes > self.arena.page_bytes_max:
            return s.ArenaExhausted(command.object_id, self.arena.page_bytes_max)
        return e.PagesReserved(command.client, command.request, command.object_id, command.offset, command.size_bytes)

    def _take(self, command: Any) -> bool:
        if isinstance(command, t.WriteChunk):
            self.arena.write(command.arena_offset, command.chunk)
        elif isinstance(command, t.ReadChunk):
            chunk = self.arena.read(command.arena_offset, command.size_bytes)
            data = t.ChunkData(command.transfer, command.offset, chunk)
            self._send(Address(command.node_id, command.node_id), data)
        elif isinstance(command, s.RestoreObject):
            if command.offset + command.size_bytes > self.arena.page_bytes_max:
                self._posted.append(s.ArenaExhausted(command.object_id, self.arena.page_bytes_max))
            else:
                self._to_disk(self._restore, command)
        elif isinstance(command, s.SpillObject):
            self._to_disk(self._spill, command)
        elif isinstance(command, s.DeleteSpilled):
            self._to_disk(self._delete, command)
        else:
            return False
        return True

    def _to_disk(self, action: Any, command: Any) -> None:
        """The disk's thread does one thing after the other."""
        now_s = self.world.timeline.now_s
        self._disk_busy_s = max(self._disk_busy_s, now_s) + self.world.chance.disk_s()
        self.world.timeline.at(self._disk_busy_s, self.act, action, command)

    def _spill(self, command: s.SpillObject) -> None:
        content = self.arena.read(command.offset, command.size_bytes)
        if self.disk.write(command.object_id, content):
            self.event(s.ObjectSpilled(command.object_id))
        else:
            self.event(s.SpillFailed(command.object_id, "no space left on device"))

    def _restore(self, command: s.RestoreObject) -> None:
        content = self.disk.read(command.object_id)
        if content is None:
            self.event(s.RestoreFailed(command.object_id, "input/output error"))
        else:
            self.arena.write(command.offset, content)
            self.event(s.ObjectRestored(command.object_id))

    def _delete(self, command: s.DeleteSpilled) -> None:
        with contextlib.suppress(KeyError):
            del self.disk.files[command.object_id]
