"""Producers and consumers with Process, Queue, Lock, Event, Value and Manager; on a cluster, spread over its nodes."""

import argparse
import os
import time
from multiprocessing import Event, Lock, Manager, Process, Queue, Value, current_process


class Shared:
    """All that the processes have in common; it is passed to each of them."""

    def __init__(self, manager):
        self.tasks = Queue(maxsize=10)
        self.results = Queue()
        self.start = Event()
        self.ready = Value("i", 0)
        self.lock = Lock()
        self.journal = manager.dict()
        self.places = manager.dict()

    def enter(self):
        """Say where this process runs, and wait until all are there."""
        self.places[current_process().name] = os.environ.get("CLUSTERPOOL_NODE_ID", "here")
        with self.ready.get_lock():
            self.ready.value += 1
        self.start.wait()


def produce(shared, numbers):
    shared.enter()
    for number in numbers:
        shared.tasks.put((current_process().name, number))


def consume(shared):
    """Take tasks until there is a None, and count in the journal whose they were."""
    shared.enter()
    while (task := shared.tasks.get()) is not None:
        producer, number = task
        shared.results.put((number, number**2))
        with shared.lock:  # read, change, write: without the lock some would be lost
            shared.journal[producer] = shared.journal.get(producer, 0) + 1
    shared.results.put(None)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numbers", type=int, default=40, help="how many each producer makes")
    parser.add_argument("--places", action="store_true", help="print how many processes ran on each node")
    arguments = parser.parse_args()

    with Manager() as manager:
        shared = Shared(manager)
        steps = [range(first, 3 * arguments.numbers, 3) for first in range(3)]
        producers = [Process(target=produce, args=(shared, step), name=f"producer {step[0]}") for step in steps]
        consumers = [Process(target=consume, args=(shared,), name=f"consumer {number}") for number in range(3)]
        for process in producers + consumers:
            process.start()
        while shared.ready.value < len(producers + consumers):
            time.sleep(0.01)
        shared.start.set()

        for process in producers:
            process.join()
        for _ in consumers:
            shared.tasks.put(None)
        squares = {}
        finished = 0
        while finished < len(consumers):
            if (result := shared.results.get()) is None:
                finished += 1
            else:
                squares[result[0]] = result[1]
        for process in consumers:
            process.join()

        print("squares:", len(squares), "sum:", sum(squares.values()))
        print("journal:", sorted(shared.journal.items()))
        print("exit codes:", [process.exitcode for process in producers + consumers])
        if arguments.places:
            places = list(shared.places.values())
            print("places:", {place: places.count(place) for place in sorted(set(places))})


if __name__ == "__main__":
    main()
