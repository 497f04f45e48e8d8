"""The actor that a worker holds: called in order by the main thread, or at once by threads or coroutines."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
from typing import TYPE_CHECKING, Any

from clusterpool.core import messages as m
from clusterpool.core.messages import Address, TaskResult, TaskSpec, TaskStatus

if TYPE_CHECKING:
    from clusterpool.worker.task_runner import TaskRunner


class ActorRunner:
    """An instance, and how its methods run."""

    def __init__(self, runner: TaskRunner, instance: Any, *, concurrency: int) -> None:
        self._runner = runner
        self._instance = instance
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None
        self._running: dict[tuple[Address, int], Any] = {}
        if any(
            inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member)
            for _, member in inspect.getmembers(type(instance))
        ):
            self._start_loop(concurrency)
        elif concurrency > 1:
            self._threads = concurrent.futures.ThreadPoolExecutor(concurrency, "actor")

    def method(self, name: str) -> Any:
        """A bound method."""
        return getattr(self._instance, name)

    def take(self, owner: Address, spec: TaskSpec) -> bool:
        """Run a call outside the main thread, if this actor's calls do; whether it was taken."""
        if self._loop is not None:
            future = asyncio.run_coroutine_threadsafe(self._run_async(owner, spec), self._loop)
        elif self._threads is not None:
            future = self._threads.submit(self._run_in_thread, owner, spec)
        else:
            return False
        key = (owner, spec.number)
        self._running[key] = future
        future.add_done_callback(lambda _: self._running.pop(key, None))
        return True

    def cancel(self, key: tuple[Address, int]) -> bool:
        """Cancel a call that was taken; whether it was one."""
        future = self._running.get(key)
        if future is None:
            return False
        if future.cancel():
            self._finished(key[0], TaskResult(key[1], TaskStatus.CANCELLED, b""))
        return True

    def close(self) -> None:
        """Finish what runs."""
        if self._threads is not None:
            self._threads.shutdown(wait=True)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)

    def _finished(self, owner: Address, result: TaskResult) -> None:
        self._runner.client.send(owner, m.TasksFinished([result], 0))

    def _run_in_thread(self, owner: Address, spec: TaskSpec) -> None:
        self._finished(owner, self._runner.calls.run(owner, spec))

    # --- coroutines

    def _start_loop(self, concurrency: int) -> None:
        loop = self._loop = asyncio.new_event_loop()
        self._limit = asyncio.Semaphore(concurrency)

        def turn() -> None:
            asyncio.set_event_loop(loop)
            loop.run_forever()

        threading.Thread(target=turn, name="actor-loop", daemon=True).start()

    async def _run_async(self, owner: Address, spec: TaskSpec) -> None:
        runner = self._runner
        async with self._limit:
            try:
                value = runner.calls.call_of(owner, spec)()
                if inspect.isasyncgen(value):
                    count = 0
                    async for item in value:
                        runner.calls.send_item(owner, spec, count, item)
                        count += 1
                    result = TaskResult(spec.number, TaskStatus.STREAM_END, str(count).encode())
                else:
                    if inspect.isawaitable(value):
                        value = await value
                    result = runner.calls.result(owner, spec, value)
            except asyncio.CancelledError:
                raise
            except BaseException as exc:
                result = runner.calls.error(spec, exc)
            finally:
                runner.drop_references(spec)
        self._finished(owner, result)
