"""The minimum of the Ackley function by SciPy's differential evolution, its population valued by a Pool's workers."""

from multiprocessing import Pool

import numpy as np
from scipy.optimize import differential_evolution


def ackley(point: np.ndarray) -> float:
    """Many local minima, and a global one of 0 at the origin."""
    root_mean_square = np.sqrt(np.mean(point**2))
    return float(-20 * np.exp(-0.2 * root_mean_square) - np.exp(np.mean(np.cos(2 * np.pi * point))) + 20 + np.e)


def main() -> None:
    with Pool(2) as pool:
        result = differential_evolution(
            ackley, [(-5, 5)] * 3, workers=pool.map, updating="deferred", rng=7, maxiter=40, popsize=8, polish=False
        )
    print(f"{result.nit} generations, {result.nfev} values, minimum {result.fun!r}")
    print("at", *map(repr, result.x.tolist()))


if __name__ == "__main__":
    main()
