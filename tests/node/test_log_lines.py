from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clusterpool.core import messages as m
from clusterpool.core import wire
from clusterpool.core.log_budget import BURST_BYTES, UNSENT_BYTES_MAX
from clusterpool.core.messages import Address
from clusterpool.node.log_lines import LogLineSender

HERE = Address("n1", "d1")
THERE = Address("n2", "d2")
WORKER = Address("n2", "w1")


class FakeShell:
    """What `LogLineSender` uses of a shell: one connection, of the driver here."""

    def __init__(self) -> None:
        self.node_id = "n1"
        self.host = "host"
        self.paths = SimpleNamespace(logs_folder=Path("/logs"))
        self.driver = SimpleNamespace(unsent_bytes=0)
        self.connections: dict[str, Any] = {"d1": self.driver}
        self.sent: list[tuple[Address, m.LogLines]] = []

    def send(self, destination: Address, message: Any) -> None:
        self.sent.append((destination, message))

    def take(self) -> list[str]:
        """The lines that were sent since this was last asked."""
        lines = [line for _, message in self.sent for line in message.lines]
        self.sent.clear()
        return lines


@pytest.fixture
def shell() -> FakeShell:
    return FakeShell()


@pytest.fixture
def sender(shell: FakeShell) -> LogLineSender:
    return LogLineSender(shell)  # type: ignore[arg-type]


def printed(*lines: str) -> m.LogLines:
    return m.LogLines("task", 7, "n1", 1, list(lines))


def test_a_driver_that_reads_gets_all(shell: FakeShell, sender: LogLineSender) -> None:
    sender.send(HERE, printed("one", "two"))
    assert shell.take() == ["one", "two"]


def test_a_driver_that_stopped_reading_is_told_what_it_missed(shell: FakeShell, sender: LogLineSender) -> None:
    shell.driver.unsent_bytes = UNSENT_BYTES_MAX + 1
    sender.send(HERE, printed("one", "two"))
    sender.time_passed(1.0)
    assert shell.take() == []
    shell.driver.unsent_bytes = 10
    sender.send(HERE, printed("three"))
    notice, line = shell.take()
    assert notice.startswith("[2 lines of output are not shown")
    assert notice.endswith("they are in /logs on host]")
    assert line == "three"


def test_the_notice_comes_also_when_nothing_more_is_printed(shell: FakeShell, sender: LogLineSender) -> None:
    shell.driver.unsent_bytes = UNSENT_BYTES_MAX + 1
    sender.send(HERE, printed("one"))
    shell.driver.unsent_bytes = 0
    sender.time_passed(1.0)
    assert [line[:26] for line in shell.take()] == ["[1 lines of output are not"]
    sender.time_passed(2.0)
    assert shell.take() == []


def test_a_driver_of_another_node_gets_no_more_than_its_burst(shell: FakeShell, sender: LogLineSender) -> None:
    for _ in range(20):
        sender.send(THERE, printed("x" * (1 << 20)))
    assert BURST_BYTES >> 20 <= len(shell.take()) <= (BURST_BYTES >> 20) + 1
    sender.time_passed(1e9)
    assert shell.take()[0].endswith(
        "lines of output are not shown, because this program did not read them in time; they are in /logs on host]"
    )
    assert not sender._budgets
    sender.send(THERE, printed("x" * (BURST_BYTES + 1)))
    sender.forget("n2")
    assert not sender._budgets


def test_output_that_another_node_relays_is_held_back_and_nothing_else(shell: FakeShell, sender: LogLineSender) -> None:
    shell.driver.unsent_bytes = UNSENT_BYTES_MAX + 1
    output = m.Relay(HERE, WORKER, wire.encode(printed("one", "two", "three")))
    result = m.Relay(HERE, WORKER, wire.encode(m.TasksFinished([], 0)))
    assert sender.holds_back(output)
    assert not sender.holds_back(result)
    shell.driver.unsent_bytes = 0
    sender.time_passed(1.0)
    assert shell.take()[0].startswith("[3 lines of output are not shown")
    assert not sender.holds_back(output)


def test_a_driver_that_has_ended_is_forgotten(shell: FakeShell, sender: LogLineSender) -> None:
    shell.driver.unsent_bytes = UNSENT_BYTES_MAX + 1
    sender.send(HERE, printed("one"))
    shell.connections.clear()
    sender.time_passed(1.0)
    assert shell.take() == []
