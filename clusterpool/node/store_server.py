"""Keeps the control store's server running, where it is the cluster's own: starts it again when it has ended.

An embedded node starts its server itself. That of a cluster was started by `clusterpool up`, and is watched over by
one node of that host, the one that holds the lock: the head first, another if the head dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import threading
import time
from pathlib import Path

from clusterpool.config import NodeConfig
from clusterpool.control_store.server import ServerProcess
from clusterpool.core import server_restarts as sr
from clusterpool.errors import StartFailed
from clusterpool.processes.death import open_pidfd
from clusterpool.processes.session_folder import make_or_join_session

logger = logging.getLogger(__name__)

STORE_FOLDER = "store"
LOCK_NAME = "store.lock"
_LOCK_RETRY_S = 1.0
# A server loads about 100 MB/s of its append-only file.
_LOAD_TIMEOUT_S = 60.0
# It has nothing to save, and may hang.
_EMBEDDED_STOP_S = 0.5


class StoreServer:
    """Of one node; a thread of its own, to which an embedded server's life is tied."""

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self._server: ServerProcess | None = None
        self._restarts = sr.ServerRestarts()
        self._stop_read, self._stop_write = os.pipe()
        self._is_ready = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._main, name="store-server", daemon=True)

    @staticmethod
    def is_wanted(config: NodeConfig) -> bool:
        """Whether there is a server for this node to care for."""
        return config.control_store_url is None or (Path(config.session_folder) / STORE_FOLDER).is_dir()

    def start(self) -> None:
        """Watch over the server, which an embedded node starts first; in the background."""
        self._thread.start()

    def wait_started(self) -> None:
        """Wait until the embedded server answers for the first time.

        Raises: StartFailed.
        """
        self._is_ready.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Watch no longer, and end an embedded server."""
        os.write(self._stop_write, b"x")
        if self._thread.ident is not None:
            self._thread.join(5.0)
        if self._config.control_store_url is None and self._server is not None:
            self._server.stop(_EMBEDDED_STOP_S)

    # --- the thread

    def _main(self) -> None:
        try:
            if self._config.control_store_url is None:
                self._start_embedded()
                self._watch()
            else:
                self._watch_in_turn()
        except Exception as exc:
            logger.exception("the control store's server is not watched over any more")
            self._failure = exc
        finally:
            self._is_ready.set()

    def _start_embedded(self) -> None:
        paths = self._config.paths
        self._server = ServerProcess.start(
            paths.folder / STORE_FOLDER,
            unix_socket_path=paths.valkey_socket,
            appendonly=True,
            # It must not outlive a node that is killed: nobody else has a use for it, and a sweep may never come.
            dies_with_parent=True,
        )
        self._server.wait_ready()
        self._restarts.handle(sr.ServerReady(), time.monotonic())
        self._is_ready.set()

    def _watch_in_turn(self) -> None:
        """Watch once this node holds the lock: no two nodes may start the same server."""
        session = Path(self._config.session_folder)
        lock = os.open(session / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not self._has_lock(lock):
                if self._is_stopping_within(_LOCK_RETRY_S if not self._config.is_head else 0.05):
                    return
            password = self._config.control_store_password()
            self._server = ServerProcess.recorded(session / STORE_FOLDER, password=password)
            if self._server is not None:
                self._watch()
        finally:
            os.close(lock)

    @staticmethod
    def _has_lock(lock: int) -> bool:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _watch(self) -> None:
        assert self._server is not None
        while not self._stops_before_the_server_ends():
            event: sr.ServerEnded | sr.ServerFailed = sr.ServerEnded(self._server.describe_end())
            logger.warning("the control store is started again with its data: %s", event.text)
            while True:
                start = self._decide(event)
                if self._is_stopping_within(start.after_s):
                    return
                if start.sets_data_aside and self._server.set_data_aside():
                    logger.error(
                        "the control store's data in %s cannot be read, and were put aside; it starts without them, "
                        "and its nodes bring back what they know", self._server.folder,
                    )  # fmt: skip
                try:
                    self._start_again()
                except StartFailed as exc:
                    event = sr.ServerFailed(str(exc), self._server.has_unreadable_data())
                    logger.warning("the control store's server did not start: %s", exc)
                else:
                    break
            self._restarts.handle(sr.ServerReady(), time.monotonic())
            logger.info("the control store's server runs again, pid %d", self._server.pid)

    def _decide(self, event: sr.ServerEnded | sr.ServerFailed) -> sr.StartServer:
        for command in self._restarts.handle(event, time.monotonic()):
            if isinstance(command, sr.RaiseAlarm):
                logger.error(
                    "the control store's server ended %d times in a row; running work goes on, but new actors, locks "
                    "and packages wait. It is tried again every %g s; the last end: %s",
                    sr.RESTARTS_MAX + 1, sr.DELAY_AFTER_ALARM_S, command.text,
                )  # fmt: skip
            else:
                start: sr.StartServer = command
        return start

    def _start_again(self) -> None:
        """Raises: StartFailed; the server is ended then."""
        assert self._server is not None
        is_embedded = self._config.control_store_url is None
        try:
            # A lock on the session goes with the server: as long as it lives no sweep takes the session for dead. It is
            # not this node's lock, which would then end with the server.
            lock = make_or_join_session(self._config.paths.session)
            try:
                self._server.start_again(dies_with_parent=is_embedded, pass_fds=() if is_embedded else (lock,))
            finally:
                os.close(lock)
            self._server.wait_ready(_LOAD_TIMEOUT_S)
        except OSError as exc:
            raise StartFailed(f"the folder {self._server.folder} of the control store cannot be used: {exc}") from exc
        except StartFailed:
            self._server.kill()
            raise

    def _stops_before_the_server_ends(self) -> bool:
        """Wait for either."""
        assert self._server is not None
        try:
            pidfd = open_pidfd(self._server.pid)
        except ProcessLookupError:
            return self._is_stopping_within(0)
        try:
            if not self._server.is_running():  # the number is another process's by now
                return self._is_stopping_within(0)
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.register(self._stop_read, select.POLLIN)
            ready = {fd for fd, _ in poll.poll()}
        finally:
            with contextlib.suppress(OSError):
                os.close(pidfd)
        return self._stop_read in ready

    def _is_stopping_within(self, timeout_s: float) -> bool:
        return bool(select.select([self._stop_read], [], [], timeout_s)[0])
