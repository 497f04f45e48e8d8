"""Inside the zygote: imports the worker's code, then forks at the node's request and waits for what it
forked.
"""

from __future__ import annotations

import errno
import faulthandler
import gc
import importlib
import marshal
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clusterpool.processes.death import die_with_parent, set_process_name
from clusterpool.processes.named_output import rebuild_standard_streams
from clusterpool.processes.zygote import REQUEST_BYTES_MAX

WorkerMain = Callable[[dict[str, Any]], "int | None"]


@dataclass
class ForkedChild:
    """What `ZygoteLoop.run` returns in a new worker: it leaves the loop, so that no frame of ours is under
    the user's.
    """

    zygote_pid: int
    spec: dict[str, Any]
    stdout_fd: int
    stderr_fd: int


def run_zygote(control_fd: int, worker_module: str, node_pid: int) -> int:
    """The zygote's whole life, and each worker's: returns the exit code of whichever this process turned
    out to be.
    """
    gc.disable()  # until the frozen objects are out of its reach: a collection would write to every page
    os.setsid()  # the terminal's Ctrl-C is for the driver, which decides what becomes of the workers
    die_with_parent(node_pid)
    set_process_name("cpool-zygote")
    control_fd = _keep_only(control_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rebuild_standard_streams()
    # A crash in C code then leaves a Python traceback in the worker's log; forks inherit the handlers.
    faulthandler.enable(file=2)
    control = socket.socket(fileno=control_fd)
    try:
        worker_main: WorkerMain = importlib.import_module(worker_module).main
    except BaseException:
        text = traceback.format_exc()
        sys.stderr.write(text)
        control.send(marshal.dumps(("failed", f"the worker's code could not be imported:\n{text}"[-60_000:])))
        return 1
    loop = ZygoteLoop(control)
    gc.collect()
    gc.freeze()
    child = loop.run()
    if child is None:
        loop.end_workers()
        return 0
    del loop, control
    from clusterpool.processes.forked_worker import run_forked_worker

    return run_forked_worker(child, worker_main)


class ZygoteLoop:
    """Waits for requests and for dead children, in one thread."""

    def __init__(self, control: socket.socket) -> None:
        from clusterpool.processes import forked_worker  # noqa: F401 (imported once, for all forks)

        self._control = control
        self._pid = os.getpid()
        self._worker_by_pid: dict[int, str] = {}
        self._pid_by_worker: dict[str, int] = {}
        self._modules_by_trial_pid: dict[int, tuple[str, ...]] = {}
        # SIGCHLD rather than a pidfd a worker: no descriptor to be kept and closed in every fork. Until it
        # is waited for, a child keeps its pid, so that signals need no pidfd either.
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        signal.signal(signal.SIGCHLD, _do_nothing)  # the default is to ignore it, which would wake nobody
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)

    def run(self) -> ForkedChild | None:
        """Returns in the zygote when the node has gone, and in each child with what it is to be."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._wake_read in ready:
                self._drain_wake_pipe()
                if not self._reap():
                    return None
            if self._control.fileno() in ready:
                packet = self._receive()
                if not packet:
                    return None
                try:
                    child = self._handle(*marshal.loads(packet))
                except BrokenPipeError:
                    return None
                if child is not None:
                    return child

    def _handle(self, kind: str, *fields: Any) -> ForkedChild | None:
        if kind == "fork":
            return self._fork(*fields)
        if kind == "kill":
            self._kill(*fields)
        else:
            self._try_modules(*fields)
        return None

    def _fork(self, worker_id: str, spec: dict[str, Any]) -> ForkedChild | None:
        pipes: list[int] = []
        try:
            pipes += os.pipe()
            pipes += os.pipe()
            pid = os.fork()
        except OSError as error:
            self._close_all(pipes)
            self._send(("fork_failed", worker_id, f"the worker could not be forked: {_explain(error)}"))
            return None
        stdout_read, stdout_write, stderr_read, stderr_write = pipes
        if pid == 0:
            self._leave([stdout_read, stderr_read])
            return ForkedChild(self._pid, spec, stdout_write, stderr_write)
        self._worker_by_pid[pid] = worker_id
        self._pid_by_worker[worker_id] = pid
        try:
            self._send(("forked", worker_id, pid), [stdout_read, stderr_read])
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            # Too many descriptors on their way (ETOOMANYREFS), or no memory: not a worker that anybody
            # could use.
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            del self._worker_by_pid[pid], self._pid_by_worker[worker_id]
            self._send(("fork_failed", worker_id, f"its output could not be connected: {_explain(error)}"))
        finally:
            self._close_all(pipes)
        return None

    def _leave(self, descriptors: list[int]) -> None:
        """In the child: close what is the zygote's, and undo its signal handling."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._control.close()
        self._close_all([*descriptors, self._wake_read, self._wake_write])

    def _kill(self, worker_id: str, signal_number: int, with_group: bool) -> None:
        pid = self._pid_by_worker.get(worker_id)
        if pid is not None:
            if with_group:
                _signal_with_group(pid, signal_number)
            else:
                os.kill(pid, signal_number)
        self._send(("acknowledged",))

    def _reap(self) -> bool:
        """Wait for every child that has ended; False if the node is gone."""
        while self._worker_by_pid or self._modules_by_trial_pid:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
            if pid == 0:
                break
            exit_code = os.waitstatus_to_exitcode(status)
            try:
                if pid in self._modules_by_trial_pid:
                    self._finish_trial(self._modules_by_trial_pid.pop(pid), exit_code)
                    continue
                worker_id = self._worker_by_pid.pop(pid, None)
                if worker_id is None:
                    continue  # something that an imported module had started
                del self._pid_by_worker[worker_id]
                self._send(("exited", worker_id, pid, exit_code, usage.ru_maxrss * 1024))
            except BrokenPipeError:
                return False
        return True

    def _try_modules(self, modules: tuple[str, ...]) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            self._send(("preloaded", modules, f"they could not be tried: {_explain(error)}"))
            return
        if pid == 0:
            # Exit code 0: imported, and still one thread. Printed errors go to the node's log.
            try:
                die_with_parent(self._pid)
                for module in modules:
                    importlib.import_module(module)
                os._exit(2 if _count_threads() > 1 else 0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(1)
        self._modules_by_trial_pid[pid] = modules

    def _finish_trial(self, modules: tuple[str, ...], exit_code: int) -> None:
        reason = ""
        if exit_code == 2:
            reason = "they start threads when imported, which a process that forks must not have"
        elif exit_code != 0:
            reason = f"importing them failed (exit code {exit_code}); see the node's log"
        else:
            for module in modules:
                importlib.import_module(module)
            assert _count_threads() == 1, f"importing {modules} started a thread, but not when it was tried"
            gc.collect()
            gc.freeze()
        self._send(("preloaded", modules, reason))

    def end_workers(self) -> None:
        """The node is gone: kill all workers with what they have started, and leave no zombie to a parent that may
        not wait for it.
        """
        for pid in (*self._worker_by_pid, *self._modules_by_trial_pid):
            _signal_with_group(pid, signal.SIGKILL)
        for pid in (*self._worker_by_pid, *self._modules_by_trial_pid):
            os.waitpid(pid, 0)

    def _send(self, reply: tuple[Any, ...], descriptors: list[int] | None = None) -> None:
        """Blocks while the node is behind; the node itself never blocks on us, so this ends."""
        socket.send_fds(self._control, [marshal.dumps(reply)], descriptors or [])

    def _receive(self) -> bytes:
        try:
            return self._control.recv(REQUEST_BYTES_MAX)
        except ConnectionError:
            return b""

    def _drain_wake_pipe(self) -> None:
        try:
            while os.read(self._wake_read, 4096):
                pass
        except BlockingIOError:
            pass

    @staticmethod
    def _close_all(descriptors: list[int]) -> None:
        for descriptor in descriptors:
            os.close(descriptor)


def _keep_only(control_fd: int) -> int:
    """Close all that the node had open (its locks say that the node lives, and must end with it); stdin is
    empty.
    """
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 (the listing's own descriptor is one of them)
        if int(name) > 2 and int(name) != control_fd:
            try:
                os.close(int(name))
            except OSError:
                pass
    return control_fd


def _signal_with_group(pid: int, signal_number: int) -> None:
    # Its group has its own number, from its first moments on. Both are its own until it is waited for.
    if os.getpgid(pid) == pid:
        os.killpg(pid, signal_number)
    else:
        os.kill(pid, signal_number)


def _explain(error: OSError) -> str:
    hints = {
        errno.EAGAIN: "; the limit on this user's processes is reached (`ulimit -u`, or pids.max)",
        errno.ENOMEM: "; the machine is out of memory",
        errno.EMFILE: "; too many open files (`ulimit -n`)",
    }
    return f"{error}{hints.get(error.errno or 0, '')}"


def _count_threads() -> int:
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208


def _do_nothing(_signal_number: int, _frame: object) -> None:
    pass
