"""A sum as a tree of tasks: the reference to a result is an argument of the next task; nothing waits."""

from __future__ import annotations

import argparse

import clusterpool


@clusterpool.remote
def squares(first: int, last: int) -> int:
    """A leaf: the sum of the squares from `first` up to, but not including, `last`."""
    return sum(number * number for number in range(first, last))


@clusterpool.remote
def add(left: int, right: int) -> int:
    """An inner node; its arguments are references at the call, and values here."""
    return left + right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numbers", type=int, default=1_000_000)
    parser.add_argument("--leaves", type=int, default=32)
    arguments = parser.parse_args()

    step = -(-arguments.numbers // arguments.leaves)
    layer = [squares.remote(first, min(first + step, arguments.numbers)) for first in range(0, arguments.numbers, step)]
    while len(layer) > 1:
        pairs = [add.remote(left, right) for left, right in zip(layer[::2], layer[1::2], strict=False)]
        layer = pairs + layer[len(pairs) * 2 :]
    print(f"the sum of the squares below {arguments.numbers:,} is {clusterpool.get(layer[0]):,}")
    clusterpool.shutdown()


if __name__ == "__main__":
    main()
