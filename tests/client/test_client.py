"""What the client promises when threads, callbacks and references meet; on a real cluster."""

from __future__ import annotations

import concurrent.futures
import gc
import threading
import time
from typing import Any

import pytest

import clusterpool
from clusterpool.errors import NotConnected

LIMIT_S = 20.0


def test_futures_that_are_pending_at_the_end_are_told(fresh: None) -> None:
    clusterpool.init(num_cpus=1)

    @clusterpool.remote
    def sleep() -> None:
        time.sleep(60)

    future = sleep.remote().future()
    told = threading.Event()
    future.add_done_callback(lambda _: told.set())
    clusterpool.shutdown()
    assert told.wait(LIMIT_S)
    assert isinstance(future.exception(0), NotConnected)


@pytest.mark.usefixtures("cluster")
class TestOnOneCluster:
    def test_calls_with_and_without_references_run_in_their_order(self) -> None:
        @clusterpool.remote
        class Recorder:
            def __init__(self) -> None:
                self.seen: list[int] = []

            def add(self, number: int) -> None:
                self.seen.append(number)

            def all(self) -> list[int]:
                return self.seen

        recorder = Recorder.remote()
        refs = [clusterpool.put(number) for number in range(100)]
        for number in range(100):
            recorder.add.remote(refs[number] if number % 3 else number)
        assert clusterpool.get(recorder.all.remote(), timeout=LIMIT_S) == list(range(100))

    def test_the_last_reference_to_an_object_survives_the_way_home(self) -> None:
        @clusterpool.remote
        def identity(box: list[Any]) -> list[Any]:
            return box

        @clusterpool.remote
        class Keeper:
            def keep(self, box: list[Any]) -> None:
                self.box = box

            def give(self) -> list[Any]:
                box, self.box = self.box, []
                return box

        keeper = Keeper.remote()
        for number in range(30):
            (ref,) = clusterpool.get(identity.remote([clusterpool.put(number)]), timeout=LIMIT_S)
            assert clusterpool.get(ref, timeout=LIMIT_S) == number
            clusterpool.get(keeper.keep.remote([clusterpool.put(number)]), timeout=LIMIT_S)
            gc.collect()
            (ref,) = clusterpool.get(keeper.give.remote(), timeout=LIMIT_S)
            assert clusterpool.get(ref, timeout=LIMIT_S) == number

    def test_a_callback_may_wait_for_another_result_of_the_same_message(self) -> None:
        with clusterpool.Executor(1) as executor:
            executor.submit(int).result(LIMIT_S)
            futures = [executor.submit(abs, -number) for number in range(200)]
            outcome: concurrent.futures.Future[int] = concurrent.futures.Future()
            futures[0].add_done_callback(lambda _: outcome.set_result(futures[199].result(LIMIT_S)))
            assert outcome.result(LIMIT_S) == 199

    def test_threads_that_get_what_they_just_submitted_never_find_it_lost(self) -> None:
        @clusterpool.remote
        def double(number: int) -> int:
            return 2 * number

        errors: list[BaseException] = []

        def user() -> None:
            try:
                for number in range(100):
                    refs = [double.remote(number), double.remote(number + 1)]
                    assert clusterpool.get(refs, timeout=LIMIT_S) == [2 * number, 2 * number + 2]
                    ready, rest = clusterpool.wait([double.remote(1), double.remote(2)], num_returns=2, timeout=LIMIT_S)
                    assert (len(ready), rest) == (2, [])
            except BaseException as exc:
                errors.append(exc)

        threads = [threading.Thread(target=user) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * LIMIT_S)
        assert not errors
        assert not any(thread.is_alive() for thread in threads)
