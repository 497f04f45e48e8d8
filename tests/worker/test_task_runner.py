"""The worker's main loop on a fake connection: order, cancelling, giving back, and results that two threads send."""

from __future__ import annotations

import asyncio
import pickle
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from clusterpool.core import messages as m
from clusterpool.core.messages import Address, TaskKind, TaskSpec, TaskStatus
from clusterpool.processes.task_page import ENDED
from clusterpool.serialization.functions import dumps_function
from clusterpool.worker.actor import ActorRunner
from clusterpool.worker.interrupts import Key
from clusterpool.worker.task_runner import TaskRunner

OWNER, NODE = Address("n1", "d1"), Address("n1", "n1")


class FakeClient:
    """Keeps what is sent; messages arrive by `TaskRunner.message`."""

    def __init__(self) -> None:
        self.address = Address("n1", "w1")
        self.node = NODE
        self.pid = 1
        self.sent: list[tuple[Address, m.Message]] = []
        self.released: list[tuple[Address, int]] = []
        self.events: list[Any] = []
        self.is_closed = False
        self.loop = SimpleNamespace(kick=lambda: None)

    def send(self, destination: Address, message: m.Message) -> None:
        self.sent.append((destination, message))

    def release_reference(self, owner: Address, number: int) -> None:
        self.released.append((owner, number))

    def handle_event(self, event: Any) -> None:
        self.events.append(event)

    def call_later(self, delivery: Any) -> None:
        delivery()

    def results(self) -> list[m.TaskResult]:
        return [
            result for _, message in self.sent if isinstance(message, m.TasksFinished) for result in message.results
        ]


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


@pytest.fixture
def runner(client: FakeClient) -> Iterator[TaskRunner]:
    before = signal.getsignal(signal.SIGINT)
    runtime: Any = SimpleNamespace(client=client, values=None, returns_exits=False, refuses_unnamed_results=False)
    yield TaskRunner(runtime, name="test", page=memoryview(bytearray(24)).cast("Q"))
    signal.signal(signal.SIGINT, before)


def start(runner: TaskRunner, function: Any, *argument_lists: tuple[Any, ...], first: int = 1, number: int = 7) -> None:
    tasks = [
        TaskSpec(first + offset, number, TaskKind.CALL, pickle.dumps((arguments, {})))
        for offset, arguments in enumerate(argument_lists)
    ]
    runner.message(OWNER, m.StartTasks([m.FunctionPart(number, dumps_function(function))], tasks))


def statuses(client: FakeClient) -> list[tuple[int, int]]:
    return [(result.number, result.status) for result in client.results()]


def test_tasks_run_in_order_and_their_results_go_out_together(runner: TaskRunner, client: FakeClient) -> None:
    start(runner, abs, (-1,), (2,), (-3,))
    runner._run_pending()
    assert [pickle.loads(result.payload) for result in client.results()] == [1, 2, 3]
    assert len(client.sent) == 1


def test_an_error_is_a_result(runner: TaskRunner, client: FakeClient) -> None:
    start(runner, abs, ("text",), (2,))
    runner._run_pending()
    assert statuses(client) == [(1, TaskStatus.ERROR), (2, TaskStatus.OK)]


def test_a_cancelled_task_does_not_run(runner: TaskRunner, client: FakeClient) -> None:
    start(runner, abs, (1,), (2,), (3,))
    runner.message(OWNER, m.CancelTasks([2], True))
    runner._run_pending()
    assert statuses(client) == [(1, TaskStatus.OK), (2, TaskStatus.CANCELLED), (3, TaskStatus.OK)]


def test_the_last_ones_are_given_back_first(runner: TaskRunner, client: FakeClient) -> None:
    start(runner, abs, (1,), (2,), (3,), (4,))
    runner.message(OWNER, m.CancelTasks([4], True))
    runner.message(OWNER, m.TakeBackTasks(2))
    # The owner wants number 4 no more: were it returned, it would be sent to somebody else.
    assert statuses(client) == [(3, TaskStatus.RETURNED), (4, TaskStatus.CANCELLED)]
    client.sent.clear()
    runner._run_pending()
    assert statuses(client) == [(1, TaskStatus.OK), (2, TaskStatus.OK)]


def test_exit_sends_what_was_finished_before(runner: TaskRunner, client: FakeClient) -> None:
    start(runner, abs, (-1,), (-2,))
    start(runner, exit_with, (5,), first=3, number=8)
    with pytest.raises(SystemExit):
        runner._run_pending()
    assert statuses(client) == [(1, TaskStatus.OK), (2, TaskStatus.OK)]
    assert runner.page[0] == 3, "the node must be able to tell which task ended the process"


def exit_with(code: int) -> None:
    raise SystemExit(code)


def test_the_page_names_the_running_task_only_while_it_runs(runner: TaskRunner) -> None:
    seen: list[int] = []
    runner.functions[(OWNER, 7)] = lambda: seen.append(runner.page[0])
    runner.pending.append((OWNER, TaskSpec(42, 7, TaskKind.CALL, pickle.dumps(((), {})))))
    runner._run_pending()
    assert seen == [42] and runner.page[0] == 42 | ENDED


def test_references_are_held_until_the_task_has_ended(runner: TaskRunner, client: FakeClient) -> None:
    reference = m.Reference(OWNER, 9)
    extras = m.TaskExtras(references=[reference])
    runner.functions[(OWNER, 7)] = lambda: client.released.append(("running", 0))  # type: ignore[arg-type]
    spec = TaskSpec(1, 7, TaskKind.CALL, pickle.dumps(((), {})), extras)
    runner.message(OWNER, m.StartTasks([], [spec]))
    assert [event.references for event in client.events] == [[reference]]
    runner._run_pending()
    assert client.released == [("running", 0), (OWNER, 9)]


@pytest.mark.parametrize("how", ["cancelled", "given back"])
def test_references_of_a_task_that_does_not_run_are_let_go(runner: TaskRunner, client: FakeClient, how: str) -> None:
    extras = m.TaskExtras(references=[m.Reference(OWNER, 9)])
    spec = TaskSpec(1, 7, TaskKind.CALL, pickle.dumps(((), {})), extras)
    runner.message(OWNER, m.StartTasks([], [spec]))
    if how == "cancelled":
        runner.message(OWNER, m.CancelTasks([1], False))
    else:
        runner.message(OWNER, m.TakeBackTasks(1))
    runner._run_pending()
    assert client.released == [(OWNER, 9)]


def test_forgotten_functions_go(runner: TaskRunner) -> None:
    start(runner, abs, (-1,))
    runner._run_pending()
    runner.message(OWNER, m.ForgetFunctions([7, 8]))
    assert not runner.functions


def test_no_result_is_lost_when_two_threads_send(runner: TaskRunner, client: FakeClient) -> None:
    """The I/O thread sends what has gathered while the main thread goes on adding."""
    is_done = threading.Event()

    def send() -> None:
        while not is_done.is_set():
            runner.turn_by_thread()

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(30_000):
        runner.add_result(OWNER, m.TaskResult(number, TaskStatus.OK, b""))
    is_done.set()
    for thread in threads:
        thread.join()
    runner.flush()
    numbers = [result.number for result in client.results()]
    assert sorted(numbers) == list(range(30_000)), "each result is sent exactly once"


def test_results_of_two_owners_are_not_mixed(runner: TaskRunner, client: FakeClient) -> None:
    other = Address("n2", "d2")
    for number in range(6):
        runner.add_result(OWNER if number % 3 else other, m.TaskResult(number, TaskStatus.OK, b""))
    runner.flush()
    by_owner = {
        owner: [result.number for to, message in client.sent if to == owner for result in message.results]  # type: ignore[attr-defined]
        for owner in (OWNER, other)
    }
    assert by_owner == {OWNER: [1, 2, 4, 5], other: [0, 3]}


def test_a_cancel_reaches_the_task_in_between(runner: TaskRunner) -> None:
    """It is asked for after the main thread has taken the task, and before it runs."""
    runner.interrupts.ask(Key(OWNER, 1))
    assert runner.interrupts.take(Key(OWNER, 1))


class Sleeper:
    async def sleep(self) -> None:
        await asyncio.sleep(100)


@pytest.mark.parametrize("moment", ["before it is handed over", "while it is handed over", "after that"])
def test_a_coroutine_is_cancelled_whenever_the_cancel_comes(
    runner: TaskRunner, client: FakeClient, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The main thread hands a call over to the actor's loop while another thread hears that it is cancelled."""
    cancel = m.CancelTasks([1], True)
    hand_over = asyncio.run_coroutine_threadsafe

    def hand_over_meanwhile(coroutine: Any, loop: Any) -> Any:
        if moment.startswith("before"):
            runner.message(OWNER, cancel)
        future = hand_over(coroutine, loop)
        if moment.startswith("while"):
            runner.message(OWNER, cancel)
        return future

    # The signal does nothing in the main thread while that is not in the user's code, but may come after the test.
    monkeypatch.setattr(runner.interrupts, "_signal", lambda: None)
    runner.actor = ActorRunner(runner, Sleeper(), concurrency=2)
    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", hand_over_meanwhile)
    extras = m.TaskExtras(method="sleep")
    runner.message(OWNER, m.StartTasks([], [TaskSpec(1, 0, TaskKind.ACTOR_CALL, pickle.dumps(((), {})), extras)]))
    runner._run_pending()
    if moment.startswith("after"):
        runner.message(OWNER, cancel)
    hand_over(asyncio.sleep(0), runner.actor._loop).result(20)  # the loop has heard of it
    runner.actor.close()
    assert statuses(client) == [(1, TaskStatus.CANCELLED)]
    assert not runner.interrupts.is_wanted(Key(OWNER, 1))
