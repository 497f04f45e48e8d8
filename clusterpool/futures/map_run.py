"""One `map` call of an executor: chunks out, results back in order."""

from __future__ import annotations

import concurrent.futures
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from clusterpool.calls import engine
from clusterpool.client.split_chunk import ItemFailure
from clusterpool.futures.pool_state import PoolState, load_error

if TYPE_CHECKING:
    from clusterpool.client.worker_group import GroupWorker


class MapRun:
    """The sink of the chunks of one `map`; `results` gives the values in order.

    There are no futures here: an outcome is one entry of a dictionary, which is what makes `chunksize=1`
    cheap.
    """

    def __init__(
        self, pool: PoolState, function: Any, chunks: Iterator[Sequence[Any]], *, chunksize: int = 1, **options: Any
    ) -> None:
        self._pool = pool
        self._function = function
        self._chunks = chunks
        self._chunksize = chunksize
        self._options = options  # kind, and retries if the call has its own
        self._sent = 0
        self._task_numbers: list[list[int]] = []  # of the chunks in the order sent
        self._outcome_by_index: dict[int, tuple[list[Any] | None, BaseException | None]] = {}
        self._wanted = 0  # the next to be taken; all before it were
        self._failure: BaseException | None = None
        pool.runs.add(self)

    def send(self, count: int | None) -> int:
        """Submit the next `count` chunks, or all there are; the number of chunks sent.

        Raises:
            Exception: whatever the user's iterable raises; then nothing of this step was sent.
        """
        chunks = list(itertools.islice(self._chunks, count))
        if chunks:
            if self._pool.send is None:
                self._pool.refuse()
            group = self._pool.group
            assert group is not None
            try:
                numbers = group.submit_chunks(self._function, chunks, self, first_index=self._sent, **self._options)
            except RuntimeError:
                if self._pool.send is None:  # closed or broken at this moment
                    self._pool.refuse()
                raise
            self._task_numbers.append(numbers)
            self._sent += len(chunks)
        return len(chunks)

    def task_done(self, index: int, value: Any, error: BaseException | None, worker: GroupWorker | None) -> None:
        if error is not None:
            error = self._pool.translated(error)
        self._outcome_by_index[index] = (value, error)

    def chunk_done(self, index: int, values: list[Any], worker: GroupWorker | None) -> None:
        """Called by the group for a chunk with failed items: the first ends the iteration, as it does there."""
        self._outcome_by_index[index] = (values, None)

    def item_index(self, index: int, position: int) -> int:
        """Called by the group."""
        return index * self._chunksize + position

    def load_failed(self, index: int, error: BaseException, worker: GroupWorker | None) -> None:
        """Called by the group."""
        self.task_done(index, None, load_error(error), worker)

    def done(self) -> bool:
        """Whether all that was sent has ended."""
        return self._wanted + len(self._outcome_by_index) >= self._sent or self._failure is not None

    def fail(self, error: BaseException) -> None:
        """End with `error` where there is no result yet."""
        self._failure = error

    def results(self, end_time: float | None, *, is_lazy: bool) -> Iterator[Any]:
        """The values in order; each is let go before it is yielded. `end_time`: of `time.monotonic()`.

        Raises:
            TimeoutError: a value was not there at `end_time`.
        """
        index = 0
        try:
            while True:
                if is_lazy:
                    self.send(1)
                if index >= self._sent:
                    return
                values = self._take(index, end_time)
                index += 1
                values.reverse()
                while values:
                    if type(values[-1]) is ItemFailure:
                        raise self._pool.translated(values[-1].error)
                    yield values.pop()
        finally:
            self.cancel_from(index)

    def cancel_from(self, index: int) -> None:
        """Cancel the chunks from `index` on that no worker has begun."""
        at = 0
        for numbers in self._task_numbers:
            for number in numbers:
                if at >= index and at not in self._outcome_by_index:
                    self._pool.cancel(number)
                at += 1

    def _take(self, index: int, end_time: float | None) -> list[Any]:
        if not self._is_wanted_there():
            timeout = None if end_time is None else max(0.0, end_time - time.monotonic())
            if not engine.wait_until(self._is_wanted_there, timeout):
                raise concurrent.futures.TimeoutError()
        value, error = self._outcome_by_index.pop(index, (None, self._failure))
        self._wanted = index + 1
        if error is not None:
            try:
                raise error
            finally:
                del error  # else the traceback's frame would hold it: a cycle
        assert value is not None
        return value

    def _is_wanted_there(self) -> bool:
        return self._wanted in self._outcome_by_index or self._failure is not None
