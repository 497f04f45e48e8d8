"""What simulated drivers do, each as a program that knows what must come of it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import msgspec

from clusterpool.core import messages as m
from clusterpool.core import owner_events as e
from clusterpool.core.dispatch import Task
from clusterpool.core.messages import TaskExtras, TaskKind, TaskSpec
from clusterpool.simulation.actor_programs import detached_actor, restarting_actor
from clusterpool.simulation.child_programs import children
from clusterpool.simulation.chunk_programs import chunks, limits, stragglers
from clusterpool.simulation.client import Client
from clusterpool.simulation.ledger import Promise
from clusterpool.simulation.lock_programs import locks
from clusterpool.simulation.programs import Operation, Outcome, encode_operation, expected, mix, put_number
from clusterpool.simulation.references import Ref
from clusterpool.simulation.stream_programs import streaming_actor, streams
from clusterpool.simulation.sync_programs import barriers, conditions
from clusterpool.simulation.threads import Pause, Steps
from clusterpool.simulation.token_programs import queues, semaphores, signals

DURATIONS_S = (0.0, 0.0002, 0.004, 0.03, 0.2)
CPU = {"CPU": 1.0}


class Script:
    """One thread of a driver. `size` scales what it does."""

    def __init__(self, driver: Client, random: Random, *, name: str, size: float, large_bytes: int) -> None:
        self.driver = driver
        self.random = random
        self.name = name
        self.size = size
        self.large_bytes = large_bytes
        self._last_salt = 0

    def run(self) -> Steps:
        """A few rounds of this and that."""
        names = self.driver.world.plan.programs or tuple(PROGRAMS)
        for _ in range(self.count(2, 5)):
            name = self.random.choice(names)
            self.driver.note("program", name)
            yield from PROGRAMS[name](self)
            yield Pause(self.random.choice((0.0, 0.05, 0.5)))

    # --- making tasks

    def count(self, least: int, most: int) -> int:
        """A number of things."""
        return max(1, round(self.random.randint(least, most) * self.size))

    def operation(self, **fields: object) -> Operation:
        """A task like any other."""
        self._last_salt += 1
        random = self.random
        result_bytes = 8
        if random.random() < 0.15:
            result_bytes = random.randint(5000, self.large_bytes)
        values = {
            "salt": mix(self.name, self._last_salt),
            "duration_s": random.choice(DURATIONS_S),
            "result_bytes": result_bytes,
            "fails": random.random() < 0.03,
        }
        return Operation(**{**values, **fields})  # type: ignore[arg-type]

    def submit(self, operation: Operation, arguments: list[Ref] | None = None, inner: list[Ref] | None = None) -> Ref:
        """Submit to the leases of one CPU."""
        strategy = self.random.choice(("", "", "", "spread"))
        ref = self.driver.submit(self.driver.task_set(CPU, strategy), operation, arguments, inner)
        assert ref is not None
        return ref

    def settle(self, ref: Ref, wanted: Outcome, what: str, *, was_cancelled: bool = False) -> Steps:
        """Get, judge, and let go; the outcome."""
        outcome = yield from self.driver.get(ref)
        self.driver.world.monitor.judge(
            self.driver, f"{self.name} {what}", outcome, wanted, was_cancelled=was_cancelled
        )
        ref.drop()
        return outcome

    # --- programs

    def flat_tasks(self) -> Steps:
        """Many tasks of one kind."""
        duration_s = self.random.choice(DURATIONS_S)
        operations = [self.operation(duration_s=duration_s) for _ in range(self.count(5, 60))]
        refs = [self.submit(operation) for operation in operations]
        for operation, ref in zip(operations, refs, strict=True):
            yield from self.settle(ref, expected(operation), "flat task")

    def graph(self) -> Steps:
        """Tasks that have the results of others as arguments, and inside containers."""
        refs: list[Ref] = []
        wanted: list[Outcome] = []
        for _ in range(self.count(5, 25)):
            picks = [self.random.randrange(len(refs)) for _ in range(min(len(refs), self.random.randint(0, 3)))]
            split = self.random.randint(0, len(picks))
            arguments, inner = picks[:split], picks[split:]
            operation = self.operation(inner=len(inner))
            refs.append(self.submit(operation, [refs[pick] for pick in arguments], [refs[pick] for pick in inner]))
            results = [[wanted[pick] for pick in part] for part in (arguments, inner)]
            wanted.append(expected(operation, *results))
            if self.random.random() < 0.1:
                yield Pause(0.01)
        order = list(range(len(refs)))
        self.random.shuffle(order)
        for position in order:
            if self.random.random() < 0.3:
                refs[position].drop()  # nobody asks; what depends on it must not mind
            else:
                yield from self.settle(refs[position], wanted[position], "node of a graph")

    def nested(self) -> Steps:
        """Tasks that start tasks and wait for them."""
        operations = [self._tree(2) for _ in range(self.count(1, 5))]
        refs = [self.submit(operation) for operation in operations]
        for operation, ref in zip(operations, refs, strict=True):
            yield from self.settle(ref, expected(operation), "nested task")

    def _tree(self, depth: int) -> Operation:
        children = [self._tree(depth - 1) for _ in range(self.random.randint(1, 3))] if depth else []
        return self.operation(children=children)

    def boxes(self) -> Steps:
        """Tasks that return references, of which some outlive their box."""
        driver = self.driver
        operations = [
            self.operation(
                fails=False,
                boxed=[self.operation() for _ in range(self.random.randint(0, 2))],
                put_bytes=[self.random.choice((100, 5000, self.large_bytes)) for _ in range(self.random.randint(0, 2))],
            )
            for _ in range(self.count(2, 6))
        ]
        boxes = [self.submit(operation) for operation in operations]
        for operation, box in zip(operations, boxes, strict=True):
            outcome = yield from driver.get(box)
            driver.world.monitor.judge(driver, f"{self.name} box", outcome, expected(operation))
            wanted = [expected(child) for child in operation.boxed]
            wanted += [Outcome("ok", put_number(operation.salt, at)) for at in range(len(operation.put_bytes))]
            inside = [Ref(driver, reference, is_counted=False) for reference in outcome.references]
            if outcome.kind == "ok":
                driver.world.monitor.check(len(inside) == len(wanted), f"{self.name}: a box has lost references")
            box.drop()
            if self.random.random() < 0.5:
                yield Pause(self.random.choice((0.001, 0.3)))
            for ref, want in zip(inside, wanted, strict=False):
                yield from self.settle(ref, want, "inside a box")

    def shared(self) -> Steps:
        """References that go from hand to hand: a box is the argument of tasks that pass on what is inside."""
        driver = self.driver
        number = mix(self.name, "shared", self._last_salt)
        self._last_salt += 1
        size_bytes = self.random.choice((64, 6000, self.large_bytes))
        value = yield from driver.put(number, size_bytes)
        if isinstance(value, Outcome):
            driver.world.monitor.judge(driver, "put", value, Outcome("ok", number))
            return
        passing = [self.operation(fails=False, peeks=True) for _ in range(self.count(1, 4))]
        boxes = [self.submit(operation, [], [value]) for operation in passing]
        value.drop()
        for operation, box in zip(passing, boxes, strict=True):
            outcome = yield from driver.get(box)
            driver.world.monitor.judge(driver, f"{self.name} peek", outcome, expected(operation))
            inside = [Ref(driver, reference, is_counted=False) for reference in outcome.references]
            box.drop()
            for ref in inside:
                yield from self.settle(ref, Outcome("ok", number), "passed on")

    def group(self) -> Steps:
        """A pool: workers of its own, results to a sink."""
        driver = self.driver
        ended: list[object] = []
        outcomes: dict[int, Outcome] = {}
        retries = self.random.choice((0, 1, 3))
        runs_max = self.random.choice((None, None, 3))

        def told(command: object) -> None:
            if isinstance(command, e.SetEnded):
                ended.append(command)

        number = driver.open_group(self.count(1, 6), told, runs_max=runs_max)
        operations = [self.operation() for _ in range(self.count(5, 60))]

        def sink_of(index: int) -> Callable[[Outcome], None]:
            def sink(outcome: Outcome) -> None:
                driver.world.monitor.check(index not in outcomes, f"{self.name}: result {index} came twice")
                outcomes[index] = outcome

            return sink

        for index, operation in enumerate(operations):
            driver.submit(number, operation, retries=retries, sink=sink_of(index))
            if self.random.random() < 0.05:
                yield Pause(0.01)
        is_terminated = self.random.random() < 0.15
        if is_terminated:
            yield Pause(self.random.choice((0.0, 0.02, 0.3)))
            driver.event(e.SetTerminated(number))
        else:
            if self.random.random() < 0.3:
                driver.event(e.SetResized(number, self.count(1, 6)))
            if self.random.random() < 0.7:
                yield from driver.wait_until(lambda: len(outcomes) == len(operations))
            driver.event(e.SetClosed(number))
        driver.turn()
        yield from driver.wait_until(lambda: bool(ended))
        yield from driver.wait_until(lambda: len(outcomes) == len(operations))
        for index, operation in enumerate(operations):
            what = f"{self.name} task {index} of a group"
            driver.world.monitor.judge(driver, what, outcomes[index], expected(operation), was_cancelled=is_terminated)

    def open_actor(self) -> Steps:
        """A new actor that is not made again; its id, and the reference that it lives by."""
        driver = self.driver
        actor_id = f"a{driver.world.next_number()}"
        part = m.ActorPart(actor_id, "Counter", {"call": 1}, None, "pending", job_id=driver.job.job_id)
        number = next(driver.numbers)
        extras = TaskExtras(1, "Counter", 1)
        driver.world.ledger.promised(actor_id, Promise())
        payload = encode_operation(Operation(0, caller=actor_id))
        creation = Task(
            TaskSpec(number, driver.function_of(self.operation()), TaskKind.CREATE_ACTOR, payload, extras), None, 0
        )
        demand = m.WorkerDemand(m.WorkerKind.ACTOR, {}, "Counter", actor_id=actor_id)
        driver.send(driver.node, m.RegisterActor(0, part))
        lifetime = yield from driver.put(0, 8)
        assert isinstance(lifetime, Ref)
        driver.event(e.ActorOpened(part, demand, e.SetupPlan("Counter"), creation, None, lifetime.part.number))
        return actor_id, lifetime

    def actor(self) -> Steps:
        """An actor with calls in order."""
        driver = self.driver
        actor_id, lifetime = yield from self.open_actor()
        calls: list[tuple[Ref, int]] = []
        for index in range(self.count(1, 20)):
            operation = self.operation(fails=False, result_bytes=8, caller=driver.name + actor_id, index=index)
            operation = msgspec.structs.replace(operation, duration_s=min(operation.duration_s, 0.03))
            calls.append((driver.call_actor(actor_id, operation), mix(operation.salt, operation.caller, index)))
            if self.random.random() < 0.1:
                yield Pause(0.02)
        if self.random.random() < 0.5:
            lifetime.drop()  # it ends with its last call
        for ref, value in calls:
            yield from self.settle(ref, Outcome("ok", value), "call of an actor")
        lifetime.drop()

    def objects(self) -> Steps:
        """Large values, put and passed to tasks."""
        driver = self.driver
        puts: list[tuple[Ref, int]] = []
        for _ in range(self.count(1, 6)):
            self._last_salt += 1
            number = mix(self.name, "put", self._last_salt)
            put = yield from driver.put(number, self.random.randint(5000, self.large_bytes))
            if isinstance(put, Outcome):
                driver.world.monitor.judge(driver, "put", put, Outcome("ok", number))
            else:
                puts.append((put, number))
        readers: list[tuple[Ref, Outcome]] = []
        for _ in range(self.count(1, 10)):
            picks = [self.random.choice(puts) for _ in range(self.random.randint(1, 2))] if puts else []
            operation = self.operation()
            wanted = expected(operation, [Outcome("ok", number) for _, number in picks])
            readers.append((self.submit(operation, [ref for ref, _ in picks]), wanted))
        if self.random.random() < 0.5:
            for ref, _ in puts:
                ref.drop()
        for ref, wanted in readers:
            yield from self.settle(ref, wanted, "reader of large values")
        for ref, number in puts:
            if ref.is_held:
                yield from self.settle(ref, Outcome("ok", number), "large value")

    def cancelled(self) -> Steps:
        """Tasks of which some are cancelled."""
        driver = self.driver
        operations = [self.operation() for _ in range(self.count(3, 20))]
        refs = [self.submit(operation) for operation in operations]
        yield Pause(self.random.choice((0.0, 0.01, 0.1)))
        picked = [self.random.random() < 0.4 for _ in refs]
        for ref, is_picked in zip(refs, picked, strict=True):
            if is_picked:
                force = self.random.random() < 0.3
                if force:  # what the worker owned goes with it
                    driver.world.evidence.asks_to_kill = True
                driver.event(e.TaskCancelAsked(ref.part.number, force, self.random.random() < 0.5))
        driver.turn()
        for operation, ref, is_picked in zip(operations, refs, picked, strict=True):
            yield from self.settle(ref, expected(operation), "cancelled task", was_cancelled=is_picked)


PROGRAMS: dict[str, Callable[[Script], Steps]] = {
    "flat": Script.flat_tasks,
    "graph": Script.graph,
    "nested": Script.nested,
    "boxes": Script.boxes,
    "group": Script.group,
    "actor": Script.actor,
    "objects": Script.objects,
    "cancelled": Script.cancelled,
    "shared": Script.shared,
    "restarts": restarting_actor,
    "detached": detached_actor,
    "locks": locks,
    "chunks": chunks,
    "limits": limits,
    "stragglers": stragglers,
    "semaphores": semaphores,
    "signals": signals,
    "queues": queues,
    "conditions": conditions,
    "barriers": barriers,
    "children": children,
    "streams": streams,
    "streaming_actor": streaming_actor,
}
