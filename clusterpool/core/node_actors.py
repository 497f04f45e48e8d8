"""The actors' half of a node: their registry in the control store, who waits to hear of them, who answers for them.

An ordinary actor is started again by its creator, who has its class and arguments; a detached one by a node (see
actor_keeper). Either way the registry decides, in one step, whether a life is over and whose the next one is. So a
caller needs to know one thing only: in which life the actor was when its calls failed; its node tells it of a later
one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from clusterpool.core import membership as ms
from clusterpool.core import messages as m
from clusterpool.core.actor_keeper import ActorKeeper
from clusterpool.core.actor_messages import ActorLoaded, ActorSaved, LoadActor, LogCalls, SaveActor
from clusterpool.core.coordination_events import CallCoordination
from clusterpool.core.leases import Worker
from clusterpool.core.messages import Address
from clusterpool.core.node_events import ActorEventRead, CallStore, Send, StoreRaised, StoreReturned, Warn
from clusterpool.core.scheduler import Scheduler
from clusterpool.core.store_facts import StoreFacts
from clusterpool.errors import STORE_CANNOT

Commands = list[Any]
OnAnswer = Callable[[Any, str, str], Commands]
_UNKNOWN = m.ActorPart("", "", {}, None, "unknown", "no actor of this name is known")
# Who has a handle may hear of the actor before the registry does: an unnamed one is registered in passing.
UNKNOWN_WAIT_S = 5.0
# Whoever waits asks again after this time, should the change feed have lost the news.
ASK_AGAIN_S = 2.0
# Who waits for a next life was told that the last one is over; but a message that came back, because two nodes had lost
# sight of one another, says so too. Later than any real end is in the registry (5 s for a node), the last one it is.
NEXT_LIFE_WAIT_S = 10.0
_STORE_CANNOT = frozenset(error.__name__ for error in STORE_CANNOT)


class _Waiter:
    __slots__ = ("life", "request", "since_s", "source")

    def __init__(self, source: Address, request: int, life: int, since_s: float) -> None:
        self.source = source
        self.request = request
        self.life = life
        self.since_s = since_s


class NodeActors:
    """Asks the control store for the processes of one node. Records there are ActorParts.

    living: the nodes that this one knows to live, itself too, with their incarnations.
    """

    def __init__(
        self, node_id: str, scheduler: Scheduler, living: Callable[[], Iterable[tuple[str, int]]] = tuple
    ) -> None:
        self.node_id = node_id
        self._scheduler = scheduler
        self._living = living
        self._last_tag = 0
        self._calls: dict[int, tuple[OnAnswer | None, CallStore, bool]] = {}
        self._waiting: dict[str, list[_Waiter]] = {}  # by actor id
        self.facts = StoreFacts()
        self._created: dict[str, Address] = {}  # by id of a living actor that is not detached, its creator
        self._again: Commands = []  # calls to make again at the next tick
        self._taken: list[tuple[str, int]] = []  # lives that we were making when we were taken for dead
        self._asked_s = 0.0
        self._now_s = 0.0
        address = Address(node_id, node_id)
        self.keeper = ActorKeeper(address, itertools.count(1), self._call_for_keeper, self._life_ended_here)

    def message_handlers(self) -> dict[type, Callable[[Address, Any, float], Commands]]:
        """What the node's processes, and other nodes, say about actors."""
        keeper = self.keeper
        return {
            m.RegisterActor: lambda source, message, _: self.registered(source, message),
            m.ActorChanged: lambda _, message, __: self.changed(message),
            m.LocateActor: self.located,
            m.LifeEnded: lambda source, message, _: self.life_ended(source, message),
            m.KillActor: lambda _, message, __: self.killed(message),
            LogCalls: lambda source, message, _: self._log_called(source, message),
            SaveActor: lambda source, message, _: self._log_called(source, message),
            LoadActor: lambda source, message, _: self._load_asked(source, message),
            m.WorkerGranted: lambda _, message, __: keeper.granted(message),
            m.RequestFailed: lambda _, message, __: keeper.request_failed(message),
            m.WorkerExited: lambda _, message, __: keeper.worker_exited(message),
            m.TasksFinished: lambda source, message, _: keeper.finished(source, message),
        }

    def call(
        self, operation: str, arguments: dict[str, Any], on_answer: OnAnswer | None = None, *, is_stubborn: bool = False
    ) -> Commands:
        """Call the control store; `on_answer(value, error_kind, error_text)`. `is_stubborn`: until it answers."""
        self._last_tag += 1
        self.facts.called(operation, arguments)
        command = CallStore(self._last_tag, operation, arguments)
        if on_answer is not None or is_stubborn:
            self._calls[self._last_tag] = (on_answer, command, is_stubborn)
        return [command]

    def _call_for_keeper(
        self, operation: str, arguments: dict[str, Any], on_answer: OnAnswer | None = None
    ) -> Commands:
        return self.call(operation, arguments, on_answer, is_stubborn=True)

    def answered(self, event: StoreReturned | StoreRaised) -> Commands:
        """The control store has answered a call."""
        on_answer, command, is_stubborn = self._calls.get(event.tag, (None, None, False))
        if command is None:
            return []
        if is_stubborn and isinstance(event, StoreRaised) and event.kind in _STORE_CANNOT:
            self._again.append(command)  # whoever waits for this has nobody else to ask
            return []
        del self._calls[event.tag]
        if on_answer is None:
            return []
        if isinstance(event, StoreReturned):
            return on_answer(event.value, "", "")
        return on_answer(None, event.kind, event.text)

    # --- creators

    def registered(self, source: Address, message: m.RegisterActor) -> Commands:
        """A creator wants its actor known, and its name claimed."""
        actor = message.actor
        if not message.creation:
            self._created[actor.actor_id] = source

        def on_created(_value: Any, kind: str, text: str) -> Commands:
            if kind:
                self._created.pop(actor.actor_id, None)
                self.facts.forget(actor.actor_id)
            if kind == "NameTaken" and message.get_if_exists:
                return self._find(source, message.request, actor.namespace, actor.name)
            state = "taken" if kind == "NameTaken" else ("failed" if kind else "pending")
            answer = msgspec.structs.replace(actor, state=state, text=text)
            commands: Commands = [Send(source, m.ActorLocated(message.request, answer))]
            if message.creation and not kind:
                commands += self.keeper.begin(actor, message.creation)
            return commands

        return self.call("create_actor", {"actor": actor, "creation": message.creation}, on_created)

    def changed(self, message: m.ActorChanged) -> Commands:
        """The creator reports that its actor lives, or will not."""
        actor = message.actor
        if actor.state == "alive":
            arguments = {
                "actor_id": actor.actor_id, "life": actor.life, "address": actor.address, "is_kept": False
            }  # fmt: skip
            return self.call("start_life", arguments)
        if actor.state == "dead":
            self._created.pop(actor.actor_id, None)
        return self.call("update_actor", {"actor": actor})

    def life_ended(self, source: Address, message: m.LifeEnded) -> Commands:
        """A creator asks whether it may start its actor again."""

        def on_ended(value: Any, kind: str, text: str) -> Commands:
            actor = value[1] if value is not None else None
            if actor is None:
                text = text or "the control store does not know it any more"
                actor = msgspec.structs.replace(_UNKNOWN, actor_id=message.actor_id, state="dead", text=text)
            elif actor.state != "restarting":
                actor = msgspec.structs.replace(actor, state="dead")
            return [Send(source, m.ActorLocated(message.request, actor))]

        arguments = {
            "actor_id": message.actor_id, "life": message.life, "text": message.text, "teller": "creator",
            "address": None,
        }  # fmt: skip
        return self.call("end_life", arguments, on_ended, is_stubborn=True)

    def process_left(self, address: Address) -> Commands:
        """Forget who waited. The actors of a creator end with it, also those that have no worker just now."""
        for actor_id, waiting in list(self._waiting.items()):
            left = [waiter for waiter in waiting if waiter.source != address]
            if left:
                self._waiting[actor_id] = left
            else:
                del self._waiting[actor_id]
        mine = [actor_id for actor_id, creator in self._created.items() if creator == address]
        for actor_id in mine:
            del self._created[actor_id]
        return self.call("end_actors", {"actor_ids": mine, "text": "its creator has ended"}) if mine else []

    def killed(self, message: m.KillActor) -> Commands:
        """End the actor's worker; before that, if it might come again, have the registry know that it shall not."""
        if message.no_restart and message.may_return:
            text = "the actor was killed with clusterpool.kill()"
            then = msgspec.structs.replace(message, may_return=False)

            def on_buried(_value: Any, _kind: str, _text: str) -> Commands:
                return self.killed(then)

            arguments = {"actor_id": message.actor_id, "text": text, "error": ""}
            return self.call("bury_actor", arguments, on_buried, is_stubborn=True)
        address = message.address
        if address is not None and address.node_id != self.node_id:
            return [Send(Address(address.node_id, address.node_id), message)]
        return list(self._scheduler.kill_actor(message.actor_id))

    # --- callers

    def located(self, source: Address, message: m.LocateActor, now_s: float) -> Commands:
        """Somebody has a handle, or a name, and wants an address."""
        if not message.actor_id:
            return self._find(source, message.request, message.namespace, message.name)
        return self._get(message.actor_id, [_Waiter(source, message.request, message.life, now_s)])

    def _find(self, source: Address, request: int, namespace: str, name: str) -> Commands:
        def on_found(value: Any, kind: str, text: str) -> Commands:
            actor = value if isinstance(value, m.ActorPart) else _UNKNOWN
            if kind:
                actor = msgspec.structs.replace(_UNKNOWN, text=text)
            return [Send(source, m.ActorLocated(request, actor))]

        return self.call("find_actor", {"namespace": namespace, "name": name}, on_found)

    def _get(self, actor_id: str, waiters: list[_Waiter]) -> Commands:
        """Read of an actor for those who wait for it."""

        def on_got(value: Any, kind: str, text: str) -> Commands:
            actor = value if isinstance(value, m.ActorPart) else None
            commands = self._look_at(actor) if actor is not None else []
            for waiter in waiters:
                waited_s = self._now_s - waiter.since_s
                life = waiter.life if waited_s < NEXT_LIFE_WAIT_S else waiter.life - 1
                if actor is not None and (actor.state == "dead" or _is_there(actor, life)):
                    commands.append(Send(waiter.source, m.ActorLocated(waiter.request, actor)))
                elif actor is None and (kind or waited_s >= UNKNOWN_WAIT_S):
                    unknown = msgspec.structs.replace(_UNKNOWN, text=text or _UNKNOWN.text)
                    commands.append(Send(waiter.source, m.ActorLocated(waiter.request, unknown)))
                else:
                    self._waiting.setdefault(actor_id, []).append(waiter)
            return commands

        return self.call("get_actor", {"actor_id": actor_id}, on_got)

    def time_passed(self, now_s: float) -> Commands:
        """A tick of the clock."""
        self._now_s = now_s
        commands, self._again = self._again, []
        if not self._waiting or now_s - self._asked_s < ASK_AGAIN_S:
            return commands
        self._asked_s = now_s
        for actor_id in list(self._waiting):
            commands += self._get(actor_id, self._waited(actor_id))
        return commands

    def _waited(self, actor_id: str) -> list[_Waiter]:
        return self._waiting.pop(actor_id, [])

    # --- the change feed

    def event_read(self, event: ActorEventRead) -> Commands:
        """The change feed mentions an actor: those who wait for it ask again, and what is over is ended here."""
        actor_id, address = event.actor_id, event.address
        self.facts.actor_changed(actor_id, event.state, address, event.life)
        is_of_interest = actor_id in self._waiting
        if event.state == "alive" and address is not None and address.node_id == self.node_id:
            is_of_interest = is_of_interest or address.process_id not in self._scheduler.workers
        if not is_of_interest and event.state in ("dead", "restarting"):
            is_of_interest = (
                actor_id in self._created
                or actor_id in self.keeper.creations
                or any(worker.actor_id == actor_id for worker in self._scheduler.workers.values())
            )
        return self._get(actor_id, self._waited(actor_id)) if is_of_interest else []

    def membership_heard(self, event: Any, *, is_alone: bool) -> Commands:
        """What the membership has just handled may mean that the store knows less than it did, or we do."""
        commands: Commands = []
        if isinstance(event, (ms.Registered, ms.EventsMissed)) and not is_alone:
            commands += self.events_missed() + self.reconcile_jobs(is_for_all=False)
        if isinstance(event, ms.Registered):
            # Others take over what they know to be ours. What was entered while we were taken for dead they do not.
            taken, self._taken = self._taken, []
            for actor_id, life in taken:
                commands += self._life_ended_here(actor_id, life, f"its node {self.node_id} was taken for dead")
        if isinstance(event, ms.Registered) or (isinstance(event, ms.Restored) and event.is_accepted):
            commands += self._tell_again()
        return commands

    def _tell_again(self) -> Commands:
        """The store has taken this node up, and may not know of its jobs and actors."""
        incarnations = dict(self._living())
        commands: Commands = []
        for operation, arguments in self.facts.restore():
            if operation == "restore_actor":
                actor, address = arguments["actor"], arguments["address"]
                keeper = address.node_id if actor.detached and address is not None else self.node_id
                arguments = {**arguments, "keeper": (keeper, incarnations.get(keeper, 0))}
            commands += self.call(operation, arguments, is_stubborn=True)
        return commands

    def reconcile_jobs(self, *, is_for_all: bool) -> Commands:
        """Jobs may have ended while nobody could tell the store, or remove what they have there."""

        def on_done(ended: Any, _kind: str, _text: str) -> Commands:
            jobs = ended.items() if ended else ()
            return [CallCoordination(0, "delete_job", (job_id, home), False) for job_id, home in jobs]

        arguments = {"running": self.facts.job_ids, "is_for_all": is_for_all}
        return self.call("reconcile_jobs", arguments, on_done, is_stubborn=True)

    def events_missed(self) -> Commands:
        """The change feed has a gap: ask for all that matters here."""
        actor_ids = {worker.actor_id for worker in self._scheduler.workers.values() if worker.actor_id}
        actor_ids |= {*self._waiting, *self._created, *self.keeper.creations}
        commands = [
            command for actor_id in sorted(actor_ids) for command in self._get(actor_id, self._waited(actor_id))
        ]
        return commands + self.adopt_orphans()

    def _look_at(self, actor: m.ActorPart) -> Commands:
        """Hold what is here of an actor against the registry: a former life of it, or one that is dead, ends."""
        commands: Commands = []
        actor_id = actor.actor_id
        is_dead = actor.state == "dead"
        for worker in list(self._scheduler.workers.values()):
            if worker.actor_id == actor_id and not worker.is_ending and (is_dead or worker.actor_life < actor.life):
                commands += self._scheduler.end_worker(worker.process_id, actor.text or "its actor lives elsewhere now")
        creation = self.keeper.creations.get(actor_id)
        if creation is not None and (is_dead or creation.actor.life < actor.life):
            commands += self.keeper.dropped(actor_id)
        creator = self._created.get(actor_id)
        if creator is not None and is_dead:
            del self._created[actor_id]
            commands.append(Send(creator, m.ActorLocated(0, actor)))
        address = actor.address
        is_mine = actor.state == "alive" and address is not None and address.node_id == self.node_id
        if is_mine and actor.detached and address is not None and address.process_id not in self._scheduler.workers:
            text = "its worker ended as soon as it was there"
            commands += self._life_ended_here(actor_id, actor.life, text, address)
        return commands

    # --- checkpoints

    def _log_called(self, source: Address, message: LogCalls | SaveActor) -> Commands:
        def on_done(value: Any, kind: str, _text: str) -> Commands:
            return [Send(source, ActorSaved(message.request, kind or str(value)))]

        arguments: dict[str, Any] = {"actor_id": message.actor_id, "life": message.life}
        if isinstance(message, LogCalls):
            arguments |= {"first": message.first, "calls": message.entries}
            return self.call("append_calls", arguments, on_done, is_stubborn=True)
        arguments |= {"calls": message.calls, "content": message.content}
        return self.call("store_checkpoint", arguments, on_done, is_stubborn=True)

    def _load_asked(self, source: Address, message: LoadActor) -> Commands:
        def on_loaded(value: Any, kind: str, text: str) -> Commands:
            checkpoint, calls, entries, lost = value or (b"", 0, [], f"its calls could not be read: {kind}: {text}")
            if lost:
                return self._lost(message.actor_id, lost)
            return [Send(source, ActorLoaded(message.request, checkpoint, calls, entries))]

        return self.call("load_calls", {"actor_id": message.actor_id}, on_loaded, is_stubborn=True)

    def _lost(self, actor_id: str, text: str) -> Commands:
        """What its callers were told it has done is known no more: better no actor than one that has forgotten."""
        arguments = {"actor_id": actor_id, "text": text, "error": ""}
        return [Warn(f"actor {actor_id}: it is ended: {text}"), *self.call("bury_actor", arguments, is_stubborn=True)]

    # --- lives

    def worker_ended(self, worker: Worker, exit_code: int, text: str) -> Commands:
        """A process is gone; if it held an actor, that one's life is over, and of its own will with exit code 0."""
        actor_id, life = worker.actor_id, worker.actor_life
        if not actor_id:
            return []
        address = Address(self.node_id, worker.process_id)
        if exit_code == 0:
            arguments = {"actor_id": actor_id, "address": address, "text": text}
            return self.call("retire_actor", arguments, is_stubborn=True)
        return self._life_ended_here(actor_id, life, text, address)

    def _life_ended_here(self, actor_id: str, life: int, text: str, address: Address | None = None) -> Commands:
        arguments = {"actor_id": actor_id, "life": life, "text": text, "teller": "host", "address": address}
        return self.call("end_life", arguments, self._begin_next, is_stubborn=True)

    def _begin_next(self, value: Any, _kind: str, _text: str) -> Commands:
        if value is None:
            return []
        outcome, actor, creation = value
        if outcome != "restart" or not actor.detached:
            return []
        return self.keeper.begin(actor, creation)

    def adopt_orphans(self) -> Commands:
        """A node is gone, or this one is new: take over the detached actors that nobody answers for any more."""

        def on_adopted(values: Any, kind: str, text: str) -> Commands:
            return [command for value in values or () for command in self._begin_next(value, kind, text)]

        # A store that has lost its memory does not know all nodes again at once, but we do.
        living = [f"{node_id}:{incarnation}" for node_id, incarnation in self._living()]
        return self.call("adopt_orphans", {"living": living}, on_adopted, is_stubborn=True)

    def fenced(self) -> Commands:
        """The others take this node for dead."""
        self._taken += [(actor_id, creation.actor.life) for actor_id, creation in self.keeper.creations.items()]
        return self.keeper.fenced()

    def node_lost(self, node_id: str, text: str) -> Commands:
        """Another node is gone."""
        return self.keeper.node_lost(node_id, text) + self.adopt_orphans()


def _is_there(actor: m.ActorPart, life: int) -> bool:
    return actor.state == "alive" and actor.address is not None and actor.life >= life
