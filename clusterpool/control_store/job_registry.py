"""The list of running jobs, held against what is known of their drivers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from clusterpool.control_store.records import JobRecord, decode_record
from clusterpool.control_store.unreadable import OnUnreadable, log_unreadable, skipped_if_unreadable


def reconcile_jobs(
    store: Any,
    node_id: str,
    running: Collection[str],
    *,
    is_for_all: bool,
    tell: OnUnreadable = log_unreadable,
) -> dict[str, str]:
    """Take off the list what has ended while the store, or the node, was away; what it was.

    running: the jobs whose drivers are on this node. is_for_all: also those of nodes that are no more; with each job
    that ended so the node, which may yet come back with the driver, else "".
    """
    ended: dict[str, str] = {}
    listed: dict[str, JobRecord] = {}
    for job_id, record in store.list_jobs().items():
        with skipped_if_unreadable("jobs", job_id, tell):
            listed[job_id] = decode_record(record, JobRecord)
    # Read after the jobs: a node that joins meanwhile has none on that list.
    living = {entry.record.node_id for entry in store.list_nodes().nodes} if is_for_all else set()
    for job_id, job in listed.items():
        if job.node_id == node_id:
            if job_id not in running:
                store.finish_job(job_id, "its driver has ended")
                ended[job_id] = ""
        elif is_for_all and job.node_id not in living:
            store.finish_job(job_id, f"its node {job.node_id} is gone")
            ended[job_id] = job.node_id
    return ended
