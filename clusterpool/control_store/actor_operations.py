"""The actors' half of the control store: names, lives, and what a new life starts from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from clusterpool.control_store import actor_scripts as scripts
from clusterpool.control_store.keys import Keys
from clusterpool.control_store.port import DEAD, ActorDefinition, ActorEntry, CallLog
from clusterpool.control_store.scripts import Script, new_request
from clusterpool.control_store.unreadable import OnUnreadable, number_or_zero, skipped_if_unreadable
from clusterpool.errors import NameTaken

# Why an actor died can be asked for this long.
DEAD_ACTOR_TTL_S = 3600
# A server is slow for everybody while it copies one huge value.
CHECKPOINT_CHUNK_BYTES = 4 << 20
# Chunks of a checkpoint that nobody came to complete go after this time.
CHUNK_TTL_S = 600


class ActorOperations:
    """Mixed into ControlStore, which brings the connection."""

    address: str
    keys: Keys
    on_unreadable: OnUnreadable
    _client: Any

    def _run(self, *command: Any) -> Any:
        raise NotImplementedError

    def _run_all(self, commands: Sequence[tuple[Any, ...]], *, at_once: bool) -> list[Any]:
        raise NotImplementedError

    def _change(self, script: Script, keys: tuple[str, ...], *arguments: Any) -> Any:
        raise NotImplementedError

    # --- names and states

    def create_actor(self, actor: ActorDefinition, *, state: str = "pending", keeper: str = "") -> None:
        """As in the port."""
        if state == DEAD:
            raise ValueError("an actor cannot be created dead")
        arguments = (*_definition(actor), state, keeper)
        holder = self._change(scripts.CREATE_ACTOR, self._actor_keys(actor.actor_id), *arguments)
        if holder:
            raise NameTaken(
                f"the name {actor.name!r} in namespace {actor.namespace!r} belongs to the living actor "
                f"{holder.decode()}; use get_actor to call that one, kill it first, or choose another name or namespace"
            )

    def restore_actor(
        self, actor: ActorDefinition, *, keeper: tuple[str, int], life: int = 0, address: str = ""
    ) -> bool:
        """As in the port."""
        arguments = (*_definition(actor), f"{keeper[0]}:{keeper[1]}", life, address)
        return bool(self._change(scripts.RESTORE_ACTOR, self._actor_keys(actor.actor_id), *arguments))

    def update_actor(
        self,
        actor_id: str,
        expected_states: Collection[str],
        new_state: str,
        fields: Mapping[str, str] | None = None,
    ) -> bool:
        """As in the port."""
        pairs = [text for item in (fields or {}).items() for text in item]
        arguments = (
            actor_id,
            new_request(),
            new_state,
            DEAD_ACTOR_TTL_S,
            len(expected_states),
            *expected_states,
            *pairs,
        )
        return bool(self._change(scripts.UPDATE_ACTOR, self._actor_keys(actor_id), *arguments))

    def get_actor(self, actor_id: str) -> ActorEntry | None:
        """As in the port."""
        return self._actor_entry(actor_id, self._run("HGETALL", self.keys.actor(actor_id)))

    def find_actor(self, namespace: str, name: str) -> ActorEntry | None:
        """As in the port."""
        actor_id = self._run("HGET", self.keys.actor_names, _name_field(namespace, name))
        return self.get_actor(actor_id.decode(errors="backslashreplace")) if actor_id else None

    def list_actors(self) -> list[ActorEntry]:
        """As in the port."""
        members = self._run("SMEMBERS", self.keys.actors)
        actor_ids = sorted(actor_id.decode(errors="backslashreplace") for actor_id in members)
        answers = self._run_all([("HGETALL", self.keys.actor(actor_id)) for actor_id in actor_ids], at_once=False)
        entries = (self._actor_entry(actor_id, answer) for actor_id, answer in zip(actor_ids, answers, strict=True))
        # Between the two questions an actor may have died.
        return [entry for entry in entries if entry is not None and entry.state != DEAD]

    def _actor_entry(self, actor_id: str, answer: dict[bytes, bytes]) -> ActorEntry | None:
        if not answer:
            return None
        prefix = b"field:"
        with skipped_if_unreadable("actors", actor_id, self.on_unreadable):
            return ActorEntry(
                actor_id=actor_id,
                state=answer[b"state"].decode(),
                name=answer[b"name"].decode(),
                namespace=answer[b"namespace"].decode(),
                record=answer[b"record"],
                fields={
                    name.removeprefix(prefix).decode(): value.decode(errors="replace")
                    for name, value in answer.items()
                    if name.startswith(prefix)
                },
            )
        return None

    def _actor_keys(self, actor_id: str) -> tuple[str, ...]:
        keys = self.keys
        return (
            keys.events,
            keys.event_number,
            keys.actor_names,
            keys.actors,
            keys.actor(actor_id),
            keys.actor_keepers,
            keys.actor_creation(actor_id),
            keys.actor_log(actor_id),
            keys.node_incarnations,
        )

    # --- lives

    def start_life(self, actor_id: str, life: int, address: str, *, keeper: str = "") -> bool:
        """As in the port."""
        answer = self._change(scripts.START_LIFE, self._actor_keys(actor_id), actor_id, life, address, keeper)
        return bool(answer)

    def end_life(self, actor_id: str, life: int, text: str, *, teller: str, keeper: str = "", address: str = "") -> str:
        """As in the port."""
        # Not random: whoever did not get the answer asks again.
        request = f"{teller} {keeper} {life}"
        arguments = (actor_id, request, life, text, teller, keeper, DEAD_ACTOR_TTL_S, address)
        answer: bytes = self._change(scripts.END_LIFE, self._actor_keys(actor_id), *arguments)
        return answer.decode()

    def orphaned_actors(self, living: Collection[str] = ()) -> dict[str, str]:
        """As in the port."""
        tables = (self.keys.actor_keepers, self.keys.node_incarnations)
        keepers, incarnations = self._run_all([("HGETALL", key) for key in tables], at_once=True)
        orphans = {}
        for actor_id, keeper in keepers.items():
            node_id, _, incarnation = keeper.rpartition(b":")
            is_there = incarnation == b"0" or incarnations.get(node_id) == incarnation
            if not is_there and keeper.decode(errors="backslashreplace") not in living:
                orphans[actor_id.decode(errors="backslashreplace")] = node_id.decode(errors="backslashreplace")
        return dict(sorted(orphans.items()))

    def get_creation(self, actor_id: str) -> bytes:
        """As in the port."""
        return self._run("GET", self.keys.actor_creation(actor_id)) or b""

    # --- checkpoints, and the calls since

    def append_calls(self, actor_id: str, life: int, first: int, calls: Sequence[bytes]) -> str:
        """As in the port."""
        keys = self._actor_keys(actor_id)
        answer: bytes = self._change(scripts.APPEND_CALLS, keys, life, first, *calls)
        return answer.decode()

    def store_checkpoint(self, actor_id: str, life: int, calls: int, content: bytes) -> str:
        """As in the port."""
        starts = range(0, len(content), CHECKPOINT_CHUNK_BYTES)
        for number, start in enumerate(starts):
            key = self.keys.actor_checkpoint_chunk(actor_id, calls, number)
            self._run("SET", key, content[start : start + CHECKPOINT_CHUNK_BYTES], "EX", CHUNK_TTL_S)
        # Last, so that a checkpoint that can be found is complete; in the same step the calls that it covers go.
        answer: bytes = self._change(scripts.STORE_CHECKPOINT, self._actor_keys(actor_id), life, calls, len(starts))
        return answer.decode()

    def load_calls(self, actor_id: str) -> CallLog:
        """As in the port."""
        names = ("calls", "checkpoint_calls", "checkpoint_chunks")
        state, *fields = self._run("HMGET", self.keys.actor(actor_id), "state", *names)
        # Of one that was restored after a loss of memory, until a checkpoint has told what it had done.
        is_unknown = fields[0] == b"-1"
        fields[0] = b"0" if is_unknown else fields[0]
        logged, calls, count = (number_or_zero(field, "actors", self.on_unreadable) for field in fields)
        count = min(count, scripts.CHUNKS_MAX)
        keys = [self.keys.actor_checkpoint_chunk(actor_id, calls, number) for number in range(count)]
        chunks = [self._run("GET", key) for key in keys]
        log_key = self.keys.actor_log(actor_id)
        log = self._run("LRANGE", log_key, 0, -1)
        lost = ""
        if None in chunks:
            lost = lost_text(f"the checkpoint that covers its first {calls} calls", keys[chunks.index(None)])
        elif (len(log) != logged - calls or is_unknown) and state not in (None, DEAD.encode()):
            left = "nobody knows how many" if is_unknown else f"{len(log)} are left of {logged - calls}"
            lost = lost_text(f"calls that had been acknowledged ({left})", log_key)
        return CallLog(b"".join(chunk or b"" for chunk in chunks), calls, log, lost)


def lost_text(what: str, key: str) -> str:
    """Why an actor with checkpoints cannot go on."""
    return (
        f"what it had done is lost: the control store no longer has {what}, key {key}. Was the store emptied or set "
        "back, has another program with its password removed or overwritten the key (the nodes' logs then say what "
        "they found there), or does the server evict keys (its maxmemory-policy must be noeviction)?"
    )


def _definition(actor: ActorDefinition) -> tuple[Any, ...]:
    """Their first ARGV, of the scripts that enter an actor."""
    actor_id, record, name, namespace, restarts, is_detached, creation = actor
    name_field = _name_field(namespace, name) if name else ""
    return actor_id, name_field, name, namespace, record, restarts, int(is_detached), creation


def _name_field(namespace: str, name: str) -> str:
    # JSON, because any separator could be part of a name.
    return msgspec.json.encode([namespace, name]).decode()
