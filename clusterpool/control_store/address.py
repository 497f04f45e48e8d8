"""The addresses that a control store can have, and a redis-py client for each; its errors become ours.

    redis://[user:password@]host:port/db        rediss://...?ssl_ca_certs=/path/ca.pem   (TLS)
    unix:///path/to/socket?db=0                 redis+sentinel://host:port,host:port/service?db=0
                                                rediss+sentinel://...                    (TLS to both)

The options of redis-py's own URLs may stand in the query (ssl_ca_certs, ssl_certfile, ssl_keyfile,
ssl_cert_reqs, ssl_check_hostname, socket_timeout, db); of Sentinel also sentinel_username and
sentinel_password. `replicas_min=N` is our own: each change is acknowledged only once N replicas have it.
Without it, changes wait for one replica where the address is of sentinels, as long as there is one.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from urllib.parse import parse_qs, urlencode, urlsplit

from clusterpool.errors import AuthenticationFailed, ClusterpoolError, NotConnected, ProtocolError, StoreFull

CONNECT_TIMEOUT_S = 2.0
# The longest that a server that accepted a command may take. A blocked read must wait for less than this.
ANSWER_TIMEOUT_S = 5.0
# Four more attempts within about 0.4 s: enough for a restarted connection, short of a node's grace in
# membership.
RETRIES = 4
# An idle connection is tried before it is used, because a firewall may have dropped it silently.
HEALTH_CHECK_S = 15
SENTINEL_PORT = 26379
SERVER_PORT = 6379
_CROWDED = "max number of clients"
_SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")


class Route(Protocol):
    """Another way to the server than the one that the address names."""

    @property
    def is_relayed(self) -> bool:
        """Whether new connections go this way."""

    def dial(self) -> socket.socket:
        """A connection whose bytes go to the server, or to the master that sentinels know.

        Raises: OSError.
        """


def open_client(
    url: str,
    *,
    username: str | None = None,
    password: str | None = None,
    on_connect: Callable[[Any], None] | None = None,
    answer_timeout_s: float = ANSWER_TIMEOUT_S,
    route: Route | None = None,
) -> Any:
    """A redis-py client that connects at its first command. A user or password in the URL wins.

    `on_connect(connection)` is called for each new connection to the server, once it is authenticated. A connection
    that breaks is made anew, and the command sent again, a few times; a server that does not answer fails at once,
    because the timeout was patience enough.

    Raises: ValueError when the URL is none of the forms above.
    """
    import redis
    from redis.backoff import ExponentialBackoff
    from redis.retry import Retry

    scheme = check_url(url)
    url, _ = split_replicas_min(url)
    options: dict[str, Any] = {
        "protocol": 2,  # the answers of RESP3 have other shapes
        "socket_timeout": answer_timeout_s,
        # Connecting is tried as often within each of these tries: with timeouts among them a server that hangs would
        # hold its callers up for minutes.
        "retry": Retry(ExponentialBackoff(cap=0.2, base=0.02), RETRIES, supported_errors=_worth_another_try(redis)),
        "retry_on_error": list(_worth_another_try(redis)),
        "health_check_interval": HEALTH_CHECK_S,
    }
    if username is not None:
        options["username"] = username
    if password is not None:
        options["password"] = password
    if on_connect is not None:
        options["redis_connect_func"] = _after_connect(on_connect)
    if scheme != "unix":
        options["socket_connect_timeout"] = CONNECT_TIMEOUT_S
        options["socket_keepalive"] = True
    if scheme.endswith("+sentinel"):
        return _open_sentinel_client(url, options, route)
    if route is None or scheme == "unix":
        return redis.Redis.from_url(url, **options)
    bases = (redis.SSLConnection, redis.Connection) if scheme == "rediss" else (redis.Connection,)
    options["connection_class"] = _routed(bases, route)
    return redis.Redis(connection_pool=redis.ConnectionPool.from_url(url, **options))


def connect_to_server(url: str, *, timeout_s: float = CONNECT_TIMEOUT_S) -> socket.socket:
    """A connection to the server (to the master) on which nothing was said yet, for others to use.

    Raises: OSError; NotConnected when no sentinel knows the master.
    """
    parts = urlsplit(url)
    if parts.scheme == "unix":
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(parts.path)
        return connection
    if parts.scheme.endswith("+sentinel"):
        with errors_mapped(redacted(url)):
            address = open_client(url).connection_pool.get_master_address()
    else:
        address = (parts.hostname or "localhost", parts.port or SERVER_PORT)
    connection = socket.create_connection(address, timeout_s)
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return connection


def _routed(bases: tuple[Any, ...], route: Route) -> Any:
    """The class of connections `bases[0]`, whose bytes go by the route where that says so.

    bases: it, and the class it is derived from whose `_connect` makes the socket (TLS then wraps what it makes).
    """

    base: Any = bases[-1]

    class Routed(base):  # type: ignore[misc]
        def _connect(self) -> socket.socket:
            if not route.is_relayed:
                direct: socket.socket = super()._connect()
                return direct
            connection = route.dial()
            connection.settimeout(self.socket_timeout)
            return connection

    return Routed if len(bases) == 1 else type("RoutedTls", (bases[0], Routed), {})


def _worth_another_try(redis: Any) -> tuple[type[Exception], ...]:
    return redis.ConnectionError, redis.BusyLoadingError


def check_url(url: str) -> str:
    """The scheme of the URL.

    Raises: ValueError, with the forms that are understood.
    """
    parts = urlsplit(url)
    is_complete = bool(parts.path) if parts.scheme == "unix" else bool(parts.netloc)
    if parts.scheme.endswith("+sentinel"):
        is_complete = is_complete and bool(parts.path.strip("/"))
    if parts.scheme not in _SCHEMES or not is_complete:
        raise ValueError(
            f"{redacted(url)!r} is no address of a control store: give redis://host:port, rediss://host:port "
            "(TLS), unix:///path/to/socket or redis+sentinel://host:port,host:port/service_name"
        )
    return parts.scheme


def split_replicas_min(url: str) -> tuple[str, int | None]:
    """The URL without our own option, and the option.

    Raises: ValueError when it is no number.
    """
    found = re.search(r"([?&])replicas_min=([^&#]*)(&|(?=#|$))", url)
    if found is None:
        return url, None
    if not found[2].isdecimal():
        raise ValueError(f"replicas_min in the address of the control store is a number, not {found[2]!r}")
    return url[: found.start()] + (found[1] if found[3] else "") + url[found.end() :], int(found[2])


def redacted(url: str) -> str:
    """The URL without its passwords, for messages and logs."""
    url = re.sub(r"(?<=://)([^/@?#]*?):[^/?#]*@", r"\1:***@", url)
    return re.sub(r"((?:^|[?&])(?:sentinel_)?password=)[^&#]*", r"\1***", url)


def _after_connect(on_connect: Callable[[Any], None]) -> Callable[[Any], None]:
    def connected(connection: Any) -> None:
        # A fresh connection needs no health check. Where one is refused for want of a password, redis-py
        # connects anew, checks again, and never ends. Old releases compare with the wall clock, new ones
        # with the monotonic one, which is behind; the first answer sets it right.
        connection.next_health_check = time.time() + HEALTH_CHECK_S
        connection.on_connect()  # redis-py leaves authentication to this function when it is given one
        on_connect(connection)

    return connected


def _open_sentinel_client(url: str, options: dict[str, Any], route: Route | None) -> Any:
    import redis.connection
    import redis.sentinel

    parse_url: Any = redis.connection.parse_url
    managed: Any = redis.sentinel.SentinelManagedConnection
    managed_tls: Any = redis.sentinel.SentinelManagedSSLConnection

    sentinel_class: Any = redis.sentinel.Sentinel

    class Sentinel(sentinel_class):  # type: ignore[misc]
        def discover_master(self, service_name: str) -> Any:
            # Who passes us on asks the sentinels, which we may be unable to reach as well.
            is_relayed = route is not None and route.is_relayed
            return ("localhost", 0) if is_relayed else super().discover_master(service_name)

    parts = urlsplit(url)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    credentials = {
        name.removeprefix("sentinel_"): query.pop(name)
        for name in ("sentinel_username", "sentinel_password")
        if name in query
    }
    user, at, hosts = parts.netloc.rpartition("@")
    service, _, database = parts.path.strip("/").partition("/")
    is_tls = parts.scheme.startswith("rediss")
    # redis-py does not know this scheme, but knows every option: let it read them from a URL that it does
    # know.
    plain_url = f"{'rediss' if is_tls else 'redis'}://{user}{at}localhost/{database}?{urlencode(query)}"
    options.update(parse_url(plain_url))
    for name in ("host", "port", "connection_class"):
        options.pop(name, None)
    if is_tls:
        options["ssl"] = True
    shared = {name: value for name, value in options.items() if name.startswith(("ssl", "socket_"))}
    if route is not None:
        options["connection_class"] = _routed((managed_tls, managed) if is_tls else (managed,), route)
    sentinel: Any = Sentinel(
        [_host_and_port(host) for host in hosts.split(",")],
        # A sentinel that is gone must not hold us up: the next one in the list is asked.
        sentinel_kwargs={**shared, **credentials, "protocol": 2, "socket_timeout": CONNECT_TIMEOUT_S},
    )
    return sentinel.master_for(service, **options)


def _host_and_port(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError(f"{text!r} is no host:port of a sentinel")
    return parts.hostname, parts.port or SENTINEL_PORT


@contextmanager
def errors_mapped(where: str) -> Iterator[None]:
    """Raise redis-py's errors as ours. `where`: the store's address, without passwords."""
    import redis

    try:
        yield
    except (
        redis.AuthenticationError,
        redis.exceptions.AuthorizationError,
        redis.exceptions.NoPermissionError,
    ) as exc:
        raise AuthenticationFailed(
            f"the control store at {where} refused our password or user ({exc}); give the one with which the "
            "cluster was started, in the address (redis://:password@host:port) or as the password"
        ) from exc
    except redis.exceptions.OutOfMemoryError as exc:
        raise StoreFull(
            f"the control store at {where} reached its maxmemory ({exc}); raise the limit of that server, or "
            "remove what other programs keep there"
        ) from exc
    except (redis.ConnectionError, redis.TimeoutError, redis.exceptions.ReadOnlyError, OSError) as exc:
        raise NotConnected(f"the control store at {where} did not answer: {exc}; {_remedy(exc)}") from exc
    except redis.ResponseError as exc:
        raise _response_error(where, exc) from exc


def had_no_answer(error: ClusterpoolError) -> bool:
    """Whether the server, or the network, was silent until the patience ran out, rather than refused us."""
    import redis

    return isinstance(error.__cause__, redis.TimeoutError)


def has_refused(error: ClusterpoolError) -> bool:
    """Whether the server has answered, and will not do it now: it is full, cannot write, or has no place for us."""
    import redis

    is_crowded = _CROWDED in str(error.__cause__)
    return (
        is_crowded
        or isinstance(error, (StoreFull, AuthenticationFailed))
        or isinstance(error.__cause__, (redis.ResponseError, redis.BusyLoadingError))
    )


def _response_error(where: str, exc: Exception) -> Exception:
    text = str(exc)
    if text.startswith(("NOAUTH", "WRONGPASS", "NOPERM")):
        return AuthenticationFailed(f"the control store at {where} refused us: {text}; check user and password")
    if text.startswith(("MISCONF", "NOREPLICAS", "MASTERDOWN", "CLUSTERDOWN", "LOADING", "TRYAGAIN", "UNBLOCKED")):
        return NotConnected(f"the control store at {where} cannot serve us now: {text}")
    return ProtocolError(
        f"the control store at {where} did not understand us: {text}; it must be Redis 6.2 or later, or "
        "Valkey, and no other program may write keys that begin with 'clusterpool:'"
    )


def _remedy(exc: Exception) -> str:
    text = str(exc)
    if "CERTIFICATE_VERIFY_FAILED" in text or "certificate verify failed" in text:
        return "its certificate is not trusted here: add ?ssl_ca_certs=/path/to/ca.pem to the address"
    if "No master found" in text:
        return "no sentinel in the list knows a living master of that name: check the name, and the sentinels"
    if "loading" in text:
        return "it reads its data from disk after a start, which may take minutes if it has much"
    if _CROWDED in text:
        return "raise the maxclients of that server (a node needs about five connections), or find out who has them all"
    if "read only replica" in text:
        return "that server is a replica: give the address of its master, or of the sentinels"
    return "is the server running, and does the address lead to it from this host?"
