"""`Queue`, `JoinableQueue`, `SimpleQueue` of the whole cluster: the standard classes on a channel (client/channel.py).

What differs from the standard library: an item is pickled when it is put, by the caller's thread (it may be changed
afterwards), and is sent at once if there is room, without a feeder thread; it can be of any size; queues may be pickled
at any time and used on any host; what was sent survives the process that put it.
Source: https://docs.python.org/3/library/multiprocessing.html#pipes-and-queues
"""

from __future__ import annotations

import multiprocessing.queues as standard
import os
import types
from multiprocessing.reduction import ForkingPickler
from queue import Empty, Full
from typing import Any

from clusterpool.client import channel as channels
from clusterpool.client.semaphore import SEM_VALUE_MAX
from clusterpool.multiprocessing.synchronize import SignalSemaphore
from clusterpool.serialization.packing import Serialized, dumps_value

__all__ = ["JoinableQueue", "Queue", "SimpleQueue"]

# What the standard library and the program have registered: connections, sockets, shared objects. It may grow.
_REDUCERS: dict[type, Any] = ForkingPickler._extra_reducers  # type: ignore[attr-defined]


class ReadingEnd:
    """`_reader` of a queue, for `connection.wait` and the like: readable while there is an item."""

    readable = True
    writable = False

    def __init__(self, channel: channels.Channel) -> None:
        self._channel = channel
        self.closed = False

    def fileno(self) -> int:
        self._check()
        return self._channel.receiving_fd()

    def poll(self, timeout: float | None = 0.0) -> bool:
        self._check()
        if timeout is not None:
            return self._channel.poll(timeout)
        while not self._channel.poll(channels.SLICE_S):
            pass
        return True

    def recv(self) -> Any:
        self._check()
        return self._channel.load(_surely(self._channel.get()))

    def close(self) -> None:
        self.closed = True

    def _check(self) -> None:
        if self.closed:
            raise OSError("handle is closed")


class WritingEnd:
    """`_writer` of a queue."""

    readable = False
    writable = True

    def __init__(self, channel: channels.Channel) -> None:
        self._channel = channel
        self.closed = False

    def fileno(self) -> int:
        self._check()
        return self._channel.sending_fd()

    def send(self, obj: Any) -> None:
        self._check()
        self._channel.put_value(_dumps(obj))

    def close(self) -> None:
        self.closed = True

    def _check(self) -> None:
        if self.closed:
            raise OSError("handle is closed")


class Queue(standard.Queue):  # type: ignore[type-arg]
    """A first-in, first-out queue of objects, of `maxsize` items at the most if that is positive."""

    # Invariant: bounded, `_sem` counts the free places, as in the standard library; else it counts the items, because
    # moving a semaphore takes its tokens one by one. Once the channel of an unbounded queue has moved, the control
    # store counts the items, and `_sem` is of no use any more.

    def __init__(self, maxsize: int = 0, *, ctx: Any) -> None:
        self._is_bounded = maxsize > 0
        self._maxsize = maxsize if maxsize > 0 else SEM_VALUE_MAX
        self._channel = channels.create()
        self._sem = SignalSemaphore(maxsize, maxsize) if maxsize > 0 else SignalSemaphore()
        self._opid = os.getpid()
        self._ignore_epipe = False
        self._reset()

    def __getstate__(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (self._is_bounded, self._maxsize, self._channel, self._sem, self._opid)

    def __setstate__(self, state: tuple[Any, ...]) -> None:  # type: ignore[override]
        self._is_bounded, self._maxsize, self._channel, self._sem, self._opid = state
        self._ignore_epipe = False
        self._reset()

    def _reset(self, after_fork: bool = False) -> None:
        self._closed = False
        self._is_used = False  # this object has put: the standard queue's `close` has no effect on others
        self._reader = ReadingEnd(self._channel)
        self._writer = WritingEnd(self._channel)

    def put(self, obj: Any, block: bool = True, timeout: float | None = None) -> None:
        """Add an item. Raises: Full; ValueError once closed; what cannot be pickled goes to the feeder's hook."""
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")
        if self._is_bounded and not self._sem.acquire(block, timeout):
            raise Full
        try:
            serialized = dumps_value(obj, _REDUCERS)
        except Exception as error:
            if self._is_bounded:
                self._sem.release()
            self._on_queue_feeder_error(error, obj)  # type: ignore[attr-defined]
            return
        self._send(serialized)

    def _send(self, serialized: Serialized) -> None:
        if serialized.references:
            _keep(serialized)
        self._is_used = True
        is_counted = not self._is_bounded and not self._channel.is_fat
        if is_counted:
            self._sem.release()  # before it is there: whoever gets it must find it counted
        try:
            self._channel.put_value(serialized)
        except Exception:
            if self._is_bounded:
                self._sem.release()
            elif is_counted:
                self._sem.acquire(False)
            raise

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take the first item. Raises: Empty; ValueError once closed."""
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")
        message = self._channel.get(timeout if block else 0.0)
        if message is None:
            raise Empty
        if self._is_bounded:
            self._sem.release()
        elif not self._channel.is_fat:
            self._sem.acquire(False)
        return self._channel.load(message)

    def qsize(self) -> int:
        """How many items have been put and not got."""
        if self._is_bounded:
            return self._maxsize - int(self._sem.get_value())
        if self._channel.has_moved():
            return self._channel.length()
        return int(self._sem.get_value())

    def empty(self) -> bool:
        """Whether there is no item. Raises: OSError once closed, if this object was put to."""
        if self._closed and self._is_used:
            raise OSError("handle is closed")
        return not self._channel.poll()

    def full(self) -> bool:
        return self._is_bounded and self._sem.get_value() == 0

    def close(self) -> None:
        """This process puts and gets no more with this object; others are not concerned."""
        self._closed = True

    def join_thread(self) -> None:
        """Wait until all that this process has put is sent; after `close`."""
        assert self._closed, f"Queue {self!r} not closed"
        if self._channel.is_flushed_at_exit:
            self._channel.flush()

    def cancel_join_thread(self) -> None:
        """Neither `join_thread` nor the end of the process waits for what is not sent yet."""
        self._channel.is_flushed_at_exit = False

    def _terminate_broken(self) -> None:
        self.close()
        self.cancel_join_thread()

    __class_getitem__: Any = classmethod(types.GenericAlias)  # the standard class has it from 3.12 on


class JoinableQueue(Queue, standard.JoinableQueue):  # type: ignore[type-arg]
    """A queue that also counts the items whose work is not done; `join` waits until it is."""

    def __init__(self, maxsize: int = 0, *, ctx: Any) -> None:
        super().__init__(maxsize, ctx=ctx)
        self._unfinished_tasks = SignalSemaphore()
        self._cond = ctx.Condition()

    def __getstate__(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (*super().__getstate__(), self._cond, self._unfinished_tasks)

    def __setstate__(self, state: tuple[Any, ...]) -> None:  # type: ignore[override]
        super().__setstate__(state[:-2])
        self._cond, self._unfinished_tasks = state[-2:]

    def _send(self, serialized: Serialized) -> None:
        # Before the item is there: `task_done` may follow at once. Without `_cond`, which the standard class takes
        # here: `join` needs to hear only when the count comes down to 0, and a putter killed with it would block all.
        self._unfinished_tasks.release()
        try:
            super()._send(serialized)
        except Exception:
            self.task_done()
            raise


class SimpleQueue(standard.SimpleQueue):  # type: ignore[type-arg]
    """A queue without sizes, timeouts and tasks. `put` never blocks."""

    def __init__(self, *, ctx: Any) -> None:
        self._set_channel(channels.create())

    def _set_channel(self, channel: channels.Channel) -> None:
        self._channel = channel
        self._reader = ReadingEnd(channel)
        self._writer = WritingEnd(channel)
        self._poll = self._reader.poll

    def __getstate__(self) -> Any:
        return self._channel

    def __setstate__(self, state: Any) -> None:
        self._set_channel(state)

    def get(self) -> Any:
        """Take the first item. Raises: OSError once closed."""
        if self._reader.closed:
            raise OSError("handle is closed")
        return self._channel.load(_surely(self._channel.get()))

    def put(self, obj: Any) -> None:
        """Add an item. Raises: what pickling raises; OSError once closed."""
        if self._writer.closed:
            raise OSError("handle is closed")
        self._channel.put_value(_dumps(obj))


def _dumps(obj: Any) -> Serialized:
    serialized = dumps_value(obj, _REDUCERS)
    if serialized.references:
        _keep(serialized)
    return serialized


def _keep(serialized: Serialized) -> None:
    """Nobody can see where references in items go: their objects stay until the job ends."""
    from clusterpool.client.object_ref import pin_forever

    for reference in serialized.references:
        pin_forever(reference)


def _surely(message: bytes | None) -> bytes:
    assert message is not None, "waited without a limit"
    return message
