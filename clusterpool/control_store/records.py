"""What jobs look like in the control store, and how records become bytes.

Records are msgspec Structs as JSON: people read them with `redis-cli` when a cluster misbehaves, and a
field may be added without breaking the nodes that do not know it. The load and the record of a node are in
`core.cluster_view`, that of an actor in `core.node_messages`.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from clusterpool.errors import ProtocolError

T = TypeVar("T", bound=msgspec.Struct)


class JobRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One driver's run."""

    job_id: str
    node_id: str
    process_id: str
    pid: int = 0
    host_name: str = ""
    namespace: str = ""
    entry_point: str = ""  # for people: the script's name
    started_s: float = 0.0  # seconds since 1970, the node's clock


def encode_record(record: msgspec.Struct) -> bytes:
    """JSON text."""
    return msgspec.json.encode(record)


def decode_record(record: bytes | str, kind: type[T]) -> T:
    """Raises: ProtocolError when the bytes are no record of this kind."""
    try:
        return msgspec.json.decode(record, type=kind)
    except msgspec.DecodeError as exc:
        raise ProtocolError(
            f"the control store holds a {kind.__name__} that cannot be read ({exc}); probably another "
            "version of clusterpool, or another program, wrote it: use one version per cluster"
        ) from exc
