"""One node's leases: who may use which of its workers, with what resources, and who waits.

    RequestWorkers --> [pending] --fits--> starting (a fork) --joined--> granted --released--> idle, or ended
                          |  \\--another node is better--> passed on
                          +--no node could ever--> RequestFailed

Task leases are bounded by free resources and reuse idle workers of the same job; groups and actors get fresh processes.
Groups without resources of their own are not bounded: two pools of two on two cores must both run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from clusterpool.core import messages as m
from clusterpool.core.infeasible import why_infeasible
from clusterpool.core.kept_gpus import KeptGpus
from clusterpool.core.leases import Lease, Pending, Worker
from clusterpool.core.messages import Address, WorkerKind
from clusterpool.core.node_events import Command, EndWorker, ForkWorker, Send, WorkerEnded
from clusterpool.core.placement import Candidate, bytes_by_node, choose_node, spread_group
from clusterpool.core.recovery_messages import RequestsLost
from clusterpool.core.resources import ResourcePool

# A request goes from node to node at most so often; then it waits where it is. More would chase a view that is old.
HOPS_MAX = 3
# A worker that its owner terminates (SIGTERM) may take so long to clean up. More would keep `Pool.terminate` waiting
# for tasks that ignore the signal, as the standard library does for ever; less might cut off who writes a file.
TERMINATED_WITHIN_S = 5.0
_ENDED_EARLY = "a worker ended while it started (its log may say why; the disk of the session folder may be full): "


class Scheduler:
    """The leases of one node."""

    def __init__(self, node_id: str, host: str, total: dict[str, float], *, process_ids: Iterator[str]) -> None:
        self.node_id = node_id
        self.host = host
        self.pool = ResourcePool(total)
        self.kept_gpus = KeptGpus(self.pool)
        self.pending: list[Pending] = []
        self.leases: dict[int, Lease] = {}
        self.workers: dict[str, Worker] = {}
        self.idle: dict[str, list[Worker]] = {}  # by job id
        self._peers: Iterable[Candidate] = []
        self._process_ids = process_ids
        self._last_lease = 0
        self._watched: set[Address] = set()
        self._reclaim_asked = False
        # By node, the owners elsewhere whose requests we passed on to it; until it is lost, or they are.
        self._passed_on: dict[str, dict[Address, None]] = {}
        self._terminated_s: dict[str, float] = {}  # by process id, since when it should be ending

    # --- requests

    def requested(self, source: Address, message: m.RequestWorkers) -> list[Command]:
        """An owner, or another node for it, wants workers."""
        pending = Pending(message, message.origin or source)
        commands: list[Command] = []
        for owner in (pending.origin, pending.job.owner):
            # A lease of an owner elsewhere must end when that owner does; idle workers end with their driver.
            commands += self.watch(owner)
        if pending.demand.kind == WorkerKind.GROUP and pending.hops == 0:
            return commands + self._place_group(pending)
        self.pending.append(pending)
        return commands + self.advance()

    def watch(self, owner: Address) -> list[Command]:
        """Have its node tell us when an owner ends that has something here."""
        # The end of a node is told by membership.
        if owner.node_id == self.node_id or owner.is_node or owner in self._watched:
            return []
        self._watched.add(owner)
        return [Send(owner.node, m.WatchProcess(owner.process_id))]

    def _place_group(self, pending: Pending) -> list[Command]:
        counts = spread_group([self._self_candidate(), *self.peers], pending.amounts, pending.count)
        if not counts:
            return [self._infeasible(pending, pending.count)]
        commands: list[Command] = []
        for node_id, count in counts.items():
            if node_id == self.node_id:
                pending.count = count
                pending.hops = 1
                self.pending.append(pending)
            else:
                commands.append(self._pass_on(pending, node_id, count))
        return commands + self.advance()

    def cancelled(self, source: Address, message: m.CancelRequest) -> list[Command]:
        """An owner needs fewer workers than it asked for; those passed on to other nodes come and go back."""
        count = message.count
        for pending in list(self.pending):
            if pending.key == (source, message.request) and count > 0:
                taken = min(count, pending.count)
                pending.count -= taken
                count -= taken
                if pending.count == 0:
                    self.pending.remove(pending)
        return self.advance()

    def advance(self) -> list[Command]:
        """Grant, pass on or refuse what is pending."""
        commands: list[Command] = []
        blocked: set[tuple[tuple[str, int], ...]] = set()
        for pending in list(self.pending):
            shape = tuple(sorted(pending.amounts.items()))
            if shape in blocked and not (pending.demand.strategy or self.kept_gpus.has_for(pending.job.job_id)):
                continue
            commands += self._serve(pending)
            if pending.count == 0:
                self.pending.remove(pending)
            elif not pending.demand.strategy and pending.demand.kind != WorkerKind.GROUP:
                blocked.add(shape)  # first come, first served among equals (who could go to other nodes as well)
        if self.pending and not self._reclaim_asked:
            commands += self._ask_back()
        if not self.pending:
            self._reclaim_asked = False
        return commands

    def _serve(self, pending: Pending) -> list[Command]:
        commands: list[Command] = []
        while pending.count > 0:
            target = self._target_of(pending)
            if target is None:
                commands.append(self._infeasible(pending, pending.count))
                pending.count = 0
            elif target != self.node_id:
                commands.append(self._pass_on(pending, target, 1))
                pending.count -= 1
            elif self.pool.fits(pending.amounts) or self._is_unbounded(pending):
                commands += self._grant_one(pending)
                pending.count -= 1
            elif not self.kept_gpus.lend(pending.job.job_id, pending.amounts):
                break
        return commands

    def _is_unbounded(self, pending: Pending) -> bool:
        return pending.demand.kind == WorkerKind.GROUP and not pending.amounts

    def _target_of(self, pending: Pending) -> str | None:
        """The node that should serve the next worker of this request: here, another, or none at all."""
        demand = pending.demand
        must_be_elsewhere = demand.strategy.startswith("node:") and demand.strategy != f"node:{self.node_id}"
        if pending.hops >= HOPS_MAX or (demand.kind == WorkerKind.GROUP and pending.hops):
            return self.node_id if self.pool.could_ever_fit(pending.amounts) else None
        if not self.peers and not must_be_elsewhere:
            return self.node_id if self.pool.could_ever_fit(pending.amounts) else None
        # Whoever passed it on here chose so; from here, with another old view, it would only go in circles.
        is_simple = pending.hops > 0 or (not demand.strategy and not bytes_by_node(demand))
        if is_simple and not must_be_elsewhere and self.pool.fits(pending.amounts):
            return self.node_id
        target = choose_node([self._self_candidate(), *self.peers], pending.amounts, demand)
        if target is None or target == self.node_id:
            return target
        peer = next(peer for peer in self.peers if peer.node_id == target)
        if demand.strategy or not self.pool.could_ever_fit(pending.amounts):
            return target
        if all(peer.free.get(name, 0) >= amount for name, amount in pending.amounts.items()):
            return target
        return self.node_id  # full everywhere: wait at home, and look again when the view changes

    def _self_candidate(self) -> Candidate:
        return Candidate(self.node_id, self.pool.total, self.pool.free, len(self.pending), len(self.leases), True)

    def _pass_on(self, pending: Pending, node_id: str, count: int) -> Command:
        # Remember what we sent there until the node's next heartbeat says it itself.
        for position, peer in enumerate(self.peers):
            if peer.node_id == node_id:
                free = dict(peer.free)
                for name, amount in pending.amounts.items():
                    free[name] = free.get(name, 0) - amount * count
                self.peers[position] = peer._replace(free=free, workers=peer.workers + count)
        if pending.origin.node_id != self.node_id:
            self._passed_on.setdefault(node_id, {})[pending.origin] = None
        message = m.RequestWorkers(
            pending.request, count, pending.demand, pending.job, pending.hops + 1, pending.origin
        )
        return Send(Address(node_id, node_id), message)

    def _infeasible(self, pending: Pending, count: int) -> Command:
        text = why_infeasible(pending.demand, [self._self_candidate(), *self.peers])
        return Send(pending.origin, m.RequestFailed(pending.request, count, "infeasible", text))

    # --- granting

    def _grant_one(self, pending: Pending) -> list[Command]:
        gpu_ids = self.pool.take(pending.amounts)
        reusable = self.idle.get(pending.job.job_id) if pending.demand.kind == WorkerKind.TASK else None
        # A GPU's index goes through the environment, which is read once, when CUDA starts: a fresh process for each.
        worker = reusable.pop() if reusable and not gpu_ids and not pending.demand.env else None
        self._last_lease += 1
        if worker is not None:
            lease = self.leases[self._last_lease] = Lease(self._last_lease, pending, worker, gpu_ids)
            worker.lease = lease
            return [self._granted(lease)]
        worker = Worker(next(self._process_ids), pending.job, pending.demand.name)
        worker.actor_id, worker.actor_life = pending.demand.actor_id, pending.demand.actor_life
        lease = self.leases[self._last_lease] = Lease(self._last_lease, pending, worker, gpu_ids)
        worker.lease = lease
        self.workers[worker.process_id] = worker
        demand = pending.demand
        is_lease = demand.kind == WorkerKind.TASK
        return [ForkWorker(worker.process_id, pending.job, demand.env, demand.name, demand.outlives_owner, is_lease)]

    def _granted(self, lease: Lease) -> Command:
        lease.is_granted = True
        worker = lease.worker
        part = m.WorkerPart(
            Address(self.node_id, worker.process_id), worker.pid, self.host, lease.number, lease.gpu_ids
        )
        return Send(lease.origin, m.WorkerGranted(lease.request, part))

    def _ask_back(self) -> list[Command]:
        origins = {lease.origin for lease in self.leases.values() if lease.kind == WorkerKind.TASK}
        self._reclaim_asked = bool(origins)
        return [Send(origin, m.ReclaimLeases()) for origin in sorted(origins)]

    # --- workers come and go

    def worker_joined(self, process_id: str, pid: int) -> list[Command]:
        """A forked worker is ready for messages."""
        worker = self.workers.get(process_id)
        if worker is None:
            return []
        worker.pid = pid
        worker.has_joined = True
        if worker.lease is None:
            return [self._end(worker, "nobody wants it any more")]
        return [self._granted(worker.lease)]

    def fork_failed(self, process_id: str, text: str, kind: str = "start_failed") -> list[Command]:
        """No such worker will come; `kind` as in RequestFailed."""
        worker = self.workers.pop(process_id, None)
        self.kept_gpus.process_ended(process_id)
        if worker is None or worker.lease is None:
            return []
        lease = worker.lease
        self._free(lease)
        failed = m.RequestFailed(lease.request, 1, kind, f"a worker could not be started: {text}")
        return [Send(lease.origin, failed), *self.advance()]

    def worker_ended(self, ended: WorkerEnded) -> list[Command]:
        """A worker process is gone."""
        process_id = ended.process_id
        worker = self.workers.pop(process_id, None)
        self.kept_gpus.process_ended(process_id)
        if worker is None:
            return []
        idle = self.idle.get(worker.job.job_id, [])
        if worker in idle:
            idle.remove(worker)
        lease = worker.lease
        if lease is None:
            return self.advance()
        self._free(lease)
        text = worker.end_text or ended.text
        address = Address(self.node_id, process_id)
        if lease.is_granted:
            cause = worker.end_cause or ended.cause
            message: m.Message = m.WorkerExited(
                lease.number, address, ended.exit_code, text, ended.task, ended.peak_bytes, cause
            )
        else:
            message = m.RequestFailed(lease.request, 1, "start_failed", _ENDED_EARLY + text)
        return [Send(lease.origin, message), *self.advance()]

    def _free(self, lease: Lease) -> None:
        if self.leases.pop(lease.number, None) is None:
            return
        self._give_back(lease)
        lease.worker.lease = None

    def _give_back(self, lease: Lease) -> None:
        amounts = lease.amounts
        if lease.is_blocked:
            amounts = {name: amount for name, amount in amounts.items() if name != "CPU"}
        self.pool.give_back(amounts, lease.gpu_ids)

    def released(self, source: Address, message: m.ReleaseWorkers) -> list[Command]:
        """An owner needs these workers no more."""
        commands: list[Command] = []
        for number in message.leases:
            lease = self.leases.get(number)
            if lease is None or lease.origin != source:
                continue
            worker = lease.worker
            # Variables of one function must not be seen by another.
            is_reusable = lease.kind == WorkerKind.TASK and not (message.ends or lease.gpu_ids or lease.has_env)
            self.kept_gpus.keep(lease)
            self._free(lease)
            idle = self.idle.setdefault(worker.job.job_id, [])
            # A worker to which a signal is on its way must not be handed to anybody.
            if is_reusable and not worker.is_ending and len(idle) < self._idle_max():
                idle.append(worker)
            else:
                commands.append(self._let_end(worker))
        self._reclaim_asked = False
        return commands + self.advance()

    def _idle_max(self) -> int:
        # Each costs some megabytes; fewer than CPUs would mean forks in a program's ordinary course.
        return max(2, 2 * (self.pool.total.get("CPU", 0) // 10_000))

    def kill(self, source: Address, message: m.KillWorker, now_s: float) -> list[Command]:
        """An owner wants its worker dead at once."""
        lease = self.leases.get(message.lease)
        if lease is None or lease.origin != source:
            return []
        # A `Process` may handle any other signal, and go on; and what it has started is not ours.
        process_id, is_process = lease.worker.process_id, lease.outlives_owner
        if message.signal == m.SIGKILL or not is_process:
            lease.worker.is_ending = True
            lease.worker.end_text = message.text
        if message.signal == m.SIGTERM and not is_process:
            self._terminated_s.setdefault(process_id, now_s)
        return [EndWorker(process_id, message.signal, with_group=not is_process)]

    def time_passed(self, now_s: float) -> list[Command]:
        """A tick of the clock: workers that ignore being terminated are killed."""
        late = [name for name, since_s in self._terminated_s.items() if now_s - since_s >= TERMINATED_WITHIN_S]
        for process_id in late:
            del self._terminated_s[process_id]
        return [EndWorker(name, m.SIGKILL, with_group=True) for name in late if name in self.workers]

    def kill_actor(self, actor_id: str) -> list[Command]:
        """End the worker that holds this actor, if it is here."""
        text = "the actor was killed with clusterpool.kill()"
        commands = [self._end(worker, text) for worker in self.workers.values() if worker.actor_id == actor_id]
        for pending in [pending for pending in self.pending if actor_id and pending.demand.actor_id == actor_id]:
            self.pending.remove(pending)
            commands.append(Send(pending.origin, m.RequestFailed(pending.request, pending.count, "killed", text)))
        return commands

    def end_worker(self, process_id: str, text: str) -> list[Command]:
        """This worker must not go on."""
        return [self._end(self.workers[process_id], text)]

    def _let_end(self, worker: Worker) -> Command:
        # Not by a signal: it may own objects that others have references to.
        worker.is_ending = True
        return Send(Address(self.node_id, worker.process_id), m.RetireWorker(is_awaited=False))

    def _end(self, worker: Worker, text: str) -> Command:
        worker.is_ending = True
        worker.end_text = text
        return EndWorker(worker.process_id, m.SIGKILL, with_group=True)

    # --- blocked workers lend their CPU

    def handlers_of_lending(self) -> dict[type, Callable[[Address, m.Message, float], list[Command]]]:
        """By type of message, what workers say of their leases."""
        return {
            m.WorkerBlocked: lambda source, _, __: self.blocked(source.process_id),
            m.WorkerUnblocked: lambda source, _, __: self.unblocked(source.process_id),
            m.WorkerLingers: lambda source, _, __: self.lingers(source.process_id),
        }

    def blocked(self, process_id: str) -> list[Command]:
        """A worker waits for tasks that need a CPU themselves."""
        worker = self.workers.get(process_id)
        lease = worker.lease if worker is not None else None
        if lease is None or lease.is_blocked:
            return []
        lease.is_blocked = True
        self.pool.give_back({"CPU": lease.amounts.get("CPU", 0)} if "CPU" in lease.amounts else {}, [])
        return self.advance()

    def unblocked(self, process_id: str) -> list[Command]:
        """It goes on at once; the node has less than nothing for a while rather than keep it waiting."""
        worker = self.workers.get(process_id)
        lease = worker.lease if worker is not None else None
        if lease is None or not lease.is_blocked:
            return []
        lease.is_blocked = False
        if "CPU" in lease.amounts:
            self.pool.take({"CPU": lease.amounts["CPU"]})
        return []

    def lingers(self, process_id: str) -> list[Command]:
        """A worker has done all that it was leased for; what its tasks still wait for may be what it holds."""
        worker = self.workers.get(process_id)
        if worker is None:
            return []
        if worker.lease is not None:
            self.kept_gpus.keep(worker.lease)
            self._give_back(worker.lease)
            worker.lease.amounts = {}
        self.kept_gpus.process_lingers(process_id)
        return self.advance()

    # --- owners come and go

    def owner_ended(self, address: Address, *, ends_job: str = "") -> list[Command]:
        """An owner is gone: nobody waits for its tasks. `ends_job`: it was this job's driver."""
        self._watched.discard(address)
        for owners in self._passed_on.values():
            owners.pop(address, None)
        self.pending = [
            pending
            for pending in self.pending
            if pending.origin != address
            and (pending.job.detached or not (pending.job.owner == address or pending.job.job_id == ends_job))
        ]
        commands: list[Command] = []
        for worker in self.workers.values():
            if worker.job.detached:
                continue
            is_of_job = worker.job.owner == address or worker.job.job_id == ends_job
            lease = worker.lease
            is_leased = lease is not None and lease.origin == address
            # A child that still starts would wait in vain for what it shall run.
            if is_leased and lease is not None and lease.outlives_owner and lease.is_granted:
                is_leased = False
                if not is_of_job:  # so would one that started just now, and only it knows whether it has got that
                    retire = m.RetireWorker(is_awaited=False)
                    commands.append(Send(Address(self.node_id, worker.process_id), retire))
            if is_of_job or is_leased:
                commands.append(self._end(worker, "its owner has ended"))
        for job_id in [job_id for job_id, idle in self.idle.items() if not idle or idle[0].job.owner == address]:
            del self.idle[job_id]
        return commands + self.advance()

    def has_workers_of(self, driver: Address) -> bool:
        """Whether workers of this driver's job still live, other than those that outlive it."""
        return any(worker.job.owner == driver and not worker.job.detached for worker in self.workers.values())

    def owners_on(self, node_id: str) -> list[Address]:
        """The processes of another node that have, or wait for, something here."""
        if not self.leases and not self.pending and not self.workers and not self._watched:
            return []  # most often, when a thousand nodes join
        owners = {lease.origin for lease in self.leases.values()}
        owners |= {pending.origin for pending in self.pending} | {pending.job.owner for pending in self.pending}
        owners |= {worker.job.owner for worker in self.workers.values()}
        owners |= self._watched  # their node does not watch them for us any more, even if it comes back
        return sorted(owner for owner in owners if owner.node_id == node_id)

    def end_all(self, text: str) -> list[Command]:
        """End every worker of this node."""
        self.idle.clear()
        return [self._end(worker, text) for worker in self.workers.values()]

    @property
    def peers(self) -> list[Candidate]:
        """The trusted other nodes, newest known state."""
        if not isinstance(self._peers, list):
            self._peers = list(self._peers)
        return self._peers

    def peers_changed(self, peers: Iterable[Candidate]) -> list[Command]:
        """The view of the cluster has changed."""
        # Looked at when a request wants to know: in a large cluster the view changes far more often than that.
        self._peers = peers
        return self.advance()

    def peer_joined(self, node_id: str) -> list[Command]:
        """A node can be reached from now on; its owners may have asked before, by way of another node."""
        owners = self.owners_on(node_id)
        self._watched.update(owners)
        return [Send(Address(node_id, node_id), m.WatchProcess(owner.process_id)) for owner in owners]

    def peer_lost(self, node_id: str) -> list[Command]:
        """A node is lost, and with it what we had passed on to it.

        Owners hear of the loss from their own nodes, and ask again; but that may have been before a request of theirs
        reached us, who did not know yet, and passed it on to the dead.
        """
        # If it lives again, it has forgotten that we watch owners there.
        self._watched = {owner for owner in self._watched if owner.node_id != node_id}
        for owners in self._passed_on.values():
            for owner in [owner for owner in owners if owner.node_id == node_id]:
                del owners[owner]
        return [Send(owner, RequestsLost(node_id)) for owner in self._passed_on.pop(node_id, {})]

    def counts_by_state(self) -> dict[str, float]:
        """Figures for people."""
        return {
            "workers": float(len(self.workers)),
            "idle": float(sum(len(idle) for idle in self.idle.values())),
            "leases": float(len(self.leases)),
            "pending": float(sum(pending.count for pending in self.pending)),
        }
