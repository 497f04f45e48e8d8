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
import logging
import os
import select
import signal
import struct
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

logger = logging.getLogger(__name__)

# How long the role stays vacant after a wait: shorter wakes the I/O thread between the calls of a sequential program,
# longer delays results nobody waits for.
HAND_BACK_S = 0.002
# A timer that was armed less than this ago is left as it is.
REARM_S = HAND_BACK_S / 4
# Waking a CPU that sleeps costs the sender 5 to 10 us in a virtual machine, and the message as much again.
AWAKE_S = 0.0001
# A yield that takes longer has let others run: there are more of them than CPUs, and who stays awake takes theirs.
# (With two workers and their driver on two CPUs, 5,000 joblib batches of one no-op each took a tenth longer.)
YIELDED_S = 0.000005
# Where a poll found something within this time, the next one looks before the machine is asked when it wants to be
# woken, which takes as long as handling a small message.
FLOWING_S = 0.00001
# The machine's wish may be so old then; what it waits for is never due sooner than some milliseconds after.
WISH_AGE_S = 0.001
# One poll or sleep lasts at most so long: epoll and locks refuse times that programs do give (`get(9999999)`), and
# nothing is lost by looking again once an hour.
POLL_MAX_S = 3600.0
# A signal that falls between the interpreter's last look and the sleep interrupts neither: it is seen after the sleep.
# So where Ctrl-C is ours to pass on, those who wait sleep no longer than this.
SIGNAL_SEEN_S = 1.0
# How long `stop` waits for a thread that polls to go before the descriptors are closed under it.
STOP_PATIENCE_S = 5.0

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

    def is_due(self) -> bool:
        try:
            return self.predicate()
        except BaseException:
            return True  # its own thread calls it again, and is the one to be told


class Loop:
    """Polls descriptors for whoever waits. `process` handles what is ready, under the client's own lock."""

    def __init__(
        self,
        *,
        process: Callable[[list[tuple[int, int]]], None],
        after_turn: Callable[[], None],
        next_wakeup_s: Callable[[], float | None],
        on_taken: Callable[[bool], None],
    ) -> None:
        self.epoll = select.epoll()
        self._process = process
        self._after_turn = after_turn
        self._next_wakeup_s = next_wakeup_s
        self._on_taken = on_taken  # called with True when it is the I/O thread that takes the role
        self._armed_s = 0.0  # when the timer was, monotonic
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
        self.stays_awake = False
        self.sleep_max_s = POLL_MAX_S  # of those who wait; the I/O thread gets no signals
        self._is_busy = False  # the last poll, which slept, had something within AWAKE_S
        self._is_flowing = False  # messages come one upon another
        self._asked_s = 0.0  # when the machine was asked for its next wakeup, monotonic
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

    def kick_poller(self) -> None:
        """Have whoever polls look again; when nobody does, whoever takes the role next looks first."""
        if self._role_ident:
            self.kick()

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
                    self._on_taken(False)
                    return self._turn_until(predicate, deadline_s)
                finally:
                    self._leave()
            try:
                is_true = self._wait_for_role(predicate, deadline_s)
            except BaseException:  # Ctrl-C, or the predicate's own
                self._pass_on()
                raise
            if is_true or self._is_stopped or (deadline_s is not None and monotonic() >= deadline_s):
                self._pass_on()
                return is_true or predicate()

    def turn_nowait(self) -> None:
        """Handle what has arrived, without waiting for more.

        For threads that are busy for long with tiny things: while they look now and then, the I/O thread sleeps. Woken,
        it would wait up to sys.getswitchinterval() (5 ms) for the GIL at each message.
        """
        if self._take_lead():
            try:
                self._turn(0.0)
            finally:
                self._leave()

    def turn_for(self, predicate: Callable[[], bool], timeout_s: float) -> None:
        """Turn the loop until `predicate()`, for at most `timeout_s` seconds and until another thread wants to.

        For threads that expect something to do any moment, and would else be woken by the thread that turns it.
        """
        if not self._take_lead():
            return
        try:
            deadline_s = monotonic() + timeout_s
            left_s = timeout_s
            while left_s > 0 and not (predicate() or self._waiters or self._is_stopped):
                self._turn(left_s)
                left_s = deadline_s - monotonic()
        finally:
            self._leave()

    def _take_lead(self) -> bool:
        """Take the role, unless another thread than the I/O thread has it, which does as well."""
        ident = threading.get_ident()
        if self._is_stopped or self._role_ident == ident:
            return False
        if not self._role.acquire(blocking=False) and not self._take_from_thread():
            return False
        self._role_ident = ident
        try:
            self._on_taken(False)
        except BaseException:
            self._leave()
            raise
        return True

    def _take_from_thread(self) -> bool:
        """Get the role from the I/O thread, if it has it."""
        if self._role_ident != self._thread.ident:
            return False
        waiter = _Waiter(lambda: False)
        self._waiters.append(waiter)
        self.kick()
        waiter.lock.acquire(timeout=HAND_BACK_S)
        with contextlib.suppress(ValueError):
            self._waiters.remove(waiter)
        is_taken = self._role.acquire(blocking=False)
        if not is_taken:
            self._pass_on()
        return is_taken

    def _turn_until(self, predicate: Callable[[], bool], deadline_s: float | None) -> bool:
        while not predicate():
            if self._is_stopped:
                return False
            if deadline_s is None:
                self._turn(self.sleep_max_s)
            else:
                left_s = deadline_s - monotonic()
                if left_s <= 0:
                    return False
                self._turn(min(left_s, self.sleep_max_s))
            if self._waiters:
                for waiter in list(self._waiters):  # other threads come and go meanwhile
                    if waiter.is_due():
                        _release(waiter.lock)
        return True

    def _wait_for_role(self, predicate: Callable[[], bool], deadline_s: float | None) -> bool:
        """Sleep until the role may be free or the predicate true; whether the predicate is."""
        waiter = _Waiter(predicate)
        try:
            self._waiters.append(waiter)
            # Only now is it certain that whoever leaves the role sees us.
            if predicate():
                return True
            if not self._role.locked():
                return False
            if self._role_ident == self._thread.ident:
                self.kick()
            timeout_s = self.sleep_max_s if deadline_s is None else max(0.0, deadline_s - monotonic())
            waiter.lock.acquire(timeout=min(timeout_s, self.sleep_max_s))
            return predicate()
        finally:
            with contextlib.suppress(ValueError):
                self._waiters.remove(waiter)

    def _leave(self) -> None:
        self._role_ident = 0
        self._role.release()
        self._wake_next()

    def _pass_on(self) -> None:
        """A waiter goes without the role, which may have been left to it just now: who leaves it wakes only one."""
        if not self._role.locked():
            self._wake_next()

    def _wake_next(self) -> None:
        if not self._waiters:
            self.arm()
            return
        try:
            _release(self._waiters[0].lock)
        except IndexError:
            self.arm()

    def arm(self) -> None:
        """Let the I/O thread take the role in HAND_BACK_S or a little earlier, if it is vacant then."""
        now_s = monotonic()
        if now_s - self._armed_s < REARM_S:
            return  # it is still to expire, and a system call for each tiny callback is not worth the difference
        self._armed_s = now_s
        _libc.timerfd_settime(self._timer_fd, 0, self._arm_value, None)

    def _turn(self, timeout_s: float | None) -> None:
        ready: list[tuple[int, int]] = []
        if self._is_flowing and monotonic() - self._asked_s < WISH_AGE_S:
            ready = self.epoll.poll(0)
        if not ready:
            ready = self._poll(timeout_s)
        if self._is_stopped:
            return
        for fd, _ in ready:
            if fd == self._kick_fd:
                with contextlib.suppress(BlockingIOError):
                    os.read(fd, 8)
                ready.remove((fd, _))
                break
        self._process(ready)
        self._after_turn()

    def _poll(self, timeout_s: float | None) -> list[tuple[int, int]]:
        """Poll until something is ready, the machine wants to be woken, or `timeout_s` seconds are over."""
        wakeup_s = self._next_wakeup_s()
        now_s = self._asked_s = monotonic()
        if wakeup_s is not None:
            until_s = max(0.0, wakeup_s - now_s)
            timeout_s = until_s if timeout_s is None else min(timeout_s, until_s)
        timeout_s = POLL_MAX_S if timeout_s is None else min(timeout_s, POLL_MAX_S)
        if self.stays_awake:
            return self._poll_awake(timeout_s)
        ready = self.epoll.poll(timeout_s)
        self._is_flowing = bool(ready) and monotonic() - now_s < FLOWING_S
        return ready

    def _poll_awake(self, timeout_s: float) -> list[tuple[int, int]]:
        """Poll; where messages have been coming one upon another, look for the next one without sleeping first."""
        poll = self.epoll.poll
        started_s = now_s = monotonic()
        if self._is_busy:
            until_s = started_s + min(AWAKE_S, timeout_s)
            while now_s < until_s:
                ready = poll(0)
                if ready:
                    return ready
                asked_s = monotonic()
                os.sched_yield()  # whoever else wants this CPU goes first
                now_s = monotonic()
                if now_s - asked_s > YIELDED_S:
                    break
        ready = poll(max(0.0, timeout_s - (now_s - started_s)))
        self._is_busy = monotonic() - started_s < AWAKE_S
        return ready

    # --- the I/O thread

    def _thread_main(self) -> None:
        # Signals are for the user's threads.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
        me = threading.get_ident()
        while not self._is_stopped:
            if self._role.acquire(blocking=False):
                self._role_ident = me
                try:
                    self._on_taken(True)
                    while not self._waiters and not self._is_stopped:
                        self._turn(None)
                except BaseException:
                    # There is nobody to raise it to, and without this thread results would stop for good.
                    logger.exception("handling a message, or a callback of one, raised an exception")
                finally:
                    self._role_ident = 0
                    self._role.release()
                    self._wake_next()  # who waited may have gone: then the timer brings us back
                if self._is_stopped:
                    break
            try:
                os.read(self._timer_fd, 8)
            except OSError:
                break

    def stop(self) -> None:
        """End the I/O thread and wake every waiter; close the descriptors. Not from the I/O thread itself."""
        if self._is_stopped:
            return
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
        self._close_when_nobody_polls()

    def _close_when_nobody_polls(self) -> None:
        if self.is_mine:  # from within a callback: the turn that we are in must end first
            return
        deadline_s = monotonic() + STOP_PATIENCE_S
        while not self._role.acquire(timeout=0.01):
            self.kick()
            if monotonic() > deadline_s:
                return  # a callback does not return: better a few descriptors too many than closed ones polled
        self.close_descriptors()
        self._role.release()

    def close_descriptors(self) -> None:
        """Close what the loop has open (after a fork, in the child)."""
        self.epoll.close()
        fds = (self._kick_fd, self._timer_fd)
        # The numbers may belong to other files a moment later, and finalizers of values still call `kick`.
        self._kick_fd = self._timer_fd = -1
        for fd in fds:
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
