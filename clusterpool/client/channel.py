"""A first-in, first-out channel of messages between processes, of one host or of many.

    put --socket has room--------------------------------> SEQPACKET pair ---> get          thin: on its home alone
      \\--no--> [waiting] --feeder thread, in order--------/
    put ---------------> list in the control store ----------------------------> get        fat: moved there, for ever

One message of the socket is one item: any number of processes put and get without a lock, nothing is torn when one of
them is killed, and what was sent stays when its putter ends, because the node has both ends open too. A moved channel's
socket is shut: putters get EPIPE, getters its end, and both go on in the control store (coordination.py).

What is too large for a message lies in the object store, under a name of the channel's, so that it belongs to no
process; the message says where. Whoever loads it frees it.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import select
import socket
import struct
import threading
import weakref
from collections import deque
from collections.abc import Callable
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

import msgspec

from clusterpool.client import current, sleeps
from clusterpool.client.frames import is_put_off
from clusterpool.client.values import INLINE_BYTES_MAX, ObjectUnreadable
from clusterpool.core import messages as m
from clusterpool.core.messages import Address
from clusterpool.errors import ClusterpoolError, ObjectLost
from clusterpool.serialization.packing import Serialized, loads

if TYPE_CHECKING:
    from clusterpool.client.coordination import Coordination
    from clusterpool.client.runtime import Runtime

logger = logging.getLogger(__name__)

# The first byte of a message that says where its payload is stored; a payload starts with 0x80 or "C" (packing.py).
STORED = b"\x01"
_MESSAGE_BYTES_MAX = INLINE_BYTES_MAX + 1024
_SEND_NOWAIT = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
# For how long a thread sleeps in the kernel before it looks whether the channel has moved or the node is gone. The end
# of the socket wakes it at once, so this is a safety net; shorter costs idle getters wake-ups.
SLICE_S = 1.0
_SLICE = struct.pack("ll", int(SLICE_S), 0)
# At a driver's end, for how long nothing may be taken from what it has put before it goes on: its job ends with it, so
# nobody can read later, and whoever reads now does so within this time.
DRIVER_PATIENCE_S = 1.0
# What a putter gets once the channel has moved, and when the host is short of memory, which passes.
_SHUT = frozenset({errno.EPIPE, errno.ECONNRESET})
_NO_MEMORY = frozenset({errno.ENOBUFS, errno.ENOMEM})
_NO_MEMORY_RETRY_S = 0.1
# The page's counter never has this value: the first use asks whether the channel has moved before we knew of it.
_NEVER = -1


class ChannelTable:
    """The channels of one process; one for each runtime."""

    def __init__(self, runtime: Runtime, open_ends: Callable[[str], tuple[int, int]]) -> None:
        self.runtime = runtime
        self.coordination: Coordination = runtime.coordination
        self.open_ends = open_ends
        self.lock = threading.RLock()  # a garbage collection or a signal may put while its thread is in here
        # Copies of a channel share descriptors and what waits, which keeps the order of what one thread puts.
        self.channels: weakref.WeakValueDictionary[str, Channel] = weakref.WeakValueDictionary()
        self.unsent: set[Channel] = set()  # pickled channels with messages that wait: others may read them
        self.stored_numbers = itertools.count(1)
        self._is_flushed_at_exit = False

    def create(self) -> Channel:
        """A new channel, at home on this node."""
        coordination = self.coordination
        channel = Channel(self, coordination.new_name(), coordination.node_id, is_new=True)
        self.channels[channel.name] = channel
        return channel

    def known(self, name: str, home: str) -> Channel:
        """The channel of that name, which came from another process or is here already."""
        with self.lock:
            channel = self.channels.get(name)
            if channel is None:
                channel = self.channels[name] = Channel(self, name, home, is_new=False)
            return channel

    def flush_at_exit(self) -> None:
        """From now on, the end of this process waits for messages that wait."""
        if self._is_flushed_at_exit:
            return
        self._is_flushed_at_exit = True
        from multiprocessing.util import Finalize

        # Processes of the standard module end by its finalizers, before anything else; all others by `shutdown`.
        self.runtime.on_shutdown.append(self.flush)
        finalizer = Finalize(None, self.flush, exitpriority=-5)
        self.runtime.after_shutdown.append(finalizer.cancel)

    def flush(self) -> None:
        """Wait until what this process has put is sent; a driver, while somebody takes it."""
        patience_s = DRIVER_PATIENCE_S if self.runtime.client.kind == "driver" else None
        for channel in list(self.unsent):
            if channel.is_flushed_at_exit:
                # Once only: this may be called by both.
                channel.is_flushed_at_exit = channel.flush(patience_s)


class _End(socket.socket):
    """An end of a channel's socket, closed with the channel's last copy here, as the end of a standard pipe is: with
    no ResourceWarning.
    """

    def __del__(self) -> None:
        self.close()


class Channel:
    """One channel, as this process has it. Any thread may put and get; pickled, it is the same channel anywhere."""

    def __init__(self, table: ChannelTable, name: str, home: str, *, is_new: bool) -> None:
        self.name = name
        self.home = home
        self.is_fat = False
        self.is_flushed_at_exit = True
        self._table = table
        self._coordination = table.coordination
        self._client = table.runtime.client
        page = table.coordination.page
        self._page = page if page.format == "Q" else page.cast("Q")
        self._seen: int = self._page[0] if is_new else _NEVER
        self._receiver: socket.socket | None = None
        self._sender: socket.socket | None = None
        self._reset()
        # Whom nobody else knows is removed with its last object here; one that was pickled, when its job ends.
        self._finalizer: weakref.finalize[..., Channel] | None = None
        if is_new:
            self._finalizer = weakref.finalize(self, table.coordination.forget, name)
            self._finalizer.atexit = False

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()  # see ChannelTable.lock
        self._waiting: deque[bytes] = deque()  # in front: what the feeder is sending now
        self._feeder: threading.Thread | None = None
        self._flushers: list[Any] = []  # locks of the threads in `flush`

    def __reduce__(self) -> tuple[Any, ...]:
        if self._finalizer is not None:
            self._finalizer.detach()
            self._finalizer = None
        with self._lock:
            if self._waiting:
                self._table.unsent.add(self)
        return known, (self.name, self.home)

    # --- putting

    def put_value(self, serialized: Serialized) -> None:
        """Put a pickled value; one that is too large for a message goes through the object store.

        Raises: what storing it raises (ObjectTooLarge, StoreFull); NotConnected.
        """
        if serialized.buffers:
            is_large = serialized.size_bytes > INLINE_BYTES_MAX
            self._put(self._store(serialized) if is_large else serialized.to_bytes())
        else:
            self.put(serialized.stream)

    def put(self, payload: bytes) -> None:
        """Put the payload of a value. Never waits for whoever gets it."""
        self._put(payload if len(payload) <= INLINE_BYTES_MAX else self._store(Serialized(payload)))

    def _put(self, message: bytes) -> None:
        if self._sender is None:
            self._has_moved()
        if not self._waiting and not self.is_fat:
            sender = self._sender or self._ends()[1]
            try:
                sender.send(message, _SEND_NOWAIT)
                return
            except BlockingIOError:
                self._enqueue(message)
                return
            except OSError as exc:
                if exc.errno in _NO_MEMORY:
                    self._enqueue(message)
                    return
                if exc.errno not in _SHUT:
                    raise
                self._become_fat()
        if self._waiting:
            self._enqueue(message)
        else:
            self._coordination.put(self.name, message)

    def _enqueue(self, message: bytes) -> None:
        if self._pid != os.getpid():
            self._reset()  # a fork: what waits is the parent's to send
        with self._lock:
            self._waiting.append(message)
            if self._feeder is not None:
                return
            if self._finalizer is None:
                self._table.unsent.add(self)
            self._table.flush_at_exit()
            # It has us only weakly: what waits in a channel that nobody can read any more must not keep it.
            feeder = threading.Thread(target=_feed, args=(weakref.ref(self),), name="clusterpool-feeder", daemon=True)
            self._feeder = feeder
        try:
            feeder.start()
        except RuntimeError:  # the interpreter is at its end and starts no threads: we wait ourselves
            _feed(weakref.ref(self))

    def send_waiting(self) -> bool:
        """Send one waiting message, or try for SLICE_S; whether the feeder is to go on. The feeder's alone."""
        waiting = self._waiting
        try:
            self._client.check_open()
            if self._send(waiting[0]):
                waiting.popleft()
        except ClusterpoolError as exc:  # the job is over, or the control store was away for longer than its patience
            if not self._client.is_closed:
                logger.error("channel %s: %d messages that waited are lost: %s", self.name, len(waiting), exc)
            waiting.clear()
        with self._lock:
            if waiting:
                return True
            self._feeder = None
            self._table.unsent.discard(self)
            flushers, self._flushers = self._flushers, []
        for lock in flushers:
            lock.release()
        return False

    def _send(self, message: bytes) -> bool:
        if not self.is_fat:
            assert self._sender is not None, "the socket was full before"
            try:
                self._sender.send(message, socket.MSG_NOSIGNAL)
                return True
            except BlockingIOError:
                return False
            except OSError as exc:
                if exc.errno in _NO_MEMORY:
                    sleep(_NO_MEMORY_RETRY_S)
                    return False
                self._become_fat()
        self._coordination.put(self.name, message)
        return True

    def flush(self, patience_s: float | None = None) -> bool:
        """Wait until all that this process has put is sent; whether it is. `patience_s`: while anything goes out."""
        while self._waiting and self._pid == os.getpid():
            count = len(self._waiting)
            lock = threading.Lock()
            lock.acquire()
            with self._lock:
                if self._feeder is None:
                    break
                self._flushers.append(lock)
            box: deque[bool] = deque()
            sleeps.acquire(lock, SLICE_S if patience_s is None else patience_s, box)
            is_sent = box[0]
            if not is_sent and (self._client.is_closed or (patience_s is not None and len(self._waiting) == count)):
                break
        return not self._waiting

    # --- getting

    def get(self, timeout_s: float | None = None) -> bytes | None:
        """The next message, for `load`, or None when there was none in time.

        Raises: NotConnected when the cluster goes away meanwhile.
        """
        if self._page[0] != self._seen:
            self._look()
        if not self.is_fat:
            receiver = self._receiver or self._ends()[0]
            message: bytes | None
            if timeout_s is None:
                message = self._wait(receiver)
            else:
                try:
                    message = receiver.recv(_MESSAGE_BYTES_MAX, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    if timeout_s <= 0:
                        return None
                    deadline_s = monotonic() + timeout_s
                    message = self._wait_until(receiver, deadline_s)
                    timeout_s = max(0.0, deadline_s - monotonic())
            if message or message is None:
                return message
            self._become_fat()
        while True:
            message = self._coordination.get(self.name, timeout_s)
            if message is not None or timeout_s is not None:
                return message

    def _wait(self, receiver: socket.socket) -> bytes:
        """The next message, or b"" when the channel has moved."""
        while True:
            box: deque[bytes] = deque()
            try:
                # Not by `poll`: the kernel wakes one of those who wait in `recv`, but all of those who poll.
                sleeps.receive(receiver, _MESSAGE_BYTES_MAX, box)
            except BlockingIOError:
                self._client.check_open()
                if self._has_moved():
                    return b""
                continue
            except BaseException as exc:
                # Ctrl-C at the moment when the message came: that must not be lost with it.
                if not box or not box[0]:
                    raise
                if not is_put_off(exc):
                    self._put(box[0])
                    raise
            return box[0]

    def _wait_until(self, receiver: socket.socket, deadline_s: float) -> bytes | None:
        poller = select.poll()
        poller.register(receiver.fileno(), select.POLLIN)
        while True:
            left_s = deadline_s - monotonic()
            if left_s <= 0:
                return None
            sleeps.poll(poller, min(left_s, SLICE_S))
            if self._has_moved():
                return b""
            try:
                return receiver.recv(_MESSAGE_BYTES_MAX, socket.MSG_DONTWAIT)
            except BlockingIOError:  # another was quicker
                self._client.check_open()

    def load(self, message: bytes) -> Any:
        """The value of a message.

        Raises: what unpickling raises; ObjectLost when the node that had it is gone.
        """
        if message[0] != STORED[0]:
            return loads(message)
        stored = msgspec.msgpack.decode(memoryview(message)[1:], type=m.StoredValue)
        client = self._client
        try:
            try:
                return self._table.runtime.values.load_stored(stored)
            except ObjectUnreadable as exc:
                raise ObjectLost(str(exc)) from None  # nobody could make it again
        finally:
            # Nobody else can have the message. What we have mapped stays until the last view of it has gone.
            for node_id in sorted({*stored.node_ids, client.node.node_id}):
                client.send(Address(node_id, node_id), m.FreeObjects([stored.object_id]))

    def _store(self, serialized: Serialized) -> bytes:
        client = self._client
        object_id = f"{self.name}.{client.address.process_id}-{next(self._table.stored_numbers)}"
        stored = self._table.runtime.values.store(serialized, object_id)
        # What lies in the node's socket is handled even if we are killed now; what lies with us is not.
        client.loop.wait_until(lambda: not client.has_unsent or client.is_closed)
        return STORED + msgspec.msgpack.encode(stored)

    # --- how much there is

    def poll(self, timeout_s: float = 0.0) -> bool:
        """Whether there is a message; waits for one if need be."""
        deadline_s = monotonic() + timeout_s
        while True:
            left_s = max(0.0, deadline_s - monotonic())
            if not self._has_moved():
                receiver = self._receiver or self._ends()[0]
                poller = select.poll()
                poller.register(receiver.fileno(), select.POLLIN)
                is_ready = sleeps.poll(poller, min(left_s, SLICE_S))
                if not self._has_moved() and (is_ready or left_s <= SLICE_S):
                    return is_ready
            elif self._coordination.length(self.name):
                return True
            elif left_s <= 0:
                return False
            else:
                # Nobody is told of a message without getting it; who only looks may look now and then.
                sleeps.poll(select.poll(), min(left_s, 0.02))

    def length(self) -> int:
        """How many messages of a fat channel nobody has got yet, as far as this process knows."""
        return self._coordination.length(self.name) + len(self._waiting)

    def receiving_fd(self) -> int:
        """A descriptor that is readable while there is a message in a thin channel; always, once it has moved.

        Raises: ValueError for a channel of another node.
        """
        self._check_has_ends()
        return (self._receiver or self._ends()[0]).fileno()

    def sending_fd(self) -> int:
        """The descriptor that thin messages are sent by. Raises: as `receiving_fd`."""
        self._check_has_ends()
        return (self._sender or self._ends()[1]).fileno()

    def _check_has_ends(self) -> None:
        if self.home != self._coordination.node_id:
            raise ValueError(
                f"channel {self.name} was made on node {self.home}: it has no descriptor on node "
                f"{self._coordination.node_id}; use `get` with a timeout, or `poll`"
            )

    # --- where it is

    def has_moved(self) -> bool:
        """Whether the channel is in the control store by now."""
        return self._has_moved()

    def _has_moved(self) -> bool:
        if self._page[0] != self._seen:
            self._look()
        return self.is_fat

    def _look(self) -> None:
        """Something of this node has moved since we looked last, or we never have."""
        counter = self._page[0]
        coordination = self._coordination
        if self.home != coordination.node_id:
            if not self.is_fat:
                coordination.adopt("channel", self.name, self.home)
                self._become_fat()
        elif not self.is_fat and coordination.is_moved(self.name):
            self._become_fat()
        self._seen = counter

    def _become_fat(self) -> None:
        # The ends stay open: another thread may sleep on them.
        self.is_fat = True

    def _ends(self) -> tuple[socket.socket, socket.socket]:
        assert self.home == self._coordination.node_id, "no other node has the socket"
        with self._table.lock:
            if self._receiver is None or self._sender is None:
                fds = self._table.open_ends(self.name)
                receiver, sender = (_End(fileno=fd) for fd in fds)
                for sock, option in ((receiver, socket.SO_RCVTIMEO), (sender, socket.SO_SNDTIMEO)):
                    # The open files are everybody's: whether they block must not depend on one's default timeout.
                    sock.settimeout(None)
                    sock.setsockopt(socket.SOL_SOCKET, option, _SLICE)
                self._receiver, self._sender = receiver, sender
            return self._receiver, self._sender


def _feed(watch: weakref.ref[Channel]) -> None:
    while True:
        channel = watch()
        if channel is None or not channel.send_waiting():
            return
        del channel


def create() -> Channel:
    """A new channel; joins or starts a cluster."""
    from clusterpool.client import api

    return table_of(api.runtime()).create()


def known(name: str, home: str) -> Channel:
    """The channel of that name; named in pickles.

    Raises: NotConnected in a process that belongs to no cluster.
    """
    return table_of(current.get()).known(name, home)


def table_of(runtime: Runtime) -> ChannelTable:
    """The channels of this process."""
    channels = runtime.channels
    if channels is not None:
        return channels  # whoever leaves the cluster has the lock, and may wait for the thread that unpickles here
    with current.lock:
        if runtime.channels is None:
            from clusterpool.client import descriptors

            runtime.channels = ChannelTable(runtime, descriptors.channel)
        return runtime.channels
