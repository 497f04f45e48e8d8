"""A straight line through noisy points, by Markov chain Monte Carlo: emcee with a Pool of the standard library."""

from multiprocessing import Pool

import emcee
import numpy as np

TRUTH = np.array([-0.9, 4.3])  # slope and intercept
WALKERS = 16
STEPS = 60


def make_points() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places, measured values, and the errors of these."""
    generator = np.random.default_rng(123)
    x = np.sort(10 * generator.random(50))
    error = 0.1 + 0.5 * generator.random(50)
    return x, TRUTH[0] * x + TRUTH[1] + error * generator.standard_normal(50), error


def log_probability(line: np.ndarray, x: np.ndarray, y: np.ndarray, error: np.ndarray) -> float:
    slope, intercept = line
    if not (-5 < slope < 0.5 and 0 < intercept < 10):
        return -np.inf
    return -0.5 * float(np.sum(((y - slope * x - intercept) / error) ** 2))


def main() -> None:
    np.random.seed(42)  # emcee draws from the global generator
    start = TRUTH + 1e-2 * np.random.standard_normal((WALKERS, len(TRUTH)))
    with Pool(2) as pool:
        sampler = emcee.EnsembleSampler(WALKERS, len(TRUTH), log_probability, args=make_points(), pool=pool)
        sampler.run_mcmc(start, STEPS)
    chain = sampler.get_chain(discard=STEPS // 2, flat=True)
    print("slope and intercept:", *(f"{value:.12f}" for value in chain.mean(axis=0)))
    print(f"acceptance: {sampler.acceptance_fraction.mean():.12f}")


if __name__ == "__main__":
    main()
