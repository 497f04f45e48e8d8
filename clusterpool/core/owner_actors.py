"""The actors' half of an owner: channels to actors, and the leases of those that this process created."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.actor_messages import CallsResumed, ResultsTaken
from clusterpool.core.actors import ActorChannel
from clusterpool.core.dispatch import Task
from clusterpool.core.messages import Address, TaskStatus
from clusterpool.core.rescue import lost_text
from clusterpool.core.stream_pace import NO_BOUND

if TYPE_CHECKING:
    from clusterpool.core.owner import OwnerMachine

Commands = list[e.Command]


class OwnerActors:
    """All actors that this process has a handle of."""

    def __init__(self, owner: OwnerMachine) -> None:
        self._owner = owner
        self.channels: dict[str, ActorChannel] = {}
        self.channel_of_process: dict[str, ActorChannel] = {}
        self._channel_of_request: dict[int, ActorChannel] = {}

    # --- from the shell

    def opened(self, event: e.ActorOpened, now_s: float) -> Commands:
        """Create an actor: request a worker; the creation task waits for its arguments meanwhile."""
        owner = self._owner
        channel = self.channels[event.actor.actor_id] = ActorChannel(event.actor)
        channel.is_creator = True
        channel.creation = event.creation
        if event.lifetime:
            owner.objects.lifetimes[event.lifetime] = lambda: self._released(channel)
        channel.setup = event.setup
        channel.wish = (event.demand, msgspec.structs.replace(owner.job, detached=event.actor.detached))
        commands: Commands = [self._request_worker(channel)]
        if event.arguments is not None:
            commands += owner.await_arguments(event.creation, event.arguments, channel, now_s)
        else:
            owner.tasks[event.creation.spec.number] = event.creation
        return commands

    def _request_worker(self, channel: ActorChannel) -> e.Command:
        owner = self._owner
        assert channel.wish is not None
        demand, job = channel.wish
        demand = msgspec.structs.replace(demand, actor_life=channel.actor.life)
        channel.request = next(owner.requests)
        channel.is_worker_asked = True
        self._channel_of_request[channel.request] = channel
        return e.Send(owner.node, m.RequestWorkers(channel.request, 1, demand, job))

    def met(self, event: e.ActorMet, _now_s: float) -> Commands:
        """A handle of somebody else's actor arrived."""
        if event.actor.actor_id in self.channels:
            return []
        channel = self.channels[event.actor.actor_id] = ActorChannel(event.actor)
        channel.lifetime = event.lifetime
        if event.actor.address is not None:
            self.channel_of_process[event.actor.address.process_id] = channel
            return self._owner.objects.watch(event.actor.address)
        return self._locate(channel)

    def _locate(self, channel: ActorChannel, life: int = 0) -> Commands:
        channel.request = request = next(self._owner.requests)
        self._channel_of_request[request] = channel
        return [e.Send(self._owner.node, m.LocateActor(request, channel.actor.actor_id, "", "", life))]

    def calls_submitted(self, event: e.ActorCallsSubmitted, _now_s: float) -> Commands:
        """Calls without references, in order."""
        channel = self.channels[event.actor_id]
        tasks = self._owner.tasks
        for task in event.tasks:
            tasks[task.spec.number] = task
            if task.sink is None:
                self._owner.objects.expect_results(task)
        if channel.actor.state == "dead":
            return self._owner.checked(channel.refused(event.tasks))
        self.submit(channel, event.tasks)
        return self.send_ready(channel)

    def submit(self, channel: ActorChannel, tasks: list[Task]) -> None:
        """Queue calls. Until they are done the actor must not end, even if our handle goes."""
        channel.submit(tasks)
        if channel.lifetime is not None and not channel.is_held:
            channel.is_held = True
            self._owner.objects.table.hold(channel.lifetime)

    def _let_go_if_done(self, channel: ActorChannel) -> Commands:
        if not channel.is_held or channel.queue or channel.outstanding:
            return []
        assert channel.lifetime is not None
        channel.is_held = False
        return self._owner.objects.dropped([(channel.lifetime.owner, channel.lifetime.number)])

    def _released(self, channel: ActorChannel) -> Commands:
        """The last handle of an actor that we created is gone: it ends when it has done what it was asked."""
        channel.is_released = True
        if channel.actor.state == "dead":
            self.channels.pop(channel.actor.actor_id, None)
        return self._retire_if_done(channel)

    def _retire_if_done(self, channel: ActorChannel) -> Commands:
        address = channel.actor.address
        if not channel.is_released or channel.is_retiring or channel.queue or address is None:
            return []
        if not channel.is_creation_sent:
            return []
        channel.is_retiring = True
        return [e.Send(address, m.RetireWorker(is_awaited=False))]

    def send_ready(self, channel: ActorChannel) -> Commands:
        """Send the calls that can go."""
        if channel.actor.state == "dead" and channel.queue:
            return self._owner.checked(channel.died(channel.actor.text, channel.error)) + self._let_go_if_done(channel)
        commands: Commands = []
        for tasks, send in channel.send_ready(self._owner.functions.payloads):
            commands += self._owner.hand_over_arguments(send.destination, tasks)
            commands.append(send)
            commands += self._pace_streams(channel, send.destination, tasks)
        return commands + self._retire_if_done(channel)

    def _pace_streams(self, channel: ActorChannel, address: Address, tasks: list[Task]) -> Commands:
        """Calls were sent. A generator that others wait behind does not pause: who takes its items may be waiting, too.

        (Zipping two streams of one actor, for example, would else never end.)
        """
        freed: list[int] = []
        for task in tasks:
            if channel.streams:
                freed += sorted(channel.streams)
                channel.streams.clear()
            if task.spec.extras is not None and task.spec.extras.returns == -1:
                channel.streams.add(task.spec.number)
        return [e.Send(address, m.StreamTaken(number, NO_BOUND)) for number in freed]

    def is_needed(self) -> bool:
        """Whether an actor that this process created would end with it."""
        return any(
            channel.is_creator and channel.actor.state != "dead" and not channel.actor.detached
            for channel in list(self.channels.values())
        )

    # --- from the node and the actor's worker

    def granted(self, _source: Address, message: m.WorkerGranted, _now_s: float) -> Commands:
        """The worker of an actor that we create."""
        channel = self._channel_of_request.pop(message.request, None)
        worker = message.worker
        if channel is None:
            return [e.Send(worker.address.node, m.ReleaseWorkers([worker.lease], False))]
        channel.lease = worker.lease
        channel.actor = msgspec.structs.replace(channel.actor, address=worker.address)
        self.channel_of_process[worker.address.process_id] = channel
        setup = channel.setup
        env = dict(setup.env)
        if worker.gpu_ids:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, worker.gpu_ids))
        commands: Commands = [e.Send(worker.address, m.SetupWorker(env, b"", setup.name, worker.lease))]
        resumed = self._resume(channel)
        return commands + self.send_ready(channel) + resumed

    def request_failed(self, message: m.RequestFailed) -> Commands:
        """No worker for an actor."""
        channel = self._channel_of_request.pop(message.request, None)
        if channel is None:
            return []
        return self._died(channel, message.text)

    def cannot_create(self, channel: ActorChannel, failure: e.FailTasks) -> Commands:
        """An argument of the constructor has no value: give back the worker, or do not wait for it."""
        commands: Commands = []
        address = channel.actor.address
        if address is not None:
            self.channel_of_process.pop(address.process_id, None)
            commands.append(e.Send(address.node, m.ReleaseWorkers([channel.lease], True)))
        elif self._channel_of_request.pop(channel.request, None) is not None:
            commands.append(e.Send(self._owner.node, m.CancelRequest(channel.request, 1)))
        return commands + self._died(channel, failure.text, failure.error)

    def finished(self, source: Address, message: m.TasksFinished) -> Commands:
        """Results of calls, or of the creation."""
        channel = self.channel_of_process.get(source.process_id)
        if channel is None:
            return []
        finished = channel.finished(message.results)
        if channel.streams:
            channel.streams.difference_update(result.number for result in message.results)
        creation = channel.creation
        commands: Commands = []
        rest = []
        for task, result in finished:
            if task is not creation:
                rest.append((task, result))
                continue
            commands += self._created(channel, result)
        if channel.actor.is_logged and rest:
            commands.append(e.Send(source, ResultsTaken([task.spec.number for task, _ in rest])))
        worker = m.WorkerPart(source, 0, "", channel.lease)
        commands += self._owner.settle(rest, worker, channel)
        if channel.queue:
            commands += self.send_ready(channel)
        return commands + self._let_go_if_done(channel)

    def has_lease(self, address: Address) -> bool:
        """Whether we created the actor that lives there, so that its node reports its end to us."""
        channel = self.channel_of_process.get(address.process_id)
        return channel is not None and channel.is_creator

    def _created(self, channel: ActorChannel, result: m.TaskResult) -> Commands:
        creation = channel.creation
        assert creation is not None
        self._owner.tasks.pop(creation.spec.number, None)
        # An actor that may come again needs them again.
        commands = [] if channel.actor.restarts else self._owner.objects.release_arguments(creation)
        if result.status == TaskStatus.OK:
            channel.actor = msgspec.structs.replace(channel.actor, state="alive")
            commands.append(e.Send(self._owner.node, m.ActorChanged(channel.actor)))
            commands.append(e.ActorMoved(channel.actor))
            return commands + self.send_ready(channel)
        error = result.payload if result.status in (TaskStatus.ERROR, TaskStatus.UNLOADABLE) else b""
        address = channel.actor.address
        commands += self._died(channel, "its constructor raised an exception", error)
        if address is not None:
            commands.append(e.Send(address.node, m.KillWorker(channel.lease, 15, "the actor's constructor failed")))
        return commands

    def located(self, message: m.ActorLocated) -> Commands:
        """The node found (or did not find) an actor that we have a handle of; or tells a creator what became of its."""
        actor = message.actor
        channel = self._channel_of_request.pop(message.request, None)
        if channel is None and actor.state == "dead":  # nobody asked, but its creator has to know
            channel = self.channels.get(actor.actor_id)
        if channel is None or channel.actor.state == "dead":
            return []
        if channel.is_creator:
            return self._judged(channel, actor)
        if actor.state != "alive" or actor.address is None:
            return self._died(channel, actor.text or "the actor is not known any more", actor.error)
        channel.actor = msgspec.structs.replace(channel.actor, state="alive", address=actor.address, life=actor.life)
        self.channel_of_process[actor.address.process_id] = channel
        commands = self._owner.objects.watch(actor.address)
        resumed = self._resume(channel)
        return [*commands, e.ActorMoved(channel.actor), *self.send_ready(channel), *resumed]

    def _resume(self, channel: ActorChannel) -> Commands:
        """A next life of an actor with checkpoints need not keep results for us but of these calls.

        It goes behind the calls: if nothing gets there, what comes back first tells that they were not begun.
        """
        actor = channel.actor
        if not actor.is_logged or actor.life == 0 or actor.address is None:
            return []
        return [e.Send(actor.address, CallsResumed([task.spec.number for task in channel.queue]))]

    def killed(self, event: e.ActorKilled, _now_s: float) -> Commands:
        """The user has ended an actor that might have come again; the registry hears of it from the node."""
        channel = self.channels.get(event.actor_id)
        if channel is None or channel.actor.state == "dead":
            return []
        return self._judged(channel, msgspec.structs.replace(channel.actor, state="dead", text=event.text))

    def _judged(self, channel: ActorChannel, actor: m.ActorPart) -> Commands:
        """What is to become of an actor: it may be started again, or is dead."""
        if actor.state == "restarting":
            channel.actor = msgspec.structs.replace(channel.actor, life=actor.life)
            return [self._request_worker(channel)]
        commands: Commands = []
        address = channel.actor.address
        if address is not None:
            self.channel_of_process.pop(address.process_id, None)
            if channel.is_creator:
                commands.append(e.Send(address.node, m.KillWorker(channel.lease, 9, actor.text)))
        elif self._channel_of_request.pop(channel.request, None) is not None and channel.is_worker_asked:
            commands.append(e.Send(self._owner.node, m.CancelRequest(channel.request, 1)))
        return commands + self._died(channel, actor.text)

    def process_gone(self, address: Address, text: str, *, exit_code: int = -1, is_node_lost: bool = False) -> Commands:
        """A process ended; it may have been an actor's worker."""
        channel = self.channel_of_process.pop(address.process_id, None)
        if channel is None:
            return []
        actor = channel.actor
        if is_node_lost and channel.is_creator and not channel.is_creation_sent:
            # Its constructor has not run: nothing is lost but a worker.
            channel.actor = msgspec.structs.replace(actor, address=None)
            return [self._request_worker(channel)]
        is_done = channel.is_creator and (exit_code == 0 or (channel.is_retiring and not channel.outstanding))
        if not actor.may_return or is_done:
            return self._died(channel, text)
        commands = self._owner.checked(channel.life_ended(text))
        if channel.is_creator:
            channel.request = next(self._owner.requests)
            channel.is_worker_asked = False
            self._channel_of_request[channel.request] = channel
            commands.append(e.Send(self._owner.node, m.LifeEnded(channel.request, actor.actor_id, actor.life, text)))
        else:
            commands += self._locate(channel, actor.life + 1)
        return [*commands, e.ActorMoved(channel.actor), *self._let_go_if_done(channel)]

    def undelivered(self, message: m.TasksUnsent) -> Commands:
        """Calls surely did not get to their actor: its next life may run them, retries or not."""
        channel = self.channel_of_process.get(message.address.process_id)
        if channel is not None:
            channel.undelivered.update(message.numbers)
        return []

    def node_gone(self, node_id: str, text: str) -> Commands:
        """A node is lost, with its actors."""
        commands = self.ask_again()
        for channel in list(self.channel_of_process.values()):
            if channel.actor.address is not None and channel.actor.address.node_id == node_id:
                gone = lost_text(channel.actor.address.process_id, node_id, text)
                commands += self.process_gone(channel.actor.address, gone, is_node_lost=True)
        return commands

    def ask_again(self) -> Commands:
        """Requests may have gone with the node that they were passed on to."""
        commands: Commands = []
        for request, channel in list(self._channel_of_request.items()):
            if channel.is_creator and channel.request == request and channel.is_worker_asked:
                # What comes for the old one nevertheless is given back.
                del self._channel_of_request[request]
                commands.append(e.Send(self._owner.node, m.CancelRequest(request, 1)))
                commands.append(self._request_worker(channel))
        return commands

    def _died(self, channel: ActorChannel, text: str, error: bytes = b"") -> Commands:
        if channel.actor.state == "dead":
            return []
        commands = self._owner.checked(channel.died(text, error))
        if channel.creation is not None:
            self._owner.tasks.pop(channel.creation.spec.number, None)
            commands += self._owner.objects.release_arguments(channel.creation)
        if channel.is_creator:
            commands.append(e.Send(self._owner.node, m.ActorChanged(channel.actor)))
        if channel.is_released:
            self.channels.pop(channel.actor.actor_id, None)
        commands.append(e.ActorMoved(channel.actor))
        return commands + self._let_go_if_done(channel)
