"""What processes ask their node's descriptor service, and what it answers.

Not in wire.py: they go over a socket of their own, `fd.sock`, because descriptors travel beside them. One connection
carries one request and its answer, so that a process may fork, and its threads ask, at any time. A line stays open.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias, Union

import msgspec

# Part of a path or of another node's table: nothing that could lead out of the node's folder.
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z", max_length=100)]

# A request or an answer is some 100 bytes; more than this is none of ours.
REQUEST_BYTES_MAX = 1024


class Request(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Base of the requests."""


class GetChannel(Request, frozen=True):
    """The two descriptors of a channel, receiving and sending; it is made at the first request."""

    name: Name


class ParkDescriptor(Request, frozen=True):
    """Keep the descriptor that comes with this until somebody fetches it, or the job ends.

    `line`: the name of a line of the sender's. Then it is leased: it can be fetched any number of times, until
    `ReleaseLeases` comes on that line, or the line ends.
    """

    job_id: Name
    line: str = ""


class OpenLine(Request, frozen=True):
    """Keep this connection: what is leased on it is let go when it ends, as it does with its process."""


class ReleaseLeases(Request, frozen=True):
    """Nobody fetches these any more; on a line, and without an answer."""

    names: list[Name]


class FetchDescriptor(Request, frozen=True):
    """A descriptor that was parked at this node or another one: it, or a socket joined to it."""

    node_id: Name
    name: Name


class ConnectListener(Request, frozen=True):
    """A socket that is connected to a listener of another node."""

    node_id: Name
    name: Name


class Answer(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """`error_number`: 0, or why there are no descriptors with this (an `errno`). `name`: of what was made."""

    error_number: int
    text: str = ""
    name: str = ""


AnyRequest: TypeAlias = Union[  # noqa: UP007
    GetChannel, ParkDescriptor, FetchDescriptor, ConnectListener, OpenLine, ReleaseLeases
]

encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(AnyRequest).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
