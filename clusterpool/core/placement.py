"""On which node a worker goes: pure functions over what one node knows of the others.

Bottom-up (Ray paper, section 4.2.2): a request is met where it was made when that is possible; only else is it passed
on, to the node where the arguments' bytes are, the wait is short and the load low.
"""

from __future__ import annotations

from typing import NamedTuple

from clusterpool.core.messages import WorkerDemand
from clusterpool.core.resources import UNIT


class Candidate(NamedTuple):
    """One node as placement sees it; amounts as in resources.py."""

    node_id: str
    total: dict[str, int]
    free: dict[str, int]
    queue_length: int
    workers: int
    is_self: bool


def is_feasible(candidate: Candidate, demand: dict[str, int]) -> bool:
    """Whether the node, all idle, would have enough."""
    return all(candidate.total.get(name, 0) >= amount for name, amount in demand.items())


def has_room(candidate: Candidate, demand: dict[str, int]) -> bool:
    """Whether the node has enough right now, as far as is known here."""
    return all(candidate.free.get(name, 0) >= amount for name, amount in demand.items())


def bytes_by_node(demand: WorkerDemand) -> dict[str, int]:
    """How many bytes of the first task's arguments each node already has."""
    held: dict[str, int] = {}
    for stored in demand.stored:
        for node_id in stored.node_ids:
            held[node_id] = held.get(node_id, 0) + stored.size_bytes
    return held


def choose_node(candidates: list[Candidate], demand: dict[str, int], wish: WorkerDemand) -> str | None:
    """The best node for one worker; None when no node could ever have it."""
    if wish.strategy.startswith("node:"):
        wanted = wish.strategy.removeprefix("node:")
        candidates = [candidate for candidate in candidates if candidate.node_id == wanted]
    feasible = [candidate for candidate in candidates if is_feasible(candidate, demand)]
    if not feasible:
        return None
    held = bytes_by_node(wish)
    near = wish.strategy.removeprefix("near:") if wish.strategy.startswith("near:") else ""
    is_spread = wish.strategy == "spread"

    def rank(candidate: Candidate) -> tuple[object, ...]:
        room = has_room(candidate, demand)
        load = _load(candidate)
        if is_spread:
            crowd = _crowd(candidate)
            if "CPU" not in demand:
                # As most actors: each shows in the number of workers only, and the freest node would get them all.
                load += crowd
            return (not room, load, crowd, candidate.queue_length, not candidate.is_self)
        return (
            candidate.node_id != near if near and room else bool(near),
            not room,
            -held.get(candidate.node_id, 0) if room else 0,
            not candidate.is_self if room else False,
            candidate.queue_length / max(1, candidate.total.get("CPU", 0)),
            load,
            not candidate.is_self,
        )

    return min(feasible, key=rank).node_id


def spread_group(candidates: list[Candidate], demand: dict[str, int], count: int) -> dict[str, int]:
    """How many of a group's workers go to each node: always to the one with the least work for a CPU."""
    feasible = [candidate for candidate in candidates if is_feasible(candidate, demand)]
    counts = {candidate.node_id: 0 for candidate in feasible}
    if not feasible:
        return {}
    for _ in range(count):
        best = min(
            feasible,
            key=lambda candidate: (
                (candidate.workers + counts[candidate.node_id] + 1) / max(1, candidate.total.get("CPU", 0)),
                not candidate.is_self,
            ),
        )
        counts[best.node_id] += 1
    return {node_id: assigned for node_id, assigned in counts.items() if assigned}


def _crowd(candidate: Candidate) -> float:
    """Workers for a CPU, with one more; a node without CPUs comes behind all others."""
    return (candidate.workers + 1) * UNIT / max(1, candidate.total.get("CPU", 0))


def _load(candidate: Candidate) -> float:
    total = candidate.total.get("CPU", 0)
    return 1.0 - candidate.free.get("CPU", 0) / total if total else 1.0
