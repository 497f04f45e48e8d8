"""What the calls of simulated actors have really done, and what their callers may be told of it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from clusterpool.core.messages import TaskKind, TaskSpec
from clusterpool.simulation.actors import call_value
from clusterpool.simulation.programs import Operation, Outcome, decode_operation

if TYPE_CHECKING:
    from clusterpool.simulation.client import Client
    from clusterpool.simulation.worker import Worker
    from clusterpool.simulation.world import World


class Promise(NamedTuple):
    """What the maker of an actor has asked for."""

    restarts: int = 0
    retries: int = 0
    is_logged: bool = False
    is_detached: bool = False


class ActorLedger:
    """Of one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._promises: dict[str, Promise] = {}
        self.killed: set[str] = set()  # by what programs ask for; membership only
        self.has_detached = False  # whether any actor outlives its driver
        self._last: dict[tuple[str, str], int] = {}  # by worker and caller, the last call that began
        self._starts: Counter[tuple[str, str, int]] = Counter()  # by actor, caller and index; without replays
        self._workers: dict[str, set[str]] = {}  # by actor, where it lived; counted only

    def promised(self, actor_id: str, promise: Promise) -> None:
        """An actor is being made."""
        self._promises[actor_id] = promise
        self.has_detached = self.has_detached or promise.is_detached

    def is_detached(self, actor_id: str) -> bool:
        """Whether it outlives its driver."""
        return self._promises[actor_id].is_detached

    def lives(self, actor_id: str) -> int:
        """In how many processes calls of it have begun."""
        return len(self._workers.get(actor_id, ()))

    def started(self, worker: Worker, spec: TaskSpec) -> None:
        """A worker begins a call, for its caller."""
        if spec.kind != TaskKind.ACTOR_CALL:
            return
        operation = self._in_order(worker, spec)
        actor = worker.actor
        assert actor is not None, "a call began before its actor was made"
        key = (actor.actor_id, operation.caller, operation.index)
        self._starts[key] += 1
        promise = self._promises[actor.actor_id]
        most = 1 if promise.restarts == 0 and not promise.is_detached else 1 + promise.retries
        self._world.monitor.check(
            promise.retries < 0 or self._starts[key] <= most,
            f"call {operation.index} of {operation.caller} was begun {self._starts[key]} times, {most} were allowed",
        )

    def replayed(self, worker: Worker, spec: TaskSpec) -> None:
        """A worker begins a call of its actor's log."""
        self._in_order(worker, spec)

    def _in_order(self, worker: Worker, spec: TaskSpec) -> Operation:
        operation = decode_operation(spec.payload)
        key = (worker.name, operation.caller)
        last = self._last.get(key, -1)
        self._world.monitor.check(
            operation.index > last, f"{worker.name} runs call {operation.index} of {operation.caller} after call {last}"
        )
        self._last[key] = operation.index
        if worker.actor is not None:
            self._workers.setdefault(worker.actor.actor_id, set()).add(worker.name)
        return operation


class CallJudge:
    """Judges what one caller is told of its calls to one actor, in their order."""

    def __init__(self, client: Client, actor_id: str, what: str) -> None:
        self._client = client
        self._actor_id = actor_id
        self._what = what
        self._index = 0
        self._ok = 0  # calls that gave a value
        self._last_count = -1

    def judge(self, operation: Operation, outcome: Outcome, arguments: list[int] | None = None) -> None:
        """The outcome of the next call."""
        world, index = self._client.world, self._index
        promise = world.ledger._promises[self._actor_id]
        self._index += 1
        has_lost = self._actor_id in world.evidence.void
        # What the calls before it have done to the state: all, or all that were not lost, or nothing in a new life.
        may_forget = not promise.is_logged and (promise.restarts != 0 or promise.is_detached)
        may_forget = may_forget and world.ledger.lives(self._actor_id) > 1
        least = 0 if may_forget or has_lost else self._ok
        values = [call_value(operation, count, arguments or []) for count in range(index + 1)]
        counts = [count for count, value in enumerate(values) if value == outcome.number]
        if outcome.kind == "ok" and counts:
            count = counts[0]
            is_right = count >= least and (may_forget or has_lost or count > self._last_count)
            world.monitor.check(
                is_right,
                f"{self._client.name}: {self._what} {index} found {count} calls before it, not {least} to {index}, "
                f"and the one before {self._last_count}",
            )
            self._ok += 1
            self._last_count = count
            outcome = Outcome("ok", values[index])
        wanted = Outcome("ok", values[index])
        what = f"{self._what} {index}"
        world.monitor.judge(self._client, what, outcome, wanted, subject=self._actor_id)
        if outcome.kind == "actor_died" and promise.restarts < 0:
            # The end of a process does not end an actor that may come again without limit.
            is_explained = world.evidence.is_end_of_actor(self._actor_id, outcome.text)
            world.monitor.check(is_explained, f"{what}: {outcome}, but it may come again without limit")
        if outcome.kind == "actor_unavailable":
            world.monitor.check(promise.retries >= 0, f"{what}: {outcome}, but it may be sent again without limit")
