"""What is read from the control store, held against what it must look like.

Whoever has the store's password can write any bytes to any key: another program with the same server, a hand at a
console, another version. What cannot be read is left out and told, and what stands beside it goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from clusterpool.control_store.records import T, decode_record
from clusterpool.core.cluster_view import NodeEntry, NodeLoad, NodeRecord
from clusterpool.core.node_events import FrameRejected
from clusterpool.errors import ProtocolError

logger = logging.getLogger(__name__)

# Told for each record and each time that it is read: (which key, in words; what is wrong with it).
OnUnreadable = Callable[[str, str], None]
# The server's own numbers have 64 bits.
_NUMBER_MAX = (1 << 63) - 1


def log_unreadable(kind: str, text: str) -> None:
    """For those who have no better place to tell it."""
    logger.warning("the control store: what it holds of %s cannot be used, and is left out: %s", kind, text)


@contextmanager
def skipped_if_unreadable(kind: str, name: object, tell: OnUnreadable) -> Iterator[None]:
    """What the block cannot read is told, and its result left out."""
    try:
        yield
    except (ProtocolError, msgspec.MsgspecError, ValueError, KeyError, OverflowError, RecursionError) as exc:
        tell(kind, f"{name!r}: {type(exc).__name__}: {str(exc)[:200]}")


def rejection(kind: str, text: str) -> FrameRejected:
    """What a node's machine is told, which counts it."""
    return FrameRejected(f"control store: {kind}", f"left out what the control store holds of {kind}: {text}")


def sendable(record: T) -> T:
    """Raises: OverflowError for a record that no message could carry, since a number in it is too large."""
    msgspec.msgpack.encode(record)
    return record


def whole_number(value: bytes | str | None) -> int:
    """Raises: ValueError for what is no number from 0 on that the server could have counted."""
    number = int(value) if value is not None and len(value) < 20 else -1
    if not 0 <= number <= _NUMBER_MAX:
        raise ValueError(f"no number: {value[:40] if value is not None else value!r}")
    return number


def number_or_zero(value: bytes | None, kind: str, tell: OnUnreadable) -> int:
    """A counter; one that cannot be read counts as one that was never begun."""
    number = 0
    if value is not None:
        with skipped_if_unreadable(kind, value[:40], tell):
            number = whole_number(value)
    return number


def read_nodes(
    records: dict[bytes, bytes],
    incarnations: dict[bytes, bytes],
    heartbeats: dict[bytes, float],
    loads: dict[bytes, bytes],
    *,
    now_us: int,
    tell: OnUnreadable,
) -> list[NodeEntry]:
    """The nodes whose registration can be read. A load or heartbeat that cannot be is written anew in half a second."""
    nodes: list[NodeEntry] = []
    for key in sorted(records):
        with skipped_if_unreadable("nodes", key, tell):
            record = sendable(decode_record(records[key], NodeRecord))
            if record.node_id.encode() != key:
                raise ValueError(f"the record of {record.node_id!r} stands there")
            incarnation = whole_number(incarnations[key])
            heartbeat_us, silence_s, load = 0, 0.0, None
            with skipped_if_unreadable("node_heartbeats", key, tell):
                heartbeat_us = whole_number(f"{heartbeats[key]:.0f}")
                silence_s = (now_us - heartbeat_us) / 1e6
            if key in loads:
                with skipped_if_unreadable("node_loads", key, tell):
                    load = sendable(decode_record(loads[key], NodeLoad))
            nodes.append(NodeEntry(record, incarnation, heartbeat_us, silence_s, load))
    return nodes
