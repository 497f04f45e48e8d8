"""Semaphores, channels and cells, as one node sees them: where each is, and what has moved. Pure.

A carrier is born *thin*, in kernel objects of its home node, which its processes use without asking anybody. When a
process of another node unpickles it, it moves to the control store, once and for ever: it is *fat* from then on.

    carrier, on its home       thin --AdoptCarrier, MoveCarrier--> drained --created in the store--> fat --job ends-->
                                                                   ^     |
                                         with the next message about it  +--the store failed--> askers are told

    adoption, elsewhere        AdoptCarrier --> does the store have it? --yes--> known (answered)
                                                  |no            ^
                                                  v              |once more, when the home is gone
                                               MoveCarrier to its home --CarrierMoved--> known, or failed

A node that was taken for dead can neither make a carrier nor tell whether another's home is gone: adoptions wait until
it has joined anew, and then begin again.

Who waits for which of them is the part of coordination_waits.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from clusterpool.core import coordination_events as e
from clusterpool.core import coordination_messages as c
from clusterpool.core.census import TokenCensus
from clusterpool.core.coordination_answers import answer, done, failed, life_of
from clusterpool.core.coordination_events import LIFE_OVER
from clusterpool.core.coordination_records import Adoption, Move
from clusterpool.core.coordination_waits import Waits
from clusterpool.core.messages import Address
from clusterpool.core.node_events import MessageArrived, Send

Commands = list[Any]
# Of what processes held when it moved, the tokens are counted every two seconds: what a dead one held must come free
# within five, and a count asks all processes of the node, if no single one holds all.
_TICKS_A_LOOK = 4
# Of jobs whose drivers' nodes are lost, how many carriers are known to have moved, in case the drivers come back, since
# nobody says that they will not. Without it, a process of theirs that comes back cannot use what was made here.
MOVES_OF_LOST_JOBS_MAX = 1000
# In the store, the holder of what processes of a carrier's home held when it moved; no process has such an id.
THIN = "thin"


class CoordinationMachine:
    """Of one node; `handle` takes the events of coordination_events, and MessageArrived with messages of this part.

    processes: those of the node that are there now. incarnation: of the node, 0 before it has any; None if it is alone
    and never has. It changes just before a StoreChanged.
    """

    def __init__(
        self,
        node_id: str,
        processes: Callable[[], Iterable[Address]] = tuple,
        incarnation: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.node_id = node_id
        self._incarnation = incarnation
        self._census = TokenCensus(processes)
        self._moves: dict[str, Move] = {}  # by name
        self._moves_of_lost_jobs: dict[str, None] = {}  # names, the oldest first
        self._adoptions: dict[str, Adoption] = {}
        self._known: set[str] = set()  # adopted here: the store has them
        self._life_over = ""  # in which the others took this node for dead; it is in no other while that is its life
        self._waits = Waits(self._call, lambda: self.life)
        self._last_tag = 0
        self._ticks = 0
        self._calls: dict[int, Callable[[Any, str, str], Commands]] = {}
        self._handlers: dict[type, Callable[[Any], Commands]] = {
            MessageArrived: self._message_arrived,
            e.ProcessGone: self._process_gone,
            e.JobGone: self._job_gone,
            e.NodeGone: self._node_gone,
            e.NodeUnreachable: lambda event: self._home_unreachable(event.node_id),
            e.SelfFenced: lambda _: self._fenced(),
            e.StoreChanged: lambda _: self._store_changed(),
            e.OperationAnswered: lambda event: self._answered(event.tag, event.value, "", ""),
            e.OperationFailed: lambda event: self._answered(event.tag, None, event.kind, event.text),
            e.GrantRead: self._waits.granted,
            e.CarrierDrained: self._drained,
            e.CarrierMissing: self._missing,
            e.TimeToLook: self._time_to_look,
            e.ThinTokensRead: lambda event: self._lost(self._census.read(event)),
            e.ThinTokensMissing: self._census.missing,
        }
        self._message_handlers: dict[type, Callable[[Address, Any], Commands]] = {
            c.IsMoved: self._is_moved,
            c.AdoptCarrier: self._adopt,
            c.AcquireToken: self._waits.begin,
            c.GetItem: self._waits.begin,
            c.CancelWait: self._waits.cancel,
            c.ReleaseToken: self._release,
            c.ReturnToken: lambda source, message: self._waits.give_back(
                message.name, self._waits.waiter(source, message.acquired)
            ),
            c.ReadValue: lambda source, message: self._relay(source, message, "value", (message.name,)),
            c.PutItem: lambda source, message: self._relay(source, message, "put", (message.name, message.content)),
            c.ReturnItem: lambda _, message: self._call("put_back", (message.name, message.content)),
            c.CountItems: lambda source, message: self._relay(source, message, "length", (message.name,)),
            c.ReadCell: self._read_cell,
            c.WriteCell: self._write_cell,
            c.ForgetCarriers: lambda _, message: [e.RemoveCarriers(message.names)],
            c.MoveCarrier: lambda source, message: self._move(message, node=source),
            c.CarrierMoved: lambda _, message: self._adopted(message.name, message.error_kind, message.error_text),
            c.ReportStuck: self._stuck,
            c.HeldCounted: self._census.answered,
        }

    @property
    def life(self) -> str:
        """In whose name the node's processes wait and hold: what ends one life cannot touch what is the next one's."""
        incarnation = self._incarnation()
        return self.node_id if incarnation is None else life_of(self.node_id, incarnation)

    def handle(self, event: Any, now_s: float) -> Commands:
        """Take note of `event`; what to do about it, in order."""
        return self._handlers[type(event)](event)

    def _message_arrived(self, event: MessageArrived) -> Commands:
        message = event.message
        commands = self._message_handlers[type(message)](event.source, message)
        move = self._moves.get(getattr(message, "name", ""))
        if move is None or move.drained is None or move.is_creating or move.is_done:
            return commands
        # Drained, but the store had failed: before anything else it gets what was in it then.
        return self._create(getattr(message, "name", ""), move) + commands

    # --- calls to the control store

    def _call(
        self,
        operation: str,
        arguments: tuple[Any, ...],
        on_answer: Callable[[Any, str, str], Commands] | None = None,
        *,
        starts: bool = True,
    ) -> Commands:
        """`on_answer(value, error kind, error text)` is called with the answer."""
        tag = 0
        if on_answer is not None:
            self._last_tag += 1
            tag = self._last_tag
            self._calls[tag] = on_answer
        return [e.CallCoordination(tag, operation, arguments, starts)]

    def _answered(self, tag: int, value: Any, kind: str, text: str) -> Commands:
        on_answer = self._calls.pop(tag, None)
        return [] if on_answer is None else on_answer(value, kind, text)

    def _relay(self, source: Address, message: Any, operation: str, arguments: tuple[Any, ...]) -> Commands:
        """An operation that the store answers at once, with a number."""

        def on_answer(value: Any, kind: str, text: str) -> Commands:
            return [failed(source, message, kind, text) if kind else done(source, message, int(value or 0))]

        return self._call(operation, arguments, on_answer)

    def _release(self, source: Address, message: c.ReleaseToken) -> Commands:
        def on_answer(value: Any, kind: str, text: str) -> Commands:
            if not kind and not value:
                kind, text = "ValueError", "semaphore or lock released too many times"
            return [failed(source, message, kind, text) if kind else done(source, message)]

        move = self._moves.get(message.name)
        if message.is_thin and move is not None and move.held > 0:
            move.held -= 1
            self._census.token_given(message.name)
        return self._call("release", (message.name, message.maximum, self._holder(source, message)), on_answer)

    def _holder(self, source: Address, message: c.ReleaseToken | c.WriteCell) -> str:
        if message.is_thin:
            return f"{self.life}/{THIN}"
        return self._waits.waiter(source, message.acquired) if message.acquired else ""

    def _write_cell(self, source: Address, message: c.WriteCell) -> Commands:
        arguments = (message.name, message.content, message.guard, self._holder(source, message))
        return self._relay(source, message, "write_cell", arguments)

    def _read_cell(self, source: Address, message: c.ReadCell) -> Commands:
        def on_answer(value: Any, kind: str, text: str) -> Commands:
            if kind:
                return [failed(source, message, kind, text)]
            version, content = value if value is not None else (0, b"")
            return [done(source, message, version, content)]

        return self._call("read_cell", (message.name, message.known_version), on_answer)

    # --- adoptions: carriers of other nodes

    def _adopt(self, source: Address, message: c.AdoptCarrier) -> Commands:
        if message.home == self.node_id:
            move = c.MoveCarrier(message.name, message.kind, message.maximum, message.total)
            return self._move(move, process=(source, message.request))
        if message.name in self._known:
            return [done(source, message)]
        adoption = self._adoptions.get(message.name)
        if adoption is not None:
            adoption.processes.append((source, message.request))
            return []
        adoption = self._adoptions[message.name] = Adoption(message)
        adoption.processes.append((source, message.request))
        return self._look_up(message.name)

    def _look_up(self, name: str) -> Commands:
        def on_answer(is_there: Any, kind: str, text: str) -> Commands:
            adoption = self._adoptions.get(name)
            if adoption is None or self._is_outside:
                return []
            if kind or is_there:
                return self._adopted(name, kind, text)
            home = adoption.message.home
            if adoption.is_last_try:
                what = f"{adoption.message.kind} {name}"
                text = f"{what} was on node {home}, which is gone, and had not been used elsewhere"
                return self._adopted(name, "ObjectLost", text)
            adoption.is_home_asked = True
            asked = adoption.message
            move = c.MoveCarrier(name, asked.kind, asked.maximum, asked.total)
            return [Send(Address(home, home), move)]

        return [] if self._is_outside else self._call("exists", (name,), on_answer)

    def _adopted(self, name: str, kind: str, text: str) -> Commands:
        adoption = self._adoptions.pop(name, None)
        if adoption is None:
            return []
        if not kind:
            self._known.add(name)
        return [answer(process, request, kind, text) for process, request in adoption.processes]

    def _home_unreachable(self, node_id: str) -> Commands:
        commands: Commands = []
        if self._is_outside:
            return commands
        for name, adoption in list(self._adoptions.items()):
            if adoption.message.home == node_id and not adoption.is_last_try:
                adoption.is_last_try = True
                if adoption.is_home_asked:  # it may have moved it just before its end
                    commands += self._look_up(name)
        return commands

    # --- moves: carriers of this node

    def _is_moved(self, source: Address, message: c.IsMoved) -> Commands:
        move = self._moves.get(message.name)
        if move is not None and not move.is_done:
            # Nothing is left of it here, and the store need not have it yet (see `_create`).
            move.askers.append((source, message))
            return []
        return [done(source, message, int(move is not None))]

    def _move(
        self, message: c.MoveCarrier, *, process: tuple[Address, int] | None = None, node: Address | None = None
    ) -> Commands:
        move = self._moves.get(message.name)
        is_new = move is None
        if move is None:
            move = self._moves[message.name] = Move(message)
        if process is not None:
            move.processes.append(process)
        if node is not None:
            move.nodes.append(node)
        if is_new:
            self._census.forget(lambda name: name == message.name)
            return [e.DrainCarrier(message.kind, message.name)]
        return self._tell(message.name, move) if move.is_done else []

    def _drained(self, event: e.CarrierDrained) -> Commands:
        move = self._moves.get(event.name)
        if move is None:
            return []
        move.drained = event
        if move.kind in ("lock", "guard"):
            if event.is_signal and move.kind == "guard":
                move.kind = "semaphore"
            else:
                move.held = max(0, move.total - event.contents.tokens)
        return self._create(event.name, move)

    def _create(self, name: str, move: Move) -> Commands:
        drained = move.drained
        assert drained is not None, "only what was drained can be created"
        move.is_creating = True

        def on_created(is_created: Any, kind: str, text: str) -> Commands:
            move.is_creating = False
            if not kind and is_created == LIFE_OVER:
                return []  # the node was taken for dead: in its next life
            if not kind and not is_created:
                text = f"{name} cannot be used any more: its job has ended"
                self._moves.pop(name, None)  # who asked came too late: nobody will end the job once more
                return [*self._tell(name, move, "ObjectLost", text), e.RemoveCarriers([name])]
            move.is_done = not kind
            if move.is_done:
                move.drained = None  # a channel's items may be large
            return self._tell(name, move, kind, text)

        contents = drained.contents
        if move.held:
            contents = contents._replace(content=f"{self.life} {move.held}".encode())
        return self._call("create", (name, move.kind, move.maximum, contents, self.life), on_created)

    def _missing(self, event: e.CarrierMissing) -> Commands:
        move = self._moves.pop(event.name, None)
        return self._tell(event.name, move, "ObjectLost", event.text) if move is not None else []

    def _tell(self, name: str, move: Move, kind: str = "", text: str = "") -> Commands:
        commands: Commands = [answer(process, request, kind, text) for process, request in move.processes]
        commands += [Send(node, c.CarrierMoved(name, kind, text)) for node in move.nodes]
        commands += [failed(*asker, kind, text) if kind else done(*asker, 1) for asker in move.askers]
        move.processes, move.nodes, move.askers = [], [], []
        return commands

    # --- ends

    @property
    def _is_outside(self) -> bool:
        return self.life == self._life_over

    def _fenced(self) -> Commands:
        # Those who wait go on in the next life.
        self._life_over = self.life
        return self._call("end_node_life", (self.life, True))

    def _store_changed(self) -> Commands:
        commands = self._waits.ask_again()
        for name, move in self._moves.items():
            if move.drained is not None and not move.is_creating and not move.is_done:
                commands += self._create(name, move)
        if self._life_over and not self._is_outside:
            self._life_over = ""
            for name, adoption in self._adoptions.items():
                adoption.is_home_asked = adoption.is_last_try = False
                commands += self._look_up(name)
        return commands

    def _process_gone(self, event: e.ProcessGone) -> Commands:
        return [*self._census.process_gone(event.address), *self._look(), *self._waits.process_gone(event)]

    def _time_to_look(self, _event: e.TimeToLook) -> Commands:
        # A holder may have died before the move, when nobody waited who could tell, or a count have come to nothing.
        self._ticks += 1
        return self._waits.tick() + self._look(for_forks=self._ticks % _TICKS_A_LOOK != 0)

    def _look(self, *, for_forks: bool = False) -> Commands:
        """Who still holds what it had taken before a move? Those who wait for it, in the store, cannot report it."""
        commands: Commands = []
        for name, move in self._moves.items():
            if move.held and move.is_done:
                commands += self._census.reported(c.ReportStuck(name, move.held), for_forks=for_forks)
        return commands

    def _stuck(self, _source: Address, message: c.ReportStuck) -> Commands:
        move = self._moves.get(message.name)
        if move is None:
            return self._census.reported(message)
        # Whoever reports has not yet seen that it has moved.
        return self._census.reported(c.ReportStuck(message.name, move.held)) if move.held and move.is_done else []

    def _lost(self, commands: Commands) -> Commands:
        """Of a carrier that has moved, what the dead held here goes to the store."""
        given: Commands = []
        for command in commands:
            move = self._moves.get(command.name) if isinstance(command, e.ReturnTokens) else None
            if move is None:
                given.append(command)
                continue
            count = min(command.count, move.held)
            move.held -= count
            for _ in range(count):
                given += self._call("release", (command.name, move.maximum, f"{self.life}/{THIN}"))
        return given

    def _job_gone(self, event: e.JobGone) -> Commands:
        prefix = f"{event.job_id}-"
        self._known = {name for name in self._known if not name.startswith(prefix)}
        self._census.forget(lambda name: name.startswith(prefix))
        text = "its job has ended"
        commands: Commands = [e.RemoveJobCarriers(event.job_id)]
        # A node that was taken for dead has lost sight of the driver's: who waits asks the store in its next life.
        if event.is_known or not event.home:
            commands += self._waits.job_gone(prefix, text)
        for name in [name for name in self._adoptions if name.startswith(prefix)]:
            commands += self._adopted(name, "ObjectLost", text)
        for name in [name for name in self._moves if name.startswith(prefix)]:
            if self._moves[name].is_done and (event.home or not event.is_known):
                self._moves[name].held = 0  # the job may go on elsewhere, and come back: the store has it still
                self._moves_of_lost_jobs[name] = None
            else:
                self._moves_of_lost_jobs.pop(name, None)
                commands += self._tell(name, self._moves.pop(name), "ObjectLost", text)
        while len(self._moves_of_lost_jobs) > MOVES_OF_LOST_JOBS_MAX:
            oldest = next(iter(self._moves_of_lost_jobs))
            del self._moves_of_lost_jobs[oldest]
            self._moves.pop(oldest, None)
        if event.is_known:
            commands += self._call("delete_job", (event.job_id, event.home), starts=False)
        return commands

    def _node_gone(self, event: e.NodeGone) -> Commands:
        for move in self._moves.values():
            move.nodes = [node for node in move.nodes if node.node_id != event.node_id]
        # Each node that hears of it does this: whoever is first gives back, the others find nothing.
        return [
            *self._call("end_node_life", (life_of(event.node_id, event.incarnation), False), starts=False),
            *self._home_unreachable(event.node_id),
        ]
