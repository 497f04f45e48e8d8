"""Connections, pipes and listeners: the standard library's, which can be used and sent anywhere in the cluster.

A `Connection` is the standard one, on a descriptor of this host. What is added: it can be pickled at any time, into
tasks, queues, processes and other connections; its node keeps a duplicate until it is unpickled (in a task, a function
or an initializer: for as long as that may be loaded again), and joins the two by a tunnel if that is on another node
(client/descriptors.py). A `Listener` without an address is found by its own, such as
"clusterpool://n0123456789/j0123456789.abcdef", from every node.

Source: https://docs.python.org/3/library/multiprocessing.html#module-multiprocessing.connection
"""

from __future__ import annotations

import errno
import io
import multiprocessing.connection as standard
import os
import socket
from multiprocessing import util
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import TYPE_CHECKING, Any

from clusterpool.serialization import references
from clusterpool.serialization.functions import ShippingPickler, set_reducers

if TYPE_CHECKING:
    from clusterpool.client.descriptors import Ticket

__all__ = ["Client", "Listener", "Pipe", "wait"]

FAMILY = "AF_CLUSTER"
ADDRESS_PREFIX = "clusterpool://"

# As in the standard module: what a listener gets that is told neither an address nor a family.
default_family = FAMILY
families: list[str] = standard.families  # type: ignore[attr-defined]
wait = standard.wait


def __getattr__(name: str) -> Any:
    """All that is the same here as there."""
    return getattr(standard, name)


# --- connections ----------------------------------------------------------------------------------------------------


class Connection(standard.Connection):
    """One end of a pipe or of a connection to a listener."""

    def send(self, obj: Any) -> None:
        """Send an object; it is pickled as arguments of tasks are, so functions and classes of `__main__` may go."""
        self._check_closed()  # type: ignore[attr-defined]
        self._check_writable()  # type: ignore[attr-defined]
        self._send_bytes(_dumps(obj))  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild_connection, (reduce_descriptor(self.fileno()), self.readable, self.writable)


def Pipe(duplex: bool = True) -> tuple[Connection, Connection]:  # noqa: N802 (the standard library's name)
    """Two connected connections; the first can only receive and the second only send unless `duplex`."""
    first, second = standard.Pipe(duplex)
    return _own(first), _own(second)


def _own(connection: Any) -> Connection:
    """A connection of ours in the place of a standard one, whose descriptor it takes over."""
    if isinstance(connection, Connection):
        return connection
    owned = Connection(connection.fileno(), connection.readable, connection.writable)
    connection._handle = None
    return owned


# --- pickling -------------------------------------------------------------------------------------------------------


class ParkedDescriptor:
    """A descriptor on its way; it can be had once, as the standard `DupFd`, or as often as its payload is loaded."""

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket

    def detach(self) -> int:
        """The descriptor; the caller closes it. Raises: OSError when it was taken before, or is gone."""
        from clusterpool.client import descriptors

        return descriptors.fetch(self._ticket)


def reduce_descriptor(fd: int) -> Any:
    """Something that can be pickled and whose `detach()` gives a duplicate of `fd`, wherever it is called."""
    if get_spawning_popen() is not None:
        return DupFd(fd)  # as the process that is being started wants it: one of the standard library has no cluster
    from clusterpool.client import descriptors

    kept = references.keeper()
    if kept is None:
        return ParkedDescriptor(descriptors.park(fd))
    # A task may be run again, a function is loaded by several workers: whoever pickles says how long that may happen.
    lease = descriptors.lease(fd)
    kept.append(lease)
    return ParkedDescriptor(lease.ticket)


def reduce_connection(connection: Any) -> tuple[Any, ...]:
    """As `copyreg` wants it, for standard connections too."""
    return rebuild_connection, (reduce_descriptor(connection.fileno()), connection.readable, connection.writable)


def rebuild_connection(descriptor: Any, readable: bool, writable: bool) -> Connection:
    """Named in pickles."""
    return Connection(descriptor.detach(), readable, writable)


def _reduce_socket(sock: socket.socket) -> tuple[Any, ...]:
    return _rebuild_socket, (reduce_descriptor(sock.fileno()),)


def _rebuild_socket(descriptor: Any) -> socket.socket:
    # Which family it is, is read from the descriptor: a socket that came through a tunnel is another than was sent.
    return socket.socket(fileno=descriptor.detach())


# The standard library's reducers take descriptors no farther than this host, and once.
_OF_CLUSTER: dict[type, Any] = {socket.socket: _reduce_socket, standard.Connection: reduce_connection}
set_reducers(_OF_CLUSTER)


class _Reducers:
    """The pickler's table with ours; copied anew when another one was registered somewhere."""

    base: dict[Any, Any] | None = None
    registered_count = -1
    merged: dict[Any, Any] = {}


def _dumps(obj: Any) -> bytes:
    # Buffers stay in the stream, so that a process of the standard library can read it, too.
    with io.BytesIO() as file, references.capture_references() as captured:
        pickler = ShippingPickler(file, None)
        registered: dict[Any, Any] = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
        base: dict[Any, Any] = pickler.dispatch_table
        if _Reducers.base is not base or _Reducers.registered_count != len(registered):
            _Reducers.merged = {**base, **registered, **_OF_CLUSTER}
            _Reducers.base, _Reducers.registered_count = base, len(registered)
        pickler.dispatch_table = _Reducers.merged
        pickler.dump(obj)
        payload = file.getvalue()
    for reference in captured:
        references.capture(reference)  # outside the block: nobody can know when they arrive
    return payload


# --- listeners ------------------------------------------------------------------------------------------------------


class _ClusterListener:
    """What the standard `Listener` expects of a listening socket."""

    def __init__(self, address: str | None, backlog: int) -> None:
        from clusterpool.client import api, descriptors

        name = None
        if address is not None:
            node_id, name = parse_address(address)
            if node_id != api.connect().address.node_id:
                raise OSError(errno.EADDRNOTAVAIL, f"{address!r} is an address of another node")
        listening = descriptors.listen(backlog, name)
        self._socket = listening.socket
        self._address = f"{ADDRESS_PREFIX}{listening.node_id}/{listening.name}"
        self._last_accepted = None
        self._unlink: Any = util.Finalize(self, _unlink, args=(str(listening.path),), exitpriority=0)

    def accept(self) -> Connection:
        sock, _ = self._socket.accept()
        sock.setblocking(True)
        return Connection(sock.detach())

    def close(self) -> None:
        try:
            self._socket.close()
        finally:
            unlink, self._unlink = self._unlink, None
            if unlink is not None:
                unlink()


def _unlink(path: str) -> None:
    try:
        os.unlink(path)  # noqa: PTH108 (pathlib may be gone when the interpreter ends)
    except OSError:
        pass  # the job's end removes it as well


class Listener(standard.Listener):
    """The standard listener. Without address and family, one that is reached from every node of the cluster."""

    def __init__(
        self, address: Any = None, family: str | None = None, backlog: int = 1, authkey: bytes | None = None
    ) -> None:
        is_of_cluster = is_cluster_address(address) if address else family in (None, FAMILY)
        if not is_of_cluster:
            super().__init__(address, family, backlog, authkey)
            return
        if family not in (None, FAMILY):
            raise ValueError(f"address {address!r} is not one of family {family}")
        _check_authkey(authkey)
        self._listener = _ClusterListener(address or None, backlog)
        self._authkey = authkey

    def accept(self) -> Connection:
        return _own(super().accept())


def Client(address: Any, family: str | None = None, authkey: bytes | None = None) -> Connection:  # noqa: N802
    """A connection to the listener at `address`."""
    if not is_cluster_address(address):
        return _own(standard.Client(address, family, authkey))
    _check_authkey(authkey)
    connection = Connection(_connect(address).detach())
    if authkey is not None:
        standard.answer_challenge(connection, authkey)
        standard.deliver_challenge(connection, authkey)
    return connection


def is_cluster_address(address: Any) -> bool:
    """Whether it is one of a listener of a cluster's."""
    return isinstance(address, str) and address.startswith(ADDRESS_PREFIX)


def parse_address(address: str) -> tuple[str, str]:
    """Node id and name. Raises: ValueError."""
    node_id, slash, name = address.removeprefix(ADDRESS_PREFIX).partition("/")
    if not (node_id and slash and name):
        raise ValueError(f"not the address of a listener: {address!r}")
    return node_id, name


def _connect(address: str) -> socket.socket:
    from clusterpool.client import api, bootstrap, descriptors
    from clusterpool.errors import NotConnected

    node_id, name = parse_address(address)
    try:
        # A proxy that is collected after `shutdown` must not start a cluster of its own.
        if not api.is_initialized() and bootstrap.find_address(None) is None:
            raise NotConnected("this process is not connected to a cluster")
        return descriptors.connect(node_id, name)
    except NotConnected as exc:
        raise ConnectionRefusedError(errno.ECONNREFUSED, f"{address} cannot be reached: {exc}") from exc


def _check_authkey(authkey: Any) -> None:
    if authkey is not None and not isinstance(authkey, bytes):
        raise TypeError("authkey should be a byte string")


# --- serialization by XML-RPC ---------------------------------------------------------------------------------------


class XmlListener(Listener):
    """Its connections carry what XML-RPC can express."""

    def accept(self) -> Any:
        return _with_xml(super().accept())


def XmlClient(*args: Any, **options: Any) -> Any:  # noqa: N802
    """A client of an `XmlListener`."""
    return _with_xml(Client(*args, **options))


def _with_xml(connection: Connection) -> Any:
    import xmlrpc.client

    module: Any = standard
    module.xmlrpclib = xmlrpc.client  # the standard functions find it there, as if their own listener had been used
    return module.ConnectionWrapper(connection, module._xml_dumps, module._xml_loads)
