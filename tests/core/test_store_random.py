"""The object store's index under random clients, disks and clocks."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from clusterpool.core import store_messages as m
from clusterpool.core.allocator import PAGE_BYTES, round_up
from clusterpool.core.store_index import StoreIndex
from clusterpool.core.store_invariants import check_store

CLIENTS = st.sampled_from(["w1", "w2", "w3"])
NAMES = st.sampled_from([f"o{number}" for number in range(8)])
PAGES = 10


class StoreMachine(RuleBasedStateMachine):
    """Plays clients and disk; believes only the commands, and checks them against each other."""

    def __init__(self) -> None:
        super().__init__()
        self.index = StoreIndex(PAGES * PAGE_BYTES)
        self.file_bytes = PAGES * PAGE_BYTES
        self.now_s = 0.0
        self.request = 0
        self.open_creates: dict[int, tuple[str, str]] = {}
        self.open_pins: dict[int, tuple[str, str]] = {}
        self.pins: list[tuple[str, str, int]] = []  # client, object, offset
        self.writing: dict[str, tuple[str, int]] = {}  # object: creator, offset
        self.spilling: list[str] = []
        self.restoring: list[str] = []
        self.on_disk: set[str] = set()

    @initialize(pages=st.integers(5, PAGES))
    def choose_file_size(self, pages: int) -> None:
        """The file system may hold less than the arena was promised."""
        self.file_bytes = pages * PAGE_BYTES

    def send(self, event: m.StoreEvent) -> None:
        for command in self.index.handle(event, self.now_s):
            self.obey(command)

    def obey(self, command: m.StoreCommand) -> None:
        if isinstance(command, (m.GrantCreate, m.RestoreObject)):
            room = round_up(max(command.size_bytes, 1))
            if command.offset + room > self.file_bytes:
                self.send(m.ArenaExhausted(command.object_id, self.file_bytes))
                return
        if isinstance(command, m.GrantCreate):
            assert self.open_creates.pop(command.request) == (command.client, command.object_id)
            self.writing[command.object_id] = (command.client, command.offset)
        elif isinstance(command, (m.ReplyAlreadyExists, m.RefuseCreate)):
            assert self.open_creates.pop(command.request) == (command.client, command.object_id)
        elif isinstance(command, m.GrantPin):
            assert self.open_pins.pop(command.request) == (command.client, command.object_id)
            self.pins.append((command.client, command.object_id, command.offset))
        elif isinstance(command, (m.ReplyMissing, m.RefusePin)):
            assert self.open_pins.pop(command.request) == (command.client, command.object_id)
        elif isinstance(command, m.SpillObject):
            assert command.object_id not in self.on_disk, "spilled twice"
            self.spilling.append(command.object_id)
        elif isinstance(command, m.RestoreObject):
            assert command.object_id in self.on_disk
            self.restoring.append(command.object_id)
        elif isinstance(command, m.DeleteSpilled):
            self.on_disk.remove(command.object_id)
        else:
            assert isinstance(command, m.ReportGone)

    @rule(client=CLIENTS, name=NAMES, pages=st.integers(0, PAGES + 1), primary=st.booleans())
    def create(self, client: str, name: str, pages: int, primary: bool) -> None:
        self.request += 1
        self.open_creates[self.request] = (client, name)
        self.send(m.ObjectCreateRequested(client, self.request, name, pages * PAGE_BYTES, primary))

    @precondition(lambda self: self.writing)
    @rule(data=st.data(), seals=st.booleans())
    def finish_writing(self, data: st.DataObject, seals: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.writing)))
        client, _ = self.writing.pop(name)
        self.send(m.ObjectSealed(client, name) if seals else m.ObjectAborted(client, name))

    @rule(client=CLIENTS, name=NAMES)
    def pin(self, client: str, name: str) -> None:
        self.request += 1
        self.open_pins[self.request] = (client, name)
        self.send(m.PinRequested(client, self.request, name))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        client, name, _ = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))
        self.send(m.Unpinned(client, [name]))

    @rule(client=CLIENTS)
    def end_client(self, client: str) -> None:
        self.pins = [pin for pin in self.pins if pin[0] != client]
        self.writing = {name: held for name, held in self.writing.items() if held[0] != client}
        self.open_creates = {key: who for key, who in self.open_creates.items() if who[0] != client}
        self.open_pins = {key: who for key, who in self.open_pins.items() if who[0] != client}
        self.send(m.ClientGone(client))

    @rule(name=NAMES)
    def free(self, name: str) -> None:
        self.send(m.ObjectFreed(name))

    @rule(name=NAMES)
    def promote(self, name: str) -> None:
        self.send(m.CopyPromoted(name))

    @precondition(lambda self: self.spilling)
    @rule(data=st.data(), works=st.booleans())
    def finish_spill(self, data: st.DataObject, works: bool) -> None:
        name = self.spilling.pop(data.draw(st.integers(0, len(self.spilling) - 1)))
        if works:
            self.on_disk.add(name)
        self.send(m.ObjectSpilled(name) if works else m.SpillFailed(name, "full"))

    @precondition(lambda self: self.restoring)
    @rule(data=st.data(), works=st.booleans())
    def finish_restore(self, data: st.DataObject, works: bool) -> None:
        name = self.restoring.pop(data.draw(st.integers(0, len(self.restoring) - 1)))
        self.send(m.ObjectRestored(name) if works else m.RestoreFailed(name, "damaged"))

    @rule(name=NAMES)
    def find_file_unreadable(self, name: str) -> None:
        self.send(m.FileUnreadable(name, "damaged"))

    @rule(passed_s=st.floats(0, 70))
    def tick(self, passed_s: float) -> None:
        self.now_s += passed_s
        self.send(m.Tick())

    @invariant()
    def the_store_agrees_with_itself(self) -> None:
        check_store(self.index)

    @invariant()
    def what_is_in_use_never_moves_nor_overlaps(self) -> None:
        blocks: dict[str, tuple[int, int]] = {}
        for _, name, offset in self.pins:
            item = self.index.objects[name]
            assert item.offset == offset, f"{name} moved under its reader"
            blocks[name] = (offset, item.room_bytes)
        for name, (_, offset) in self.writing.items():
            item = self.index.objects[name]
            assert item.offset == offset, f"{name} moved under its writer"
            blocks[name] = (offset, item.room_bytes)
        end = 0
        for offset, size in sorted(blocks.values()):
            assert offset >= end, "two objects overlap"
            end = offset + size

    @invariant()
    def the_index_knows_what_is_on_disk(self) -> None:
        assert {item.object_id for item in self.index.objects.values() if item.is_on_disk} == self.on_disk

    def teardown(self) -> None:
        """Once everybody lets go and the disk works, every open request is answered."""
        for _ in range(100):
            if self.spilling:
                self.on_disk.add(self.spilling[0])
                self.send(m.ObjectSpilled(self.spilling.pop(0)))
            elif self.restoring:
                self.send(m.ObjectRestored(self.restoring.pop(0)))
            elif self.writing:
                name, (client, _) = next(iter(self.writing.items()))
                del self.writing[name]
                self.send(m.ObjectSealed(client, name))
            elif self.pins:
                client, name, _ = self.pins.pop()
                self.send(m.Unpinned(client, [name]))
            elif self.index.queue:
                self.now_s += 1.1  # the disk is left alone for a second after a failure
                head = next(iter(self.index.queue))
                self.send(m.Tick())
                assert self.spilling or head not in self.index.queue, f"{head} waits for nothing"
        assert not self.open_creates
        assert not self.open_pins
        for name in list(self.index.objects):
            self.send(m.ObjectFreed(name))
        assert self.index.objects == {}
        assert self.index.allocator.free_blocks() == [(0, self.index.allocator.capacity_bytes)]
        assert self.on_disk == set()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
