"""What the machines of the core may go through, as far as it can be counted: events, messages, states.

Events and messages are the keys of a machine's own tables; where it has none, they are listed here. States are what a
machine, or a record in it, says of itself; which of them may follow one another is listed here, after the diagrams
at the heads of their files.
"""

from __future__ import annotations

import itertools
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clusterpool.core import actor_log, membership_events, transfer_messages
from clusterpool.core import node_events as ne
from clusterpool.core import owner_events as oe
from clusterpool.core.actors import ActorChannel
from clusterpool.core.coordination_records import Adoption, Move, Wait
from clusterpool.core.dispatch import WorkerSlot
from clusterpool.core.leases import Lease, Worker
from clusterpool.core.membership import Membership
from clusterpool.core.store_objects import StoredObject
from clusterpool.core.transfer_serving import ServingTable
from clusterpool.core.transfers import Pull, TransferTable
from clusterpool.core.tunnels import TunnelMessageArrived
from clusterpool.core.worker_set import WorkerSet

__all__ = ["CARRIERS", "EVENTS", "STATES", "States"]

# Events that bring a message, which counts by its own kind.
CARRIERS = frozenset({ne.MessageArrived, oe.MessageArrived, transfer_messages.PeerSpoke, TunnelMessageArrived})

# Of machines without tables, and messages that a table does not list.
EVENTS: dict[type, frozenset[type]] = {
    Membership: frozenset(typing.get_args(membership_events.Event)),
    TransferTable: frozenset({
        transfer_messages.TransferOpened, transfer_messages.TransferRefused, transfer_messages.ChunkData,
    }),
    ServingTable: frozenset({
        transfer_messages.ServingPinned, transfer_messages.ServingRefused, transfer_messages.PeerLost,
        transfer_messages.TimePassed, transfer_messages.OpenTransfer, transfer_messages.SendChunk,
        transfer_messages.CloseTransfer,
    }),
    actor_log.ActorLog: frozenset({
        actor_log.CallEnded, actor_log.StoreAnswered, actor_log.StateSaved, actor_log.ResultsArrived,
    }),
}  # fmt: skip


@dataclass(frozen=True)
class States:
    """How to tell the state of a record, and which transitions there are: "before>after"."""

    tell: Callable[[Any], str]
    transitions: frozenset[str]


def _transitions(text: str) -> frozenset[str]:
    """Of chains: "a > b > c" are two."""
    found = set()
    for chain in text.split(","):
        states = [state.strip() for state in chain.split(">")]
        found |= {f"{before}>{after}" for before, after in itertools.pairwise(states)}
    return frozenset(found)


def _tell_worker(worker: Worker) -> str:
    if worker.is_ending:
        return "ending"
    if not worker.has_joined:
        return "starting"
    return "leased" if worker.lease is not None else "idle"


def _tell_slot(slot: WorkerSlot) -> str:
    if slot.is_retiring:
        return "retiring"
    if slot.is_taking_back:
        return "taking back"
    return "blocked" if slot.is_blocked else "open"


def _tell_set(worker_set: WorkerSet) -> str:
    if worker_set._is_ended:
        return "ended"
    if worker_set.is_terminated:
        return "terminated"
    if worker_set.failed_text:
        return "failed"
    return "closing" if worker_set.is_closing else "open"


def _tell_move(move: Move) -> str:
    if move.is_done:
        return "fat"
    if move.is_creating:
        return "creating"
    return "drained" if move.drained is not None else "asked"


def _tell_adoption(adoption: Adoption) -> str:
    if adoption.is_last_try:
        return "last try"
    return "home asked" if adoption.is_home_asked else "store asked"


def _tell_lease(lease: Lease) -> str:
    if not lease.is_granted:
        return "starting"
    return "blocked" if lease.is_blocked else "granted"


STATES: dict[type, States] = {
    Membership: States(
        lambda machine: machine.state.value,
        _transitions("outside > joining > member > fenced > joining > left, member > left, fenced > left"),
    ),
    StoredObject: States(
        lambda item: item.state.value,
        _transitions(
            "queued > creating > sealed > spilling > sealed > spilled > recalled > restoring > sealed,"
            "creating > queued, recalled > spilled, restoring > recalled"
        ),
    ),
    Pull: States(
        lambda pull: pull.phase.value,
        _transitions("sizing > waiting > allocating > opening > fetching > opening"),
    ),
    Worker: States(
        _tell_worker,
        _transitions("starting > leased > idle > leased > ending, starting > ending, starting > idle, idle > ending"),
    ),
    Lease: States(_tell_lease, _transitions("starting > granted > blocked > granted")),
    ActorChannel: States(
        lambda channel: channel.actor.state,
        _transitions("pending > alive > restarting > alive > dead, pending > dead, restarting > dead,"
                     "pending > restarting"),
    ),
    WorkerSlot: States(
        _tell_slot,
        _transitions("open > taking back > open > blocked > open > retiring, blocked > retiring,"
                     "taking back > retiring, taking back > blocked > taking back"),
    ),
    WorkerSet: States(
        _tell_set,
        _transitions("open > closing > ended, open > terminated > ended, closing > terminated, open > failed > ended"),
    ),
    Move: States(_tell_move, _transitions("asked > drained > creating > drained > fat")),
    Adoption: States(_tell_adoption, _transitions("store asked > home asked > last try")),
    Wait: States(lambda wait: "popping" if wait.is_popping else "waiting", _transitions("waiting > popping > waiting")),
}  # fmt: skip
