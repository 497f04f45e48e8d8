"""What creators, nodes and workers tell one another about how an actor is made."""

from __future__ import annotations

import msgspec

from clusterpool.core.node_messages import JobPart, WorkerDemand
from clusterpool.core.task_messages import Address, Message, Part, TaskResult, TaskSpec


class ActorCreation(Part, frozen=True):
    """All that is needed to make a detached actor without its creator. The store keeps it, encoded."""

    demand: WorkerDemand
    job: JobPart
    env: dict[str, str]
    name: str  # of its workers
    class_payload: bytes
    spec: TaskSpec  # of the constructor's call; the class is its function


def encode_creation(creation: ActorCreation) -> bytes:
    """As the store keeps it."""
    return msgspec.msgpack.encode(creation)


def decode_creation(encoded: bytes) -> ActorCreation:
    """Raises: msgspec.MsgspecError when another version wrote it."""
    return msgspec.msgpack.decode(encoded, type=ActorCreation)


class AnsweredCall(Part, frozen=True):
    """The result of a call, which its caller may not have."""

    owner: Address
    result: TaskResult


class ActorCheckpoint(Part, frozen=True):
    """What is kept of an actor: its pickled state, and results on their way."""

    state: bytes
    answers: list[AnsweredCall]


class LoggedCall(Part, frozen=True):
    """An entry of an actor's log."""

    owner: Address
    spec: TaskSpec


class LogCalls(Message, frozen=True):
    """From an actor's worker to its node: these calls have run in this life."""

    request: int
    actor_id: str
    life: int
    first: int
    entries: list[bytes]


class SaveActor(Message, frozen=True):
    """From an actor's worker to its node: its state after so many calls."""

    request: int
    actor_id: str
    life: int
    calls: int
    content: bytes


class ActorSaved(Message, frozen=True):
    """Answer to LogCalls and SaveActor. `kind`: `ok`, or why this life is over."""

    request: int
    kind: str


class LoadActor(Message, frozen=True):
    """From the worker of an actor's next life to its node: what do I start from?"""

    request: int
    actor_id: str


class ActorLoaded(Message, frozen=True):
    """Answer to LoadActor. `checkpoint`: empty for none; `calls`: how many it covers; `entries`: those since."""

    request: int
    checkpoint: bytes
    calls: int
    entries: list[bytes]


class ResultsTaken(Message, frozen=True):
    """From a caller: I have the results of these calls."""

    numbers: list[int]


class CallsResumed(Message, frozen=True):
    """From a caller to an actor's next life: of the calls that I sent to former ones I still wait for these only."""

    numbers: list[int]
