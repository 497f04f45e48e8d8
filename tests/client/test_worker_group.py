"""Worker groups: initializers, sizes, deaths; the ground that pools and executors stand on."""

from __future__ import annotations

import gc
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clusterpool
from clusterpool import errors
from clusterpool.client.worker_group import GroupWorker, TaskKind, WorkerGroup
from tests.client.engine import MIB, store_bytes, wait_for

pytestmark = pytest.mark.usefixtures("cluster", "nothing_left")


class Sink:
    """Keeps what it is told, by index."""

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}
        self.errors: dict[int, BaseException] = {}
        self.workers: dict[int, GroupWorker | None] = {}

    def task_done(self, index: int, value: Any, error: BaseException | None, worker: GroupWorker | None) -> None:
        assert index not in self.values and index not in self.errors, f"task {index} ended twice"
        if error is None:
            self.values[index] = value
        else:
            self.errors[index] = error
        self.workers[index] = worker

    def wait(self, count: int) -> dict[int, Any]:
        assert wait_for(lambda: len(self.values) + len(self.errors) >= count, 30), (self.values, self.errors)
        return self.values


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def groups() -> Any:
    made: list[WorkerGroup] = []

    def make(size: int = 2, **options: Any) -> WorkerGroup:
        made.append(WorkerGroup(size, **options))
        return made[-1]

    yield make
    for group in made:
        group.terminate()
        assert group.join(20)


def test_tasks_and_chunks(groups: Any, sink: Sink) -> None:
    group = groups()
    group.submit(pow, (2, 5), {}, sink, 0)
    group.submit_chunks(abs, [[-1, -2], [-3]], sink, kind=TaskKind.MAP, first_index=1)
    group.submit_chunks(pow, [[(2, 3)], [(3, 2), (1, 1)]], sink, kind=TaskKind.STARMAP, first_index=3)
    assert sink.wait(5) == {0: 32, 1: [1, 2], 2: [3], 3: [8], 4: [9, 1]}
    assert group.pending() == 0


def test_what_an_initializer_refers_to_lives_with_the_group(groups: Any, sink: Sink) -> None:
    array = np.arange(500_000)
    ref, argument = clusterpool.put(array), clusterpool.put("argument")
    kept: dict[str, Any] = {}

    def initialize(refs: list[Any]) -> None:
        import builtins

        builtins.engine_test = clusterpool.get([ref, *refs], timeout=20)  # type: ignore[attr-defined]

    def look() -> tuple[int, str]:
        import builtins

        found = builtins.engine_test  # type: ignore[attr-defined]
        return int(found[0][-1]), found[1]

    group = groups(initializer=initialize, initargs=([argument],))
    del ref, argument, initialize
    gc.collect()
    assert group.wait_ready(20)
    for index in range(4):
        group.submit(look, (), {}, sink, index)
    assert set(sink.wait(4).values()) == {(499_999, "argument")}
    # A worker that comes later finds them too.
    first = group.workers()[0]
    os.kill(first.pid, signal.SIGKILL)
    assert wait_for(lambda: len(group.workers()) == 2 and first.pid not in [w.pid for w in group.workers()])
    group.submit(look, (), {}, sink, 4)
    assert sink.wait(5)[4] == (499_999, "argument")
    assert not kept


def test_large_arguments_of_an_initializer_are_stored_once(groups: Any, sink: Sink) -> None:
    def initialize(array: Any, parts: list[bytes]) -> None:
        import builtins

        builtins.engine_test = int(array.sum()) + sum(map(len, parts))  # type: ignore[attr-defined]

    def look() -> int:
        import builtins

        return builtins.engine_test  # type: ignore[attr-defined,no-any-return]

    array = np.ones(50 * MIB, np.uint8)
    group = groups(3, initializer=initialize, initargs=(array, [b"x" * 500_000] * 6))
    assert group.wait_ready(30)
    assert 50 * MIB < store_bytes() < 56 * MIB
    group.submit(look, (), {}, sink)
    assert sink.wait(1)[0] == 53 * MIB + 3_000_000 - 3 * MIB


def test_an_initializer_that_fails_is_reported(groups: Any, sink: Sink) -> None:
    failures: list[BaseException] = []

    def initialize() -> None:
        raise KeyError("no configuration")

    group = groups(1, initializer=initialize, on_setup_failed=failures.append)
    group.submit(abs, (1,), {}, sink)
    sink.wait(1)
    assert isinstance(failures[0], KeyError)
    assert isinstance(sink.errors[0], (KeyError, errors.WorkerSetupFailed))


def test_references_in_closures_and_arguments(groups: Any, sink: Sink) -> None:
    ref, other = clusterpool.put(np.full(300_000, 2)), clusterpool.put(5)

    def read(x: int, y: Any) -> int:
        return int(clusterpool.get(ref, timeout=20)[0]) + x + y

    group = groups()
    for index in range(4):
        group.submit(read, (index, other), {}, sink, index)
    group.submit_chunks(lambda x: int(clusterpool.get(ref, timeout=20)[1]) * x, [[1, 2], [3]], sink,
                        kind=TaskKind.MAP, first_index=4)  # fmt: skip
    del ref, read
    assert sink.wait(6) == {0: 7, 1: 8, 2: 9, 3: 10, 4: [2, 4], 5: [6]}


def test_functions_with_much_data_go_through_the_store(groups: Any, sink: Sink) -> None:
    table = [bytes([number]) * 300_000 for number in range(10)]

    def look(number: int) -> int:
        return table[number][0]

    group = groups()
    for number in range(10):
        group.submit(look, (number,), {}, sink, number)
    assert list(sink.wait(10).values()) and sink.values == {number: number for number in range(10)}
    assert store_bytes() > 3_000_000
    del look, table
    gc.collect()
    assert wait_for(lambda: store_bytes() == 0)


def test_an_object_that_is_called_is_pickled_for_each_call(groups: Any, sink: Sink) -> None:
    class Adder:
        def __init__(self) -> None:
            self.amount = 1

        def __call__(self, x: int) -> int:
            return x + self.amount

    adder, group = Adder(), groups()
    group.submit_chunks(adder, [[1]], sink, kind=TaskKind.MAP, first_index=0)
    adder.amount = 10
    group.submit_chunks(adder, [[1]], sink, kind=TaskKind.MAP, first_index=1)
    group.submit(adder, (1,), {}, sink, 2)
    assert sink.wait(3) == {0: [2], 1: [11], 2: 11}


def test_large_results_are_freed_once_they_are_read(groups: Any, sink: Sink) -> None:
    group = groups()

    def make(value: int) -> Any:
        return np.full(3 * MIB, value, np.uint8)

    for value in range(4):
        group.submit(make, (value,), {}, sink, value)
    for value, array in sink.wait(4).items():
        assert (array == value).all()
    del array
    sink.values.clear()
    gc.collect()
    assert wait_for(lambda: store_bytes() == 0)


def test_large_results_of_a_terminated_group_are_freed(groups: Any, sink: Sink) -> None:
    group = groups()

    def make(seconds: float) -> Any:
        time.sleep(seconds)
        return np.zeros(3 * MIB, np.uint8)

    for index in range(10):
        group.submit(make, (0.01 * index,), {}, sink, index)
    time.sleep(0.05)
    group.terminate()
    sink.wait(10)
    assert all(isinstance(error, errors.TaskCancelled) for error in sink.errors.values())


def test_a_worker_that_dies_is_replaced_and_reported(groups: Any, sink: Sink) -> None:
    died: list[tuple[GroupWorker, str]] = []
    group = groups(1, on_worker_died=lambda worker, text: died.append((worker, text)))
    assert group.wait_ready(20)
    (before,) = group.workers()

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    group.submit(die, (), {}, sink, 0)
    group.submit(abs, (-1,), {}, sink, 1)
    sink.wait(2)
    assert isinstance(sink.errors[0], errors.WorkerDied) and "SIGKILL" in str(sink.errors[0])
    assert sink.values == {1: 1}
    assert died[0][0].pid == before.pid and died[0][0].exit_code == -signal.SIGKILL
    (after,) = group.workers()
    assert after.pid != before.pid


def test_retries_of_a_group(groups: Any, sink: Sink, tmp_path: Path) -> None:
    def die_once(folder: str) -> int:
        attempt = len(os.listdir(folder)) + 1
        Path(folder, str(attempt)).touch()
        if attempt == 1:
            os._exit(1)
        return attempt

    groups(1, retries=1).submit(die_once, (str(tmp_path),), {}, sink)
    assert sink.wait(1)[0] == 2


def test_workers_end_after_their_number_of_tasks(groups: Any, sink: Sink) -> None:
    group = groups(2, tasks_per_worker_max=3)
    for index in range(20):
        group.submit(os.getpid, (), {}, sink, index)
    pids = list(sink.wait(20).values())
    assert max(pids.count(pid) for pid in pids) <= 3


def test_close_finishes_what_was_submitted(groups: Any, sink: Sink) -> None:
    group = groups()
    for index in range(10):
        group.submit(time.sleep, (0.02,), {}, sink, index)
    group.close()
    with pytest.raises(RuntimeError, match="closed"):
        group.submit(abs, (1,), {}, sink, 99)
    assert group.join(20)
    assert len(sink.values) == 10 and not sink.errors


def test_cancel_and_force(groups: Any, sink: Sink, tmp_path: Path) -> None:
    group = groups(1)

    def touch_and_sleep(path: str) -> None:
        Path(path).touch()
        time.sleep(60)

    running = group.submit(touch_and_sleep, (str(tmp_path / "started"),), {}, sink, 0)
    queued = group.submit(abs, (-1,), {}, sink, 1)
    assert wait_for((tmp_path / "started").exists)
    assert group.is_running(running) and not group.is_running(queued)
    assert group.cancel(queued) is True
    assert group.cancel(running) is False
    assert group.cancel(running, force=True) is True
    sink.wait(2)
    assert isinstance(sink.errors[0], errors.TaskCancelled) and isinstance(sink.errors[1], errors.TaskCancelled)
    group.submit(abs, (-2,), {}, sink, 2)
    assert sink.wait(3)[2] == 2


def test_what_cannot_be_pickled_is_told_to_the_sink(groups: Any, sink: Sink) -> None:
    import threading

    lock = threading.Lock()
    group = groups()
    group.submit(abs, (lock,), {}, sink, 0)
    group.submit(lambda: lock, (), {}, sink, 1)
    group.submit_chunks(abs, [[1], [lock]], sink, kind=TaskKind.MAP, first_index=2)
    sink.wait(4)
    assert {index: type(error) for index, error in sink.errors.items()} == {0: TypeError, 1: TypeError, 3: TypeError}
    assert sink.values == {2: [1]}


def test_sizes(groups: Any) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        WorkerGroup(0)
    group = groups(1)
    assert group.wait_ready(20)
    group.resize(3)
    assert wait_for(lambda: len(group.workers()) == 3)
    group.resize(1)
    assert wait_for(lambda: len(group.workers()) == 1)
    with pytest.raises(ValueError, match="at least 1"):
        group.resize(0)


def test_environment_variables_of_a_group(groups: Any, sink: Sink) -> None:
    groups(1, env={"ENGINE_TEST": "group"}).submit(os.getenv, ("ENGINE_TEST",), {}, sink)
    assert sink.wait(1)[0] == "group"
