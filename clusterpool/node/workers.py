"""The worker processes of a node: their forks, what they print, and their ends."""

from __future__ import annotations

import contextlib
import logging
import signal
from itertools import groupby
from typing import TYPE_CHECKING

import msgspec

from clusterpool.config import PATCHING_SETUP, WORKER_SETUP_VARIABLE
from clusterpool.core import messages as m
from clusterpool.core import node_events as e
from clusterpool.core.zygote_watch import Finding, ZygoteWatch
from clusterpool.errors import StartFailed
from clusterpool.processes.logs import LogLine, LogPipe, WorkerLog, prune_logs
from clusterpool.processes.sweep import SESSION_VARIABLE
from clusterpool.processes.task_page import read_task_page, task_page_path
from clusterpool.processes.worker_end import explain_end
from clusterpool.processes.zygote import ForkFailed, WorkerExited, WorkerForked, Zygote, ZygoteDied

if TYPE_CHECKING:
    from clusterpool.node.shell import NodeShell

logger = logging.getLogger(__name__)

# After so many workers with a log have ended, the oldest logs beyond LOG_FILES_MAX are removed.
PRUNE_EVERY = 100
# What the first thing that a `Process` is sent names.
_PROCESS_MODULE = "clusterpool.multiprocessing.popen_cluster"


class _WorkerProcess:
    """One worker, between its fork and its end."""

    def __init__(self, command: e.ForkWorker) -> None:
        self.job = command.job
        self.name = command.name
        # Who reads of its end is told which task it was, and would take the name of another for that of a culprit.
        self.name_at_end = "" if command.has_many_names else command.name
        self.pid = 0
        self.pipes: list[LogPipe] = []
        self.log: WorkerLog | None = None


class WorkerProcesses:
    """Forks workers through the zygote, and passes on what they print."""

    def __init__(self, shell: NodeShell, zygote: Zygote) -> None:
        self._shell = shell
        self._zygote = zygote
        self._watch = ZygoteWatch()
        self._workers: dict[str, _WorkerProcess] = {}
        self._preloaded: set[str] = set()
        self._ended_logs = 0

    def open(self) -> None:
        """Listen to the zygote."""
        self._shell.watch(self._zygote.fileno(), lambda _: self._zygote_ready())

    def fork(self, command: e.ForkWorker) -> None:
        """Start a worker process."""
        shell, job = self._shell, command.job
        self._workers[command.process_id] = _WorkerProcess(command)
        env: dict[str, str | None] = {}
        if job.host == shell.host:
            # As children of the driver would, workers on its host have its environment.
            env.update({name: value for name, value in job.env.items() if name != SESSION_VARIABLE})
        setup = job.env.get(WORKER_SETUP_VARIABLE)
        if setup:
            env[WORKER_SETUP_VARIABLE] = setup  # on every host
            if setup == PATCHING_SETUP:
                self._preload(setup.partition(":")[0])
        working_dir, modules, variables = shell.packages.environment_paths(job.runtime_env)
        env.update(variables)
        env.update(command.env)
        env["CLUSTERPOOL_NODE_ID"] = shell.node_id
        spec = {
            "env": env,
            "process_id": command.process_id,
            "node_id": shell.node_id,
            "node_socket": str(shell.paths.node_socket),
            "processes_folder": str(shell.paths.process_sockets_folder),
            "name": command.name,
            "working_dir": working_dir,
            "modules": modules,
            "job": msgspec.msgpack.encode(msgspec.structs.replace(job, env={})),
        }
        try:
            self._zygote.fork_worker(command.process_id, spec)
            if command.is_process:
                self._preload(_PROCESS_MODULE)
        except (ValueError, StartFailed) as exc:
            # Posted, since the machine is in the middle of its commands.
            del self._workers[command.process_id]
            shell.post(e.ForkFailed(command.process_id, str(exc)))

    def _preload(self, module: str) -> None:
        """Have the workers to come share what only some need, and would import for longer than all else takes.

        Modules of our own only: the workers of all jobs are forks of the same zygote.
        """
        if module not in self._preloaded:
            self._preloaded.add(module)
            with contextlib.suppress(StartFailed):
                self._zygote.preload((module,))

    def pids(self) -> dict[str, int]:
        """The pid of each worker, by process id."""
        return {process_id: worker.pid for process_id, worker in self._workers.items() if worker.pid}

    @property
    def zygote_pid(self) -> int:
        """Of the process that forks the workers."""
        return self._zygote.pid

    def end(self, command: e.EndWorker) -> None:
        """Send a worker a signal."""
        self._zygote.kill_worker(command.process_id, command.signal, with_group=command.with_group)

    def time_passed(self) -> None:
        """A tick: whether the zygote answers."""
        found = self._watch.look(is_asked=self._zygote.is_asked, heard=self._zygote.heard)
        if found is Finding.PROBE_DUE:
            self._zygote.probe()
        elif found is Finding.STUCK:
            self._zygote.end_stuck(
                f"the process that forks workers (pid {self._zygote.pid}) did not answer for a minute; it was stopped "
                "(SIGSTOP, a debugger), or hangs in the kernel, and has been killed"
            )

    def close(self) -> None:
        """End all workers, and the zygote."""
        self._zygote.close()

    def _zygote_ready(self) -> None:
        for event in self._zygote.read_events():
            if isinstance(event, WorkerForked):
                self._forked(event)
            elif isinstance(event, WorkerExited):
                self._exited(event)
            elif isinstance(event, ForkFailed):
                self._workers.pop(event.worker_id, None)
                self._shell.handle(e.ForkFailed(event.worker_id, event.reason))
            elif isinstance(event, ZygoteDied):
                logger.error("the zygote has died: %s", event.reason)
                self._shell.stop(f"its zygote has died: {event.reason}")
                return

    def _forked(self, event: WorkerForked) -> None:
        worker = self._workers[event.worker_id]
        worker.pid = event.pid
        worker.log = WorkerLog(self._shell.paths.logs_folder / f"{event.worker_id}.log")
        for fd, stream in ((event.stdout_fd, "stdout"), (event.stderr_fd, "stderr")):
            pipe = LogPipe(fd, stream, worker.log)
            worker.pipes.append(pipe)
            self._shell.watch(fd, lambda _, worker=worker, pipe=pipe: self._pipe_ready(worker, pipe))  # type: ignore[misc]

    def _pipe_ready(self, worker: _WorkerProcess, pipe: LogPipe) -> None:
        self._pass_on(worker, pipe, pipe.read())
        if pipe.is_at_end:
            self._shell.unwatch(pipe.fileno())
            pipe.close()

    def _pass_on(self, worker: _WorkerProcess, pipe: LogPipe, lines: list[LogLine]) -> None:
        stream = 1 if pipe.stream == "stdout" else 2
        for name, of_name in groupby(lines, lambda line: line.name):
            texts = [line.text for line in of_name]
            message = m.LogLines(name or worker.name, worker.pid, self._shell.node_id, stream, texts)
            self._shell.log_lines.send(worker.job.owner, message)

    def _exited(self, event: WorkerExited) -> None:
        worker = self._workers.pop(event.worker_id, None)
        if worker is None:
            return
        for pipe in worker.pipes:
            if pipe.fileno() >= 0:
                self._shell.unwatch(pipe.fileno())
                self._pass_on(worker, pipe, [*pipe.read(), *pipe.close()])
        if worker.log is not None:
            worker.log.close()
            self._prune_logs()
        # Results that it had sent must arrive before the news of its end.
        self._shell.drain(event.worker_id)
        self._shell.paths.process_socket(event.worker_id).unlink(missing_ok=True)  # a killed one could not
        task = read_task_page(task_page_path(self._shell.paths.process_sockets_folder, event.worker_id))
        was_killed = event.exit_code == -signal.SIGKILL
        memory = self._shell.memory.free_text() if was_killed else ""
        text, cause = explain_end(
            self._who(worker, event), event.exit_code, event.peak_rss_bytes,
            memory=memory, is_kernels_doing=was_killed and self._shell.memory.kernel_has_killed(), log=worker.log,
        )  # fmt: skip
        self._shell.handle(e.WorkerEnded(event.worker_id, event.exit_code, text, task, event.peak_rss_bytes, cause))

    def _prune_logs(self) -> None:
        """Now and then: a look at all files for each worker that ends would cost more than the worker."""
        self._ended_logs += 1
        if self._ended_logs % PRUNE_EVERY:
            return
        logs = [worker.log for worker in self._workers.values() if worker.log is not None]
        in_use = [path for log in logs for path in (log.path, log.older_path)]
        prune_logs(self._shell.paths.logs_folder, in_use=[*in_use, self._shell.paths.node_log])

    def _who(self, worker: _WorkerProcess, event: WorkerExited) -> str:
        return (
            f"worker {event.worker_id} ({worker.name_at_end or 'task'}, pid {event.pid}) on node {self._shell.node_id}"
        )
