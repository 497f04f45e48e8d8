"""Detached actors that this node makes, for the first time or again: it is the owner of their creation.

    RequestWorkers --> asked --granted--> creating --finished--> (the registry says: alive, kept by the node it runs on)
                         |                    |
                         +------ failed ------+--> the life is over: the registry says who starts the next one, if any

A detached actor has no creator to depend on: class, arguments and demand lie in the control store. The worker may be on
any node; its own node keeps the actor once it lives, so that one node's death is one actor's at most.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from clusterpool.core import messages as m
from clusterpool.core.actor_messages import ActorCreation, decode_creation
from clusterpool.core.messages import Address, TaskStatus
from clusterpool.core.node_events import Send

Commands = list[Any]


class Creation:
    """One actor on its way to a worker."""

    __slots__ = ("actor", "plan", "request", "worker")

    def __init__(self, actor: m.ActorPart, plan: ActorCreation, request: int) -> None:
        self.actor = actor
        self.plan = plan
        self.request = request
        self.worker: m.WorkerPart | None = None


class ActorKeeper:
    """`on_ended(actor, text)`: a life is over before it began; `call` asks the control store."""

    def __init__(
        self,
        address: Address,
        requests: Iterator[int],
        call: Callable[..., Commands],
        on_ended: Callable[[str, int, str], Commands],
    ) -> None:
        self.address = address
        self.creations: dict[str, Creation] = {}  # by actor id
        self._requests = requests
        self._call = call
        self._on_ended = on_ended

    def begin(self, actor: m.ActorPart, encoded: bytes) -> Commands:
        """Make this life of an actor; the registry has given it to us."""
        known = self.creations.get(actor.actor_id)
        if known is not None and known.actor.life >= actor.life:
            return []
        try:
            plan = decode_creation(encoded)
        except msgspec.MsgspecError as exc:
            text = f"what is needed to start it again cannot be read ({exc}): another version of clusterpool wrote it"
            return self._call("bury_actor", {"actor_id": actor.actor_id, "text": text, "error": ""})
        creation = Creation(actor, plan, next(self._requests))
        self.creations[actor.actor_id] = creation
        demand = msgspec.structs.replace(plan.demand, actor_life=actor.life)
        return [Send(self.address, m.RequestWorkers(creation.request, 1, demand, plan.job))]

    def granted(self, message: m.WorkerGranted) -> Commands:
        """A worker for one of them."""
        worker = message.worker
        creation = next((item for item in self.creations.values() if item.request == message.request), None)
        if creation is None:
            return [Send(worker.address.node, m.ReleaseWorkers([worker.lease], True))]
        creation.worker = worker
        plan = creation.plan
        env = dict(plan.env)
        if worker.gpu_ids:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, worker.gpu_ids))
        spec = plan.spec
        assert spec.extras is not None
        if spec.extras.actor is not None:
            actor = msgspec.structs.replace(spec.extras.actor, life=creation.actor.life)
            spec = msgspec.structs.replace(spec, extras=msgspec.structs.replace(spec.extras, actor=actor))
        return [
            Send(worker.address, m.SetupWorker(env, b"", plan.name, worker.lease)),
            Send(worker.address, m.StartTasks([m.FunctionPart(spec.function, plan.class_payload)], [spec])),
        ]

    def request_failed(self, message: m.RequestFailed) -> Commands:
        """No worker will come."""
        for creation in self.creations.values():
            if creation.request == message.request:
                return self._ended(creation, message.text)
        return []

    def finished(self, source: Address, message: m.TasksFinished) -> Commands:
        """The constructor has returned, or raised."""
        creation = self._creation_at(source)
        if creation is None or not message.results:
            return []
        result = message.results[0]
        del self.creations[creation.actor.actor_id]
        assert creation.worker is not None
        actor = creation.actor
        kill = Send(source.node, m.KillWorker(creation.worker.lease, m.SIGKILL, "its actor is not wanted here"))
        if result.status == TaskStatus.OK:
            arguments = {"actor_id": actor.actor_id, "life": actor.life, "address": source, "is_kept": True}
            # Refused: it was killed meanwhile, or others had taken us for dead and made it elsewhere.
            return self._call("start_life", arguments, lambda is_started, *_: [] if is_started else [kill])
        error = ""
        if result.status in (TaskStatus.ERROR, TaskStatus.UNLOADABLE):
            error = base64.b64encode(result.payload).decode()
        text = "its constructor raised an exception"
        return [*self._call("bury_actor", {"actor_id": actor.actor_id, "text": text, "error": error}), kill]

    def worker_exited(self, message: m.WorkerExited) -> Commands:
        """A worker that we had leased is no more."""
        creation = self._creation_at(message.address)
        return self._ended(creation, message.text) if creation is not None else []

    def node_lost(self, node_id: str, text: str) -> Commands:
        """A node is gone, with what we were making there; what it may have been passed is asked for anew."""
        commands: Commands = []
        for creation in list(self.creations.values()):
            if creation.worker is None:
                commands.append(Send(self.address, m.CancelRequest(creation.request, 1)))
                creation.request = next(self._requests)
                demand = msgspec.structs.replace(creation.plan.demand, actor_life=creation.actor.life)
                commands.append(Send(self.address, m.RequestWorkers(creation.request, 1, demand, creation.plan.job)))
            elif creation.worker.address.node_id == node_id:
                commands += self._ended(creation, f"its node {node_id} is gone: {text}")
        return commands

    def dropped(self, actor_id: str) -> Commands:
        """The actor is dead, or somebody else's by now. Its worker's node ends the worker."""
        creation = self.creations.pop(actor_id, None)
        if creation is None or creation.worker is not None:
            return []
        return [Send(self.address, m.CancelRequest(creation.request, 1))]

    def fenced(self) -> Commands:
        """Others make what we were making."""
        return [command for actor_id in list(self.creations) for command in self.dropped(actor_id)]

    def _creation_at(self, address: Address) -> Creation | None:
        for creation in self.creations.values():
            if creation.worker is not None and creation.worker.address == address:
                return creation
        return None

    def _ended(self, creation: Creation, text: str) -> Commands:
        del self.creations[creation.actor.actor_id]
        return self._on_ended(creation.actor.actor_id, creation.actor.life, text)
