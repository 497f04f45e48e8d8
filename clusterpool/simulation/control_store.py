"""The control store of a simulated cluster: one server with its outages, and each node's client of it.

    up --crash--> down --restart--> up, perhaps without what it took in since its last fsync
    up --pause--> paused --resume--> up, after it has carried out what had arrived meanwhile

The client does what node/store_thread.py does: one call at a time, in order, and a feed of the changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clusterpool.control_store.actor_registry import ActorRegistry
from clusterpool.control_store.job_registry import reconcile_jobs
from clusterpool.control_store.membership_calls import MembershipCalls, feed_events, feed_pause_s, node_event
from clusterpool.control_store.port import Event, EventsLost
from clusterpool.control_store.records import JobRecord, encode_record
from clusterpool.core import membership as ms
from clusterpool.core import messages as m
from clusterpool.core import node_events as e
from clusterpool.errors import ClusterpoolError, NotConnected
from clusterpool.simulation.fake_actors import Made
from clusterpool.simulation.fake_control_store import FakeControlStore
from clusterpool.simulation.fake_coordination import FakeCoordination, FakeCoordinationClient
from clusterpool.simulation.relays import NoAnswer, StoreWay

if TYPE_CHECKING:
    from clusterpool.simulation.node import SimulatedNode
    from clusterpool.simulation.world import World

CALL_TIMEOUT_S = 2.5
RETRY_S = 0.5
CALL_RETRIES_S = 30.0
FSYNC_PERIOD_S = 1.0
_STATE = (
    "_events", "_event_number", "_generation", "_generation_by_node", "_incarnation", "_entry_by_node",
    "_registration_by_node",
    "_record_by_job", "_actor_by_id", "_made",
)  # fmt: skip

Answer = Callable[[Any, BaseException | None], None]


class StoreServer:
    """The server."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.fake = FakeControlStore(lambda: world.timeline.now_s)
        self.fake.on_death = world.evidence.taken_for_dead
        self.coordination = FakeCoordination()
        self.coordination.on_write = world.locks.written
        self.coordination.on_taken = world.tokens.given
        self.is_down = False
        self.is_paused = False
        self.life = 0  # another number is another server: readers of its events have lost some
        self.relayed: dict[int, Any] = {}  # operations that nodes pass on for others, then what came of them
        self._waiting: deque[Callable[[], None]] = deque()
        self._kept: dict[str, Any] = {}
        self._kept_coordination = self.coordination.state()
        self._feeds: list[Callable[[], None]] = []
        self._grant_readers: list[Callable[[], None]] = []
        self._told_event = 0
        self._read_events: dict[int, tuple[Event, ms.NodeEventRead]] = {}
        self._keep()

    def call(self, operation: Callable[[FakeControlStore], Any], answer: Answer) -> None:
        """Carry out an operation, when the server does; raises nothing, answers always but while it is down."""
        if self.is_down:
            answer(None, NotConnected("the control store refuses connections"))
        elif self.is_paused:
            self._waiting.append(lambda: self._carry_out(operation, answer))
        else:
            self._carry_out(operation, answer)

    def _carry_out(self, operation: Callable[[FakeControlStore], Any], answer: Answer) -> None:
        try:
            value = operation(self.fake)
        except ClusterpoolError as exc:
            answer(None, exc)
        else:
            answer(value, None)
        number = self.fake._event_number
        if number != self._told_event:
            self._told_event = number
            for feed in self._feeds:
                feed()

    def node_event(self, event: Event) -> ms.NodeEventRead:
        """What an event about a node means: decoded once for all nodes that read it."""
        known = self._read_events.get(event.id)
        if known is None or known[0] is not event:
            known = self._read_events[event.id] = (event, node_event(event))
        return known[1]

    def coordinated(self, client: FakeCoordinationClient, operation: str, arguments: tuple[Any, ...]) -> Any:
        """An operation on semaphores, channels and cells; to be called where another operation of the server is."""
        shared = self.coordination
        shared.incarnations = {node_id: entry.incarnation for node_id, entry in self.fake._entry_by_node.items()}
        count = shared.grants_count
        value = getattr(client, operation)(*arguments)
        if shared.grants_count != count:
            for reader in self._grant_readers:
                reader()
        return value

    def follow_grants(self, reader: Callable[[], None]) -> None:
        """Have `reader` called when tokens were handed out to those who waited."""
        self._grant_readers.append(reader)

    def follow(self, feed: Callable[[], None]) -> None:
        """Have `feed` called when there are new events."""
        self._feeds.append(feed)

    def _keep(self) -> None:
        if not self.is_down:
            self._kept = {name: _copied(getattr(self.fake, name)) for name in _STATE}
            if self._world.has_store_outages:
                self._kept_coordination = self.coordination.state()
        if self._world.has_store_outages:
            self._world.timeline.after(FSYNC_PERIOD_S, self._keep)

    # --- faults

    def crash(self) -> None:
        """It is killed."""
        self.is_down = True
        self._waiting.clear()

    def restart(self, *, loses: str) -> None:
        """It is back, without `"nothing"`, what came since the last `"fsync"`, or `"everything"`."""
        self.is_down = self.is_paused = False
        self.life += 1
        before = self._facts()
        state = self.coordination.state()
        if loses == "everything":
            self.fake.lose_everything()
            state = FakeCoordination().state()
        elif loses == "fsync":
            for name, value in self._kept.items():
                setattr(self.fake, name, _copied(value))
            state = self._kept_coordination
        self.coordination.restarted(state, round(self._world.timeline.now_s * (1 << 20)))
        self._world.evidence.forgotten(before, self._facts())
        self._told_event = -1

    def _facts(self) -> dict[str, str]:
        """What it knows of each carrier and each actor."""
        fake = self.fake
        facts = {actor_id: f"{fake._actor_by_id.get(actor_id)} {vars(made)}" for actor_id, made in fake._made.items()}
        return facts | self.coordination.facts()

    def pause(self) -> None:
        """It is stopped; what is sent to it waits."""
        self.is_paused = True

    def resume(self) -> None:
        """It goes on."""
        self.is_paused = False
        waiting, self._waiting = self._waiting, deque()
        for carry_out in waiting:
            carry_out()


def _copied(value: Any) -> Any:
    """As it is now: also of the actors, which change in place."""
    if isinstance(value, dict):
        items = ((key, item.copy() if isinstance(item, Made) else item) for key, item in value.items())
        return type(value)(items)
    return value.copy() if isinstance(value, list) else value


class StoreClient:
    """One node's connection to the server."""

    def __init__(self, node: SimulatedNode) -> None:
        self._node = node
        self._server = node.world.store
        self._queue: deque[Any] = deque()
        self._membership_calls = MembershipCalls(node.node_id)
        self._is_busy = False
        self.is_cut = False
        self.way = StoreWay(node, self._direct)
        self._last_event: int | None = None
        self._life = -1
        self._is_feed_due = False
        self._is_feed_busy = False

    def put(self, command: Any) -> None:
        """Carry out a command of the machine, after those before."""
        self._queue.append(command)
        self._next()

    def start_feed(self) -> None:
        """Follow the change feed."""
        self._server.follow(self._told)
        self._feed()

    def _told(self) -> None:
        if not self._is_feed_due:  # else it will read these events as well
            self._is_feed_due = True
            if not self._is_feed_busy:
                # In a large cluster many nodes join at once, and a reader finds many events each time.
                wait_s = 0.1 if self._node.world.is_large else self._node.world.latencies.store_s()
                self._node.after(wait_s, self._feed)

    def _next(self) -> None:
        if self._is_busy or not self._queue:
            return
        self._is_busy = True
        command = self._queue.popleft()
        if isinstance(command, e.CallStore):
            self._call_store(command, self._node.now_s() + CALL_RETRIES_S)
        else:
            self._call_membership(command)

    def _call_membership(self, command: Any) -> None:
        self.call(lambda fake: self._membership(fake, command), self._membership_answered)

    def call(self, operation: Callable[[FakeControlStore], Any], answer: Answer) -> None:
        """One round trip, directly or through a peer; exactly one answer."""
        self.way.call(operation, answer)

    def _direct(self, operation: Callable[[FakeControlStore], Any], answer: Answer) -> None:
        node, world = self._node, self._node.world
        is_answered = False

        def answered_once(value: Any, error: BaseException | None) -> None:
            nonlocal is_answered
            if not is_answered:
                is_answered = True
                answer(value, error)

        def executed(value: Any, error: BaseException | None) -> None:
            if not self.is_cut:
                node.after(world.latencies.store_s(), answered_once, value, error)

        if not self.is_cut:
            node.after(world.latencies.store_s(), self._server.call, operation, executed)
        if self.is_cut or self._server.is_paused or world.has_store_outages:
            lost = NoAnswer("the control store did not answer")
            world.timeline.after(CALL_TIMEOUT_S, node.act, answered_once, None, lost)

    # --- the membership's commands

    def _membership(self, fake: FakeControlStore, command: Any) -> Any:
        return self._membership_calls.carry_out(fake, command)

    def _membership_answered(self, value: Any, error: BaseException | None) -> None:
        self._is_busy = False
        event = ms.StoreFailed(str(error)) if error is not None else value
        self._membership_calls.answered(event)
        if event is not None:
            self._node.event(event)
        self._next()

    # --- CallStore

    def _call_store(self, call: e.CallStore, deadline_s: float) -> None:
        def answered(value: Any, error: BaseException | None) -> None:
            if isinstance(error, NotConnected) and self._node.now_s() < deadline_s:
                self._node.after(RETRY_S, self._call_store, call, deadline_s)
                return
            self._is_busy = False
            if error is not None:
                self._node.event(e.StoreRaised(call.tag, type(error).__name__, str(error)))
            else:
                self._node.event(e.StoreReturned(call.tag, value))
            for event in posted:
                self._node.event(event)
            self._next()

        posted: list[e.ActorEventRead] = []

        def operation(fake: FakeControlStore) -> Any:
            own = getattr(self, f"_op_{call.operation}", None)
            if own is not None:
                return own(fake, **call.arguments)
            posted.clear()
            return getattr(ActorRegistry(fake, self._node.node_id, posted.append), call.operation)(**call.arguments)

        self.call(operation, answered)

    def _op_register_job(self, fake: FakeControlStore, job: m.JobPart, pid: int) -> None:
        record = JobRecord(job.job_id, self._node.node_id, job.owner.process_id, pid)
        fake.register_job(job.job_id, encode_record(record))

    def _op_finish_job(self, fake: FakeControlStore, job_id: str) -> None:
        fake.finish_job(job_id)

    def _op_reconcile_jobs(self, fake: FakeControlStore, running: list[str], is_for_all: bool) -> dict[str, str]:
        return reconcile_jobs(fake, self._node.node_id, running, is_for_all=is_for_all)

    # --- the change feed

    def _feed(self) -> None:
        self._is_feed_due = True
        if not self._is_feed_busy:
            self._read_feed()

    def _read_feed(self) -> None:
        self._is_feed_due = False
        self._is_feed_busy = True
        last = self._last_event

        def read(fake: FakeControlStore) -> Any:
            if last is None:
                return fake.last_event_id(), self._server.life
            if self._life != self._server.life:
                raise EventsLost("another server")
            return fake.read_events(last), self._life

        self.call(read, self._feed_read)

    def _feed_read(self, value: Any, error: BaseException | None) -> None:
        self._is_feed_busy = False
        if isinstance(error, EventsLost):
            self._last_event = None
            self._read_feed()
        elif error is not None:
            self._node.after(RETRY_S, self._feed)
        elif self._last_event is None:
            self._last_event, self._life = value
            self._node.event(ms.EventsMissed())
            self._read_feed()
        else:
            if value[0]:
                self._last_event = value[0][-1].id
            for event in feed_events(value[0], read=self._server.node_event):
                self._node.event(event)
            if value[0] and (pause_s := feed_pause_s(len(self._node.machine.membership.view))):
                self._is_feed_busy = True
                self._node.after(pause_s, self._read_feed)
            elif self._is_feed_due or value[0]:
                self._read_feed()
