"""One `imap` call: a thread reads the iterable, the group runs the tasks, the consumer takes the outcomes.

    iterable --> feeder thread --submit_chunks--> group --task_done--> outcomes --take--> consumer
                      ^                                                              |
                      +------------------- room in the window <---------------------+

Why a thread of its own: the user's iterable may block, for ever even, while results are there to be taken (it
may read a queue that the consumer fills). So it must not be iterated in the client's loop, nor in `next()`,
nor in the call itself, and an item that was read must be submitted before the next one is asked for. Only
containers of the standard library, which cannot block, are read in batches.

When nobody can take the results any more (the iterator was dropped, or the pool is being joined) the call
goes on to its end, as it does in the standard library; results are then forgotten as they come, or, in
`join`, kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

from clusterpool.calls import waiting
from clusterpool.calls.chunking import is_non_blocking, read_chunks
from clusterpool.calls.ordering import AsTheyCome, InOrder
from clusterpool.calls.window import FeedWindow, approximate_size_bytes
from clusterpool.client.worker_group import GroupWorker, TaskKind, WorkerGroup
from clusterpool.errors import NotConnected

# More would let the consumer wait for the first results; fewer cost more submits.
BATCH_LENGTH_MAX = 512


class Outcome(NamedTuple):
    """What became of one chunk: its results, or an error."""

    results: list[Any] | None
    error: BaseException | None
    size_bytes: float


class LazyCall:
    """Runs a function over an iterable with a bounded window. A sink of the group; all methods from any
    thread.

    `on_ended` is called once, outside the lock, when no more outcomes will come.
    """

    def __init__(
        self,
        group: WorkerGroup,
        function: Callable[..., Any],
        *,
        window: FeedWindow,
        is_ordered: bool,
        on_ended: Callable[[], None],
        progress_bar: Any | None = None,
        timeout: float | None = None,
    ) -> None:
        self._group = group
        self._options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        self._chunksize = 1
        self._function = function
        self._window = window
        self._outcomes: InOrder[Outcome] | AsTheyCome[Outcome] = InOrder() if is_ordered else AsTheyCome()
        self._on_ended: Callable[[], None] | None = on_ended
        self._progress_bar = progress_bar
        # Re-entrant, because the garbage collector may call `abandon` in a thread that holds it.
        self._lock = threading.RLock()
        self._room_changed = threading.Condition(self._lock)
        self._input_bytes_by_index: dict[int, float] = {}  # of the running tasks
        self._length: int | None = None  # outcomes in all; None until the iterable has ended
        self._stop_error: BaseException | None = None
        self._is_abandoned = False
        self.has_ended = threading.Event()  # after `on_ended`

    def start(self, iterable: Iterable[Any], chunksize: int) -> None:
        """Begin to read `iterable`. Once."""
        self._chunksize = chunksize
        arguments = (iterable, chunksize)
        threading.Thread(target=self._feed, args=arguments, name="clusterpool-imap-feeder", daemon=True).start()

    def take(self, timeout_s: float | None = None) -> Outcome | None:
        """The next outcome; None after the last.

        Raises: TimeoutError when there was none for `timeout_s`; the error of `stop` when none can come.
        """
        while True:
            with self._lock:
                if self._outcomes.is_ready():
                    outcome = self._outcomes.take()
                    self._window.taken(outcome.size_bytes)
                    self._wake_feeder()
                    return outcome
                if self._outcomes.taken == self._length:
                    return None
                if self._stop_error is not None:
                    raise self._stop_error
            if not waiting.wait_until(self._is_worth_a_look, timeout_s):
                if timeout_s is None:
                    raise NotConnected("the client was shut down while a result was waited for")
                raise TimeoutError
            # Another consumer of the same iterator may have been quicker; then the wait begins again.

    def _is_worth_a_look(self) -> bool:
        return self._outcomes.is_ready() or self._outcomes.taken == self._length or self._stop_error is not None

    def task_done(self, index: int, value: Any, error: BaseException | None, worker: GroupWorker | None) -> None:
        """Called by the group."""
        result_bytes = approximate_size_bytes(value)
        with self._lock:
            input_bytes = self._input_bytes_by_index.pop(index)
            self._window.arrived(input_bytes, result_bytes)
            if self._is_abandoned:
                self._window.taken(result_bytes)
            else:
                self._outcomes.add(index, Outcome(value, error, result_bytes))
            if self._progress_bar is not None and value is not None:
                self._progress_bar.update(len(value))
            self._wake_feeder()
            on_ended = self._ended_callback()
        self._announce(on_ended)

    def chunk_done(self, index: int, values: list[Any], worker: GroupWorker | None) -> None:
        """Called by the group for a chunk with failed items, which raise at their turn."""
        self.task_done(index, values, None, worker)

    def item_index(self, index: int, position: int) -> int:
        """Called by the group."""
        return index * self._chunksize + position

    def stop(self, error: BaseException) -> None:
        """Read no more; a consumer gets what has arrived, then `error`."""
        with self._lock:
            if self._stop_error is None:
                self._stop_error = error
            self._room_changed.notify_all()
            on_ended = self._ended_callback()
        self._announce(on_ended)
        waiting.wake_waiters()

    def abandon(self) -> None:
        """The consumer is gone: forget results, go on for what the tasks do besides. Safe in a finalizer."""
        with self._lock:
            self._is_abandoned = True
            while self._outcomes.is_ready():
                self._window.taken(self._outcomes.take().size_bytes)
            self._room_changed.notify_all()

    def lift_window(self) -> None:
        """Read to the end of the iterable without waiting for the consumer."""
        with self._lock:
            self._window.lift()
            self._room_changed.notify_all()

    def _wake_feeder(self) -> None:
        if self._length is None and self._window.wants_more():
            self._room_changed.notify_all()

    def _ended_callback(self) -> Callable[[], None] | None:
        """`on_ended`, the one time that it is due."""
        has_ended = self._length is not None and not self._input_bytes_by_index
        if not has_ended and self._stop_error is None:
            return None
        if self._progress_bar is not None:
            self._progress_bar.close()
            self._progress_bar = None
        on_ended = self._on_ended
        self._on_ended = None
        return on_ended

    def _announce(self, on_ended: Callable[[], None] | None) -> None:
        """Tell the others, outside the lock: they may call back."""
        if on_ended is not None:
            on_ended()
            self.has_ended.set()

    def _feed(self, iterable: Iterable[Any], chunksize: int) -> None:
        """The feeder thread."""
        index = 0
        error: BaseException | None = None
        batch_length_max = BATCH_LENGTH_MAX if is_non_blocking(iterable) else 1
        try:
            chunks = read_chunks(iterable, chunksize)
            del iterable
            while True:
                room = self._wait_for_room()
                if not room:
                    return
                batch = list(islice(chunks, min(room, batch_length_max)))
                if not batch:
                    break
                index = self._submit(batch, index)
        except _SubmitFailed as failed:
            self.stop(failed.error)
            return
        except BaseException as user_error:  # The border to the user's iterable: raised again by `take`.
            error = user_error
        self._end_reading(index, error)

    def _wait_for_room(self) -> int:
        """How many chunks may be read; 0 when the call was stopped."""
        with self._lock:
            while self._stop_error is None and not self._window.wants_more():
                self._room_changed.wait()
            return 0 if self._stop_error is not None else self._window.room()

    def _submit(self, batch: list[Sequence[Any]], first_index: int) -> int:
        with self._lock:
            for index, chunk in enumerate(batch, first_index):
                size_bytes = approximate_size_bytes(chunk)
                self._input_bytes_by_index[index] = size_bytes
                self._window.submitted(size_bytes)
        try:
            self._group.submit_chunks(
                self._function, batch, self, kind=TaskKind.MAP, first_index=first_index, **self._options
            )
        except Exception as error:
            raise _SubmitFailed(error) from error
        return first_index + len(batch)

    def _end_reading(self, index: int, error: BaseException | None) -> None:
        with self._lock:
            if error is not None:
                # An error of the iterable takes its place in the order, as if it were a task's. Where there is none, it
                # comes last: a loop over the results, which it ends, has had all that were computed.
                self._window.submitted(0)
                self._window.arrived(0, 0)
                self._outcomes.add_last(index, Outcome(None, error, 0))
                index += 1
            self._length = index
            if self._is_abandoned:
                self.abandon()
            on_ended = self._ended_callback()
        self._announce(on_ended)
        waiting.wake_waiters()


class _SubmitFailed(Exception):
    """The group took no more tasks; told apart from an error of the user's iterable."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error
