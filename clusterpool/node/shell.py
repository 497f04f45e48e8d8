"""The node's loop: one thread that carries messages between its processes, its machine, and the outside.

drivers, workers --unix sockets--+              +--> zygote (forks, ends workers)
other nodes ------zmq, TCP-------+-- NodeMachine+--> arena, disk thread (spill)
zygote, log pipes, threads ------+              +--> control-store thread
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import select
import signal
import socket
from collections import deque
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import msgspec

from clusterpool import ids
from clusterpool.core import messages as m
from clusterpool.core import node_events as e
from clusterpool.core import package_messages as p
from clusterpool.core import wire
from clusterpool.core.cluster_view import NodeRecord, NodeView
from clusterpool.core.coordination_events import CoordinationCommand
from clusterpool.core.environments import DropPackage, FetchPackage
from clusterpool.core.joining import RegistrationRefused, mismatch
from clusterpool.core.late_start import LateStart
from clusterpool.core.membership import JoinRequested, LeaveRequested, NodeAbsent, NodeSought
from clusterpool.core.messages import Address, Message
from clusterpool.core.node import TICK_S, NodeMachine
from clusterpool.core.rejections import greeting_fault
from clusterpool.core.routes import Routes
from clusterpool.errors import ProtocolError
from clusterpool.node.coordination import NodeCoordination
from clusterpool.node.cpu_time import unused_cpu_s
from clusterpool.node.descriptors import Descriptors
from clusterpool.node.disk import DiskThread
from clusterpool.node.log_lines import LogLineSender
from clusterpool.node.memory import MemoryWatch
from clusterpool.node.packages import PackageThread
from clusterpool.node.store_route import RELAY_NAME
from clusterpool.node.store_thread import StoreThread
from clusterpool.node.tunnels import OnAnswer
from clusterpool.node.workers import WorkerProcesses
from clusterpool.object_store.arena import Arena
from clusterpool.processes.death import open_pidfd
from clusterpool.processes.launch import NodeStart
from clusterpool.processes.zygote import Zygote
from clusterpool.transport import stream
from clusterpool.version import __version__

logger = logging.getLogger(__name__)


class NodeShell:
    """A running node. `open` it, then `run` until it is told to stop."""

    def __init__(self, start: NodeStart, zygote: Zygote) -> None:
        self.start = start
        self.config = start.config
        self.node_id = self.config.node_id
        self.address = Address(self.node_id, self.node_id)
        self.paths = self.config.paths
        self.epoll = select.epoll()
        self.connections: dict[str, stream.Connection] = {}  # by process id
        self._by_fd: dict[int, Callable[[int], None]] = {}
        self._posted: deque[Any] = deque()
        self._post_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_stopping = False
        self._end_text = ""
        self._is_reported = False  # to the launcher: a node of a cluster is ready once it is a member
        self._ready_facts: dict[str, Any] = {}
        self._last_tick_s = monotonic()
        self._store_start = LateStart(monotonic())
        self.host = socket.gethostname()
        self.workers = WorkerProcesses(self, zygote)
        self.memory = MemoryWatch(self)
        self.log_lines = LogLineSender(self)
        self.store = StoreThread(
            self.config,
            self.post,
            open_tunnel=self._open_tunnel_to_store if self.config.listen_port is not None else None,
        )
        self.packages = PackageThread(self.paths.folder / "packages", self.post, self.store.connect_another)
        self.descriptors = Descriptors(self)
        self.coordination = NodeCoordination(self)
        self.peers: Any = None
        self.routes: Routes | None = None
        self._have_peers_changed = False  # since the thread of the store was told of them

    def open(self) -> None:
        """Listen, make the arena, and tell the launcher that the node is ready."""
        config, paths = self.config, self.paths
        for folder in (paths.process_sockets_folder, paths.logs_folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.arena = Arena.create(paths.arena_file.name, config.object_store_bytes, fallback_folder=paths.folder)
        self.disk = DiskThread(config, self.arena, self.post)
        port = 0
        if config.listen_port is not None:
            from clusterpool.node.cluster_keys import ClusterKeys
            from clusterpool.node.peers import Peers

            keys = ClusterKeys.read(config.keys_file or "")
            self.peers = Peers(self.node_id, keys, host=config.listen_host, port=config.listen_port)
            port = self.peers.port
            self.watch(self.peers.fileno(), lambda _: self._peers_ready())
            self.watch(self.peers.refusals_fileno(), lambda _: self._peers_refused())
        self.record = self._make_record(port)
        self.machine = NodeMachine(
            self.record,
            arena_bytes=self.arena.capacity_bytes,
            is_embedded=config.is_embedded,
            driver_pid=config.driver_pid,
            is_head=config.is_head,
            process_ids=_worker_ids(),
            memory_threshold=config.memory_threshold,
        )
        if self.peers is not None:
            self.routes = Routes(
                self.peers, self.machine.membership, self._hand_back, self.post,
                seek=lambda node_id: self.post(NodeSought(node_id)),
                refuse=lambda text: self.reject("another life", text),
            )  # fmt: skip
        self._listener = stream.listen(paths.node_socket)
        self.watch(self._listener.fileno(), lambda _: self._accept())
        self.watch(self._post_fd, lambda _: self._read_posted())
        self.workers.open()
        self.descriptors.open()
        self.coordination.open()
        if self.routes is not None:
            self.store.start_relay(self.paths.folder / "l")
        self._watch_driver()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.post(e.StopNode("it got a signal to end")))
        self.execute(self.machine.handle(JoinRequested(self.record), monotonic()))
        if not config.is_embedded:
            self.store.start()
        self._ready_facts = {
            "port": port, "node_socket": str(paths.node_socket), "arena_bytes": self.arena.capacity_bytes
        }  # fmt: skip
        if config.is_embedded:
            self._report_ready()

    def _report_ready(self) -> None:
        if not self._is_reported:
            self._is_reported = True
            self.start.report_ready(**self._ready_facts)

    def _make_record(self, port: int) -> NodeRecord:
        config = self.config
        resources = {"CPU": config.num_cpus, "memory": config.memory_bytes, **config.resources}
        if config.num_gpus:
            resources["GPU"] = config.num_gpus
        resources[f"node:{self.node_id}"] = 1.0
        labels = dict(config.labels)
        if config.is_head:
            labels["head"] = "yes"
        return NodeRecord(
            node_id=self.node_id,
            host=config.listen_host,
            port=port,
            public_key="",
            resources=resources,
            labels=labels,
            host_name=self.host,
            pid=os.getpid(),
            session_folder=config.session_folder,
            python_version=platform.python_version(),
            clusterpool_version=__version__,
        )

    def _watch_driver(self) -> None:
        if self.config.driver_pid is None:
            return
        try:
            pidfd = open_pidfd(self.config.driver_pid)
        except OSError:
            self.post(e.StopNode("its driver has ended"))
            return
        self.watch(pidfd, lambda _: self.stop("its driver has ended"))

    # --- the loop

    def watch(self, fd: int, on_ready: Callable[[int], None]) -> None:
        """Call `on_ready(epoll mask)` whenever there is something to read."""
        self._by_fd[fd] = on_ready
        self.epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """Forget a descriptor; call it before closing."""
        self._by_fd.pop(fd, None)
        with contextlib.suppress(OSError, ValueError):
            self.epoll.unregister(fd)

    def post(self, event: Any) -> None:
        """Have the loop handle an event; from any thread."""
        self._posted.append(event)
        with contextlib.suppress(OSError):
            os.eventfd_write(self._post_fd, 1)

    def handle(self, event: Any) -> None:
        """Put an event to the machine and carry out what it says."""
        self.execute(self.machine.handle(event, monotonic()))

    def run(self) -> int:
        """Turn the loop until the node stops; the exit code."""
        try:
            while not self._is_stopping:
                wait_s = max(0.0, min(self._last_tick_s + TICK_S, self.memory.due_s) - monotonic())
                for fd, mask in self.epoll.poll(wait_s):
                    on_ready = self._by_fd.get(fd)
                    if on_ready is not None:
                        on_ready(mask)
                now_s = monotonic()
                self.memory.look(now_s)
                if now_s - self._last_tick_s >= TICK_S:
                    self._last_tick_s = now_s
                    self.handle(e.TimePassed())
                    self.log_lines.time_passed(now_s)
                    self.workers.time_passed()
                    if self.routes is not None:
                        self.routes.time_passed(now_s)
                    if self._have_peers_changed:
                        self._tell_store()
                    if not self.store.is_started and self._store_start.is_due(unused_cpu_s(), now_s):
                        self.store.start()
        finally:
            self._close()
        return 0

    def stop(self, text: str) -> None:
        """End the loop after this turn."""
        logger.info("node %s: stopping (%s)", self.node_id, text)
        self._is_stopping = True
        self._end_text = text

    def _close(self) -> None:
        self.workers.close()
        if self.store.route is not None:
            self.store.route.stop()
        if not self.config.is_embedded:
            # The others need not wait until our silence is noticed.
            self.execute(self.machine.handle(LeaveRequested(), monotonic()))
        self.packages.stop()
        self.coordination.close()
        self.descriptors.close()
        self.store.stop()
        self.disk.stop()
        for connection in self.connections.values():
            connection.close()
        if self.peers is not None:
            self.peers.close()
        self._listener.close()
        self.arena.unlink()
        self.start.remove_files()
        if not self._is_reported:
            # Last: whoever hears of it ends this process, which had to leave the cluster and to clean up before.
            self._is_reported = True
            self.start.report_failure(self._end_text)

    def _read_posted(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._post_fd)
        while self._posted:
            event = self._posted.popleft()
            if isinstance(event, e.StopNode):
                self.stop(event.text)
            elif callable(event):  # what another thread wants this one to do
                event()
            elif isinstance(event, m.Relay):  # of another node; it had come early
                self._relay_of_peer(event)
            else:
                self.handle(event)
        if not self._is_reported and self.machine.membership.is_settled:
            self._report_ready()

    # --- processes of this host

    def _accept(self) -> None:
        for connection in stream.accept(self._listener):
            fd = connection.fileno()
            self.watch(fd, lambda mask, connection=connection: self._connection_ready(connection, mask))  # type: ignore[misc]
            connection.send(self._hello())

    def _hello(self) -> m.Hello:
        python_version = platform.python_version()
        return m.Hello(m.PROTOCOL_VERSION, self.address, "node", os.getpid(), "", python_version, __version__)

    def _connection_ready(self, connection: stream.Connection, mask: int) -> None:
        if mask & select.EPOLLOUT and connection.has_unsent:
            connection.flush()
            if not connection.has_unsent:
                self.epoll.modify(connection.fileno(), select.EPOLLIN)
        if mask & ~select.EPOLLOUT:
            self.receive(connection)

    def receive(self, connection: stream.Connection) -> bool:
        """Handle what a process has sent; whether there may be more."""
        frames: list[bytes] = []
        is_rubbish = False
        try:
            frames, ended = connection.receive()
            for frame in frames:
                self._arrived(connection, wire.decode(frame))
        except (msgspec.MsgspecError, ProtocolError) as exc:
            who = connection.peer.address if isinstance(connection.peer, m.Hello) else "a stranger"
            self.reject("a process", f"dropped the connection of {who}, which sent no message of ours: {exc}")
            ended = is_rubbish = True
        if ended and not is_rubbish and connection.is_mid_frame:
            self.reject("a message cut short", f"dropped the beginning of a message: {connection.peer} ended in it")
        if ended:
            self._disconnected(connection, is_rubbish)
        return bool(frames) and not ended

    def reject(self, cause: str, text: str) -> None:
        """Count what is none of ours, and log it if it is the first of its kind."""
        self.handle(e.FrameRejected(cause, f"node {self.node_id}: {text}"))

    def drain(self, process_id: str) -> None:
        """A process has ended: handle all that it had sent, before its end is reported."""
        connection = self.connections.get(process_id)
        # To the end of what is there, not of the stream: a child of the worker may hold the socket open.
        while connection is not None and not connection.is_closed and self.receive(connection):
            pass

    def _arrived(self, connection: stream.Connection, message: Message) -> None:
        kind = type(message)
        if kind is m.Hello:
            self._greeted(connection, message)  # type: ignore[arg-type]
        elif connection.peer is None:
            raise ProtocolError("a message came before the greeting")
        elif kind is m.Relay:
            if message.source != connection.peer.address:  # type: ignore[attr-defined]
                raise ProtocolError(f"a message in the name of {message.source}")  # type: ignore[attr-defined]
            self._relay(message)  # type: ignore[arg-type]
        elif kind is m.RegisterProcess:
            self._registered(connection, message)  # type: ignore[arg-type]
        elif kind is p.OfferPackage or kind is p.SendPackage:
            self.packages.message(connection.peer.address, message)  # type: ignore[attr-defined, arg-type]
            self.store.start()
        else:
            self.handle(e.MessageArrived(connection.peer.address, message))  # type: ignore[attr-defined]

    def _greeted(self, connection: stream.Connection, hello: m.Hello) -> None:
        reason = mismatch(self._hello(), hello)
        if reason:
            connection.send(RegistrationRefused(reason))
            raise ProtocolError(reason)
        is_taken = hello.address.process_id in self.connections or connection.peer is not None
        fault = greeting_fault(self.address, hello.address, None, is_taken=is_taken)
        if fault:
            raise ProtocolError(fault)
        connection.frame_bytes_max = stream.FRAME_BYTES_MAX
        connection.peer = hello
        self.connections[hello.address.process_id] = connection

    def _registered(self, connection: stream.Connection, message: m.RegisterProcess) -> None:
        hello = connection.peer
        assert isinstance(hello, m.Hello)
        fault = self.machine.registration_fault(hello.address, hello.kind)
        if fault:
            raise ProtocolError(fault)
        total = self.machine.membership.view.total().get("CPU", 0.0)
        answer = m.Registered(
            self.node_id, self.config.cluster_id, self.host, str(self.arena.path), self.arena.capacity_bytes,
            str(self.paths.process_sockets_folder), max(total, self.config.num_cpus),
            str(self.config.spill_path),
        )  # fmt: skip
        connection.send(answer)
        self.handle(e.ProcessJoined(hello.address, hello.kind, hello.pid, message.job, message.wants_logs))

    def _disconnected(self, connection: stream.Connection, sent_rubbish: bool) -> None:
        self.unwatch(connection.fileno())
        connection.close()
        hello = connection.peer
        if isinstance(hello, m.Hello) and self.connections.get(hello.address.process_id) is connection:
            del self.connections[hello.address.process_id]
            self.packages.forget(hello.address)
            if hello.kind == "driver":  # it may have been killed
                self.paths.process_socket(hello.address.process_id).unlink(missing_ok=True)
            self.handle(e.ProcessLeft(hello.address, sent_rubbish))

    # --- sending

    def send(self, destination: Address, message: Message) -> None:
        """Send a message to a process anywhere."""
        if destination.node_id == self.node_id:
            if destination.process_id == self.node_id:
                self.post(e.MessageArrived(self.address, message))
                return
            connection = self.connections.get(destination.process_id)
            if connection is not None:
                connection.send(message)
                self._watch_output(connection)
            return
        self._send_to_node(m.Relay(destination, self.address, wire.encode(message)))

    def _watch_output(self, connection: stream.Connection) -> None:
        if connection.has_unsent:
            with contextlib.suppress(OSError, ValueError):
                self.epoll.modify(connection.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _relay(self, relay: m.Relay) -> None:
        destination = relay.destination
        if destination.node_id != self.node_id:
            self._send_to_node(relay)
        elif destination.process_id == self.node_id:
            message = wire.decode(relay.body)
            if not self.descriptors.tunnels.take(relay.source.node_id, message):
                self.handle(e.MessageArrived(relay.source, message))
        else:
            connection = self.connections.get(destination.process_id)
            if connection is not None and connection.has_unsent and self.log_lines.holds_back(relay):
                pass
            elif connection is not None and connection.send(relay):
                self._watch_output(connection)
            elif relay.source != self.address:
                self._tell_unsent(relay)
                if connection is None:  # else there may be results in it that we have not read yet
                    self.send(relay.source, m.Undeliverable(destination))

    def _tell_unsent(self, relay: m.Relay) -> None:
        unsent = wire.unsent_tasks(relay.destination, relay.body)
        if unsent is not None:
            self.send(relay.source, unsent)

    def _send_to_node(self, relay: m.Relay) -> None:
        if self.routes is None:
            self._hand_back(relay)
        else:
            self.routes.send(relay, monotonic())

    def _hand_back(self, relay: m.Relay) -> None:
        """Tell the sender; by the queue, since the machine may be in the middle of its commands."""
        if relay.source.node_id != self.node_id:
            logger.debug("dropped a message of %s: node %s is gone", relay.source, relay.destination.node_id)
        elif relay.source == self.address:
            self.descriptors.tunnels.node_gone(relay.destination.node_id)
            self.post(e.MessageArrived(self.address, m.Undeliverable(relay.destination)))
        else:
            self._tell_unsent(relay)
            self.send(relay.source, m.Undeliverable(relay.destination))

    def _peers_ready(self) -> None:
        assert self.routes is not None
        for node_id, frame in self.peers.receive():
            self._read_posted()  # what had come early goes ahead
            try:
                message = wire.decode(frame)
                if not isinstance(message, m.Relay):
                    raise ProtocolError("nodes exchange relays only")
                if self.routes.arrived(node_id, message, monotonic()):
                    self._relay_of_peer(message)
            except (msgspec.MsgspecError, ProtocolError) as exc:
                self.reject("another node", f"dropped a frame of node {node_id!r}: {exc}")

    def _relay_of_peer(self, relay: m.Relay) -> None:
        try:
            self._relay(relay)
        except (msgspec.MsgspecError, ProtocolError) as exc:
            self.reject("another node", f"dropped a frame of node {relay.source.node_id!r}: {exc}")

    def _peers_refused(self) -> None:
        for text in self.peers.refusals():
            self.reject(
                f"connection that {text}", f"refused a connection to port {self.peers.port}: whoever it is {text}"
            )

    # --- commands

    def execute(self, commands: list[Any]) -> None:
        """Carry out what the machine said, in order."""
        for command in commands:
            if isinstance(command, e.Send):
                self.send(command.destination, command.message)
            elif isinstance(command, e.ForkWorker):
                self.workers.fork(command)
            elif isinstance(command, e.EndWorker):
                self.workers.end(command)
            elif isinstance(command, e.ReservePages):
                self.handle(self.disk.reserve(command))
            elif isinstance(command, (FetchPackage, DropPackage)):
                self.packages.take(command)
                self.store.start()
            elif isinstance(command, (e.ReadMemory, e.WarnOfMemory)):
                self.memory.take(command)
            elif isinstance(command, e.StopNode):
                self.stop(command.text)
            elif isinstance(command, e.Warn):
                logger.warning("%s (the next ones are counted only: `clusterpool status --json`)", command.text)
            elif isinstance(command, CoordinationCommand):
                self.coordination.take(command)
            elif isinstance(command, e.RemoveJob):
                self.descriptors.job_ended(command.job_id)
            elif isinstance(command, (e.PeerJoined, e.PeerLost, NodeAbsent)):
                self._peer_changed(command)
            elif not self.disk.take(command, self.send):
                self.store.put(command)
                # That a job begins or ends is no reason to start the control store of an embedded cluster.
                if isinstance(command, e.CallStore) and command.operation not in ("register_job", "finish_job"):
                    self.store.start()

    def _peer_changed(self, command: e.PeerJoined | e.PeerLost | NodeAbsent) -> None:
        if self.routes is None:
            return
        if isinstance(command, NodeAbsent):
            self.routes.absent(command.node_id)
            return
        if isinstance(command, e.PeerJoined):
            logger.info("node %s: node %s has joined", self.node_id, command.node_id)
            self.routes.joined(command.node_id)
        else:
            logger.warning("node %s: node %s is gone: %s", self.node_id, command.node_id, command.text)
            self.routes.lost(command.node_id)
            self.log_lines.forget(command.node_id)
            self.descriptors.tunnels.node_gone(command.node_id)
        self._have_peers_changed = True

    def _tell_store(self) -> None:
        """Whom there is. Not at each join: a thousand nodes may join at once."""
        self._have_peers_changed = False
        self.store.nodes_count = len(self.machine.membership.view)
        if self.store.route is not None:
            peers = self.machine.membership.view.trusted_peers()
            # The head is likely to be where the store is.
            self.store.route.set_peers([view.node_id for view in sorted(peers, key=_is_no_head)])

    def _open_tunnel_to_store(self, node_id: str, on_answer: OnAnswer) -> None:
        """Called by threads that use the control store."""
        self.post(lambda: self.descriptors.tunnels.open(node_id, "connect", RELAY_NAME, on_answer))


def _is_no_head(view: NodeView) -> bool:
    return view.labels.get("head") != "yes"


def _worker_ids() -> Iterator[str]:
    while True:
        yield ids.new_process_id("w")
