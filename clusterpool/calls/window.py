"""How far a lazy call may read ahead of its consumer: a bound on tasks and on bytes. Pure.

    read and submitted ......... arrived ......... taken by the consumer
    |<- input bytes, and the ->|<- result bytes ->|
    |   result bytes expected  |                  |
    |<------------- in the window --------------->|

Results that nobody took count like tasks that still run, so an endless iterable runs in constant memory even
when its consumer is slow or has stopped.
"""

from __future__ import annotations

import operator
from typing import Any

# Enough for tiny tasks to travel a thousand to a message; more only holds memory.
TASKS_MAX = 2048
# Large chunks need no long queue of chunks. Lower would starve the workers, higher holds a million items.
ITEMS_MAX = 65_536
BYTES_MAX = 64 * 2**20  # A few results of usual size for each worker of a large host.
# Before the first result its size is unknown: with 100 MB each, the first tasks are all that is at risk.
TASKS_PER_WORKER_FIRST = 4

SAMPLE_LENGTH_MAX = 8
SMALL_SIZE_BYTES = 32


class FeedWindow:
    """Counts the tasks between the iterable and the consumer, and says how many more may be read.

    `buffersize`: an exact bound on the tasks in the window, which takes the place of all others.
    """

    def __init__(self, *, workers: int, chunksize: int = 1, buffersize: int | None = None) -> None:
        self._workers = workers
        self._is_exact = buffersize is not None
        if buffersize is not None:
            self._tasks_max = buffersize
        else:
            self._tasks_max = max(min(TASKS_MAX, ITEMS_MAX // chunksize), TASKS_PER_WORKER_FIRST * workers)
        self._in_window = 0  # submitted and not yet taken
        self._running = 0  # submitted and not yet arrived
        self._input_bytes = 0.0  # of the running tasks
        self._result_bytes = 0.0  # of the results not taken yet
        self._input_bytes_mean = 0.0
        self._result_bytes_mean: float | None = None  # None: no result has arrived
        self._is_lifted = False

    def submitted(self, size_bytes: float) -> None:
        self._in_window += 1
        self._running += 1
        self._input_bytes += size_bytes
        self._input_bytes_mean += (size_bytes - self._input_bytes_mean) / 8

    def arrived(self, input_bytes: float, result_bytes: float) -> None:
        self._running -= 1
        self._input_bytes -= input_bytes
        self._result_bytes += result_bytes
        if self._result_bytes_mean is None:
            self._result_bytes_mean = result_bytes
        # Grows at once and shrinks slowly, because too small a guess costs memory, too large a one only time.
        decay = 1 if result_bytes > self._result_bytes_mean else 8
        self._result_bytes_mean += (result_bytes - self._result_bytes_mean) / decay

    def taken(self, result_bytes: float) -> None:
        self._in_window -= 1
        self._result_bytes -= result_bytes

    def lift(self) -> None:
        """Nobody will take results any more: read all there is, as the standard library would."""
        self._is_lifted = True

    def room(self) -> int:
        """How many more tasks may be submitted now."""
        if self._is_lifted:
            # Results are not waited for, but the tasks in flight stay bounded.
            return max(0, self._tasks_max - self._running)
        room = self._tasks_max - self._in_window
        if self._is_exact or room <= 0:
            return max(0, room)
        if self._result_bytes_mean is None:
            room = min(room, TASKS_PER_WORKER_FIRST * self._workers - self._in_window)
        task_bytes = max(1.0, self._input_bytes_mean + (self._result_bytes_mean or 0.0))
        free_bytes = BYTES_MAX - self._held_bytes()
        room = min(room, int(free_bytes // task_bytes))
        # However large the items are, each worker may have one; else a few large ones would run one by one.
        return max(0, room, self._workers - self._in_window)

    def wants_more(self) -> bool:
        """Whether there is room enough to be worth waking the feeder for.

        Waking it for each single item would cost more than the item.
        """
        room = self.room()
        if room <= 0:
            return False
        return self._running <= 2 * self._workers or room >= self._tasks_max // 4

    def _held_bytes(self) -> float:
        return self._input_bytes + self._result_bytes + self._running * (self._result_bytes_mean or 0.0)


def checked_buffersize(buffersize: Any) -> int | None:
    """Raises: TypeError or ValueError, as `Executor.map` does in Python 3.14."""
    if buffersize is None:
        return None
    try:
        number = operator.index(buffersize)
    except TypeError:
        raise TypeError(f"buffersize must be an integer or None, not {buffersize!r}") from None
    if number < 1:
        raise ValueError(f"buffersize must be None or > 0, not {number}")
    return number


def approximate_size_bytes(value: Any, depth: int = 2) -> float:
    """The order of magnitude of a value's size, in about a microsecond; containers are sampled."""
    kind = type(value)
    if kind is int or kind is float or kind is bool or value is None:
        return SMALL_SIZE_BYTES
    if kind is bytes or kind is bytearray or kind is str:
        return SMALL_SIZE_BYTES + len(value)
    if kind is range:
        return SMALL_SIZE_BYTES
    if kind is list or kind is tuple:
        return _container_size_bytes(value[:SAMPLE_LENGTH_MAX], len(value), depth)
    if kind is dict:
        sample = [item for item, _ in zip(value.values(), range(SAMPLE_LENGTH_MAX), strict=False)]
        return _container_size_bytes(sample, len(value), depth)
    size_bytes = getattr(value, "nbytes", None)  # numpy, pandas.Series, pyarrow, memoryview, torch
    if isinstance(size_bytes, (int, float)):
        return SMALL_SIZE_BYTES + size_bytes
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and len(shape) == 2 and all(isinstance(length, int) for length in shape):
        return SMALL_SIZE_BYTES + 8.0 * float(shape[0] * shape[1])  # a pandas.DataFrame, most likely
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict) and depth > 0:
        return SMALL_SIZE_BYTES + approximate_size_bytes(attributes, depth - 1)
    return 2 * SMALL_SIZE_BYTES


def _container_size_bytes(sample: Any, length: int, depth: int) -> float:
    if not sample or depth <= 0:
        return SMALL_SIZE_BYTES + 8.0 * length
    total = sum(8.0 + approximate_size_bytes(item, depth - 1) for item in sample)
    return SMALL_SIZE_BYTES + total * length / len(sample)
