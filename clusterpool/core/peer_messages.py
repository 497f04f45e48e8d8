"""What two nodes, rather than their processes, tell each other: how busy they are, and who leaves."""

from __future__ import annotations

from clusterpool.core.cluster_view import NodeLoad
from clusterpool.core.messages import Address, Message


class LoadChanged(Message, frozen=True):
    """To a node that has sent requests here: how busy this one is now."""

    node_id: str
    load: NodeLoad


class AskAlive(Message, frozen=True):
    """To a node whose heartbeats are missing in the control store: does this incarnation of it live?"""

    incarnation: int


class StillAlive(Message, frozen=True):
    """Answer to AskAlive, if it does."""

    incarnation: int


class EndJob(Message, frozen=True):
    """From the node of a driver that leaves, to a node that has workers of its job: end them."""

    owner: Address


class JobEnded(Message, frozen=True):
    """Answer to EndJob: they have ended, and what they printed went ahead of this."""

    owner: Address
