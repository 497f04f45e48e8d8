"""Channels on socket pairs and a control store of dictionaries: order, moves, large messages, ends."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from clusterpool.client import channel as channels
from clusterpool.client import frames, sleeps
from clusterpool.client.channel import Channel, ChannelTable
from clusterpool.client.values import INLINE_BYTES_MAX
from clusterpool.errors import NotConnected
from clusterpool.serialization.packing import dumps_value

sys.path.insert(0, os.path.dirname(__file__))
from thin_channels import NODE, OTHER_NODE, FakeStore, make_table

from tests.waiting import wait_for

MANY = 20_000  # far more than a socket takes


@pytest.fixture
def store() -> Iterator[FakeStore]:
    made = FakeStore()
    yield made
    made.close()


@pytest.fixture
def table(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> ChannelTable:
    """The channels of a process on NODE, which is also who unpickles."""
    made = make_table(store)
    monkeypatch.setattr(channels, "current", types.SimpleNamespace(get=lambda: made.runtime))
    monkeypatch.setattr(channels, "table_of", lambda _runtime: made)
    return made


def payload(number: int) -> bytes:
    return pickle.dumps(number, 5)


def number_of(message: bytes | None) -> int:
    assert message is not None, "there was nothing"
    number: int = pickle.loads(message)
    return number


def get_all(channel: Channel, count: int) -> list[int]:
    return [number_of(channel.get(30)) for _ in range(count)]


def in_thread(function: Callable[[], Any]) -> Callable[[], Any]:
    """Start `function`; what waits for its result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()

    def result() -> Any:
        thread.join(20.0)
        assert results, "the thread did not end, or raised"
        return results[0]

    return result


# --- order


def test_what_one_thread_puts_comes_in_order_though_the_socket_is_full(table: ChannelTable) -> None:
    channel = table.create()
    for number in range(MANY):
        channel.put(payload(number))
    assert get_all(channel, MANY) == list(range(MANY))
    assert channel.get(0.0) is None


class NoMemory:
    """A sending end of a host that is short of memory, for `failures` times."""

    def __init__(self, sender: socket.socket, failures: int) -> None:
        self._sender = sender
        self._failures = failures

    def send(self, message: bytes, flags: int) -> int:
        if self._failures:
            self._failures -= 1
            raise OSError(errno.ENOBUFS, "no buffer space")
        return self._sender.send(message, flags)


def test_a_host_without_memory_for_a_message_is_no_move(table: ChannelTable) -> None:
    channel: Any = table.create()
    channel.put(payload(0))
    channel._sender = NoMemory(channel._sender, 2)
    for number in range(1, 4):
        channel.put(payload(number))
    assert get_all(channel, 4) == [0, 1, 2, 3]
    assert not channel.is_fat


def test_nothing_is_left_waiting_when_the_socket_has_room(table: ChannelTable) -> None:
    channel = table.create()
    for number in range(100):
        channel.put(payload(number))
    assert not any(thread.name == "clusterpool-feeder" for thread in threading.enumerate())


def test_each_message_goes_to_one_of_many_getters(table: ChannelTable) -> None:
    channel = table.create()
    getters = [in_thread(lambda: get_all(channel, MANY // 4)) for _ in range(4)]
    for number in range(MANY):
        channel.put(payload(number))
    got = [getter() for getter in getters]
    assert sorted(number for numbers in got for number in numbers) == list(range(MANY))
    assert all(numbers == sorted(numbers) for numbers in got)


def test_a_channel_that_is_dropped_warns_of_no_open_socket(table: ChannelTable) -> None:
    channel = table.create()
    channel.put(payload(1))
    ends = [channel.receiving_fd(), channel.sending_fd()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del channel
        gc.collect()
    assert [str(warning.message) for warning in caught] == []
    for descriptor in ends:
        with pytest.raises(OSError):
            os.fstat(descriptor)


def test_timeouts(table: ChannelTable) -> None:
    channel = table.create()
    begun_s = time.monotonic()
    assert channel.get(0.0) is None
    assert channel.get(0.2) is None
    assert 0.2 <= time.monotonic() - begun_s < 5.0
    assert not channel.poll()
    assert not channel.poll(0.05)
    channel.put(payload(1))
    assert channel.poll(30.0)
    assert number_of(channel.get(0.0)) == 1


def test_a_getter_outlives_the_slices_in_which_it_sleeps(table: ChannelTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "_SLICE", struct.pack("ll", 0, 10_000))
    channel = table.create()
    result = in_thread(channel.get)
    time.sleep(0.1)
    channel.put(payload(5))
    assert number_of(result()) == 5


# --- moving


def test_a_getter_that_sleeps_gets_what_is_put_after_the_move(
    store: FakeStore, table: ChannelTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "_SLICE", struct.pack("ll", 100, 0))  # it is woken, and does not merely look again
    channel = table.create()
    results = [in_thread(channel.get), in_thread(lambda: channel.get(20.0))]
    time.sleep(0.05)  # so that both sleep in the kernel; else the test shows less, not more
    far = make_table(store, OTHER_NODE).known(channel.name, NODE)
    far.put(payload(1))
    far.put(payload(2))
    assert sorted(number_of(result()) for result in results) == [1, 2]


def test_order_is_kept_when_the_channel_moves_while_messages_wait(store: FakeStore, table: ChannelTable) -> None:
    channel = table.create()
    for number in range(MANY):
        channel.put(payload(number))
    far = make_table(store, OTHER_NODE).known(channel.name, NODE)
    got = get_all(far, 1000)
    for number in range(MANY, MANY + 1000):
        channel.put(payload(number))
    assert got + get_all(far, MANY) == list(range(MANY + 1000))
    assert channel.flush()
    assert channel.is_fat
    assert channel.length() == 0


def test_who_unpickles_late_learns_that_the_channel_has_moved(store: FakeStore, table: ChannelTable) -> None:
    channel = table.create()
    make_table(store, OTHER_NODE).known(channel.name, NODE).put(payload(1))
    late = make_table(store).known(channel.name, NODE)
    assert late.poll()
    assert number_of(late.get(0.0)) == 1
    assert not late.poll(0.01)


def test_a_poller_that_waits_sees_what_is_put_after_the_move(store: FakeStore, table: ChannelTable) -> None:
    channel = table.create()
    result = in_thread(lambda: channel.poll(20.0))
    far = make_table(store, OTHER_NODE).known(channel.name, NODE)
    assert far.get(0.0) is None
    far.put(payload(1))
    assert result() is True


def test_a_move_of_something_else_changes_nothing(store: FakeStore, table: ChannelTable) -> None:
    other, channel = table.create(), table.create()
    channel.put(payload(1))
    store.move(other.name)
    channel.put(payload(2))
    assert get_all(channel, 2) == [1, 2]
    assert not channel.is_fat


# --- large messages


@pytest.mark.parametrize("size", [INLINE_BYTES_MAX - 1000, INLINE_BYTES_MAX, INLINE_BYTES_MAX + 1, 3_000_000])
def test_values_of_any_size_come_whole_and_leave_nothing_in_the_store(
    store: FakeStore, table: ChannelTable, size: int
) -> None:
    channel = table.create()
    values = [b"a" * size, "b" * size, bytearray(size)]
    for value in values:
        channel.put_value(dumps_value(value))
    assert all(name.startswith(channel.name + ".") for name in store.objects)
    assert bool(store.objects) == (size >= INLINE_BYTES_MAX)
    for value in values:
        message = channel.get(30)
        assert message is not None
        assert channel.load(message) == value
    assert not store.objects


def test_large_values_keep_their_place_in_the_order(store: FakeStore, table: ChannelTable) -> None:
    channel = table.create()
    values: list[Any] = [1, b"x" * 500_000, 2, b"y" * 500_000, 3]
    for value in values:
        channel.put_value(dumps_value(value))
    store.move(channel.name)
    far = make_table(store, OTHER_NODE).known(channel.name, NODE)
    assert [far.load(far.get(30) or b"") for _ in values] == values


# --- lives and ends


def test_a_channel_that_was_never_pickled_is_forgotten_with_its_last_object(
    store: FakeStore, table: ChannelTable
) -> None:
    kept, dropped = table.create(), table.create()
    names = kept.name, dropped.name
    pickle.dumps(kept)
    del kept, dropped
    gc.collect()
    assert store.forgotten == [names[1]]


def test_a_full_channel_that_nobody_can_read_any_more_goes_too(
    store: FakeStore, table: ChannelTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "_SLICE", struct.pack("ll", 0, 10_000))
    channel = table.create()
    for number in range(MANY):
        channel.put(payload(number))
    del channel
    wait_for(lambda: gc.collect() is not None and store.forgotten)
    wait_for(lambda: not any(thread.name == "clusterpool-feeder" for thread in threading.enumerate()))


def test_what_waits_in_a_pickled_channel_is_sent_without_its_object(store: FakeStore, table: ChannelTable) -> None:
    channel = table.create()
    pickled = pickle.dumps(channel)
    for number in range(MANY):
        channel.put(payload(number))
    name = channel.name
    del channel
    gc.collect()
    assert get_all(make_table(store).known(name, NODE), MANY) == list(range(MANY))
    assert pickle.loads(pickled).name == name


def test_copies_in_one_process_are_one_channel(table: ChannelTable) -> None:
    channel = table.create()
    assert pickle.loads(pickle.dumps(channel)) is channel


def test_the_end_of_a_worker_waits_until_all_is_sent(store: FakeStore, table: ChannelTable) -> None:
    channel = table.create()
    pickle.dumps(channel)
    for number in range(MANY):
        channel.put(payload(number))
    flushed = in_thread(table.flush)
    assert table.flush in table.runtime.on_shutdown
    assert get_all(make_table(store).known(channel.name, NODE), MANY) == list(range(MANY))
    flushed()
    assert channel.flush()


def test_the_end_of_a_driver_does_not_wait_for_ever(store: FakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "DRIVER_PATIENCE_S", 0.05)
    table = make_table(store, kind="driver")
    channel = table.create()
    pickle.dumps(channel)
    for number in range(MANY):
        channel.put(payload(number))
    table.flush()
    assert not channel.flush(0.01)
    table.runtime.client.is_closed = True


def test_who_cancelled_the_wait_is_not_waited_for(store: FakeStore, table: ChannelTable) -> None:
    channel = table.create()
    pickle.dumps(channel)
    for number in range(MANY):
        channel.put(payload(number))
    channel.is_flushed_at_exit = False
    table.flush()  # would not return
    table.runtime.client.is_closed = True


def test_the_feeder_gives_up_when_the_cluster_is_gone(
    store: FakeStore, table: ChannelTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "_SLICE", struct.pack("ll", 0, 10_000))
    channel = table.create()
    for number in range(MANY):
        channel.put(payload(number))
    table.runtime.client.is_closed = True
    assert channel.flush()
    wait_for(lambda: not any(thread.name == "clusterpool-feeder" for thread in threading.enumerate()))


def test_a_blocked_getter_is_told_when_the_cluster_is_gone(
    table: ChannelTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "_SLICE", struct.pack("ll", 0, 10_000))
    monkeypatch.setattr(channels, "SLICE_S", 0.01)
    channel = table.create()

    def get(timeout_s: float | None) -> Any:
        with pytest.raises(NotConnected):
            channel.get(timeout_s)
        return True

    results = [in_thread(lambda: get(None)), in_thread(lambda: get(20.0))]
    table.runtime.client.is_closed = True
    assert [result() for result in results] == [True, True]


def test_a_fork_does_not_send_what_waits_at_its_parent(store: FakeStore, table: ChannelTable) -> None:
    channel = table.create()
    count = 0
    while not channel._waiting:
        channel.put(payload(count))
        count += 1
    pid = os.fork()
    if pid == 0:
        try:
            channel.put(payload(-1))
            os._exit(0 if channel.flush() else 1)
        except BaseException:
            os._exit(2)
    got = get_all(channel, count + 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert sorted(got) == [-1, *range(count)]


# --- Ctrl-C


@pytest.mark.parametrize("timeout_s", [None, 30.0])
def test_ctrl_c_wakes_a_getter(table: ChannelTable, timeout_s: float | None) -> None:
    channel = table.create()
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        begun_s = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            channel.get(timeout_s)
        assert time.monotonic() - begun_s < 5.0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    channel.put(payload(7))
    assert number_of(channel.get(30)) == 7


def test_an_exception_may_be_raised_where_a_getter_sleeps_and_nowhere_else_in_a_channel(table: ChannelTable) -> None:
    channel = table.create()
    innermost: list[Any] = []

    def note(_number: int, frame: Any) -> None:
        innermost.append((frame.f_code, frames.may_raise(frame)))
        channel.put(payload(1))

    previous = signal.signal(signal.SIGALRM, note)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        assert number_of(channel.get()) == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert innermost == [(sleeps.receive.__code__, True)]
    assert not frames.may_raise(_frame_of(channel))


def _frame_of(channel: Channel) -> Any:
    """The frame of a channel's method that has just been called."""
    seen: list[Any] = []

    def profile(frame: Any, event: str, _argument: Any) -> None:
        if event == "call" and frame.f_code is Channel.put.__code__:
            seen.append(frame)

    sys.setprofile(profile)
    try:
        channel.put(payload(0))
    finally:
        sys.setprofile(None)
    return seen[0]
