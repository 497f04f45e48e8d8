"""A detached actor's class and arguments in a form that needs nobody: nodes make it, now and again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from clusterpool.client import api
from clusterpool.client.object_ref import ObjectRef
from clusterpool.client.runtime import Runtime
from clusterpool.core.actor_messages import ActorCreation, encode_creation
from clusterpool.core.messages import TaskExtras, TaskKind, TaskSpec, WorkerDemand
from clusterpool.errors import ObjectTooLarge
from clusterpool.serialization.functions import ship_function
from clusterpool.serialization.packing import dumps_arguments

# It lies in the control store for as long as the actor lives, and is read at each restart. More than a configuration
# should not be in it; what is larger, the actor can read from where it lies.
CREATION_BYTES_MAX = 16 * 1024 * 1024


def encoded_creation(
    here: Runtime,
    cls: type,
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]],
    demand: WorkerDemand,
    extras: TaskExtras,
) -> bytes:
    """All that a node needs to make the actor. References among the arguments are waited for.

    Raises: what pickle raises; the error of an argument; ValueError for references that are deeper inside;
        ObjectTooLarge.
    """
    args = tuple(api.get(arg) if type(arg) is ObjectRef else arg for arg in arguments[0])
    kwargs = {name: api.get(arg) if type(arg) is ObjectRef else arg for name, arg in arguments[1].items()}
    shipped = ship_function(cls)
    serialized = dumps_arguments(args, kwargs)
    if shipped.references or shipped.kept or serialized.references or serialized.kept:
        raise ValueError(
            f"the detached actor {demand.name!r} cannot be made from ObjectRefs, handles of unnamed actors, pipes or "
            "queues inside its arguments or its class: they end with this program, and the actor shall not; pass "
            "values, references as arguments of their own (which are replaced by their values), or named actors"
        )
    size_bytes = serialized.size_bytes + len(shipped.payload)
    if size_bytes > CREATION_BYTES_MAX:
        raise ObjectTooLarge(
            f"class and arguments of the detached actor {demand.name!r} have {size_bytes / 2**20:.1f} MiB, and "
            f"{CREATION_BYTES_MAX >> 20} MiB are allowed, because they are kept in the control store: have its "
            "constructor read large data from a file"
        )
    job = msgspec.structs.replace(here.client.job, detached=True)
    spec = TaskSpec(1, 1, TaskKind.CREATE_ACTOR, serialized.to_bytes(), extras)
    return encode_creation(ActorCreation(demand, job, dict(demand.env), demand.name, shipped.payload, spec))
