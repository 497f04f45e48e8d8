"""What to tell the owner of a request that no node could ever meet."""

from __future__ import annotations

from collections.abc import Sequence

from clusterpool.core.messages import WorkerDemand
from clusterpool.core.placement import Candidate
from clusterpool.core.resources import to_numbers
from clusterpool.sizes import memory_amount


def why_infeasible(demand: WorkerDemand, nodes: Sequence[Candidate]) -> str:
    """What was wanted, what the living nodes have, and what to do."""
    name = demand.name or "a worker"
    have = "; ".join(f"{node.node_id}: {_amounts(node)}" for node in nodes)
    wanted_node = demand.strategy.removeprefix("node:")
    if wanted_node != demand.strategy and all(node.node_id != wanted_node for node in nodes):
        return (
            f"{name} must run on node {wanted_node!r} (scheduling={demand.strategy!r}), which is not in the cluster: "
            f"it has died or left, or never was ({have}); name one of these, or use 'near:<id>', which may go elsewhere"
        )
    wanted = ", ".join(_shown(name, amount) for name, amount in sorted(demand.resources.items()))
    where = f" with strategy {demand.strategy!r}" if demand.strategy else ""
    return (
        f"{name} needs {wanted or 'nothing special'}{where}, which no node of the cluster could give even when idle "
        f"({have}); ask for less, or add a node that has it"
    )


def _amounts(node: Candidate) -> str:
    amounts = to_numbers(node.total)
    return ", ".join(_shown(name, amount) for name, amount in amounts.items() if name != f"node:{node.node_id}")


def _shown(name: str, amount: float) -> str:
    return f"{memory_amount(amount)} {name}" if name == "memory" else f"{amount:g} {name}"
