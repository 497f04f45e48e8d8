"""What a node's machine hears (past tense) and what it asks its shell to do (imperative).

The parts' own events and commands (object store, transfers, membership) pass through as they are.
"""

from __future__ import annotations

from typing import Any

import msgspec

from clusterpool.core.messages import Address, JobPart, LastTask, Message


class Event(msgspec.Struct, frozen=True, gc=False):
    """Base of the events."""


class Command(msgspec.Struct, frozen=True, gc=False):
    """Base of the commands."""


# --- events ---------------------------------------------------------------------------------------------------------


class ProcessJoined(Event, frozen=True):
    """A driver, worker or tool of this host has said who it is."""

    address: Address
    kind: str
    pid: int
    job: JobPart | None
    wants_logs: bool


class ProcessLeft(Event, frozen=True):
    """Its connection is closed; by us if it `sent_rubbish`."""

    address: Address
    sent_rubbish: bool = False


class MessageArrived(Event, frozen=True):
    """From a process of this node, or through another node."""

    source: Address
    message: Message


class WorkerEnded(Event, frozen=True):
    """A worker process was waited for, and all it printed was read. `text` says how and probably why; `task`,
    `peak_bytes` and `cause` as in WorkerExited."""

    process_id: str
    exit_code: int
    text: str
    task: LastTask = LastTask()
    peak_bytes: int = 0
    cause: str = ""


class MemoryRead(Event, frozen=True):
    """How much memory is in use, of how much, `where` (the machine, a container, this node's own limit).

    `bytes_by_worker`: what each worker has for itself, by process id; None when it was not asked for. `store_bytes`:
    of the object store, where that is memory; it counts as used.
    """

    used_bytes: int
    limit_bytes: int
    where: str
    store_bytes: int
    bytes_by_worker: dict[str, int] | None = None


class ForkFailed(Event, frozen=True):
    """There is no such worker."""

    process_id: str
    text: str


class PagesReserved(Event, frozen=True):
    """Answer to ReservePages: the arena's file has them."""

    client: str
    request: int
    object_id: str
    offset: int
    size_bytes: int


class StoreReturned(Event, frozen=True):
    """Answer to CallStore."""

    tag: int
    value: Any


class StoreRaised(Event, frozen=True):
    """CallStore failed; `kind` is the name of the exception's class."""

    tag: int
    kind: str
    text: str


class ActorEventRead(Event, frozen=True):
    """The change feed says that an actor changed."""

    actor_id: str
    state: str = ""  # its new one; "": look
    address: Address | None = None
    life: int = -1  # -1: not known


class FrameRejected(Event, frozen=True):
    """Something came in at a border of the node that is none of ours. `cause`: a few words, the same each time."""

    cause: str
    text: str


class TimePassed(Event, frozen=True):
    """A tick of the clock, every TICK_S seconds."""


# --- commands -------------------------------------------------------------------------------------------------------


class Send(Command, frozen=True):
    """Send a message to a process, here or on another node, in order with all others to it."""

    destination: Address
    message: Message


class ForkWorker(Command, frozen=True):
    """Start a worker process."""

    process_id: str
    job: JobPart
    env: dict[str, str]
    name: str
    is_process: bool = False  # it will be a `Process`
    has_many_names: bool = False  # it runs functions of several names; `name` is that of the first


class EndWorker(Command, frozen=True):
    """Send a worker process this signal; with all that it has started in its process group, if `with_group`."""

    process_id: str
    signal: int
    with_group: bool = False


class ReadMemory(Command, frozen=True):
    """Answer with MemoryRead after `after_s`; with what each worker has, if `with_workers`."""

    after_s: float
    with_workers: bool


class WarnOfMemory(Command, frozen=True):
    """Memory is about to run out; for the node's log."""

    text: str


class ReservePages(Command, frozen=True):
    """Make sure that the arena's file has these bytes; answer PagesReserved or ArenaExhausted, at once."""

    client: str
    request: int
    object_id: str
    offset: int
    size_bytes: int


class CallStore(Command, frozen=True):
    """Call this operation of the control store; answer StoreReturned or StoreRaised."""

    tag: int
    operation: str
    arguments: dict[str, Any]


class RemoveJob(Command, frozen=True):
    """A job is over on this node: its driver has ended, and its workers here. Remove what it left."""

    job_id: str


class Warn(Command, frozen=True):
    """Write this into the log."""

    text: str


class StopNode(Command, frozen=True):
    """End the node in good order."""

    text: str


class PeerJoined(Command, frozen=True):
    """Another node is known now: messages for it may go."""

    node_id: str


class PeerLost(Command, frozen=True):
    """Another node is gone: what was still to be sent to it comes back."""

    node_id: str
    text: str
