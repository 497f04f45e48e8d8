"""A pool's workers as programs look at them through `pool._pool`: objects like `multiprocessing.Process`."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable

from clusterpool.client import api
from clusterpool.client.worker_group import GroupWorker, WorkerGroup


class PoolWorker:
    """One worker process of a pool, with the attributes and methods of a `multiprocessing.Process`."""

    daemon = True

    def __init__(self, worker: GroupWorker, number: int, read_exit_code: Callable[[str], int | None]) -> None:
        self._worker = worker
        self._read_exit_code = read_exit_code
        self.name = f"ClusterPoolWorker-{number}"
        self.pid = worker.pid
        self.ident = worker.pid
        self.host = worker.host
        self.node_id = worker.node_id

    def __repr__(self) -> str:
        state = "started" if self.exitcode is None else f"stopped exitcode={self.exitcode}"
        return f"<{type(self).__name__} name={self.name!r} pid={self.pid} host={self.host} {state} daemon>"

    @property
    def exitcode(self) -> int | None:
        """None while it runs; the negative number of the signal that killed it."""
        return self._read_exit_code(self._worker.process_id)

    def is_alive(self) -> bool:
        return self.exitcode is None

    def join(self, timeout: float | None = None) -> None:
        """Wait until the process has ended."""
        api.wait_until(lambda: not self.is_alive(), timeout)

    def terminate(self) -> None:
        """Send SIGTERM; the pool starts another worker in its place."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL; the pool starts another worker in its place."""
        self._send(signal.SIGKILL)

    def _send(self, signal_number: int) -> None:
        if self.host != socket.gethostname():
            raise ProcessLookupError(f"{self.name} runs on {self.host}; only a worker of this host can be signalled")
        if self.is_alive():
            os.kill(self.pid, signal_number)


class WorkerTable:
    """Knows the workers that a group has, and how those ended that it had."""

    def __init__(self) -> None:
        self._group: WorkerGroup | None = None
        self._worker_by_process_id: dict[str, PoolWorker] = {}
        self._exit_code_by_process_id: dict[str, int] = {}
        self._final_exit_code: int | None = None  # of the workers that lived when the pool ended
        self._last: list[PoolWorker] = []

    def watch(self, group: WorkerGroup) -> None:
        self._group = group

    def worker_died(self, worker: GroupWorker) -> None:
        """Called by the group."""
        exit_code = worker.exit_code if worker.exit_code is not None else -int(signal.SIGKILL)
        self._exit_code_by_process_id[worker.process_id] = exit_code

    def pool_ended(self, exit_code: int) -> None:
        """From now on a worker that is gone has ended with `exit_code`."""
        self._final_exit_code = exit_code

    def living(self) -> list[PoolWorker]:
        """The living workers, oldest first; after the end of the pool, those that it had last."""
        assert self._group is not None, "watch comes first"
        workers = self._group.workers()
        if not workers and self._final_exit_code is not None:
            return list(self._last)
        for worker in workers:
            if worker.process_id not in self._worker_by_process_id:
                number = len(self._worker_by_process_id) + 1
                self._worker_by_process_id[worker.process_id] = PoolWorker(worker, number, self._exit_code)
        self._last = [self._worker_by_process_id[worker.process_id] for worker in workers]
        return list(self._last)

    def _exit_code(self, process_id: str) -> int | None:
        exit_code = self._exit_code_by_process_id.get(process_id)
        if exit_code is not None:
            return exit_code
        assert self._group is not None, "watch comes first"
        if any(worker.process_id == process_id for worker in self._group.workers()):
            return None
        # Gone without an unexpected death: it had done `maxtasksperchild` tasks, or its pool ended.
        return 0 if self._final_exit_code is None else self._final_exit_code
