from __future__ import annotations

from random import Random
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterpool.core import messages as m
from clusterpool.core import wire
from clusterpool.core.messages import Address
from tests.core.machines import DRIVER, JOB, make_worker

KINDS = list(get_args(wire.AnyMessage))


def sample(annotation: Any, depth: int = 0) -> Any:
    """Some value of a field's type."""
    info = msgspec.inspect.type_info(annotation) if not isinstance(annotation, msgspec.inspect.Type) else annotation
    if isinstance(info, msgspec.inspect.UnionType):
        return sample(info.types[0], depth) if depth < 4 else None
    if isinstance(info, msgspec.inspect.NamedTupleType):
        return info.cls(*(sample(field.type, depth + 1) for field in info.fields))
    if isinstance(info, msgspec.inspect.StructType):
        return info.cls(*(sample(field.type, depth + 1) for field in info.fields))
    if isinstance(info, msgspec.inspect.ListType):
        return [sample(info.item_type, depth + 1)] if depth < 4 else []
    if isinstance(info, msgspec.inspect.DictType):
        return {sample(info.key_type, depth + 1): sample(info.value_type, depth + 1)} if depth < 4 else {}
    if isinstance(info, msgspec.inspect.VarTupleType):
        return (sample(info.item_type, depth + 1),)
    if isinstance(info, msgspec.inspect.TupleType):
        return tuple(sample(item, depth + 1) for item in info.item_types)
    simple: dict[type, Any] = {
        msgspec.inspect.IntType: 7,
        msgspec.inspect.StrType: "text",
        msgspec.inspect.BytesType: b"\x80bytes",
        msgspec.inspect.FloatType: 1.5,
        msgspec.inspect.BoolType: True,
        msgspec.inspect.NoneType: None,
    }
    return simple[type(info)]


SAMPLES = [sample(kind) for kind in KINDS]


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_was(message: m.Message) -> None:
    assert wire.decode(wire.encode(message)) == message


def test_every_message_is_known_to_the_decoder() -> None:
    declared = {kind for kind in vars(m).values() if isinstance(kind, type) and issubclass(kind, m.Message)}
    assert declared - {m.Message} <= set(KINDS)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x00",
        b"\xc1",
        b"\x80\x04\x95",  # a pickle
        b"GET / HTTP/1.1\r\n\r\n",
        msgspec.msgpack.encode([]),
        msgspec.msgpack.encode({"type": "RetireWorker"}),
        msgspec.msgpack.encode(["NoSuchMessage"]),
        msgspec.msgpack.encode(["Reference", ["n", "p"], 1]),  # a part is no message
        msgspec.msgpack.encode(["TakeBackTasks"]),  # a field is missing
        msgspec.msgpack.encode(["TakeBackTasks", "many"]),
        msgspec.msgpack.encode(["TakeBackTasks", 1.5]),
        msgspec.msgpack.encode(["FreeObjects", [1, 2]]),
        msgspec.msgpack.encode(["Relay", ["n"], ["n", "p"], b""]),  # half an address
        msgspec.msgpack.encode(["StartTasks", [], [[1, 2, 0, "text", None]]]),
        wire.encode(m.RetireWorker()) + b"\x00",
        wire.encode(m.TakeBackTasks(3))[:-1],
    ],
)
def test_what_is_no_message_is_refused(frame: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        wire.decode(frame)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_a_message_or_refused(frame: bytes) -> None:
    try:
        message = wire.decode(frame)
    except msgspec.MsgspecError:
        return
    assert type(message) in KINDS


@pytest.mark.parametrize("seed", range(20))
def test_damaged_messages_are_a_message_or_refused(seed: int) -> None:
    random = Random(seed)
    for message in SAMPLES:
        frame = bytearray(wire.encode(message))
        for _ in range(random.randint(1, 4)):
            position = random.randrange(len(frame))
            change = random.choice(["flip", "cut", "insert"])
            if change == "flip":
                frame[position] ^= 1 << random.randrange(8)
            elif change == "cut" and len(frame) > 1:
                del frame[position]
            else:
                frame.insert(position, random.randrange(256))
        try:
            damaged = wire.decode(frame)
        except msgspec.MsgspecError:
            continue
        assert type(damaged) in KINDS


def test_a_message_of_deep_nesting_is_refused() -> None:
    nested = wire.encode(m.TakeBackTasks(1))[:-1] + b"\x91" * 100_000
    with pytest.raises(msgspec.MsgspecError):
        wire.decode(nested)


def test_messages_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        m.TakeBackTasks(3).count = 4  # type: ignore[misc]


def test_a_batch_of_tasks_is_small_on_the_wire() -> None:
    tasks = [m.TaskSpec(1024 * number, 1024, 0, b"0123456789") for number in range(1000)]
    assert len(wire.encode(m.StartTasks([], tasks))) < 1000 * 30


def test_an_address_compares_as_a_pair() -> None:
    worker = make_worker("w1").address
    assert wire.decode(wire.encode(m.WatchProcess("w1"))) == m.WatchProcess("w1")
    relay = wire.decode(wire.encode(m.Relay(worker, DRIVER, b"")))
    assert isinstance(relay, m.Relay)
    assert relay.destination == Address("n1", "w1")
    assert JOB.owner == relay.source
