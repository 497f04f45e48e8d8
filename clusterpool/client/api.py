"""The engine's public functions: the narrow waist between the facades and the cluster.

Source: Ray paper, table 1, for `put`, `get`, `wait` and the rest; names and semantics follow it where the standard
library has none.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, overload

from clusterpool import errors
from clusterpool.client import bootstrap, current, packages
from clusterpool.client import future as lean_future
from clusterpool.client.client import NUMBERS_APART
from clusterpool.client.future import LeanFuture
from clusterpool.client.object_ref import ObjectRef
from clusterpool.client.readiness import Readiness, are_own_and_distinct, check_distinct
from clusterpool.client.reading import Rounds, read_values
from clusterpool.client.ref_stream import ObjectRefStream
from clusterpool.client.runtime import Runtime
from clusterpool.client.submission import put_value
from clusterpool.client.values import ObjectUnreadable
from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.messages import ValuePart

if TYPE_CHECKING:
    from clusterpool.client.actor_handle import ActorHandle
    from clusterpool.client.client import Client

# An embedded node has this long to end its workers and remove its files.
_NODE_END_S = 10.0


def init(
    address: str | None = None,
    *,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    memory: int | None = None,
    resources: dict[str, float] | None = None,
    object_store_bytes: int | None = None,
    runtime_env: dict[str, Any] | None = None,
    namespace: str | None = None,
    log_to_driver: bool = True,
) -> dict[str, Any]:
    """Join or start a cluster; called by itself at first use.

    `address`: a session folder or node socket, or "local"; else CLUSTERPOOL_ADDRESS, else the cluster that
    `clusterpool up` recorded, else a private one that ends with this process, with `num_cpus`, `num_gpus`, `memory`
    (bytes), `resources` and `object_store_bytes` as given (they need a private one).

    Returns: `node_id`, `cluster_id`, `address`, `is_embedded`.
    Raises: RuntimeError when already connected; NotConnected, StartFailed; ValueError for sizes of a cluster that
    is there already.
    """
    with current.lock:
        if current.get_if_any() is not None and not current.get().client.is_closed:
            raise RuntimeError("clusterpool is started already; call clusterpool.shutdown() first to start it anew")
        sizes = {
            "num_cpus": num_cpus, "num_gpus": num_gpus, "memory": memory, "resources": resources,
            "object_store_bytes": object_store_bytes,
        }  # fmt: skip
        has_sizes = any(value is not None for value in sizes.values())
        node_socket = bootstrap.find_address("local" if has_sizes and address is None else address)
        if has_sizes and node_socket is not None:
            given = ", ".join(name for name, value in sizes.items() if value is not None)
            raise ValueError(f"{given} cannot be set for a cluster that runs already ({address}): omit the address")
        bootstrap.check_arguments(**sizes, namespace=namespace)  # type: ignore[arg-type]
        environment = packages.prepare(runtime_env)
        process = None
        if node_socket is None:
            process, node_socket = bootstrap.start_embedded(**sizes)  # type: ignore[arg-type]
            process.wait_ready()
        try:
            runtime = bootstrap.join(
                node_socket, namespace=namespace or "", environment=environment, log_to_driver=log_to_driver
            )
        except BaseException:
            if process is not None:
                process.terminate()
            raise
        if process is not None:
            embedded = process
            runtime.after_shutdown.append(lambda: _end_node(embedded))
        install(runtime)
        registered = runtime.client.registered
        assert registered is not None
        return {
            "node_id": registered.node_id,
            "cluster_id": registered.cluster_id,
            "address": node_socket,
            "is_embedded": process is not None,
        }


def _end_node(process: Any) -> None:
    exit_code = process.wait(_NODE_END_S)
    if exit_code is None:
        exit_code = process.terminate()
    if exit_code != 0:
        # It could not remove what it had written.
        from clusterpool.processes.sweep import sweep_stale_sessions

        with contextlib.suppress(OSError):
            sweep_stale_sessions([process.paths.session.folder.parent])


def install(runtime: Runtime) -> None:
    """Make `runtime` this process's one (also used by workers)."""
    current.set(runtime)
    lean_future.wait_hook = runtime.client.wait_until
    lean_future.wake_hook = runtime.client.loop.kick


def shutdown() -> None:
    """Leave the cluster; a private one ends. Pools and references of it are of no use any more. May be called twice."""
    with current.lock:
        runtime = current.get_if_any()
        if runtime is None:
            return
        try:
            runtime.shutdown()
        finally:
            current.set(None)
            lean_future.wait_hook = lean_future.wake_hook = None


def _shutdown_at_exit() -> None:
    # The standard library's handler may have been registered before ours, and would then run after it: but children
    # are waited for, and queues emptied, while there still is a cluster. It does its work once only.
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        util._exit_function()
    shutdown()


atexit.register(_shutdown_at_exit)


def is_initialized() -> bool:
    """Whether this process is connected to a cluster."""
    runtime = current.get_if_any()
    return runtime is not None and not runtime.client.is_closed


def runtime() -> Runtime:
    """The runtime of this process, started or joined now if need be."""
    runtime = current.get_if_any()
    if runtime is not None and not runtime.client.is_closed:
        return runtime
    if runtime is not None and runtime.client.loop.is_mine:
        # What is handed out here came from the cluster that has gone. And whoever leaves that one has the lock, and
        # waits for this thread.
        raise errors.NotConnected(f"this process is not connected to a cluster any more: {runtime.client.closed_text}")
    with current.lock:
        runtime = current.get_if_any()
        if runtime is not None and runtime.client.is_closed:
            shutdown()
            runtime = None
        if runtime is None:
            init()
        return current.get()


def runtime_for(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Runtime:
    """The runtime that takes a call with these arguments.

    Raises: NotConnected when a reference among them belongs to a cluster that was shut down; none is started for it.
    """
    here = current.get_if_any()
    if here is None or here.client.is_closed:
        for value in (*args, *kwargs.values()):
            if isinstance(value, ObjectRef):
                value.check_client(None)
    return runtime()


def connect() -> Client:
    """The client of this process, started or joined now if need be."""
    return runtime().client


def in_worker() -> bool:
    """Whether this process is a worker of a cluster."""
    runtime = current.get_if_any()
    return runtime is not None and runtime.client.kind == "worker"


def wait_until(predicate: Callable[[], bool], timeout: float | None = None) -> bool:
    """Turn the client's loop in this thread until `predicate()`; False when `timeout` seconds went by.

    The predicate is evaluated after each batch of messages, so it must be cheap.
    Raises: NotConnected when the cluster goes away meanwhile.
    """
    return runtime().client.wait_until(predicate, timeout)


# --- the cluster ----------------------------------------------------------------------------------------------------


def nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster: id, host, resources, workers, store, queue."""
    import msgspec

    answer = connect().request(m.DescribeCluster, timeout_s=30.0)
    assert isinstance(answer, m.ClusterDescribed)
    return [msgspec.structs.asdict(node) for node in answer.nodes]


def node_id() -> str:
    """The node of this process: where a task runs, or which node a driver has joined. Starts or joins a cluster."""
    return connect().address.node_id


def cluster_resources() -> dict[str, float]:
    """What all nodes have together: `CPU`, `GPU`, `memory` (bytes) and the names that users gave."""
    return _sum_resources("total")


def available_resources() -> dict[str, float]:
    """What of it is free, as of the last heartbeats."""
    return _sum_resources("available")


def _sum_resources(key: str) -> dict[str, float]:
    total: dict[str, float] = {}
    for node in nodes():
        for name, amount in node[key].items():
            total[name] = total.get(name, 0.0) + amount
    return total


# --- objects --------------------------------------------------------------------------------------------------------


def put(value: Any) -> ObjectRef:
    """Store a value; small ones in this process, larger ones in the node's shared memory.

    Raises: what pickle raises; ObjectTooLarge, StoreFull; TypeError for an ObjectRef.
    """
    if isinstance(value, ObjectRef):
        raise TypeError("this is an ObjectRef already; put() takes the value itself")
    here = runtime()
    return put_value(here.client, here.values, value)


@overload
def get(refs: ObjectRef, timeout: float | None = None) -> Any: ...
@overload
def get(refs: Sequence[ObjectRef], timeout: float | None = None) -> list[Any]: ...
def get(refs: ObjectRef | Sequence[ObjectRef], timeout: float | None = None) -> Any:
    """The value of a reference, or the list of values of several, waiting for at most `timeout` seconds.

    Arrays come back writable, and nobody else sees what is written to them.
    Raises: the task's own exception; GetTimeout; ObjectLost, OwnerDied, TaskCancelled, WorkerDied, ActorDied.
    """
    is_single = isinstance(refs, ObjectRef)
    if not is_single and not isinstance(refs, Iterable):
        raise TypeError(f"get() takes an ObjectRef or a sequence of them, not {type(refs).__name__}: {refs!r}")
    wanted: list[ObjectRef] = [refs] if isinstance(refs, ObjectRef) else list(refs)
    for ref in wanted:
        if not isinstance(ref, ObjectRef):
            raise TypeError(f"get() takes an ObjectRef or a sequence of them, not {type(ref).__name__}: {ref!r}")
    here = _runtime_of(wanted)
    ends_s = None if timeout is None else monotonic() + timeout
    parts = _known_parts(here, wanted, timeout)
    values = read_values(here, wanted, parts, ends_s)
    return values[0] if is_single else values


def _runtime_of(refs: list[ObjectRef]) -> Runtime:
    """The runtime that the references belong to.

    Raises: NotConnected when it was shut down, rather than start a new one that could only wait in vain.
    """
    here = current.get_if_any()
    for ref in refs:
        ref.check_client(here.client if here is not None else None)
    return here if here is not None and refs else runtime()


def _known_parts(here: Runtime, wanted: list[ObjectRef], timeout: float | None) -> list[ValuePart]:
    client = here.client
    table = client.machine.objects.table
    parts: dict[int, ValuePart] = {}  # by position. Two threads may look at once, so nothing is appended or counted
    keys = [ref.part for ref in wanted]
    client.settle()

    def are_known() -> bool:
        for position in range(len(parts), len(keys)):
            part = table.value_of(keys[position])
            if part is None:
                return False
            parts[position] = part
        return True

    if are_known():
        return [parts[position] for position in range(len(keys))]
    for key in keys[len(parts) :]:
        if key.owner != client.address:
            client.handle_event(e.ValueWanted(key))
    if not client.wait_until(are_known, timeout):
        raise errors.GetTimeout(
            f"{len(keys) - len(parts)} of {len(keys)} values were not there after {timeout} s (the first is "
            f"{wanted[len(parts)]!r}); their tasks may still run: ask again, or cancel() them"
        )
    return [parts[position] for position in range(len(keys))]


def wait(
    refs: Sequence[ObjectRef], *, num_returns: int = 1, timeout: float | None = None
) -> tuple[list[ObjectRef], list[ObjectRef]]:
    """Wait until `num_returns` of `refs` have values (or errors), for at most `timeout` seconds.

    Returns: those that have (at most `num_returns`), and the rest, each in the order given.
    Raises: ValueError for duplicates or a `num_returns` that is not in 1 .. len(refs); TypeError.
    """
    if isinstance(refs, ObjectRef) or not isinstance(refs, Iterable):
        raise TypeError(f"wait() takes a sequence of ObjectRefs, not {type(refs).__name__}: {refs!r}")
    if type(num_returns) is not int:
        num_returns = operator.index(num_returns)
    wanted = list(refs)
    here = current.get_if_any()
    is_own = here is not None and are_own_and_distinct(wanted, here.client.address)
    if not is_own:
        check_distinct(wanted)
    if not 1 <= num_returns <= len(wanted):
        raise ValueError(f"num_returns must be between 1 and the number of refs ({len(wanted)}): {num_returns}")
    client = here.client if here is not None and is_own else _runtime_of(wanted).client
    with Readiness(client, wanted, count_max=num_returns, is_own=is_own) as readiness:
        client.wait_until(readiness.are_enough, timeout)
        return readiness.parted()


def future_of(ref: ObjectRef) -> concurrent.futures.Future[Any]:
    """A standard future that gets the value of `ref`."""
    here = _runtime_of([ref])
    future: LeanFuture[Any] = LeanFuture()
    rounds = Rounds(here.client, ref.part)

    def on_loaded(value: Any, error: BaseException | None) -> None:
        if isinstance(error, ObjectUnreadable) and rounds.go_on(error):
            here.client.watch(ref.part, on_known)
            return
        if isinstance(error, ObjectUnreadable):
            error = errors.ObjectLost(str(error))
        # Until here the reference is held, so that the object cannot go before it is pinned.
        assert ref is not None
        future.finish(value, error)

    def on_known() -> None:
        part = here.client.machine.objects.table.value_of(ref.part)
        if part is None:  # lost again, before this was called
            here.client.watch(ref.part, on_known)
            return
        if part.stored is not None:
            here.values.load_stored_nowait(part.stored, on_loaded)
            return
        try:
            value = here.values.load(part)
        except BaseException as exc:
            future.finish(None, exc)
        else:
            future.finish(value, None)

    future.set_running_or_notify_cancel()
    here.client.watch(ref.part, on_known)
    return future


def cancel(ref: ObjectRef | ObjectRefStream, *, force: bool = False) -> bool:
    """Cancel the task that makes `ref`: drop it if it has not started, else interrupt it (KeyboardInterrupt is raised
    in it, as by Ctrl-C, so that it can clean up), or with `force` kill its worker. `get` raises TaskCancelled.
    A generator's task is cancelled by its stream, which ends with an item that raises TaskCancelled.

    Returns: whether it will certainly not run to its end.
    Raises: ValueError when another process has submitted the task.
    """
    if isinstance(ref, ObjectRefStream):
        return ref.cancel(force=force)
    if not isinstance(ref, ObjectRef):
        raise TypeError(f"cancel() takes an ObjectRef, not {type(ref).__name__}")
    client = _runtime_of([ref]).client
    if ref.part.owner != client.address:
        raise ValueError("only the process that submitted a task can cancel it")
    # The results of one task are numbered from its own number on.
    number = ref.part.number - ref.part.number % NUMBERS_APART
    return cancel_task(client, number, force=force, interrupt=True)


def cancel_task(client: Client, number: int, *, force: bool, interrupt: bool, recall: bool = False) -> bool:
    """Ask the machine to cancel a task of this process."""

    def ask(machine: Any) -> bool:
        client.execute_asked(machine.handle(e.TaskCancelAsked(number, force, interrupt, recall), client.now_s()))
        return bool(machine.cancelled)

    answer = bool(client.ask_machine(ask))
    client.drain()
    client.loop.kick()
    return answer


# --- functions and actors -------------------------------------------------------------------------------------------


def remote(*args: Any, **options: Any) -> Any:
    """Make a function or class run on the cluster: `@remote`, or `@remote(num_cpus=2, retries=0)`.

    A function then has `.remote(*args, **kwargs)`, which returns an ObjectRef at once, and `.options(...)`; a class
    has `.remote(...)`, which returns a handle of a new actor. Options: `num_cpus`, `num_gpus`, `memory` (bytes),
    `resources`, `name`, `num_returns` (or "streaming", as generator functions have it), `scheduling` ("spread",
    "node:<id>", "near:<id>"), `runtime_env` (with `env_vars`); for functions `retries` (when its worker dies; 0: it is
    never started twice), `retry_exceptions` (False, True or exception classes: also when it raises one of these),
    `timeout` (seconds that a task may run, its own waiting included; then it is stopped and raises TaskTimeout),
    `stream_buffer` (how many items of a generator may wait to be taken before it pauses: 1000 or 128 MB if nothing is
    said, None for any number); for actors `max_concurrency`, `lifetime="detached"`, `namespace`, `get_if_exists`,
    `max_restarts`, `max_task_retries`, `checkpoint_every` (calls) and `checkpoint_period_s`.
    Raises: TypeError, ValueError for options that do not exist or cannot be.
    """
    from clusterpool.client.remote_function import make_remote

    if len(args) == 1 and not options and callable(args[0]):
        return make_remote(args[0], {})
    if args:
        raise TypeError("use @remote, or @remote(num_cpus=1, ...) with keywords only")
    return lambda target: make_remote(target, options)


def get_actor(name: str, namespace: str | None = None) -> ActorHandle:
    """A handle of a named actor.

    Raises: ActorNotFound; TypeError for a name that is no string.
    """
    from clusterpool.client.actor_handle import find_actor

    for given in (name, namespace or ""):
        if not isinstance(given, str):
            raise TypeError(f"get_actor() takes a name and a namespace, which are strings, not {given!r}")

    return find_actor(runtime(), name, namespace)


def kill(actor: ActorHandle, *, no_restart: bool = True) -> None:
    """End an actor at once; its pending calls raise ActorDied, and a new actor may have its name.

    `no_restart=False`: only its process, so that it is started again if its `max_restarts` allow that.
    """
    from clusterpool.client.actor_handle import ActorHandle, kill_actor

    if not isinstance(actor, ActorHandle):
        raise TypeError(f"kill() takes an actor's handle, not {type(actor).__name__}")
    kill_actor(actor, no_restart=no_restart)


def check_options(options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises: TypeError for an option that does not exist."""
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"unknown options: {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
