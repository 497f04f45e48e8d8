"""An actor with checkpoints, in its worker: saves and loads its state, logs its calls, and runs them again."""

from __future__ import annotations

import logging
import threading
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec

from clusterpool import errors
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
from clusterpool.core.messages import ActorPlan, Address, TaskResult, TaskSpec
from clusterpool.serialization.packing import dumps_value, loads
from clusterpool.worker.interrupts import Key

if TYPE_CHECKING:
    from clusterpool.worker.task_runner import TaskRunner

logger = logging.getLogger(__name__)
# The store is one process for the whole cluster; 32 MiB take it some tens of milliseconds.
CHECKPOINT_BYTES_MAX = 32 * 1024 * 1024


class Journal:
    """What one life of an actor owes to the next. The main thread runs calls; any thread brings messages."""

    def __init__(self, runner: TaskRunner, plan: ActorPlan) -> None:
        self._runner = runner
        self._plan = plan
        self._log = log.ActorLog(plan, monotonic())
        self._lock = threading.Lock()  # never held while anything is sent
        self._is_loading = plan.life > 0
        self._early: list[tuple[Address, m.Message]] = []  # of callers, while the log is still being read
        self._entries: list[bytes] = []  # the log, until it has been replayed
        self._is_over = False

    # --- making the instance

    def make(self, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An instance: new, or as the last checkpoint has it. `replay` follows.

        With `save` and `load` the constructor runs in each life, before `load`; else as pickle does it, without.
        """
        checkpoint: ActorCheckpoint | None = None
        if self._is_loading:
            loaded = self._ask_for_log()
            self._entries = loaded.entries
            if loaded.checkpoint:
                checkpoint = msgspec.msgpack.decode(loaded.checkpoint, type=ActorCheckpoint)
            self._log.load(checkpoint, loaded.calls)
        if checkpoint is None:
            return cls(*args, **kwargs)
        state = loads(checkpoint.state)
        if _has_methods(cls):
            instance = cls(*args, **kwargs)
            instance.load(state)
            return instance
        make: Any = cls.__new__
        instance = make(cls)
        if hasattr(instance, "__setstate__"):
            instance.__setstate__(state)
            return instance
        state, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
        instance.__dict__.update(state or {})
        for name, value in (slots or {}).items():
            setattr(instance, name, value)
        return instance

    def _ask_for_log(self) -> ActorLoaded:
        client = self._runner.client
        answer = client.request(lambda request: LoadActor(request, self._plan.actor_id))
        assert isinstance(answer, ActorLoaded)
        return answer

    def replay(self) -> None:
        """Run the logged calls again. Their results wait for callers that ask again."""
        for entry in self._entries:
            call = msgspec.msgpack.decode(entry, type=LoggedCall)
            result = self._runner.calls.run(call.owner, call.spec)
            self._log.replayed(call.owner, entry, result)
        self._entries.clear()
        with self._lock:
            self._is_loading = False
            early, self._early = [*self._runner.early, *self._early], []
        self._runner.early.clear()
        for source, message in early:
            self.message(source, message)

    # --- calls (the main thread)

    def run(self, owner: Address, spec: TaskSpec) -> None:
        """Run a call, or answer it if a former life has."""
        runner, number = self._runner, spec.number
        with self._lock:
            known = self._log.answer_to(owner, number)
        if known is not None:
            runner.drop_references(spec)
            self._send([(owner, known)])
            return
        try:
            result = runner.calls.run(owner, spec)
        except BaseException:
            # SystemExit: the process ends, but what others are waiting for has been done.
            self.close()
            raise
        runner.interrupts.forget(Key(owner, number))
        entry = log.entry_of(owner, spec, result)
        state: bytes | None = None
        if self._log.is_checkpoint_due(entry is not None, monotonic()):
            try:
                state = self._save()
            except Exception as exc:
                result = runner.calls.error(spec, exc)
        self._handle(log.CallEnded(owner, entry, result, state))
        if len(self._log.held) > log.HELD_MAX:
            self._wait(log.HELD_MAX // 2)

    def _save(self) -> bytes:
        """The pickled state. Raises: CheckpointFailed."""
        instance = self._runner.actor.instance
        name = type(instance).__name__
        try:
            if _has_methods(type(instance)):
                state = instance.save()
            elif hasattr(instance, "__getstate__"):
                state = instance.__getstate__()
            else:
                state = instance.__dict__
            serialized = dumps_value(state)
        except Exception as exc:
            raise errors.CheckpointFailed(
                f"the state of actor {name} could not be saved after this call, which has had its effect: {exc!r}; "
                "without a newer checkpoint a restart runs all calls since the last one again"
            ) from exc
        if serialized.references:
            raise errors.CheckpointFailed(
                f"the state of actor {name} holds ObjectRefs or handles of unnamed actors, which end with its process; "
                "leave them out in save() or __getstate__(), or keep their values"
            )
        if serialized.size_bytes > CHECKPOINT_BYTES_MAX:
            raise errors.CheckpointFailed(
                f"the state of actor {name} has {serialized.size_bytes / 2**20:.1f} MiB, and "
                f"{CHECKPOINT_BYTES_MAX >> 20} MiB are allowed, because it is kept in the control store; have save() "
                "write large data to a file that all nodes see, and return its name"
            )
        return serialized.to_bytes()

    def save(self) -> None:
        """Take a checkpoint, though no call has ended; the main thread, when it runs none."""
        self._runner.wants_save = False
        try:
            state = self._save()
        except errors.CheckpointFailed as exc:
            # Its results may not go out. The next life finds that calls are lost, and the actor ends.
            logger.error("actor %s: %s", self._plan.actor_id, exc)
            self._is_over = True
            self._runner.exit(SystemExit(1))
        else:
            self._handle(log.StateSaved(state))

    def close(self) -> None:
        """Wait until all results are out."""
        self._wait(0)

    def _wait(self, held_max: int) -> None:
        runner, client = self._runner, self._runner.client

        def is_done() -> bool:
            return client.is_closed or len(self._log.held) <= held_max or self._is_over

        while not is_done():
            client.loop.wait_until(lambda: is_done() or runner.wants_save)
            if runner.wants_save and not is_done():
                self.save()

    # --- messages (any thread)

    def message(self, source: Address, message: m.Message) -> None:
        """A caller tells which results it has, or still waits for."""
        with self._lock:
            if self._is_loading:
                self._early.append((source, message))
                return
        if isinstance(message, ResultsTaken):
            self._handle(log.ResultsArrived(source, message.numbers, False))
        elif isinstance(message, CallsResumed):
            self._handle(log.ResultsArrived(source, message.numbers, True))

    def _handle(self, event: Any) -> None:
        with self._lock:
            commands = self._log.handle(event, monotonic())
        for command in commands:
            self._carry_out(command)

    def _carry_out(self, command: Any) -> None:
        client, plan = self._runner.client, self._plan
        if isinstance(command, log.ReleaseResults):
            self._send(command.results)
        elif isinstance(command, log.AppendCalls):
            client.request_nowait(
                lambda request: LogCalls(request, plan.actor_id, plan.life, command.first, command.entries),
                lambda answer: self._handle(log.StoreAnswered(answer.kind)),  # type: ignore[attr-defined]
            )
        elif isinstance(command, log.StoreCheckpoint):
            client.request_nowait(
                lambda request: SaveActor(request, plan.actor_id, plan.life, command.calls, command.content),
                lambda answer: self._handle(log.StoreAnswered(answer.kind)),  # type: ignore[attr-defined]
            )
        elif isinstance(command, log.SaveState):
            self._runner.save_soon()
        elif isinstance(command, log.EndLife):
            self._is_over = True
            self._runner.exit(SystemExit(1))

    def _send(self, results: list[tuple[Address, TaskResult]]) -> None:
        runner = self._runner
        by_owner: dict[Address, list[TaskResult]] = {}
        for owner, result in results:
            by_owner.setdefault(owner, []).append(result)
        for owner, batch in by_owner.items():
            runner.client.send(owner, m.TasksFinished(batch, 0))
            for result in batch:
                if result.extras is not None:
                    runner.let_go_of_result(result)


def _has_methods(cls: type) -> bool:
    return callable(getattr(cls, "save", None)) and callable(getattr(cls, "load", None))
