"""The actor that a worker holds: called in order by the main thread, or at once by threads or coroutines."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
from collections.abc import AsyncIterable
from typing import TYPE_CHECKING, Any

from clusterpool.client.values import ObjectUnreadable
from clusterpool.core import messages as m
from clusterpool.core.messages import Address, TaskResult, TaskSpec, TaskStatus
from clusterpool.worker.interrupts import Interrupted, Key

if TYPE_CHECKING:
    from clusterpool.worker.journal import Journal
    from clusterpool.worker.task_runner import TaskRunner


class ActorRunner:
    """An instance, and how its methods run."""

    def __init__(self, runner: TaskRunner, instance: Any, *, concurrency: int, journal: Journal | None = None) -> None:
        self._runner = runner
        self.instance = instance
        self._journal = journal
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread: threading.Thread | None = None
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None
        self._running: dict[Key, concurrent.futures.Future[None]] = {}
        # One of two threads that cancel the same call says so to its owner. Never held while something is sent.
        self._cancelling = threading.Lock()
        self._cancelled: set[Key] = set()  # coroutines that have still to hear of it
        # Not `inspect.getmembers` of the instance: that would run the user's properties.
        members = [inspect.getattr_static(type(instance), name, None) for name in dir(type(instance))]
        if any(inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member) for member in members):
            self._start_loop(concurrency)
        elif concurrency > 1:
            self._threads = concurrent.futures.ThreadPoolExecutor(concurrency, "actor")

    def method(self, name: str) -> Any:
        """A bound method."""
        return getattr(self.instance, name)

    def take(self, owner: Address, spec: TaskSpec) -> bool:
        """Run a call as this actor's calls run, if that is not as others do; whether it was taken."""
        if self._journal is not None:
            self._journal.run(owner, spec)
            return True
        if self._loop is not None:
            future = asyncio.run_coroutine_threadsafe(self._run_async(owner, spec), self._loop)
        elif self._threads is not None:
            future = self._threads.submit(self._run_in_thread, owner, spec)
        else:
            return False
        key = Key(owner, spec.number)
        self._running[key] = future
        future.add_done_callback(lambda _: self._running.pop(key, None))
        # A cancel that found nothing running has asked for an interrupt, and looks once more after that: one of the two
        # sees the other.
        interrupts = self._runner.interrupts
        if interrupts.is_wanted(key) and self.cancel(key):
            interrupts.forget(key)
        return True

    def message(self, source: Address, message: m.Message) -> None:
        """What a caller says about results."""
        if self._journal is not None:
            self._journal.message(source, message)

    def save(self) -> None:
        """Take a checkpoint now."""
        if self._journal is not None:
            self._journal.save()

    def cancel(self, key: Key) -> bool:
        """Cancel a call that was taken; whether it was one that need not be told otherwise."""
        with self._cancelling:
            future = self._running.get(key)
            if future is None or future.cancelled():
                return False
            if self._loop is not None:
                self._cancelled.add(key)  # first, since the loop may run it at once
            # A thread cannot be interrupted, but a generator that it runs ends with its next item.
            is_cancelled = future.cancel()
        if is_cancelled:
            self._finished(key.owner, TaskResult(key.number, TaskStatus.CANCELLED, b""))
        return is_cancelled

    def close(self) -> None:
        """Finish what runs."""
        if self._journal is not None:
            self._journal.close()
        if self._threads is not None:
            self._threads.shutdown(wait=True)
        if self._loop is not None and self._loop_thread is not None:
            concurrent.futures.wait(list(self._running.values()))
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop_thread.join()

    def _finished(self, owner: Address, result: TaskResult) -> None:
        self._runner.client.send(owner, m.TasksFinished([result], 0))
        if result.extras is not None:
            self._runner.let_go_of_result(result)

    def _run_in_thread(self, owner: Address, spec: TaskSpec) -> None:
        runner = self._runner
        try:
            result = runner.calls.run(owner, spec)
        except SystemExit as exc:
            runner.exit(exc)
            return
        runner.interrupts.forget(Key(owner, spec.number))
        self._finished(owner, result)

    # --- coroutines

    def _start_loop(self, concurrency: int) -> None:
        loop = self._loop = asyncio.new_event_loop()
        self._limit = asyncio.Semaphore(concurrency)

        def turn() -> None:
            asyncio.set_event_loop(loop)
            loop.run_forever()

        self._loop_thread = threading.Thread(target=turn, name="actor-loop", daemon=True)
        self._loop_thread.start()

    async def _run_async(self, owner: Address, spec: TaskSpec) -> None:
        runner, key = self._runner, Key(owner, spec.number)
        try:
            async with self._limit:
                result = await self._result_of(owner, spec)
        except Interrupted:
            result = TaskResult(spec.number, TaskStatus.CANCELLED, b"")
        except SystemExit as exc:
            runner.exit(exc)
            return
        except BaseException as exc:
            if isinstance(exc, asyncio.CancelledError) and key in self._cancelled:
                raise  # `cancel` has sent the result; any other is the method's own, for which its caller waits
            result = runner.calls.error(spec, exc, is_loaded=not isinstance(exc, ObjectUnreadable))
        finally:
            self._cancelled.discard(key)
            runner.drop_references(spec)
        self._finished(owner, result)

    async def _result_of(self, owner: Address, spec: TaskSpec) -> TaskResult:
        calls = self._runner.calls
        value = calls.call_of(owner, spec)()
        if inspect.isasyncgen(value):
            return await self._stream_of(owner, spec, value)
        if inspect.isawaitable(value):
            value = await value
        return calls.returned(owner, spec, value)

    async def _stream_of(self, owner: Address, spec: TaskSpec, generator: AsyncIterable[Any]) -> TaskResult:
        calls, streams = self._runner.calls, self._runner.streams
        count, key = 0, Key(owner, spec.number)
        calls.open_stream(key, spec)
        try:
            async for item in generator:
                if not calls.send_item(owner, spec, count, item):
                    # In a thread: the actor's other coroutines go on.
                    await asyncio.get_running_loop().run_in_executor(None, streams.wait, key)
                count += 1
        finally:
            streams.close(key)
        return calls.stream_ended(spec, count)
