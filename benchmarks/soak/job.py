"""The job, as a program: `python -m benchmarks.soak.job CONTENDER ADDRESS SECONDS TASKS`.

It runs for SECONDS, and on until TASKS small tasks are done; beside them chains of large arrays and calls of actors.
Each second it prints a line of JSON with what has been done; the last line has the verdict.
"""

from __future__ import annotations

import collections
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.soak import work
from benchmarks.soak.engines import Engine, make_engine

MARK = "SOAK "
# Between two chains, and between two rounds of calls: they are there to be hit, not to take the CPUs.
CHAIN_EVERY_S = 3.0
CALLS_EVERY_S = 0.5
# A job of which nothing moves for so long hangs.
STUCK_AFTER_S = 150.0


class Tally:
    """What has been done and what went wrong. One writer a field."""

    def __init__(self) -> None:
        self.tasks = 0
        self.chains = 0
        self.calls = 0
        self.wrong = 0
        self.twice = 0
        self.lost_states = 0
        self.errors: collections.Counter[str] = collections.Counter()
        self.examples: list[str] = []

    def fail(self, what: str, text: str) -> None:
        """Take note of an error that the user sees."""
        self.errors[what] += 1
        example = f"{what}: {' '.join(text[:600].split())}"
        if len(self.examples) < 20 and example not in self.examples:
            self.examples.append(example)

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {**vars(self), "errors": dict(self.errors)}


class Job:
    """The three kinds of work, each in a thread of its own."""

    def __init__(self, engine: Engine, *, seconds: float, tasks_min: int) -> None:
        self.engine = engine
        self.tally = Tally()
        self.ends_s = time.monotonic() + seconds
        self.tasks_min = tasks_min
        self.is_over = False
        self.seen = bytearray()  # by number of a small task: whether its result has come

    def run(self) -> bool:
        """Whether all threads came to their end."""
        parts = (self.small_tasks, self.chains, self.actor_calls)
        threads = [threading.Thread(target=self.guarded, args=(part,), daemon=True) for part in parts]
        for thread in threads:
            thread.start()
        started_s = moved_s = time.monotonic()
        before = (0, 0, 0)
        while any(thread.is_alive() for thread in threads):
            time.sleep(1.0)
            now_s = time.monotonic()
            tally = self.tally
            print(MARK + json.dumps({"t": round(now_s - started_s, 2), **tally.as_json(), "examples": []}), flush=True)
            done = (tally.tasks, tally.chains, tally.calls)
            if done != before:
                before, moved_s = done, now_s
            elif now_s - moved_s > STUCK_AFTER_S:
                return False
        return True

    def guarded(self, part: Callable[[], None]) -> None:
        """Run one part; what it raises is an error of the run."""
        try:
            part()
        except BaseException as exc:
            self.tally.fail(f"{part.__name__} ended", f"{type(exc).__name__}: {exc}")
            self.is_over = True

    def numbers(self) -> Iterator[int]:
        """Numbers of small tasks, until the time is over and there were enough."""
        number = 0
        while not self.is_over and (time.monotonic() < self.ends_s or number < self.tasks_min):
            self.seen.append(0)
            yield number
            number += 1

    def small_tasks(self) -> None:
        """The stream of small tasks."""
        tally = self.tally
        for number, value in self.engine.small_tasks(self.numbers(), lambda text: tally.fail("task", text)):
            tally.wrong += value != work.expected(number)
            tally.twice += self.seen[number]
            self.seen[number] = 1
            tally.tasks += 1
        self.is_over = True

    def chains(self) -> None:
        """Large arrays, from task to task."""
        number = 0
        while not self.is_over:
            number += 1
            started_s = time.monotonic()
            try:
                result = self.engine.chain(number)
            except Exception as exc:
                self.tally.fail("chain", f"{type(exc).__name__}: {exc}")
            else:
                self.tally.wrong += tuple(result) != work.expected_summary(number)
                self.tally.chains += 1
            time.sleep(max(0.0, CHAIN_EVERY_S - (time.monotonic() - started_s)))

    def actor_calls(self) -> None:
        """Rounds of calls to all actors; each must answer with the exact sum of what it was given."""
        if not self.engine.open_actors(work.ACTORS):
            return
        sums = [0] * work.ACTORS
        turn = 0
        while not self.is_over:
            turn += 1
            amounts = [turn * 100 + position for position in range(work.ACTORS)]
            for position, answer in enumerate(self.engine.call_all(amounts)):
                if isinstance(answer, Exception):
                    self.tally.fail("call", f"{type(answer).__name__}: {answer}")
                    continue
                sums[position] += amounts[position]
                self.tally.calls += 1
                if answer != sums[position]:
                    # It was started again and forgot, or it counted something twice: from here on count from that.
                    self.tally.lost_states += 1
                    sums[position] = answer
            time.sleep(CALLS_EVERY_S)


def main() -> None:
    """The program."""
    contender, address, seconds, tasks = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
    engine = make_engine(contender, address)
    job = Job(engine, seconds=seconds, tasks_min=tasks)
    came_to_end = job.run()
    missing = job.seen.count(0)
    verdict = {**job.tally.as_json(), "missing": missing, "came_to_end": came_to_end}
    if came_to_end:
        engine.close()
    print(MARK + json.dumps({"verdict": verdict}), flush=True)
    os._exit(0)  # threads of a tool that hangs must not keep the program


if __name__ == "__main__":
    main()
