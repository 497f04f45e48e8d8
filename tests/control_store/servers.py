"""Servers for the tests of this folder: each ends with its test, and its folder too."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clusterpool.control_store.server import ServerProcess

PASSWORD = 's3cret "quoted" \\ #é'


@contextmanager
def short_folder() -> Iterator[Path]:
    """The folders of pytest are too deep for a socket's path on some machines."""
    folder = Path(tempfile.mkdtemp(prefix="cp-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[ServerProcess]:
    server = ServerProcess.start(folder, **options)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


@contextmanager
def embedded_server() -> Iterator[ServerProcess]:
    with short_folder() as folder, running(folder, unix_socket_path=folder / "store.sock") as server:
        yield server


@contextmanager
def tcp_server(**options: Any) -> Iterator[ServerProcess]:
    with short_folder() as folder, running(folder, host="127.0.0.1", password=PASSWORD, **options) as server:
        yield server
