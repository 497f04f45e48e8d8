"""What workers print, on its way to their drivers: as much of it as they read."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from clusterpool.core import messages as m
from clusterpool.core import wire
from clusterpool.core.log_budget import LogBudget
from clusterpool.core.messages import Address

if TYPE_CHECKING:
    from clusterpool.node.shell import NodeShell

# How a relayed message shows, undecoded, that it is one: an array of six whose first item is its name.
_LOG_LINES_START = b"\x96\xa8LogLines"


class LogLineSender:
    """Used by the node's only thread."""

    def __init__(self, shell: NodeShell) -> None:
        self._shell = shell
        self._budgets: dict[Address, LogBudget] = {}  # by driver; only of those that are, or may be, behind

    def send(self, driver: Address, message: m.LogLines) -> None:
        """Pass on what a worker here has printed."""
        budget = self._budgets.get(driver)
        unsent_bytes = self._unsent_bytes(driver)
        if budget is None:
            if unsent_bytes is not None and not unsent_bytes:
                self._shell.send(driver, message)  # the rule
                return
            budget = self._budgets[driver] = LogBudget()
        size_bytes = sum(map(len, message.lines))
        if budget.admit(len(message.lines), size_bytes, unsent_bytes, monotonic()):
            self._say_dropped(driver, budget)
            self._shell.send(driver, message)

    def holds_back(self, relay: m.Relay) -> bool:
        """Whether a relayed message is output of a worker elsewhere for a driver here that does not read it."""
        if not relay.body.startswith(_LOG_LINES_START):
            return False
        driver = relay.destination
        message = wire.decode(relay.body)
        assert isinstance(message, m.LogLines)
        budget = self._budgets.setdefault(driver, LogBudget())
        return not budget.admit(len(message.lines), len(relay.body), self._unsent_bytes(driver), monotonic())

    def time_passed(self, now_s: float) -> None:
        """Tell drivers that read again what they have missed; forget those that miss nothing."""
        for driver, budget in list(self._budgets.items()):
            unsent_bytes = self._unsent_bytes(driver)
            if driver.node_id == self._shell.node_id and driver.process_id not in self._shell.connections:
                del self._budgets[driver]
            elif not budget.is_behind(1000, unsent_bytes, now_s):
                self._say_dropped(driver, budget)
                if unsent_bytes == 0 or (unsent_bytes is None and budget.is_untouched):
                    del self._budgets[driver]

    def _say_dropped(self, driver: Address, budget: LogBudget) -> None:
        if budget.dropped:
            where = f"{self._shell.paths.logs_folder} on {self._shell.host}"
            self._shell.send(driver, m.LogLines("node", 0, self._shell.node_id, 2, [budget.notice(where)]))

    def forget(self, node_id: str) -> None:
        """A node is gone, with its drivers."""
        for driver in [driver for driver in self._budgets if driver.node_id == node_id]:
            del self._budgets[driver]

    def _unsent_bytes(self, driver: Address) -> int | None:
        if driver.node_id != self._shell.node_id:
            return None
        connection = self._shell.connections.get(driver.process_id)
        return connection.unsent_bytes if connection is not None else 0
