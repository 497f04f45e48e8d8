"""Worker groups that wait for the next `Parallel` call, so that only the first one starts workers.

A call takes a group for itself and gives it back; two calls at a time in two threads have two groups, so that
aborting one does not touch the other.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from clusterpool.joblib.callbacks import Callbacks

# Idle groups kept at most. More would serve a program that goes round many combinations of n_jobs and thread
# limits, at some 20 MB a worker; fewer would start workers anew in one that alternates between two.
IDLE_GROUPS_MAX = 2


@dataclass
class WarmGroup:
    """A worker group, in use or waiting for the next call that wants one like it."""

    group: Any
    key: object
    client: Any
    process: int  # a fork's copy of a group is of no use to it
    follows_cluster: bool = False  # it has a worker for each CPU, as nodes come and go
    callbacks: Callbacks = field(default_factory=Callbacks)
    idle_since_s: float = 0.0
    idle_timeout_s: float = 300.0


class WarmGroups:
    """All idle groups of this process; safe to use from several threads."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._idle: list[WarmGroup] = []  # the one given back last is last
        self._lock = threading.Lock()
        self._clock = clock
        self._timer: threading.Timer | None = None

    def take(
        self, key: object, size: int, client: Any, open_group: Callable[[], Any], *, follows_cluster: bool = False
    ) -> WarmGroup:
        """An idle group with this key, resized, or a new one from `open_group()`."""
        with self._lock:
            found = None
            for warm in reversed(self._idle):
                if warm.key == key and warm.client is client and warm.process == os.getpid():
                    found = warm
                    break
            if found is not None:
                self._idle.remove(found)
        if found is None:
            return WarmGroup(open_group(), key, client, os.getpid(), follows_cluster)
        if found.group.size != size or found.follows_cluster or follows_cluster:
            found.group.resize(size, follows_cluster=follows_cluster)
        found.follows_cluster = follows_cluster
        return found

    def give_back(self, warm: WarmGroup, idle_timeout_s: float) -> None:
        """Keep the group for at most `idle_timeout_s`; one that still has tasks is ended instead."""
        if warm.group.pending():
            warm.group.terminate()
            return
        warm.idle_since_s, warm.idle_timeout_s = self._clock(), idle_timeout_s
        with self._lock:
            self._idle.append(warm)
            surplus = self._idle[:-IDLE_GROUPS_MAX]
            self._idle = self._idle[-IDLE_GROUPS_MAX:]
            self._set_timer()
        for old in surplus:
            self._close(old)

    def close_idle(self, *, expired_only: bool = False) -> None:
        """Close the groups that wait, or those of them that waited long enough."""
        with self._lock:
            now = self._clock()
            ended = [w for w in self._idle if not expired_only or now - w.idle_since_s >= w.idle_timeout_s]
            self._idle = [w for w in self._idle if w not in ended]
            self._timer = None
            self._set_timer()
        for warm in ended:
            self._close(warm)

    def _set_timer(self) -> None:
        # One timer for all; it looks at the groups when the first may have expired, and goes on if there
        # are any.
        if self._idle and self._timer is None:
            first_s = min(w.idle_since_s + w.idle_timeout_s for w in self._idle)
            self._timer = threading.Timer(max(0.05, first_s - self._clock()), self._expire)
            self._timer.daemon = True
            self._timer.start()

    def _expire(self) -> None:
        self.close_idle(expired_only=True)

    def _close(self, warm: WarmGroup) -> None:
        if warm.process == os.getpid():
            warm.group.close()
