"""Whether the process that forks a node's workers still answers. Pure.

    quiet <--answer-- asked --PROBE_TICKS--> probed --STUCK_TICKS--> stuck: it is ended, and its node with it

It answers within milliseconds, for it does nothing but fork. If it is stopped (SIGSTOP, a debugger) or hangs in the
kernel, no worker starts, none that is killed is known to have ended, and whoever waits for either waits for ever. A
node that ends is a thing that all others know how to deal with.

Ticks of the node are counted, not seconds: where the whole machine slept, or the node was stopped too, there were none.
"""

from __future__ import annotations

from enum import Enum

# Where memory or CPU is short it may be slow to answer. Should an answer have been lost, it is not to blame: it gets a
# question that is surely answered.
PROBE_TICKS = 20
STUCK_TICKS = 120


class Finding(Enum):
    """What a look has shown."""

    FINE = "fine"
    PROBE_DUE = "probe due"
    STUCK = "stuck"


class ZygoteWatch:
    """Asked at each tick of the node."""

    def __init__(self) -> None:
        self._heard = 0
        self._silent_ticks = 0

    def look(self, *, is_asked: bool, heard: int) -> Finding:
        """`is_asked`: something may wait for its answer. `heard`: messages that have come from it, ever."""
        if heard != self._heard or not is_asked:
            self._heard, self._silent_ticks = heard, 0
            return Finding.FINE
        self._silent_ticks += 1
        if self._silent_ticks >= STUCK_TICKS:
            return Finding.STUCK
        return Finding.PROBE_DUE if self._silent_ticks == PROBE_TICKS else Finding.FINE
