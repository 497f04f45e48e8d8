"""Spilled files that cannot be read any more: the copy counts as lost, to be made again, or missed with a reason.

The second program has a disk of its own that is full, so that readers read the files themselves.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clusterpool
from clusterpool import errors
from clusterpool.client import current
from tests.client.engine import MIB, check_nothing_left, wait_for
from tests.faults.test_full_disk import CAN_MOUNT, run_with_small

pytestmark = pytest.mark.usefixtures("fresh")

SIZE_BYTES = 10 * MIB


def spill_folder() -> Path:
    registered = current.get().client.registered
    assert registered is not None
    return Path(registered.spill_folder)


def damage(path: Path, how: str) -> None:
    if how == "gone":
        path.unlink()
    elif how == "short":
        os.truncate(path, 1000)
    else:
        with path.open("r+b") as file:
            file.seek(1000)
            file.write(b"other")


@pytest.mark.parametrize("how", ["gone", "short", "changed"])
def test_a_damaged_file_is_a_lost_copy(how: str, tmp_path: Path) -> None:
    clusterpool.init(num_cpus=2, object_store_bytes=64 * MIB)
    runs = tmp_path / "runs"

    @clusterpool.remote
    def make(number: int) -> Any:
        with runs.open("a") as file:
            file.write(f"{number}\n")
        return np.full(SIZE_BYTES, number, np.uint8)

    @clusterpool.remote
    def first_and_last(array: Any) -> tuple[int, int]:
        return int(array[0]), int(array[-1])

    made, in_task = make.remote(1), make.remote(2)
    clusterpool.wait([made, in_task], num_returns=2, timeout=30)
    kept = clusterpool.put(np.full(SIZE_BYTES, 3, np.uint8))
    others = [clusterpool.put(np.full(SIZE_BYTES, number, np.uint8)) for number in range(8)]
    paths = [spill_folder() / f"{ref.part.owner.process_id}.{ref.part.number}" for ref in (made, in_task, kept)]
    assert wait_for(lambda: all(path.exists() for path in paths), 20)
    for path in paths:
        damage(path, how)
    assert clusterpool.get(made, timeout=30).tolist() == [1] * SIZE_BYTES
    assert clusterpool.get(first_and_last.remote(in_task), timeout=30) == (2, 2)
    assert sorted(runs.read_text().split()) == ["1", "1", "2", "2"]
    with pytest.raises(errors.ObjectLost, match="only what a task has made") as caught:
        clusterpool.get(kept, timeout=30)
    assert str(paths[2]) in str(caught.value)
    assert [int(clusterpool.get(ref, timeout=30)[-1]) for ref in others] == list(range(8))
    del made, in_task, kept, others, caught
    check_nothing_left()


ON_A_FULL_DISK = """
import pathlib, numpy as np, clusterpool
from clusterpool import errors
from clusterpool.client import current
MIB = 1 << 20

def make(number):
    return np.full(10 * MIB, number, np.uint8)

clusterpool.init(num_cpus=2, object_store_bytes=64 * MIB)
made = clusterpool.remote(make).remote(1)
clusterpool.wait([made], timeout=30)
kept = clusterpool.put(make(2))
others = []
try:
    while len(others) < 40:
        others.append(clusterpool.put(make(len(others))))
except errors.StoreFull:
    print("full")
folder = pathlib.Path(current.get().client.registered.spill_folder)
for ref in (made, kept):
    path = folder / f"{ref.part.owner.process_id}.{ref.part.number}"
    with path.open("r+b") as file:
        file.write(b"other bytes")
try:
    clusterpool.get(kept, timeout=30)
except errors.ObjectLost as exc:
    print(f"{path} holds other bytes than were written" in str(exc), "only what a task has made" in str(exc))
array = clusterpool.get(made, timeout=30)
print(int(array[0]), int(array[-1]), array.nbytes == 10 * MIB)
print([int(clusterpool.get(ref, timeout=30)[-1]) for ref in others] == list(range(len(others))))
clusterpool.shutdown()
"""


@pytest.mark.skipif(not CAN_MOUNT, reason="mounting a small file system needs root")
def test_a_reader_that_finds_a_damaged_file_gets_the_value_made_again() -> None:
    folder = Path(os.environ["CLUSTERPOOL_TMPDIR"])
    assert run_with_small(folder, "300m", ON_A_FULL_DISK) == ["full", "True True", "1 1 True", "True"]
