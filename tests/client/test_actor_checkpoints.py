"""Actors with checkpoints: what a restart gives back, and that each acknowledged call counts once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import clusterpool
from clusterpool import errors

pytestmark = pytest.mark.usefixtures("cluster", "nothing_left")
FOR_EVER = {"max_restarts": -1, "max_task_retries": -1}


class Plain:
    """State as pickle sees it. `folder`: tells one life from another."""

    def __init__(self, folder: str = "") -> None:
        self.values: list[int] = []
        self.folder = folder
        if folder:
            Path(folder, f"constructed-{os.getpid()}").touch()

    def add(self, value: int) -> int:
        self.values.append(value)
        return len(self.values)

    def all(self) -> list[int]:
        return self.values

    def pid(self) -> int:
        return os.getpid()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def size(self, value: Any) -> int:
        self.values.append(len(value))
        return len(value)


class Explicit(Plain):
    """State as the class says."""

    def save(self) -> Any:
        Path(self.folder, f"saved-{len(self.values)}").touch()
        return list(self.values)

    def load(self, state: Any) -> None:
        self.values = state


def killed(actor: Any) -> None:
    """Kill the process, and wait until the next one answers."""
    pid = clusterpool.get(actor.pid.remote(), timeout=30)
    os.kill(pid, signal.SIGKILL)
    assert clusterpool.get(actor.pid.remote(), timeout=30) != pid


@pytest.mark.parametrize("every", [1, 4, 1000])
def test_state_and_order_survive_the_process(every: int) -> None:
    actor = clusterpool.remote(Plain).options(checkpoint_every=every, **FOR_EVER).remote()
    expected: list[int] = []
    for life in range(3):
        numbers = [10 * life + number for number in range(7)]
        expected += numbers
        refs = [actor.add.remote(number) for number in numbers]
        assert clusterpool.get(refs[-1], timeout=30) == len(expected)
        killed(actor)
        assert clusterpool.get(actor.all.remote(), timeout=30) == expected


def test_save_and_load_are_used_where_there_are_both(tmp_path: Path) -> None:
    actor = clusterpool.remote(Explicit).options(checkpoint_every=5, **FOR_EVER).remote(str(tmp_path))
    clusterpool.get([actor.add.remote(number) for number in range(12)], timeout=30)
    killed(actor)
    assert clusterpool.get(actor.all.remote(), timeout=30) == list(range(12))
    names = sorted(os.listdir(tmp_path))
    assert {"saved-5", "saved-10"} <= set(names)
    assert len([name for name in names if name.startswith("constructed")]) == 2


def test_a_checkpoint_by_time() -> None:
    actor = clusterpool.remote(Plain).options(checkpoint_period_s=0, **FOR_EVER).remote()
    clusterpool.get([actor.add.remote(number) for number in range(5)], timeout=30)
    killed(actor)
    assert clusterpool.get(actor.all.remote(), timeout=30) == list(range(5))


def test_large_arguments_and_references_are_saved_before_their_result_is_out() -> None:
    actor = clusterpool.remote(Plain).options(checkpoint_every=1000, **FOR_EVER).remote()
    refs = [
        actor.add.remote(7),
        actor.size.remote(bytes(3_000_000)),
        actor.size.remote([clusterpool.put(1), 2]),
        actor.size.remote(clusterpool.put("abc")),
        actor.add.remote(8),
    ]
    assert clusterpool.get(refs, timeout=30) == [1, 3_000_000, 2, 3, 5]
    del refs
    killed(actor)
    assert clusterpool.get(actor.all.remote(), timeout=30) == [7, 3_000_000, 2, 3, 8]


class Poisoned(Plain):
    """The call of one number dies before or after it has changed the state, once."""

    def add(self, value: int) -> int:
        if value == 5 and not Path(self.folder, "died").exists():
            Path(self.folder, "died").touch()
            if self.folder.endswith("before"):
                self.die()
            super().add(value)
            self.die()
        return super().add(value)


class DiesSaving(Explicit):
    """It dies while it saves its state."""

    def save(self) -> Any:
        if len(self.values) >= 5 and not Path(self.folder, "died").exists():
            Path(self.folder, "died").touch()
            self.die()
        return super().save()


@pytest.mark.parametrize("moment", ["before", "after", "checkpointing"])
def test_a_call_counts_once_whenever_its_process_dies(tmp_path: Path, moment: str) -> None:
    folder = tmp_path / moment
    folder.mkdir()
    cls = DiesSaving if moment == "checkpointing" else Poisoned
    actor = clusterpool.remote(cls).options(checkpoint_every=3, **FOR_EVER).remote(str(folder))
    refs = [actor.add.remote(number) for number in range(10)]
    assert clusterpool.get(refs, timeout=40) == list(range(1, 11))
    assert (folder / "died").exists()
    assert clusterpool.get(actor.all.remote(), timeout=30) == list(range(10))


@clusterpool.remote(num_cpus=0)
class Adder:
    """One of many callers."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def run(self, first: int, count: int) -> list[int]:
        refs = [self.handle.add.remote(number) for number in range(first, first + count)]
        clusterpool.get(refs, timeout=50)
        return list(range(first, first + count))


def test_each_call_of_many_callers_counts_once_while_the_actor_is_killed_again_and_again() -> None:
    seed = 4
    chance = random.Random(seed)
    actor = clusterpool.remote(Plain).options(checkpoint_every=17, **FOR_EVER).remote()
    callers = [Adder.remote(actor) for _ in range(3)]
    is_done = threading.Event()
    kills = 0

    def torment() -> None:
        nonlocal kills
        while not is_done.wait(chance.uniform(0.05, 0.4)):
            with contextlib.suppress(errors.ActorUnavailable, ProcessLookupError):
                os.kill(clusterpool.get(actor.pid.remote(), timeout=40), signal.SIGKILL)
                kills += 1

    thread = threading.Thread(target=torment)
    thread.start()
    try:
        started_s, first, acknowledged = time.monotonic(), 0, []
        while time.monotonic() - started_s < 8 or kills < 3:
            refs = [caller.run.remote(first + 1_000_000 * number, 40) for number, caller in enumerate(callers)]
            for numbers in clusterpool.get(refs, timeout=50):
                acknowledged += numbers
            first += 40
    finally:
        is_done.set()
        thread.join()
    values = clusterpool.get(actor.all.remote(), timeout=30)
    assert sorted(values) == sorted(acknowledged)
    for number in range(3):
        mine = [value for value in values if value // 1_000_000 == number]
        assert mine == sorted(mine), "the calls of one caller ran in order"


class Unsavable(Plain):
    """Its state cannot always be saved."""

    def __getstate__(self) -> Any:
        if len(self.values) == 2:
            raise KeyError("not now")
        return {"values": self.values} if len(self.values) < 4 else {"values": bytes(40_000_000)}


def test_a_state_that_cannot_be_saved_is_an_error_of_the_call_and_loses_nothing() -> None:
    actor = clusterpool.remote(Unsavable).options(checkpoint_every=1, **FOR_EVER).remote()
    assert clusterpool.get(actor.add.remote(1), timeout=30) == 1
    with pytest.raises(errors.CheckpointFailed, match="not now"):
        clusterpool.get(actor.add.remote(2), timeout=30)
    assert clusterpool.get(actor.add.remote(3), timeout=30) == 3
    with pytest.raises(errors.CheckpointFailed, match="MiB"):
        clusterpool.get(actor.add.remote(4), timeout=30)
    with pytest.raises(errors.CheckpointFailed):
        clusterpool.get(actor.add.remote(5), timeout=30)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"checkpoint_every": 1}, "max_restarts"),
        ({"checkpoint_every": 1, "max_restarts": 1, "max_concurrency": 2}, "one by one"),
        ({"checkpoint_every": 0, "max_restarts": 1}, "checkpoint_every"),
        ({"checkpoint_period_s": -1, "max_restarts": 1}, "checkpoint_period_s"),
        ({"max_restarts": -2}, "max_restarts"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        clusterpool.remote(Plain).options(**options).remote()
