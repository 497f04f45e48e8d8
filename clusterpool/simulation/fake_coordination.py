"""Semaphores, channels and cells in memory: a CoordinationPort for tests and simulations.

Held to the same contract as the real one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from clusterpool.control_store.coordination import CarrierUnknown, Grant, lock_lost
from clusterpool.core.coordination_events import GRANTED, LIFE_OVER, REFUSED, WAITING, Contents
from clusterpool.errors import NotConnected


class Hold(NamedTuple):
    """What a waiter has: of which carrier, and which token."""

    name: str
    token: int


class Carrier:
    """One of them."""

    def __init__(self, kind: str, value: int, contents: Contents) -> None:
        self.kind = kind
        self.value = value
        self.token = 0
        self.waiters: list[str] = []
        self.items = list(contents.items)
        self.content = contents.content
        self.version = 1


def node_of(waiter: str) -> str:
    """The node of a waiter."""
    return life_of(waiter).split("@")[0]


def life_of(waiter: str) -> str:
    """The life of a node in which it waits."""
    return waiter.split("/", maxsplit=1)[0]


class FakeCoordination:
    """What all nodes of a cluster share; `client` makes the port of one node."""

    def __init__(self) -> None:
        self.carriers: dict[str, Carrier] = {}
        self.holds: dict[str, Hold] = {}  # by waiter
        self.ended_jobs: dict[str, str] = {}  # by job, its driver's node if only the loss of that is known
        self.incarnations: dict[str, int] = {}  # of living nodes
        self.grants: dict[str, list[Grant]] = {}
        self.grants_count = 0
        self.token_base = 0
        self.last_by_node: dict[str, tuple[int, Any]] = {}  # number and answer of its last operation
        self.on_write: Callable[[str, bytes, bytes], None] = lambda *_: None  # of a guarded cell, before and after
        self.on_taken: Callable[[str, str, bytes], None] = lambda *_: None  # a waiter has a token, or this item
        self.is_away = False

    def state(self) -> dict[str, Any]:
        """What a server would find in its file, as it is now."""
        names = ("carriers", "holds", "ended_jobs", "grants", "grants_count", "token_base", "last_by_node")
        return copy.deepcopy({name: getattr(self, name) for name in names})

    def facts(self) -> dict[str, str]:
        """All that is known of each carrier."""
        parts = {name: [str(vars(carrier))] for name, carrier in self.carriers.items()}
        for waiter, hold in sorted(self.holds.items()):
            parts.setdefault(hold.name, []).append(waiter)
        for grants in self.grants.values():
            for grant in grants:
                parts.setdefault(grant.name, []).append(str(grant))
        return {name: "; ".join(known) for name, known in parts.items()}

    def restarted(self, state: dict[str, Any], token_base: int) -> None:
        """Another run of the server, which knows this; tokens are above `token_base` from now on, if it knows any."""
        vars(self).update(copy.deepcopy(state))
        self.token_base = token_base

    def client(self, node_id: str) -> FakeCoordinationClient:
        """The port of one node."""
        return FakeCoordinationClient(self, node_id)

    def is_registered(self, life: str) -> bool:
        node_id, _, incarnation = life.partition("@")
        return node_id in self.incarnations and incarnation in ("", str(self.incarnations[node_id]))

    def is_over(self, waiter: str) -> bool:
        return "@" in life_of(waiter) and not self.is_registered(life_of(waiter))

    def carrier(self, name: str) -> Carrier:
        if name not in self.carriers:
            raise CarrierUnknown(name)
        return self.carriers[name]

    def grant(self, name: str, waiter: str) -> int:
        carrier = self.carriers[name]
        carrier.token = max(carrier.token, self.token_base) + 1
        if carrier.kind != "semaphore":
            self.holds[waiter] = Hold(name, carrier.token)
        self.on_taken(name, waiter, b"")
        return carrier.token

    def free(self, name: str) -> None:
        carrier = self.carriers.get(name)
        if carrier is None:
            return
        if not carrier.waiters:
            carrier.value += 1
            return
        waiter = carrier.waiters.pop(0)
        self.grants_count += 1
        grant = Grant(f"{self.grants_count}-0", waiter, name, self.grant(name, waiter))
        self.grants.setdefault(node_of(waiter), []).append(grant)

    def undo(self, waiter: str) -> int:
        hold = self.holds.pop(waiter, None)
        if hold is not None:
            if self.carriers[hold.name].kind != "semaphore":
                self.free(hold.name)
            return 1
        for carrier in self.carriers.values():
            if waiter in carrier.waiters:
                carrier.waiters.remove(waiter)
                return 1
        return 0

    def undo_all(self, prefix: str) -> int:
        waiters = [waiter for carrier in self.carriers.values() for waiter in carrier.waiters]
        return sum(self.undo(waiter) for waiter in [*waiters, *self.holds] if waiter.startswith(prefix))


class FakeCoordinationClient:
    """One node's way to the fake."""

    def __init__(self, shared: FakeCoordination, node_id: str) -> None:
        self._shared = shared
        self.node_id = node_id

    def _once(self, number: int, do: Callable[[], Any]) -> Any:
        if self._shared.is_away:
            raise NotConnected("the fake store is away")
        last = self._shared.last_by_node
        if number != last.get(self.node_id, (0, None))[0]:
            last[self.node_id] = (number, do())
        return last[self.node_id][1]

    def create(self, number: int, name: str, kind: str, maximum: int, contents: Contents, life: str = "") -> int:
        def do() -> int:
            if life and self._shared.is_over(life):
                return LIFE_OVER
            lost_home = self._shared.ended_jobs.get(name.split("-", maxsplit=1)[0])
            if lost_home is not None and lost_home not in self._shared.incarnations:
                return REFUSED
            value = len(contents.items) if kind == "channel" else contents.tokens
            if name not in self._shared.carriers:
                self._shared.carriers[name] = Carrier(kind, value, contents)
                if kind in ("lock", "guard"):
                    home, _, count = contents.content.decode().partition(" ")
                    for index in range(int(count or 0)):
                        self._shared.holds[f"{home}/thin/{name}#{index + 1}"] = Hold(name, 0)
            return GRANTED

        return int(self._once(number, do))

    def exists(self, name: str) -> bool:
        return name in self._shared.carriers

    def acquire(self, number: int, name: str, waiter: str, waits: bool) -> tuple[int, int]:
        def do() -> tuple[int, int]:
            carrier = self._shared.carrier(name)
            if self._shared.is_over(waiter):
                return LIFE_OVER, 0
            if waiter in carrier.waiters:
                return WAITING, 0
            if waiter in self._shared.holds:
                return GRANTED, self._shared.holds[waiter].token
            if carrier.value > 0:
                carrier.value -= 1
                return GRANTED, self._shared.grant(name, waiter)
            if waits:
                carrier.waiters.append(waiter)
            return (WAITING if waits else REFUSED), 0

        answer: tuple[int, int] = self._once(number, do)
        return answer

    def get(self, number: int, name: str, waiter: str, waits: bool) -> tuple[int, bytes]:
        def do() -> tuple[int, bytes]:
            carrier = self._shared.carrier(name)
            if self._shared.is_over(waiter):
                return LIFE_OVER, b""
            if waiter in carrier.waiters:
                return WAITING, b""
            if waiter not in self._shared.holds:
                if carrier.value == 0:
                    if waits:
                        carrier.waiters.append(waiter)
                    return (WAITING if waits else REFUSED), b""
                carrier.value -= 1
            self._shared.holds.pop(waiter, None)
            return GRANTED, self._taken(name, waiter)

        answer: tuple[int, bytes] = self._once(number, do)
        return answer

    def pop(self, number: int, name: str, waiter: str) -> bytes | None:
        def do() -> bytes | None:
            self._shared.carrier(name)
            return self._taken(name, waiter) if self._shared.holds.pop(waiter, None) is not None else None

        item: bytes | None = self._once(number, do)
        return item

    def _taken(self, name: str, waiter: str) -> bytes:
        item = self._shared.carriers[name].items.pop(0)
        self._shared.on_taken(name, waiter, item)
        return item

    def cancel(self, number: int, name: str, waiter: str) -> bool:
        is_waiting = name in self._shared.carriers and waiter in self._shared.carriers[name].waiters
        return bool(self._once(number, lambda: is_waiting and self._shared.undo(waiter)))

    def give_back(self, number: int, name: str, waiter: str, token: int = 0) -> bool:
        def do() -> bool:
            carrier = self._shared.carriers.get(name)
            if carrier is not None and carrier.kind == "semaphore":
                self._shared.free(name)
                return True
            is_held = token == 0 or self._shared.holds.get(waiter) == Hold(name, token)
            return is_held and bool(self._shared.undo(waiter))

        return bool(self._once(number, do))

    def release(self, number: int, name: str, maximum: int, holder: str = "") -> bool:
        def do() -> bool:
            carrier = self._shared.carrier(name)
            if carrier.kind != "semaphore" and holder:
                self._shared.undo(self._holder_of(name, holder))
                return True
            if carrier.value >= maximum:
                return False
            if carrier.kind == "lock":
                for waiter in [waiter for waiter, hold in self._shared.holds.items() if hold.name == name]:
                    del self._shared.holds[waiter]
            else:
                carrier.kind = "semaphore"
            self._shared.free(name)
            return True

        return bool(self._once(number, do))

    def _holder_of(self, name: str, holder: str) -> str:
        if holder.endswith("/thin"):
            holds = self._shared.holds.items()
            thin = [waiter for waiter, hold in holds if hold.name == name and "/thin/" in waiter]
            holder = thin[-1] if thin else ""
        if holder not in self._shared.holds or self._shared.holds[holder].name != name:
            raise lock_lost(name)
        return holder

    def value(self, name: str) -> int:
        return self._shared.carrier(name).value

    def put(self, number: int, name: str, item: bytes) -> None:
        self._put(number, name, item, 1 << 60)

    def put_back(self, number: int, name: str, item: bytes) -> None:
        self._put(number, name, item, 0)

    def _put(self, number: int, name: str, item: bytes, where: int) -> None:
        def do() -> None:
            self._shared.carrier(name).items.insert(where, item)
            self._shared.free(name)

        self._once(number, do)

    def length(self, name: str) -> int:
        return len(self._shared.carrier(name).items)

    def read_cell(self, name: str, known_version: int) -> tuple[int, bytes] | None:
        carrier = self._shared.carrier(name)
        return None if carrier.version == known_version else (carrier.version, carrier.content)

    def write_cell(self, number: int, name: str, content: bytes, guard: str = "", holder: str = "") -> int:
        def do() -> int:
            if guard and holder and self._shared.carrier(guard).kind != "semaphore":
                self._holder_of(guard, holder)
            carrier = self._shared.carrier(name)
            if guard:
                self._shared.on_write(name, carrier.content, content)
            carrier.content = content
            carrier.version += 1
            return carrier.version

        return int(self._once(number, do))

    def end_process(self, number: int, prefix: str) -> int:
        return int(self._once(number, lambda: self._shared.undo_all(prefix)))

    def end_node_life(self, number: int, life: str, is_forced: bool) -> int:
        def do() -> int:
            if self._shared.is_registered(life) and not is_forced:
                return 0
            count = self._shared.undo_all(f"{life}/")
            grants = self._shared.grants.pop(node_of(life), [])
            self._shared.grants[node_of(life)] = [grant for grant in grants if life_of(grant.waiter) != life]
            for grant in grants:
                carrier = self._shared.carriers.get(grant.name)
                if life_of(grant.waiter) == life and carrier is not None and carrier.kind == "semaphore":
                    self._shared.free(grant.name)
            return count

        return int(self._once(number, do))

    def delete_job(self, number: int, job_id: str, home: str = "") -> int:
        def do() -> int:
            if home in self._shared.incarnations:
                return 0
            self._shared.ended_jobs[job_id] = home
            names = [name for name in self._shared.carriers if name.startswith(f"{job_id}-")]
            for name in names:
                del self._shared.carriers[name]
            for waiter in [waiter for waiter, hold in self._shared.holds.items() if hold.name in names]:
                del self._shared.holds[waiter]
            return len(names)

        return int(self._once(number, do))

    def read_grants(self, after_id: str, *, block_ms: int = 0) -> list[Grant]:
        after = int(after_id.split("-", maxsplit=1)[0])
        return [grant for grant in self._shared.grants.get(self.node_id, []) if int(grant.id.split("-")[0]) > after]

    def drop_grants(self, until_id: str) -> None:
        until = int(until_id.split("-", maxsplit=1)[0])
        grants = self._shared.grants.get(self.node_id, [])
        self._shared.grants[self.node_id] = [grant for grant in grants if int(grant.id.split("-")[0]) > until]
