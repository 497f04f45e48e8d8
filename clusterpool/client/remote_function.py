"""Remote functions, and the options that they share with actors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from clusterpool.client import api, packages
from clusterpool.client.object_ref import ObjectRef
from clusterpool.client.ref_stream import ObjectRefStream
from clusterpool.client.resource_needs import checked_amount, checked_other_amounts
from clusterpool.client.runtime import Runtime
from clusterpool.client.task_limits import limits_for
from clusterpool.core.messages import TaskExtras, TaskKind, WorkerDemand, WorkerKind

RETRIES_DEFAULT = 3
RETURNS_MAX = 1000
# A large argument on another node draws the task there from this size on: fetching it would cost more than a lease.
DRAWING_BYTES_MIN = 1024 * 1024

RESOURCE_OPTIONS = ("num_cpus", "num_gpus", "memory", "resources")
FUNCTION_OPTIONS = (
    *RESOURCE_OPTIONS,
    "name",
    "num_returns",
    "retries",
    "retry_exceptions",
    "timeout",
    "scheduling",
    "runtime_env",
    "stream_buffer",
)


def make_remote(target: Any, options: dict[str, Any]) -> Any:
    """A remote function of a function, or an actor class of a class."""
    if isinstance(target, type):
        from clusterpool.client.actor_handle import ActorClass

        return ActorClass(target, options)
    if not callable(target):
        raise TypeError(f"@remote takes a function or a class, not {type(target).__name__}")
    return RemoteFunction(target, options)


def resources_of(options: Mapping[str, Any], *, default_cpus: float) -> dict[str, float]:
    """The resources that options ask for.

    Raises: ValueError for negative amounts, TypeError for what is no number.
    """
    resources: dict[str, Any] = {**checked_other_amounts(options.get("resources"))}
    resources["CPU"] = options.get("num_cpus") if options.get("num_cpus") is not None else default_cpus
    for name, key in (("GPU", "num_gpus"), ("memory", "memory")):
        if options.get(key):
            resources[name] = options[key]
    amounts = {name: checked_amount(name, amount) for name, amount in resources.items()}
    return {name: amount for name, amount in amounts.items() if amount}


def strategy_of(options: Mapping[str, Any]) -> str:
    """The scheduling strategy.

    Raises: ValueError for one that does not exist.
    """
    strategy = options.get("scheduling") or ""
    if strategy in ("", "default"):
        return ""
    if strategy != "spread" and not str(strategy).startswith(("node:", "near:")):
        raise ValueError(f"scheduling must be 'spread', 'node:<id>' or 'near:<id>': {strategy!r}")
    return str(strategy)


def env_of(options: Mapping[str, Any]) -> dict[str, str]:
    """Environment variables of the workers, from `runtime_env={"env_vars": ...}`.

    Raises: ValueError, TypeError for anything else in it.
    """
    runtime_env = options.get("runtime_env") or {}
    packages.check_keys(runtime_env, packages.TASK_KEYS)
    return packages.checked_variables(runtime_env)


class RemoteFunction:
    """A function that runs on the cluster; made by `@remote`."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        api.check_options(options, FUNCTION_OPTIONS)
        self._function = function
        self._options = options
        self._name = str(options.get("name") or getattr(function, "__qualname__", type(function).__name__))
        self._returns = self._checked_returns()
        self._retries = options.get("retries", RETRIES_DEFAULT)
        if not isinstance(self._retries, int) or self._retries < 0:
            raise ValueError(f"retries must be an integer of 0 or more: {self._retries!r}")
        self._limits = limits_for(options.get("timeout"), options.get("retry_exceptions", False))
        self._stream_buffer = stream_buffer_of(options)
        self._resources = resources_of(options, default_cpus=1)
        self._strategy = strategy_of(options)
        self._env = env_of(options)
        self._set: tuple[Runtime, int] | None = None  # the set that its tasks went to last, when nothing drew them
        functools.update_wrapper(self, function, updated=())

    def _checked_returns(self) -> int:
        """A generator function gives a stream, as a method of an actor does."""
        function = self._function
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{self._name} is a coroutine function, and a task has no event loop: use a plain function that calls "
                "asyncio.run(...), or a method of an actor, which may be `async def`"
            )
        if "num_returns" not in self._options and inspect.isgeneratorfunction(function):
            return -1
        return returns_of(self._options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"a remote function is not called directly: use {self._name}.remote(...)")

    def options(self, **options: Any) -> RemoteFunction:
        """The same function with other options."""
        return RemoteFunction(self._function, {**self._options, **options})

    def remote(self, /, *args: Any, **kwargs: Any) -> Any:
        """Start a task; an ObjectRef, a list of `num_returns` of them, or an iterator of them for "streaming".

        Raises: what pickle raises for arguments that cannot be pickled.
        """
        here = api.runtime_for(args, kwargs)
        set_number = self._set_number(here, args)
        extras = None
        if self._returns != 1:
            extras = TaskExtras(1, self._name, self._returns, limits=self._limits, stream_buffer=self._stream_buffer)
        elif self._limits is not None or self._options.get("name"):
            extras = TaskExtras(1, self._name, self._returns, limits=self._limits)
        kind = TaskKind.STREAM if self._returns == -1 else TaskKind.CALL
        made = here.maker.call(
            here.functions, self._function, args, kwargs, None, 0, retries=self._retries, extras=extras, kind=kind
        )
        return send(here, made, self._returns, lambda: here.submit(set_number, made))

    def _set_number(self, here: Runtime, args: tuple[Any, ...]) -> int:
        drawn = "" if self._strategy else _drawn_to(here, args)
        known = self._set
        if known is not None and known[0] is here and not drawn:
            return known[1]
        demand = WorkerDemand(WorkerKind.TASK, self._resources, self._name, self._env, self._strategy or drawn)
        number = here.task_set(demand, self._env)
        if not drawn:
            self._set = (here, number)
        return number

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFunction, (self._function, self._options)

    def __repr__(self) -> str:
        return f"<remote function {self._name}>"


def send(here: Runtime, made: tuple[Any, Any], returns: int, submit: Callable[[], Any]) -> Any:
    """Submit a task whose results are objects, and make their references."""
    number = made[0].spec.number
    client = here.client
    if returns == -1:
        buffer = made[0].spec.extras.stream_buffer
        stream = client.ask_machine(lambda machine: machine.objects.open_stream(number, buffer))
        submit()
        return ObjectRefStream(here, number, stream)
    submit()
    refs = [ObjectRef(client, client.address, number + offset, is_counted=True) for offset in range(returns)]
    return refs[0] if returns == 1 else (refs if refs else None)


def returns_of(options: Mapping[str, Any]) -> int:
    """How many values a call gives; -1: a stream of them.

    Raises: ValueError.
    """
    returns = options.get("num_returns", 1)
    if returns == "streaming":
        return -1
    if not isinstance(returns, int) or not 0 <= returns <= RETURNS_MAX:
        raise ValueError(f"num_returns must be an integer from 0 to {RETURNS_MAX}, or 'streaming': {returns!r}")
    return returns


def stream_buffer_of(options: Mapping[str, Any]) -> int:
    """How far a generator may run ahead of who takes its items, as `TaskExtras.stream_buffer` has it.

    Raises: ValueError.
    """
    if "stream_buffer" not in options:
        return 0
    buffer = options["stream_buffer"]
    if buffer is None:
        return -1
    if not isinstance(buffer, int) or buffer < 1:
        raise ValueError(f"stream_buffer must be 1 or more items, or None for no bound: {buffer!r}")
    return buffer


def _drawn_to(here: Runtime, args: tuple[Any, ...]) -> str:
    """A task goes where its large arguments are."""
    table = here.client.machine.objects.table
    for arg in args:
        if type(arg) is ObjectRef:
            part = table.value_of(arg.part)
            stored = part.stored if part is not None else None
            own = here.client.address.node_id
            if stored is not None and stored.size_bytes >= DRAWING_BYTES_MIN and own not in stored.node_ids:
                return f"near:{stored.node_ids[0]}" if stored.node_ids else ""
    return ""
