"""Random and damaged bytes: what is no message is refused by the one error that the borders expect."""

from __future__ import annotations

import struct
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterpool.core import descriptor_messages as d
from clusterpool.core import wire
from clusterpool.errors import ProtocolError
from clusterpool.transport.stream import FRAME_BYTES_MAX, split_frames
from tests.fuzz.random_messages import KINDS, Sampler
from tests.fuzz.searches import search, seeds

MESSAGES = 3000


def is_refused_or_a_message(frame: bytes) -> None:
    try:
        message = wire.decode(frame)
    except msgspec.MsgspecError:
        return
    assert type(message) in KINDS


def damaged(frame: bytes, random: Random) -> bytes:
    changed = bytearray(frame)
    for _ in range(random.randint(1, 5)):
        position = random.randrange(len(changed))
        change = random.randrange(5)
        if change == 0:
            changed[position] ^= 1 << random.randrange(8)
        elif change == 1:
            changed[position] = random.choice(b"\x00\x7f\x80\x90\xa0\xc0\xc1\xc4\xc6\xcf\xdb\xdd\xff")
        elif change == 2 and len(changed) > 1:
            del changed[position]
        elif change == 3:
            changed.insert(position, random.randrange(256))
        else:
            changed[position:] = changed[position:] * 2
    return bytes(changed)


@pytest.mark.parametrize("seed", seeds(2))
def test_every_message_comes_back_as_it_was_and_damaged_ones_are_refused(seed: str) -> None:
    random = Random(seed)
    sampler = Sampler(random)
    seen = set()
    for _ in range(MESSAGES):
        message = sampler.message()
        seen.add(type(message))
        frame = wire.encode(message)
        assert wire.encode(wire.decode(frame)) == frame
        is_refused_or_a_message(damaged(frame, random))
    assert seen == set(KINDS)


@search(300)
@given(st.binary(max_size=300))
def test_random_bytes_are_a_message_or_refused(frame: bytes) -> None:
    is_refused_or_a_message(frame)


@search(300)
@given(st.binary(max_size=300))
def test_random_bytes_are_a_request_for_descriptors_or_refused(frame: bytes) -> None:
    try:
        d.decode_request(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass


@search(300)
@given(st.lists(st.binary(max_size=40), max_size=8), st.randoms(use_true_random=False))
def test_frames_come_out_as_they_went_in_however_they_are_cut(bodies: list[bytes], random: Random) -> None:
    sent = b"".join(struct.pack("<I", len(body)) + body for body in bodies)
    received: list[bytes] = []
    rest = b""
    while sent:
        count = random.randint(1, len(sent))
        frames, rest = split_frames(rest + sent[:count])
        received += frames
        sent = sent[count:]
    assert (received, rest) == (bodies, b"")


@search(200)
@given(st.binary(max_size=200))
def test_random_bytes_are_frames_or_refused_and_nothing_is_kept_of_a_frame_that_is_too_long(stream: bytes) -> None:
    try:
        frames, rest = split_frames(stream)
    except ProtocolError:
        return
    assert b"".join(struct.pack("<I", len(frame)) + frame for frame in frames) + rest == stream
    assert len(rest) < 4 or struct.unpack_from("<I", rest)[0] <= FRAME_BYTES_MAX
