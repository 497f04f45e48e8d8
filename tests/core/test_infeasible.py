from __future__ import annotations

import pytest

from clusterpool.core.infeasible import why_infeasible
from clusterpool.core.messages import WorkerDemand, WorkerKind
from clusterpool.core.placement import Candidate
from clusterpool.core.resources import UNIT

NODES = [Candidate("n1", {"CPU": 2 * UNIT, "node:n1": UNIT}, {}, 0, 0, True)]


@pytest.mark.parametrize(
    ("resources", "strategy", "texts"),
    [
        ({"CPU": 3}, "", ["fit needs 3 CPU, which no node", "(n1: 2 CPU)", "ask for less"]),
        ({}, "node:n2", ["fit must run on node 'n2'", "not in the cluster", "(n1: 2 CPU)", "'near:<id>'"]),
        ({"CPU": 3}, "node:n1", ["needs 3 CPU with strategy 'node:n1'"]),
    ],
)
def test_the_cause_and_the_remedy_are_named(resources: dict[str, float], strategy: str, texts: list[str]) -> None:
    text = why_infeasible(WorkerDemand(WorkerKind.TASK, resources, "fit", strategy=strategy), NODES)
    assert all(part in text for part in texts), text
