"""Tunnels: bytes both ways, credit, half-closes, refusals, and the loss of a node or a job."""

from __future__ import annotations

import errno
from collections import deque
from random import Random
from typing import Any

import pytest

from clusterpool.core import tunnel_messages as t
from clusterpool.core import tunnels as ct
from clusterpool.core.messages import Address
from clusterpool.core.node_events import Send

WINDOW = ct.WINDOW_BYTES


class Pair:
    """Nodes `na` (which opens tunnels) and `nb`, the messages on their way, and what each was told to do."""

    def __init__(self) -> None:
        self.machines = {node_id: ct.Tunnels(node_id) for node_id in ("na", "nb")}
        self.on_way: deque[tuple[str, str, t.TunnelMessage]] = deque()  # from, to, what
        self.done: dict[str, list[Any]] = {"na": [], "nb": []}

    def tell(self, node_id: str, event: ct.TunnelEvent) -> list[Any]:
        """What the node does about it, apart from the messages that it sends."""
        told = []
        for command in self.machines[node_id].handle(event, 0.0):
            if isinstance(command, Send):
                self.on_way.append((node_id, command.destination.node_id, command.message))  # type: ignore[arg-type]
            else:
                told.append(command)
        self.done[node_id] += told
        return told

    def deliver(self) -> list[tuple[str, Any]]:
        """Until nothing is on its way; which node does what."""
        told = []
        while self.on_way:
            source, destination, message = self.on_way.popleft()
            event = ct.TunnelMessageArrived(source, message)
            told += [(destination, command) for command in self.tell(destination, event)]
        return told

    def open(self, *, is_readable: bool = True, is_writable: bool = True) -> str:
        self.tell("na", ct.TunnelWanted(7, "nb", "fetch", "j1-3"))
        ((_, opening),) = self.deliver()
        assert opening == ct.OpenEnd("na-1", "fetch", "j1-3")
        self.tell("nb", ct.EndOpened("na-1", is_readable, is_writable))
        self.deliver()
        return "na-1"

    def counts(self) -> tuple[int, int]:
        return len(self.machines["na"]), len(self.machines["nb"])


@pytest.fixture
def pair() -> Pair:
    return Pair()


def other(node_id: str) -> str:
    return "nb" if node_id == "na" else "na"


def test_a_tunnel_opens_and_both_ends_are_read(pair: Pair) -> None:
    tunnel = pair.open()
    assert pair.done["na"] == [ct.MakeEnd(tunnel, 7), ct.StartReading(tunnel)]
    assert pair.done["nb"][1:] == [ct.StartReading(tunnel)]
    assert pair.machines["na"].credit_of(tunnel) == WINDOW


def test_a_refusal_reaches_the_asker_and_leaves_nothing(pair: Pair) -> None:
    pair.tell("na", ct.TunnelWanted(7, "nb", "connect", "j1.abc"))
    pair.deliver()
    pair.tell("nb", ct.EndRefused("na-1", errno.ENOENT, "no such listener"))
    assert pair.deliver() == [("na", ct.RefuseAsker(7, errno.ENOENT, "no such listener"))]
    assert pair.counts() == (0, 0)


@pytest.mark.parametrize("node_id", ["na", "nb"])
def test_bytes_are_written_at_the_other_end(pair: Pair, node_id: str) -> None:
    tunnel = pair.open()
    pair.tell(node_id, ct.BytesRead(tunnel, b"hello"))
    assert pair.deliver() == [(other(node_id), ct.WriteEnd(tunnel, b"hello"))]


def test_a_reader_who_does_not_read_stops_the_writer(pair: Pair) -> None:
    tunnel = pair.open()
    assert not pair.tell("na", ct.BytesRead(tunnel, bytes(WINDOW - 1)))
    assert pair.tell("na", ct.BytesRead(tunnel, b"x")) == [ct.PauseReading(tunnel)]
    assert pair.machines["na"].credit_of(tunnel) == 0
    pair.deliver()
    # What was written is credited in large parts, and reading begins again.
    pair.tell("nb", ct.BytesWritten(tunnel, WINDOW // 8))
    assert pair.deliver() == []
    pair.tell("nb", ct.BytesWritten(tunnel, WINDOW // 8))
    assert pair.deliver() == [("na", ct.StartReading(tunnel))]
    assert pair.machines["na"].credit_of(tunnel) == WINDOW // 4


def test_a_half_close_passes_and_the_other_way_goes_on(pair: Pair) -> None:
    tunnel = pair.open()
    pair.tell("na", ct.BytesRead(tunnel, b"last"))
    pair.tell("na", ct.BytesEnded(tunnel))
    assert pair.deliver() == [("nb", ct.WriteEnd(tunnel, b"last")), ("nb", ct.FinishWriting(tunnel))]
    pair.tell("nb", ct.BytesRead(tunnel, b"answer"))
    assert pair.deliver() == [("na", ct.WriteEnd(tunnel, b"answer"))]
    pair.tell("nb", ct.BytesEnded(tunnel))
    # Closed, not shut down: whoever shares the end may go on with it.
    assert pair.deliver() == [("na", ct.CloseEnd(tunnel))]
    assert pair.counts() == (0, 0)


def test_a_writer_whose_reader_has_gone_is_told(pair: Pair) -> None:
    tunnel = pair.open()
    pair.tell("nb", ct.ReaderGone(tunnel))
    assert pair.deliver() == [("na", ct.RefuseBytes(tunnel))]
    assert pair.machines["na"].credit_of(tunnel) == 0
    pair.tell("nb", ct.BytesEnded(tunnel))
    assert pair.deliver() == [("na", ct.CloseEnd(tunnel))]
    assert pair.counts() == (0, 0)


def test_what_was_sent_before_the_stop_was_heard_is_dropped(pair: Pair) -> None:
    tunnel = pair.open()
    pair.tell("nb", ct.ReaderGone(tunnel))
    pair.tell("na", ct.BytesRead(tunnel, b"too late"))
    assert pair.deliver() == [("na", ct.RefuseBytes(tunnel))]


def test_a_parked_end_of_a_pipe_goes_one_way(pair: Pair) -> None:
    tunnel = pair.open(is_readable=False)  # bytes go from na to the pipe only
    assert pair.done["na"][-1] == ct.FinishWriting(tunnel)  # whoever reads at na sees the end at once
    pair.tell("na", ct.BytesRead(tunnel, b"x"))
    assert pair.deliver() == [("nb", ct.WriteEnd(tunnel, b"x"))]
    pair.tell("na", ct.BytesEnded(tunnel))
    assert pair.deliver() == [("nb", ct.CloseEnd(tunnel))]
    assert pair.counts() == (0, 0)


def test_the_loss_of_a_node_closes_its_tunnels_and_refuses_those_being_opened(pair: Pair) -> None:
    tunnel = pair.open()
    pair.tell("na", ct.TunnelWanted(8, "nb", "fetch", "j1-4"))
    pair.tell("na", ct.TunnelWanted(9, "nc", "fetch", "j1-5"))
    closed, refused = pair.tell("na", ct.NodeGone("nb"))
    assert closed == ct.CloseEnd(tunnel)
    assert (refused.asker, refused.error_number) == (8, errno.ECONNRESET)
    assert pair.counts()[0] == 1  # the one to nc


def test_the_end_of_a_job_closes_its_tunnels_at_both_ends(pair: Pair) -> None:
    tunnel = pair.open()
    assert pair.tell("nb", ct.TunnelJobOver("j")) == []
    assert pair.tell("nb", ct.TunnelJobOver("j1")) == [ct.CloseEnd(tunnel)]
    pair.deliver()
    assert pair.done["na"][-1] == ct.CloseEnd(tunnel)
    assert pair.counts() == (0, 0)


def test_a_tunnel_that_opens_after_its_job_has_ended_is_closed_again(pair: Pair) -> None:
    pair.tell("na", ct.TunnelWanted(7, "nb", "connect", "j1.abc"))
    pair.deliver()
    (refused,) = pair.tell("na", ct.TunnelJobOver("j1"))
    assert refused.asker == 7
    pair.tell("nb", ct.EndOpened("na-1", True, True))
    pair.deliver()
    assert pair.done["nb"][-1] == ct.CloseEnd("na-1")
    assert pair.counts() == (0, 0)


def test_messages_of_a_node_that_has_no_part_in_a_tunnel_do_nothing(pair: Pair) -> None:
    tunnel = pair.open()
    for message in (t.TunnelData(tunnel, b"x"), t.TunnelEnd(tunnel), t.TunnelStop(tunnel)):
        assert pair.machines["na"].handle(ct.TunnelMessageArrived("nc", message), 0.0) == []
    assert pair.counts() == (1, 1)


def test_a_node_that_sends_more_than_it_may_loses_the_tunnel(pair: Pair) -> None:
    tunnel = pair.open()
    commands = pair.machines["nb"].handle(ct.TunnelMessageArrived("na", t.TunnelData(tunnel, bytes(WINDOW + 1))), 0.0)
    assert commands[-1] == ct.CloseEnd(tunnel)
    assert [c.destination for c in commands[:-1]] == [Address("na", "na")] * 2


@pytest.mark.parametrize("seed", range(30))
def test_any_order_of_events_delivers_a_prefix_and_ends_clean(seed: int) -> None:
    """Bytes arrive in order, none twice; no more than the window is held; both sides forget the tunnel."""
    random = Random(seed)
    pair = Pair()
    tunnel = pair.open()
    sent = {"na": bytearray(), "nb": bytearray()}
    written = {"na": bytearray(), "nb": bytearray()}
    waiting = {"na": bytearray(), "nb": bytearray()}

    def deliver_one() -> None:
        source, destination, message = pair.on_way.popleft()
        for command in pair.tell(destination, ct.TunnelMessageArrived(source, message)):
            if isinstance(command, ct.WriteEnd):
                waiting[destination] += command.data
                assert len(waiting[destination]) <= WINDOW

    def step(node_id: str) -> None:
        choice = random.random()
        machine = pair.machines[node_id]
        if choice < 0.4 and (credit := machine.credit_of(tunnel)):
            data = random.randbytes(random.randint(1, min(credit, WINDOW // 3)))
            sent[node_id] += data
            pair.tell(node_id, ct.BytesRead(tunnel, data))
        elif choice < 0.7 and waiting[node_id]:
            count = random.randint(1, len(waiting[node_id]))
            written[node_id] += waiting[node_id][:count]
            del waiting[node_id][:count]
            pair.tell(node_id, ct.BytesWritten(tunnel, count))
        elif choice < 0.71:
            pair.tell(node_id, ct.BytesEnded(tunnel))
        elif choice < 0.72:
            pair.tell(node_id, ct.ReaderGone(tunnel))
        elif pair.on_way:
            deliver_one()

    for _ in range(400):
        step(random.choice(("na", "nb")))
    for node_id in ("na", "nb"):
        pair.tell(node_id, ct.BytesEnded(tunnel))
    while pair.on_way:
        deliver_one()
    assert pair.counts() == (0, 0)
    for node_id in ("na", "nb"):
        arrived = written[other(node_id)] + waiting[other(node_id)]
        assert sent[node_id].startswith(arrived)


def test_nobody_takes_the_name_of_a_tunnel_of_another_node() -> None:
    pair = Pair()
    taken = t.OpenTunnel("nb-1", "connect", "j1.x")  # as nb will call its first one
    assert pair.tell("nb", ct.TunnelMessageArrived("na", taken)) == []
    pair.tell("nb", ct.TunnelWanted(7, "na", "fetch", "j1-3"))
    assert pair.counts() == (0, 1)
