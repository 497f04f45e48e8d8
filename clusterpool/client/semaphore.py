"""Tokens to be taken and given back, by any process: the carrier of locks, semaphores, conditions, events, barriers.

              thin: a POSIX semaphore of its home           moved, once and for ever: in the control store
    acquire   trywait, else sleep in slices                 trywait (at its home), else ask the store
    release   post, then look whether it has moved          give it to the store

The node bumps the moved page, then drains the thin semaphore: the tokens that it finds become those of the control
store. A token that is posted later is taken back by whoever posted it, unless a thin waiter was faster; that one gives
it to the store in its turn. So no token is ever lost or doubled, and nobody but a waiter needs to know of the move.

What a dead process held comes free: who has waited for a second tells its node, which counts what the living hold
(core/census.py; token_counts.py answers for this process).
"""

from __future__ import annotations

import os
import threading
import weakref
from _multiprocessing import SemLock, sem_unlink  # type: ignore[import-not-found]
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Any

from clusterpool.client import api, current, sleeps
from clusterpool.client.frames import is_put_off
from clusterpool.client.recorded_tokens import RecordedTokens
from clusterpool.client.token_counts import HeldTokens, held_by_nobody
from clusterpool.errors import LockLost, ObjectLost
from clusterpool.processes.thin_files import semaphore_name
from clusterpool.processes.token_records import mark_as_signal, remove_records

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from clusterpool.client.cell import Cell
    from clusterpool.client.coordination import Coordination

# A thin waiter looks at the moved page so often: shorter wakes idle processes for nothing, longer delays those who wait
# while the semaphore moves, which happens once in its life.
SLICE_S = 0.25
# Who has waited for so long says so: shorter has nodes count for nothing where locks are held for long, longer delays
# those who wait for a dead process.
STUCK_S = 1.0
# The values of `multiprocessing.synchronize`, which C takes.
RECURSIVE_MUTEX, SEMAPHORE = 0, 1
SEM_VALUE_MAX: int = SemLock.SEM_VALUE_MAX
# A page on which nothing ever moves: of what was adopted, and of processes that belong to no cluster.
_STILL: Sequence[int] = (0,)
_ALWAYS_LOOK = -1  # is on no page

# A semaphore that is unpickled twice is one object, so that all its copies agree on who holds it.
_known: weakref.WeakValueDictionary[str, Semaphore] = weakref.WeakValueDictionary()


class Semaphore:
    """`value` tokens of at most `maximum`, with the methods of `_multiprocessing.SemLock`; pickles at any time.

    kind: RECURSIVE_MUTEX for a lock that its holding thread may acquire again. `is_lock`: there is one token.
    `is_owned`: who takes a token holds it, until it gives it back, or dies; else tokens are signals and belong to
    nobody. A semaphore becomes one of signals, for ever, when a process gives a token back that it does not hold.
    Raises: OSError, OverflowError for values that a POSIX semaphore cannot have.
    """

    __slots__ = (
        "__weakref__",
        "_cells",
        "_coordination",
        "_finalizer",
        "_held",
        "_holder",
        "_is_disowned",
        "_kept_cells",
        "_page",
        "_post",
        "_recorded",
        "_release",
        "_rewire",
        "_seen",
        "_side",
        "_stuck_s",
        "_thin",
        "_tokens",
        "_try",
        "counted",
        "home",
        "is_lock",
        "is_owned",
        "kind",
        "maxvalue",
        "name",
        "total",
    )

    _coordination: Coordination | None
    _finalizer: weakref.finalize[..., Semaphore] | None
    _post: Callable[[], None]

    def __init__(
        self, value: int, maximum: int, *, kind: int = SEMAPHORE, is_lock: bool = False, is_owned: bool = True
    ) -> None:
        coordination = api.runtime().coordination
        self._set(coordination.new_name(), coordination.node_id, kind, maximum, value if is_owned else -1)
        self.is_lock = is_lock
        posix_name = semaphore_name(self.home, self.name)
        thin = SemLock(kind, value, maximum, posix_name, False)
        self._finalizer = weakref.finalize(self, _remove, self.home, self.name, os.getpid())
        self._be_thin(thin, coordination)
        _known[self.name] = self

    def _set(self, name: str, home: str, kind: int, maximum: int, total: int) -> None:
        self.name = name
        self.home = home
        self.kind = kind
        self.maxvalue = maximum
        self.total = total  # how many tokens it was made with; -1: they belong to nobody
        self.is_owned = total >= 0
        self.is_lock = False
        self._thin: Any = None
        self._side: Any = None  # the same semaphore, without counting what this process holds
        self._coordination = None
        self._finalizer = None
        self._try: Callable[..., bool] = _has_none
        self._release: weakref.ref[Any] | None = None  # as a function, which has `acquire`; see `functions`
        self._rewire: Callable[[], None] | None = None  # tells them where they lead now
        self._cells: weakref.WeakSet[Cell] | None = None
        # Those that have been refreshed: what is changed in one must be published, though its last object goes before.
        self._kept_cells: list[Cell] = []
        # Of what came from the control store, as SemLock counts what is thin.
        self._held = 0
        self._holder = 0
        self._tokens: list[int] = []
        self._page: Sequence[int] = _STILL
        self._seen = 0
        self.counted = HeldTokens(is_recursive=kind == RECURSIVE_MUTEX, is_quick=total == 1)
        self._is_disowned = False
        self._stuck_s = 0.0
        self._recorded: RecordedTokens | None = None  # where nobody can ask

    def _be_thin(self, thin: Any, coordination: Coordination | None) -> None:
        self._thin = thin
        self._try = thin.acquire
        self._post = thin.release
        self._coordination = coordination
        if coordination is not None:
            self._page = coordination.page.cast("Q")
            if self.is_owned and self.maxvalue == SEM_VALUE_MAX:
                coordination.counts.settle_at_exit(self)
        elif self.is_owned:
            self._be_recorded()

    def _be_recorded(self) -> None:
        recorded = RecordedTokens(self._thin, self.home, self.name, is_recursive=self.kind == RECURSIVE_MUTEX)
        self._recorded, self._try, self._post = recorded, recorded.acquire, recorded.release
        self._wire_anew()

    def _wire_anew(self) -> None:
        if self._rewire is not None:
            self._rewire()

    def __del__(self, kept: Any = held_by_nobody) -> None:
        thin = getattr(self, "_thin", None)
        if thin is None or not thin._count() or self._recorded is not None:
            return
        if self._finalizer is None or not self._finalizer.alive:  # else nobody else knows it
            kept[self.name] = (thin, self.counted)

    def _be_moved(self, coordination: Coordination) -> None:
        self._coordination = coordination
        if self._thin is not None:
            # First, and for good: another thread may have posted what is thin, and be about to look at the page.
            self._seen = _ALWAYS_LOOK
            self._side = SemLock._rebuild(0, SEMAPHORE, SEM_VALUE_MAX, semaphore_name(self.home, self.name))
        self._post = self._post_moved
        self._wire_anew()

    # --- the short way: as long as it is thin, one call into C and one look at the page

    def functions(self) -> tuple[Callable[..., bool], Callable[[], None]]:
        """`acquire` and `release` as functions, which saves the look-ups that methods need: a quarter of the time."""
        known = self._release() if self._release is not None else None
        if known is None:
            known = self._make_functions()
            # Weakly: they would keep this object alive.
            self._release = weakref.ref(known)
        return known.acquire, known

    def _make_functions(self) -> Any:
        try_, acquire_slowly, post = self._try, self._acquire_slowly, self._leading_post()
        page, seen, follow = self._page, self._seen, self._follow
        count_given, disown = self.counted.count_given, self._disown
        watch = weakref.ref(self)
        is_mine = False  # of a lock: acquired by this process; only when it is not need C be asked

        def rewire() -> None:
            nonlocal try_, post, page, seen
            semaphore = watch()
            if semaphore is not None:
                try_, post = semaphore._try, semaphore._leading_post()
                page, seen = semaphore._page, semaphore._seen

        def acquire(block: bool = True, timeout: float | None = None) -> bool:
            return try_(False) or acquire_slowly(block, timeout)

        def acquire_lock(block: bool = True, timeout: float | None = None) -> bool:
            nonlocal is_mine
            if try_(False) or acquire_slowly(block, timeout):
                is_mine = True
                return True
            return False

        def release() -> None:
            post()
            if page[0] != seen:
                follow()

        def release_lock() -> None:
            nonlocal is_mine
            if not is_mine:
                disown()
            is_mine = False
            post()
            if page[0] != seen:
                follow()

        def release_one() -> None:
            disown()
            count_given()  # before it is there for others: see core/census.py
            post()
            if page[0] != seen:
                follow()

        pair: tuple[Any, Any] = (acquire, release)
        if self.is_owned and self.kind != RECURSIVE_MUTEX and self._thin is not None:
            pair = (acquire_lock, release_lock) if self.total == 1 else (acquire, release_one)
        # They close over C's, which no pickle can hold: whoever pickles them gets the methods.
        pair[0].pickled_as, pair[1].pickled_as = self.acquire, self.release
        pair[1].acquire = pair[0]
        self._rewire = rewire
        return pair[1]

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Take a token, waiting for `timeout` seconds (None: for ever); whether there was one."""
        return self.functions()[0](block, timeout)

    def release(self) -> None:
        """Give a token back.

        Raises: ValueError when `maximum` are there; AssertionError when another thread holds a recursive one.
        """
        self.functions()[1]()

    __enter__ = acquire

    def __exit__(self, *_: object) -> None:
        self.release()

    def _disown(self) -> None:
        """If this process gives back what it does not hold, nobody holds anything from here on."""
        if self._is_disowned or self._side is not None or self._held or self._thin is None or self._thin._count():
            return
        mark_as_signal(self.home, self.name)
        self._is_disowned = True

    def keep_for_ever(self) -> None:
        """This process ends, as it should, with what it holds: that was no guard, and nobody holds anything."""
        if self._thin._count() and not self._is_disowned and self._side is None:
            mark_as_signal(self.home, self.name)

    def _leading_post(self) -> Callable[[], None]:
        """Where `release` leads now."""
        return self._post_watched if self.counted.is_watched and self._side is None else self._post

    def _post_watched(self) -> None:
        if self.counted.is_watched_in_vain:
            self.counted.unwatch()
            self._wire_anew()
        self.counted.count_given()
        self._post()

    def value(self) -> int:
        """How many tokens nobody has."""
        if self._looks_moved():
            assert self._coordination is not None
            return self._coordination.value(self.name)
        value: int = self._thin._get_value()
        return value

    # --- waiting

    def _acquire_slowly(self, block: bool, timeout: float | None) -> bool:
        deadline_s = None
        if not block:
            deadline_s = 0.0
        elif timeout is not None:
            deadline_s = monotonic() + max(timeout, 0.0)
        while not self._looks_moved():
            left_s = SLICE_S if deadline_s is None else min(SLICE_S, deadline_s - monotonic())
            if left_s > 0 and self._sleep(left_s):
                return True
            if self.is_owned:
                self._maybe_report()
            if left_s <= 0:
                return False
        if deadline_s is None:
            return self._acquire_moved(None)
        return self._acquire_moved(max(0.0, deadline_s - monotonic()))

    def _sleep(self, left_s: float) -> bool:
        if self._recorded is not None:
            return self._recorded.acquire(True, left_s)
        # From when it is in C, a thread may have a token that does not count yet.
        ident = threading.get_ident()
        self.counted.sleeping[ident] = object()
        box: deque[bool] = deque()
        try:
            sleeps.acquire(self._thin, left_s, box)
            return box[0]
        except BaseException as exc:
            # Ctrl-C at the moment when the token came: nobody would give it back.
            if not box or not box[0]:
                raise
            if not is_put_off(exc):
                self._thin.release()
                raise
            return True
        finally:
            self.counted.sleeping.pop(ident, None)
            if self._coordination is not None:
                self._coordination.counts.slept(self)

    def _maybe_report(self) -> None:
        now_s = monotonic()
        if self._stuck_s == 0.0:
            self._stuck_s = now_s
        elif now_s - self._stuck_s >= STUCK_S:
            self._stuck_s = now_s
            if self._coordination is not None and not self._is_disowned:
                self._coordination.report_stuck(self.name, self.total)

    def look_for_dead(self) -> None:
        """Somebody waits for tokens that others hold, otherwise than by `acquire`: have those of the dead found."""
        # The control store hears of the end of its holders without being asked.
        if not self._looks_moved():
            self._maybe_report()

    def count_held(self, census: int) -> tuple[int, int, bool]:
        """For the census of this number, as `HeldTokens.count`."""
        return self.counted.count(self._thin, census, self._wire_anew)

    def _looks_moved(self) -> bool:
        """Whether it has moved; from when this says so, this object goes the other way."""
        if self._side is not None or self._thin is None:
            return True
        seen = self._page[0]
        if seen == self._seen:
            return False
        assert self._coordination is not None
        if not self._coordination.is_moved(self.name):
            self._seen = seen
            self._wire_anew()
            return False
        self._be_moved(self._coordination)
        return True

    def _follow(self) -> None:
        """A token was posted, and something has moved: this semaphore, perhaps, and perhaps before the post."""
        self.counted.giving.append(None)
        try:
            if self._looks_moved():
                self._give_to_store_what_is_thin()
        finally:
            self.counted.giving.pop()

    # --- moved

    def _acquire_moved(self, timeout_s: float | None) -> bool:
        if self.kind == RECURSIVE_MUTEX and self._is_held_by_this_thread():
            self._held += 1
            return True
        token = self._ours().acquire(self.name, timeout_s)
        if not token:
            return False
        self._tokens.append(token)
        self._held += 1
        self._holder = threading.get_ident()
        # Not for a thin token: it has been with processes of this host all the time, and what they wrote is newer than
        # what the store has.
        if self._cells:
            self._refresh_cells()
        return True

    def _refresh_cells(self) -> None:
        try:
            self._kept_cells = list(self._cells or ())
            for cell in self._kept_cells:
                cell.refresh()
        except BaseException:  # Ctrl-C, or the node is gone: the caller will not release what it did not get
            self._held -= 1
            self._ours().release(self.name, self.maxvalue, self._tokens.pop())
            raise

    def _post_moved(self) -> None:
        thin = self._thin
        self.counted.count_given()
        if self.kind == RECURSIVE_MUTEX:
            is_thin = thin is not None and thin._is_mine()
            if not is_thin and not self._is_held_by_this_thread():
                raise AssertionError("attempt to release recursive lock not owned by thread")
            if (thin._count() if is_thin else self._held) > 1:
                if is_thin:
                    thin.release()
                else:
                    self._held -= 1
                return
        else:
            is_thin = thin is not None and thin._count() > 0
        # What is on its way from here to there is with nobody, but not lost.
        self.counted.giving.append(None)
        try:
            # Ctrl-C, or a store that is away, ends the publishing; it must not keep the lock from all others for ever.
            try:
                self._publish_cells(is_thin)
            finally:
                self._release_moved(is_thin)
        finally:
            self.counted.giving.pop()

    def _release_moved(self, is_thin: bool) -> None:
        if is_thin:
            self._thin.release()
            self._give_to_store_what_is_thin()
            return
        # Before the other side can take it: another thread of this process may be the one.
        self._held -= 1
        try:
            token = self._tokens.pop()
        except IndexError:  # it is another process that holds it
            token = 0
        try:
            self._ours().release(self.name, self.maxvalue, token)
        except LockLost:
            raise
        except Exception:  # but Ctrl-C, which ends the wait for the answer: the token is on its way then
            self._held += 1
            if token:
                self._tokens.append(token)
            raise

    def _give_to_store_what_is_thin(self) -> None:
        if not self._side.acquire(False):
            return  # a waiter of this host was faster, and will come here when it is done
        try:
            self._publish_cells(True)
        finally:
            self._ours().release(self.name, self.maxvalue, is_thin=self.is_owned)

    def _ours(self) -> Coordination:
        assert self._coordination is not None, "it has moved, so that this process has a node"
        return self._coordination

    def _publish_cells(self, is_thin: bool) -> None:
        _kept, self._kept_cells = self._kept_cells, []
        for cell in list(self._cells or ()):
            cell.publish(0 if is_thin else self.token, is_thin=is_thin and self.is_owned)

    @property
    def token(self) -> int:
        """The fencing token of what this process holds: greater than any that others got before; 0 while it is thin."""
        tokens = self._tokens
        return tokens[-1] if tokens else 0

    def _is_held_by_this_thread(self) -> bool:
        return self._held > 0 and self._holder == threading.get_ident()

    # --- what it guards

    def guard(self, cell: Cell) -> None:
        """Have `cell` refreshed when this is acquired, and published when it is released, once both have moved."""
        if self._cells is None:
            self._cells = weakref.WeakSet()
        self._cells.add(cell)
        if self._held:
            self._kept_cells.append(cell)

    # --- what the standard library's classes, its tests and others ask a SemLock

    def _count(self) -> int:
        count: int = self._thin._count() if self._thin is not None else 0
        return count + self._held

    def _is_mine(self) -> bool:
        return self._is_held_by_this_thread() or (self._thin is not None and self._thin._is_mine())

    def _get_value(self) -> int:
        return self.value()

    def _is_zero(self) -> bool:
        return self.value() == 0

    @property
    def handle(self) -> int:
        """The address of the thin semaphore; 0 where there is none."""
        address: int = self._thin.handle if self._thin is not None else 0
        return address

    def _after_fork(self) -> None:
        """In the child: what the parent holds is not ours."""
        self._held = self._holder = 0
        self._tokens = []
        if self._thin is not None:
            self._thin._after_fork()
        # The child has no client to ask. What is thin works on, between parent, child and others of the host.
        self._page, self._seen = _STILL, 0
        self.counted.forget_threads()
        if self._thin is not None and self.is_owned and self._side is None:
            self._coordination = None
            self._be_recorded()
        else:
            self._wire_anew()

    # --- passing it on

    def __reduce__(self) -> tuple[Any, ...]:
        # From here on others may use it when this process no longer does: it lives as long as its job.
        if self._finalizer is not None:
            self._finalizer.detach()
        return _unpickled, (self.name, self.home, self.kind, self.maxvalue, self.total, self.is_lock)


def _unpickled(name: str, home: str, kind: int, maximum: int, total: int, is_lock: bool) -> Semaphore:
    """The semaphore of that name: its home's processes use the thin one, all others have it moved.

    Raises: ObjectLost when its job or its home has ended.
    """
    known = _known.get(name)
    if known is not None:
        return known
    made = Semaphore.__new__(Semaphore)
    made._set(name, home, kind, maximum, total)
    made.is_lock = is_lock
    thin = None
    if current.get_if_any() is None:
        # A child that the standard library started on the host of a cluster belongs to none, and need not. It does not
        # learn of a move: what it posts then waits, thin, for the next process of this host that acquires.
        thin = _open_thin(made)
    if thin is not None:
        made._be_thin(thin, None)
    else:
        coordination = api.runtime().coordination
        if coordination.node_id == home:
            thin = _open_thin(made)
            if thin is not None:
                thin, made.counted = held_by_nobody.pop(name, (thin, made.counted))
                made._be_thin(thin, coordination)
            elif coordination.is_moved(name):  # and then this node was taken for dead
                made._be_moved(coordination)
            else:
                raise ObjectLost(f"the semaphore or lock {name} is gone: the job that made it has ended")
        else:
            kind_there = "lock" if is_lock else "guard" if made.is_owned else "semaphore"
            coordination.adopt(kind_there, name, home, maximum, total)
            made._be_moved(coordination)
    return _known.setdefault(name, made)


def _open_thin(semaphore: Semaphore) -> Any:
    try:
        return SemLock._rebuild(0, semaphore.kind, semaphore.maxvalue, semaphore_name(semaphore.home, semaphore.name))
    except FileNotFoundError:
        return None


def _has_none(block: bool = False) -> bool:
    """Where nothing is thin."""
    return False


def _remove(home: str, name: str, pid: int) -> None:
    if os.getpid() != pid:
        return
    try:
        sem_unlink(semaphore_name(home, name))
    except FileNotFoundError:  # its job has ended before
        pass
    remove_records(home, name)


def find_known(name: str) -> Semaphore | None:
    """The semaphore of that name, if this process has it."""
    return _known.get(name)


def _forget_in_child() -> None:
    held_by_nobody.clear()
    for semaphore in list(_known.values()):
        semaphore._after_fork()


os.register_at_fork(after_in_child=_forget_in_child)
