"""A way to the control store that a test can interrupt, for one node alone."""

from __future__ import annotations

import select
import socket
import threading


class StoreProxy:
    """Passes TCP connections on to a port. While `stall`ed it accepts and says nothing, as a network that drops all."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._may_pass = threading.Event()
        self._may_pass.set()
        self._is_closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def stall(self) -> None:
        """Pass no more bytes, on any connection."""
        self._may_pass.clear()

    def resume(self) -> None:
        """Pass on what came meanwhile, and what comes."""
        self._may_pass.set()

    def close(self) -> None:
        self._is_closed = True
        self._may_pass.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(30)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._pass, args=(connection,), daemon=True))
            self._threads[-1].start()

    def _pass(self, theirs: socket.socket) -> None:
        with theirs, socket.create_connection(("127.0.0.1", self._target_port)) as ours:
            other = {theirs: ours, ours: theirs}
            while not self._is_closed:
                ready = select.select([theirs, ours], [], [], 0.1)[0]
                self._may_pass.wait()
                for source in ready:
                    try:
                        piece = source.recv(65536)
                        other[source].sendall(piece)
                    except OSError:
                        return
                    if not piece:
                        return
