"""The actors of the fake control store."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence

from clusterpool.control_store.port import DEAD, ActorDefinition, ActorEntry, CallLog
from clusterpool.errors import NameTaken


class Made:
    """What the store knows of an actor and does not show."""

    def __init__(self, actor: ActorDefinition) -> None:
        self.restarts = self.restarts_left = actor.restarts
        self.is_detached = actor.is_detached
        self.creation = actor.creation
        self.keeper: tuple[str, int] | None = None
        self.told: tuple[str, str] = ("", "")  # request and outcome
        self.calls = 0
        self.checkpoint: tuple[bytes, int] = (b"", 0)
        self.log: list[bytes] = []

    def copy(self) -> Made:
        """The same, as it is now."""
        other = copy.copy(self)
        other.log = list(self.log)
        return other


class FakeActors:
    """Mixed into FakeControlStore."""

    def _forget_actors(self) -> None:
        self._actor_by_id: dict[str, ActorEntry] = {}
        self._made: dict[str, Made] = {}

    def _reach(self) -> None:
        raise NotImplementedError

    def _publish(self, kind: str, fields: Mapping[str, str]) -> int:
        raise NotImplementedError

    def _incarnation_of(self, node_id: str) -> int:
        raise NotImplementedError

    def create_actor(self, actor: ActorDefinition, *, state: str = "pending", keeper: str = "") -> None:
        self._reach()
        if state == DEAD:
            raise ValueError("an actor cannot be created dead")
        if actor.actor_id in self._actor_by_id:
            return
        if actor.name and (holder := self.find_actor(actor.namespace, actor.name)) is not None:
            raise NameTaken(f"{actor.name!r} belongs to {holder.actor_id}")
        self._enter(actor, state, {"life": "0"})
        if keeper:
            self._keep(actor.actor_id, keeper)

    def restore_actor(
        self, actor: ActorDefinition, *, keeper: tuple[str, int], life: int = 0, address: str = ""
    ) -> bool:
        self._reach()
        if actor.actor_id in self._actor_by_id:
            return False
        if actor.name and self.find_actor(actor.namespace, actor.name) is not None:
            actor = actor._replace(name="")
        state = "alive" if address else "restarting" if life else "pending"
        made = self._enter(actor, state, {"life": str(life), "address": address})
        made.keeper = keeper
        if state != "pending":
            made.calls = -1
        if actor.restarts > 0:
            made.restarts_left = max(0, actor.restarts - life)
        return True

    def _enter(self, actor: ActorDefinition, state: str, fields: dict[str, str]) -> Made:
        actor_id, record, name, namespace, *_ = actor
        self._actor_by_id[actor_id] = ActorEntry(actor_id, state, name, namespace, record, fields)
        self._made[actor_id] = Made(actor)
        told = {"actor_id": actor_id, "state": state, "name": name, "namespace": namespace}
        self._publish("actor_created", told)
        return self._made[actor_id]

    def _keep(self, actor_id: str, keeper: str) -> None:
        self._made[actor_id].keeper = (keeper, self._incarnation_of(keeper))

    def update_actor(
        self,
        actor_id: str,
        expected_states: Collection[str],
        new_state: str,
        fields: Mapping[str, str] | None = None,
    ) -> bool:
        self._reach()
        entry = self._actor_by_id.get(actor_id)
        if entry is None or (entry.state == DEAD and new_state != DEAD):
            return False
        if expected_states and entry.state not in expected_states:
            return False
        self._set(entry, new_state, dict(fields or {}), dict(fields or {}))
        return True

    def _set(self, entry: ActorEntry, state: str, fields: dict[str, str], told: dict[str, str]) -> None:
        self._actor_by_id[entry.actor_id] = entry._replace(state=state, fields=entry.fields | fields)
        if state == DEAD:
            made = self._made[entry.actor_id]
            made.creation, made.checkpoint, made.log = b"", (b"", 0), []
        event = {"actor_id": entry.actor_id, "state": state, "previous_state": entry.state, **told}
        self._publish("actor_changed", event)

    def get_actor(self, actor_id: str) -> ActorEntry | None:
        self._reach()
        return self._actor_by_id.get(actor_id)

    def find_actor(self, namespace: str, name: str) -> ActorEntry | None:
        for entry in self.list_actors():
            if name and (entry.namespace, entry.name) == (namespace, name):
                return entry
        return None

    def list_actors(self) -> list[ActorEntry]:
        self._reach()
        return [entry for _, entry in sorted(self._actor_by_id.items()) if entry.state != DEAD]

    # Lives

    def start_life(self, actor_id: str, life: int, address: str, *, keeper: str = "") -> bool:
        self._reach()
        entry = self._actor_by_id.get(actor_id)
        if entry is None or entry.state == DEAD or entry.fields["life"] != str(life):
            return False
        if entry.state == "alive":
            return entry.fields.get("address") == address
        if keeper:
            self._keep(actor_id, keeper)
        self._set(entry, "alive", {"address": address}, {"address": address, "life": str(life)})
        return True

    def end_life(self, actor_id: str, life: int, text: str, *, teller: str, keeper: str = "", address: str = "") -> str:
        self._reach()
        entry, made = self._actor_by_id.get(actor_id), self._made.get(actor_id)
        if entry is None or made is None:
            return "none"
        request, current = f"{teller} {keeper} {life}", int(entry.fields["life"])
        is_as_left = entry.state == DEAD or (entry.state == "restarting" and current == life + 1)
        if made.told[0] == request and is_as_left:
            return made.told[1]
        if entry.state == DEAD or current != life:
            return "none"
        there = entry.fields.get("address", "")
        if address and there != address and not (made.is_detached and not there):
            return "none"
        if teller == "host" and not made.is_detached and made.restarts:
            return "none"
        left = made.restarts_left
        if teller == "orphan":
            if actor_id not in self.orphaned_actors():
                return "none"
            left = left if made.is_detached else 0
        if made.is_detached and not self._incarnation_of(keeper):
            return "none"
        outcome = "restart" if left else "dead"
        made.told = (request, outcome)
        history = entry.fields.get("history", "")
        if outcome == "dead":
            text = text + ("; it had been started again after: " + history[:-1] if history else "")
            self._set(entry, DEAD, {"address": "", "text": text}, {"life": str(current)})
            return outcome
        made.restarts_left -= left > 0
        if keeper:
            self._keep(actor_id, keeper)
        fields = {"address": "", "text": text, "life": str(life + 1), "history": f"{history}{text}\n"}
        self._set(entry, "restarting", fields, {"life": str(life + 1)})
        return outcome

    def orphaned_actors(self, living: Collection[str] = ()) -> dict[str, str]:
        self._reach()
        return {
            entry.actor_id: keeper[0]
            for entry in self.list_actors()
            if (keeper := self._made[entry.actor_id].keeper) is not None
            and keeper[1] != 0
            and self._incarnation_of(keeper[0]) != keeper[1]
            and f"{keeper[0]}:{keeper[1]}" not in living
        }

    def get_creation(self, actor_id: str) -> bytes:
        self._reach()
        made = self._made.get(actor_id)
        return made.creation if made is not None else b""

    # Checkpoints

    def _refusal(self, actor_id: str, life: int) -> str:
        self._reach()
        entry = self._actor_by_id.get(actor_id)
        if entry is None or entry.state == DEAD:
            return "gone"
        return "" if entry.fields["life"] == str(life) else "fenced"

    def append_calls(self, actor_id: str, life: int, first: int, calls: Sequence[bytes]) -> str:
        if refusal := self._refusal(actor_id, life):
            return refusal
        made = self._made[actor_id]
        if first > made.calls + 1 or len(made.log) != made.calls - made.checkpoint[1]:
            return "gap"
        new = list(calls)[made.calls + 1 - first :]
        made.log += new
        made.calls += len(new)
        return "ok"

    def store_checkpoint(self, actor_id: str, life: int, calls: int, content: bytes) -> str:
        if refusal := self._refusal(actor_id, life):
            return refusal
        made = self._made[actor_id]
        made.log = made.log[calls - made.checkpoint[1] :] if made.calls > calls else []
        made.checkpoint = (content, calls)
        made.calls = max(made.calls, calls)
        return "ok"

    def load_calls(self, actor_id: str) -> CallLog:
        self._reach()
        made = self._made.get(actor_id)
        if made is None:
            return CallLog(b"", 0, [])
        is_lost = len(made.log) != made.calls - made.checkpoint[1] and self._actor_by_id[actor_id].state != DEAD
        return CallLog(*made.checkpoint, list(made.log), "calls are lost" if is_lost else "")
