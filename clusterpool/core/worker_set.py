"""A set of workers held by one owner: leases of one resource shape, or a group with a common initializer.

    wanted -> requested -> granted -> setting up -> ready -> retiring -> exited
                  |            (GROUP only)           |
                  +-- cancelled             returned to the node (TASK only)

A group keeps its size: whoever exits is replaced while the set is open. A lease set follows its queue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from clusterpool.core.dispatch import Batch, Dispatcher, Task
from clusterpool.core.lease_needs import leases_wanted
from clusterpool.core.messages import (
    Address,
    ForgetFunctions,
    FunctionPart,
    JobPart,
    KillWorker,
    LastTask,
    ReleaseWorkers,
    RetireWorker,
    SetupWorker,
    StartTasks,
    TakeBackTasks,
    TaskResult,
    TasksFinished,
    WorkerDemand,
    WorkerPart,
)
from clusterpool.core.node_messages import SIGKILL, SIGTERM
from clusterpool.core.owner_events import (
    Command,
    FailTasks,
    Send,
    SetEnded,
    SetSetupFailed,
    SetupPlan,
    SetWorkerJoined,
    SetWorkerLeft,
)
from clusterpool.core.rescue import GoneWorker, Rescue, lost_text
from clusterpool.core.setup_failures import SetupFailures
from clusterpool.core.stopping import Stopping
from clusterpool.core.stragglers import Stragglers
from clusterpool.core.worker_requests import WorkerRequests

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_UNKNOWN = LastTask()

# An idle lease is kept this long, so that a loop of calls, each waiting for its result, does not lease each time.
# Longer would keep CPUs from others; they can ask for it sooner (ReclaimLeases).
LINGER_S = 0.1
# A worker that cannot even be started will not get better; once may be bad luck (memory was short for a moment).
START_FAILURES_MAX = 4


class WorkerSet:
    """One set. Its owner's machine calls it and carries its commands on."""

    def __init__(
        self,
        number: int,
        *,
        node: Address,
        job: JobPart,
        demand: WorkerDemand,
        setup: SetupPlan,
        size: int | None,
        runs_max: int | None,
        requests: Iterator[int],
        functions: dict[int, bytes],
        set_by_process: dict[str, WorkerSet],
        rescue: Rescue,
    ) -> None:
        self.number = number
        self.node = node
        self.job = job
        self.demand = demand
        self.setup = setup
        self.size = size
        self.dispatcher = Dispatcher(runs_max=runs_max)
        self.held: dict[str, WorkerPart] = {}  # by process id: setting up, ready or retiring
        self.ready: set[str] = set()
        self.requested = WorkerRequests(node, job, demand, requests)
        self.is_closing = False
        self.is_terminated = False
        self.failed_text = ""
        self.failed_kind = ""
        self.awaiting: set[int] = set()  # numbers of submitted tasks whose arguments have no values yet
        self.rescue = rescue  # what has lost a worker and will run again
        self._expected: set[str] = set()  # process ids whose end is our own wish
        self.stopping = Stopping(self.dispatcher, rescue, held=self.held, expected=self._expected)
        self._setup_failures = SetupFailures(setup.name)
        self._start_failures = 0
        self._functions = functions
        self._set_by_process = set_by_process  # the owner's. Invariant: it has this set for just the keys of `held`
        self._on_sent: Callable[[Address, list[Task]], list[Command]] | None = None
        self._is_ended = False
        self.stragglers: Stragglers | None = None
        self.notices: list[Command] = []  # of `finished`, beside what it returns; the owner takes them

    # --- what the composite asks

    def on_sent(self, callback: Callable[[Address, list[Task]], list[Command]]) -> None:
        """Have `callback` account for references before tasks go to a worker."""
        self._on_sent = callback

    def allow_repeats(self, tasks: dict[int, Task], numbers: Iterator[int]) -> None:
        """Tasks of this set are safe to repeat. `tasks`: the owner's unfinished ones; `numbers`: for more of them."""
        self.stragglers = Stragglers(self.dispatcher, tasks, numbers)

    @property
    def is_group(self) -> bool:
        """Whether the set has a size of its own."""
        return self.size is not None

    def submit(self, tasks: list[Task], now_s: float) -> list[Command]:
        """Queue tasks and send what can be sent."""
        if self.is_terminated or self._is_ended:
            # Another thread ended the set between the submitter's check and now.
            return [FailTasks(tasks, "cancelled", "the pool was terminated before the task was started")]
        if self.failed_text:
            return [FailTasks(tasks, self.failed_kind, self.failed_text)]
        dispatcher = self.dispatcher
        if len(tasks) == 1 and self.size is not None and dispatcher.is_idle:
            slot = dispatcher.idle_slot()
            if slot is not None:  # the rule for programs that wait for each result
                dispatcher.submit(tasks)
                return self._sent(dispatcher.send_one(slot, now_s))
        dispatcher.submit(tasks)
        return self.advance(now_s)

    def is_quiet(self, now_s: float) -> bool:
        """Whether `advance` would find nothing to do after results have come."""
        dispatcher = self.dispatcher
        if dispatcher.queue or dispatcher.runs_max is not None:
            return False
        if dispatcher.outstanding_count > 1 and (self.size is None or dispatcher.has_late(now_s)):
            return False
        if self.is_closing or self.requested or self._expected or self.stragglers is not None:
            return False
        return self.size is None or len(self.held) == self.size

    def advance(self, now_s: float) -> list[Command]:
        """Send tasks, move them between workers, ask for workers or let them go."""
        dispatcher = self.dispatcher
        # This runs twice for each call that waits for its result: nothing is asked that cannot matter.
        commands = self.stopping.stop_overdue(now_s) if self.stopping.deadlines else []
        if self.rescue.resting:
            dispatcher.requeue(self.rescue.due(now_s))
        if dispatcher.queue:
            for batch in dispatcher.fill(now_s):
                commands += self._sent(batch)
        if dispatcher.outstanding_count > 1 and not dispatcher.queue:
            for slot, count in dispatcher.take_back(now_s):
                commands.append(Send(slot.address, TakeBackTasks(count)))
        if self.stragglers is not None:
            for batch in self.stragglers.due(now_s):
                commands += self._sent(batch)
        if dispatcher.runs_max is not None:
            for slot in dispatcher.retire_due():
                self._expected.add(slot.address.process_id)
                commands.append(Send(slot.address, RetireWorker()))
        if self.is_closing and not self._has_work():
            self._close_now(commands)
        elif self.size is not None:
            if len(self.held) != self.size or self._expected or self.requested or self.is_closing:
                self._keep_size(commands)
        else:
            self._follow_queue(commands, now_s)
        return commands

    def next_wakeup_s(self, now_s: float) -> float | None:
        """When `advance` should be called even if nothing happens."""
        look_s = self.dispatcher.next_look_s(now_s)
        if self.rescue.resting or self.stopping.deadlines or self.stragglers is not None:
            late_s = self.stragglers.next_look_s() if self.stragglers is not None else None
            times = (look_s, self.rescue.next_due_s(), self.stopping.next_due_s(), late_s)
            look_s = min((time_s for time_s in times if time_s is not None), default=None)
        if self.is_group or self.dispatcher.queue:
            return look_s
        if look_s is None and not self.requested and self._may_start():
            # Another lease may be worth having; once it is asked for, its coming is the next thing to happen.
            look_s = min(self.dispatcher.stuck_since_s(), default=None)
        idle = [slot.idle_since_s for slot in self.dispatcher.slots.values() if not slot.outstanding]
        if idle:
            release_s = min(idle) + LINGER_S
            return release_s if look_s is None else min(release_s, look_s)
        return look_s

    # --- what happens to workers

    def granted(self, request: int, worker: WorkerPart, now_s: float) -> list[Command]:
        """A node gave us a worker."""
        is_wanted = request in self.requested and (not self.is_closing or self._has_work())
        self.requested.count_down(request)
        process_id = worker.address.process_id
        if not is_wanted:
            # It was on its way when the request was cancelled. (Its node ends it unless others can use it.)
            return [Send(worker.address.node, ReleaseWorkers([worker.lease], False))]
        self.held[process_id] = worker
        self._set_by_process[process_id] = self
        env = dict(self.setup.env)
        if worker.gpu_ids:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, worker.gpu_ids))
        setup = SetupWorker(env, self.setup.payload, self.setup.name, worker.lease, self.setup.references)
        if self.is_group:
            return [Send(worker.address, setup)]
        commands: list[Command] = [Send(worker.address, setup)] if env else []
        return commands + self.worker_ready(process_id, now_s)

    def worker_ready(self, process_id: str, now_s: float) -> list[Command]:
        """The worker's setup is done."""
        worker = self.held.get(process_id)
        if worker is None or process_id in self.ready:
            return []
        self._setup_failures.in_a_row = self._start_failures = 0
        self.ready.add(process_id)
        slot = self.dispatcher.add_worker(worker.address, lease=worker.lease, pid=worker.pid, token=worker)
        slot.idle_since_s = now_s
        slot.is_retiring = process_id in self._expected  # the group shrank while the worker was set up
        return [SetWorkerJoined(self.number, worker), *self.advance(now_s)]

    def setup_failed(self, process_id: str, error: bytes, now_s: float) -> list[Command]:
        """The worker's initializer raised; the worker ends by itself."""
        self._expected.add(process_id)
        text, is_no_use = self._setup_failures.raised(self.size)
        return [SetSetupFailed(self.number, error, text), *(self._give_up(is_no_use, error) if is_no_use else [])]

    def _give_up(self, text: str, error: bytes) -> list[Command]:
        self.failed_text, self.failed_kind = text, "setup_failed"
        tasks = self._take_waiting()
        return [FailTasks(tasks, "setup_failed", text, None, error)] if tasks else []

    def exited(
        self, process_id: str, exit_code: int, text: str, now_s: float, *, task: LastTask = _UNKNOWN
    ) -> list[Command]:
        """A worker is no more; its tasks are tried again or fail. `task`: what it was at."""
        if process_id not in self.held:
            return []
        is_in_setup = not (process_id in self.ready or process_id in self._expected) and self.setup.payload
        commands = self._lose(process_id, exit_code, text, now_s, task)
        if is_in_setup and (is_no_use := self._setup_failures.died(self.size, text)):
            commands += [SetSetupFailed(self.number, b"", is_no_use), *self._give_up(is_no_use, b"")]
        return commands + self.advance(now_s)

    def node_lost(self, node_id: str, text: str, now_s: float) -> list[Command]:
        """A node is gone with its workers, and perhaps with requests passed on to it. Call `advance` afterwards."""
        commands = self.cancel_requests()
        # Nothing is sent before all of them are taken out: a task would go from one to the next, each time an attempt.
        for process_id in [name for name, worker in self.held.items() if worker.address.node_id == node_id]:
            commands += self._lose(process_id, -SIGKILL, lost_text(process_id, node_id, text), now_s, None)
        return commands

    def _lose(self, process_id: str, exit_code: int, text: str, now_s: float, task: LastTask | None) -> list[Command]:
        worker, is_node_lost, task = self.held.pop(process_id), task is None, task or _UNKNOWN
        was_expected = process_id in self._expected
        target = self.stopping.gone(process_id)
        self._forget(process_id)
        commands: list[Command] = []
        tasks = self.dispatcher.remove_worker(process_id)
        if self.stragglers and not self.is_terminated:
            tasks, task = self.stragglers.lost(tasks, task)
        if self.is_terminated and tasks:
            commands.append(FailTasks(tasks, "cancelled", "the pool was terminated", worker))
        elif tasks:
            again, others = self.rescue.save(tasks, GoneWorker(worker, text, task, target, is_node_lost), now_s)
            self.dispatcher.requeue(again)
            commands += others
        # After those of its tasks that fail: their errors say more, and an executor breaks at the first.
        return [*commands, SetWorkerLeft(self.number, worker, exit_code, text, was_expected, is_node_lost)]

    def request_failed(self, request: int, count: int, kind: str, text: str, now_s: float) -> list[Command]:
        """Workers that were asked for will never come."""
        self.requested.count_down(request, count)
        if self.is_terminated:
            return []
        if kind == "start_failed":
            self._start_failures += 1
            if self._start_failures < START_FAILURES_MAX:
                return self.advance(now_s)
        if self.held:
            return []  # those that are there go on
        if self.is_group:
            self.failed_text, self.failed_kind = text, kind
        tasks = self._take_waiting()
        commands: list[Command] = [FailTasks(tasks, kind, text)] if tasks else []
        return commands + self.advance(now_s) if self.is_closing else commands

    def finished(
        self, process_id: str, message: TasksFinished, now_s: float
    ) -> tuple[list[tuple[Task, TaskResult]], WorkerPart | None]:
        """A worker reports; the tasks that are done. Call `advance` afterwards."""
        slot = self.dispatcher.slots.get(process_id)
        if slot is None:
            return [], None
        slot.is_blocked = message.is_blocked
        slot.idle_since_s = now_s
        if message.run_ns:
            slot.finished_s = now_s
        dispatcher = self.dispatcher
        finished = dispatcher.finish(process_id, message.results, message.run_ns)
        if self.stopping.deadlines and not slot.outstanding:
            self.stopping.is_idle(process_id)
        if dispatcher.to_retry:
            self._retry(now_s)
        if self.stragglers:
            finished, losers = self.stragglers.finished(finished)
            for loser in losers:
                self.notices += self.stopping.discard(loser)
        if self.rescue.chunks:
            finished, again, notices = self.rescue.continue_chunks(finished, slot.token)
            self.dispatcher.requeue(again)
            self.notices += notices
        return finished, slot.token

    def _retry(self, now_s: float) -> None:
        """Tasks have raised what they are to be run again after."""
        tasks, self.dispatcher.to_retry = self.dispatcher.to_retry, []
        again: list[Task] = []
        for task in tasks:
            if not (self.stragglers and self.stragglers.holds(task)):
                self.rescue.retry(task, now_s, again)
        self.dispatcher.requeue(again)

    # --- the user's wishes

    def resize(self, size: int, now_s: float) -> list[Command]:
        """Grow or shrink a group; those that go finish what they have."""
        self.size = size
        surplus = len(self.held) - len(self._expected) + self.requested.count - size
        requested = self.requested.count
        commands: list[Command] = list(self.requested.cancel(surplus))
        surplus -= requested - self.requested.count
        for process_id, worker in self.held.items():
            if surplus > 0 and process_id not in self.ready and process_id not in self._expected:
                surplus -= 1
                self._expected.add(process_id)
                commands.append(Send(worker.address, RetireWorker()))
        for slot in sorted(self.dispatcher.slots.values(), key=lambda slot: len(slot.outstanding)):
            if surplus <= 0:
                break
            if not slot.is_retiring:
                surplus -= 1
                slot.is_retiring = True
                self._expected.add(slot.address.process_id)
                commands.append(Send(slot.address, RetireWorker()))
        return commands + self.advance(now_s)

    def close(self, now_s: float) -> list[Command]:
        """No more tasks will come."""
        self.is_closing = True
        return self.advance(now_s)

    def terminate(self) -> list[Command]:
        """End all workers and cancel all tasks, now."""
        self.is_closing = self.is_terminated = True
        commands = self.cancel_requests()
        tasks = self._take_waiting()
        for process_id, worker in self.held.items():
            self._expected.add(process_id)
            commands.append(Send(worker.address.node, KillWorker(worker.lease, SIGTERM, "terminated")))
        for process_id in list(self.dispatcher.slots):
            tasks += self.dispatcher.remove_worker(process_id)
        if self.stragglers:
            tasks += self.stragglers.held()
        if tasks:
            commands.append(FailTasks(tasks, "cancelled", "the pool was terminated"))
        self._end_if_empty(commands)
        return commands

    def stop(self, task: Task) -> list[Command]:
        """Stop a task, be it running twice, by ending its worker."""
        copy = self.stragglers.cancelled(task) if self.stragglers else None
        return self.stopping.kill_running(task) + (self.stopping.discard(copy) if copy is not None else [])

    def give_back_idle(self) -> list[Command]:
        """Others wait for CPUs: return the leases that do nothing."""
        slots = self.dispatcher.slots.values()
        return self._release([slot.address.process_id for slot in slots if not slot.outstanding])

    # --- parts of `advance`

    def _sent(self, batch: Batch) -> list[Command]:
        commands: list[Command] = []
        if batch.slot.is_long:
            self.stopping.sent(batch)
        if self._on_sent is not None:
            commands += self._on_sent(batch.slot.address, batch.tasks)
        # Missing only when the shell dropped it while another thread was about to submit: then the task fails.
        known = self._functions
        functions = [FunctionPart(n, known.get(n, b"")) for n in batch.functions] if batch.functions else []
        commands.append(Send(batch.slot.address, StartTasks(functions, [task.spec for task in batch.tasks])))
        return commands

    def _keep_size(self, commands: list[Command]) -> None:
        assert self.size is not None
        size = self.size
        if self.is_closing:
            # Workers that die or have run their number of tasks are still replaced while tasks are left for them.
            size = min(size, self.tasks_left())
        living = len(self.held) - len(self._expected)
        missing = size - living - self.requested.count
        if missing > 0 and not self.failed_text and self._may_start():
            commands.append(self.requested.ask(missing))

    def _may_start(self) -> bool:
        # Where no worker can be started any more, those that are left go on alone; the last one's end is a last try.
        return self._start_failures < START_FAILURES_MAX or not self.held

    def _follow_queue(self, commands: list[Command], now_s: float) -> None:
        dispatcher = self.dispatcher
        requested = self.requested.count
        usable = sum(1 for slot in dispatcher.slots.values() if not slot.outstanding and slot.is_open)
        wanted = leases_wanted(dispatcher, usable, now_s)
        if wanted > requested + usable:
            if self._may_start():
                commands.append(self.requested.ask(wanted - requested - usable))
        elif requested and wanted < requested:
            commands += self.requested.cancel(requested - wanted)
        if dispatcher.queue:
            return
        idle: list[str] = []
        for process_id, slot in dispatcher.slots.items():
            if slot.outstanding:
                slot.idle_since_s = now_s
            elif now_s - slot.idle_since_s >= LINGER_S:
                idle.append(process_id)
        commands += self._release(idle)

    def _release(self, process_ids: list[str]) -> list[Command]:
        commands: list[Command] = []
        for process_id in process_ids:
            worker = self.held.pop(process_id)
            self._forget(process_id)
            sent = self.dispatcher.slots[process_id].functions_sent
            if sent:  # it would keep them for as long as it lives, and gets them anew with its next lease
                commands.append(Send(worker.address, ForgetFunctions(sorted(sent))))
            self.dispatcher.remove_worker(process_id)
            commands.append(Send(worker.address.node, ReleaseWorkers([worker.lease], False)))
        return commands

    def _forget(self, process_id: str) -> None:
        self._expected.discard(process_id)
        self.stopping.gone(process_id)
        self.ready.discard(process_id)
        self._set_by_process.pop(process_id, None)

    def forget_functions(self, numbers: set[int]) -> list[Command]:
        """No task will use these functions again: have the workers drop them."""
        commands: list[Command] = []
        for slot in self.dispatcher.slots.values():
            known = slot.functions_sent & numbers
            if known:
                slot.functions_sent -= known
                commands.append(Send(slot.address, ForgetFunctions(sorted(known))))
        return commands

    def cancel_requests(self) -> list[Command]:
        """Expect no worker that has not come; one that comes nevertheless is given back."""
        return list(self.requested.cancel_all())

    def _has_work(self) -> bool:
        has_tasks = self.tasks_left() > 0
        # A pool that is closed at once has its initializer run all the same, unless it may have to wait for a GPU.
        is_setup_due = self.requested and self.setup.payload and not self.demand.resources
        return bool(has_tasks or is_setup_due) and not self.is_terminated

    def tasks_left(self) -> int:
        """How many tasks have not ended."""
        dispatcher = self.dispatcher
        resting = self.rescue.count() if self.rescue.resting else 0
        return len(dispatcher.queue) + dispatcher.outstanding_count + len(self.awaiting) + resting

    def _take_waiting(self) -> list[Task]:
        return self.dispatcher.clear() + self.rescue.clear()

    def _close_now(self, commands: list[Command]) -> None:
        commands += self.cancel_requests()
        for process_id, worker in list(self.held.items()):
            if process_id in self._expected:
                continue
            self._expected.add(process_id)
            if not self.is_group:
                commands += self._release([process_id])
            else:
                if process_id in self.ready:
                    self.dispatcher.slots[process_id].is_retiring = True
                commands.append(Send(worker.address, RetireWorker()))
        self._end_if_empty(commands)

    def _end_if_empty(self, commands: list[Command]) -> None:
        if not self.held and not self._is_ended:
            self._is_ended = True
            commands.append(SetEnded(self.number))
