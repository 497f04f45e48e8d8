"""What nodes tell each other when a driver leaves, so that it hears the last lines of its workers everywhere."""

from __future__ import annotations

from clusterpool.core.messages import Address, Message


class EndJob(Message, frozen=True):
    """From the node of a driver that leaves, to a node that has workers of its job: end them."""

    owner: Address


class JobEnded(Message, frozen=True):
    """Answer to EndJob: they have ended, and what they printed went ahead of this."""

    owner: Address
