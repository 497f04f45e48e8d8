"""Pi from random points, on a Pool; with `--module multiprocessing`, on that of the standard library."""

from __future__ import annotations

import argparse
import importlib
import random


def count_inside(seed: int, points: int) -> int:
    """How many of `points` random points of the unit square lie inside the quarter circle."""
    generator = random.Random(seed)
    return sum(generator.random() ** 2 + generator.random() ** 2 <= 1 for _ in range(points))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--module", default="clusterpool.multiprocessing", help="where Pool comes from")
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--points", type=int, default=100_000, help="points a task")
    arguments = parser.parse_args()
    pool_class = importlib.import_module(arguments.module).Pool

    with pool_class() as pool:
        inside = pool.starmap(count_inside, [(seed, arguments.points) for seed in range(arguments.tasks)])
    print(f"pi is about {4 * sum(inside) / (arguments.tasks * arguments.points):.4f}")


if __name__ == "__main__":
    main()
