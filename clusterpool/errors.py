"""Every exception that clusterpool raises and the standard library does not have.

Each can be pickled, says what happened, the likely cause, the evidence and the remedy, and is a subclass of the
standard error that a caller of the facade in question would catch.
"""

from __future__ import annotations


class ClusterpoolError(Exception):
    """Base of all errors of clusterpool itself; never raised for an error of the user's own code."""


class NotConnected(ClusterpoolError, RuntimeError):
    """The driver has no cluster, or lost the one it had."""


class StartFailed(ClusterpoolError, RuntimeError):
    """A process of the cluster could not be started; the text holds the end of its log."""


class AuthenticationFailed(ClusterpoolError, ConnectionError):
    """The other side does not have this cluster's keys."""


class VersionMismatch(ClusterpoolError, RuntimeError):
    """Two processes run other versions of Python or clusterpool, or a node lacks a module."""


class WorkerDied(ClusterpoolError, RuntimeError):
    """A worker process ended while it ran a task (killed, `os._exit`, out of memory, a crash in C code)."""


class TaskTimeout(ClusterpoolError, TimeoutError):
    """A task ran for longer than its `timeout` and was stopped, with its worker."""


class WorkerSetupFailed(ClusterpoolError, RuntimeError):
    """The initializer or the runtime environment of a worker failed."""


class NodeDied(ClusterpoolError, RuntimeError):
    """A node stopped answering, and what ran there could not be run again."""


class TaskCancelled(ClusterpoolError):
    """The task was cancelled before it had a result."""


class TaskInfeasible(ClusterpoolError, ValueError):
    """No node of the cluster, however idle, could meet the task's demands."""


class GetTimeout(ClusterpoolError, TimeoutError):
    """`get` or `wait` reached its `timeout` before the values were there."""


class ObjectLost(ClusterpoolError, RuntimeError):
    """An object's last copy is gone and it could not be rebuilt."""


class LockLost(ClusterpoolError, ValueError):
    """A lock was given to another process because its holder was taken for dead: what it does now does not count."""


class OwnerDied(ObjectLost):
    """The process that created the reference ended, and the object with it."""


class ObjectTooLarge(ClusterpoolError, MemoryError):
    """An object is larger than the store, or than the disk it would be spilled to, can ever hold."""


class StoreFull(ClusterpoolError, MemoryError):
    """The store stayed full of objects in use for longer than the wait allowed."""


class ActorDied(ClusterpoolError, RuntimeError):
    """The actor's process ended, or its constructor failed; later calls fail as well."""


class ActorUnavailable(ActorDied):
    """The actor's process ended while it had this call, but the actor is started again: later calls may work.

    Whether the call had an effect is not known. Actors with `max_task_retries` have it sent again instead.
    """


class CheckpointFailed(ClusterpoolError, RuntimeError):
    """The state of an actor could not be saved; the call after which that was due has had its effect."""


class ActorNotFound(ClusterpoolError, ValueError):
    """No living actor has this name in this namespace."""


class NameTaken(ClusterpoolError, ValueError):
    """A living actor already has this name in this namespace."""


class SerializationFailed(ClusterpoolError, TypeError):
    """A function, an argument or a result could not be pickled; the text names the part that could not.

    `reason` is the text of the error that pickling raised, `value_repr` the `repr` of what could not be pickled.
    """

    def __init__(self, message: str, reason: str = "", value_repr: str = "") -> None:
        super().__init__(message, reason, value_repr)
        self.reason = reason
        self.value_repr = value_repr

    def __str__(self) -> str:
        return str(self.args[0])


class ProtocolError(ClusterpoolError):
    """Bytes that are no message of ours arrived; the connection was closed."""


class InvalidTransition(ClusterpoolError):
    """A bug in clusterpool: a state machine met an event that its state does not allow."""


# The control store cannot do it now, and may later: it is away, has no memory left, or has another password.
STORE_CANNOT = (NotConnected, StoreFull, AuthenticationFailed)
