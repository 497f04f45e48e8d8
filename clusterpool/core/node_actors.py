"""The actors' half of a node: their registry in the control store, and who waits to hear of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from clusterpool.core import messages as m
from clusterpool.core.messages import Address
from clusterpool.core.node_events import CallStore, Send, StoreRaised, StoreReturned

Commands = list[Any]
_UNKNOWN = m.ActorPart("", "", {}, None, "unknown", "no actor of this name is known")


class NodeActors:
    """Asks the control store for the processes of one node. Records there are ActorParts."""

    def __init__(self, node_id: str) -> None:
        self.node_id = node_id
        self._last_tag = 0
        self._calls: dict[int, Callable[[Any, str, str], Commands]] = {}
        self._waiting: dict[str, list[tuple[Address, int]]] = {}  # by actor id, who wants to hear when it is alive

    def call(
        self, operation: str, arguments: dict[str, Any], on_answer: Callable[[Any, str, str], Commands] | None = None
    ) -> Commands:
        """Call the control store; `on_answer(value, error_kind, error_text)`."""
        self._last_tag += 1
        if on_answer is not None:
            self._calls[self._last_tag] = on_answer
        return [CallStore(self._last_tag, operation, arguments)]

    def answered(self, event: StoreReturned | StoreRaised) -> Commands:
        """The control store has answered a call."""
        on_answer = self._calls.pop(event.tag, None)
        if on_answer is None:
            return []
        if isinstance(event, StoreReturned):
            return on_answer(event.value, "", "")
        return on_answer(None, event.kind, event.text)

    def registered(self, source: Address, message: m.RegisterActor) -> Commands:
        """A creator wants its actor known, and its name claimed."""
        actor = message.actor

        def on_created(_value: Any, kind: str, text: str) -> Commands:
            if kind == "NameTaken" and message.get_if_exists:
                return self._find(source, message.request, actor.namespace, actor.name)
            state = "taken" if kind == "NameTaken" else ("failed" if kind else "pending")
            answer = msgspec.structs.replace(actor, state=state, text=text)
            return [Send(source, m.ActorLocated(message.request, answer))]

        return self.call("create_actor", {"actor": actor}, on_created)

    def changed(self, message: m.ActorChanged) -> Commands:
        """The creator reports that its actor lives, or will not."""
        return self.call("update_actor", {"actor": message.actor})

    def located(self, source: Address, message: m.LocateActor) -> Commands:
        """Somebody has a handle, or a name, and wants an address."""
        if not message.actor_id:
            return self._find(source, message.request, message.namespace, message.name)
        return self._get(source, message.request, message.actor_id)

    def _find(self, source: Address, request: int, namespace: str, name: str) -> Commands:
        def on_found(value: Any, kind: str, text: str) -> Commands:
            actor = value if isinstance(value, m.ActorPart) else _UNKNOWN
            if kind:
                actor = msgspec.structs.replace(_UNKNOWN, text=text)
            return [Send(source, m.ActorLocated(request, actor))]

        return self.call("find_actor", {"namespace": namespace, "name": name}, on_found)

    def _get(self, source: Address, request: int, actor_id: str) -> Commands:
        def on_got(value: Any, kind: str, text: str) -> Commands:
            if isinstance(value, m.ActorPart):
                if value.state == "pending":
                    self._waiting.setdefault(actor_id, []).append((source, request))
                    return []
                return [Send(source, m.ActorLocated(request, value))]
            unknown = msgspec.structs.replace(_UNKNOWN, text=text or _UNKNOWN.text)
            return [Send(source, m.ActorLocated(request, unknown))]

        return self.call("get_actor", {"actor_id": actor_id}, on_got)

    def event_read(self, actor_id: str) -> Commands:
        """The change feed mentions an actor: those who wait for it ask again."""
        commands: Commands = []
        for source, request in self._waiting.pop(actor_id, []):
            commands += self._get(source, request, actor_id)
        return commands

    def worker_ended(self, actor_id: str, text: str) -> Commands:
        """The process that held an actor is gone."""
        if not actor_id:
            return []
        actor = m.ActorPart(actor_id, "", {}, None, "dead", text)
        return self.call("update_actor", {"actor": actor})

    def process_left(self, address: Address) -> None:
        """Forget who waited."""
        for actor_id, waiting in list(self._waiting.items()):
            left = [waiter for waiter in waiting if waiter[0] != address]
            if left:
                self._waiting[actor_id] = left
            else:
                del self._waiting[actor_id]
