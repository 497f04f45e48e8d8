"""Actors in simulated workers: the instance, and the journal of one with checkpoints, as worker/journal.py keeps it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from clusterpool.core import actor_log as log
from clusterpool.core import messages as m
from clusterpool.core.actor_messages import (
    ActorCheckpoint,
    ActorLoaded,
    CallsResumed,
    LoadActor,
    LogCalls,
    LoggedCall,
    ResultsTaken,
    SaveActor,
)
from clusterpool.core.messages import ActorPlan, Address, Message, TaskResult, TaskSpec
from clusterpool.simulation.programs import Operation, mix
from clusterpool.simulation.threads import Steps

if TYPE_CHECKING:
    from clusterpool.simulation.worker import Worker

ActorLog = log.ActorLog


class Actor:
    """The instance in a worker: counts the calls of each caller, so that one lost, doubled or out of order shows."""

    def __init__(self, actor_id: str, life: int, journal: Journal | None) -> None:
        self.actor_id = actor_id
        self.life = life
        self.journal = journal
        self.count_by_caller: dict[str, int] = {}

    def called(self, operation: Operation, arguments: list[int]) -> int:
        """The value of a call."""
        count = self.count_by_caller.get(operation.caller, 0)
        self.count_by_caller[operation.caller] = count + 1
        return call_value(operation, count, arguments)


def call_value(operation: Operation, count: int, arguments: list[int]) -> int:
    """What a call gives that came after `count` others of its caller."""
    return mix(operation.salt, operation.caller, count, *arguments)


class Journal:
    """What one life of an actor owes to the next."""

    def __init__(self, worker: Worker, plan: ActorPlan) -> None:
        self._worker = worker
        self._plan = plan
        self._log = ActorLog(plan, worker.now_s())
        self._is_loading = plan.life > 0
        self._is_over = False
        self._early: list[tuple[Address, Message]] = []

    def restore(self, actor: Actor) -> Steps:
        """Make the state what it was: the checkpoint, and the calls since."""
        if self._is_loading:
            worker, actor_id = self._worker, self._plan.actor_id
            loaded = yield from worker.ask(lambda request: LoadActor(request, actor_id), lambda: None)
            assert isinstance(loaded, ActorLoaded)
            checkpoint: ActorCheckpoint | None = None
            if loaded.checkpoint:
                checkpoint = msgspec.msgpack.decode(loaded.checkpoint, type=ActorCheckpoint)
                actor.count_by_caller = msgspec.msgpack.decode(checkpoint.state)
            self._log.load(checkpoint, loaded.calls)
            for entry in loaded.entries:
                call = msgspec.msgpack.decode(entry, type=LoggedCall)
                worker.world.ledger.replayed(worker, call.spec)
                result = yield from worker.result_of(call.owner, call.spec)
                self._log.replayed(call.owner, entry, result)
        self._is_loading = False
        early, self._early = [*self._worker.early, *self._early], []
        self._worker.early.clear()
        for source, message in early:
            self.message(source, message)

    def run(self, actor: Actor, owner: Address, spec: TaskSpec) -> Steps:
        """Run a call, or answer it if a former life has."""
        worker = self._worker
        known = self._log.answer_to(owner, spec.number)
        if known is not None:
            worker.drop_references(spec)
            self._send([(owner, known)])
            return
        worker.world.ledger.started(worker, spec)
        result = yield from worker.result_of(owner, spec)
        entry = log.entry_of(owner, spec, result)
        state: bytes | None = None
        if self._log.is_checkpoint_due(entry is not None, worker.now_s()):
            state = msgspec.msgpack.encode(actor.count_by_caller)
        self._handle(log.CallEnded(owner, entry, result, state))
        if len(self._log.held) > log.HELD_MAX:
            yield from self._wait(log.HELD_MAX // 2)

    def save(self, actor: Actor) -> None:
        """Take a checkpoint, though no call has ended."""
        self._worker.wants_save = False
        self._handle(log.StateSaved(msgspec.msgpack.encode(actor.count_by_caller)))

    def close(self) -> Steps:
        """Wait until all results are out."""
        yield from self._wait(0)

    def _wait(self, held_max: int) -> Steps:
        worker = self._worker

        def is_done() -> bool:
            return len(self._log.held) <= held_max or self._is_over

        while not is_done():
            yield from worker.wait_quietly(lambda: is_done() or worker.wants_save)
            if worker.wants_save and worker.actor is not None:
                self.save(worker.actor)

    def message(self, source: Address, message: Message) -> None:
        """A caller tells which results it has, or still waits for."""
        if self._is_loading:
            self._early.append((source, message))
        elif isinstance(message, ResultsTaken):
            self._handle(log.ResultsArrived(source, message.numbers, False))
        elif isinstance(message, CallsResumed):
            self._handle(log.ResultsArrived(source, message.numbers, True))

    def _handle(self, event: Any) -> None:
        for command in self._log.handle(event, self._worker.now_s()):
            self._carry_out(command)

    def _carry_out(self, command: Any) -> None:
        worker, plan = self._worker, self._plan
        if isinstance(command, log.ReleaseResults):
            self._send(command.results)
        elif isinstance(command, log.AppendCalls):
            worker.request_nowait(
                lambda request: LogCalls(request, plan.actor_id, plan.life, command.first, command.entries),
                lambda answer: self._handle(log.StoreAnswered(answer.kind)),
            )
        elif isinstance(command, log.StoreCheckpoint):
            worker.request_nowait(
                lambda request: SaveActor(request, plan.actor_id, plan.life, command.calls, command.content),
                lambda answer: self._handle(log.StoreAnswered(answer.kind)),
            )
        elif isinstance(command, log.SaveState):
            worker.wants_save = True
        elif isinstance(command, log.EndLife):
            self._is_over = True
            worker.ask_to_exit(1)

    def _send(self, results: list[tuple[Address, TaskResult]]) -> None:
        by_owner: dict[Address, list[TaskResult]] = {}
        for owner, result in results:
            by_owner.setdefault(owner, []).append(result)
        for owner, batch in by_owner.items():
            self._worker.send(owner, m.TasksFinished(batch, 0))
            self._worker.let_go_of(batch)
