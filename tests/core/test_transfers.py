"""Moving objects between nodes: the puller, the server, and both together over a bad network."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterpool.core import transfer_messages as m
from clusterpool.core.transfer_serving import IDLE_MAX_S, ServingTable
from clusterpool.core.transfers import CHUNK_BYTES, CHUNK_WAIT_S, OPEN_WAIT_S, TRIES_MAX, TransferTable

MB = 1 << 20


class Puller:
    """A TransferTable whose invariants are checked at each step."""

    def __init__(self, **options: int) -> None:
        self.table = TransferTable(**options)
        self.now_s = 0.0

    def __call__(self, event: m.TransferEvent) -> list[m.TransferCommand]:
        commands = self.table.handle(event, self.now_s)
        self.table.check_invariants()
        return commands

    def says(self, node_id: str, message: m.Message) -> list[m.TransferCommand]:
        return self(m.PeerSpoke(node_id, message))

    def pull(self, name: str, nodes: list[str], size: int = 0, by: str = "w1") -> list[m.TransferCommand]:
        return self(m.PullRequested(by, name, nodes, size))

    def start(self, name: str, nodes: list[str], size: int) -> int:
        """Bring a pull to where chunks fly; return the transfer's number."""
        assert self.pull(name, nodes, size) == [m.AllocateForPull(name, size)]
        (opening,) = self(m.RoomGranted(name, 4096))
        assert isinstance(opening, m.SendToNode) and isinstance(opening.message, m.OpenTransfer)
        self.says(opening.node_id, m.TransferOpened(opening.message.transfer, size))
        return opening.message.transfer


def messages(commands: Sequence[m.TransferCommand], kind: type) -> list[tuple[str, m.Message]]:
    return [
        (command.node_id, command.message)
        for command in commands
        if isinstance(command, m.SendToNode) and isinstance(command.message, kind)
    ]


def test_an_object_of_unknown_size_is_sized_given_room_and_fetched() -> None:
    puller = Puller()
    assert puller.pull("a", ["n1"]) == [m.SendToNode("n1", m.OpenTransfer(1, "a"))]
    assert puller.says("n1", m.TransferOpened(1, 10)) == [
        m.SendToNode("n1", m.CloseTransfer(1)),
        m.AllocateForPull("a", 10),
    ]
    assert puller(m.RoomGranted("a", 4096)) == [m.SendToNode("n1", m.OpenTransfer(2, "a"))]
    assert puller.says("n1", m.TransferOpened(2, 10)) == [m.SendToNode("n1", m.SendChunk(2, 0, 10))]
    assert puller.says("n1", m.ChunkData(2, 0, b"0123456789")) == [
        m.WriteChunk("a", 4096, b"0123456789"),
        m.SendToNode("n1", m.CloseTransfer(2)),
        m.ReportPulled("a", ["w1"]),
        m.SealPull("a"),
    ]
    assert puller.table.pulls == {}


def test_chunks_fly_in_a_window() -> None:
    puller = Puller(window_chunks=3)
    puller.pull("a", ["n1"], 5 * MB + 1)
    puller(m.RoomGranted("a", 0))
    asked = messages(puller.says("n1", m.TransferOpened(1, 5 * MB + 1)), m.SendChunk)
    assert [message for _, message in asked] == [m.SendChunk(1, index * MB, MB) for index in range(3)]
    commands = puller.says("n1", m.ChunkData(1, MB, bytes(MB)))  # out of order
    assert messages(commands, m.SendChunk) == [("n1", m.SendChunk(1, 3 * MB, MB))]
    puller.says("n1", m.ChunkData(1, 0, bytes(MB)))
    commands = puller.says("n1", m.ChunkData(1, 3 * MB, bytes(MB)))
    assert messages(commands, m.SendChunk) == [("n1", m.SendChunk(1, 5 * MB, 1))]


def test_requesters_share_one_pull() -> None:
    puller = Puller()
    transfer = puller.start("a", ["n1"], 4)
    assert puller.pull("a", ["n1"], 4, by="w2") == []
    assert m.ReportPulled("a", ["w1", "w2"]) in puller.says("n1", m.ChunkData(transfer, 0, b"abcd"))


def test_a_pull_that_nobody_wants_any_more_is_aborted() -> None:
    puller = Puller()
    puller.start("a", ["n1"], 4)
    puller.pull("a", ["n1"], 4, by="w2")
    assert puller(m.PullCancelled("w1", "a")) == []
    assert puller(m.PullCancelled("w2", "a")) == [m.AbortPull("a"), m.SendToNode("n1", m.CloseTransfer(1))]
    assert puller.says("n1", m.ChunkData(1, 0, b"abcd")) == []  # nothing is written into room given back


def test_a_source_that_lost_the_object_is_replaced_and_what_came_is_kept() -> None:
    puller = Puller()
    transfer = puller.start("a", ["n1", "n2"], 3 * MB)
    puller.says("n1", m.ChunkData(transfer, 0, bytes(MB)))
    commands = puller.says("n1", m.TransferRefused(transfer, True, "evicted"))
    assert messages(commands, m.OpenTransfer) == [("n2", m.OpenTransfer(2, "a"))]
    commands = puller.says("n2", m.TransferOpened(2, 3 * MB))
    assert [message for _, message in messages(commands, m.SendChunk)] == [
        m.SendChunk(2, MB, MB),
        m.SendChunk(2, 2 * MB, MB),
    ]
    assert puller.says("n1", m.ChunkData(transfer, MB, bytes(MB))) == []  # late


def test_a_lost_node_is_replaced_at_once() -> None:
    puller = Puller()
    puller.start("a", ["n1", "n2"], 4)
    assert messages(puller(m.PeerLost("n1")), m.OpenTransfer) == [("n2", m.OpenTransfer(2, "a"))]


def test_a_node_cannot_speak_for_another() -> None:
    puller = Puller()
    transfer = puller.start("a", ["n1", "n2"], 4)
    assert puller.says("n2", m.ChunkData(transfer, 0, b"evil")) == []
    assert puller.says("n2", m.TransferRefused(transfer, True, "no")) == []


def test_the_last_source_lost_is_a_failure_with_its_story() -> None:
    puller = Puller()
    puller.start("a", ["n1", "n2"], 4)
    puller(m.PeerLost("n2"))
    commands = puller(m.PeerLost("n1"))
    assert m.AbortPull("a") in commands
    (report,) = [command for command in commands if isinstance(command, m.ReportPullFailed)]
    assert (report.kind, report.requesters) == ("lost", ["w1"])
    assert "n2: the node is gone; n1: the node is gone" in report.text


@pytest.mark.parametrize("size", [0, 4])
def test_no_source_at_all_is_a_failure_at_once(size: int) -> None:
    (report,) = Puller().pull("a", [], size)
    assert isinstance(report, m.ReportPullFailed)


def test_a_silent_source_is_tried_a_few_times() -> None:
    puller = Puller()
    puller.start("a", ["n1"], 4)
    for attempt in range(TRIES_MAX):
        puller.now_s += (CHUNK_WAIT_S if attempt == 0 else OPEN_WAIT_S) - 0.1
        assert puller(m.TimePassed()) == []
        puller.now_s += 0.1
        commands = puller(m.TimePassed())
        assert bool(messages(commands, m.OpenTransfer)) == (attempt < TRIES_MAX - 1)
    assert any(isinstance(command, m.ReportPullFailed) for command in commands)


@pytest.mark.parametrize(
    "bad",
    [
        m.ChunkData(1, 0, b"abc"),  # too short
        m.TransferRefused(1, False, "busy"),
    ],
)
def test_a_bad_answer_counts_against_the_source(bad: m.Message) -> None:
    puller = Puller()
    puller.start("a", ["n1", "n2"], 4)
    assert messages(puller.says("n1", bad), m.OpenTransfer) == [("n2", m.OpenTransfer(2, "a"))]


def test_a_copy_of_another_size_is_not_mixed_in() -> None:
    puller = Puller()
    puller.pull("a", ["n1", "n2"], 4)
    puller(m.RoomGranted("a", 0))
    commands = puller.says("n1", m.TransferOpened(1, 5))
    assert messages(commands, m.OpenTransfer) == [("n2", m.OpenTransfer(2, "a"))]


def test_pulls_beyond_the_budget_wait_in_line() -> None:
    puller = Puller(pull_bytes_max=10)
    assert puller.pull("a", ["n1"], 8) != []
    assert puller.pull("b", ["n1"], 4) == []
    assert puller.pull("c", ["n1"], 1) == []  # b came first
    assert puller(m.FoundHere("a")) == [
        m.ReportPulled("a", ["w1"]),
        m.AllocateForPull("b", 4),
        m.AllocateForPull("c", 1),
    ]


def test_a_pull_larger_than_the_budget_goes_alone() -> None:
    puller = Puller(pull_bytes_max=10)
    assert puller.pull("a", ["n1"], 80) == [m.AllocateForPull("a", 80)]
    assert puller.pull("b", ["n1"], 1) == []


def test_the_stores_refusal_reaches_the_requesters() -> None:
    puller = Puller()
    puller.pull("a", ["n1"], 8)
    assert puller(m.RoomRefused("a", "store_full", "no room")) == [
        m.ReportPullFailed("a", ["w1"], "store_full", "no room")
    ]


def test_the_less_busy_source_is_preferred() -> None:
    puller = Puller()
    puller.start("a", ["n1", "n2"], 4)
    puller.pull("b", ["n1", "n2"], 4)
    assert messages(puller(m.RoomGranted("b", 0)), m.OpenTransfer) == [("n2", m.OpenTransfer(2, "b"))]


def test_a_served_object_is_pinned_until_the_puller_closes() -> None:
    server = ServingTable()
    assert server.handle(m.PeerSpoke("n2", m.OpenTransfer(7, "a")), 0) == [m.PinForServing(1, "a")]
    assert server.handle(m.PeerSpoke("n2", m.OpenTransfer(7, "a")), 0) == []
    opened = [m.SendToNode("n2", m.TransferOpened(7, 100))]
    assert server.handle(m.ServingPinned(1, "a", 4096, 100), 1) == opened
    read = [m.ReadChunk("n2", 7, 60, 4156, 40)]
    assert server.handle(m.PeerSpoke("n2", m.SendChunk(7, 60, 40)), 2) == read
    assert server.handle(m.PeerSpoke("n2", m.CloseTransfer(7)), 3) == [m.UnpinForServing("a")]
    assert server.handle(m.PeerSpoke("n2", m.CloseTransfer(7)), 3) == []


@pytest.mark.parametrize(("offset", "size"), [(-1, 10), (0, 0), (91, 10), (0, 101), (0, -5)])
def test_bytes_outside_of_the_object_are_never_sent(offset: int, size: int) -> None:
    server = ServingTable()
    server.handle(m.PeerSpoke("n2", m.OpenTransfer(7, "a")), 0)
    server.handle(m.ServingPinned(1, "a", 4096, 100), 0)
    (reply,) = server.handle(m.PeerSpoke("n2", m.SendChunk(7, offset, size)), 0)
    assert isinstance(reply, m.SendToNode)
    assert isinstance(reply.message, m.TransferRefused)


def test_a_chunk_of_a_transfer_that_is_not_open_is_refused() -> None:
    (reply,) = ServingTable().handle(m.PeerSpoke("n2", m.SendChunk(7, 0, 1)), 0)
    assert isinstance(reply, m.SendToNode)
    assert isinstance(reply.message, m.TransferRefused)
    assert not reply.message.is_gone


@pytest.mark.parametrize("end", [m.PeerLost("n2"), m.TimePassed()])
def test_pins_of_lost_and_forgetful_pullers_are_given_back(end: m.TransferEvent) -> None:
    server = ServingTable()
    server.handle(m.PeerSpoke("n2", m.OpenTransfer(7, "a")), 0)
    server.handle(m.PeerSpoke("n3", m.OpenTransfer(7, "b")), 0)
    server.handle(m.ServingPinned(1, "a", 4096, 100), 0)
    server.handle(m.ServingPinned(2, "b", 8192, 100), 30)
    assert server.handle(end, IDLE_MAX_S) == [m.UnpinForServing("a")]


def test_a_puller_that_keeps_asking_keeps_its_pin() -> None:
    server = ServingTable()
    server.handle(m.PeerSpoke("n2", m.OpenTransfer(7, "a")), 0)
    server.handle(m.ServingPinned(1, "a", 4096, 100), 0)
    server.handle(m.PeerSpoke("n2", m.SendChunk(7, 0, 10)), 10)
    assert server.handle(m.TimePassed(), IDLE_MAX_S + 9) == []
    assert server.handle(m.TimePassed(), IDLE_MAX_S + 10) == [m.UnpinForServing("a")]


def test_a_pin_that_comes_after_the_close_is_given_back() -> None:
    server = ServingTable()
    server.handle(m.PeerSpoke("n2", m.OpenTransfer(7, "a")), 0)
    assert server.handle(m.PeerSpoke("n2", m.CloseTransfer(7)), 0) == []
    assert server.handle(m.ServingPinned(1, "a", 4096, 100), 0) == [m.UnpinForServing("a")]
    assert server.handle(m.ServingRefused(1, True, "late"), 0) == []


def test_a_store_without_the_object_says_so() -> None:
    server = ServingTable()
    server.handle(m.PeerSpoke("n2", m.OpenTransfer(7, "a")), 0)
    refused = m.SendToNode("n2", m.TransferRefused(7, True, "evicted"))
    assert server.handle(m.ServingRefused(1, True, "evicted"), 0) == [refused]
    assert server.serving_by_number == {}


class Network:
    """One puller and three servers whose messages are lost, repeated and reordered by one seed."""

    def __init__(self, seed: int, payload: bytes) -> None:
        self.random = random.Random(seed)
        self.payload = payload
        self.now_s = 0.0
        self.puller = TransferTable(window_chunks=4)
        self.servers = {name: ServingTable() for name in ("n1", "n2", "n3")}
        self.pins = dict.fromkeys(self.servers, 0)
        self.mail: list[tuple[str, m.Message]] = []  # (server, message) either way
        self.arena = bytearray(len(payload) + 4096)
        self.has_room = False
        self.reports: list[m.TransferCommand] = []
        self.sealed = False

    def puller_does(self, event: m.TransferEvent) -> None:
        commands = self.puller.handle(event, self.now_s)
        self.puller.check_invariants()
        for command in commands:
            if isinstance(command, m.SendToNode):
                self.mail.append((command.node_id, command.message))
            elif isinstance(command, m.AllocateForPull):
                self.has_room = True
                self.puller_does(m.RoomGranted(command.object_id, 4096))
            elif isinstance(command, m.WriteChunk):
                assert self.has_room
                end = command.arena_offset + len(command.chunk)
                self.arena[command.arena_offset : end] = command.chunk
            elif isinstance(command, m.AbortPull):
                self.has_room = False
            elif isinstance(command, m.SealPull):
                self.sealed = True
            else:
                self.reports.append(command)

    def server_does(self, name: str, event: m.TransferEvent) -> None:
        for command in self.servers[name].handle(event, self.now_s):
            if isinstance(command, m.SendToNode):
                self.mail.append((name, command.message))
            elif isinstance(command, m.PinForServing):
                if self.random.random() < 0.2:
                    self.server_does(name, m.ServingRefused(command.serving, self.random.random() < 0.5, "no"))
                else:
                    self.pins[name] += 1
                    pinned = m.ServingPinned(command.serving, command.object_id, 0, len(self.payload))
                    self.server_does(name, pinned)
            elif isinstance(command, m.UnpinForServing):
                self.pins[name] -= 1
            elif isinstance(command, m.ReadChunk):
                chunk = self.payload[command.arena_offset : command.arena_offset + command.size_bytes]
                self.mail.append((name, m.ChunkData(command.transfer, command.offset, chunk)))

    def step(self) -> None:
        if not self.mail or self.random.random() < 0.02:
            self.now_s += 20.0
            self.puller_does(m.TimePassed())
            for name in self.servers:
                self.server_does(name, m.TimePassed())
            return
        index = self.random.randrange(min(4, len(self.mail)))
        name, message = self.mail[index]
        fate = self.random.random()
        if fate < 0.95:
            del self.mail[index]  # else it will come a second time
        if fate < 0.03:
            return  # lost
        if isinstance(message, (m.OpenTransfer, m.SendChunk, m.CloseTransfer)):
            self.server_does(name, m.PeerSpoke("n0", message))
        else:
            self.puller_does(m.PeerSpoke(name, message))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), chunks=st.integers(0, 12), knows_size=st.booleans(), dies=st.booleans())
def test_over_a_bad_network_a_pull_ends_with_the_right_bytes_or_an_error(
    seed: int, chunks: int, knows_size: bool, dies: bool
) -> None:
    payload = b"".join(bytes([index + 1]) * CHUNK_BYTES for index in range(chunks))[5:]
    network = Network(seed, payload)
    network.puller_does(m.PullRequested("w1", "a", ["n1", "n2", "n3"], len(payload) if knows_size else 0))
    for count in range(2000):
        if dies and count == 10:
            network.puller_does(m.PeerLost("n1"))
        if not network.puller.pulls and not network.mail:
            break
        network.step()
    (report,) = network.reports
    assert network.sealed == isinstance(report, m.ReportPulled)
    if network.sealed:
        assert bytes(network.arena[4096:]) == payload
    else:
        assert not network.has_room
    network.now_s += 2 * IDLE_MAX_S
    for name in network.servers:
        network.server_does(name, m.TimePassed())
    assert set(network.pins.values()) == {0}
    assert network.puller.claimed_bytes == 0


def test_wire_messages_survive_the_wire_and_malformed_ones_do_not() -> None:
    kinds = m.OpenTransfer | m.TransferOpened | m.TransferRefused | m.SendChunk | m.ChunkData | m.CloseTransfer
    decoder = msgspec.msgpack.Decoder(kinds)
    for message in (m.OpenTransfer(1, "a"), m.TransferRefused(1, True, "no"), m.ChunkData(1, 0, b"x")):
        assert decoder.decode(msgspec.msgpack.encode(message)) == message
    with pytest.raises(msgspec.ValidationError):
        decoder.decode(msgspec.msgpack.encode(["ChunkData", 1, "0", b"x"]))
