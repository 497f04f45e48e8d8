"""Who acts in a simulated cluster, a process, and the streams between two of them.

    Party --Link (a UNIX socket)--> Party        on one host: in order; ends when one of them does
    node --Fabric (zmq over TCP)--> node         between hosts: in order; waits while they are cut off

What a process had sent before it died arrives; what was on its way to it does not. A frozen process does nothing until
it is thawed, and then finds all that has come meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clusterpool.core.messages import Address, Message

if TYPE_CHECKING:
    from clusterpool.simulation.world import World

_END = object()


class Host:
    """One machine: its processes, and its clock, which is ahead or behind and too fast or too slow."""

    def __init__(
        self, name: str, *, clock_offset_s: float = 0.0, clock_rate: float = 1.0, slowness: float = 1.0
    ) -> None:
        self.name = name
        self.slowness = slowness  # how much longer everything takes here
        self.parties: list[Party] = []
        self._offset_s = clock_offset_s
        self._rate = clock_rate

    def now_s(self, world_s: float) -> float:
        """Its monotonic clock."""
        return self._offset_s + world_s * self._rate

    def world_delay_s(self, own_delay_s: float) -> float:
        """How long a delay by its clock really takes."""
        return own_delay_s / self._rate


class Party:
    """A process. Whatever it does is planned by `after`, so that it can be frozen, and killed."""

    def __init__(self, world: World, host: Host, name: str) -> None:
        self.world = world
        self.host = host
        self.name = name
        self.is_alive = True
        self.is_frozen = False
        self.cause = "itself"  # of what it has ended (evidence.py)
        self.ends: dict[int, End] = {}
        self._held: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        host.parties.append(self)

    def now_s(self) -> float:
        """Its host's clock."""
        return self.host.now_s(self.world.timeline.now_s)

    def after(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Do something in a while, unless it is dead by then."""
        self.world.timeline.after(delay_s * self.host.slowness, self.act, action, *arguments)

    def act(self, action: Callable[..., None], *arguments: Any) -> None:
        """Do something now, or when thawed."""
        if not self.is_alive:
            return
        if self.is_frozen:
            self._held.append((action, arguments))
        else:
            action(*arguments)

    def note(self, what: str, detail: Any = None) -> None:
        """A line of the trace."""
        self.world.trace.note(self.world.timeline.now_s, self.name, what, detail)

    def freeze(self) -> None:
        """Stop it, as SIGSTOP does."""
        if self.is_alive and not self.is_frozen:
            self.is_frozen = True
            self.world.evidence.struck(self.name, "frozen")
            self.note("frozen")

    def thaw(self) -> None:
        """Let it go on with what it has missed."""
        if self.is_frozen:
            self.is_frozen = False
            self.world.evidence.mended(self.name, "frozen")
            self.note("thawed")
            held, self._held = self._held, deque()
            for action, arguments in held:
                self.world.timeline.after(0.0, self.act, action, *arguments)

    def vanish(self) -> None:
        """It is no more: its streams end, after what it had sent."""
        if not self.is_alive:
            return
        self.is_alive = False
        self.world.evidence.ended(self)
        self.note("dead")
        for end in list(self.ends.values()):
            end.close()


class Pipe:
    """One direction of a stream."""

    def __init__(self, world: World, receiver: Party) -> None:
        self._world = world
        self._receiver = receiver
        self._frames: deque[Any] = deque()
        self._last_s = 0.0
        self.on_message: Callable[[Message], None] = lambda _: None
        self.on_end: Callable[[], None] = lambda: None
        self.is_cut = False

    def put(self, frame: Any) -> None:
        """Send a message, or the end."""
        if self.is_cut or not self._receiver.is_alive:
            return
        world = self._world
        self._last_s = max(self._last_s, world.timeline.now_s + world.latencies.local_s(self._receiver.host.slowness))
        self._frames.append(frame)
        world.timeline.at(self._last_s, self._receiver.act, self._take)

    def end(self) -> None:
        """Nothing comes after what is on its way."""
        self.put(_END)

    def _take(self) -> None:
        if self._frames and not self.is_cut:
            frame = self._frames.popleft()
            if frame is _END:
                self.is_cut = True
                self.on_end()
            else:
                self.on_message(self._world.received(frame))

    def drain(self) -> None:
        """Take all that is on its way, at once."""
        while self._frames and not self.is_cut:
            self._take()


class End:
    """One process's end of a link."""

    def __init__(self, number: int, party: Party, outgoing: Pipe, incoming: Pipe) -> None:
        self.number = number
        self.party = party
        self.incoming = incoming
        self.peer: Address | None = None  # known once it has said hello
        self.is_closed = False
        self._outgoing = outgoing
        party.ends[number] = self

    def send(self, message: Message) -> None:
        """Send a message; a broken link swallows it."""
        if not self.is_closed:
            self._outgoing.put(self.party.world.sent(message))

    def close(self) -> None:
        """The other side sees the end after all that was sent."""
        if not self.is_closed:
            self.is_closed = True
            self.incoming.is_cut = True
            self.party.ends.pop(self.number, None)
            self._outgoing.end()


def connect(world: World, caller: Party, listener: Party) -> tuple[End, End]:
    """A new link between two processes of one host; the caller's end first."""
    there, back = Pipe(world, listener), Pipe(world, caller)
    number = world.next_number()
    return End(number, caller, there, back), End(number, listener, back, there)


class Fabric:
    """The network between the hosts."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._streams: dict[tuple[str, str], _Stream] = {}
        self._cuts: dict[frozenset[str], int] = {}
        self.receivers: dict[str, Callable[[str, bytes], None]] = {}  # by node id
        self.parties: dict[str, Party] = {}

    def send(self, source: str, destination: str, frame: bytes) -> None:
        """Send a frame from one node to another."""
        stream = self._streams.get((source, destination))
        if stream is None:
            stream = self._streams[(source, destination)] = _Stream(source, destination)
        stream.frames.append(frame)
        self._flush(stream)

    def forget(self, source: str, destination: str) -> None:
        """The sender drops what has not left it; the next frame goes by a new connection."""
        stream = self._streams.pop((source, destination), None)
        if stream is not None:
            stream.frames.clear()

    def _flush(self, stream: _Stream) -> None:
        world = self._world
        if frozenset((stream.source, stream.destination)) in self._cuts:
            return
        while stream.frames:
            frame = stream.frames.popleft()
            delay_s = world.latencies.remote_s(len(frame))
            stream.last_s = max(stream.last_s, world.timeline.now_s + delay_s)
            world.timeline.at(stream.last_s, self._arrive, stream, frame)

    def _arrive(self, stream: _Stream, frame: bytes) -> None:
        party = self.parties.get(stream.destination)
        if party is not None:
            party.act(self.receivers[stream.destination], stream.source, frame)

    def cut(self, one: str, other: str) -> None:
        """Nothing gets through between two nodes until they are joined as often as they were cut."""
        pair = frozenset((one, other))
        self._cuts[pair] = self._cuts.get(pair, 0) + 1

    def join(self, one: str, other: str) -> None:
        """What has waited goes on its way."""
        pair = frozenset((one, other))
        left = self._cuts.pop(pair, 0) - 1
        if left > 0:
            self._cuts[pair] = left
            return
        for key in ((one, other), (other, one)):
            stream = self._streams.get(key)
            if stream is not None:
                self._flush(stream)


class _Stream:
    __slots__ = ("destination", "frames", "last_s", "source")

    def __init__(self, source: str, destination: str) -> None:
        self.source = source
        self.destination = destination
        self.frames: deque[bytes] = deque()
        self.last_s = 0.0
