"""Which results of an actor with checkpoints may go out: those whose calls a next life will know of.

    call ended --> unsent --AppendCalls--> logged ---+
        |                                            +--> its result is released
        +-- a checkpoint is due, or it cannot be     |
            logged --> StoreCheckpoint --------------+

The log holds the calls since the last checkpoint, in the order in which they ran. A next life loads the checkpoint,
runs the logged calls again, and answers those that their callers send again with the results that it has: a call counts
once, however often it was sent. So a checkpoint also holds the results that callers have not said to have. One message
to the store is under way at a time; what ends meanwhile goes with the next.

A store that has lost calls of this life (it was emptied, or set back) says so when the next ones are logged: then a
checkpoint takes the place of all, and nothing is lost as long as this process lives.

Source: Elnozahy et al., "A survey of rollback-recovery protocols in message-passing systems" (output commit).
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import msgspec

from clusterpool.core.actor_messages import ActorCheckpoint, AnsweredCall, LoggedCall
from clusterpool.core.messages import ActorPlan, Address, TaskResult, TaskSpec, TaskStatus

# The log since the last checkpoint is read, and run, at a restart: this much forces a checkpoint, whatever the options.
LOG_BYTES_MAX = 16 * 1024 * 1024
# The actor waits when so many results wait for the store.
HELD_MAX = 1000
# A longer call is not worth logging: the state is saved after it instead.
ENTRY_BYTES_MAX = 1024 * 1024
# Results for callers that have died would stay for ever: of each caller the last so many are kept.
ANSWERS_MAX = 2000


class CallEnded(NamedTuple):
    """A call has run. `entry`: how to run it again, if it can be logged; `state`: the checkpoint taken after it."""

    owner: Address
    entry: bytes | None
    result: TaskResult
    state: bytes | None


class StoreAnswered(NamedTuple):
    """The answer to AppendCalls or StoreCheckpoint: `ok`, or why this life is over."""

    kind: str


class ResultsArrived(NamedTuple):
    """A caller has the results of these calls. `are_rest`: these are all that it still waits for."""

    owner: Address
    numbers: list[int]
    are_rest: bool


class AppendCalls(NamedTuple):
    """Log these."""

    first: int
    entries: list[bytes]


class StoreCheckpoint(NamedTuple):
    """Keep this in the place of the calls up to number `calls`."""

    calls: int
    content: bytes


class StateSaved(NamedTuple):
    """The answer to `SaveState`, unless a call has run meanwhile."""

    state: bytes


class ReleaseResults(NamedTuple):
    """These may go to their callers."""

    results: list[tuple[Address, TaskResult]]


class SaveState(NamedTuple):
    """Take a checkpoint as soon as no call runs, or after the one that does."""


class EndLife(NamedTuple):
    """Another life has begun, or the actor is dead: nothing of this one may be heard any more."""

    text: str


class ActorLog:
    """The calls of one life. `calls`: how many were known when it began, `log_bytes` how long their log was."""

    def __init__(self, plan: ActorPlan, now_s: float) -> None:
        self.plan = plan
        self.calls = 0
        self.covered = 0  # by the last checkpoint
        self.held: deque[tuple[int, Address, TaskResult]] = deque()  # with the number of the call that must be durable
        self.answers: dict[Address, dict[int, TaskResult]] = {}
        self._durable = 0
        self._unsent: list[bytes] = []  # Invariant: the calls up to `calls`
        self._checkpoint: tuple[int, bytes] | None = None
        self._under_way = 0  # the number that will be durable; 0: nothing is
        self._is_saving = False  # what was under way last: a checkpoint
        self._log_bytes = 0
        self._checkpoint_s = now_s
        self._has_gap = False  # the store lacks calls: only a checkpoint helps
        self._is_over = False

    def load(self, checkpoint: ActorCheckpoint | None, covered: int) -> None:
        """This life starts from here."""
        self.calls = self.covered = self._durable = covered
        for call in checkpoint.answers if checkpoint is not None else ():
            self.answers.setdefault(call.owner, {})[call.result.number] = call.result

    def replayed(self, owner: Address, entry: bytes, result: TaskResult) -> None:
        """A logged call has run again."""
        self.calls += 1
        self._durable = self.calls
        self._log_bytes += len(entry)
        self._keep(owner, result)

    def answer_to(self, owner: Address, number: int) -> TaskResult | None:
        """The result of a call that has run already."""
        return self.answers.get(owner, {}).get(number)

    def is_checkpoint_due(self, is_loggable: bool, now_s: float) -> bool:
        """Whether the state must be saved after the call that has just run."""
        plan = self.plan
        since = self.calls + 1 - self.covered
        is_time = 0 <= plan.checkpoint_period_s <= now_s - self._checkpoint_s
        is_count = 0 < plan.checkpoint_every <= since
        return not is_loggable or is_count or is_time or self._has_gap or self._log_bytes >= LOG_BYTES_MAX

    def handle(self, event: Any, now_s: float) -> list[Any]:
        """Take note of `event`; what to do about it, in order."""
        if self._is_over:
            return []
        if isinstance(event, CallEnded):
            self._ended(event, now_s)
            return self._release() + self._advance()
        if isinstance(event, StoreAnswered):
            if event.kind == "gap" and not self._is_saving:
                self._has_gap, self._under_way = self._checkpoint is None, 0
                return self._advance() or [SaveState()]
            if event.kind != "ok":
                self._is_over = True
                return [EndLife(f"the control store has closed this life of the actor ({event.kind})")]
            self._durable, self._under_way = max(self._durable, self._under_way), 0
            return self._release() + self._advance()
        if isinstance(event, StateSaved):
            if self._has_gap:
                self._cover(event.state, now_s)
            return self._advance()
        assert isinstance(event, ResultsArrived)
        answers = self.answers.get(event.owner)
        if answers is not None:
            gone = set(answers).difference(event.numbers) if event.are_rest else event.numbers
            for number in sorted(gone):
                answers.pop(number, None)
            if not answers:
                del self.answers[event.owner]
        return []

    def _ended(self, event: CallEnded, now_s: float) -> None:
        if event.entry is not None or event.state is not None:
            self.calls += 1
            self._keep(event.owner, event.result)
        if event.state is not None:
            self._cover(event.state, now_s)
        elif event.entry is not None:
            self._unsent.append(event.entry)
            self._log_bytes += len(event.entry)
        self.held.append((self.calls, event.owner, event.result))

    def _cover(self, state: bytes, now_s: float) -> None:
        """A checkpoint takes the place of all before it, also of what has not been sent."""
        self._checkpoint = (self.calls, self._encoded(state))
        self._unsent.clear()
        self.covered, self._log_bytes, self._checkpoint_s, self._has_gap = self.calls, 0, now_s, False

    def _keep(self, owner: Address, result: TaskResult) -> None:
        answers = self.answers.setdefault(owner, {})
        answers[result.number] = result
        if len(answers) > ANSWERS_MAX:
            del answers[next(iter(answers))]

    def _encoded(self, state: bytes) -> bytes:
        answers = [
            AnsweredCall(owner, _keepable(result)) for owner, known in self.answers.items() for result in known.values()
        ]
        return msgspec.msgpack.encode(ActorCheckpoint(state, answers))

    def _advance(self) -> list[Any]:
        if self._under_way:
            return []
        if self._checkpoint is not None:
            (calls, content), self._checkpoint = self._checkpoint, None
            self._under_way, self._is_saving = calls, True
            return [StoreCheckpoint(calls, content)]
        if self._unsent and not self._has_gap:
            entries, self._unsent = self._unsent, []
            self._under_way, self._is_saving = self.calls, False
            return [AppendCalls(self.calls - len(entries) + 1, entries)]
        return []

    def _release(self) -> list[Any]:
        released = []
        while self.held and self.held[0][0] <= self._durable:
            _, owner, result = self.held.popleft()
            released.append((owner, result))
        return [ReleaseResults(released)] if released else []


def entry_of(owner: Address, spec: TaskSpec, result: TaskResult) -> bytes | None:
    """How to run a call again that gave `result`; None if that cannot be written down, or would not do the same."""
    extras = spec.extras
    assert extras is not None
    parts_are_inline = all(part.stored is None and not part.references for part in extras.arguments)
    is_plain = parts_are_inline and not extras.references and extras.stored is None and extras.returns != -1
    if not is_plain or result.status == TaskStatus.CANCELLED:
        return None
    entry = msgspec.msgpack.encode(LoggedCall(owner, spec))
    return entry if len(entry) <= ENTRY_BYTES_MAX else None


def _keepable(result: TaskResult) -> TaskResult:
    """References in a result are counted by this process, and end with it."""
    extras = result.extras
    parts = [extras.value, *extras.values] if extras is not None else []
    if not any(part is not None and part.references for part in parts):
        return result
    text = "the actor's process ended before its caller had this result, and with it the references that are in it"
    return TaskResult(result.number, TaskStatus.LOST, text.encode())
