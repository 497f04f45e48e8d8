"""Actors that are started again: what becomes of their state and of the calls, for the creator and for others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import clusterpool
from clusterpool import errors
from tests.client.engine import wait_for

pytestmark = pytest.mark.usefixtures("cluster", "nothing_left")


class Counter:
    """State that a restart loses, and ways to die. `notes`: a folder that tells one life from another."""

    def __init__(self, notes: str = "", value: int = 0) -> None:
        self.value = value
        self.notes = notes
        if notes:
            Path(notes, f"life-{os.getpid()}").touch()

    def add(self, amount: int = 1) -> int:
        self.value += amount
        return self.value

    def pid(self) -> int:
        return os.getpid()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def leave(self) -> None:
        raise SystemExit(0)

    def die_once(self) -> str:
        """The first life dies of it, later ones survive it."""
        if len(os.listdir(self.notes)) == 1:
            self.die()
        return "survived"


RemoteCounter = clusterpool.remote(Counter)


def pid_of(counter: Any) -> int:
    """0 when the call has reached a life that has just ended."""
    with contextlib.suppress(errors.ActorUnavailable):
        return int(clusterpool.get(counter.pid.remote(), timeout=20))
    return 0


def test_an_actor_is_made_again_with_its_arguments() -> None:
    counter = RemoteCounter.options(max_restarts=1).remote(value=clusterpool.put(10))
    assert clusterpool.get(counter.add.remote(), timeout=20) == 11
    pid = clusterpool.get(counter.pid.remote(), timeout=20)
    with pytest.raises(errors.ActorUnavailable, match="SIGKILL"):
        clusterpool.get(counter.die.remote(), timeout=20)
    assert clusterpool.get(counter.add.remote(), timeout=20) == 11
    assert clusterpool.get(counter.pid.remote(), timeout=20) != pid
    with pytest.raises(errors.ActorUnavailable):
        clusterpool.get(counter.die.remote(), timeout=20)
    with pytest.raises(errors.ActorDied, match=r"SIGKILL(.|\n)*started again after(.|\n)*SIGKILL[^\n]*\Z") as caught:
        clusterpool.get(counter.add.remote(), timeout=20)
    assert not isinstance(caught.value, errors.ActorUnavailable)


def test_calls_are_sent_again_in_order_and_before_newer_ones(tmp_path: Path) -> None:
    counter = RemoteCounter.options(max_restarts=-1, max_task_retries=1).remote(str(tmp_path))
    refs = [counter.die_once.remote(), *(counter.add.remote() for _ in range(20))]
    assert clusterpool.get(refs, timeout=30) == ["survived", *range(1, 21)]
    assert len(os.listdir(tmp_path)) == 2


def test_a_call_that_kills_each_life_is_given_up(tmp_path: Path) -> None:
    counter = RemoteCounter.options(max_restarts=-1, max_task_retries=2).remote(str(tmp_path))
    with pytest.raises(errors.ActorUnavailable):
        clusterpool.get(counter.die.remote(), timeout=30)
    assert clusterpool.get(counter.add.remote(), timeout=20) == 1
    assert len(os.listdir(tmp_path)) == 4


def test_other_callers_wait_for_the_next_life() -> None:
    @clusterpool.remote
    class Caller:
        def __init__(self, handle: Any) -> None:
            self.handle = handle

        def call(self) -> int:
            return int(clusterpool.get(self.handle.add.remote(), timeout=30))

        def kill(self) -> None:
            with contextlib.suppress(errors.ActorUnavailable):
                clusterpool.get(self.handle.die.remote(), timeout=30)

    counter = RemoteCounter.options(max_restarts=5).remote()
    callers = [Caller.remote(counter) for _ in range(2)]
    assert sorted(clusterpool.get([caller.call.remote() for caller in callers], timeout=30)) == [1, 2]
    for _ in range(3):
        clusterpool.get(callers[0].kill.remote(), timeout=30)
        assert sorted(clusterpool.get([caller.call.remote() for caller in callers], timeout=30)) == [1, 2]


def test_an_actor_that_is_killed_for_good_is_not_started_again(tmp_path: Path) -> None:
    counter = RemoteCounter.options(max_restarts=-1).remote(str(tmp_path))
    clusterpool.get(counter.add.remote(), timeout=20)
    clusterpool.kill(counter, no_restart=False)
    assert wait_for(lambda: len(os.listdir(tmp_path)) == 2)
    with contextlib.suppress(errors.ActorUnavailable):
        clusterpool.get(counter.pid.remote(), timeout=20)
    assert clusterpool.get(counter.add.remote(), timeout=20) == 1
    clusterpool.kill(counter)
    with pytest.raises(errors.ActorDied, match=r"clusterpool\.kill"):
        clusterpool.get(counter.add.remote(), timeout=20)
    assert len(os.listdir(tmp_path)) == 2


def test_an_actor_that_leaves_is_not_started_again(tmp_path: Path) -> None:
    counter = RemoteCounter.options(max_restarts=-1).remote(str(tmp_path))
    with pytest.raises(errors.ActorDied):
        clusterpool.get(counter.leave.remote(), timeout=20)
    with pytest.raises(errors.ActorDied):
        clusterpool.get(counter.add.remote(), timeout=20)
    assert len(os.listdir(tmp_path)) == 1


def test_a_constructor_that_raises_at_a_restart_is_the_end(tmp_path: Path) -> None:
    @clusterpool.remote(max_restarts=-1)
    class Once:
        def __init__(self) -> None:
            (tmp_path / "made").mkdir()

        def die(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    once = Once.remote()
    with pytest.raises(errors.ActorUnavailable):
        clusterpool.get(once.die.remote(), timeout=20)
    with pytest.raises(errors.ActorDied, match="constructor") as caught:
        clusterpool.get(once.die.remote(), timeout=20)
    assert isinstance(caught.value.__cause__, FileExistsError)


def test_a_worker_that_dies_in_the_constructor_counts_as_a_restart(tmp_path: Path) -> None:
    @clusterpool.remote(max_restarts=2)
    class Slow:
        def __init__(self) -> None:
            tries = len(os.listdir(tmp_path))
            (tmp_path / str(tries)).touch()
            if tries < 2:
                os.kill(os.getpid(), signal.SIGKILL)

        def tries(self) -> int:
            return len(os.listdir(tmp_path))

    assert clusterpool.get(Slow.remote().tries.remote(), timeout=30) == 3


@pytest.mark.parametrize("is_async", [False, True])
def test_calls_of_a_concurrent_actor_are_sent_again(tmp_path: Path, is_async: bool) -> None:
    class Threads:
        def wait(self, number: int) -> int:
            Path(tmp_path, f"{number}-{os.getpid()}").touch()
            while len(os.listdir(tmp_path)) < 8:
                time.sleep(0.01)
            return number

    class Coroutines:
        async def wait(self, number: int) -> int:
            Path(tmp_path, f"{number}-{os.getpid()}").touch()
            while len(os.listdir(tmp_path)) < 8:
                await asyncio.sleep(0.01)
            return number

    options = {"max_restarts": 1, "max_task_retries": -1, "max_concurrency": 4}
    actor = clusterpool.remote(**options)(Coroutines if is_async else Threads).remote()
    refs = [actor.wait.remote(number) for number in range(4)]
    assert wait_for(lambda: len(os.listdir(tmp_path)) == 4)
    os.kill(int(os.listdir(tmp_path)[0].partition("-")[2]), signal.SIGKILL)
    assert clusterpool.get(refs, timeout=30) == [0, 1, 2, 3]


# --- detached -------------------------------------------------------------------------------------------------------


def test_a_detached_actor_is_started_again_by_its_node() -> None:
    @clusterpool.remote
    def ten() -> int:
        return 10

    options = {"name": "kept", "lifetime": "detached", "max_restarts": 1}
    counter = RemoteCounter.options(**options).remote(value=ten.remote())
    try:
        assert clusterpool.get(counter.add.remote(), timeout=20) == 11
        pid = clusterpool.get(counter.pid.remote(), timeout=20)
        clusterpool.kill(counter, no_restart=False)
        found = clusterpool.get_actor("kept")
        assert wait_for(lambda: pid_of(found) not in (0, pid))
        assert clusterpool.get(found.add.remote(), timeout=20) == 11
    finally:
        clusterpool.kill(counter)
    with pytest.raises(errors.ActorDied, match=r"clusterpool\.kill"):
        clusterpool.get(counter.add.remote(), timeout=20)


def test_the_constructors_error_of_a_detached_actor_is_told() -> None:
    broken = RemoteCounter.options(name="broken", lifetime="detached").remote(1, 2, 3)
    with pytest.raises(errors.ActorDied, match="constructor") as caught:
        clusterpool.get(broken.add.remote(), timeout=20)
    assert isinstance(caught.value.__cause__, TypeError)
    with pytest.raises(errors.ActorNotFound):
        clusterpool.get_actor("broken")


def test_what_a_detached_actor_cannot_be_made_of() -> None:
    options = RemoteCounter.options(name="refused", lifetime="detached")
    with pytest.raises(ValueError, match="inside its arguments"):
        options.remote(value=[clusterpool.put(1)])
    with pytest.raises(errors.ObjectTooLarge, match="MiB"):
        options.remote(value=bytes(20_000_000))
    with pytest.raises(ZeroDivisionError):
        options.remote(clusterpool.remote(lambda: 1 / 0).remote())
    with pytest.raises(errors.ActorNotFound):
        clusterpool.get_actor("refused")
