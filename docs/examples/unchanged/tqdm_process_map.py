"""`tqdm.contrib.concurrent.process_map`: an executor with a progress bar, whose lock its workers share."""

import sys

from tqdm import tqdm
from tqdm.contrib.concurrent import process_map


def collatz_steps(start: int) -> int:
    """How many steps the Collatz sequence takes from `start` to 1."""
    steps = 0
    while start != 1:
        start = start // 2 if start % 2 == 0 else 3 * start + 1
        steps += 1
    return steps


def collatz_steps_aloud(start: int) -> int:
    """The same, written above the bar: for this, workers and program need the lock of the bar."""
    steps = collatz_steps(start)
    tqdm.write(f"{start}: {steps} steps", file=sys.stderr)
    return steps


def main() -> None:
    steps = process_map(collatz_steps, range(1, 2001), max_workers=2, chunksize=50)
    print("longest below 2001:", max(steps), "steps from", steps.index(max(steps)) + 1)
    print(process_map(collatz_steps_aloud, [27, 97, 871], max_workers=2))


if __name__ == "__main__":
    main()
