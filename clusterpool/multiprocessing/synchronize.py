"""Locks, semaphores, conditions, events and barriers that any process of the cluster can use.

The standard library's own classes on our carriers: on one host a `Lock` is a POSIX semaphore as theirs is; once a
process of another node gets it, it lives in the control store (client/semaphore.py). Each can be pickled at any time.
Source: https://docs.python.org/3/library/multiprocessing.html#synchronization-primitives
"""

from __future__ import annotations

import multiprocessing.synchronize as _standard
import struct
from collections.abc import Callable
from typing import Any

from clusterpool.client.cell import Cell
from clusterpool.client.semaphore import RECURSIVE_MUTEX, SEM_VALUE_MAX, SEMAPHORE
from clusterpool.client.semaphore import Semaphore as _Carrier

__all__ = ["Barrier", "BoundedSemaphore", "Condition", "Event", "Lock", "RLock", "Semaphore"]


# How many may wait for one condition; as many tokens are moved, one by one, when it goes to another host.
_SLEEPERS_MAX = 4096
# How long `notify` waits for somebody to wake before it looks whether anybody is left. Those whose time is up at
# that very moment do not say so.
_WOKEN_PATIENCE_S = 0.02
# How long whoever comes to a barrier waits for those of the last round to leave before it looks whether they live.
_LEAVING_PATIENCE_S = 0.3


class SemLock(_standard.SemLock):
    """What the four that follow have in common; `_semlock` is the carrier, with the methods of C's SemLock."""

    _semlock: _Carrier
    acquire: Any
    release: Any

    def __init__(
        self,
        kind: int,
        value: int,
        maxvalue: int,
        *,
        ctx: Any = None,
        is_lock: bool = False,
        is_owned: bool = True,
    ) -> None:
        self._semlock = _Carrier(value, maxvalue, kind=kind, is_lock=is_lock, is_owned=is_owned)
        self._make_methods()

    def _make_methods(self) -> None:
        self.acquire, self.release = self._semlock.functions()

    @property
    def fencing_token(self) -> int | None:
        """A number for what is changed under the lock, if that is outside the cluster; None while it is not held.

        It is greater than that of every earlier holder on another node (and 0 as long as all are on one host). A store
        that has seen a greater one should refuse: whoever asks was taken for dead, and another has the lock.
        """
        held = self._semlock
        return held.token if held._count() else None

    def __enter__(self) -> bool:
        acquired: bool = self.acquire()
        return acquired

    def __exit__(self, *args: object) -> None:
        self.release()

    def __getstate__(self) -> Any:
        return self._semlock

    def __setstate__(self, state: Any) -> None:
        self._semlock = state
        self._make_methods()


class Semaphore(SemLock, _standard.Semaphore):
    """A counter: `acquire` waits until it is above 0 and takes one, `release` gives one."""

    def __init__(self, value: int = 1, *, ctx: Any = None) -> None:
        SemLock.__init__(self, SEMAPHORE, value, SEM_VALUE_MAX)


class BoundedSemaphore(Semaphore, _standard.BoundedSemaphore):
    """A semaphore that refuses (ValueError) to be released above its first value."""

    def __init__(self, value: int = 1, *, ctx: Any = None) -> None:
        SemLock.__init__(self, SEMAPHORE, value, value)


class SignalSemaphore(Semaphore):
    """One whose tokens are released by other processes than those that acquire them, of `maximum` at the most.

    So they belong to nobody, and are not given back when a process dies.
    """

    def __init__(self, value: int = 0, maximum: int = SEM_VALUE_MAX) -> None:
        SemLock.__init__(self, SEMAPHORE, value, maximum, is_owned=False)


class Lock(SemLock, _standard.Lock):
    """A lock that any process or thread may release."""

    def __init__(self, *, ctx: Any = None) -> None:
        SemLock.__init__(self, SEMAPHORE, 1, 1, is_lock=True)


class RLock(SemLock, _standard.RLock):
    """A lock that its holder, a thread of a process, may acquire again, and nobody else release."""

    def __init__(self, *, ctx: Any = None) -> None:
        SemLock.__init__(self, RECURSIVE_MUTEX, 1, 1, is_lock=True)


class _Sleepers:
    """How many wait: each holds a token of a semaphore meanwhile, so that those who are killed do not count for ever.

    Beside that, what the standard library's Condition and its tests ask their counter of sleepers.
    """

    def __init__(self, semaphore: BoundedSemaphore) -> None:
        self.semaphore = semaphore

    @property
    def _semlock(self) -> _Sleepers:
        return self

    def _get_value(self) -> int:
        carrier = self.semaphore._semlock
        return carrier.total - carrier.value()

    get_value = _get_value


class Condition(_standard.Condition):
    """Lets processes wait, with the lock given up, until another one notifies them.

    A process that is killed while it waits holds nobody up for longer than it takes to find that out, a second or two
    of one `notify`; a notification that only it could have got is lost with it.
    """

    # Invariant: outside `notify`, which holds the lock, there are no tokens to wake sleepers with, nor such as say that
    # one has woken.

    _lock: Any
    _sleeping_count: _Sleepers
    _woken_count: SignalSemaphore
    _wait_semaphore: SignalSemaphore

    def __init__(self, lock: Any = None, *, ctx: Any = None) -> None:
        # Ours whatever the context is: the standard context's would not leave this host.
        sleepers = _Sleepers(BoundedSemaphore(_SLEEPERS_MAX))
        self.__setstate__((lock or RLock(), sleepers, SignalSemaphore(), SignalSemaphore()))

    def __getstate__(self) -> Any:
        return self._lock, self._sleeping_count, self._woken_count, self._wait_semaphore

    __setstate__: Any

    def wait(self, timeout: float | None = None) -> bool:
        """Give up the lock until notified, or for `timeout` seconds; whether it was notified. Then the lock is held."""
        carrier = self._lock._semlock
        assert carrier._is_mine(), "must acquire() condition before using wait()"
        sleepers = self._sleeping_count.semaphore
        released = 0
        is_woken: bool = False
        sleepers.acquire()
        try:
            for _ in range(carrier._count()):
                self._lock.release()
                released += 1
            is_woken = self._wait_semaphore.acquire(True, timeout)
        finally:
            sleepers.release()
            if is_woken:
                self._woken_count.release()
            for _ in range(released):
                self._lock.acquire()
        return is_woken

    def notify(self, n: int = 1) -> None:
        """Wake `n` of those who wait, at the most. The lock must be held; it is when this returns."""
        assert self._lock._semlock._is_mine(), "lock is not owned"
        number = self._sleeping_count.get_value()
        if number == 0:
            return
        left = max(0, number - n)
        for _ in range(min(n, number)):
            self._wait_semaphore.release()
        # All of them must be off before the next may come, who would take what is meant for them. One that is killed
        # never goes; its token comes back when somebody asks for it.
        while self._sleeping_count.get_value() > left:
            if not self._woken_count.acquire(True, _WOKEN_PATIENCE_S):
                self._sleeping_count.semaphore._semlock.look_for_dead()
        # Some may have gone because their time was up, or been killed.
        for semaphore in (self._wait_semaphore, self._woken_count):
            while semaphore.acquire(False):
                pass

    def notify_all(self) -> None:
        """Wake all who wait."""
        self.notify(_SLEEPERS_MAX)


class Event(_standard.Event):
    """A flag that processes can wait for."""

    def __init__(self, *, ctx: Any = None) -> None:
        super().__init__(ctx=_factories)


class _Factories:
    """What the standard classes ask their context for."""

    Lock = Lock
    RLock = RLock
    Semaphore = SignalSemaphore
    Condition = Condition


_factories: Any = _Factories


class Barrier(_standard.Barrier):
    """Lets `parties` processes wait for one another; `action` is called by one of them."""

    _cond: Any
    _state: int

    def __init__(
        self,
        parties: int,
        action: Callable[[], object] | None = None,
        timeout: float | None = None,
        *,
        ctx: Any = None,
    ) -> None:
        condition = Condition()
        counters = Cell(2 * struct.calcsize("i"))
        counters.guard_by(condition._lock._semlock)
        inside = _Sleepers(BoundedSemaphore(parties + _SLEEPERS_MAX))
        self.__setstate__((parties, action, timeout, condition, counters, inside))

    def __getstate__(self) -> tuple[Any, ...]:
        return (*_standard.Barrier.__getstate__(self), self._inside)  # type: ignore[attr-defined]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _standard.Barrier.__setstate__(self, state[:-1])  # type: ignore[attr-defined]
        self._inside = state[-1]
        self._known_inside = 0

    # How many are in `wait`, by tokens that each of them holds: who is killed there must not be waited for by the
    # others, when they have all left and it has not. The standard class counts up and down by one.

    @property
    def _count(self) -> int:
        self._known_inside = self._inside.get_value()
        return self._known_inside

    @_count.setter
    def _count(self, value: int) -> None:
        if value > self._known_inside:
            self._inside.semaphore.acquire()
        elif value < self._known_inside:
            self._inside.semaphore.release()

    def _enter(self) -> None:
        while self._state in (-1, 1) and not self._cond.wait(_LEAVING_PATIENCE_S):
            self._inside.semaphore._semlock.look_for_dead()
            _standard.Barrier._exit(self)  # type: ignore[attr-defined]
        super()._enter()  # type: ignore[misc]

    # On another node the counters are as new as the last time that this host had the lock.

    @property
    def n_waiting(self) -> int:
        with self._cond:
            return super().n_waiting

    @property
    def broken(self) -> bool:
        with self._cond:
            return super().broken
