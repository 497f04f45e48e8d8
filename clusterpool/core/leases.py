"""What a node knows of a request for workers, of a lease, and of a worker; the scheduler changes them."""

from __future__ import annotations

from clusterpool.core import messages as m
from clusterpool.core.messages import Address
from clusterpool.core.resources import Amounts, to_amounts


class Pending:
    """A request, or what is left of it."""

    __slots__ = ("amounts", "count", "demand", "hops", "job", "key", "origin", "request", "starting")

    def __init__(self, message: m.RequestWorkers, origin: Address) -> None:
        self.request = message.request
        self.origin = origin
        self.key = (origin, message.request)
        self.count = message.count
        self.demand = message.demand
        self.job = message.job
        self.hops = message.hops
        self.amounts: Amounts = to_amounts(message.demand.resources)


class Lease:
    """A worker in somebody's hands. `is_blocked`: its CPU is lent to others."""

    __slots__ = (
        "amounts", "gpu_ids", "has_env", "is_blocked", "is_granted", "is_retriable", "kind", "number", "origin",
        "outlives_owner", "request", "worker",
    )  # fmt: skip

    def __init__(self, number: int, pending: Pending, worker: Worker, gpu_ids: list[int]) -> None:
        self.number = number
        self.origin = pending.origin
        self.request = pending.request
        self.kind = pending.demand.kind
        self.amounts = pending.amounts
        self.gpu_ids = gpu_ids
        self.has_env = bool(pending.demand.env)
        self.outlives_owner = pending.demand.outlives_owner
        self.is_retriable = pending.demand.is_retriable
        self.worker = worker
        self.is_granted = False
        self.is_blocked = False


class Worker:
    """A worker process of this node."""

    __slots__ = (
        "actor_id", "actor_life", "end_cause", "end_text", "has_joined", "is_ending", "job", "lease", "name", "pid",
        "process_id",
    )  # fmt: skip

    def __init__(self, process_id: str, job: m.JobPart, name: str) -> None:
        self.process_id = process_id
        self.job = job
        self.name = name
        self.pid = 0
        self.lease: Lease | None = None
        self.has_joined = False
        self.is_ending = False
        self.end_text = ""  # why we ended it, when we did
        self.end_cause = ""
        self.actor_id = ""
        self.actor_life = 0
