"""Semaphores, channels and cells in the control store: `CoordinationPort`, and the real one on Redis or Valkey.

A semaphore's tokens go to those who wait in the order of their coming: a release hands its token over, and tells the
waiter's node through a stream of that node's, which it reads whenever it is there to read.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from clusterpool.control_store import coordination_scripts as scripts
from clusterpool.control_store.address import errors_mapped
from clusterpool.control_store.scripts import Script
from clusterpool.control_store.store import ControlStore, fields_of
from clusterpool.control_store.unreadable import skipped_if_unreadable, whole_number
from clusterpool.core.coordination_events import Contents
from clusterpool.errors import ClusterpoolError, LockLost

_GRANTS_READ_MAX = 1000
# A read that waits must end before the connection takes the server for dead.
_BLOCK_MS_MAX = 2000


class CarrierUnknown(ClusterpoolError):
    """The control store has no carrier of this name: it never moved there, or its job has ended."""


class Grant(NamedTuple):
    """A token that was handed to one who waited. `id`: of the stream's entry."""

    id: str
    waiter: str
    name: str
    token: int


class CoordinationPort(Protocol):
    """Called by one thread of a node. Each test of tests/contracts runs on the fake and on the real one.

    Each operation that changes something takes a number first, which the caller counts up; the same number again
    (after a lost answer) changes nothing and repeats the answer. Operations on a carrier raise CarrierUnknown if there
    is none. A waiter is `life/process_id/request`; a life is `node_id@incarnation`, or `node_id` of one that is alone.
    """

    def create(self, number: int, name: str, kind: str, maximum: int, contents: Contents, life: str = "") -> int:
        """GRANTED, also if it exists; REFUSED when its job has ended; LIFE_OVER, as below, of its home.

        kind: "lock", "guard" (a semaphore whose tokens are held), "semaphore" (whose tokens are nobody's), "channel" or
        "cell". The content of the first two is `<home> <tokens that processes there hold>`.
        """

    def exists(self, name: str) -> bool: ...

    def acquire(self, number: int, name: str, waiter: str, waits: bool) -> tuple[int, int]:
        """REFUSED; GRANTED and the fencing token; WAITING: a grant will be read; or LIFE_OVER: that life of the node is
        not the one that is registered (constants of core/coordination_events.py).

        A waiter known already is not entered twice. The token of a "lock" or "guard" is held by the waiter until it is
        released.
        """

    def get(self, number: int, name: str, waiter: str, waits: bool) -> tuple[int, bytes]:
        """REFUSED; GRANTED and the item; WAITING: a grant will be read, then `pop`; or LIFE_OVER."""

    def pop(self, number: int, name: str, waiter: str) -> bytes | None:
        """The item that was reserved by a grant; None if it was given back meanwhile."""

    def cancel(self, number: int, name: str, waiter: str) -> bool:
        """False: it did not wait (any more), and a grant was made."""

    def give_back(self, number: int, name: str, waiter: str, token: int = 0) -> bool:
        """This token, which was granted to the waiter, did not reach it; 0: whichever it has.

        False: the waiter does not hold it. The tokens of a "semaphore" nobody holds: there is one more of them.
        """

    def release(self, number: int, name: str, maximum: int, holder: str = "") -> bool:
        """False: there were `maximum` tokens.

        holder: the waiter that got the token, `<home>/thin` for one that was taken thin, "" for neither: what is
        released is then another's, and a "guard" a "semaphore" for ever.
        Raises: LockLost when that token was given back for it, because it was taken for dead.
        """

    def value(self, name: str) -> int: ...

    def put(self, number: int, name: str, item: bytes) -> None: ...

    def put_back(self, number: int, name: str, item: bytes) -> None:
        """Put it first."""

    def length(self, name: str) -> int: ...

    def read_cell(self, name: str, known_version: int) -> tuple[int, bytes] | None: ...

    def write_cell(self, number: int, name: str, content: bytes, guard: str = "", holder: str = "") -> int:
        """The new version. guard: the lock that `holder` must hold, if both are given.

        Raises: LockLost when it holds it no longer.
        """

    def end_process(self, number: int, prefix: str) -> int:
        """Give back all that the process holds, and end its waits. prefix: `life/process_id/`."""

    def end_node_life(self, number: int, life: str, is_forced: bool) -> int:
        """The same for all that a node had in this life, unless that goes on (is listed) and `is_forced` is False."""

    def delete_job(self, number: int, job_id: str, home: str = "") -> int:
        """Remove all carriers of a job; from now on none can be created.

        home: the driver's node, if nothing is known of the driver but that this was lost. Nothing happens if it is
        listed (again); and as long as it is, carriers can be created.
        """

    def read_grants(self, after_id: str, *, block_ms: int = 0) -> list[Grant]:
        """The grants to waiters of this node after that one ("0" for the first), oldest first; may wait for one."""

    def drop_grants(self, until_id: str) -> None:
        """They have been delivered, up to that one."""


class CoordinationStore(ControlStore):
    """Made by `connect`, then given its node by `serve`."""

    node_id = ""

    def serve(self, node_id: str) -> None:
        """Name the node whose operations come through here."""
        self.node_id = node_id
        self._last_operation = self.keys.prefix + "last_operation:" + node_id
        self._grants = self.keys.prefix + "grants:" + node_id

    @property
    def server_run(self) -> str:
        """Changes when another server answers, or the same one was restarted."""
        return self._server_run

    def _entered(self, connection: Any, run: str) -> None:
        script = scripts.ENTER_RUN
        words = (script.source, "1", self.keys.prefix + "coordination_run", self.keys.prefix + "token_base", run)
        connection.send_command("EVAL", *words, check_health=False)
        with errors_mapped(self.address):
            self._without_dropped(connection.read_response())

    def create(self, number: int, name: str, kind: str, maximum: int, contents: Contents, life: str = "") -> int:
        tokens = len(contents.items) if kind == "channel" else contents.tokens
        arguments = (kind, maximum, tokens, contents.content, life, *contents.items)
        return int(self._do(scripts.CREATE, number, name, *arguments)[0])

    def exists(self, name: str) -> bool:
        return bool(self._run("HLEN", self.keys.carrier(name)))

    def acquire(self, number: int, name: str, waiter: str, waits: bool) -> tuple[int, int]:
        state, *token = self._do(scripts.ACQUIRE, number, name, waiter, int(waits))
        return state, int(token[0]) if token else 0

    def get(self, number: int, name: str, waiter: str, waits: bool) -> tuple[int, bytes]:
        state, *item = self._do(scripts.GET, number, name, waiter, int(waits))
        return state, item[0] if item else b""

    def pop(self, number: int, name: str, waiter: str) -> bytes | None:
        is_there, *item = self._do(scripts.POP, number, name, waiter)
        return item[0] if is_there and item else None

    def cancel(self, number: int, name: str, waiter: str) -> bool:
        return bool(self._do(scripts.CANCEL, number, name, waiter)[0])

    def give_back(self, number: int, name: str, waiter: str, token: int = 0) -> bool:
        return bool(self._do(scripts.GIVE_BACK, number, name, waiter, token)[0])

    def release(self, number: int, name: str, maximum: int, holder: str = "") -> bool:
        return bool(self._do(scripts.RELEASE, number, name, maximum, holder)[0])

    def value(self, name: str) -> int:
        return int(self._known(name, self._run("HGET", self.keys.carrier(name), "value")))

    def put(self, number: int, name: str, item: bytes) -> None:
        self._do(scripts.PUT, number, name, item, "R")

    def put_back(self, number: int, name: str, item: bytes) -> None:
        self._do(scripts.PUT, number, name, item, "L")

    def length(self, name: str) -> int:
        if not self.exists(name):
            raise _unknown(name)
        return int(self._run("LLEN", self.keys.carrier_items(name)))

    def read_cell(self, name: str, known_version: int) -> tuple[int, bytes] | None:
        # The version alone first: a cell may be large, and most reads find that nothing has changed.
        if int(self._known(name, self._run("HGET", self.keys.carrier(name), "version"))) == known_version:
            return None
        version, content = self._run("HMGET", self.keys.carrier(name), "version", "content")
        return int(self._known(name, version)), content

    def write_cell(self, number: int, name: str, content: bytes, guard: str = "", holder: str = "") -> int:
        return int(self._do(scripts.WRITE_CELL, number, name, content, guard, holder)[0])

    def end_process(self, number: int, prefix: str) -> int:
        return int(self._do(scripts.END_PROCESS, number, prefix)[0])

    def end_node_life(self, number: int, life: str, is_forced: bool) -> int:
        return int(self._do(scripts.END_NODE_LIFE, number, life, int(is_forced))[0])

    def delete_job(self, number: int, job_id: str, home: str = "") -> int:
        return int(self._do(scripts.DELETE_JOB, number, job_id, scripts.ENDED_JOB_TTL_S, home)[0])

    def read_grants(self, after_id: str, *, block_ms: int = 0) -> list[Grant]:
        block = ("BLOCK", min(block_ms, _BLOCK_MS_MAX)) if block_ms > 0 else ()
        answer = self._run("XREAD", "COUNT", _GRANTS_READ_MAX, *block, "STREAMS", self._grants, after_id)
        grants: list[Grant] = []
        for entry_id, fields in answer[0][1] if answer else ():
            count = len(grants)
            with skipped_if_unreadable("grants", entry_id, self.on_unreadable):
                grants.append(_grant(entry_id, fields))
            if len(grants) == count:
                self.drop_entry(self._grants, entry_id)
        return grants

    def drop_grants(self, until_id: str) -> None:
        milliseconds, _, number = until_id.partition("-")
        self._run("XTRIM", self._grants, "MINID", f"{milliseconds}-{int(number) + 1}")

    def _do(self, script: Script, number: int, name: str, *arguments: Any) -> Any:
        answer = self._change(script, (self._last_operation,), self.keys.prefix, number, name, *arguments)
        if answer[0] == -2:
            raise _unknown(name)
        if answer[0] == -3:
            raise lock_lost(name)
        return answer

    def _known(self, name: str, value: Any) -> Any:
        if value is None:
            raise _unknown(name)
        return value


def _unknown(name: str) -> CarrierUnknown:
    return CarrierUnknown(f"the cluster has no {name} (any more): its job has ended, or the control store lost it")


def lock_lost(name: str) -> LockLost:
    """What a process is told that was taken for dead while it held a lock."""
    return LockLost(
        f"the lock or semaphore {name} was taken from this process: its node was silent for so long that it was "
        "declared dead (was the host suspended, or cut off from the control store?). Another process may hold it now, "
        "so what this one wrote under it since is not kept; begin again with what it guards"
    )


def _grant(entry_id: bytes, fields: Any) -> Grant:
    texts = {key.decode(): value.decode() for key, value in fields_of(fields).items()}
    return Grant(entry_id.decode(), texts["waiter"], texts["name"], whole_number(texts["token"]))
