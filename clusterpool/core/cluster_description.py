"""What a node knows of another one, as the scheduler and as people want it."""

from __future__ import annotations

from clusterpool.core import messages as m
from clusterpool.core.cluster_view import NodeView
from clusterpool.core.placement import Candidate
from clusterpool.core.resources import to_amounts

_HEAD = "head"  # the label that the cluster itself gives; all others are users'


def candidate_of(view: NodeView) -> Candidate:
    """For the placement of workers."""
    free = {name: round(amount * 10_000) for name, amount in view.available.items()}
    return Candidate(view.node_id, to_amounts(view.total), free, view.queue_length, view.leases, False)


def part_of(view: NodeView) -> m.NodePart:
    """For the description of the cluster."""
    host, port = view.address
    return m.NodePart(
        node_id=view.node_id,
        host=view.host_name or host,
        alive=not view.is_suspect,
        is_head=view.labels.get(_HEAD) == "yes",
        total=view.total,
        available={name: view.available.get(name, 0.0) for name in view.total},
        workers=view.workers,
        queue_length=view.queue_length,
        store_bytes=view.arena_size_bytes,
        store_used_bytes=view.arena_used_bytes,
        spilled_bytes=view.spilled_bytes,
        pid=view.pid,
        address=f"{host}:{port}" if port else "",
        labels={name: value for name, value in view.labels.items() if name != _HEAD},
    )
