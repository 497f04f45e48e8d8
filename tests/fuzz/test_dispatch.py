"""A dispatcher under random workers that run, give back, die and retire; a model knows where each task is."""

from __future__ import annotations

from random import Random

import pytest

from clusterpool.core.dispatch import Dispatcher, Task, WorkerSlot
from clusterpool.core.messages import Address, TaskStatus
from tests.core.machines import make_result, make_task
from tests.fuzz.searches import seeds

WORLDS = 150
STEPS = 150


class World:
    """`running`: the numbers of the tasks that each worker has, in the order in which it got them."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.runs_max = random.choice([None, None, 1, 3, 20])
        self.dispatcher = Dispatcher(runs_max=self.runs_max)
        self.now_s = 100.0
        self.running: dict[str, list[int]] = {}
        self.slots: dict[str, WorkerSlot] = {}
        self.runs: dict[str, int] = {}
        self.ended: dict[int, str] = {}
        self.tasks: dict[int, Task] = {}
        self.last_worker = 0

    def step(self) -> None:
        steps = [
            self.submit,
            self.add_worker,
            self.fill,
            self.run,
            self.run,
            self.give_back,
            self.kill,
            self.cancel,
            self.look,
        ]
        self.random.choice(steps)()
        self.now_s += self.random.choice([0.0, 0.0001, 0.01])
        self.check()

    def submit(self) -> None:
        tasks = [make_task(1024 * (len(self.tasks) + 1 + n), function=self.random.randint(1, 3)) for n in range(5)]
        self.tasks.update((task.spec.number, task) for task in tasks)
        self.dispatcher.submit(tasks)

    def add_worker(self) -> None:
        if len(self.slots) < 4:
            self.last_worker += 1
            name = f"w{self.last_worker}"
            self.slots[name] = self.dispatcher.add_worker(Address("n1", name), lease=self.last_worker, pid=1)
            self.running[name], self.runs[name] = [], 0

    def fill(self) -> None:
        for batch in self.dispatcher.fill(self.now_s):
            name = batch.slot.address.process_id
            assert batch.tasks, "an empty batch"
            assert not batch.slot.is_retiring, "a worker that retires got tasks"
            for task in batch.tasks:
                assert not task.is_cancelled, "a cancelled task was sent"
                self.running[name].append(task.spec.number)

    def run(self) -> None:
        name = self.random.choice([*self.slots, ""])
        if name and self.running[name]:
            count = self.random.randint(1, len(self.running[name]))
            done, self.running[name] = self.running[name][:count], self.running[name][count:]
            self.runs[name] += count
            results = [make_result(number) for number in done]
            self.note(self.dispatcher.finish(name, results, self.random.choice([0, 10**3, 10**8]) * count))

    def note(self, finished: list[tuple[Task, object]]) -> None:
        for task, _ in finished:
            assert task.spec.number not in self.ended, "a task ended twice"
            self.ended[task.spec.number] = "finished"

    def give_back(self) -> None:
        name = self.random.choice([*self.slots, ""])
        if name and len(self.running[name]) > 1:
            kept = self.random.randint(1, len(self.running[name]))
            back, self.running[name] = self.running[name][kept:], self.running[name][:kept]
            results = [make_result(number, TaskStatus.RETURNED, b"") for number in back]
            self.note(self.dispatcher.finish(name, results, 0))

    def kill(self) -> None:
        if self.slots and self.random.random() < 0.3:
            name = self.random.choice(list(self.slots))
            tasks = self.dispatcher.remove_worker(name)
            assert [task.spec.number for task in tasks] == self.running.pop(name)
            del self.slots[name]
            kept = [task for task in tasks if not task.is_cancelled]
            self.ended.update((task.spec.number, "cancelled") for task in tasks if task.is_cancelled)
            self.dispatcher.requeue(kept)

    def cancel(self) -> None:
        waiting = [task for number, task in self.tasks.items() if number not in self.ended]
        if waiting:
            self.random.choice(waiting).is_cancelled = True

    def look(self) -> None:
        for slot, count in self.dispatcher.take_back(self.now_s):
            assert 1 <= count < len(slot.outstanding), "a running task was asked back"
        for slot in self.dispatcher.retire_due():
            name = slot.address.process_id
            assert not self.running[name], "a worker was retired with tasks"
            self.dispatcher.remove_worker(name)
            del self.slots[name], self.running[name]

    def check(self) -> None:
        dispatcher = self.dispatcher
        assert dispatcher.outstanding_count == sum(len(numbers) for numbers in self.running.values())
        for name, slot in self.slots.items():
            assert list(slot.outstanding) == self.running[name]
            assert self.runs_max is None or self.runs[name] + len(self.running[name]) <= self.runs_max
        queued = [task.spec.number for task in dispatcher.queue]
        placed = queued + [number for numbers in self.running.values() for number in numbers]
        assert len(placed) == len(set(placed)), "a task is in two places"
        lost = {
            number
            for number, task in self.tasks.items()
            if number not in self.ended and number not in placed and not task.is_cancelled
        }
        assert not lost, f"lost: {lost}"

    def end(self) -> None:
        """Left to run, every task that is not cancelled ends."""
        for _ in range(10_000):
            if all(number in self.ended or task.is_cancelled for number, task in self.tasks.items()):
                return
            for step in (self.add_worker, self.fill, self.run, self.look):
                step()
                self.check()
        raise AssertionError(f"never ended: {self.tasks.keys() - self.ended.keys()}")


@pytest.mark.parametrize("seed", seeds(2))
def test_every_task_is_in_one_place_and_ends_once(seed: str) -> None:
    for number in range(WORLDS):
        world = World(Random(f"{seed}/{number}"))
        for _ in range(STEPS):
            world.step()
        world.end()
