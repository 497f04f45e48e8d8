"""Workers fed by a JoinableQueue, in the style of the documentation's; then a Pipe, a Barrier, a Condition."""

from multiprocessing import Array, Barrier, Condition, JoinableQueue, Pipe, Process, Queue, Semaphore, Value


class Worker(Process):
    """A subclass with its own `run`, as daemons: they end with the program."""

    def __init__(self, tasks, results):
        super().__init__(daemon=True)
        self.tasks = tasks
        self.results = results

    def run(self):
        while True:
            number = self.tasks.get()
            try:
                self.results.put(f"{number} is {'odd' if number % 2 else 'even'}")
            finally:
                self.tasks.task_done()


def answer(connection, factor):
    """Multiply what comes, until there is nothing in it."""
    with connection:
        while items := connection.recv():
            connection.send([factor * item for item in items])


def run_rounds(place, laps, barrier, seats):
    """Everybody finishes a round before anybody starts the next."""
    for _ in range(3):
        with seats, laps.get_lock():
            laps[place] += 1
            laps[-1] += 1
        barrier.wait()


def wait_for_number(condition, number, wanted, results):
    with condition:
        condition.wait_for(lambda: number.value >= wanted)
        results.put(wanted)


def main():
    tasks, results = JoinableQueue(), Queue()
    for _ in range(2):
        Worker(tasks, results).start()
    for number in range(10):
        tasks.put(number)
    tasks.join()
    print(sorted(results.get() for _ in range(10)))

    here, there = Pipe()
    process = Process(target=answer, args=(there, 3))
    process.start()
    there.close()
    for items in ([1, 2], ["a", "b"], [[]]):
        here.send(items)
        print(here.recv())
    here.send([])
    process.join()
    print("exit code", process.exitcode)

    laps, barrier = Array("i", 4), Barrier(3)
    runners = [Process(target=run_rounds, args=(place, laps, barrier, Semaphore(2))) for place in range(3)]
    condition, number = Condition(), Value("d", 0.0)
    waiters = [Process(target=wait_for_number, args=(condition, number, wanted, results)) for wanted in (1, 3, 2)]
    for process in runners + waiters:
        process.start()
    order = []
    for value in (1, 2, 3):
        with condition:
            number.value = value
            condition.notify_all()
        order.append(results.get())
    for process in runners + waiters:
        process.join()
    print(laps[:], order)


if __name__ == "__main__":
    main()
