"""Actors: objects that live in a worker of their own and take calls in order.

Source: Ray paper, section 3.1 (actors).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import msgspec

from clusterpool import errors, ids
from clusterpool.client import api
from clusterpool.client.remote_function import RESOURCE_OPTIONS, env_of, resources_of, send, strategy_of
from clusterpool.client.runtime import Runtime
from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.messages import ActorPart, TaskExtras, TaskKind, WorkerDemand, WorkerKind

ACTOR_OPTIONS = (
    *RESOURCE_OPTIONS, "name", "namespace", "lifetime", "get_if_exists", "max_concurrency", "scheduling", "runtime_env",
)  # fmt: skip
# Coroutines of an actor with async methods that run at once, when nobody says.
ASYNC_CONCURRENCY = 1000


class ActorClass:
    """A class whose instances are actors; made by `@remote`."""

    def __init__(self, cls: type, options: dict[str, Any]) -> None:
        api.check_options(options, ACTOR_OPTIONS)
        if options.get("lifetime") not in (None, "detached"):
            raise ValueError(f"lifetime must be 'detached' or left out: {options['lifetime']!r}")
        if options.get("max_concurrency", 1) < 1:
            raise ValueError(f"max_concurrency must be 1 or more: {options['max_concurrency']}")
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

    def remote(self, *args: Any, **kwargs: Any) -> ActorHandle:
        """Make an actor; its handle comes at once, and calls wait until it is there.

        Raises: NameTaken when a living actor has the name; what pickle raises for the arguments.
        """
        here = api.runtime()
        actor = self._actor_part(here)
        if actor.name:
            existing = self._claim_name(here, actor)
            if existing is not None:
                return existing
        is_async = any(inspect.iscoroutinefunction(getattr(self._cls, name, None)) for name in actor.methods)
        concurrency = self._options.get("max_concurrency") or (ASYNC_CONCURRENCY if is_async else 1)
        extras = TaskExtras(1, self.__name__, 1, concurrency=concurrency)
        task, arguments = here.maker.task(
            here.functions.number_of(self._cls), args, kwargs, None, 0, extras=extras, kind=TaskKind.CREATE_ACTOR
        )
        demand = WorkerDemand(
            WorkerKind.ACTOR, self._resources, actor.name or self.__name__, env_of(self._options), self._strategy,
            actor_id=actor.actor_id,
        )  # fmt: skip
        setup = e.SetupPlan(demand.name, demand.env)
        if not actor.name:
            # Nobody can look it up before its handle is passed on, so nobody has to wait for the registry.
            here.client.send(here.client.node, m.RegisterActor(0, actor))
        here.client.handle_event(e.ActorOpened(actor, demand, setup, task, arguments))
        return ActorHandle(actor)

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
        )

    def _claim_name(self, here: Runtime, actor: ActorPart) -> ActorHandle | None:
        """Register a named actor; the handle of the one that has the name, with `get_if_exists`."""
        wants_existing = bool(self._options.get("get_if_exists"))
        answer = here.client.request(lambda request: m.RegisterActor(request, actor, wants_existing), timeout_s=30.0)
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

    def __init__(self, actor: ActorPart) -> None:
        self._actor = actor

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
        return ActorMethod(self._actor.actor_id, name, returns)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_handle, (msgspec.msgpack.encode(self._actor),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActorHandle) and other.actor_id == self.actor_id

    def __hash__(self) -> int:
        return hash(self._actor.actor_id)

    def __repr__(self) -> str:
        return f"ActorHandle({self._actor.class_name}, {self._actor.actor_id})"


class ActorMethod:
    """One method of an actor."""

    __slots__ = ("_actor_id", "_name", "_returns")

    def __init__(self, actor_id: str, name: str, returns: int) -> None:
        self._actor_id = actor_id
        self._name = name
        self._returns = returns

    def options(self, *, num_returns: int | str) -> ActorMethod:
        """The same method with another number of return values."""
        returns = -1 if num_returns == "streaming" else int(num_returns)
        return ActorMethod(self._actor_id, self._name, returns)

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method; an ObjectRef (or as `num_returns` says) at once. Calls of one process run in order."""
        here = api.runtime()
        extras = TaskExtras(1, self._name, self._returns, method=self._name)
        made = here.maker.task(0, args, kwargs, None, 0, extras=extras, kind=TaskKind.ACTOR_CALL)
        return send(here, made, self._returns, self._submitter(here, made))

    def _submitter(self, here: Runtime, made: tuple[Any, Any]) -> Callable[[], None]:
        def submit() -> None:
            task, arguments = made
            if arguments is None:
                here.client.submit_call(self._actor_id, task)
            else:
                event = e.TaskWithArgumentsSubmitted(0, self._actor_id, task, arguments)
                here.client.handle_event(event)

        return submit

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"an actor's method is not called directly: use {self._name}.remote(...)")


def _handle_of(here: Runtime, actor: ActorPart) -> ActorHandle:
    here.client.handle_event(e.ActorMet(actor))
    return ActorHandle(actor)


def _restore_handle(encoded: bytes) -> ActorHandle:
    actor = msgspec.msgpack.decode(encoded, type=ActorPart)
    return _handle_of(api.runtime(), actor)


def find_actor(here: Runtime, name: str, namespace: str | None) -> ActorHandle:
    """A handle of the living actor of this name.

    Raises: ActorNotFound.
    """
    namespace = namespace or here.client.job.namespace
    answer = here.client.request(lambda request: m.LocateActor(request, "", name, namespace), timeout_s=30.0)
    assert isinstance(answer, m.ActorLocated)
    if answer.actor.state not in ("alive", "pending"):
        raise errors.ActorNotFound(f"no living actor is named {name!r} in namespace {namespace!r}")
    return _handle_of(here, answer.actor)


def kill_actor(here: Runtime, handle: ActorHandle) -> None:
    """End an actor, wherever it is."""
    actor_id = handle.actor_id

    def is_located(machine: Any) -> Any:
        return machine.actors.channels.get(actor_id)

    channel = here.client.ask_machine(is_located)
    here.client.wait_until(lambda: channel.actor.state == "dead" or channel.address is not None, 30.0)
    if channel.actor.state != "dead":
        here.client.send(here.client.node, m.KillActor(actor_id, channel.address))
