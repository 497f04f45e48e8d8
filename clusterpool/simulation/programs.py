"""What simulated tasks do, and what must come of it: a task's value is a function of its inputs and nothing else.

So a value that was mixed up with another, computed from a wrong argument or read from memory that had been given away
shows as a wrong number.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import msgspec

from clusterpool.core.messages import Reference

# From this size on a value lies in the store. Smaller than the real border, so that small worlds move many objects.
STORED_BYTES_MIN = 4096


class Operation(msgspec.Struct, frozen=True, array_like=True):
    """A task: it may wait for arguments and children, takes `duration_s`, and gives a number."""

    salt: int
    duration_s: float = 0.0
    result_bytes: int = 8
    fails: bool = False  # it raises an exception of its own
    children: list[Operation] = []  # tasks that it starts and waits for
    boxed: list[Operation] = []  # tasks that it starts and whose references it returns
    put_bytes: list[int] = []  # objects that it puts and whose references it returns
    inner: int = 0  # references in its payload that it gets
    peeks: bool = False  # it returns the references in its payload
    caller: str = ""  # of a call of an actor: who calls, and the how manieth of its calls this is
    index: int = 0
    deaths: int = 0  # so often it ends its process
    lag_s: float = 0.0  # so much longer it takes the first time
    dies_late: bool = False  # when it does: soon after, instead of before it has done anything
    stream: bytes = b""  # a generator, and what it yields (see stream_programs.py)
    taking: bytes = b""  # a generator that it starts, and takes
    turn: bytes = b""  # what it does with a lock (see lock_programs.py); with `deaths` it dies while it holds it
    family: bytes = b""  # children that it starts (see child_programs.py)
    handle: bytes = b""  # an actor that it calls (see actor_programs.py)


class Outcome(NamedTuple):
    """What a get gives: a number, an exception of the user's, or the reason why there is no value."""

    kind: str  # "ok", "error", or the name of a loss
    number: int
    references: tuple[Reference, ...] = ()
    text: str = ""
    numbers: tuple[int, ...] = ()  # of a chunk, one for each item

    @property
    def is_lost(self) -> bool:
        """Whether a fault must have taken the value."""
        return self.kind not in ("ok", "error")


class Failed(Exception):
    """A task raises what it got, or cannot go on."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.text)
        self.outcome = outcome


class Payload(msgspec.Struct, frozen=True, array_like=True):
    """A value or an exception as bytes."""

    kind: str
    number: int
    size_bytes: int = 8
    text: str = ""
    numbers: list[int] = []


def mix(*parts: object) -> int:
    """A number that depends on all parts and on their order."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little")


def value_of(operation: Operation, arguments: list[int], inner: list[int], children: list[int]) -> int:
    """The number that a task gives."""
    return mix(operation.salt, *arguments, "inner", *inner, "children", *children)


def put_number(salt: int, position: int) -> int:
    """The number in an object that a task puts."""
    return mix(salt, "put", position)


def expected(
    operation: Operation, arguments: list[Outcome] | None = None, inner: list[Outcome] | None = None
) -> Outcome:
    """What a task must give when no fault comes between; its first failing input is its own failure."""
    children = [expected(child) for child in operation.children]
    for outcome in (*(arguments or ()), *(inner or ()), *children):
        if outcome.kind != "ok":
            return Outcome(outcome.kind, outcome.number)
    if operation.fails:
        return Outcome("error", operation.salt)
    numbers = [[outcome.number for outcome in part] for part in (arguments or [], inner or [], children)]
    return Outcome("ok", value_of(operation, *numbers))


def content_of(number: int, size_bytes: int) -> bytes:
    """The bytes that a stored value with this number consists of."""
    return (number.to_bytes(8, "little") * (size_bytes // 8 + 1))[:size_bytes]


encode_operation = msgspec.msgpack.Encoder().encode
decode_operation = msgspec.msgpack.Decoder(Operation).decode
encode_payload = msgspec.msgpack.Encoder().encode
decode_payload = msgspec.msgpack.Decoder(Payload).decode


def outcome_of(payload: bytes) -> Outcome:
    """The reverse of `encode_payload`, as programs see it."""
    decoded = decode_payload(payload)
    return Outcome(decoded.kind, decoded.number, text=decoded.text, numbers=tuple(decoded.numbers))
