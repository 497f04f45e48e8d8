"""Actors: order, state, names, concurrency, handles, and how they end."""

from __future__ import annotations

import contextlib
import gc
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
    """State, and ways to end."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def add(self, amount: int = 1) -> int:
        self.value += amount
        return self.value

    def pid(self) -> int:
        return os.getpid()

    def fail(self) -> None:
        raise KeyError("no such key")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def leave(self) -> None:
        raise SystemExit(0)

    def sleep(self, seconds: float) -> str:
        time.sleep(seconds)
        return "slept"

    def touch_and_sleep(self, path: str, seconds: float) -> str:
        Path(path).touch()
        time.sleep(seconds)
        return "slept"

    def touch_and_wait(self, path: str) -> str:
        """Until somebody takes the file away."""
        Path(path).touch()
        while Path(path).exists():
            time.sleep(0.005)
        return "waited"


RemoteCounter = clusterpool.remote(Counter)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


# --- calls ----------------------------------------------------------------------------------------------------------


def test_calls_run_in_order_on_one_state() -> None:
    counter = RemoteCounter.remote(10)
    refs = [counter.add.remote(number) for number in range(100)]
    expected, value = [], 10
    for number in range(100):
        value += number
        expected.append(value)
    assert clusterpool.get(refs, timeout=20) == expected


def test_two_actors_have_two_processes_and_states() -> None:
    first, second = RemoteCounter.remote(), RemoteCounter.remote(100)
    assert clusterpool.get([first.add.remote(), second.add.remote()], timeout=20) == [1, 101]
    pids = clusterpool.get([first.pid.remote(), second.pid.remote()], timeout=20)
    assert len({*pids, os.getpid()}) == 3


def test_references_are_arguments_of_calls_and_constructors() -> None:
    @clusterpool.remote
    def slow(value: int) -> int:
        time.sleep(0.2)
        return value

    counter = RemoteCounter.remote(slow.remote(5))
    refs = [counter.add.remote(slow.remote(1)), counter.add.remote(2), counter.add.remote(clusterpool.put(3))]
    assert clusterpool.get(refs, timeout=20) == [6, 8, 11]


def test_an_error_of_a_call_leaves_the_actor_alive() -> None:
    counter = RemoteCounter.remote()
    with pytest.raises(KeyError, match="no such key"):
        clusterpool.get(counter.fail.remote(), timeout=20)
    assert clusterpool.get(counter.add.remote(), timeout=20) == 1


def test_a_failed_argument_fails_its_call_alone() -> None:
    @clusterpool.remote
    def fail() -> None:
        raise ValueError("argument")

    counter = RemoteCounter.remote()
    refs = [counter.add.remote(), counter.add.remote(fail.remote()), counter.add.remote()]
    assert clusterpool.get([refs[0], refs[2]], timeout=20) == [1, 2]
    with pytest.raises(ValueError, match="argument"):
        clusterpool.get(refs[1], timeout=20)


def test_several_return_values_of_a_method() -> None:
    @clusterpool.remote
    class Pair:
        def both(self) -> tuple[int, int]:
            return 1, 2

    pair = Pair.remote()
    assert clusterpool.get(pair.both.options(num_returns=2).remote(), timeout=20) == [1, 2]
    assert pair.both.options(num_returns=0).remote() is None
    with pytest.raises(ValueError, match="num_returns"):
        pair.both.options(num_returns=-3)


def test_static_class_and_special_methods() -> None:
    @clusterpool.remote
    class Many:
        @staticmethod
        def static(x: int) -> int:
            return x

        @classmethod
        def name(cls) -> str:
            return cls.__name__

        def __call__(self, x: int) -> int:
            return x * 2

    many = Many.remote()
    refs = [many.static.remote(1), many.name.remote(), many.__call__.remote(3)]
    assert clusterpool.get(refs, timeout=20) == [1, "Many", 6]


def test_unknown_methods_are_refused_at_once() -> None:
    counter = RemoteCounter.remote()
    with pytest.raises(AttributeError, match="no method 'subtract'"):
        _ = counter.subtract
    with pytest.raises(TypeError, match=r"add\.remote"):
        counter.add()
    with pytest.raises(TypeError, match=r"Counter\.remote"):
        RemoteCounter()


def test_large_values_in_and_out() -> None:
    import numpy as np

    @clusterpool.remote
    class Keeper:
        def keep(self, array: Any) -> float:
            self.array = array
            return float(array.sum())

        def give(self) -> Any:
            return self.array

    keeper = Keeper.remote()
    array = np.ones(2_000_000)
    assert clusterpool.get(keeper.keep.remote(array), timeout=20) == 2_000_000
    assert clusterpool.get(keeper.give.remote(), timeout=20).sum() == 2_000_000


# --- concurrency ----------------------------------------------------------------------------------------------------


def test_threads_run_calls_at_once() -> None:
    import threading

    class Meeting:
        def __init__(self) -> None:
            self.barrier = threading.Barrier(3)

        def meet(self) -> int:
            self.barrier.wait(20)
            return threading.get_ident()

    meeting = clusterpool.remote(max_concurrency=3)(Meeting).remote()
    assert len(set(clusterpool.get([meeting.meet.remote() for _ in range(3)], timeout=30))) == 3


def test_many_results_of_threads_arrive_each_once() -> None:
    class Echo:
        def echo(self, value: int) -> int:
            return value

    echo = clusterpool.remote(max_concurrency=8)(Echo).remote()
    assert clusterpool.get([echo.echo.remote(n) for n in range(2000)], timeout=40) == list(range(2000))


def test_coroutines_run_at_once() -> None:
    import asyncio

    class Meeting:
        def __init__(self) -> None:
            self.event = asyncio.Event()
            self.waiting = 0

        async def wait(self) -> int:
            self.waiting += 1
            await self.event.wait()
            return self.waiting

        async def let_go(self) -> None:
            while self.waiting < 50:
                await asyncio.sleep(0.001)
            self.event.set()

    meeting = clusterpool.remote(Meeting).remote()
    refs = [meeting.wait.remote() for _ in range(50)]
    clusterpool.get(meeting.let_go.remote(), timeout=20)
    assert clusterpool.get(refs, timeout=20) == [50] * 50


def test_max_concurrency_bounds_coroutines() -> None:
    import asyncio

    class Busy:
        def __init__(self) -> None:
            self.now = self.most = 0

        async def work(self) -> int:
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.005)
            self.now -= 1
            return self.most

    busy = clusterpool.remote(max_concurrency=2)(Busy).remote()
    assert max(clusterpool.get([busy.work.remote() for _ in range(20)], timeout=20)) == 2


def test_coroutines_await_references_and_raise_errors() -> None:
    @clusterpool.remote
    def double(x: int) -> int:
        return 2 * x

    class Caller:
        async def call(self, x: int) -> int:
            if x < 0:
                raise ValueError("negative")
            return await double.remote(x) + await double.remote(x)

    caller = clusterpool.remote(Caller).remote()
    assert clusterpool.get([caller.call.remote(x) for x in range(5)], timeout=20) == [0, 4, 8, 12, 16]
    with pytest.raises(ValueError, match="negative"):
        clusterpool.get(caller.call.remote(-1), timeout=20)


def test_a_coroutine_is_cancelled() -> None:
    import asyncio

    class Sleeper:
        async def sleep(self, path: str) -> None:
            Path(path).touch()
            await asyncio.sleep(60)

        async def hello(self) -> str:
            return "hello"

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        sleeper = clusterpool.remote(Sleeper).remote()
        ref = sleeper.sleep.remote(folder + "/started")
        assert wait_for(Path(folder, "started").exists)
        clusterpool.cancel(ref)
        with pytest.raises(errors.TaskCancelled):
            clusterpool.get(ref, timeout=30)
        assert clusterpool.get(sleeper.hello.remote(), timeout=30) == "hello"


def test_coroutines_are_cancelled_at_the_moment_when_they_begin() -> None:
    import asyncio

    class Sleeper:
        async def sleep(self) -> None:
            await asyncio.sleep(60)

    sleeper = clusterpool.remote(Sleeper).options(max_concurrency=1000).remote()
    refs = []
    for _ in range(400):
        refs.append(sleeper.sleep.remote())
        clusterpool.cancel(refs[-1])
    for ref in refs:
        with pytest.raises(errors.TaskCancelled):
            clusterpool.get(ref, timeout=20)


def test_a_method_that_is_cancelled_by_itself_answers() -> None:
    import asyncio

    class Sleeper:
        async def cancel_myself(self, value: Any) -> None:
            raise asyncio.CancelledError(f"had {type(value).__name__}")

        def hello(self) -> str:
            return "hello"

    class Threaded:
        def cancel_myself(self, value: Any) -> None:
            raise asyncio.CancelledError(f"had {type(value).__name__}")

        def hello(self) -> str:
            return "hello"

    for actor in (clusterpool.remote(Sleeper), clusterpool.remote(max_concurrency=2)(Threaded)):
        handle = actor.remote()
        with pytest.raises(asyncio.CancelledError, match="had list"):
            clusterpool.get(handle.cancel_myself.remote([clusterpool.put(1)]), timeout=50)
        assert clusterpool.get(handle.hello.remote(), timeout=50) == "hello"


def test_a_queued_call_is_cancelled(tmp_path: Path) -> None:
    counter = RemoteCounter.remote()
    running = counter.touch_and_wait.remote(str(tmp_path / "started"))
    queued = counter.add.remote(100)
    assert wait_for((tmp_path / "started").exists)
    clusterpool.cancel(queued)
    time.sleep(0.3)  # else the one that runs may end before the cancel has come
    (tmp_path / "started").unlink()
    with pytest.raises(errors.TaskCancelled):
        clusterpool.get(queued, timeout=30)
    assert clusterpool.get([running, counter.add.remote()], timeout=30) == ["waited", 1]


def test_a_running_call_is_interrupted(tmp_path: Path) -> None:
    counter = RemoteCounter.remote()
    running = counter.touch_and_sleep.remote(str(tmp_path / "started"), 60)
    assert wait_for((tmp_path / "started").exists)
    clusterpool.cancel(running)
    with pytest.raises(errors.TaskCancelled):
        clusterpool.get(running, timeout=30)
    assert clusterpool.get(counter.add.remote(), timeout=30) == 1


def test_a_cancelled_call_that_waits_for_an_argument_does_not_block_the_others() -> None:
    @clusterpool.remote
    def slow() -> int:
        time.sleep(1)
        return 1

    counter = RemoteCounter.remote()
    argument = slow.remote()
    waiting = counter.add.remote(argument)
    behind = counter.add.remote(5)
    assert clusterpool.cancel(waiting)
    assert clusterpool.get(behind, timeout=20) == 5
    with pytest.raises(errors.TaskCancelled):
        clusterpool.get(waiting, timeout=30)


# --- handles --------------------------------------------------------------------------------------------------------


def test_handles_are_passed_to_tasks_and_other_actors() -> None:
    @clusterpool.remote
    def add_by(handle: Any, amount: int) -> int:
        return clusterpool.get(handle.add.remote(amount), timeout=20)

    @clusterpool.remote
    class Relay:
        def __init__(self, handle: Any) -> None:
            self.handle = handle

        def add(self, amount: int) -> int:
            return clusterpool.get(self.handle.add.remote(amount), timeout=20)

    counter = RemoteCounter.remote()
    assert clusterpool.get(add_by.remote(counter, 1), timeout=20) == 1
    assert clusterpool.get(Relay.remote(counter).add.remote(2), timeout=20) == 3
    assert clusterpool.get(add_by.remote({"handle": counter}["handle"], 3), timeout=20) == 6


def test_a_handle_can_be_passed_before_the_actor_is_there() -> None:
    @clusterpool.remote
    class Slow:
        def __init__(self) -> None:
            time.sleep(0.3)

        def hello(self) -> str:
            return "hello"

    @clusterpool.remote
    def call(handle: Any) -> str:
        return clusterpool.get(handle.hello.remote(), timeout=20)

    assert clusterpool.get(call.remote(Slow.remote()), timeout=20) == "hello"


def test_an_actor_made_in_a_task_outlives_the_task() -> None:
    @clusterpool.remote
    def make() -> Any:
        counter = RemoteCounter.remote(40)
        clusterpool.get(counter.add.remote(1), timeout=20)
        return counter

    counter = clusterpool.get(make.remote(), timeout=20)
    assert clusterpool.get(counter.add.remote(1), timeout=20) == 42


def test_handles_are_equal_for_one_actor() -> None:
    import pickle

    counter = RemoteCounter.remote()
    assert clusterpool.get(clusterpool.put([counter]))[0] == counter
    assert counter != RemoteCounter.remote()
    assert "Counter" in repr(counter)
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(counter.add))


def test_an_actor_ends_when_its_last_handle_goes() -> None:
    counter = RemoteCounter.remote()
    pid = clusterpool.get(counter.pid.remote(), timeout=20)
    del counter
    gc.collect()
    assert wait_for(lambda: is_gone(pid))


def test_calls_of_a_dropped_handle_still_run() -> None:
    refs = [RemoteCounter.remote(number).sleep.remote(0.2) for number in range(2)]
    assert clusterpool.get(refs, timeout=20) == ["slept"] * 2


def test_an_actor_lives_as_long_as_a_borrower_has_a_handle() -> None:
    @clusterpool.remote
    class Holder:
        def hold(self, handles: list[Any]) -> None:
            self.handles = handles

        def add(self) -> int:
            return clusterpool.get(self.handles[0].add.remote(), timeout=20)

        def drop(self) -> None:
            self.handles = []

    counter, holder = RemoteCounter.remote(), Holder.remote()
    pid = clusterpool.get(counter.pid.remote(), timeout=20)
    clusterpool.get(holder.hold.remote([counter]), timeout=20)
    del counter
    gc.collect()
    time.sleep(0.3)
    assert clusterpool.get(holder.add.remote(), timeout=20) == 1
    clusterpool.get(holder.drop.remote(), timeout=20)
    assert wait_for(lambda: is_gone(pid))


# --- names ----------------------------------------------------------------------------------------------------------


def test_named_actors() -> None:
    counter = RemoteCounter.options(name="counter").remote(1)
    try:
        assert clusterpool.get(clusterpool.get_actor("counter").add.remote(), timeout=20) == 2
        with pytest.raises(errors.NameTaken, match="counter"):
            RemoteCounter.options(name="counter").remote()
        same = RemoteCounter.options(name="counter", get_if_exists=True).remote(50)
        assert same == counter and clusterpool.get(same.add.remote(), timeout=20) == 3
        other = RemoteCounter.options(name="counter", namespace="elsewhere").remote(10)
        assert clusterpool.get(other.add.remote(), timeout=20) == 11
        assert clusterpool.get_actor("counter", namespace="elsewhere") == other
        clusterpool.kill(other)
    finally:
        clusterpool.kill(counter)
    for start in range(5):  # the name is free again, whether the actor has come to life by then or not
        again = RemoteCounter.options(name="counter").remote(start)
        if start % 2:
            assert clusterpool.get(again.add.remote(), timeout=20) == start + 1
        clusterpool.kill(again)
    with pytest.raises(errors.ActorNotFound):
        clusterpool.get_actor("counter")


def test_unknown_names() -> None:
    with pytest.raises(errors.ActorNotFound, match="nobody"):
        clusterpool.get_actor("nobody")
    with pytest.raises(TypeError, match="strings"):
        clusterpool.get_actor(5)  # type: ignore[arg-type]


def test_a_named_actor_is_found_from_a_task() -> None:
    @clusterpool.remote
    def call() -> int:
        return clusterpool.get(clusterpool.get_actor("found").add.remote(), timeout=20)

    counter = RemoteCounter.options(name="found").remote()
    assert clusterpool.get(call.remote(), timeout=20) == 1
    clusterpool.kill(counter)


# --- ends -----------------------------------------------------------------------------------------------------------


def test_an_error_of_the_constructor() -> None:
    @clusterpool.remote
    class Broken:
        def __init__(self) -> None:
            raise KeyError("no configuration")

        def hello(self) -> None: ...

    broken = Broken.remote()
    early = broken.hello.remote()
    with pytest.raises(errors.ActorDied, match=r"constructor .*KeyError: 'no config") as caught:
        clusterpool.get(early, timeout=20)
    assert isinstance(caught.value.__cause__, KeyError) and "no configuration" in str(caught.value.__cause__)
    with pytest.raises(errors.ActorDied, match="constructor") as caught:
        clusterpool.get(broken.hello.remote(), timeout=20)
    assert isinstance(caught.value.__cause__, KeyError)


def test_wrong_arguments_of_the_constructor() -> None:
    counter = RemoteCounter.remote(1, 2, 3)
    with pytest.raises(errors.ActorDied) as caught:
        clusterpool.get(counter.add.remote(), timeout=20)
    assert isinstance(caught.value.__cause__, TypeError)


def test_a_failed_argument_of_the_constructor() -> None:
    @clusterpool.remote
    def fail() -> None:
        raise ValueError("argument")

    counter = RemoteCounter.remote(fail.remote())
    with pytest.raises(errors.ActorDied) as caught:
        clusterpool.get(counter.add.remote(), timeout=20)
    assert isinstance(caught.value.__cause__, ValueError)


def test_what_no_node_could_ever_give() -> None:
    counter = RemoteCounter.options(num_cpus=64).remote()
    with pytest.raises(errors.ActorDied, match="64 CPU"):
        clusterpool.get(counter.add.remote(), timeout=20)


def test_kill_ends_the_actor_and_its_calls(tmp_path: Path) -> None:
    counter = RemoteCounter.remote()
    pid = clusterpool.get(counter.pid.remote(), timeout=20)
    pending = counter.touch_and_sleep.remote(str(tmp_path / "started"), 60)
    assert wait_for((tmp_path / "started").exists)
    clusterpool.kill(counter)
    with pytest.raises(errors.ActorDied, match=r"clusterpool\.kill"):
        clusterpool.get(pending, timeout=30)
    with pytest.raises(errors.ActorDied):
        clusterpool.get(counter.add.remote(), timeout=30)
    assert wait_for(lambda: is_gone(pid))
    clusterpool.kill(counter)  # again: nothing happens


def test_kill_refuses_other_things() -> None:
    with pytest.raises(TypeError):
        clusterpool.kill(1)  # type: ignore[arg-type]


def test_the_death_of_its_process_is_the_end_of_an_actor() -> None:
    counter = RemoteCounter.remote()
    with pytest.raises(errors.ActorDied, match="SIGKILL"):
        clusterpool.get(counter.die.remote(), timeout=20)
    with pytest.raises(errors.ActorDied, match="SIGKILL"):
        clusterpool.get(counter.add.remote(), timeout=20)


def test_results_before_the_end_are_not_lost() -> None:
    counter = RemoteCounter.remote()
    refs = [counter.add.remote() for _ in range(50)]
    end = counter.leave.remote()
    assert clusterpool.get(refs, timeout=20) == list(range(1, 51))
    with pytest.raises(errors.ActorDied):
        clusterpool.get(end, timeout=20)


def test_others_learn_of_the_end() -> None:
    @clusterpool.remote
    class Watcher:
        def __init__(self, handle: Any) -> None:
            self.handle = handle

        def call(self) -> str:
            try:
                clusterpool.get(self.handle.add.remote(), timeout=20)
            except errors.ActorDied as exc:
                return str(exc)
            return "alive"

    counter = RemoteCounter.remote()
    watcher = Watcher.remote(counter)
    assert clusterpool.get(watcher.call.remote(), timeout=20) == "alive"
    clusterpool.kill(counter)
    assert wait_for(lambda: clusterpool.get(watcher.call.remote(), timeout=20) != "alive")


# --- resources and options ------------------------------------------------------------------------------------------


def test_an_actor_takes_no_cpu_unless_it_says_so() -> None:
    @clusterpool.remote
    def one() -> int:
        return 1

    counters = [RemoteCounter.remote(number) for number in range(4)]
    assert clusterpool.get([counter.add.remote() for counter in counters], timeout=20) == [1, 2, 3, 4]
    assert clusterpool.get(one.remote(), timeout=20) == 1


def test_an_actor_holds_its_resources_until_it_ends() -> None:
    counter = RemoteCounter.options(num_cpus=1.5).remote()
    clusterpool.get(counter.add.remote(), timeout=20)
    assert clusterpool.available_resources()["CPU"] <= 0.5
    clusterpool.kill(counter)
    assert wait_for(lambda: clusterpool.available_resources()["CPU"] == 2)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_concurrency": 0}, ValueError),
        ({"max_concurrency": "two"}, TypeError),
        ({"lifetime": "forever"}, ValueError),
        ({"lifetime": "detached"}, ValueError),  # nobody could ever find it without a name
        ({"num_returns": 2}, TypeError),
        ({"name": 5}, TypeError),
        ({"num_cpus": -1}, ValueError),
        ({"get_if_exists": True}, ValueError),
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        RemoteCounter.options(**options).remote()


def test_environment_variables_of_an_actor() -> None:
    @clusterpool.remote(runtime_env={"env_vars": {"ENGINE_TEST": "actor"}})
    class Env:
        def __init__(self) -> None:
            self.value = os.environ.get("ENGINE_TEST")

        def get(self) -> str | None:
            return self.value

    assert clusterpool.get(Env.remote().get.remote(), timeout=20) == "actor"


def test_an_actor_that_waits_for_room_is_killed_at_once() -> None:
    holder = RemoteCounter.options(num_cpus=2).remote()
    clusterpool.get(holder.add.remote(), timeout=20)
    waiting = RemoteCounter.options(num_cpus=1).remote()
    ref = waiting.add.remote()
    time.sleep(0.1)
    started_s = time.monotonic()
    clusterpool.kill(waiting)
    with pytest.raises(errors.ActorDied):
        clusterpool.get(ref, timeout=30)
    assert time.monotonic() - started_s < 5
    assert clusterpool.get(holder.add.remote(), timeout=20) == 2


def test_an_actor_that_waits_for_room_starts_when_there_is_some() -> None:
    holder = RemoteCounter.options(num_cpus=2).remote()
    clusterpool.get(holder.add.remote(), timeout=20)
    waiting = RemoteCounter.options(num_cpus=1).remote(5)
    ref = waiting.add.remote()
    del holder
    gc.collect()
    assert clusterpool.get(ref, timeout=20) == 6
