"""The real server that the contracts are held to."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clusterpool.control_store.server import ServerProcess


@pytest.fixture(scope="module")
def server_url(run_of_tests: Any) -> Iterator[str]:
    """One server for the module: each test has a cluster of its own in it."""
    # The folders of pytest are too deep for a socket's path on some machines.
    folder = Path(tempfile.mkdtemp(prefix="cp-"))
    server = ServerProcess.start(folder, unix_socket_path=folder / "store.sock")
    held = run_of_tests.look()
    run_of_tests.held.append(held)
    try:
        server.wait_ready()
        yield server.url
    finally:
        server.stop()
        run_of_tests.held.remove(held)
        shutil.rmtree(folder)
