"""Which of the lines that workers print go to a driver that may not read them. Pure: the caller passes the time.

admit --> shown
  |---the driver is behind--> dropped, counted --it reads again--> one line says how many
"""

from __future__ import annotations

# What waits at the driver's connection at most before lines are dropped: a screen full is 10 KB, and a driver that is
# stopped (Ctrl-Z, a pager) must not fill its node's memory.
UNSENT_BYTES_MAX = 4 << 20
# To another node, whose queue is not to be seen: so much at once, and so much a second. No terminal shows more, and a
# node that does not take it is found dead within 5 s.
BURST_BYTES = 8 << 20
BYTES_PER_S = 4 << 20


class LogBudget:
    """Of one driver, at one node."""

    def __init__(self) -> None:
        self.dropped = 0  # lines that were not passed on, since this was last said
        self._allowance_bytes = float(BURST_BYTES)
        self._filled_s = 0.0

    def admit(self, lines: int, size_bytes: int, unsent_bytes: int | None, now_s: float) -> bool:
        """Whether to pass on lines; else they are counted. `unsent_bytes`: None for a driver of another node."""
        if self.is_behind(size_bytes, unsent_bytes, now_s):
            self.dropped += lines
            return False
        if unsent_bytes is None:
            self._allowance_bytes -= size_bytes
        return True

    def is_behind(self, size_bytes: int, unsent_bytes: int | None, now_s: float) -> bool:
        """Whether the driver would not get so much soon."""
        if unsent_bytes is not None:
            return unsent_bytes > UNSENT_BYTES_MAX
        gained = (now_s - self._filled_s) * BYTES_PER_S
        self._filled_s = now_s
        self._allowance_bytes = min(self._allowance_bytes + gained, float(BURST_BYTES))
        return self._allowance_bytes < min(size_bytes, BURST_BYTES)

    @property
    def is_untouched(self) -> bool:
        """Whether a new one would be as good."""
        return not self.dropped and self._allowance_bytes >= BURST_BYTES

    def notice(self, where: str) -> str:
        """What to say instead of the dropped lines; they count as said."""
        dropped, self.dropped = self.dropped, 0
        return (
            f"[{dropped:,} lines of output are not shown, because this program did not read them in time; "
            f"they are in {where}]"
        )
