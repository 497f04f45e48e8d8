"""The list of jobs after an outage; on the fake and on a real server."""

from __future__ import annotations

import pytest

from clusterpool.control_store.job_registry import reconcile_jobs
from clusterpool.control_store.port import ControlStorePort
from clusterpool.control_store.records import JobRecord, encode_record
from tests.contracts.test_control_store_contract import Connect, connect, record

__all__ = ["connect"]


@pytest.fixture
def store(connect: Connect) -> ControlStorePort:
    store = connect()
    for node_id in ("n1", "n2"):
        store.register_node(record(node_id))
    for job_id, node_id in (("j1", "n1"), ("j2", "n1"), ("j3", "n2"), ("j4", "n3")):
        store.register_job(job_id, encode_record(JobRecord(job_id, node_id, "d1", 7)))
    return store


def test_jobs_whose_drivers_ended_during_an_outage_are_taken_off_the_list(store: ControlStorePort) -> None:
    assert reconcile_jobs(store, "n1", ["j1"], is_for_all=False) == {"j2": ""}
    assert set(store.list_jobs()) == {"j1", "j3", "j4"}
    assert reconcile_jobs(store, "n1", ["j1"], is_for_all=False) == {}
    assert set(store.list_jobs()) == {"j1", "j3", "j4"}


def test_jobs_of_nodes_that_are_no_more_are_taken_off_by_one_of_the_others(store: ControlStorePort) -> None:
    assert reconcile_jobs(store, "n2", ["j3"], is_for_all=True) == {"j4": "n3"}
    assert set(store.list_jobs()) == {"j1", "j2", "j3"}
