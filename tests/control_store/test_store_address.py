"""Addresses of control stores, and what errors say."""

from __future__ import annotations

import pytest
import redis

from clusterpool.control_store.address import (
    check_url,
    errors_mapped,
    has_refused,
    open_client,
    redacted,
    split_replicas_min,
)
from clusterpool.errors import AuthenticationFailed, ClusterpoolError, NotConnected, ProtocolError, StoreFull


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://:pass@h:1", "redis://:***@h:1"),
        ("rediss://user:p%40ss@h:1/2?db=1", "rediss://user:***@h:1/2?db=1"),
        ("unix:///tmp/s.sock?db=1&password=secret", "unix:///tmp/s.sock?db=1&password=***"),
        (
            "redis+sentinel://u:secret@a:1,b:2/s?sentinel_password=x&db=0",
            "redis+sentinel://u:***@a:1,b:2/s?sentinel_password=***&db=0",
        ),
    ],
)
def test_passwords_are_not_shown(url: str, expected: str) -> None:
    assert redacted(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        "http://h:1",
        "redis://",
        "unix://",
        "redis+sentinel://h:1",
        "redis+sentinel:///service",
    ],
)
def test_what_is_no_address_is_refused_with_the_forms(url: str) -> None:
    with pytest.raises(ValueError, match=r"redis\+sentinel://host:port"):
        check_url(url)


def test_refusal_does_not_show_the_password() -> None:
    with pytest.raises(ValueError) as caught:
        check_url("ftp://user:secret@host")
    assert "secret" not in str(caught.value)


def connection_options(url: str, **options: str) -> dict[str, object]:
    with open_client(url, **options) as client:
        return dict(client.connection_pool.connection_kwargs)


def test_password_in_the_address_wins_over_the_argument() -> None:
    assert connection_options("redis://h:1", password="argument")["password"] == "argument"
    assert connection_options("redis://:in-url@h:1", password="argument")["password"] == "in-url"


def test_tls_options_of_the_address_reach_the_client() -> None:
    options = connection_options("rediss://h:7?ssl_ca_certs=/ca.pem&ssl_check_hostname=false&socket_timeout=9")
    assert (options["host"], options["port"], options["ssl_ca_certs"]) == ("h", 7, "/ca.pem")
    assert options["ssl_check_hostname"] is False
    assert options["socket_timeout"] == 9


def test_sentinel_address_is_read_whole() -> None:
    url = "rediss+sentinel://me:p%40ss@a:1,[::1]:2,c/main?db=3&ssl_ca_certs=/ca.pem&sentinel_password=sp"
    with open_client(url) as client:
        pool = client.connection_pool
        options = pool.connection_kwargs
        assert pool.service_name == "main"
        assert (options["username"], options["password"], options["db"]) == ("me", "p@ss", 3)
        sentinels = [sentinel.connection_pool.connection_kwargs for sentinel in pool.sentinel_manager.sentinels]
        assert [(one["host"], one["port"]) for one in sentinels] == [("a", 1), ("::1", 2), ("c", 26379)]
        assert {one["password"] for one in sentinels} == {"sp"}
        assert {one["ssl_ca_certs"] for one in sentinels} == {"/ca.pem"}
        assert "Sentinel" in pool.connection_class.__name__
        assert "SSL" in pool.connection_class.__name__


@pytest.mark.parametrize(
    ("url", "rest", "replicas"),
    [
        ("redis://h:1/0", "redis://h:1/0", None),
        ("redis://h:1/0?replicas_min=2", "redis://h:1/0", 2),
        ("redis://h:1/0?replicas_min=0&db=3", "redis://h:1/0?db=3", 0),
        ("redis://h:1/0?db=3&replicas_min=1", "redis://h:1/0?db=3", 1),
        ("redis://h:1/0?db=3&replicas_min=1&ssl=1", "redis://h:1/0?db=3&ssl=1", 1),
    ],
)
def test_number_of_replicas_is_taken_out_of_the_address(url: str, rest: str, replicas: int | None) -> None:
    assert split_replicas_min(url) == (rest, replicas)


def test_number_of_replicas_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="replicas_min"):
        open_client("redis://h:1/0?replicas_min=many")


@pytest.mark.parametrize(
    ("foreign", "ours", "advice"),
    [
        (redis.AuthenticationError("invalid password"), AuthenticationFailed, "give the one"),
        (redis.exceptions.NoPermissionError("no"), AuthenticationFailed, "password or user"),
        (redis.ResponseError("NOAUTH Authentication required."), AuthenticationFailed, "check user"),
        (redis.ConnectionError("refused"), NotConnected, "is the server running"),
        (redis.TimeoutError("slow"), NotConnected, "is the server running"),
        (ConnectionResetError("reset"), NotConnected, "is the server running"),
        (redis.ConnectionError("[SSL: CERTIFICATE_VERIFY_FAILED] x"), NotConnected, "ssl_ca_certs"),
        (redis.sentinel.MasterNotFoundError("No master found for 'x'"), NotConnected, "sentinel"),
        (
            redis.exceptions.ReadOnlyError("You can't write against a read only replica."),
            NotConnected,
            "master",
        ),
        (redis.ResponseError("MISCONF cannot save"), NotConnected, "cannot serve us now"),
        (redis.exceptions.OutOfMemoryError("maxmemory"), StoreFull, "raise the limit"),
        (redis.ResponseError("WRONGTYPE"), ProtocolError, "Redis 6.2"),
    ],
)
def test_foreign_errors_become_ours_with_advice(foreign: Exception, ours: type[Exception], advice: str) -> None:
    with pytest.raises(ours, match=advice) as caught, errors_mapped("redis://h:1"):
        raise foreign
    assert caught.value.__cause__ is foreign
    assert "redis://h:1" in str(caught.value)


@pytest.mark.parametrize(
    ("theirs", "is_refusal"),
    [
        (redis.ConnectionError("Connection refused"), False),
        (redis.TimeoutError("no answer"), False),
        (redis.ConnectionError("max number of clients reached"), True),
        (redis.exceptions.ReadOnlyError("You can't write against a read only replica."), True),
        (redis.ResponseError("MISCONF cannot save"), True),
        (redis.BusyLoadingError("Redis is loading the dataset in memory"), True),
        (redis.exceptions.OutOfMemoryError("maxmemory"), True),
        (redis.AuthenticationError("invalid password"), True),
    ],
)
def test_another_way_is_sought_to_a_server_that_is_silent_not_to_one_that_refuses(
    theirs: Exception, is_refusal: bool
) -> None:
    with pytest.raises(ClusterpoolError) as caught, errors_mapped("redis://h:1"):
        raise theirs
    assert has_refused(caught.value) is is_refusal
