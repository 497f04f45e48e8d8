"""Nearest neighbours on the handwritten digits, tuned by leave-one-out: an ordinary multiprocessing program.

Only where Pool comes from is a switch: `--module multiprocessing` or `--module clusterpool.multiprocessing`.
Each task measures the distances of a block of digits to all others, in one norm; the program then says how
many neighbours, in which norm, would have recognised the most digits.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time

import numpy
from sklearn.datasets import load_digits

NEIGHBOURS_MAX = 9
NORMS = (1, 2, 3)
BLOCK = 40


def load() -> None:
    """The initializer: every worker loads the data once and keeps it in globals."""
    global images, labels
    images, labels = load_digits(return_X_y=True)


def hits_of_block(task):
    """For a block of digits and a norm: how many each number of neighbours recognises, and who counted."""
    norm, first = task
    block = images[first : first + BLOCK]
    distances = (numpy.abs(block[:, None, :] - images[None, :, :]) ** norm).sum(axis=2)
    # A digit is no neighbour of its own.
    distances[numpy.arange(len(block)), numpy.arange(first, first + len(block))] = numpy.inf
    nearest = labels[numpy.argsort(distances, axis=1, kind="stable")[:, :NEIGHBOURS_MAX]]
    hits = []
    for neighbours in range(1, NEIGHBOURS_MAX + 1):
        votes = numpy.stack([(nearest[:, :neighbours] == digit).sum(axis=1) for digit in range(10)], axis=1)
        hits.append(int((votes.argmax(axis=1) == labels[first : first + BLOCK]).sum()))
    return norm, hits, os.getpid()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", default="clusterpool.multiprocessing", help="where Pool comes from")
    parser.add_argument("--processes", type=int, help="all CPUs, unless given")
    arguments = parser.parse_args()
    pool_class = importlib.import_module(arguments.module).Pool

    count = len(load_digits().target)
    tasks = [(norm, first) for norm in NORMS for first in range(0, count, BLOCK)]
    hits = {norm: [0] * NEIGHBOURS_MAX for norm in NORMS}
    workers = set()
    started_s = time.perf_counter()
    with pool_class(arguments.processes, initializer=load) as pool:
        for norm, block_hits, pid in pool.imap_unordered(hits_of_block, tasks):
            hits[norm] = [total + more for total, more in zip(hits[norm], block_hits, strict=True)]
            workers.add(pid)
    elapsed_s = time.perf_counter() - started_s
    score, norm, neighbours = max((score, -norm, -index) for norm in NORMS for index, score in enumerate(hits[norm], 1))
    print(
        json.dumps(
            {
                "answer": f"{-neighbours} neighbours in norm {-norm}: {score} of {count} digits",
                "result": hits,
                "seconds": elapsed_s,
                "workers": len(workers),
            }
        )
    )


if __name__ == "__main__":
    main()
