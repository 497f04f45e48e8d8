"""How a node answers processes that ask for semaphores, channels and cells, and how it names their waits."""

from __future__ import annotations

from typing import Any

from clusterpool.core import coordination_messages as c
from clusterpool.core.messages import Address
from clusterpool.core.node_events import Send


def life_of(node_id: str, incarnation: int) -> str:
    """How the control store calls one life of a node: from one registration to its end."""
    return f"{node_id}@{incarnation}"


def waiter_id(life: str, process: Address, request: int) -> str:
    """How the control store calls one wait of one process. life: of its node, as in `CoordinationMachine`."""
    return f"{life}/{process.process_id}/{request}"


def done(process: Address, message: Any, number: int = 0, content: bytes = b"") -> Send:
    """The answer to a request that was met."""
    return Send(process, c.CoordinationDone(message.request, number, content))


def failed(process: Address, message: Any, kind: str, text: str) -> Send:
    """The answer to one that was not; `kind` is the name of the error's class."""
    return answer(process, message.request, kind, text)


def answer(process: Address, request: int, kind: str, text: str) -> Send:
    """Either of the two: no `kind` means no error."""
    if not kind:
        return Send(process, c.CoordinationDone(request))
    return Send(process, c.CoordinationFailed(request, "ObjectLost" if kind == "CarrierUnknown" else kind, text))
