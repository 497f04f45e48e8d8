"""Logistic regression trained by tasks that send gradients to an actor, which holds the parameters."""

from __future__ import annotations

import argparse

import numpy
from sklearn.datasets import load_breast_cancer

import clusterpool


@clusterpool.remote
class ParameterServer:
    """Holds the weights; the calls of one caller run in the order in which they were made."""

    def __init__(self, size: int, rate: float) -> None:
        self.weights = numpy.zeros(size)
        self.rate = rate

    def apply(self, *gradients):
        """One step down the mean gradient; returns the new weights."""
        self.weights -= self.rate * numpy.mean(gradients, axis=0)
        return self.weights.copy()

    def current(self):
        """The weights as they are now."""
        return self.weights.copy()


@clusterpool.remote
def gradient(weights, data, target):
    """Of the logistic loss, on one shard of the data."""
    predicted = 1 / (1 + numpy.exp(-data @ weights))
    return data.T @ (predicted - target) / len(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--shards", type=int, default=4)
    arguments = parser.parse_args()

    data, target = load_breast_cancer(return_X_y=True)
    data = (data - data.mean(axis=0)) / data.std(axis=0)
    data = numpy.column_stack([data, numpy.ones(len(data))])
    # Stored once; each step passes references to them.
    shards = [
        (clusterpool.put(data[start :: arguments.shards]), clusterpool.put(target[start :: arguments.shards]))
        for start in range(arguments.shards)
    ]
    server = ParameterServer.remote(data.shape[1], 0.5)
    weights = server.current.remote()
    for _ in range(arguments.steps):
        # Nothing is fetched here: the weights and the gradients go from task to actor and back as references.
        weights = server.apply.remote(*(gradient.remote(weights, *shard) for shard in shards))
    accuracy = ((data @ clusterpool.get(weights) > 0) == target).mean()
    print(f"accuracy after {arguments.steps} steps: {accuracy:.4f}")
    clusterpool.shutdown()


if __name__ == "__main__":
    main()
