"""How each contender runs the job: the same three kinds of work, each in its own idiom.

A call that fails although its tool was told to try again is reported as an error, and made again by the job.
"""

from __future__ import annotations

import collections
import importlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from benchmarks.soak import work
from benchmarks.work import Counter

OURS = "clusterpool"
# Unfinished small tasks that the driver keeps up; far more than there are workers.
WINDOW = 200
WORKERS = 8
RETRIES = 50
CALL_TIMEOUT_S = 120.0
Task = Callable[[int], tuple[int, int]]
ACTOR_OPTIONS = {"max_restarts": -1, "max_task_retries": -1, "checkpoint_every": 20}


class Engine(Protocol):
    """One contender."""

    def small_tasks(self, numbers: Iterator[int], failed: Callable[[str], None]) -> Iterator[tuple[int, int]]:
        """The task for all numbers, as they are done."""

    def chain(self, number: int) -> tuple[float, float, int]:
        """`summary(shift(make_big(number)))`, each in a task, the arrays passed from task to task."""

    def open_actors(self, count: int) -> bool:
        """Make the actors; False where the tool has none."""

    def call_all(self, amounts: list[int]) -> list[int | Exception]:
        """Call `add` of each actor, all at once; the sums."""

    def close(self) -> None:
        """Leave the cluster."""


class _Referenced:
    """Arrays and actors of tools whose calls give references: ours and Ray say it in the same words."""

    tool: Any  # the module
    make: Any
    shift: Any
    summary: Any
    actors: list[Any]

    def chain(self, number: int) -> tuple[float, float, int]:
        last = self.summary.remote(self.shift.remote(self.make.remote(number)))
        result: tuple[float, float, int] = self.tool.get(last, timeout=CALL_TIMEOUT_S)
        return result

    def call_all(self, amounts: list[int]) -> list[int | Exception]:
        refs = [actor.add.remote(amount) for actor, amount in zip(self.actors, amounts, strict=True)]
        return [_value_or_error(lambda ref=ref: self.tool.get(ref, timeout=CALL_TIMEOUT_S)) for ref in refs]  # type: ignore[misc]


class Clusterpool(_Referenced):
    """A Pool for the small tasks, remote functions for the arrays, actors with checkpoints."""

    def __init__(self, address: str, workers: int, task: Task, actor: type) -> None:
        import clusterpool

        self.tool = clusterpool
        clusterpool.init(address=address)
        self.task, self.actor = task, actor
        self.pool = clusterpool.Pool(workers, retries=RETRIES)
        remote: Any = clusterpool.remote
        self.make, self.shift, self.summary = (
            remote(retries=RETRIES)(function) for function in (work.make_big, work.shift, work.summary)
        )
        self.actors: list[Any] = []

    def small_tasks(self, numbers: Iterator[int], failed: Callable[[str], None]) -> Iterator[tuple[int, int]]:
        results = self.pool.imap_unordered(self.task, numbers)
        while True:
            try:
                yield next(results)
            except StopIteration:
                return
            except Exception as exc:
                failed(f"{type(exc).__name__}: {exc}")

    def open_actors(self, count: int) -> bool:
        counter = self.tool.remote(num_cpus=0, scheduling="spread", **ACTOR_OPTIONS)(self.actor)
        self.actors = [counter.remote() for _ in range(count)]
        return True

    def close(self) -> None:
        self.pool.terminate()
        self.pool.join()
        self.actors.clear()
        self.tool.shutdown()


class _Windowed:
    """Small tasks of tools that give a reference for each."""

    def submit(self, number: int) -> Any:
        raise NotImplementedError

    def wait_any(self, refs: list[Any]) -> list[Any]:
        raise NotImplementedError

    def value(self, ref: Any) -> Any:
        raise NotImplementedError

    def small_tasks(self, numbers: Iterator[int], failed: Callable[[str], None]) -> Iterator[tuple[int, int]]:
        pending: dict[Any, int] = {}
        again: collections.deque[int] = collections.deque()
        ended = False
        while pending or again or not ended:
            while len(pending) < WINDOW and not (ended and not again):
                number = again.popleft() if again else next(numbers, None)
                if number is None:
                    ended = True
                    break
                try:
                    pending[self.submit(number)] = number
                except Exception as exc:
                    failed(f"{type(exc).__name__}: {exc}")
                    again.append(number)
                    break
            for ref in self.wait_any(list(pending)):
                number = pending.pop(ref)
                try:
                    yield self.value(ref)
                except Exception as exc:
                    failed(f"{type(exc).__name__}: {exc}")
                    again.append(number)


class Ray(_Referenced, _Windowed):
    """Tasks and actors, with their retries and restarts. An actor that is started again has lost what it knew."""

    def __init__(self, address: str, workers: int, task: Task, actor: type) -> None:
        self.actor = actor
        self.tool = importlib.import_module("ray")
        self.tool.init(address="auto", log_to_driver=False, logging_level="ERROR")
        options = {"max_retries": RETRIES, "num_cpus": 1}
        self.task, self.make, self.shift, self.summary = (
            self.tool.remote(**options)(function) for function in (task, work.make_big, work.shift, work.summary)
        )
        self.actors: list[Any] = []

    def submit(self, number: int) -> Any:
        return self.task.remote(number)

    def wait_any(self, refs: list[Any]) -> list[Any]:
        done: list[Any] = self.tool.wait(refs, num_returns=1, timeout=1.0)[0] if refs else []
        return done

    def value(self, ref: Any) -> Any:
        return self.tool.get(ref, timeout=CALL_TIMEOUT_S)

    def open_actors(self, count: int) -> bool:
        counter = self.tool.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(self.actor)
        self.actors = [counter.remote() for _ in range(count)]
        return True

    def close(self) -> None:
        self.tool.shutdown()


class Dask(_Windowed):
    """Futures with retries, and actors, which Dask does not start again."""

    def __init__(self, address: str, workers: int, task: Task, actor: type) -> None:
        self.task, self.actor = task, actor
        distributed: Any = importlib.import_module("distributed")
        self.distributed = distributed
        self.client = distributed.Client(address, set_as_default=True)
        self.actors: list[Any] = []

    def submit(self, number: int) -> Any:
        return self.client.submit(self.task, number, retries=RETRIES, pure=False)

    def wait_any(self, refs: list[Any]) -> list[Any]:
        if not refs:
            return []
        try:
            return list(self.distributed.wait(refs, timeout=1.0, return_when="FIRST_COMPLETED").done)
        except TimeoutError:
            return []

    def value(self, ref: Any) -> Any:
        return ref.result(timeout=CALL_TIMEOUT_S)

    def chain(self, number: int) -> tuple[float, float, int]:
        submit = self.client.submit
        array = submit(work.shift, submit(work.make_big, number, retries=RETRIES), retries=RETRIES)
        result: tuple[float, float, int] = submit(work.summary, array, retries=RETRIES).result(timeout=CALL_TIMEOUT_S)
        return result

    def open_actors(self, count: int) -> bool:
        self.actors = [self.client.submit(self.actor, actor=True, pure=False).result() for _ in range(count)]
        return True

    def call_all(self, amounts: list[int]) -> list[int | Exception]:
        values: list[int | Exception] = []
        for position, amount in enumerate(amounts):
            value = _value_or_error(
                lambda position=position, amount=amount: self.actors[position].add(amount).result(timeout=5)  # type: ignore[misc]
            )
            if isinstance(value, Exception):
                self.actors[position] = self.client.submit(self.actor, actor=True, pure=False).result(timeout=60)
            values.append(value)
        return values

    def close(self) -> None:
        self.client.close()


class Loky(_Windowed):
    """One host, no actors, no retries: an executor whose worker was killed is broken, and the program makes another."""

    def __init__(self, address: str, workers: int, task: Task, actor: type) -> None:
        self.workers = workers
        self.task, self.actor = task, actor
        self.loky: Any = importlib.import_module("loky")
        self.futures: Any = importlib.import_module("concurrent.futures")

    def _executor(self) -> Any:
        return self.loky.get_reusable_executor(max_workers=self.workers, timeout=300)

    def submit(self, number: int) -> Any:
        return self._executor().submit(self.task, number)

    def wait_any(self, refs: list[Any]) -> list[Any]:
        return list(self.futures.wait(refs, 1.0, "FIRST_COMPLETED").done) if refs else []

    def value(self, ref: Any) -> Any:
        return ref.result()

    def chain(self, number: int) -> tuple[float, float, int]:
        array: Any = number
        for function in (work.make_big, work.shift, work.summary):
            array = self._executor().submit(function, array).result(CALL_TIMEOUT_S)
        result: tuple[float, float, int] = array
        return result

    def open_actors(self, count: int) -> bool:
        return False

    def call_all(self, amounts: list[int]) -> list[int | Exception]:
        return []

    def close(self) -> None:
        self._executor().shutdown(wait=True, kill_workers=True)


def _value_or_error(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as exc:
        return exc


def make_engine(
    name: str, address: str, *, workers: int = WORKERS, task: Task = work.mixed, actor: type = Counter
) -> Engine:
    """The contender, connected. `task`: what small tasks do, on so many workers where that can be said."""
    engines: dict[str, Callable[[str, int, Task, type], Engine]] = {
        OURS: Clusterpool, "ray": Ray, "dask": Dask, "loky": Loky,
    }  # fmt: skip
    return engines[name](address, workers, task, actor)
