"""Remote functions: arguments, results, nesting, errors, cancelling, options; on a real one-node cluster."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import clusterpool
from clusterpool import errors
from clusterpool.serialization.exceptions import RemoteTraceback
from tests.client.engine import check_nothing_left, wait_for
from tests.waiting import pid_at_meeting

pytestmark = pytest.mark.usefixtures("cluster")


@clusterpool.remote
def add(x: Any, y: Any = 1) -> Any:
    return x + y


# --- arguments and results ------------------------------------------------------------------------------------------


def test_a_task_returns_its_value() -> None:
    assert clusterpool.get(add.remote(1, y=2), timeout=30) == 3


def test_get_of_a_list_keeps_the_order() -> None:
    refs = [add.remote(number) for number in range(200)]
    assert clusterpool.get(refs, timeout=20) == list(range(1, 201))
    assert clusterpool.get([], timeout=1) == []


@pytest.mark.usefixtures("nothing_left")
def test_references_as_arguments_are_resolved() -> None:
    first = add.remote(1)
    second = add.remote(first, y=first)
    assert clusterpool.get(second, timeout=30) == 4
    value = clusterpool.put(10)
    assert clusterpool.get(add.remote(value, y=second), timeout=30) == 14


@pytest.mark.usefixtures("nothing_left")
def test_a_long_chain_of_dependencies() -> None:
    ref = add.remote(0)
    for _ in range(100):
        ref = add.remote(ref)
    assert clusterpool.get(ref, timeout=20) == 101


@pytest.mark.usefixtures("nothing_left")
def test_many_tasks_share_one_dependency() -> None:
    @clusterpool.remote
    def slow() -> int:
        time.sleep(0.1)
        return 7

    shared = slow.remote()
    refs = [add.remote(shared, number) for number in range(50)]
    del shared
    assert clusterpool.get(refs, timeout=20) == [7 + number for number in range(50)]


@pytest.mark.parametrize("returns", [2, 5])
@pytest.mark.usefixtures("nothing_left")
def test_several_return_values(returns: int) -> None:
    @clusterpool.remote(num_returns=returns)
    def several(count: int) -> list[int]:
        return list(range(count))

    refs = several.remote(returns)
    assert len(refs) == returns
    assert clusterpool.get(refs, timeout=30) == list(range(returns))


@pytest.mark.usefixtures("nothing_left")
def test_a_wrong_number_of_return_values_is_an_error_of_each() -> None:
    @clusterpool.remote(num_returns=3)
    def several() -> list[int]:
        return [1]

    for ref in several.remote():
        with pytest.raises(ValueError, match="num_returns=3"):
            clusterpool.get(ref, timeout=30)


@pytest.mark.usefixtures("nothing_left")
def test_one_value_where_several_are_wanted_is_said_to_be_one() -> None:
    @clusterpool.remote(num_returns=2)
    def one() -> int:
        return 1

    for ref in one.remote():
        with pytest.raises(TypeError, match="num_returns=2, but returned no sequence: int"):
            clusterpool.get(ref, timeout=30)


@pytest.mark.parametrize("call", [clusterpool.get, clusterpool.wait])
def test_what_is_no_reference_is_named(call: Any) -> None:
    with pytest.raises(TypeError, match="takes .*, not int: 3"):
        call(3)


def test_wait_says_what_it_takes() -> None:
    ref = clusterpool.put(1)
    with pytest.raises(TypeError, match="takes a sequence of ObjectRefs, not ObjectRef"):
        clusterpool.wait(ref)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="float"):
        clusterpool.wait([ref], num_returns=1.0)  # type: ignore[arg-type]


@pytest.mark.usefixtures("nothing_left")
def test_no_return_value(tmp_path: Path) -> None:
    @clusterpool.remote(num_returns=0)
    def nothing(path: str) -> None:
        Path(path).write_text("ran")

    assert nothing.remote(str(tmp_path / "file")) is None
    assert wait_for(lambda: (tmp_path / "file").exists() and (tmp_path / "file").read_text() == "ran")


def test_keywords_named_as_our_own_belong_to_the_task() -> None:
    @clusterpool.remote
    def show(**kwargs: Any) -> dict[str, Any]:
        return kwargs

    given = {"self": 1, "function": 2, "args": 3, "retries": 4, "timeout": 5, "kind": 6}
    assert clusterpool.get(show.remote(**given), timeout=30) == given


def test_a_large_payload_of_small_parts_is_let_go() -> None:
    @clusterpool.remote
    def count(parts: list[bytes]) -> int:
        return sum(map(len, parts))

    assert clusterpool.get(count.remote([bytes([number]) * 60_000 for number in range(20)]), timeout=30) == 1_200_000
    check_nothing_left()


def test_a_function_sees_the_present_value_of_a_global() -> None:
    factor = 2

    @clusterpool.remote
    def scaled(x: int) -> int:
        return x * factor

    assert clusterpool.get(scaled.remote(1), timeout=30) == 2
    factor = 3
    assert clusterpool.get(scaled.remote(1), timeout=30) == 3


def test_more_functions_than_the_table_holds() -> None:
    refs = [clusterpool.remote(lambda number=number: number).remote() for number in range(700)]
    assert clusterpool.get(refs, timeout=40) == list(range(700))


def test_what_cannot_be_pickled_is_an_error_at_the_call() -> None:

    with pytest.raises(TypeError, match="pickle"):
        add.remote(threading.Lock())


def test_a_result_that_cannot_be_pickled_is_an_error() -> None:
    @clusterpool.remote
    def lock() -> Any:

        return threading.Lock()

    with pytest.raises(errors.SerializationFailed, match="lock"):
        clusterpool.get(lock.remote(), timeout=30)


# --- nesting --------------------------------------------------------------------------------------------------------


def test_tasks_submit_tasks() -> None:
    @clusterpool.remote
    def outer(count: int) -> list[int]:
        return clusterpool.get([add.remote(number) for number in range(count)], timeout=30)

    assert clusterpool.get([outer.remote(10), outer.remote(10)], timeout=30) == [list(range(1, 11))] * 2


def test_recursion_deeper_than_the_cpus_does_not_deadlock() -> None:
    @clusterpool.remote
    def fibonacci(n: int) -> int:
        if n < 2:
            return n
        return sum(clusterpool.get([fibonacci.remote(n - 1), fibonacci.remote(n - 2)], timeout=50))

    assert clusterpool.get(fibonacci.remote(7), timeout=50) == 13


def test_a_blocked_worker_gives_back_what_it_has_not_started() -> None:
    # Tiny tasks first, so that the next ones are sent in batches; then some of those wait for others of their kind.
    @clusterpool.remote
    def maybe_wait(refs: list[Any]) -> int:
        return sum(clusterpool.get(refs, timeout=40)) if refs else 1

    clusterpool.get([maybe_wait.remote([]) for _ in range(2000)], timeout=40)
    waiting = [maybe_wait.remote([maybe_wait.remote([]) for _ in range(5)]) for _ in range(20)]
    assert clusterpool.get(waiting, timeout=40) == [5] * 20


@pytest.mark.usefixtures("nothing_left")
def test_references_of_a_workers_own_tasks_can_be_returned() -> None:
    @clusterpool.remote
    def outer() -> list[Any]:
        return [add.remote(number) for number in range(3)]

    refs = clusterpool.get(outer.remote(), timeout=20)
    assert clusterpool.get(refs, timeout=20) == [1, 2, 3]
    assert clusterpool.get(add.remote(refs[0], y=refs[1]), timeout=20) == 3


# --- errors ---------------------------------------------------------------------------------------------------------


class Refused(Exception):
    """An exception whose pickle needs its own arguments."""

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code, self.reason = code, reason


def test_an_error_arrives_as_its_own_type_with_the_remote_traceback() -> None:
    @clusterpool.remote
    def refuse() -> None:
        raise Refused(4, reason="no")

    with pytest.raises(Refused) as caught:
        clusterpool.get(refuse.remote(), timeout=30)
    assert (caught.value.code, caught.value.reason) == (4, "no")
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert "in refuse" in str(caught.value.__cause__)
    assert "process" in str(caught.value.__cause__)


@pytest.mark.usefixtures("nothing_left")
def test_an_error_of_a_dependency_is_the_error_of_its_users() -> None:
    @clusterpool.remote
    def divide(x: int) -> float:
        return 1 / x

    failed = divide.remote(0)
    again = add.remote(failed)
    third = add.remote(1, y=again)
    for ref in (third, again, failed):
        with pytest.raises(ZeroDivisionError):
            clusterpool.get(ref, timeout=30)


def test_each_get_raises_a_fresh_exception() -> None:
    @clusterpool.remote
    def fail() -> None:
        raise ValueError("once")

    ref = fail.remote()
    caught = []
    for _ in range(2):
        with pytest.raises(ValueError) as info:
            clusterpool.get(ref, timeout=30)
        caught.append(info.value)
    assert caught[0] is not caught[1]


def test_a_killed_worker_is_tried_again(tmp_path: Path) -> None:
    @clusterpool.remote
    def fail_twice(folder: str) -> int:
        attempt = len(os.listdir(folder)) + 1
        Path(folder, str(attempt)).touch()
        if attempt < 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return attempt

    assert clusterpool.get(fail_twice.remote(str(tmp_path)), timeout=20) == 3


def test_without_retries_a_killed_worker_is_an_error_that_names_the_signal(tmp_path: Path) -> None:
    @clusterpool.remote(retries=0)
    def die(folder: str) -> None:
        Path(folder, str(len(os.listdir(folder)))).touch()
        os.kill(os.getpid(), signal.SIGSEGV)

    with pytest.raises(errors.WorkerDied, match=r"signal 11 \(SIGSEGV\)"):
        clusterpool.get(die.remote(str(tmp_path)), timeout=20)
    assert len(os.listdir(tmp_path)) == 1


def test_retries_are_counted(tmp_path: Path) -> None:
    @clusterpool.remote
    def die(folder: str) -> None:
        Path(folder, str(len(os.listdir(folder)))).touch()
        os._exit(3)

    with pytest.raises(errors.WorkerDied, match="exit code 3"):
        clusterpool.get(die.remote(str(tmp_path)), timeout=30)
    assert len(os.listdir(tmp_path)) == 4  # the first, and three more


class Unusual(BaseException):
    pass


@pytest.mark.parametrize("error", [asyncio.CancelledError("x"), GeneratorExit("x"), Unusual("x")])
def test_what_is_no_exception_but_no_exit_either_arrives_and_costs_no_worker(error: BaseException) -> None:
    @clusterpool.remote
    def fail() -> None:
        raise error

    @clusterpool.remote
    def pid() -> int:
        return os.getpid()

    before = clusterpool.get(pid.remote())
    with pytest.raises(type(error), match="x"):
        clusterpool.get(fail.remote())
    assert clusterpool.get(pid.remote()) == before


def test_the_end_of_a_worker_names_no_function_but_the_one_that_ran() -> None:
    @clusterpool.remote
    def innocent() -> None:
        pass

    @clusterpool.remote(retries=0)
    def culprit() -> None:
        os._exit(3)

    clusterpool.get(innocent.remote())
    with pytest.raises(errors.WorkerDied) as caught:
        clusterpool.get(culprit.remote())
    assert "culprit" in str(caught.value)
    assert "innocent" not in str(caught.value)


def test_sys_exit_in_a_task_ends_its_worker_and_nothing_else(tmp_path: Path) -> None:
    @clusterpool.remote(retries=0)
    def leave() -> None:
        raise SystemExit(5)

    others = [add.remote(number) for number in range(20)]
    with pytest.raises(errors.WorkerDied, match="exit code 5"):
        clusterpool.get(leave.remote(), timeout=20)
    assert clusterpool.get(others, timeout=20) == list(range(1, 21))


def test_a_worker_that_sends_rubbish_to_its_node_is_ended_and_nobody_hangs() -> None:
    @clusterpool.remote(retries=0)
    def babble() -> None:
        from clusterpool.client import current

        client = current.get().client
        client._connections.by_process[client.node.process_id].socket.send(b"\x05\0\0\0babel")
        time.sleep(60)

    with pytest.raises(errors.WorkerDied, match="bytes that are no message"):
        clusterpool.get(babble.remote(), timeout=20)
    assert clusterpool.get(add.remote(1), timeout=20) == 2


def test_the_task_that_killed_its_worker_is_the_one_that_fails() -> None:
    @clusterpool.remote(retries=1)
    def maybe_die(number: int) -> int:
        if number == 57:
            os._exit(3)
        return number

    clusterpool.get([maybe_die.remote(0) for _ in range(500)], timeout=20)  # so that tasks travel in batches
    refs = [maybe_die.remote(number) for number in range(100)]
    failed = []
    for number, ref in enumerate(refs):
        try:
            assert clusterpool.get(ref, timeout=30) == number
        except errors.WorkerDied:
            failed.append(number)
    assert failed == [57]


# --- cancelling -----------------------------------------------------------------------------------------------------


@clusterpool.remote
def sleep_and_touch(path: str, seconds: float) -> str:
    Path(path).touch()
    time.sleep(seconds)
    return "slept"


@clusterpool.remote
def touch_and_wait(path: str) -> str:
    """Runs until `let_go` of the same path."""
    Path(path).touch()
    while not Path(f"{path}.go").exists():
        time.sleep(0.005)
    return "waited"


def let_go(path: Path) -> None:
    path.with_name(f"{path.name}.go").touch()


@pytest.mark.usefixtures("nothing_left")
def test_a_queued_task_is_cancelled_and_never_runs(tmp_path: Path) -> None:
    paths = [tmp_path / f"blocker{number}" for number in range(2)]
    blockers = [touch_and_wait.remote(str(path)) for path in paths]
    assert wait_for(lambda: all(path.exists() for path in paths))
    queued = sleep_and_touch.remote(str(tmp_path / "queued"), 0)
    assert clusterpool.cancel(queued)
    with pytest.raises(errors.TaskCancelled):
        clusterpool.get(queued, timeout=30)
    for path in paths:
        let_go(path)
    assert clusterpool.get(blockers, timeout=30) == ["waited"] * 2
    assert not (tmp_path / "queued").exists()


@pytest.mark.usefixtures("nothing_left")
def test_a_task_that_waits_for_an_argument_is_cancelled(tmp_path: Path) -> None:
    slow = touch_and_wait.remote(str(tmp_path / "slow"))
    waiting = add.remote(slow, y="!")
    assert clusterpool.cancel(waiting)
    with pytest.raises(errors.TaskCancelled):
        clusterpool.get(waiting, timeout=30)
    let_go(tmp_path / "slow")
    assert clusterpool.get(slow, timeout=30) == "waited"


@pytest.mark.usefixtures("nothing_left")
def test_a_running_task_is_interrupted_in_a_sleep(tmp_path: Path) -> None:
    ref = sleep_and_touch.remote(str(tmp_path / "running"), 60)
    assert wait_for(lambda: (tmp_path / "running").exists())
    started_s = time.monotonic()
    clusterpool.cancel(ref)
    with pytest.raises(errors.TaskCancelled):
        clusterpool.get(ref, timeout=30)
    assert time.monotonic() - started_s < 5
    assert clusterpool.get(add.remote(1), timeout=30) == 2


def test_a_running_task_is_interrupted_in_a_loop_and_may_clean_up(tmp_path: Path) -> None:
    @clusterpool.remote
    def spin(folder: str) -> None:
        Path(folder, "started").touch()
        try:
            while True:
                sum(range(1000))
        finally:
            Path(folder, "cleaned").touch()

    ref = spin.remote(str(tmp_path))
    assert wait_for((tmp_path / "started").exists)
    clusterpool.cancel(ref)
    with pytest.raises(errors.TaskCancelled):
        clusterpool.get(ref, timeout=30)
    assert wait_for((tmp_path / "cleaned").exists)


def test_a_task_that_waits_for_another_is_interrupted(tmp_path: Path) -> None:
    @clusterpool.remote
    def wait_for_another(folder: str) -> Any:
        inner = sleep_and_touch.remote(folder + "/inner", 30)
        try:
            return clusterpool.get(inner, timeout=30)
        finally:
            clusterpool.cancel(inner, force=True)

    ref = wait_for_another.remote(str(tmp_path))
    assert wait_for((tmp_path / "inner").exists)
    clusterpool.cancel(ref)
    with pytest.raises(errors.TaskCancelled):
        clusterpool.get(ref, timeout=30)
    assert clusterpool.get([add.remote(number) for number in range(4)], timeout=30) == [1, 2, 3, 4]


@pytest.mark.usefixtures("nothing_left")
def test_force_kills_the_worker(tmp_path: Path) -> None:
    @clusterpool.remote
    def stubborn(path: str) -> None:
        Path(path).touch()
        while True:
            with contextlib.suppress(BaseException):
                time.sleep(60)

    ref = stubborn.remote(str(tmp_path / "running"))
    assert wait_for((tmp_path / "running").exists)
    assert clusterpool.cancel(ref, force=True)
    with pytest.raises(errors.TaskCancelled):
        clusterpool.get(ref, timeout=30)
    assert clusterpool.get(add.remote(1), timeout=30) == 2


def test_interrupts_hit_only_the_task_that_they_are_for(tmp_path: Path) -> None:
    """Cancels fall all over the short tasks, and over what the worker does between them."""

    @clusterpool.remote
    def short(number: int) -> int:
        time.sleep(0.001)
        return number

    for _ in range(4):
        refs = [short.remote(number) for number in range(60)]
        for ref in refs[::3]:
            clusterpool.cancel(ref)
            time.sleep(0.0005)
        for number, ref in enumerate(refs):
            try:
                assert clusterpool.get(ref, timeout=20) == number
            except errors.TaskCancelled:
                assert number % 3 == 0, f"task {number} was not cancelled by anybody"


def test_cancel_after_the_end_changes_nothing() -> None:
    ref = add.remote(1)
    assert clusterpool.get(ref, timeout=30) == 2
    assert clusterpool.cancel(ref) is False
    assert clusterpool.get(ref, timeout=30) == 2


# --- waiting --------------------------------------------------------------------------------------------------------


def test_wait_gives_the_ready_ones_first(tmp_path: Path) -> None:
    slow = touch_and_wait.remote(str(tmp_path / "slow"))
    fast = add.remote(1)
    assert clusterpool.wait([slow, fast], timeout=30) == ([fast], [slow])
    assert clusterpool.wait([slow, fast], num_returns=2, timeout=0.01) == ([fast], [slow])
    let_go(tmp_path / "slow")
    assert clusterpool.wait([slow, fast], num_returns=2, timeout=30) == ([slow, fast], [])


def test_wait_counts_errors_as_ready() -> None:
    @clusterpool.remote
    def fail() -> None:
        raise ValueError

    ref = fail.remote()
    assert clusterpool.wait([ref], timeout=30) == ([ref], [])


def test_wait_gives_no_more_than_was_asked_for() -> None:
    refs = [clusterpool.put(number) for number in range(5)]
    ready, rest = clusterpool.wait(refs, num_returns=2, timeout=30)
    assert (ready, rest) == (refs[:2], refs[2:])


@pytest.mark.parametrize("num_returns", [0, 3])
def test_wait_refuses_impossible_numbers(num_returns: int) -> None:
    with pytest.raises(ValueError, match="num_returns"):
        clusterpool.wait([clusterpool.put(1), clusterpool.put(2)], num_returns=num_returns)


def test_wait_refuses_duplicates_and_other_things() -> None:
    ref = clusterpool.put(1)
    with pytest.raises(ValueError, match="twice"):
        clusterpool.wait([ref, ref])
    with pytest.raises(TypeError):
        clusterpool.wait([1])  # type: ignore[list-item]


def test_get_times_out_and_can_be_repeated(tmp_path: Path) -> None:
    ref = touch_and_wait.remote(str(tmp_path / "file"))
    with pytest.raises(errors.GetTimeout, match=r"after 0\.05 s") as caught:
        clusterpool.get(ref, timeout=0.05)
    assert isinstance(caught.value, TimeoutError)
    with pytest.raises(errors.GetTimeout):
        clusterpool.get(ref, timeout=0)
    let_go(tmp_path / "file")
    assert clusterpool.get(ref, timeout=30) == "waited"


def test_get_refuses_what_is_no_reference() -> None:
    with pytest.raises(TypeError, match="int"):
        clusterpool.get(1)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="str"):
        clusterpool.get(["a"])  # type: ignore[list-item]


def test_futures_of_references() -> None:
    futures = {add.remote(number).future(): number for number in range(10)}
    for future in concurrent.futures.as_completed(futures, timeout=20):
        assert future.result() == futures[future] + 1
    done, left = concurrent.futures.wait(futures, timeout=1)
    assert len(done) == 10 and not left


def test_a_future_gets_the_error(tmp_path: Path) -> None:
    @clusterpool.remote
    def fail() -> None:
        raise KeyError("missing")

    future = fail.remote().future()
    assert isinstance(future.exception(timeout=10), KeyError)


def test_references_are_awaited() -> None:

    async def main() -> list[int]:
        first = await add.remote(1)
        return [first, *await asyncio.gather(*(add.remote(number) for number in range(5)))]

    assert asyncio.run(asyncio.wait_for(main(), 20)) == [2, 1, 2, 3, 4, 5]


def test_threads_call_at_once() -> None:
    def calls(start: int) -> list[int]:
        return [clusterpool.get(add.remote(start + number), timeout=30) for number in range(30)]

    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        results = list(threads.map(calls, range(0, 600, 100), timeout=50))
    assert results == [[start + number + 1 for number in range(30)] for start in range(0, 600, 100)]


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"cpus": 1}, TypeError),
        ({"num_cpus": -1}, ValueError),
        ({"num_cpus": "two"}, TypeError),
        ({"num_cpus": float("nan")}, ValueError),
        ({"retries": -1}, ValueError),
        ({"retries": 1.5}, ValueError),
        ({"num_returns": -1}, ValueError),
        ({"num_returns": "many"}, ValueError),
        ({"num_returns": 100_000}, ValueError),
        ({"resources": {"CPU": 1}}, ValueError),
        ({"resources": ["licence"]}, TypeError),
        ({"scheduling": "fastest"}, ValueError),
        ({"runtime_env": {"pip": ["numpy"]}}, ValueError),
        ({"runtime_env": {"env_vars": {"A": 1}}}, TypeError),
        ({"max_concurrency": 2}, TypeError),
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        clusterpool.remote(**options)(lambda: None)


def test_a_generator_function_gives_a_stream() -> None:
    @clusterpool.remote(num_cpus=0.5)
    def count(number: int) -> Iterator[int]:
        yield from range(number)

    assert [clusterpool.get(ref, timeout=30) for ref in count.options(num_cpus=1).remote(3)] == [0, 1, 2]


def test_remote_refuses_coroutine_functions() -> None:
    async def wait() -> None: ...

    with pytest.raises(TypeError, match=r"asyncio\.run"):
        clusterpool.remote(wait)


def test_remote_refuses_what_is_no_function() -> None:
    with pytest.raises(TypeError):
        clusterpool.remote(1)
    with pytest.raises(TypeError):
        clusterpool.remote(num_cpus=1)(1)


def test_a_remote_function_is_not_called_directly() -> None:
    with pytest.raises(TypeError, match=r"add\.remote"):
        add(1)


def test_fractions_of_a_cpu(tmp_path: Path) -> None:
    meet = clusterpool.remote(num_cpus=0.5)(pid_at_meeting)
    pids = clusterpool.get([meet.remote(tmp_path, 4) for _ in range(4)], timeout=50)
    assert len(set(pids)) == 4, "all at once, on two CPUs"


def test_what_no_node_could_ever_give_is_refused() -> None:
    @clusterpool.remote(num_cpus=64)
    def large() -> None: ...

    with pytest.raises(errors.TaskInfeasible, match="64 CPU"):
        clusterpool.get(large.remote(), timeout=30)
    with pytest.raises(errors.TaskInfeasible, match="licence"):
        clusterpool.get(add.options(resources={"licence": 1}).remote(1), timeout=30)
    assert clusterpool.get(add.remote(1), timeout=30) == 2


def test_environment_variables_of_a_task() -> None:
    @clusterpool.remote
    def variable() -> str | None:
        return os.environ.get("ENGINE_TEST")

    with_variable = variable.options(runtime_env={"env_vars": {"ENGINE_TEST": "here"}})
    assert clusterpool.get(with_variable.remote(), timeout=30) == "here"
    # Its worker is not taken for tasks that did not ask for the variable.
    assert clusterpool.get([variable.remote() for _ in range(10)], timeout=30) == [None] * 10


def test_remote_functions_can_be_passed_on() -> None:
    @clusterpool.remote
    def call(function: Any, x: int) -> int:
        return clusterpool.get(function.remote(x), timeout=20)

    assert clusterpool.get(call.remote(add, 1), timeout=20) == 2


# --- leases ---------------------------------------------------------------------------------------------------------


def test_a_tiny_task_does_not_wait_behind_a_long_one(tmp_path: Path) -> None:
    @clusterpool.remote
    def maybe_long(path: str | None) -> int:
        if path is None:
            return 1
        while not Path(path).exists():
            time.sleep(0.005)
        return 2

    clusterpool.get([maybe_long.remote(None) for _ in range(500)], timeout=20)  # so that tasks travel in batches
    time.sleep(0.3)  # all leases but none are given back
    long = maybe_long.remote(str(tmp_path / "go"))
    behind = [maybe_long.remote(None) for _ in range(20)]
    assert clusterpool.get(behind, timeout=30) == [1] * 20
    (tmp_path / "go").touch()
    assert clusterpool.get(long, timeout=20) == 2


def test_the_values_of_a_worker_that_was_let_go_stay() -> None:
    """Workers with variables of their own are not reused, so they end with their leases."""

    @clusterpool.remote(runtime_env={"env_vars": {"ENGINE_TEST": "own"}})
    def make() -> list[Any]:
        return [clusterpool.put("kept"), add.remote(1)]

    refs = clusterpool.get(make.remote(), timeout=20)
    time.sleep(0.5)
    assert clusterpool.get(refs, timeout=30) == ["kept", 2]
    workers = int(clusterpool.nodes()[0]["workers"])
    del refs
    assert wait_for(lambda: clusterpool.nodes()[0]["workers"] < workers)


def test_functions_that_are_gone_are_forgotten_by_all() -> None:
    from clusterpool.client import current

    def count() -> int:
        return int(current.get().client.ask_machine(lambda machine: len(machine.functions.payloads)))

    before = count()
    for _ in range(3):
        clusterpool.get(
            [clusterpool.remote(lambda number=number: number).remote() for number in range(100)], timeout=30
        )
    clusterpool.get(add.remote(1), timeout=30)
    assert wait_for(lambda: count() <= before + 2), (before, count())
