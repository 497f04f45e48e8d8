"""What nodes and owners tell one another of copies, and of requests that may have gone with a node."""

from __future__ import annotations

from clusterpool.core.task_messages import Message


class CopyMade(Message, frozen=True):
    """From a node to an object's owner: there is a copy here now."""

    object_id: str


class CopyGone(Message, frozen=True):
    """From a node to an object's owner: there is no copy here any more; `text` says why."""

    object_id: str
    text: str = ""


class CopyUnreadable(Message, frozen=True):
    """From a process to its node, which had told it to read an object's file itself (ObjectOnDisk): it cannot."""

    object_id: str
    text: str


class PromoteCopy(Message, frozen=True):
    """From an object's owner: the primary copy is lost, so keep this one."""

    object_id: str


class RequestsLost(Message, frozen=True):
    """From a node that had passed requests of this owner on to another: that one is lost, perhaps with them."""

    node_id: str
