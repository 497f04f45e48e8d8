"""Hosts as network namespaces on one switch that loses, delays and cuts frames as it is told.

    [namespace 1: tap 10.x.0.1] --+
    [namespace 2: tap 10.x.0.2] --+-- Switch, a thread of this process
    [namespace 3: tap 10.x.0.3] --+

The switch is ours because few sandboxes have netem; and so nothing of the machine's own network is touched. A tap
goes with its descriptor, a namespace is deleted at the end, and the next run deletes those of a run that was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import re
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
FRAME_BYTES_MAX = 65536
PREFIX = "cpf"
BROADCAST = b"\xff" * 6


class Switch(threading.Thread):
    """Passes ethernet frames between taps. The rules may be changed at any time, from any thread."""

    def __init__(self, taps: list[int]) -> None:
        super().__init__(name="switch", daemon=True)
        self.taps = taps
        self.loss = 0.0
        self.delay_s = 0.0
        self.cut: set[frozenset[int]] = set()
        self.closed_ports: dict[frozenset[int], int] = {}  # a TCP port that the two cannot use with each other
        self.passed = self.lost = 0
        self._random = Random(7)
        self._port_by_mac: dict[bytes, int] = {}
        self._waiting: list[tuple[float, int, int, bytes]] = []
        self._is_stopping = False

    def run(self) -> None:
        poll = select.poll()
        for tap in self.taps:
            poll.register(tap, select.POLLIN)
        while not self._is_stopping:
            wait_ms = 50.0 if not self._waiting else (self._waiting[0][0] - time.monotonic()) * 1000
            for fd, _ in poll.poll(min(50.0, max(0.0, wait_ms))):
                self._read(self.taps.index(fd))
            while self._waiting and self._waiting[0][0] <= time.monotonic():
                _, _, port, frame = heapq.heappop(self._waiting)
                with contextlib.suppress(OSError):
                    os.write(self.taps[port], frame)

    def stop(self) -> None:
        self._is_stopping = True
        self.join(30)

    def _read(self, source: int) -> None:
        for _ in range(100):
            try:
                frame = os.read(self.taps[source], FRAME_BYTES_MAX)
            except OSError:
                return
            self._port_by_mac[frame[6:12]] = source
            known = self._port_by_mac.get(frame[:6])
            for port in range(len(self.taps)) if known is None else [known]:
                if port != source:
                    self._pass(source, port, frame)

    def _pass(self, source: int, port: int, frame: bytes) -> None:
        pair = frozenset((source, port))
        is_cut = pair in self.cut or (pair in self.closed_ports and self.closed_ports[pair] in tcp_ports(frame))
        if is_cut or self._random.random() < self.loss:
            self.lost += 1
            return
        self.passed += 1
        # The number keeps frames of one moment in order.
        heapq.heappush(self._waiting, (time.monotonic() + self.delay_s, self.passed, port, frame))


def tcp_ports(frame: bytes) -> tuple[int, ...]:
    """Source and destination of an IPv4 TCP segment; nothing for any other frame."""
    if frame[12:14] != b"\x08\x00" or frame[23] != 6:
        return ()
    start = 14 + 4 * (frame[14] & 15)
    return struct.unpack_from("!HH", frame, start)


class Network:
    """`namespaces` and `addresses` by number."""

    def __init__(self, hosts: int) -> None:
        self.namespaces = [f"{PREFIX}{os.getpid()}-{number}" for number in range(hosts)]
        third = os.getpid() % 250
        self.addresses = [f"10.213.{third}.{number + 1}" for number in range(hosts)]
        self.switch: Switch | None = None

    def enter(self, number: int, *command: str) -> list[str]:
        """The command, run on that host."""
        return ["ip", "netns", "exec", self.namespaces[number], *command]

    def isolate(self, number: int) -> None:
        """Cut a host off from all others."""
        self.cut(*((number, other) for other in range(len(self.namespaces)) if other != number))

    def cut(self, *pairs: tuple[int, int]) -> None:
        assert self.switch is not None
        self.switch.cut = {frozenset(pair) for pair in pairs}

    def heal(self) -> None:
        self.cut()


@contextlib.contextmanager
def made_network(hosts: int) -> Iterator[Network]:
    """Raises: OSError, CalledProcessError where the sandbox does not allow it."""
    remove_remains()
    network = Network(hosts)
    taps: list[int] = []
    try:
        for number, (namespace, address) in enumerate(zip(network.namespaces, network.addresses, strict=True)):
            ip("netns", "add", namespace)
            tap = f"{PREFIX}{os.getpid() % 100_000}.{number}"
            taps.append(open_tap(tap))
            ip("link", "set", tap, "netns", namespace)
            for command in (
                ("addr", "add", f"{address}/24", "dev", tap),
                ("link", "set", tap, "up"),
                ("link", "set", "lo", "up"),
            ):
                ip("-n", namespace, *command)
        network.switch = Switch(taps)
        network.switch.start()
        yield network
    finally:
        if network.switch is not None:
            network.switch.stop()
        for tap in taps:
            os.close(tap)
        for namespace in network.namespaces:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", namespace)


def open_tap(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    except OSError:
        os.close(fd)
        raise
    return fd


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def remove_remains() -> None:
    """Of runs that were killed: their process is gone."""
    folder = Path("/run/netns")
    for path in folder.iterdir() if folder.is_dir() else []:
        found = re.fullmatch(rf"{PREFIX}(\d+)-\d+", path.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", path.name)


def why_impossible() -> str:
    """Why this sandbox cannot have such a network; empty if it can."""
    try:
        with made_network(2) as network:
            command = network.enter(0, "python3", "-c", PROBE, network.addresses[1])
            server = subprocess.Popen(network.enter(1, "python3", "-c", ECHO), stdout=subprocess.PIPE)
            try:
                assert server.stdout is not None
                server.stdout.readline()
                subprocess.run(command, check=True, capture_output=True, timeout=10)
            finally:
                server.kill()
                server.wait()
    except (OSError, subprocess.SubprocessError) as exc:
        return f"no network of namespaces and taps here: {exc}"
    return ""


ECHO = "import socket; s = socket.create_server(('', 7007)); print('up', flush=True); s.accept()[0].recv(9)"
PROBE = "import socket, sys; socket.create_connection((sys.argv[1], 7007), 5)"
