"""`ObjectRefStream`: the references that a generator task yields, taken one by one, also by coroutines.

A coroutine that waits for an item costs no thread: it is told when the stream has moved, and looks again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from clusterpool.client.object_ref import ObjectRef
from clusterpool.core import owner_events as e

if TYPE_CHECKING:
    from clusterpool.client.runtime import Runtime


class ObjectRefStream(Iterator[ObjectRef]):
    """The references that a generator task yields, as it makes them; also an async iterator."""

    def __init__(self, here: Runtime, number: int, stream: e.Stream) -> None:
        self._here = here
        self._number = number
        self._stream = stream
        self._position = 0
        self._told = 0  # of the position, what the generator knows
        self._is_closed = False

    def __iter__(self) -> ObjectRefStream:
        return self

    def __next__(self) -> ObjectRef:
        if self._is_closed:
            raise StopIteration
        self._here.client.wait_until(self._has_moved, None)
        ref = self._take()
        if ref is None:
            raise StopIteration
        return ref

    def __aiter__(self) -> ObjectRefStream:
        return self

    async def __anext__(self) -> ObjectRef:
        import asyncio

        loop = asyncio.get_running_loop()
        while not self._has_moved():
            moved = loop.create_future()
            self._when_moved(lambda moved=moved: _wake(loop, moved))  # type: ignore[misc]
            await moved
        ref = self._take()
        if ref is None:
            raise StopAsyncIteration
        return ref

    def _has_moved(self) -> bool:
        return self._is_closed or len(self._stream.items) > self._position or self._stream.is_ended

    def _take(self) -> ObjectRef | None:
        """The next reference; None at the end, or when another thread has closed the stream meanwhile."""
        stream, client = self._stream, self._here.client
        if self._is_closed or len(stream.items) <= self._position:
            self.close()
            return None
        item = stream.items[self._position]
        self._position += 1
        if self._position - self._told >= stream.step:
            self._told = self._position
            client.handle_event(e.ItemsTaken(self._number, self._position))
        return ObjectRef(client, client.address, item, is_counted=True)

    def _when_moved(self, callback: Callable[[], None]) -> None:
        """Have `callback` called by whoever turns the loop, once there is an item more, or an end."""
        deliveries = self._here.client.deliveries

        def look(_: Any) -> None:
            if self._has_moved():
                deliveries.queue.append(callback)
            else:
                deliveries.stream_watchers.setdefault(self._number, []).append(callback)

        self._here.client.ask_machine(look)

    def close(self) -> None:
        """End the generator if it still runs, and let go of items that nobody took."""
        if not self._is_closed:
            self._is_closed = True
            # From a garbage collection, perhaps: the machine is only left a note.
            self._here.client.handle_event_later(e.StreamClosed(self._number, self._position))
            for tell in self._here.client.deliveries.stream_watchers.pop(self._number, ()):
                tell()

    def cancel(self, *, force: bool) -> bool:
        """As `cancel` does with the task of a reference: the iteration goes on to an item that raises TaskCancelled."""
        from clusterpool.client.api import cancel_task

        self._here.client.check_open()
        return cancel_task(self._here.client, self._number, force=force, interrupt=True)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "a stream of references cannot be pickled, since its items are taken by one process only: pass on the "
            "references that it yields, or list(stream)"
        )

    def __del__(self) -> None:
        try:
            self.close()
        except Exception:  # the interpreter is at its end
            pass


def _wake(loop: Any, moved: Any) -> None:
    def finish() -> None:
        if not moved.done():  # cancelled meanwhile
            moved.set_result(None)

    with contextlib.suppress(RuntimeError):  # its loop is closed
        loop.call_soon_threadsafe(finish)
