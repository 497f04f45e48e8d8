"""A worker as programs expect it in `executor._processes`: a little of `multiprocessing.Process`."""

from __future__ import annotations

import os
import signal
import socket
from typing import TYPE_CHECKING

from clusterpool.calls import engine

if TYPE_CHECKING:
    from clusterpool.client.worker_group import GroupWorker
    from clusterpool.futures.pool_state import PoolState


class WorkerProcess:
    """Asks and signals one worker; `node_id` and `host` say where it is."""

    daemon = True

    def __init__(self, worker: GroupWorker, pool: PoolState) -> None:
        self.pid = worker.pid
        self.ident = worker.pid
        self.name = worker.process_id
        self.node_id = worker.node_id
        self.host = worker.host
        self._pool = pool

    @property
    def exitcode(self) -> int | None:
        """None while it lives; a negative signal number; 0 after an end that nobody complained about."""
        if self.is_alive():
            return None
        return self._pool.exit_code_by_process_id.get(self.name, 0)

    def is_alive(self) -> bool:
        group = self._pool.group
        return group is not None and any(worker.process_id == self.name for worker in group.workers())

    def join(self, timeout: float | None = None) -> None:
        engine.wait_until(lambda: not self.is_alive(), timeout)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self.host != socket.gethostname():
            raise NotImplementedError(
                f"worker {self.name} runs on another machine, {self.host}; use kill_workers() of the executor"
            )
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:  # it has ended
            pass

    def __repr__(self) -> str:
        return f"<WorkerProcess {self.name} pid={self.pid} node={self.node_id}>"
