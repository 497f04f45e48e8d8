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


class Condition(_standard.Condition):
    """Lets processes wait, with the lock given up, until another one notifies them."""

    _lock: Any
    _sleeping_count: Semaphore
    _woken_count: Semaphore
    _wait_semaphore: Semaphore

    def __init__(self, lock: Any = None, *, ctx: Any = None) -> None:
        # Ours whatever the context is: the standard context's would not leave this host.
        super().__init__(lock, ctx=_factories)

    def __getstate__(self) -> Any:
        return self._lock, self._sleeping_count, self._woken_count, self._wait_semaphore


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
    __setstate__: Any

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
        self.__setstate__((parties, action, timeout, condition, counters))

    # On another node the counters are as new as the last time that this host had the lock.

    @property
    def n_waiting(self) -> int:
        with self._cond:
            return super().n_waiting

    @property
    def broken(self) -> bool:
        with self._cond:
            return super().broken
