"""What a Pool can do, in the style of the documentation's tour: calls, errors, timeouts, how it ends."""

import multiprocessing
import time


def calculate(function, arguments):
    return f"{multiprocessing.current_process().name[:4]} {function.__name__}{arguments} = {function(*arguments)}"


def calculate_star(arguments):
    return calculate(*arguments)


def multiply(a, b):
    return a * b


def add(a, b):
    return a + b


def inverse(number):
    return 1.0 / (number - 5)


def pause(seconds):
    time.sleep(seconds)
    return seconds


def remember(offset):
    global OFFSET
    OFFSET = offset


def shifted(number):
    return number + OFFSET


def show_calls(pool):
    tasks = [(multiply, (i, 7)) for i in range(5)] + [(add, (i, 8)) for i in range(5)]
    pending = [pool.apply_async(calculate, task) for task in tasks]
    lazy = pool.imap(calculate_star, tasks)
    unordered = pool.imap_unordered(calculate_star, tasks)
    print("apply_async:", [result.get().partition(" ")[2] for result in pending])
    print("imap:", [text.partition(" ")[2] for text in lazy])
    print("imap_unordered:", sorted(text.partition(" ")[2] for text in unordered))
    print("map:", [text.partition(" ")[2] for text in pool.map(calculate_star, tasks, chunksize=3)])
    print("starmap:", pool.starmap(add, zip(range(5), range(5), strict=True)))
    collected = []
    pool.map_async(abs, range(-3, 3), callback=collected.extend).wait()
    pool.apply_async(inverse, (5,), error_callback=collected.append).wait()
    time.sleep(0.2)  # callbacks may come just after the result
    print("callbacks:", collected)


def show_errors(pool):
    for name in ("apply", "map", "imap"):
        try:
            list(getattr(pool, name)(inverse, [5] if name == "apply" else range(10)))
        except ZeroDivisionError as error:
            print(name, "raised", repr(error))
    values = pool.imap(inverse, range(10))
    reached = []
    while len(reached) < 10:
        try:
            reached.append(next(values))
        except StopIteration:
            break
        except ZeroDivisionError:
            reached.append(None)
    print("imap goes on after an error:", reached)
    failed = pool.apply_async(inverse, (5,))
    failed.wait()
    print("successful:", failed.successful())


def show_timeouts(pool):
    late = pool.apply_async(pause, (1.0,))
    try:
        late.get(timeout=0.02)
    except multiprocessing.TimeoutError:
        print("late")
    values = pool.imap(pause, [0.3])
    try:
        values.next(timeout=0.02)
    except multiprocessing.TimeoutError:
        print("late, and then", values.next())


def show_ends():
    pool = multiprocessing.Pool(2, initializer=remember, initargs=(100,), maxtasksperchild=4)
    result = pool.map_async(shifted, range(5))
    pool.close()
    pool.join()
    print("after close and join:", result.get())
    try:
        pool.map(shifted, [1])
    except ValueError as error:
        print("closed:", str(error)[:16])
    pool = multiprocessing.Pool(2)
    for _ in range(20):
        pool.apply_async(pause, (0.5,))
    start_s = time.monotonic()
    pool.terminate()
    pool.join()
    print("terminate is quick:", time.monotonic() - start_s < 4)


def main():
    with multiprocessing.Pool(2) as pool:
        show_calls(pool)
        show_errors(pool)
        show_timeouts(pool)
    show_ends()


if __name__ == "__main__":
    main()
