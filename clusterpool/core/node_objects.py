"""The objects' half of a node: its store, and the transfers in and out of it."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

from clusterpool.core import messages as m
from clusterpool.core import recovery_messages as r
from clusterpool.core import store_messages as s
from clusterpool.core import transfer_messages as t
from clusterpool.core.messages import Address
from clusterpool.core.node_events import PagesReserved, ReservePages, Send
from clusterpool.core.store_index import StoreIndex
from clusterpool.core.store_objects import State
from clusterpool.core.transfer_serving import ServingTable
from clusterpool.core.transfers import Phase, TransferTable

# Names of the node's own clients of its store; process ids never hold a colon.
_PULL, _SERVE = "pull:", "serve:"
Commands = list[Any]


class NodeObjects:
    """Creates, pins, pulls and frees objects for the processes of one node."""

    def __init__(
        self,
        node_id: str,
        capacity_bytes: int,
        watch: Callable[[Address], Commands] = lambda owner: [],
        processes: Container[str] = (),
    ) -> None:
        self.node_id = node_id
        self._watch = watch  # has this node told of the end of an owner elsewhere, also if it has ended already
        self._processes = processes  # ids of those of this node
        self.store = StoreIndex(capacity_bytes, reads_files=lambda client: not client.startswith(_SERVE))
        self.pulls = TransferTable()
        self.servings = ServingTable()
        self._owners: dict[str, Address] = {}  # by object that is being pulled, who keeps account of its copies
        self._wanted: dict[tuple[str, int], m.StoredValue] = {}  # pins not answered yet, by client and request
        self._now_s = 0.0

    # --- messages of processes

    def message(self, source: Address, message: m.Message, now_s: float) -> Commands | None:
        """Handle a message about objects; None when it is about something else."""
        self._now_s = now_s
        client = source.process_id
        if isinstance(message, m.CreateObject):
            return self._create(source, message)
        if isinstance(message, m.SealObject):
            return self._put(s.ObjectSealed(client, message.object_id))
        if isinstance(message, m.AbortObject):
            return self._put(s.ObjectAborted(client, message.object_id))
        if isinstance(message, m.PinObject):
            return self._pin(client, message)
        if isinstance(message, m.UnpinObjects):
            return self._put(s.Unpinned(client, message.object_ids))
        if isinstance(message, m.FreeObjects):
            return [command for object_id in message.object_ids for command in self._free(object_id)]
        if isinstance(message, r.PromoteCopy):
            return self._promote(source, message.object_id)
        if isinstance(message, r.CopyUnreadable):
            is_ours = source.node_id == self.node_id  # nobody else can have tried
            return self._put(s.FileUnreadable(message.object_id, message.text)) if is_ours else []
        if type(message) in _TRANSFER_MESSAGES:
            return self._transfer(t.PeerSpoke(source.node_id, message))
        return None

    def _create(self, source: Address, message: m.CreateObject) -> Commands:
        owner = message.owner
        if owner is not None and self._has_ended(owner):
            # A worker that is being killed, or works for others as well, may ask for room for a result of that process;
            # nobody would ever free it.
            text = f"object {message.object_id} is not stored: the process {owner.process_id} that owned it has ended"
            return [Send(source, m.StoreFailed(message.request, s.Refusal.FREED.value, text))]
        event = s.ObjectCreateRequested(
            source.process_id, message.request, message.object_id, message.size_bytes, True, owner=message.owner
        )
        # Who calls an actor may have no other business on this node: without that nobody would free its results.
        watch = self._watch(owner) if owner is not None else []
        return [*watch, *self._put(event)]

    def _has_ended(self, owner: Address) -> bool:
        """Of an owner elsewhere its node says so when it is watched, and what is being made for it is let go then."""
        return owner.node_id == self.node_id and not owner.is_node and owner.process_id not in self._processes

    def _promote(self, owner: Address, object_id: str) -> Commands:
        if object_id not in self.store.objects:
            return [Send(owner, r.CopyGone(object_id))]  # evicted meanwhile
        return self._put(s.CopyPromoted(object_id))

    def _free(self, object_id: str) -> Commands:
        """The object goes here. Of copies elsewhere its owner knows (CopyMade), or whoever took it from a channel."""
        return self._put(s.ObjectFreed(object_id))

    def _free_all(self, prefix: str) -> Commands:
        names = [object_id for object_id in self.store.objects if object_id.startswith(prefix)]
        return [command for object_id in names for command in self._free(object_id)]

    def _pin(self, client: str, message: m.PinObject) -> Commands:
        stored = message.stored
        self._wanted[(client, message.request)] = stored
        if stored.object_id in self.store.objects:
            return self._put(s.PinRequested(client, message.request, stored.object_id))
        return self._pull(client, message.request, stored)

    def _pull(self, client: str, request: int, stored: m.StoredValue) -> Commands:
        others = [node_id for node_id in stored.node_ids if node_id != self.node_id]
        if not others:
            text = f"object {stored.object_id} is not on node {self.node_id} any more, and no other node has a copy"
            return self._refuse(client, request, "lost", text, gone=stored.node_ids)
        commands: Commands = []
        if stored.owner is not None:
            self._owners[stored.object_id] = stored.owner
            # Its copies here go with it, even if the node that they came from is no more.
            commands += self._watch(stored.owner)
        event = t.PullRequested(f"{client}/{request}", stored.object_id, others, stored.size_bytes)
        return commands + self._transfer(event)

    def _refuse(
        self, client: str, request: int, kind: str, text: str, *, gone: list[str], dead: list[str] | None = None
    ) -> Commands:
        self._wanted.pop((client, request), None)
        return [Send(Address(self.node_id, client), m.StoreFailed(request, kind, text, gone, dead or []))]

    # --- events of the shell

    def store_event(self, event: s.StoreEvent, now_s: float) -> Commands:
        """The disk or the clock has something for the store."""
        self._now_s = now_s
        return self._put(event)

    def pages_reserved(self, event: PagesReserved, now_s: float) -> Commands:
        """The arena has the pages of a create."""
        self._now_s = now_s
        if event.client.startswith(_PULL):
            return self._transfer(t.RoomGranted(event.object_id, event.offset))
        return [Send(Address(self.node_id, event.client), m.ObjectCreated(event.request, event.offset))]

    def process_left(self, process_id: str, now_s: float) -> Commands:
        """A process ended, or cannot be reached: its pins go, and the objects that it owned."""
        self._now_s = now_s
        commands: Commands = []
        for client, request in [key for key in self._wanted if key[0] == process_id]:
            object_id = self._wanted.pop((client, request)).object_id
            commands += self._transfer(t.PullCancelled(f"{client}/{request}", object_id))
            if object_id not in self.pulls.pulls:
                self._owners.pop(object_id, None)
        return commands + self._put(s.ClientGone(process_id)) + self._free_all(process_id + ".")

    def job_ended(self, job_id: str, now_s: float) -> Commands:
        """A job is over: what its channels left here goes, which no process owned."""
        self._now_s = now_s
        return self._free_all(job_id + "-")

    def fenced(self, process_ids: set[str]) -> Commands:
        """The others have given up what is here; only these processes, which are here, still know their objects."""
        owner_by_name = {name: name.partition(".")[0] for name in self.store.objects}
        # What queues hold has the name of a queue, which has a hyphen, and no owner.
        names = [name for name, owner in owner_by_name.items() if "-" not in owner and owner not in process_ids]
        return [command for object_id in names for command in self._free(object_id)]

    def node_lost(self, node_id: str, now_s: float) -> Commands:
        """Another node is gone."""
        self._now_s = now_s
        return self._transfer(t.PeerLost(node_id))

    def time_passed(self, now_s: float) -> Commands:
        """A tick of the clock."""
        self._now_s = now_s
        return self._put(s.Tick()) + self._transfer(t.TimePassed())

    def counts_by_state(self) -> dict[str, float]:
        """Figures for people."""
        states = [item.state for item in self.store.objects.values()]
        return {
            "objects": float(len(states)),
            "objects_creating": float(states.count(State.CREATING)),
            "objects_spilling": float(states.count(State.SPILLING)),
            "objects_spilled": float(states.count(State.SPILLED)),
            "pulls": float(sum(pull.phase is Phase.FETCHING for pull in self.pulls.pulls.values())),
            "servings": float(len(self.servings.serving_by_number)),
        }

    # --- the parts' commands

    def _put(self, event: s.StoreEvent) -> Commands:
        commands: Commands = []
        for command in self.store.handle(event, self._now_s):
            commands += self._store_command(command)
        return commands

    def _store_command(self, command: s.StoreCommand) -> Commands:
        if isinstance(command, s.GrantCreate):
            return [
                ReservePages(command.client, command.request, command.object_id, command.offset, command.size_bytes)
            ]
        if isinstance(command, s.GrantPin):
            return self._pin_granted(command)
        if isinstance(command, (s.ReplyAlreadyExists, s.RefuseCreate)):
            return self._create_refused(command)
        if isinstance(command, (s.ReplyMissing, s.RefusePin)):
            return self._pin_refused(command)
        if isinstance(command, s.ReportGone):
            owner = command.owner
            return [Send(owner, r.CopyGone(command.object_id, command.text))] if owner is not None else []
        return [command]  # the disk's

    def _pin_granted(self, command: s.GrantPin) -> Commands:
        if command.client.startswith(_SERVE):
            return self._serve(t.ServingPinned(command.request, command.object_id, command.offset, command.size_bytes))
        if self._wanted.pop((command.client, command.request), None) is None:
            return self._put(s.Unpinned(command.client, [command.object_id]))
        message = m.ObjectPinned(command.request, command.offset, command.size_bytes, command.is_scarce)
        return [Send(Address(self.node_id, command.client), message)]

    def _create_refused(self, command: s.ReplyAlreadyExists | s.RefuseCreate) -> Commands:
        is_known = isinstance(command, s.ReplyAlreadyExists)
        if command.client.startswith(_PULL):
            if isinstance(command, s.RefuseCreate):
                return self._transfer(t.RoomRefused(command.object_id, command.kind.value, command.text))
            return self._transfer(t.FoundHere(command.object_id))
        kind = "exists" if is_known else command.kind.value  # type: ignore[union-attr]
        text = "the object exists" if is_known else command.text  # type: ignore[union-attr]
        return [Send(Address(self.node_id, command.client), m.StoreFailed(command.request, kind, text))]

    def _pin_refused(self, command: s.ReplyMissing | s.RefusePin) -> Commands:
        is_gone = isinstance(command, s.ReplyMissing)
        if not is_gone and not command.client.startswith(_SERVE):
            # Its file stays as long as the object does, which whoever asks keeps alive.
            self._wanted.pop((command.client, command.request), None)
            return [Send(Address(self.node_id, command.client), m.ObjectOnDisk(command.request))]
        if command.client.startswith(_SERVE):
            return self._serve(t.ServingRefused(command.request, is_gone, command.text))
        stored = self._wanted.get((command.client, command.request))
        item = self.store.objects.get(stored.object_id) if stored is not None else None
        # Let go of everywhere, but still read or written here: a pull would find just that, for ever.
        is_freed = item is not None and item.is_freed
        has_others = stored is not None and any(node_id != self.node_id for node_id in stored.node_ids)
        if is_gone and stored is not None and has_others and not is_freed:
            return self._pull(command.client, command.request, stored)
        kind = "lost" if is_gone else command.kind.value  # type: ignore[union-attr]
        gone = [self.node_id] if is_gone else []
        return self._refuse(command.client, command.request, kind, command.text, gone=gone)

    def _transfer(self, event: t.TransferEvent) -> Commands:
        commands: Commands = []
        if not isinstance(event, _PULLS_ALONE):
            commands += self._serve(event)
        for command in self.pulls.handle(event, self._now_s):
            commands += self._transfer_command(command)
        return commands

    def _serve(self, event: t.TransferEvent) -> Commands:
        commands: Commands = []
        for command in self.servings.handle(event, self._now_s):
            commands += self._transfer_command(command)
        return commands

    def _transfer_command(self, command: t.TransferCommand) -> Commands:
        if isinstance(command, t.SendToNode):
            return [Send(Address(command.node_id, command.node_id), command.message)]
        if isinstance(command, t.AllocateForPull):
            return self._create_for_pull(command)
        if isinstance(command, t.SealPull):
            return self._put(s.ObjectSealed(_PULL, command.object_id))
        if isinstance(command, t.AbortPull):
            return self._put(s.ObjectAborted(_PULL, command.object_id))
        if isinstance(command, t.PinForServing):
            return self._put(s.PinRequested(_SERVE, command.serving, command.object_id))
        if isinstance(command, t.UnpinForServing):
            return self._put(s.Unpinned(_SERVE, [command.object_id]))
        if isinstance(command, (t.ReportPulled, t.ReportPullFailed)):
            return self._pull_ended(command)
        return [command]  # the arena's: WriteChunk, ReadChunk

    def _create_for_pull(self, command: t.AllocateForPull) -> Commands:
        object_id, owner = command.object_id, self._owners.get(command.object_id)
        if owner is not None and self._has_ended(owner):
            text = f"object {object_id} is not copied here: the process {owner.process_id} that owned it has ended"
            return self._transfer(t.RoomRefused(object_id, s.Refusal.FREED.value, text))
        # Again: it may have ended since the pull was begun, when there was nothing here yet to let go.
        watch = self._watch(owner) if owner is not None else []
        event = s.ObjectCreateRequested(_PULL, 0, object_id, command.size_bytes, False, owner=owner)
        return [*watch, *self._put(event)]

    def _pull_ended(self, command: t.ReportPulled | t.ReportPullFailed) -> Commands:
        commands: Commands = []
        owner = self._owners.pop(command.object_id, None)
        if owner is not None and isinstance(command, t.ReportPulled):
            commands.append(Send(owner, r.CopyMade(command.object_id)))
        for requester in command.requesters:
            client, _, request = requester.partition("/")
            if isinstance(command, t.ReportPulled):
                commands += self._put(s.PinRequested(client, int(request), command.object_id))
            else:
                gone = [*command.gone, self.node_id]  # it was asked for elsewhere because it is not here
                failure = command.kind, command.text
                commands += self._refuse(client, int(request), *failure, gone=gone, dead=command.dead)
        return commands


# What those who serve transfers need not hear.
_PULLS_ALONE = (t.PullRequested, t.PullCancelled, t.RoomGranted, t.RoomRefused, t.FoundHere)
_TRANSFER_MESSAGES = frozenset(
    {t.OpenTransfer, t.TransferOpened, t.TransferRefused, t.SendChunk, t.ChunkData, t.CloseTransfer}
)
