"""`ChildProcess`: a worker that makes one call in its main thread and ends with it, as a `Process` needs it."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clusterpool import errors
from clusterpool.client import api
from clusterpool.client.bootstrap import renewed
from clusterpool.client.submission import Held
from clusterpool.client.values import make_error
from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.messages import Address, WorkerDemand, WorkerKind

if TYPE_CHECKING:
    from clusterpool.client.client import Client

NODE_SHARE = 0.0001


class ChildProcess:
    """A process on some node that calls `function(*args)` and ends with the exit code that this returns.

    It holds no CPU, is never replaced, and is not tried again. When this process dies, it goes on until the job ends.
    `name`: for people. `on_loaded`: called once when the child has its arguments (or never will), by whichever thread
    turns the client's loop; until then the caller keeps alive what they refer to. `find_node_id`: where it must run;
    asked when the arguments have been pickled.

    Raises: what pickle raises; StartFailed, TaskInfeasible when no worker could be started; NotConnected.
    """

    is_child_process = True  # what else has a number with the client has not

    def __init__(
        self,
        function: Callable[..., int],
        args: tuple[Any, ...],
        *,
        name: str,
        on_loaded: Callable[[], None],
        find_node_id: Callable[[], str | None] = lambda: None,
    ) -> None:
        runtime = api.runtime()
        self._client = client = runtime.client
        payload, held = runtime.maker.setup(function, args)
        self._held: Held | None = held
        self._on_loaded: Callable[[], None] | None = on_loaded
        self._failure: BaseException | None = None
        self.pid = 0
        self.host = ""
        self.returncode: int | None = None
        # Readable from the end on, and for good: nobody reads from it. (Not the end of a pipe: a fork of this program
        # would keep that open.)
        self.sentinel = os.eventfd(0, os.EFD_CLOEXEC)
        self._close_sentinel = weakref.finalize(self, os.close, self.sentinel)
        self._close_sentinel.atexit = False
        # Who sees the exit code may close it at once, and its number may be another file's a moment later.
        self._sentinel_lock = threading.Lock()
        self._number = next(runtime.set_numbers)
        client.deliveries.set_sinks[self._number] = self
        node_id = find_node_id()
        # Each node has 1 of the resource that bears its name; of so little of it there is always enough.
        resources = {} if node_id is None else {f"node:{node_id}": NODE_SHARE}
        demand = WorkerDemand(WorkerKind.GROUP, resources, name, outlives_owner=True)
        setup = e.SetupPlan(name, {}, payload, [reference.part for reference in held.references])
        try:
            client.handle_event(e.ChildOpened(self._number, demand, setup, _job_from_here(client)))
            client.wait_until(lambda: self.pid != 0 or self._failure is not None)
        except BaseException:  # Ctrl-C
            self._forget()
            client.handle_event_later(e.ChildDropped(self._number))
            raise
        if self._failure is not None:
            raise self._failure

    @property
    def number(self) -> int:
        """Its name in the client's machine."""
        return self._number

    def wait(self, timeout: float | None = None) -> int | None:
        """The exit code (negative for a signal) once it has ended; None when it has not within `timeout` seconds."""
        if self.returncode is None:
            with contextlib.suppress(errors.NotConnected):  # then it has ended with the cluster, as we shall be told
                self._client.wait_until(lambda: self.returncode is not None, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Nothing happens if it has ended."""
        # Through its node even on this host: there a pid stays the child's until its end is known.
        if self.returncode is None:
            self._client.handle_event(e.ChildSignalled(self._number, number))

    def close(self) -> None:
        """Close the sentinel."""
        with self._sentinel_lock:
            self._close_sentinel()

    def set_event(self, command: e.Command) -> None:
        """News of the child, from the client's loop."""
        if isinstance(command, e.ChildStarted):
            self.host = command.worker.host
            self.pid = command.worker.pid
        elif isinstance(command, e.ChildLoaded):
            self._loaded()
        elif isinstance(command, e.ChildFailed):
            self._failure = make_error(command.kind, command.text)
            self._forget()
        elif isinstance(command, e.ChildEnded):
            with self._sentinel_lock:
                self.returncode = command.exit_code
                if self._close_sentinel.alive:
                    os.eventfd_write(self.sentinel, 1)
            self._forget()

    def _forget(self) -> None:
        self._client.deliveries.set_sinks.pop(self._number, None)
        self._loaded()

    def _loaded(self) -> None:
        self._held = None
        callback, self._on_loaded = self._on_loaded, None
        if callback is not None:
            callback()


class ProcessWatch:
    """A descriptor that becomes readable when another process of the cluster ends, or is not to be seen any more."""

    def __init__(self, address: Address) -> None:
        runtime = api.runtime()
        self.fd = os.eventfd(0, os.EFD_CLOEXEC)
        number = next(runtime.set_numbers)
        runtime.client.deliveries.set_sinks[number] = self
        runtime.client.handle_event(e.ProcessWatched(number, address))

    def set_event(self, _command: e.Command) -> None:
        """It has ended."""
        with contextlib.suppress(OSError):  # the user's code may have closed it
            os.eventfd_write(self.fd, 1)


def _job_from_here(client: Client) -> m.JobPart:
    """The job, with this process's environment: what a fork of it would have, where such a thing is possible."""
    job = client.machine.job
    if job.host != socket.gethostname():
        return job  # the environment of one host is not that of another
    return renewed(job)
