"""What starts a `Process` on the cluster, in the place of `popen_fork` and its like."""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing import context as standard_context
from multiprocessing import process, util
from typing import TYPE_CHECKING, Any

from clusterpool.client import descriptors
from clusterpool.client.child_process import ChildProcess
from clusterpool.serialization.versions import looks

if TYPE_CHECKING:
    from clusterpool.client.descriptors import Ticket

__all__ = ["Popen"]


class Popen:
    """A started process, as `BaseProcess` uses it."""

    method = "cluster"

    def __init__(self, process_obj: process.BaseProcess) -> None:
        util._flush_std_streams()  # type: ignore[attr-defined]
        attributes = vars(process_obj)
        self._node_id: str | None = attributes.get("_node_id")
        # `start` drops them when we return. What they refer to (a manager's object, say) must live until the child has
        # its own references.
        held = [attributes[name] for name in ("_target", "_args", "_kwargs")]
        looks.look_anew()  # the child sees the program as it is now
        # Authentication keys, and descriptors by `reduction.DupFd`, are pickled for a child only.
        standard_context.set_spawning_popen(self)  # type: ignore[arg-type]
        try:
            self._child = ChildProcess(
                run_process, (_Preparation(_facts(process_obj)), process_obj),
                name=process_obj.name, on_loaded=held.clear,
                find_node_id=lambda: self._node_id,
            )  # fmt: skip
        finally:
            standard_context.set_spawning_popen(None)
        self.pid = self._child.pid
        self.sentinel = self._child.sentinel

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative for a signal."""
        return self._child.returncode

    def poll(self, _flag: int = os.WNOHANG) -> int | None:
        return self._child.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        return self._child.wait(timeout)

    def terminate(self) -> None:
        self._child.send_signal(signal.SIGTERM)

    def interrupt(self) -> None:
        self._child.send_signal(signal.SIGINT)

    def kill(self) -> None:
        self._child.send_signal(signal.SIGKILL)

    def close(self) -> None:
        self._child.close()

    # --- while the process is pickled: for what cannot leave its host, and for `multiprocessing.reduction`

    def keep_on(self, node_id: str) -> None:
        self._node_id = node_id

    def duplicate_for_child(self, fd: int) -> Ticket:
        return descriptors.park(fd)

    class DupFd:
        """A descriptor on its way to the child, on whichever node that is."""

        def __init__(self, ticket: Ticket) -> None:
            self._ticket = ticket

        def detach(self) -> int:
            return descriptors.fetch(self._ticket)


class _Preparation:
    """Pickled ahead of the process: loading it makes the child ready to load what follows."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self._facts = facts

    def __reduce__(self) -> tuple[Any, ...]:
        return prepare, (self._facts,)


def _facts(process_obj: process.BaseProcess) -> dict[str, Any]:
    """What a child has from its parent beside the environment, working folder and search path of the job."""
    from clusterpool.multiprocessing import context

    return {
        "name": process_obj.name,
        "authkey": bytes(process.current_process().authkey),
        "argv": list(sys.argv),
        "start_method": context.get_start_method(),
        "logs_to_stderr": util._log_to_stderr,  # type: ignore[attr-defined]
        "log_level": util._logger.getEffectiveLevel() if util._logger is not None else None,  # type: ignore[attr-defined]
    }


def prepare(facts: dict[str, Any]) -> None:
    """In the child, before the process is loaded. Source: `multiprocessing.spawn.prepare`."""
    from clusterpool.multiprocessing import context

    current = process.current_process()
    current.name = facts["name"]
    current.authkey = facts["authkey"]
    sys.argv = facts["argv"]
    if facts["logs_to_stderr"]:
        util.log_to_stderr()
    if facts["log_level"] is not None:
        util.get_logger().setLevel(facts["log_level"])
    context.set_start_method(facts["start_method"], force=True)


def run_process(_prepared: None, process_obj: Any, parent_sentinel: int) -> int:
    """In the child: run it; the exit code."""
    from clusterpool.multiprocessing import context

    if process_obj._start_method is not None:
        # `_bootstrap` does the same for the standard module.
        context.set_start_method(process_obj._start_method, force=True)
    exit_code: int = process_obj._bootstrap(parent_sentinel)
    return exit_code
