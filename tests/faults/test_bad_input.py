"""Any bytes at any port or socket: dropped, counted, logged once; nobody crashes, and nothing of it is unpickled."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
import zmq

import clusterpool
from clusterpool.cli.join_file import read_join_file
from clusterpool.control_store.store import ControlStore
from clusterpool.core import messages as m
from clusterpool.core import wire
from clusterpool.core.messages import Address
from clusterpool.node.cluster_keys import ClusterKeys
from clusterpool.transport.stream import FRAME_BYTES_MAX, GREETING_BYTES_MAX
from clusterpool.version import __version__
from tests.cluster.clusters import clusterpool_command
from tests.faults.hosts import Hosts, wait_for

pytestmark = pytest.mark.cluster

GROWTH_BYTES_MAX = 64 << 20


class Canary:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.open, (str(self.path), os.O_CREAT)


def framed(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def rubbish(canary: bytes) -> list[bytes]:
    """What comes to a port of a machine sooner or later, and what somebody might send who knows us."""
    random = Random(4)
    greeting = wire.encode(m.Hello(1, Address("n1", "w1"), "worker", 1, "j1", "2.7", "0"))
    return [
        b"",
        b"\0",
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"\xff\0\0\0\0\0\0\0\x01\x7f",  # ZMTP
        canary,
        framed(canary),
        framed(b""),
        framed(wire.encode(m.StartTasks([m.FunctionPart(1, canary)], [m.TaskSpec(1024, 1, 0, canary)]))),
        framed(wire.encode(m.Relay(Address("n1", "w1"), Address("n1", "n1"), canary))),
        framed(greeting),
        framed(greeting) + framed(canary),
        framed(greeting)[:-3],
        struct.pack("<I", FRAME_BYTES_MAX + 1) + b"x" * 100,
        struct.pack("<I", GREETING_BYTES_MAX + 1) + b"x" * 100,
        struct.pack("<I", 2**32 - 1),
        *(random.randbytes(random.randint(1, 300)) for _ in range(20)),
        *(framed(random.randbytes(random.randint(1, 300))) for _ in range(20)),
    ]


def send_to_socket(path: Path, data: bytes) -> None:
    """Like a stranger who does not wait for an answer, but does not hang up before it comes."""
    kind = socket.SOCK_SEQPACKET if path.name == "fd.sock" else socket.SOCK_STREAM
    with socket.socket(socket.AF_UNIX, kind) as sock, contextlib.suppress(ConnectionError, BrokenPipeError):
        sock.settimeout(0.05)
        sock.connect(str(path))
        sock.sendall(data)
        with contextlib.suppress(TimeoutError):
            while sock.recv(4096):
                pass


def rejected(hosts: Hosts, role: str, cause: str = "") -> float:
    part = hosts.ask(role)
    assert part is not None, f"{role} does not answer"
    return part.details.get(f"rejected: {cause}" if cause else "rejected", 0.0)


def logged(hosts: Hosts, role: str, text: str) -> int:
    return hosts.paths(role).node_log.read_text().count(text)


@pytest.fixture
def work(hosts: Hosts) -> Iterator[Callable[[], None]]:
    """A driver with a pool and an actor; called, it shows that they still do what they should."""
    clusterpool.init(address=hosts.address("home"))
    actor = clusterpool.remote(Counter).options(num_cpus=0, resources={"left": 0.1}).remote()
    calls = 0
    with clusterpool.Pool(4) as pool:

        def check() -> None:
            nonlocal calls
            calls += 1
            assert pool.map(abs, range(-20, 0), chunksize=1) == list(range(20, 0, -1))
            assert clusterpool.get(actor.add.remote(), timeout=20) == calls

        check()
        pids = {role: hosts.node_pid(role) for role in hosts.parts}
        before = {role: psutil.Process(pid).memory_info().rss for role, pid in pids.items()}
        yield check
        check()
        for role, pid in pids.items():
            assert psutil.Process(pid).memory_info().rss < before[role] + GROWTH_BYTES_MAX, f"{role} has grown"
    clusterpool.shutdown()
    hosts.assert_healthy()


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self) -> int:
        self.count += 1
        return self.count


def test_any_bytes_at_any_socket(hosts: Hosts, work: Callable[[], None], tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    sent = rubbish(pickle.dumps(Canary(canary)))
    for role in ("home", "left"):
        folder = hosts.paths(role).folder
        sockets = [path for path in folder.rglob("*") if path.is_socket()]
        assert {path.name for path in sockets} > {"node.sock", "fd.sock"}
        assert len(sockets) > 2, "no worker or driver is here"
        before = rejected(hosts, role)
        for path in sockets:
            for data in sent:
                send_to_socket(path, data)
        assert rejected(hosts, role, "a process") >= len(sent) / 2
        assert rejected(hosts, role, "descriptors") >= len(sent) / 2
        assert rejected(hosts, role) > before
        assert logged(hosts, role, "dropped the connection of a stranger") == 1
        assert logged(hosts, role, "dropped a request for descriptors") == 1
        assert rejected(hosts, role, "a message cut short") >= 1
        assert logged(hosts, role, "dropped the beginning of a message") == 1
    assert not canary.exists()
    work()


def test_half_a_frame_and_a_long_wait_hold_nobody_up(hosts: Hosts, work: Callable[[], None]) -> None:
    paths = [path for path in hosts.paths("home").folder.rglob("*.sock") if path.name != "fd.sock"]
    with contextlib.ExitStack() as stack:
        for path in paths:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            with contextlib.suppress(ConnectionRefusedError):  # of a worker that is no more
                sock.connect(str(path))
                sock.sendall(struct.pack("<I", 1000) + b"\x96")
        work()


@pytest.mark.parametrize(
    "claim",
    [
        lambda node, driver: Address(node, node),  # the node itself
        lambda node, driver: Address(node, driver),  # a process that is there
        lambda node, driver: Address("n0123456789", "w1"),  # one of another node
    ],
)
def test_nobody_can_pass_for_another(claim: Any, hosts: Hosts, work: Callable[[], None]) -> None:
    node_id, folder = hosts.node_id("home"), hosts.paths("home").folder
    driver = next(path.stem for path in (folder / "p").glob("d*.sock"))
    import platform

    claimed = claim(node_id, driver)
    hello = m.Hello(m.PROTOCOL_VERSION, claimed, "worker", os.getpid(), "", platform.python_version(), __version__)
    before = rejected(hosts, "home")
    stop = framed(wire.encode(hello)) + framed(wire.encode(m.StopNode(True)))
    send_to_socket(folder / "node.sock", stop)
    assert rejected(hosts, "home") == before + 1
    if claimed != Address(node_id, driver):
        # To a process: what only its node may say.
        lost = wire.encode(m.NodeLost(hosts.node_id("left"), "a lie"))
        send_to_socket(folder / "p" / f"{driver}.sock", framed(wire.encode(hello)) + framed(lost))
    work()


def test_a_message_in_the_name_of_another_is_dropped_with_its_sender(hosts: Hosts, work: Callable[[], None]) -> None:
    import platform

    node_id, folder = hosts.node_id("home"), hosts.paths("home").folder
    driver = next(path.stem for path in (folder / "p").glob("d*.sock"))
    ours = Address(node_id, "t0123456789ab")
    hello = m.Hello(m.PROTOCOL_VERSION, ours, "tool", os.getpid(), "", platform.python_version(), __version__)
    left = Address(hosts.node_id("left"), hosts.node_id("left"))
    lie = m.Relay(left, Address(node_id, driver), wire.encode(m.LeaveNode()))
    before = rejected(hosts, "home")
    send_to_socket(folder / "node.sock", framed(wire.encode(hello)) + framed(wire.encode(lie)))
    assert rejected(hosts, "home") == before + 1
    # In its own name it may send what it likes to whomever; what that one cannot read, it drops.
    for body in (b"", b"\x80\x04\x95", wire.encode(m.RetireWorker())[:-1]):
        mail = m.Relay(Address(node_id, driver), ours, body)
        send_to_socket(folder / "node.sock", framed(wire.encode(hello)) + framed(wire.encode(mail)))
    work()


def test_what_a_worker_once_said_is_worth_nothing_after_its_end(hosts: Hosts, work: Callable[[], None]) -> None:
    import platform

    node_id, folder = hosts.node_id("home"), hosts.paths("home").folder
    ended = Address(node_id, "w0123456789ab")
    hello = m.Hello(m.PROTOCOL_VERSION, ended, "worker", os.getpid(), "", platform.python_version(), __version__)
    words = [hello, m.RegisterProcess(None), m.CreateObject(1, "d1.1024", 1000), m.SealObject("d1.1024")]
    before = rejected(hosts, "home", "a process")
    send_to_socket(folder / "node.sock", b"".join(framed(wire.encode(word)) for word in words))
    wait_for(lambda: rejected(hosts, "home", "a process") == before + 1, what="it is counted")
    work()


def test_garbage_in_the_control_store_is_left_out(hosts: Hosts, work: Callable[[], None]) -> None:
    join = read_join_file(Path(hosts.join_file))
    store = ControlStore.connect(
        join.control_store_url, cluster_id=join.cluster_id, password=join.control_store_password
    )
    keys, node_id = store.keys, hosts.node_id("right")
    garbage = [
        ("HSET", keys.nodes, "n9", b"\x80\x04\x95", "n8", b"{}", b"\xff", b"\xff"),
        ("ZADD", keys.node_heartbeats, "1e300", node_id, "-1e300", b"\xff"),
        ("HSET", keys.node_loads, node_id, b"[" * 10_000),
        ("HSET", keys.jobs, "j9", b"\xff"),
        ("HSET", keys.actor("a9"), "state", b"\xff"),
        ("SADD", keys.actors, "a9", b"\xff"),
        ("XADD", keys.events, "*", "kind", b"\xff"),
        ("SET", keys.event_number, b"many"),
        ("SET", keys.generation, b"\xff"),
    ]
    try:
        for command in garbage:
            store._client.execute_command(*command)
        wait_for(
            lambda: all(rejected(hosts, role, "control store: nodes") >= 3 for role in hosts.parts),
            what="each node has left them out",
        )
        work()
        store.publish_event("greeting", {})  # the stream is in order again
        assert store.read_events(store.last_event_id() - 1)[0].kind == "greeting"
    finally:
        store._client.execute_command("HDEL", keys.nodes, "n9", "n8", b"\xff")
        store._client.execute_command("ZREM", keys.node_heartbeats, b"\xff")
        store._client.execute_command("HDEL", keys.jobs, "j9")
        store._client.execute_command("DEL", keys.actor("a9"))
        store._client.execute_command("SREM", keys.actors, "a9", b"\xff")
        store.close()
    for role in hosts.parts:
        assert logged(hosts, role, "left out what the control store holds of nodes") == 1
    work()


def test_keys_of_another_type_in_the_control_store_are_made_anew(hosts: Hosts, work: Callable[[], None]) -> None:
    join = read_join_file(Path(hosts.join_file))
    store = ControlStore.connect(
        join.control_store_url, cluster_id=join.cluster_id, password=join.control_store_password
    )
    keys = store.keys
    nodes, jobs = {part.node_id for part in hosts.known()}, store.list_jobs()
    before = sum(rejected(hosts, role) for role in hosts.parts)
    wrong = [
        keys.nodes, keys.node_incarnations, keys.node_heartbeats, keys.node_loads, keys.jobs, keys.actors,
        keys.actor_names, keys.actor_keepers, keys.events,
    ]  # fmt: skip
    try:
        for key in wrong:
            store._client.set(key, "mine")
        store._client.delete(keys.incarnation)
        store._client.rpush(keys.incarnation, "mine")
        wait_for(lambda: sum(rejected(hosts, role) for role in hosts.parts) >= before + 3, what="they are counted")
        wait_for(lambda: {entry.record.node_id for entry in store.list_nodes().nodes} == nodes, within_s=10)
        wait_for(lambda: store.list_jobs().keys() == jobs.keys(), within_s=10, what="the jobs are on the list again")
        wait_for(lambda: len(store.list_actors()) == 1, within_s=10, what="the actor is on the list again")
        work()  # the actor lives: nobody was fenced
    finally:
        store.close()


def test_another_version_is_told_so_and_sent_away(hosts: Hosts, work: Callable[[], None]) -> None:
    for version in (m.PROTOCOL_VERSION - 1, m.PROTOCOL_VERSION + 1):
        hello = m.Hello(version, Address(hosts.node_id("home"), "w0"), "worker", 1, "", "3.11.7", __version__)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(5)
            sock.connect(hosts.address("home"))
            sock.sendall(framed(wire.encode(hello)))
            answer = b""
            while chunk := sock.recv(4096):  # to the end: the node hangs up
                answer += chunk
        assert f"protocol {version}".encode() in answer
    work()


# --- the port that other nodes reach


def address_of(hosts: Hosts, role: str) -> tuple[str, int]:
    part = hosts.ask(role)
    assert part is not None
    host, _, port = part.address.partition(":")
    return host, int(port)


def test_any_bytes_at_the_port_of_a_node(hosts: Hosts, work: Callable[[], None], tmp_path: Path) -> None:
    host, port = address_of(hosts, "left")
    canary = tmp_path / "canary"
    zmtp = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
    before = rejected(hosts, "left")
    for data in [*rubbish(pickle.dumps(Canary(canary))), zmtp, zmtp + b"\x06" + b"\xff" * 8, zmtp + os.urandom(200)]:
        with socket.create_connection((host, port)) as sock, contextlib.suppress(ConnectionError):
            sock.settimeout(0.02)
            sock.sendall(data)
            with contextlib.suppress(TimeoutError):
                sock.recv(100)
    wait_for(lambda: rejected(hosts, "left") >= before + 3, what="they are counted")
    assert not canary.exists()
    work()


@contextlib.contextmanager
def dealer(address: tuple[str, int], server_key: bytes | None, client: tuple[bytes, bytes] | None) -> Iterator[Any]:
    context = zmq.Context()
    sock = context.socket(zmq.DEALER)
    sock.setsockopt(zmq.LINGER, 200)
    sock.setsockopt(zmq.IDENTITY, b"n0123456789")
    if server_key is not None and client is not None:
        sock.curve_serverkey, (sock.curve_publickey, sock.curve_secretkey) = server_key, client
    sock.connect(f"tcp://{address[0]}:{address[1]}")
    try:
        yield sock
    finally:
        sock.close()
        context.term()


@pytest.mark.parametrize("keys", ["none", "another server's", "another client's"])
def test_nobody_gets_in_without_the_keys(keys: str, hosts: Hosts, work: Callable[[], None]) -> None:
    ours = ClusterKeys.read(hosts.session.folder / "keys.json")
    others = ClusterKeys.generate()
    server_key = {"none": None, "another server's": others.server_public}.get(keys, ours.server_public)
    client = (others.client_public, others.client_secret)
    before = rejected(hosts, "left")
    with dealer(address_of(hosts, "left"), server_key, client) as sock:
        sock.send(stop_of(hosts, "left"))
        wait_for(lambda: rejected(hosts, "left") > before, what="it is counted")
    work()


def stop_of(hosts: Hosts, role: str) -> bytes:
    node = Address(hosts.node_id(role), hosts.node_id(role))
    return wire.encode(m.Relay(node, Address("n0123456789", "w1"), wire.encode(m.StopNode(False))))


def test_rubbish_with_the_right_keys_is_dropped_too(hosts: Hosts, work: Callable[[], None], tmp_path: Path) -> None:
    keys = ClusterKeys.read(hosts.session.folder / "keys.json")
    node = Address(hosts.node_id("left"), hosts.node_id("left"))
    canary = tmp_path / "canary"
    frames = rubbish(pickle.dumps(Canary(canary)))
    frames += [wire.encode(m.RetireWorker()), wire.encode(m.StopNode(True))]  # nodes exchange relays only
    # As of an earlier life, or of one that nobody has heard of.
    relays = [wire.encode(m.Relay(node, Address("n0", "w1"), frame)) for frame in frames]
    before, before_relays = rejected(hosts, "left", "another node"), rejected(hosts, "left", "another life")
    with dealer(address_of(hosts, "left"), keys.server_public, (keys.client_public, keys.client_secret)) as sock:
        for frame in [*relays, *frames]:
            sock.send(frame)
        sock.send_multipart([b"two", b"parts"])
        wait_for(
            lambda: rejected(hosts, "left", "another node") >= before + len(frames) + 1,
            what="all are counted",
        )
    assert rejected(hosts, "left", "another life") == before_relays + len(relays)
    assert logged(hosts, "left", "dropped a frame of node") == 1
    assert logged(hosts, "left", "dropped a message of node") == 1
    assert not canary.exists()
    work()


# --- files and variables


GARBAGE = ["", "\0\0", "{", "[]", "null", "{}", '{"version": 1}', "a: [b", "\xff\xfe", "x" * 100_000, '{"nodes": 7}']


@pytest.mark.parametrize("command", [["up"], ["start", "--address"]], ids=["cluster file", "join file"])
def test_a_garbled_file_is_refused_with_its_name(command: list[str], tmp_path: Path) -> None:
    file = tmp_path / "garbled"
    for text in (
        [GARBAGE[1], GARBAGE[3], GARBAGE[9]] if command[0] == "start" else [GARBAGE[3], GARBAGE[7], GARBAGE[10]]
    ):
        file.write_text(text)
        file.chmod(0o600)
        done = clusterpool_command(*command, str(file))
        assert done.returncode not in (0, -6, -11), text
        assert "garbled" in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    "address", ["/", "/dev/null", "nowhere", "\x7f", "redis://a:1", "x" * 5000, "/tmp/" + "y" * 300]
)
def test_a_garbled_address_is_named(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUSTERPOOL_ADDRESS", address)
    with pytest.raises(clusterpool.errors.NotConnected, match="no cluster is at"):
        clusterpool.init()
    assert not clusterpool.is_initialized()
