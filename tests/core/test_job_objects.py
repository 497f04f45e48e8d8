"""What channels left in a node's store goes when their job is over; what belongs to others stays."""

from __future__ import annotations

from clusterpool.core import messages as m
from clusterpool.core.messages import Address
from clusterpool.core.node_events import PagesReserved, ReservePages
from clusterpool.core.node_objects import NodeObjects

NODE = "n0000000001"
WORKER = Address(NODE, "w000000000001")


def seal(objects: NodeObjects, object_id: str) -> None:
    (command,) = objects.message(WORKER, m.CreateObject(1, object_id, 1000), 0.0) or []
    assert isinstance(command, ReservePages)
    reserved = PagesReserved(command.client, command.request, command.object_id, command.offset, command.size_bytes)
    objects.pages_reserved(reserved, 0.0)
    objects.message(WORKER, m.SealObject(object_id), 0.0)


def test_objects_of_channels_outlive_their_putter_and_end_with_their_job() -> None:
    objects = NodeObjects(NODE, 1_000_000)
    of_channel, of_other_job = "j1-d1-1.w1-1", "j10-d1-1.w1-1"
    of_process = f"{WORKER.process_id}.1"
    for object_id in (of_channel, of_other_job, of_process):
        seal(objects, object_id)
    objects.process_left(WORKER.process_id, 1.0)
    assert set(objects.store.objects) == {of_channel, of_other_job}
    objects.job_ended("j1", 2.0)
    assert set(objects.store.objects) == {of_other_job}
    assert objects.store.stats().used_bytes > 0
    objects.job_ended("j10", 3.0)
    assert not objects.store.objects
    assert objects.store.stats().used_bytes == 0
