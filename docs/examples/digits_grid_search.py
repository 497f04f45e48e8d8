"""A support vector machine for the handwritten digits, tuned by GridSearchCV on a joblib backend."""

from __future__ import annotations

import argparse
import json
import time

import joblib
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

import clusterpool  # noqa: F401  (the import is what makes the backend known)

GRID = {"C": [0.1, 1, 10, 100], "gamma": [0.0001, 0.0005, 0.001, 0.005]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="clusterpool", help="of joblib: loky, clusterpool, ...")
    parser.add_argument("--folds", type=int, default=3)
    arguments = parser.parse_args()

    images, labels = load_digits(return_X_y=True)
    search = GridSearchCV(SVC(), GRID, cv=arguments.folds)
    started_s = time.perf_counter()
    with joblib.parallel_config(backend=arguments.backend, n_jobs=-1):
        search.fit(images, labels)
    elapsed_s = time.perf_counter() - started_s
    print(
        json.dumps(
            {
                "answer": f"C={search.best_params_['C']}, gamma={search.best_params_['gamma']}:"
                f" accuracy {search.best_score_:.6f}",
                "result": [float(score) for score in search.cv_results_["mean_test_score"]],
                "seconds": elapsed_s,
            }
        )
    )


if __name__ == "__main__":
    main()
