"""Connections that are sent about, and listeners of the cluster."""

from __future__ import annotations

import multiprocessing.connection as standard
import os
import pickle
import socket
import threading
from collections.abc import Callable
from multiprocessing import AuthenticationError, BufferTooShort
from pathlib import Path
from typing import Any

import pytest

import clusterpool
from clusterpool.multiprocessing import connection
from tests.client.engine import wait_for

pytestmark = pytest.mark.usefixtures("cluster")


def in_thread(function: Callable[[], Any]) -> Callable[[], Any]:
    """Start it; what is returned waits for its result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()

    def wait() -> Any:
        thread.join(20)
        return results[0]

    return wait


def upper_all(ends: connection.Connection) -> int:
    """Answers each text, to the end; how many there were."""
    count = 0
    while True:
        try:
            ends.send(ends.recv().upper())
        except EOFError:
            return count
        count += 1


def test_an_end_of_a_pipe_can_be_a_tasks_argument() -> None:
    ours, theirs = connection.Pipe()
    count = clusterpool.remote(upper_all).remote(theirs)
    theirs.close()
    for text in ("one", "two"):
        ours.send(text)
        assert ours.recv() == text.upper()
    ours.close()
    assert clusterpool.get(count, timeout=20) == 2


def test_an_end_of_a_pipe_can_be_a_tasks_result_and_outlives_its_worker() -> None:
    def make() -> connection.Connection:
        first, second = connection.Pipe(duplex=False)
        second.send(os.getpid())
        second.close()
        return first

    with clusterpool.Pool(1) as pool:
        end = pool.apply(make)
    with end:
        assert end.recv() != os.getpid()
        with pytest.raises(EOFError):
            end.recv()


def test_an_end_of_a_pipe_can_be_sent_through_another_pipe_with_what_is_in_it() -> None:
    ours, theirs = connection.Pipe()
    inner_ours, inner_theirs = connection.Pipe(duplex=False)
    inner_theirs.send("sent before")
    ours.send([inner_ours, inner_theirs])
    inner_ours.close()
    inner_theirs.close()
    reading, writing = theirs.recv()
    assert (reading.readable, reading.writable, writing.readable, writing.writable) == (True, False, False, True)
    writing.send("sent after")
    assert [reading.recv(), reading.recv()] == ["sent before", "sent after"]
    for end in (ours, theirs, reading, writing):
        end.close()


def test_a_pickled_end_can_be_loaded_once() -> None:
    ours, theirs = connection.Pipe()
    pickled = pickle.dumps(theirs)
    theirs.close()
    with pickle.loads(pickled) as loaded, ours:
        loaded.send("x")
        assert ours.recv() == "x"
    with pytest.raises(FileNotFoundError, match="fetched before"):
        pickle.loads(pickled)


def test_a_closed_connection_cannot_be_pickled() -> None:
    ours, theirs = connection.Pipe()
    ours.close()
    theirs.close()
    with pytest.raises(OSError, match="handle is closed"):
        pickle.dumps(ours)


def test_sockets_and_standard_connections_can_be_sent() -> None:
    ours, theirs = connection.Pipe()
    near, far = socket.socketpair()
    first, second = standard.Pipe()
    ours.send((far, second))
    far.close()
    second.close()
    arrived, arrived_connection = theirs.recv()
    with near, arrived, first, arrived_connection:
        arrived.sendall(b"x")
        assert near.recv(10) == b"x"
        arrived_connection.send("y")
        assert first.recv() == "y"
    ours.close()
    theirs.close()


def test_functions_of_the_program_can_be_sent_and_the_standard_library_reads_what_is_sent() -> None:
    ours, theirs = connection.Pipe()
    number = 3
    ours.send(lambda x: x + number)
    assert theirs.recv()(4) == 7
    large = [bytes(200_000), {"a": (1, 2.5)}]
    sent = in_thread(lambda: ours.send(large))
    plain = standard.Connection(os.dup(theirs.fileno()))
    assert plain.recv() == large
    sent()
    for end in (ours, theirs, plain):
        end.close()


def test_errors_are_the_standard_ones() -> None:
    reading, writing = connection.Pipe(duplex=False)
    with pytest.raises(OSError, match="connection is write-only"):
        writing.recv()
    with pytest.raises(OSError, match="connection is read-only"):
        reading.send(1)
    writing.send_bytes(b"longer than that")
    with pytest.raises(BufferTooShort) as caught:
        reading.recv_bytes_into(bytearray(3))
    assert caught.value.args == (b"longer than that",)
    reading.close()
    with pytest.raises(BrokenPipeError):
        writing.send(1)
    writing.close()


def test_wait_sees_ends_of_both_libraries() -> None:
    ours, theirs = connection.Pipe()
    first, second = standard.Pipe()
    second.send(1)
    assert connection.wait([ours, first], 5) == [first]
    theirs.send(1)
    assert set(connection.wait([ours, first], 5)) == {ours, first}
    for end in (ours, theirs, first, second):
        end.close()


# --- listeners


def greet(address: str, authkey: bytes | None) -> Any:
    """What the listener there says to us."""
    with connection.Client(address, authkey=authkey) as client:
        client.send(os.getpid())
        return client.recv()


@pytest.mark.parametrize("family", [None, "AF_CLUSTER", "AF_UNIX", "AF_INET"])
@pytest.mark.parametrize("authkey", [None, b"secret"])
def test_a_listener_is_reached_from_a_task(family: str | None, authkey: bytes | None) -> None:
    with connection.Listener(family=family, authkey=authkey) as listener:
        assert str(listener.address).startswith("clusterpool://") == (family in (None, "AF_CLUSTER"))
        greeting = clusterpool.remote(greet).remote(listener.address, authkey)
        with listener.accept() as accepted:
            assert type(accepted) is connection.Connection
            accepted.send(("hello", accepted.recv()))
            word, pid = clusterpool.get(greeting, timeout=20)
    assert word == "hello"
    assert pid != os.getpid()


def test_a_wrong_key_is_refused_on_both_sides() -> None:
    with connection.Listener(authkey=b"right") as listener:

        def accept() -> str:
            try:
                listener.accept()
            except AuthenticationError as exc:
                return str(exc)
            return "accepted"

        accepted = in_thread(accept)
        with pytest.raises(AuthenticationError):
            connection.Client(listener.address, authkey=b"wrong")
        assert "digest received was wrong" in accepted()


def test_an_authkey_that_is_no_bytes_is_refused() -> None:
    with pytest.raises(TypeError, match="authkey should be a byte string"):
        connection.Listener(authkey="text")  # type: ignore[arg-type]


def test_a_closed_listener_refuses_and_leaves_no_file() -> None:
    listener = connection.Listener()
    path = Path(listener._listener._unlink._args[0])
    assert path.exists()
    with pytest.raises(OSError):
        connection.Listener(listener.address)
    address = listener.address
    listener.close()
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        connection.Client(address)
    with connection.Listener(address) as again:  # as a manager that is started again does
        assert again.address == address


@pytest.mark.parametrize("address", ["clusterpool://", "clusterpool://n1", "clusterpool:///name"])
def test_half_an_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="not the address of a listener"):
        connection.Client(address)


def test_an_address_cannot_lead_out_of_the_nodes_folder() -> None:
    with pytest.raises(FileNotFoundError):
        connection.Client(f"clusterpool://{clusterpool.node_id()}/../node.sock")


def test_a_node_that_is_not_there_refuses() -> None:
    with pytest.raises(OSError, match="gone"):
        connection.Client("clusterpool://n0123456789/j1.abc")


def test_what_a_job_leaves_at_its_node_goes_with_it() -> None:
    """Another driver parks a descriptor and listens, and ends without a word."""
    from clusterpool.client import api

    registered = api.connect().registered
    assert registered is not None
    folder = Path(registered.processes_folder).parent
    reading, writing = os.pipe()
    script = """
        import os, sys
        import clusterpool
        from clusterpool.client import descriptors
        from clusterpool.multiprocessing import connection
        clusterpool.init(address=sys.argv[1])
        descriptors.park(int(sys.argv[2]))
        listener = connection.Listener()
        descriptors.channel(listener.address.partition("/")[2] and "jx-d1-1")
        print(listener.address, flush=True)
        os._exit(0)
    """
    import subprocess
    import sys
    import textwrap

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(folder), str(writing)],
        capture_output=True, text=True, pass_fds=[writing], timeout=50, check=True,
    )  # fmt: skip
    os.close(writing)
    _, _, name = done.stdout.strip().rpartition("/")
    assert name
    os.set_blocking(reading, False)

    def is_at_end() -> bool:
        try:
            return os.read(reading, 1) == b""
        except BlockingIOError:
            return False

    assert wait_for(is_at_end)
    assert wait_for(lambda: not (folder / "l" / name).exists())
    os.close(reading)
