"""Actors: objects that live in a worker of their own and take calls in order.

Source: Ray paper, section 3.1 (actors).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec

from clusterpool import errors, ids
from clusterpool.client import api, current
from clusterpool.client.actor_options import ACTOR_OPTIONS, check_actor_options, check_whole, has_checkpoints
from clusterpool.client.detached_actors import encoded_creation
from clusterpool.client.object_ref import ObjectRef
from clusterpool.client.remote_function import env_of, resources_of, returns_of, send, strategy_of, stream_buffer_of
from clusterpool.client.runtime import Runtime
from clusterpool.client.submission import put_value
from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.messages import ActorPart, ActorPlan, TaskExtras, TaskKind, WorkerDemand, WorkerKind

if TYPE_CHECKING:
    from clusterpool.client.client import Client

# Coroutines of an actor with async methods that run at once, when nobody says.
ASYNC_CONCURRENCY = 1000
# The node answers when the control store has, or says after 90 s that it is away.
STORE_PATIENCE_S = 100.0
_LIVING = ("alive", "pending", "restarting")
# For so long `kill` waits until the name is free, which takes milliseconds; a node that is cut off may need longer.
NAME_FREE_S = 5.0
_NAME_LOOK_S = 0.005


class ActorClass:
    """A class whose instances are actors; made by `@remote`."""

    def __init__(self, cls: type, options: dict[str, Any]) -> None:
        api.check_options(options, ACTOR_OPTIONS)
        check_actor_options(options)
        env_of(options)
        self._cls = cls
        self._options = options
        self._resources = resources_of(options, default_cpus=0)
        self._strategy = strategy_of(options)
        self.__name__ = cls.__name__
        self.__doc__ = cls.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"an actor is not made by a call: use {self.__name__}.remote(...)")

    def options(self, **options: Any) -> ActorClass:
        """The same class with other options."""
        return ActorClass(self._cls, {**self._options, **options})

    def remote(self, /, *args: Any, **kwargs: Any) -> ActorHandle:
        """Make an actor; its handle comes at once, and calls wait until it is there.

        Raises: NameTaken when a living actor has the name; what pickle raises for the arguments.
        """
        check_whole(self._options)
        here = api.runtime_for(args, kwargs)
        actor = self._actor_part(here)
        is_async = any(inspect.iscoroutinefunction(getattr(self._cls, name, None)) for name in actor.methods)
        concurrency = self._options.get("max_concurrency") or (ASYNC_CONCURRENCY if is_async else 1)
        if actor.is_logged and concurrency > 1:
            raise ValueError(
                f"{self.__name__} has checkpoints, so its calls run one by one, in an order that can be repeated: "
                "leave out max_concurrency= and coroutines, or checkpoint_every= and checkpoint_period_s="
            )
        plan = self._plan(actor) if actor.is_logged else None
        extras = TaskExtras(1, self.__name__, 1, concurrency=concurrency, actor=plan)
        demand = WorkerDemand(
            WorkerKind.ACTOR, self._resources, actor.name or self.__name__, env_of(self._options), self._strategy,
            actor_id=actor.actor_id,
        )  # fmt: skip
        if actor.detached:
            creation = encoded_creation(here, self._cls, (args, kwargs), demand, extras)
            existing = self._claim_name(here, actor, creation)
            return existing or _handle_of(here, actor)
        if actor.name:
            existing = self._claim_name(here, actor)
            if existing is not None:
                return existing
        task, arguments = here.maker.call(
            here.functions, self._cls, args, kwargs, None, 0, extras=extras, kind=TaskKind.CREATE_ACTOR
        )
        setup = e.SetupPlan(demand.name, demand.env)
        if not actor.name:
            # Nobody can look it up before its handle is passed on, so nobody has to wait for the registry.
            here.client.send(here.client.node, m.RegisterActor(0, actor))
        # An actor that has no name ends with its last handle: the handles share a reference to an object that stands
        # for it, and are counted as references are.
        lifetime = None if actor.name else put_value(here.client, here.values, None)
        number = lifetime.part.number if lifetime is not None else 0
        here.client.handle_event(e.ActorOpened(actor, demand, setup, task, arguments, number))
        return ActorHandle(here.client, actor, lifetime)

    def _plan(self, actor: ActorPart) -> ActorPlan:
        period_s = self._options.get("checkpoint_period_s")
        every = self._options.get("checkpoint_every") or 0
        return ActorPlan(actor.actor_id, every, -1.0 if period_s is None else float(period_s))

    def _actor_part(self, here: Runtime) -> ActorPart:
        options, job = self._options, here.client.job
        return ActorPart(
            actor_id="a" + ids.new_process_id("")[:12],
            class_name=self.__name__,
            methods=_methods_of(self._cls),
            address=None,
            state="pending",
            name=options.get("name") or "",
            namespace=options.get("namespace") or job.namespace,
            detached=options.get("lifetime") == "detached",
            job_id=job.job_id,
            restarts=options.get("max_restarts") or 0,
            retries=options.get("max_task_retries") or 0,
            is_logged=has_checkpoints(options),
        )

    def _claim_name(self, here: Runtime, actor: ActorPart, creation: bytes = b"") -> ActorHandle | None:
        """Register a named actor; the handle of the one that has the name, with `get_if_exists`."""
        wants_existing = bool(self._options.get("get_if_exists"))
        answer = here.client.request(
            lambda request: m.RegisterActor(request, actor, wants_existing, creation), timeout_s=STORE_PATIENCE_S
        )
        assert isinstance(answer, m.ActorLocated)
        if answer.actor.state == "taken":
            raise errors.NameTaken(
                f"an actor named {actor.name!r} lives in namespace {actor.namespace!r}; get_actor() gives its handle, "
                "get_if_exists=True does either"
            )
        if answer.actor.state == "failed":
            raise errors.ClusterpoolError(f"the actor could not be registered: {answer.actor.text}")
        if answer.actor.actor_id != actor.actor_id:
            return _handle_of(here, answer.actor)
        return None


def _methods_of(cls: type) -> dict[str, int]:
    """Public methods, and how many values each returns (-1: a generator, which streams)."""
    methods: dict[str, int] = {}
    for name in dir(cls):
        if name.startswith("__") and name != "__call__":
            continue
        member = inspect.getattr_static(cls, name)
        function = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
        if callable(function):
            is_stream = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
            methods[name] = -1 if is_stream else 1
    return methods


class ActorHandle:
    """Calls an actor: `handle.method.remote(...)`. Can be passed to tasks, put in containers, and pickled."""

    def __init__(self, client: Client, actor: ActorPart, lifetime: ObjectRef | None) -> None:
        self._client = client
        self._actor = actor
        self._lifetime = lifetime

    @property
    def actor_id(self) -> str:
        """The actor's id."""
        return self._actor.actor_id

    def __getattr__(self, name: str) -> ActorMethod:
        if name.startswith("__") and name != "__call__":
            raise AttributeError(name)
        returns = self._actor.methods.get(name)
        if returns is None:
            raise AttributeError(f"actor class {self._actor.class_name} has no method {name!r}")
        return ActorMethod(self, name, returns)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_handle, (msgspec.msgpack.encode(self._actor), self._lifetime)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActorHandle) and other.actor_id == self.actor_id

    def __hash__(self) -> int:
        return hash(self._actor.actor_id)

    def __repr__(self) -> str:
        return f"ActorHandle({self._actor.class_name}, {self._actor.actor_id})"


class ActorMethod:
    """One method of an actor."""

    __slots__ = ("_handle", "_name", "_returns", "_stream_buffer")

    def __init__(self, handle: ActorHandle, name: str, returns: int, stream_buffer: int = 0) -> None:
        self._handle = handle
        self._name = name
        self._returns = returns
        self._stream_buffer = stream_buffer

    def options(self, **options: Any) -> ActorMethod:
        """The same method with another `num_returns`, or `stream_buffer` where it is a generator."""
        api.check_options(options, ("num_returns", "stream_buffer"))
        returns = returns_of(options) if "num_returns" in options else self._returns
        return ActorMethod(self._handle, self._name, returns, stream_buffer_of(options))

    def remote(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the method; an ObjectRef (or as `num_returns` says) at once. Calls of one process run in order.

        Raises: what pickle raises for the arguments; NotConnected when the actor's cluster was shut down.
        """
        here = runtime_of(self._handle)
        extras = TaskExtras(1, self._name, self._returns, method=self._name, stream_buffer=self._stream_buffer)
        retries = self._handle._actor.retries
        made = here.maker.task(0, args, kwargs, None, 0, retries=retries, extras=extras, kind=TaskKind.ACTOR_CALL)
        return send(here, made, self._returns, self._submitter(here, made))

    def _submitter(self, here: Runtime, made: tuple[Any, Any]) -> Callable[[], None]:
        def submit() -> None:
            task, arguments = made
            actor_id = self._handle.actor_id
            if arguments is None:
                here.client.submit_call(actor_id, task)
            else:
                here.client.handle_event(e.TaskWithArgumentsSubmitted(0, actor_id, task, arguments))

        return submit

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(f"an actor's method cannot be pickled: pass the handle, and call {self._name}.remote there")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"an actor's method is not called directly: use {self._name}.remote(...)")


def runtime_of(handle: ActorHandle) -> Runtime:
    """The runtime that the handle belongs to.

    Raises: NotConnected when it was shut down.
    """
    here = current.get_if_any()
    if here is None or here.client is not handle._client:
        raise errors.NotConnected(
            f"{handle!r} belongs to a cluster that this process has left "
            f"({handle._client.closed_text or 'shut down'}): make the actor again, or look it up by its name"
        )
    return here


def _handle_of(here: Runtime, actor: ActorPart, lifetime: ObjectRef | None = None) -> ActorHandle:
    here.client.handle_event(e.ActorMet(actor, lifetime.part if lifetime is not None else None))
    return ActorHandle(here.client, actor, lifetime)


def _restore_handle(encoded: bytes, lifetime: ObjectRef | None) -> ActorHandle:
    actor = msgspec.msgpack.decode(encoded, type=ActorPart)
    return _handle_of(api.runtime(), actor, lifetime)


def find_actor(here: Runtime, name: str, namespace: str | None) -> ActorHandle:
    """A handle of the living actor of this name.

    Raises: ActorNotFound.
    """
    namespace = namespace or here.client.job.namespace
    answer = here.client.request(
        lambda request: m.LocateActor(request, "", name, namespace), timeout_s=STORE_PATIENCE_S
    )
    assert isinstance(answer, m.ActorLocated)
    if answer.actor.state not in _LIVING:
        raise errors.ActorNotFound(f"no living actor is named {name!r} in namespace {namespace!r}")
    return _handle_of(here, answer.actor)


def kill_actor(handle: ActorHandle, *, no_restart: bool = True) -> None:
    """End an actor, wherever it is; the next one may have its name then."""
    here = runtime_of(handle)
    _kill(here, handle.actor_id, no_restart=no_restart)
    if no_restart and handle._actor.name and not here.client.loop.is_mine:
        _wait_name_free(here.client, handle._actor)


def _wait_name_free(client: Client, actor: ActorPart) -> None:
    ends_s = monotonic() + NAME_FREE_S
    with contextlib.suppress(TimeoutError):  # the control store is away
        while (left_s := ends_s - monotonic()) > 0:
            answer = client.request(
                lambda request: m.LocateActor(request, "", actor.name, actor.namespace), timeout_s=left_s
            )
            assert isinstance(answer, m.ActorLocated)
            if answer.actor.actor_id != actor.actor_id or answer.actor.state not in _LIVING:
                return
            client.wait_until(lambda: False, _NAME_LOOK_S)


def _kill(here: Runtime, actor_id: str, *, no_restart: bool) -> None:

    def is_located(machine: Any) -> Any:
        return machine.actors.channels.get(actor_id)

    client = here.client
    channel = client.ask_machine(is_located)
    if channel is None or channel.actor.state == "dead":
        return
    address = channel.address
    may_return = channel.actor.may_return
    if no_restart or address is not None:
        client.send(client.node, m.KillActor(actor_id, address, no_restart, may_return))
    if may_return:
        if no_restart:  # the registry sees to the actor, wherever it is; our own calls need not wait for that
            client.handle_event(e.ActorKilled(actor_id, "the actor was killed with clusterpool.kill()"))
        return
    if address is None and client.wait_until(
        lambda: channel.actor.state == "dead" or channel.address is not None, 30.0
    ):
        # It was on its way to a worker, perhaps of another node.
        client.send(client.node, m.KillActor(actor_id, channel.address))
