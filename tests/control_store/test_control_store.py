"""The control store on real servers: what goes wrong with connections, servers and replicas.

What every control store must do is in tests/contracts.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

from clusterpool.control_store import actor_scripts
from clusterpool.control_store.address import connect_to_server
from clusterpool.control_store.coordination import CoordinationStore
from clusterpool.control_store.port import ActorDefinition, EventsLost
from clusterpool.control_store.server import APPEND_ONLY_FOLDER, ServerProcess, find_server_binary
from clusterpool.control_store.store import ControlStore
from clusterpool.core.cluster_view import NodeLoad, NodeRecord
from clusterpool.core.coordination_events import Contents
from clusterpool.core.membership import HeartbeatAnswer
from clusterpool.errors import AuthenticationFailed, NotConnected, ProtocolError, StoreFull
from tests.control_store.servers import PASSWORD, embedded_server, running, short_folder, tcp_server
from tests.waiting import wait_for

RECORD = NodeRecord("n1", "10.0.0.1", 7000, "key", {"CPU": 4.0})
LOAD = NodeLoad(available={"CPU": 1.0})


@contextmanager
def connected(url: str, **options: object) -> Iterator[ControlStore]:
    store = ControlStore.connect(url, **options)  # type: ignore[arg-type]
    try:
        yield store
    finally:
        store.close()


def port_of(server: ServerProcess) -> int:
    return int(server.url.removesuffix("/0").rpartition(":")[2])


# Connecting


def test_password_as_argument_and_in_the_address() -> None:
    with tcp_server() as server:
        with connected(server.url, password=PASSWORD) as store:
            assert store.register_node(RECORD) == 1
        url = server.url.replace("redis://", f"redis://:{quote(PASSWORD, safe='')}@")
        with connected(url) as store:
            assert len(store.list_nodes().nodes) == 1
            assert "s3cret" not in store.address


@pytest.mark.parametrize("password", [None, "wrong"])
def test_missing_or_wrong_password_is_told_at_once(password: str | None) -> None:
    with tcp_server() as server:
        started_s = time.monotonic()
        with pytest.raises(AuthenticationFailed, match="password"):
            ControlStore.connect(server.url, password=password, timeout_s=30)
        assert time.monotonic() - started_s < 10


def test_user_without_rights_is_told() -> None:
    with tcp_server() as server, connected(server.url, password=PASSWORD) as admin:
        admin._client.execute_command("ACL", "SETUSER", "guest", "on", ">pw", "~other:*", "+@all")
        with (
            connected(server.url, username="guest", password="pw") as guest,
            pytest.raises(AuthenticationFailed),
        ):
            guest.register_node(RECORD)


def test_server_that_is_not_there_is_told_with_its_address(tmp_path: Path) -> None:
    with pytest.raises(NotConnected, match=r"nowhere\.sock.*is the server running"):
        ControlStore.connect(f"unix://{tmp_path}/nowhere.sock", timeout_s=0.1)


def test_connect_waits_for_a_server_that_is_starting() -> None:
    with short_folder() as folder:
        server = ServerProcess.start(folder, unix_socket_path=folder / "store.sock")
        try:
            with connected(server.url, timeout_s=10) as store:
                store.ping()
        finally:
            server.stop()


def test_clusters_on_one_server_do_not_see_each_other() -> None:
    with (
        embedded_server() as server,
        connected(server.url, cluster_id="one") as one,
        connected(server.url, cluster_id="two") as two,
    ):
        one.register_node(RECORD)
        assert two.list_nodes().nodes == []
        keys = {key.decode().rpartition(":")[0] for key in one._client.execute_command("KEYS", "*")}
        assert keys == {"clusterpool:{one}"}


@pytest.mark.parametrize("cluster_id", ["", "a}b", "a:b", "x" * 65])
def test_cluster_name_that_would_break_the_keys_is_refused(cluster_id: str) -> None:
    with pytest.raises(ValueError, match="cluster's name"):
        ControlStore.connect("redis://localhost:1", cluster_id=cluster_id)


def test_scripts_are_sent_again_to_a_server_that_dropped_them() -> None:
    with embedded_server() as server, connected(server.url) as store:
        assert store.publish_event("tick", {}) == 1
        store._client.execute_command("SCRIPT", "FLUSH")
        assert store.publish_event("tick", {}) == 2


def test_what_a_server_does_not_understand_is_a_protocol_error() -> None:
    with embedded_server() as server, connected(server.url) as store:
        store._run("SET", store.keys.generation, b"text")
        with pytest.raises(ProtocolError, match="must be Redis 6.2 or later"):
            store._run("INCR", store.keys.generation)


def test_full_server_is_told_as_such() -> None:
    with embedded_server() as server, connected(server.url) as store:
        store._client.execute_command("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(StoreFull, match="maxmemory"):
            store.register_job("k", b"v")
        with pytest.raises(StoreFull, match="maxmemory"):
            store.register_node(RECORD)


def test_reason_with_undecodable_bytes_is_still_told() -> None:
    with embedded_server() as server, connected(server.url) as store:
        store.publish_event("worker_died", {"reason": "bad \udcff name"})
        assert store.read_events(0)[0].fields == {"reason": "bad \\udcff name"}


def test_script_that_is_sent_twice_changes_the_actor_once() -> None:
    with embedded_server() as server, connected(server.url) as store:
        store.create_actor(ActorDefinition("a1", b"{}"))
        arguments = ("a1", "one request", "alive", 60, 1, "pending")
        keys = store._actor_keys("a1")
        # As redis-py does when the connection breaks before the answer.
        assert [store._eval(actor_scripts.UPDATE_ACTOR, keys, *arguments) for _ in range(2)] == [1, 1]
        assert [event.kind for event in store.read_events(0)] == ["actor_created", "actor_changed"]


def test_waiting_reader_wakes_at_an_event() -> None:
    with embedded_server() as server, connected(server.url) as reader, connected(server.url) as writer:
        timer = threading.Timer(0.1, writer.publish_event, ("tick", {}))
        timer.start()
        events = reader.read_events(0, block_ms=2400)
        timer.join()
        assert [event.kind for event in events] == ["tick"]


# A server that goes away


def test_broken_connection_is_made_anew_without_a_word() -> None:
    with embedded_server() as server, connected(server.url) as store, connected(server.url) as other:
        incarnation = store.register_node(RECORD)
        other._client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert store.heartbeat("n1", incarnation, LOAD) is HeartbeatAnswer.ACCEPTED
        assert store.read_events(1) == []  # the same server: nothing can have been lost


def test_stopped_server_is_not_connected_until_it_is_back_with_its_data() -> None:
    with short_folder() as folder:
        options = {"unix_socket_path": folder / "store.sock", "appendonly": True}
        with running(folder, **options) as server:
            store = ControlStore.connect(server.url)
            incarnation = store.register_node(RECORD)
        with pytest.raises(NotConnected):
            store.heartbeat("n1", incarnation, LOAD)
        with running(folder, **options):
            assert store.heartbeat("n1", incarnation, LOAD) is HeartbeatAnswer.ACCEPTED
            with pytest.raises(EventsLost, match="another server"):
                store.read_events(1)
            assert store.read_events(1) == []
            store.close()


@pytest.mark.parametrize(("query", "options"), [("?socket_timeout=0.1", {}), ("", {"answer_timeout_s": 0.3})])
def test_server_that_hangs_fails_a_call_after_one_timeout(query: str, options: dict[str, float]) -> None:
    with embedded_server() as server, connected(server.url + query, **options) as store:
        os.kill(server.pid, signal.SIGSTOP)
        try:
            started_s = time.monotonic()
            with pytest.raises(NotConnected):
                store.ping()
            assert time.monotonic() - started_s < 2.0
        finally:
            os.kill(server.pid, signal.SIGCONT)


def test_what_a_stopped_server_was_sent_takes_effect_before_what_comes_later_or_never() -> None:
    with embedded_server() as server, connected(server.url, answer_timeout_s=1.0) as store:
        os.kill(server.pid, signal.SIGSTOP)
        try:
            for value in (b"first", b"second"):
                with pytest.raises(NotConnected):
                    store.register_job("k", value)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        wait_for(lambda: is_reached(store))
        store.register_job("k", b"last")
        with connected(server.url) as other:
            for _ in range(20):
                other.ping()
                assert store.list_jobs() == {"k": b"last"}
            assert len(other._client.execute_command("CLIENT", "LIST").splitlines()) == 2


def is_reached(store: ControlStore) -> bool:
    try:
        store.ping()
    except NotConnected:
        return False
    return True


def test_store_that_lost_everything_takes_its_nodes_back() -> None:
    with short_folder() as folder:
        options = {"unix_socket_path": folder / "store.sock"}
        with running(folder, **options) as server:
            store, other = ControlStore.connect(server.url), ControlStore.connect(server.url)
            store.register_node(NodeRecord("n0", "h", 1, "k", {}))
            incarnation = store.register_node(RECORD)
        with running(folder, **options):
            other.register_node(NodeRecord("n2", "h", 1, "k", {}))  # the new store has a history of its own
            assert store.heartbeat("n1", incarnation, LOAD) is HeartbeatAnswer.FORGOTTEN
            assert store.restore_node(RECORD, incarnation)
            assert store.heartbeat("n1", incarnation, LOAD) is HeartbeatAnswer.ACCEPTED
            assert {entry.record.node_id for entry in store.list_nodes().nodes} == {"n1", "n2"}
            assert store.register_node(NodeRecord("n3", "h", 1, "k", {})) > incarnation
            # And from here on the node is fenced as ever.
            assert other.declare_node_dead("n1", incarnation, "silent")
            assert store.heartbeat("n1", incarnation, LOAD) is HeartbeatAnswer.FENCED
            assert not store.restore_node(RECORD, incarnation)
            store.close()
            other.close()


def test_an_older_state_of_the_store_grants_no_token_a_second_time() -> None:
    with short_folder() as folder, running(folder / "s", unix_socket_path=folder / "sock", appendonly=True) as server:
        store = CoordinationStore.connect(server.url)
        store.serve("n1")
        store.create(1, "j-p-1", "lock", 1, Contents(tokens=1))
        tokens = [store.acquire(2, "j-p-1", "n1/p1/1", False)[1]]
        assert tokens == [1]
        shutil.copytree(folder / "s" / APPEND_ONLY_FOLDER, folder / "older")
        number = 2
        for request in range(2, 12):
            number += 2
            assert store.end_process(number, "n1/p1/")
            tokens.append(store.acquire(number + 1, "j-p-1", f"n1/p1/{request}", False)[1])
        os.kill(server.pid, signal.SIGKILL)
        wait_for(lambda: not server.is_running())
        shutil.rmtree(folder / "s" / APPEND_ONLY_FOLDER)
        (folder / "older").rename(folder / "s" / APPEND_ONLY_FOLDER)
        server.start_again()
        server.wait_ready()
        # It believes that the first holder has it still.
        assert store.acquire(100, "j-p-1", "n1/p2/1", False)[0] == 0
        assert store.end_process(101, "n1/p1/")
        for number in range(102, 110, 2):
            tokens.append(store.acquire(number, "j-p-1", f"n1/p2/{number}", False)[1])
            assert store.end_process(number + 1, "n1/p2/")
        assert tokens == sorted(set(tokens)) and len(tokens) == 15
        store.close()


# TLS: the server of the wheel is built without it, so a proxy of our own speaks it


class TlsProxy:
    """Accepts TLS, passes the bytes on to a plain port."""

    def __init__(self, certificate: Path, key: Path, target_port: int) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        for connection in self._open:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            connection.close()
        for thread in self._threads:
            thread.join(30)

    def _accept(self) -> None:
        while True:
            try:
                raw, _ = self._listener.accept()
            except OSError:
                return
            try:
                outer = self._context.wrap_socket(raw, server_side=True)
            except OSError:  # a client that does not trust us
                raw.close()
                continue
            inner = socket.create_connection(("127.0.0.1", self._target_port))
            self._open += [outer, inner]
            for source, target in ((outer, inner), (inner, outer)):
                thread = threading.Thread(target=self._pump, args=(source, target), daemon=True)
                self._threads.append(thread)
                thread.start()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for this host, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the openssl program, which makes the certificate, is not installed")
    folder = tmp_path_factory.mktemp("tls")
    command = f"{openssl} req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    names = "-addext subjectAltName=DNS:localhost,IP:127.0.0.1"
    files = f"-keyout {folder}/key.pem -out {folder}/cert.pem"
    subprocess.run(f"{command} {names} {files}".split(), check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


@pytest.fixture
def tls_port(certificate: tuple[Path, Path]) -> Iterator[int]:
    with tcp_server() as server:
        proxy = TlsProxy(*certificate, port_of(server))
        yield proxy.port
        proxy.close()


def test_tls_with_the_right_authority(tls_port: int, certificate: tuple[Path, Path]) -> None:
    url = f"rediss://127.0.0.1:{tls_port}/0?ssl_ca_certs={quote(str(certificate[0]))}"
    with connected(url, password=PASSWORD) as store:
        assert store.register_node(RECORD) == 1
        assert store.read_events(0)[0].kind == "node_joined"


def test_tls_with_an_unknown_authority_is_refused_with_advice(tls_port: int) -> None:
    with pytest.raises(NotConnected, match="ssl_ca_certs"):
        ControlStore.connect(f"rediss://127.0.0.1:{tls_port}/0", password=PASSWORD, timeout_s=0.1)


def test_plain_client_on_a_tls_port_is_not_connected(tls_port: int) -> None:
    with pytest.raises(NotConnected):
        ControlStore.connect(f"redis://127.0.0.1:{tls_port}/0", password=PASSWORD, timeout_s=0.1)


# Replicas and Sentinel


@contextmanager
def sentinel_process(folder: Path, master_port: int, port: int) -> Iterator[subprocess.Popen[bytes]]:
    config = folder / "sentinel.conf"
    password = "".join(f"\\x{byte:02x}" for byte in PASSWORD.encode())
    config.write_text(
        f'port {port}\nbind 127.0.0.1\ndir "{folder}"\n'
        f"sentinel monitor main 127.0.0.1 {master_port} 1\n"
        f'sentinel auth-pass main "{password}"\n'
        "sentinel down-after-milliseconds main 300\nsentinel failover-timeout main 3000\n"
    )
    log = (folder / "sentinel.log").open("wb")
    process = subprocess.Popen([str(find_server_binary()), str(config), "--sentinel"], stdout=log, stderr=log)
    log.close()
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def has_replica(master: ServerProcess) -> bool:
    with connected(master.url, password=PASSWORD) as store:
        return bool(store._client.execute_command("WAIT", 1, 100))


def test_changes_wait_for_a_replica() -> None:
    with tcp_server() as master:
        with connected(master.url, password=PASSWORD, replicas_min=1) as store:
            with pytest.raises(NotConnected, match="only 0 of the 1 replicas"):
                store.register_node(RECORD)
            with tcp_server(replica_of=("127.0.0.1", port_of(master))) as replica:
                wait_for(lambda: has_replica(master))
                # On a busy machine the replica's first answers may take more than the second that is waited for them.
                wait_for(lambda: accepts_job(store))
                incarnation = store.register_node(RECORD)
                with connected(replica.url, password=PASSWORD) as reader:
                    # No wait here: the acknowledgement said that it is there.
                    assert reader.list_nodes().nodes[0].incarnation == incarnation
                    assert reader.list_jobs() == {"k": b"v"}
                    with pytest.raises(NotConnected, match="address of its master"):
                        reader.register_node(RECORD)


def accepts_job(store: ControlStore) -> bool:
    try:
        store.register_job("k", b"v")
    except NotConnected:
        return False
    return True


def test_sentinel_failover_loses_nothing_and_is_noticed() -> None:
    with ExitStack() as stack:
        master = stack.enter_context(tcp_server())
        replica = stack.enter_context(tcp_server(replica_of=("127.0.0.1", port_of(master))))
        wait_for(lambda: has_replica(master))
        port = free_port()
        folder = stack.enter_context(short_folder())
        stack.enter_context(sentinel_process(folder, port_of(master), port))
        dead_sentinel = free_port()  # the first in the list does not answer, which must not matter
        url = f"redis+sentinel://127.0.0.1:{dead_sentinel},127.0.0.1:{port}/main?db=0"
        store = stack.enter_context(connected(url + "&replicas_min=1", password=PASSWORD, timeout_s=20))
        incarnation = store.register_node(RECORD)
        wait_for(lambda: f"+slave slave 127.0.0.1:{port_of(replica)}" in (folder / "sentinel.log").read_text())
        os.kill(master.pid, signal.SIGKILL)
        wait_for(lambda: accepts(store, incarnation), within_s=40)
        assert [entry.record for entry in store.list_nodes().nodes] == [RECORD]
        with pytest.raises(EventsLost, match="another server"):
            store.read_events(store.last_event_id())
        with pytest.raises(NotConnected, match="only 0 of the 1 replicas"):
            store.register_job("j1", b"{}")


def test_without_a_number_changes_wait_for_a_replica_while_there_is_one(caplog: pytest.LogCaptureFixture) -> None:
    with tcp_server() as master, connected(master.url, password=PASSWORD) as store:
        store._replicas_min, store._needs_replicas = 1, False  # as `connect` does for sentinels
        assert store.register_node(RECORD) == 1
        assert "has no replica" in caplog.text
        with tcp_server(replica_of=("127.0.0.1", port_of(master))) as replica:
            wait_for(lambda: has_replica(master))
            store._look_again_s = 0.0
            # A replica that has only just come may be late with its first confirmation.
            wait_for(lambda: is_put(store, b"v"))
            assert "has a replica again" in caplog.text
            with connected(replica.url, password=PASSWORD) as reader:
                assert reader.list_jobs() == {"k": b"v"}
            # One that is there but does not confirm is waited for.
            os.kill(replica.pid, signal.SIGSTOP)
            try:
                with pytest.raises(NotConnected, match="only 0 of the 1 replicas"):
                    store.register_job("k", b"w")
            finally:
                os.kill(replica.pid, signal.SIGCONT)


def test_everything_can_go_through_a_peer_with_sentinels_and_without(tmp_path: Path) -> None:
    with ExitStack() as stack:
        master = stack.enter_context(tcp_server())
        port = free_port()
        stack.enter_context(sentinel_process(stack.enter_context(short_folder()), port_of(master), port))
        for url in (master.url, f"redis+sentinel://127.0.0.1:{port}/main"):
            wait_for(lambda url=url: can_connect(url))  # type: ignore[misc]
            # The addresses lead nowhere from here: all bytes must go by the route.
            nowhere = url.replace(f":{port}/", ":1/").replace(f":{port_of(master)}/", ":1/")
            route = Relayed(lambda url=url: connect_to_server(url))  # type: ignore[misc]
            with connected(nowhere, password=PASSWORD, route=route) as store:
                store.register_job("k", b"v")
                assert store.list_jobs() == {"k": b"v"}
                assert route.dialed == 1


class Relayed:
    is_relayed = True

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        self._connect = connect
        self.dialed = 0

    def dial(self) -> socket.socket:
        self.dialed += 1
        return self._connect()


def is_put(store: ControlStore, value: bytes) -> bool:
    try:
        store.register_job("k", value)
    except NotConnected:
        return False
    return True


def can_connect(url: str) -> bool:
    try:
        ControlStore.connect(url, password=PASSWORD, timeout_s=0).close()
    except NotConnected:
        return False
    return True


def test_tls_goes_end_to_end_through_a_peer(tls_port: int, certificate: tuple[Path, Path]) -> None:
    url = f"rediss://127.0.0.1:{tls_port}/0"
    route = Relayed(lambda: connect_to_server(url))
    nowhere = f"rediss://127.0.0.1:1/0?ssl_ca_certs={quote(str(certificate[0]))}"
    with connected(nowhere, password=PASSWORD, route=route) as store:
        store.register_job("k", b"v")
        assert store.list_jobs() == {"k": b"v"}
    assert route.dialed == 1


def accepts(store: ControlStore, incarnation: int) -> bool:
    try:
        return store.heartbeat("n1", incarnation, LOAD) is HeartbeatAnswer.ACCEPTED
    except NotConnected:
        return False


def test_unknown_sentinel_service_is_told() -> None:
    with ExitStack() as stack:
        master = stack.enter_context(tcp_server())
        port = free_port()
        stack.enter_context(sentinel_process(stack.enter_context(short_folder()), port_of(master), port))
        url = f"redis+sentinel://127.0.0.1:{port}/other"
        with pytest.raises(NotConnected, match="no sentinel in the list knows"):
            ControlStore.connect(url, password=PASSWORD, timeout_s=0.5)


def test_a_store_that_was_set_back_to_an_older_state_fences_nobody_and_gives_no_number_twice() -> None:
    with embedded_server() as server, connected(server.url) as store:
        keys = store.keys
        store.register_node(RECORD)
        tables = (keys.node_incarnations, keys.incarnation, keys.nodes, keys.node_heartbeats, keys.generation)
        backup = [(key, store._client.dump(key)) for key in tables]
        incarnation = store.register_node(RECORD)
        for key, content in backup:
            store._client.restore(key, 0, content, replace=True)
        assert store.heartbeat("n1", incarnation, LOAD) is HeartbeatAnswer.FORGOTTEN
        assert store.restore_node(RECORD, incarnation)
        assert store.heartbeat("n1", incarnation, LOAD) is HeartbeatAnswer.ACCEPTED
        assert not store.restore_node(RECORD, incarnation - 1), "a former life is fenced all the same"
        assert store.register_node(RECORD, above=incarnation + 5) == incarnation + 6
        assert store.register_node(RECORD, above=2) == incarnation + 7
