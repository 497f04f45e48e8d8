"""How many leases a set of tasks needs, by what waits and how long such tasks take."""

from __future__ import annotations

from clusterpool.core.dispatch import BACKLOG_S, Dispatcher

# Requests outstanding beyond this bring no speed on any cluster in sight, and each costs its node memory.
REQUESTED_MAX = 256


def leases_wanted(dispatcher: Dispatcher, usable: int, now_s: float) -> int:
    """Workers worth having beside those that are busy; `usable`: those that have nothing to do."""
    wanted = min(REQUESTED_MAX, _for_queue(dispatcher))
    if not wanted and not usable:
        # All that is left has been sent in batches, but some wait behind a long one: for those another worker.
        wanted = sum(1 for since_s in dispatcher.stuck_since_s() if since_s <= now_s)
    return wanted


def _for_queue(dispatcher: Dispatcher) -> int:
    queued = len(dispatcher.queue)
    mean_s = dispatcher.mean_of_next_s()
    if mean_s is None or mean_s >= BACKLOG_S:
        return queued
    return int(queued * mean_s / BACKLOG_S) + (1 if queued else 0)
