"""What a node asks the control store about actors, in the words of its machine: ActorParts in, ActorParts out."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import msgspec

from clusterpool.control_store.actor_operations import lost_text
from clusterpool.control_store.port import ActorDefinition, ActorEntry
from clusterpool.control_store.unreadable import rejection, sendable, skipped_if_unreadable, whole_number
from clusterpool.core import messages as m
from clusterpool.core import node_events as e
from clusterpool.core.actor_messages import ActorCheckpoint, LoggedCall
from clusterpool.core.messages import Address

_LIVING = ("pending", "alive", "restarting")


class ActorRegistry:
    """The operations of CallStore that are about actors; in the store's thread."""

    def __init__(self, store: Any, node_id: str, post: Callable[[Any], None]) -> None:
        self._store = store
        self._node_id = node_id
        self._post = post

    def _changed(self, actor_id: str, state: str, address: Address | None = None, life: int = -1) -> None:
        # A lone node does not follow the feed; in a cluster hearing it twice does no harm.
        self._post(e.ActorEventRead(actor_id, state, address, life))

    def create_actor(self, actor: m.ActorPart, creation: bytes) -> None:
        """Register an actor that one of our processes, or we, will make. Raises: NameTaken."""
        if actor.name:
            self.find_actor(actor.namespace, actor.name)  # frees the name if its holder's node is gone
        self._store.create_actor(_definition(actor, creation), state=actor.state, keeper=self._node_id)
        self._changed(actor.actor_id, actor.state)

    def restore_actor(
        self, actor: m.ActorPart, creation: bytes, life: int, address: Address | None, keeper: tuple[str, int]
    ) -> None:
        """The store has lost its memory: tell it of a living actor, unless it knows it. keeper: a node in its life."""
        is_new = self._store.restore_actor(
            _definition(actor, creation), keeper=keeper, life=life, address=_text_of(address)
        )
        if is_new:
            self._changed(actor.actor_id, "")

    def update_actor(self, actor: m.ActorPart) -> None:
        """What the creator says of it."""
        fields = {"address": _text_of(actor.address), "text": actor.text}
        if actor.error:
            fields["error"] = base64.b64encode(actor.error).decode()
        self._store.update_actor(actor.actor_id, (), actor.state, fields)
        self._changed(actor.actor_id, actor.state, actor.address)

    def bury_actor(self, actor_id: str, text: str, error: str) -> None:
        """It shall not come again."""
        self._store.update_actor(actor_id, _LIVING, "dead", {"address": "", "text": text, "error": error})
        self._changed(actor_id, "dead")

    def end_actors(self, actor_ids: list[str], text: str) -> None:
        """Their creator has ended."""
        for actor_id in actor_ids:
            self.bury_actor(actor_id, text, "")

    def retire_actor(self, actor_id: str, address: Address, text: str) -> None:
        """The process at `address` has ended of its own will."""
        actor = self.get_actor(actor_id)
        if actor is not None and actor.address == address:
            self.bury_actor(actor_id, text, "")

    def start_life(self, actor_id: str, life: int, address: Address, is_kept: bool) -> bool:
        """It lives there; `is_kept`: the node there answers for it from now on."""
        keeper = address.node_id if is_kept else ""
        is_started: bool = self._store.start_life(actor_id, life, _text_of(address), keeper=keeper)
        self._changed(actor_id, "alive", address, life)
        return is_started

    def end_life(
        self, actor_id: str, life: int, text: str, teller: str, address: Address | None
    ) -> tuple[str, m.ActorPart, bytes] | None:
        """Its outcome, the actor as it is now, and how to make it if that is for us to do."""
        outcome = self._store.end_life(
            actor_id, life, text, teller=teller, keeper=self._node_id, address=_text_of(address)
        )
        actor = self.get_actor(actor_id)
        if actor is None:
            return None
        creation = self._store.get_creation(actor_id) if outcome == "restart" and actor.detached else b""
        if outcome != "none":
            self._changed(actor_id, actor.state, life=actor.life)
        return outcome, actor, creation

    def append_calls(self, actor_id: str, life: int, first: int, calls: list[bytes]) -> str:
        """As in the port."""
        answer: str = self._store.append_calls(actor_id, life, first, calls)
        return answer

    def store_checkpoint(self, actor_id: str, life: int, calls: int, content: bytes) -> str:
        """As in the port."""
        answer: str = self._store.store_checkpoint(actor_id, life, calls, content)
        return answer

    def load_calls(self, actor_id: str) -> tuple[bytes, int, list[bytes], str]:
        """As in the port; it is lost, too, if nobody can read it."""
        checkpoint, calls, entries, lost = self._store.load_calls(actor_id)
        try:
            if checkpoint and not lost:
                msgspec.msgpack.decode(checkpoint, type=ActorCheckpoint)
            for entry in entries:
                msgspec.msgpack.decode(entry, type=LoggedCall)
        except (msgspec.MsgspecError, RecursionError) as exc:
            self._unreadable("actor_log", f"{actor_id!r}: {exc}")
            lost = lost or lost_text(f"calls or a checkpoint that can be read ({exc})", f"actor_log:{actor_id}")
        return checkpoint, calls, entries, lost

    def adopt_orphans(self, living: list[str]) -> list[tuple[str, m.ActorPart, bytes]]:
        """Those detached actors that we are to make again now, their nodes being gone. living: as in the port."""
        adopted = []
        for actor_id, keeper in self._store.orphaned_actors(living).items():
            actor = self.get_actor(actor_id)
            if actor is None:
                continue
            where = f"its node {keeper}" if actor.address is not None else f"the node {keeper} that made it"
            text = f"{where} is gone" if actor.detached else f"the node of its creator is gone: {keeper}"
            ended = self.end_life(actor_id, actor.life, text, "orphan", None)
            if ended is not None and ended[0] == "restart":
                adopted.append(ended)
        return adopted

    def find_actor(self, namespace: str, name: str) -> m.ActorPart | None:
        """The living actor of this name."""
        actor = self._actor_of_entry(self._store.find_actor(namespace, name))
        if actor is None or actor.address is None or actor.address.node_id == self._node_id or actor.may_return:
            return actor
        living = {node.record.node_id for node in self._store.list_nodes().nodes}
        if actor.address.node_id in living:
            return actor
        # Its creator would have reported its death, but has ended as well.
        self.bury_actor(actor.actor_id, f"its node {actor.address.node_id} is gone", "")
        return None

    def get_actor(self, actor_id: str) -> m.ActorPart | None:
        """An actor that is not dead for longer than an hour."""
        return self._actor_of_entry(self._store.get_actor(actor_id))

    def _actor_of_entry(self, entry: ActorEntry | None) -> m.ActorPart | None:
        """None, too, for one that nobody can read."""
        actor = None
        if entry is not None:
            with skipped_if_unreadable("actors", entry.actor_id, self._unreadable):
                actor = sendable(_actor_of_entry(entry))
        return actor

    def _unreadable(self, kind: str, text: str) -> None:
        self._post(rejection(kind, text))


def _definition(actor: m.ActorPart, creation: bytes) -> ActorDefinition:
    return ActorDefinition(
        actor.actor_id,
        msgspec.json.encode(actor),
        actor.name,
        actor.namespace,
        actor.restarts,
        actor.detached,
        creation,
    )


def actor_event(fields: dict[str, str]) -> e.ActorEventRead:
    """An event of the change feed, as the machine hears it."""
    address, life = _address_of(fields.get("address", "")), whole_number(fields["life"]) if "life" in fields else -1
    return e.ActorEventRead(fields.get("actor_id", ""), fields.get("state", ""), address, life)


def _text_of(address: Address | None) -> str:
    return ",".join(address) if address is not None else ""


def _address_of(text: str) -> Address | None:
    node_id, _, process_id = text.partition(",")
    return Address(node_id, process_id) if process_id else None


def _actor_of_entry(entry: ActorEntry) -> m.ActorPart:
    actor = msgspec.json.decode(entry.record, type=m.ActorPart)
    fields = entry.fields
    return msgspec.structs.replace(
        actor,
        state=entry.state,
        address=_address_of(fields.get("address", "")),
        text=fields.get("text", actor.text),
        life=whole_number(fields.get("life", "0")),
        error=base64.b64decode(fields.get("error", "")),
    )
