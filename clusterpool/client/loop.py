"""Who polls: one thread at a time turns the loop, and it is the thread that waits, so that a round trip has no hop.

    role = the right to poll.       held by the I/O thread while nobody waits
                                    taken by a user thread for as long as it waits
    a waiter that finds the role taken by the I/O thread kicks it, and the I/O thread hands over
    a waiter that leaves wakes the next one, or else arms a timer; the I/O thread takes the role when it expires

So a program that makes one call after another polls in its own thread each time, and the I/O thread sleeps; a program
that computes for longer than HAND_BACK_S has its messages handled by the I/O thread. Two thread hops of 30 to 60 us
each, which is what the standard Pool pays for a result, are saved this way.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import struct
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

# How long the role stays vacant after a wait: shorter wakes the I/O thread between the calls of a sequential program,
# longer delays results nobody waits for.
HAND_BACK_S = 0.002

_TFD_CLOEXEC = 0o2000000
_libc = ctypes.CDLL(None, use_errno=True)
_Timerspec = ctypes.c_long * 4
_EVENT = struct.pack("Q", 1)


class _Waiter:
    __slots__ = ("lock", "predicate")

    def __init__(self, predicate: Callable[[], bool]) -> None:
        self.predicate = predicate
        self.lock = threading.Lock()
        self.lock.acquire()


class Loop:
    """Polls descriptors for whoever waits. `process` handles what is ready, under the client's own lock."""

    def __init__(
        self,
        *,
        process: Callable[[list[tuple[int, int]]], None],
        after_turn: Callable[[], None],
        next_wakeup_s: Callable[[], float | None],
        on_handed_to_thread: Callable[[], None] | None = None,
    ) -> None:
        self.epoll = select.epoll()
        self._process = process
        self._after_turn = after_turn
        self._next_wakeup_s = next_wakeup_s
        self._on_handed_to_thread = on_handed_to_thread
        self._kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._timer_fd = _libc.timerfd_create(1, _TFD_CLOEXEC)
        if self._timer_fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._arm_value = _Timerspec(0, 0, 0, int(HAND_BACK_S * 1e9))
        self._arm_now_value = _Timerspec(0, 0, 0, 1)
        self.epoll.register(self._kick_fd, select.EPOLLIN)
        self._role = threading.Lock()
        self._role_ident = 0  # which thread has the role; 0: nobody
        self._waiters: deque[_Waiter] = deque()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._thread_main, name="clusterpool-io", daemon=True)

    def start(self) -> None:
        """Start the I/O thread."""
        self._thread.start()

    # --- descriptors (called under the client's lock)

    def add(self, fd: int) -> None:
        """Watch a descriptor for input."""
        self.epoll.register(fd, select.EPOLLIN)

    def watch_output(self, fd: int, is_wanted: bool) -> None:
        """Watch a descriptor for room to write, or no longer."""
        with contextlib.suppress(OSError, ValueError):
            self.epoll.modify(fd, select.EPOLLIN | select.EPOLLOUT if is_wanted else select.EPOLLIN)

    def remove(self, fd: int) -> None:
        """Forget a descriptor; call it before closing."""
        with contextlib.suppress(OSError, ValueError):
            self.epoll.unregister(fd)

    # --- waiting

    def kick(self) -> None:
        """Have whoever polls look again soon; from any thread."""
        with contextlib.suppress(OSError):
            os.write(self._kick_fd, _EVENT)

    def wait_until(self, predicate: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Turn the loop until `predicate()` holds; whether it did before `timeout_s` seconds had passed.

        May be called from within a callback of the loop itself: the inner call goes on turning it.
        """
        if predicate():
            return True
        deadline_s = None if timeout_s is None else monotonic() + timeout_s
        if self._role_ident == threading.get_ident():
            return self._turn_until(predicate, deadline_s)
        while True:
            if self._role.acquire(blocking=False):
                self._role_ident = threading.get_ident()
                try:
                    return self._turn_until(predicate, deadline_s)
                finally:
                    self._leave()
            if self._wait_for_role(predicate, deadline_s):
                return True
            if deadline_s is not None and monotonic() >= deadline_s:
                return predicate()
            if self._is_stopped:
                return predicate()

    def _turn_until(self, predicate: Callable[[], bool], deadline_s: float | None) -> bool:
        while not predicate():
            if self._is_stopped:
                return False
            if deadline_s is None:
                self._turn(None)
            else:
                left_s = deadline_s - monotonic()
                if left_s <= 0:
                    return False
                self._turn(left_s)
            for waiter in self._waiters:
                if waiter.predicate():
                    _release(waiter.lock)
        return True

    def _wait_for_role(self, predicate: Callable[[], bool], deadline_s: float | None) -> bool:
        """Sleep until the role may be free or the predicate true; whether the predicate is."""
        waiter = _Waiter(predicate)
        self._waiters.append(waiter)
        try:
            # Only now is it certain that whoever leaves the role sees us.
            if predicate():
                return True
            if not self._role.locked():
                return False
            if self._role_ident == self._thread.ident:
                self.kick()
            timeout_s = -1.0 if deadline_s is None else max(0.0, deadline_s - monotonic())
            waiter.lock.acquire(timeout=timeout_s)
            return predicate()
        finally:
            with contextlib.suppress(ValueError):
                self._waiters.remove(waiter)

    def _leave(self) -> None:
        self._role_ident = 0
        self._role.release()
        self._wake_next()

    def _wake_next(self) -> None:
        try:
            _release(self._waiters[0].lock)
        except IndexError:
            self.arm()

    def arm(self) -> None:
        """Let the I/O thread take the role in HAND_BACK_S, if it is vacant then."""
        _libc.timerfd_settime(self._timer_fd, 0, self._arm_value, None)

    def _turn(self, timeout_s: float | None) -> None:
        wakeup_s = self._next_wakeup_s()
        if wakeup_s is not None:
            until_s = max(0.0, wakeup_s - monotonic())
            timeout_s = until_s if timeout_s is None else min(timeout_s, until_s)
        ready = self.epoll.poll(-1 if timeout_s is None else timeout_s)
        for fd, _ in ready:
            if fd == self._kick_fd:
                with contextlib.suppress(BlockingIOError):
                    os.read(fd, 8)
                ready.remove((fd, _))
                break
        self._process(ready)
        self._after_turn()

    # --- the I/O thread

    def _thread_main(self) -> None:
        # Signals are for the user's threads.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
        me = threading.get_ident()
        while not self._is_stopped:
            if self._role.acquire(blocking=False):
                self._role_ident = me
                try:
                    if self._on_handed_to_thread is not None:
                        self._on_handed_to_thread()
                    while not self._waiters and not self._is_stopped:
                        self._turn(None)
                finally:
                    self._role_ident = 0
                    self._role.release()
                    if self._waiters:
                        self._wake_next()
                if self._is_stopped:
                    break
            try:
                os.read(self._timer_fd, 8)
            except OSError:
                break

    def stop(self) -> None:
        """End the I/O thread and wake every waiter; close the descriptors. Not from the I/O thread itself."""
        self._is_stopped = True
        self.kick()
        _libc.timerfd_settime(self._timer_fd, 0, self._arm_now_value, None)
        for waiter in list(self._waiters):
            _release(waiter.lock)
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            while self._thread.is_alive():
                # Arming again covers the thread that went to sleep just after the first time.
                _libc.timerfd_settime(self._timer_fd, 0, self._arm_now_value, None)
                self.kick()
                self._thread.join(0.05)
        self.close_descriptors()

    def close_descriptors(self) -> None:
        """Close what the loop has open (after a fork, in the child)."""
        self.epoll.close()
        for fd in (self._kick_fd, self._timer_fd):
            with contextlib.suppress(OSError):
                os.close(fd)

    @property
    def is_stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._is_stopped

    @property
    def is_mine(self) -> bool:
        """Whether the calling thread has the role (it runs inside a callback of the loop)."""
        return self._role_ident == threading.get_ident()


def _release(lock: Any) -> None:
    with contextlib.suppress(RuntimeError):
        lock.release()
