"""What simulated programs do with counting semaphores, signals, queues and conditions of the cluster.

semaphore   tokens that belong to whoever took them: a dead one's come free, and there are never too many
signals     tokens that belong to nobody: whoever posts makes one, whoever takes it uses it up
queue       items, each to be got once; what was put is there until somebody has got it
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from clusterpool.core import owner_events as e
from clusterpool.simulation.carriers import CarrierPart, CoordinationError, Token
from clusterpool.simulation.client import Client
from clusterpool.simulation.lock_programs import PATIENCE_S
from clusterpool.simulation.programs import Operation, Outcome, expected
from clusterpool.simulation.references import Ref
from clusterpool.simulation.threads import Interrupted, Pause, Steps

if TYPE_CHECKING:
    from clusterpool.simulation.workloads import Script
    from clusterpool.simulation.world import World

# Who wants one token more than there are waits so long in vain.
IN_VAIN_S = 0.3
# What is under way to somebody who was cancelled, or has died, is back by then.
SETTLED_S = 8.0


class Stint(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What a task does: so often it holds a token, posts or takes a signal, puts or gets an item."""

    what: str  # "hold", "post", "await", "put", "get"
    carrier: CarrierPart
    rounds: int
    pause_s: float
    patience_s: float = PATIENCE_S
    dies_in: int = -1  # before or while it does it in this round


class TokenLedger:
    """Of one world: who holds what, what was posted and put, what came of it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._holds: dict[str, list[tuple[Client, int]]] = {}  # by carrier, with the node's life at that time
        self.posts: Counter[str] = Counter()  # begun
        self.posted: Counter[str] = Counter()  # acknowledged
        self.taken: Counter[str] = Counter()
        self._takers: dict[str, set[str]] = {}  # by carrier, who has its token from the control store
        self._granted: dict[str, Counter[str]] = {}  # by carrier, to whom the control store gave a token, how often
        self._taker: dict[tuple[str, bytes], str] = {}  # by carrier and item, whom it was given to last
        self.put: dict[str, dict[bytes, bool]] = {}  # by carrier and item, whether it was acknowledged
        self.got: dict[str, set[bytes]] = {}

    def is_void(self, carrier: CarrierPart) -> bool:
        """Whether the control store has forgotten something of it."""
        return carrier.name in self._world.evidence.void

    def given(self, name: str, waiter: str, item: bytes) -> None:
        """The control store has given a waiter a token, or an item."""
        if item:
            self._taker[(name, item)] = waiter
        else:
            self._granted.setdefault(name, Counter())[waiter] += 1

    def _is_dead(self, waiter: str) -> bool:
        process_id = waiter.split("/")[1]
        client = self._world.clients.get(process_id)
        return client is None or not client.is_alive or not client.node_party.is_alive

    def _life(self, client: Client) -> int:
        entry = self._world.store.fake._entry_by_node.get(client.address.node_id)
        return entry.incarnation if entry is not None else 0

    def holds(self, carrier: CarrierPart, client: Client) -> None:
        """A process has got a token. Not counted: the dead, and those whose node was taken for dead meanwhile."""
        holds = self._holds.setdefault(carrier.name, [])
        holds.append((client, self._life(client)))
        if self.is_void(carrier):
            return
        living = [holder.name for holder, life in holds if holder.is_alive and life and life == self._life(holder)]
        self._world.monitor.check(
            len(living) <= carrier.total, f"{', '.join(living)} hold the {carrier.total} tokens of {carrier.name}"
        )

    def lets_go(self, carrier: CarrierPart, client: Client) -> None:
        """It is about to give one back."""
        holds = self._holds[carrier.name]
        del holds[next(index for index, (holder, _) in enumerate(holds) if holder is client)]

    def puts(self, carrier: CarrierPart, item: bytes, *, is_done: bool) -> None:
        """An item is being put, or was."""
        self.put.setdefault(carrier.name, {})[item] = is_done

    def gets(self, carrier: CarrierPart, item: bytes) -> None:
        """Somebody has got an item."""
        monitor, got = self._world.monitor, self.got.setdefault(carrier.name, set())
        monitor.check(item in self.put.get(carrier.name, {}), f"{item!r} of {carrier.name} was never put")
        monitor.check(item not in got or self.is_void(carrier), f"{item!r} of {carrier.name} was got twice")
        got.add(item)

    def missing(self, carrier: CarrierPart) -> list[tuple[bytes, str]]:
        """What was put, and nobody has got, with whom it was given to last: nobody who has died since, with it."""
        got, name = self.got.get(carrier.name, set()), carrier.name
        left = [item for item, is_done in self.put.get(name, {}).items() if is_done and item not in got]
        takers = [(item, self._taker.get((name, item), "")) for item in left]
        return [(item, taker) for item, taker in takers if not taker or not self._is_dead(taker)]

    def lost_with_the_dead(self, carrier: CarrierPart) -> int:
        """How many tokens may have gone with those that they were given to."""
        granted, takers = self._granted.get(carrier.name, Counter()), self._takers.get(carrier.name, set())
        dead = [waiter for waiter in granted if self._is_dead(waiter)]
        return sum(granted[waiter] - (waiter.partition("/")[2] in takers) for waiter in dead)

    def takes(self, client: Client, token: Token) -> None:
        """Somebody has a signal."""
        name = token.carrier.name
        self.taken[name] += 1
        if token.request:
            self._takers.setdefault(name, set()).add(f"{client.name}/{token.request}")


# --- in a task


def do_stint(client: Client, stint: Stint, operation: Operation | None = None) -> Steps:
    """Do what a Stint says; why it could not be done, or None."""
    do = {"hold": _hold, "post": _post, "await": _await, "put": _put, "get": _get}[stint.what]
    for number in range(stint.rounds):
        try:
            yield from do(client, stint, operation if number == stint.dies_in else None)
        except CoordinationError as exc:
            return exc.outcome
    return None


def _hold(client: Client, stint: Stint, operation: Operation | None) -> Steps:
    carriers, ledger = client.carriers, client.world.tokens
    token = yield from carriers.acquire(stint.carrier, stint.patience_s)
    if token is None:
        is_patient = stint.patience_s >= PATIENCE_S
        text = f"{client.name} has waited {stint.patience_s:g} s for {stint.carrier.name}: the dead left it free"
        client.world.monitor.check(not is_patient or ledger.is_void(stint.carrier), text)
        return
    ledger.holds(stint.carrier, client)
    try:
        if operation is not None:
            yield from client.maybe_die(operation)
        yield Pause(stint.pause_s)
    except Interrupted:
        yield from _give_back(client, stint.carrier, token)
        raise
    yield from _give_back(client, stint.carrier, token)


def _give_back(client: Client, carrier: CarrierPart, token: Token) -> Steps:
    client.world.tokens.lets_go(carrier, client)
    yield from client.carriers.release(token)


def _post(client: Client, stint: Stint, operation: Operation | None) -> Steps:
    if operation is not None:
        yield from client.maybe_die(operation)
    yield Pause(stint.pause_s)
    client.world.tokens.posts[stint.carrier.name] += 1
    yield from client.carriers.post(stint.carrier)
    client.world.tokens.posted[stint.carrier.name] += 1


def _await(client: Client, stint: Stint, operation: Operation | None) -> Steps:
    if operation is not None:
        yield from client.maybe_die(operation)
    token = yield from client.carriers.acquire(stint.carrier, stint.patience_s)
    if token is not None:
        client.world.tokens.takes(client, token)
    yield Pause(stint.pause_s)


def _put(client: Client, stint: Stint, operation: Operation | None) -> Steps:
    if operation is not None:
        yield from client.maybe_die(operation)
    ledger = client.world.tokens
    item = f"{client.name}/{client.world.next_number()}".encode()
    ledger.puts(stint.carrier, item, is_done=False)
    yield from client.carriers.put(stint.carrier, item)
    ledger.puts(stint.carrier, item, is_done=True)
    yield Pause(stint.pause_s)


def _get(client: Client, stint: Stint, operation: Operation | None) -> Steps:
    if operation is not None:
        yield from client.maybe_die(operation)
    item = yield from client.carriers.get(stint.carrier, stint.patience_s)
    if item is not None:
        client.world.tokens.gets(stint.carrier, item)
    yield Pause(stint.pause_s)


# --- programs


class _Work:
    """Tasks with stints, of which some die and some are cancelled."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._tasks: list[tuple[Ref, Operation, bool]] = []

    def submit(self, what: str, carrier: CarrierPart, *, patience_s: float, count: int) -> Steps:
        """So many tasks."""
        random = self._script.random
        for _ in range(count):
            rounds = random.randint(1, 5)
            deaths = 1 if random.random() < 0.15 else 0
            stint = Stint(
                what, carrier, rounds, random.choice((0.0, 0.001, 0.03, 0.3)), patience_s,
                dies_in=random.randrange(rounds) if deaths else -1,
            )  # fmt: skip
            operation = self._script.operation(
                fails=False, result_bytes=8, turn=msgspec.msgpack.encode(stint), deaths=deaths
            )
            is_cancelled = random.random() < 0.12
            self._tasks.append((self._script.submit(operation), operation, is_cancelled))
            if random.random() < 0.2:
                yield Pause(0.05)

    def settle(self) -> Steps:
        """Cancel some, and judge all."""
        script, driver = self._script, self._script.driver
        if any(is_cancelled for _, _, is_cancelled in self._tasks):
            yield Pause(script.random.choice((0.02, 0.2, 1.0)))
        for ref, _, is_cancelled in self._tasks:
            if is_cancelled:
                driver.event(e.TaskCancelAsked(ref.part.number, False, True))
        for ref, operation, is_cancelled in self._tasks:
            yield from script.settle(ref, expected(operation), "task with tokens", was_cancelled=is_cancelled)


def semaphores(script: Script) -> Steps:
    """Tasks and the driver hold tokens of one semaphore. At the end all are there, and not one more."""
    driver, random = script.driver, script.random
    carrier = driver.carriers.make("guard", random.randint(1, 4))
    work = _Work(script)
    yield from work.submit("hold", carrier, patience_s=PATIENCE_S, count=script.count(2, 8))
    yield from work.submit("hold", carrier, patience_s=random.choice((0.0, 0.05)), count=script.count(1, 3))
    failure = yield from do_stint(driver, Stint("hold", carrier, random.randint(0, 3), 0.01))
    yield from work.settle()
    if failure is None:
        failure = yield from _count_tokens(driver, carrier)
    if failure is not None:
        driver.world.monitor.judge(driver, "semaphore", failure, Outcome("ok", 0))


def _count_tokens(driver: Client, carrier: CarrierPart) -> Steps:
    ledger, monitor = driver.world.tokens, driver.world.monitor
    tokens: list[Token] = []
    try:
        for number in range(carrier.total):
            token = yield from driver.carriers.acquire(carrier, PATIENCE_S)
            if token is None:
                text = f"{number} of {carrier.total} tokens of {carrier.name} are left, when nobody holds any"
                monitor.check(ledger.is_void(carrier), text)
                break
            tokens.append(token)
            ledger.holds(carrier, driver)
        else:
            token = yield from driver.carriers.acquire(carrier, IN_VAIN_S)
            monitor.check(
                token is None or ledger.is_void(carrier), f"{carrier.name} has more than {carrier.total} tokens"
            )
        for token in tokens:
            ledger.lets_go(carrier, driver)
            yield from driver.carriers.release(token)
    except CoordinationError as exc:
        return exc.outcome
    return None


def signals(script: Script) -> Steps:
    """Tasks post signals, others wait for some: no more are taken than were posted, and none gets lost."""
    driver, random = script.driver, script.random
    carrier = driver.carriers.make("semaphore", 0)
    work = _Work(script)
    yield from work.submit("post", carrier, patience_s=0.0, count=script.count(1, 5))
    yield from work.submit("await", carrier, patience_s=random.choice((0.0, 0.2, 2.0)), count=script.count(1, 5))
    yield from work.settle()
    ledger, monitor = driver.world.tokens, driver.world.monitor
    left = 0
    try:
        yield from driver.carriers.value(carrier)
        patience_s = SETTLED_S if driver.world.faults else 1.0
        while (yield from driver.carriers.acquire(carrier, patience_s)) is not None:
            left += 1
    except CoordinationError as exc:
        monitor.judge(driver, "signals", exc.outcome, Outcome("ok", 0))
        return
    posted, taken = ledger.posted[carrier.name], ledger.taken[carrier.name]
    if not ledger.is_void(carrier):
        posts, lost = ledger.posts[carrier.name], ledger.lost_with_the_dead(carrier)
        story = f"{posts} signals of {carrier.name}, {posted} acknowledged, {taken} taken, {left} left"
        monitor.check(left + taken <= posts, f"{story}: some were taken twice")
        monitor.check(left + taken >= posted - lost, f"{story}; {lost} went with the dead at the most")


def queues(script: Script) -> Steps:
    """Tasks put items, others get some, the driver gets the rest: each once, and none is lost."""
    driver, random = script.driver, script.random
    carrier = driver.carriers.make("channel")
    work = _Work(script)
    yield from work.submit("put", carrier, patience_s=0.0, count=script.count(1, 5))
    yield from work.submit("get", carrier, patience_s=random.choice((0.0, 0.2, 2.0)), count=script.count(1, 5))
    failure = yield from do_stint(driver, Stint("put", carrier, random.randint(0, 3), 0.01))
    yield from work.settle()
    ledger, monitor = driver.world.tokens, driver.world.monitor
    try:
        yield from driver.carriers.value(carrier)
        while (
            item := (yield from driver.carriers.get(carrier, SETTLED_S if driver.world.faults else 1.0))
        ) is not None:
            ledger.gets(carrier, item)
    except CoordinationError as exc:
        failure = failure or exc.outcome
    if failure is not None:
        monitor.judge(driver, "queue", failure, Outcome("ok", 0))
        return
    missing = ledger.missing(carrier)
    text = f"{missing[:3]} of {carrier.name} were put, and nobody has got them"
    monitor.check(not missing or ledger.is_void(carrier), text)
