"""What this node has told the control store, and tells it again when the store has lost its memory. Pure.

It is kept by listening to the operations that the node calls, and to what the change feed says of actors, so that no
part of the node has to think of it. Only what lives is kept: the jobs of this node's drivers, and the actors that its
processes made.
"""

from __future__ import annotations

from typing import Any

from clusterpool.core.messages import ActorPart, Address

# Above this the creation of a detached actor is not kept for that unlikely day: it can then not be made again when it
# dies after it.
CREATION_BYTES_MAX = 1 << 20


class _ActorFact:
    __slots__ = ("actor", "address", "creation", "life")

    def __init__(self, actor: ActorPart, creation: bytes) -> None:
        self.actor = actor
        self.creation = creation if len(creation) <= CREATION_BYTES_MAX else b""
        self.address: Address | None = None  # None: it has not begun to live
        self.life = 0


class StoreFacts:
    """Of one node."""

    def __init__(self) -> None:
        self._jobs: dict[str, dict[str, Any]] = {}  # arguments of register_job, by job id
        self._actors: dict[str, _ActorFact] = {}

    def __len__(self) -> int:
        return len(self._jobs) + len(self._actors)

    def called(self, operation: str, arguments: dict[str, Any]) -> None:
        """The node calls this operation of the control store."""
        if operation == "register_job":
            self._jobs[arguments["job"].job_id] = arguments
        elif operation == "finish_job":
            self._jobs.pop(arguments["job_id"], None)
        elif operation == "create_actor":
            actor = arguments["actor"]
            self._actors[actor.actor_id] = _ActorFact(actor, arguments.get("creation", b""))
        elif operation == "start_life":
            self._lives(arguments["actor_id"], arguments["address"], arguments["life"])
        elif operation in ("bury_actor", "retire_actor"):
            self.forget(arguments["actor_id"])
        elif operation == "end_actors":
            for actor_id in arguments["actor_ids"]:
                self.forget(actor_id)
        elif operation == "update_actor" and arguments["actor"].state == "dead":
            self.forget(arguments["actor"].actor_id)

    def actor_changed(self, actor_id: str, state: str, address: Address | None, life: int) -> None:
        """The change feed says so; `life`: -1 if it does not say which."""
        if state == "dead":
            self.forget(actor_id)
        elif state == "alive" and address is not None:
            self._lives(actor_id, address, life)
        elif state == "restarting":
            self._lives(actor_id, None, life)

    def forget(self, actor_id: str) -> None:
        """It is dead, or was never made."""
        self._actors.pop(actor_id, None)

    @property
    def job_ids(self) -> list[str]:
        """The running jobs whose drivers are here."""
        return list(self._jobs)

    def restore(self) -> list[tuple[str, dict[str, Any]]]:
        """The operations that tell it all again, with their arguments."""
        calls: list[tuple[str, dict[str, Any]]] = [("register_job", job) for job in self._jobs.values()]
        for fact in self._actors.values():
            arguments = {
                "actor": fact.actor, "creation": fact.creation, "life": fact.life, "address": fact.address
            }  # fmt: skip
            calls.append(("restore_actor", arguments))
        return calls

    def _lives(self, actor_id: str, address: Address | None, life: int) -> None:
        fact = self._actors.get(actor_id)
        if fact is not None and (life >= fact.life or life < 0):
            fact.life, fact.address = max(life, fact.life), address
