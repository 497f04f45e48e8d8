"""What simulated drivers do with groups beyond plain tasks: chunks that kill workers, limits of time, second starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from clusterpool.core import owner_events as e
from clusterpool.core.dispatch import Task
from clusterpool.core.messages import TaskExtras, TaskKind, TaskLimits, TaskSpec, TaskStatus
from clusterpool.simulation.programs import Operation, Outcome, decode_payload, encode_operation, expected, mix
from clusterpool.simulation.threads import Pause, Steps

if TYPE_CHECKING:
    from clusterpool.simulation.client import Client
    from clusterpool.simulation.workloads import Script

_ALWAYS = 1000
HANG_S = 500.0
_decode_items = msgspec.msgpack.Decoder(list[Operation]).decode


def decode_items(payload: bytes) -> list[Operation]:
    """The items of a chunk."""
    return _decode_items(payload)


class ItemJudge:
    """The sink of one chunk: each of its items gets one outcome, once."""

    def __init__(self, client: Client, items: list[Operation], retries: int, what: str) -> None:
        self._client = client
        self._items = items
        self._retries = retries
        self._what = what
        self.is_done = False

    def __call__(self, outcome: Outcome) -> None:
        """The chunk ended as a whole."""
        monitor = self._client.world.monitor
        self._once()
        failing = [item for item in self._items if item.fails]
        if outcome.kind == "error":
            monitor.check(outcome.number in [item.salt for item in failing], f"{self._what} raised {outcome}")
            monitor.outcomes += 1
            return
        numbers = [item.salt for item in self._items]
        is_right = outcome.kind == "ok" and list(outcome.numbers) == numbers and not failing
        monitor.judge(self._client, self._what, Outcome("ok", 0) if is_right else outcome, Outcome("ok", 0))
        if outcome.kind == "worker_died" and len(self._items) > 1 and self._retries > 0:
            # It is split as soon as it is known which item ran: only a fault that hides this may take all of them.
            # (Without retries it is not: as in the standard library, the death of a worker is the chunk's.)
            is_hidden = self._client.world.evidence.is_by_fault(outcome.text)
            monitor.check(is_hidden, f"{self._what} was lost as a whole: {outcome}")

    def gathered(self, parts: list[e.ChunkPart]) -> None:
        """The chunk was run in spans."""
        monitor = self._client.world.monitor
        self._once()
        position = 0
        for part in parts:
            monitor.check(part.low == position, f"{self._what}: {part} follows item {position}")
            position = part.high
            if part.result is None:
                for item in self._items[part.low : part.high]:
                    is_bad = item.deaths > self._retries
                    is_hidden = self._client.world.evidence.is_by_fault(part.text)
                    monitor.check(is_bad or is_hidden, f"{self._what}: a good item was given up: {part.text}")
                continue
            monitor.check(part.result.status == TaskStatus.OK, f"{self._what}: {part.result}")
            numbers = list(decode_payload(part.result.payload).numbers)
            wanted = [item.salt for item in self._items[part.low : part.high]]
            monitor.check(numbers == wanted, f"{self._what}: items {part.low} to {part.high} gave {numbers}")
        monitor.check(position == len(self._items), f"{self._what} has outcomes for {position} items only")
        monitor.outcomes += 1

    def _once(self) -> None:
        self._client.world.monitor.check(not self.is_done, f"{self._what} came twice")
        self.is_done = True


def _submit(script: Script, group: int, task: Task) -> None:
    script.driver.event(e.TasksSubmitted(group, [task]))


def chunks(script: Script) -> Steps:
    """A map over items of which some end their worker, once or always."""
    driver, random = script.driver, script.random
    group, ended = _open(script)
    retries = random.choice((0, 1, 3))
    judges: list[ItemJudge] = []
    function = driver.function_of(Operation(0, 0.0))
    for chunk in range(script.count(2, 10)):
        items = []
        for position in range(random.choice((1, 2, 5, 10, 40))):
            deaths = random.choice((1, 2, _ALWAYS)) if random.random() < 0.06 else 0
            duration_s = random.choice((0.0, 0.00001, 0.0002, 0.004))
            is_failing = random.random() < 0.005
            items.append(
                Operation(mix(script.name, group, chunk, position), duration_s, fails=is_failing, deaths=deaths)
            )
        judge = ItemJudge(driver, items, retries, f"{script.name} chunk {chunk}")
        judges.append(judge)
        spec = TaskSpec(next(driver.numbers), function, TaskKind.MAP, msgspec.msgpack.encode(items))
        _submit(script, group, Task(spec, judge, 0, retries))
    yield from _close(script, group, ended, lambda: all(judge.is_done for judge in judges))


def limits(script: Script) -> Steps:
    """Tasks with a limit of time, of which some hang, among tasks without."""
    driver, random = script.driver, script.random
    group, ended = _open(script)
    outcomes: dict[int, Outcome] = {}
    wanted: dict[int, tuple[Operation, bool]] = {}
    for index in range(script.count(3, 20)):
        hangs = random.random() < 0.3
        timeout_s = random.choice((0.05, 0.3, 2.0)) if hangs or random.random() < 0.3 else 0.0
        # Without a fault it takes a tenth of its limit at most; hosts are up to five times slower.
        duration_s = HANG_S if hangs else random.choice((0.0, 0.0002, 0.004))
        operation = script.operation(duration_s=duration_s, fails=False, result_bytes=8)
        extras = None
        if timeout_s:
            driver.world.evidence.asks_to_kill = True
            extras = TaskExtras(limits=TaskLimits(timeout_s, travels_alone=True, retries_timeout=random.random() < 0.3))
        number = next(driver.numbers)
        spec = TaskSpec(number, driver.function_of(operation), TaskKind.CALL, encode_operation(operation), extras)
        wanted[index] = (operation, hangs)
        _submit(script, group, Task(spec, _Sink(driver, outcomes, index), 0, 2))
    yield from _close(script, group, ended, lambda: len(outcomes) == len(wanted))
    for index, (operation, hangs) in wanted.items():
        outcome, want = outcomes[index], expected(operation)
        if hangs:
            driver.world.monitor.check(outcome.kind != "ok", f"{script.name}: task {index} hangs, and gave {outcome}")
            want = Outcome("timeout", 0)
        driver.world.monitor.judge(driver, f"{script.name} task {index} with a limit", outcome, want)


def stragglers(script: Script) -> Steps:
    """Tasks that are safe to repeat, of which some are very slow the first time."""
    driver, random = script.driver, script.random
    group, ended = _open(script, safe_to_repeat=True)
    outcomes: dict[int, Outcome] = {}
    wanted: dict[int, Operation] = {}
    base_s = random.choice((0.004, 0.03, 0.1))
    for index in range(script.count(6, 30)):
        lag_s = random.choice((1.0, 4.0)) if random.random() < 0.15 else 0.0
        operation = script.operation(duration_s=base_s, lag_s=lag_s)
        number = next(driver.numbers)
        spec = TaskSpec(number, driver.function_of(operation), TaskKind.CALL, encode_operation(operation))
        wanted[index] = operation
        _submit(script, group, Task(spec, _Sink(driver, outcomes, index), 0, random.choice((0, 1, 3))))
    yield from _close(script, group, ended, lambda: len(outcomes) == len(wanted))
    for index, operation in wanted.items():
        what = f"{script.name} task {index} that may be repeated"
        driver.world.monitor.judge(driver, what, outcomes[index], expected(operation))


class _Sink:
    def __init__(self, client: Client, outcomes: dict[int, Outcome], index: int) -> None:
        self._client = client
        self._outcomes = outcomes
        self._index = index

    def __call__(self, outcome: Outcome) -> None:
        self._client.world.monitor.check(self._index not in self._outcomes, f"result {self._index} came twice")
        self._outcomes[self._index] = outcome


def _open(script: Script, *, safe_to_repeat: bool = False) -> tuple[int, list[Any]]:
    ended: list[Any] = []

    def told(command: Any) -> None:
        if isinstance(command, e.SetEnded):
            ended.append(command)

    size = script.count(1, 6)
    return script.driver.open_group(size, told, safe_to_repeat=safe_to_repeat), ended


def _close(script: Script, group: int, ended: list[Any], is_done: Callable[[], bool]) -> Steps:
    driver = script.driver
    driver.turn()
    if script.random.random() < 0.5:
        yield Pause(script.random.choice((0.0, 0.01, 0.3)))
    driver.event(e.SetClosed(group))
    driver.turn()
    yield from driver.wait_until(lambda: bool(ended))
    yield from driver.wait_until(is_done)
