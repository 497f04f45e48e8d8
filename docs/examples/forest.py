"""A random forest on the breast-cancer data, cross-validated by scikit-learn on a joblib backend."""

from __future__ import annotations

import argparse

import joblib
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import cross_val_score

import clusterpool  # noqa: F401  (the import is what makes the backend known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="clusterpool")
    parser.add_argument("--trees", type=int, default=100)
    arguments = parser.parse_args()

    data, target = load_breast_cancer(return_X_y=True)
    forest = RandomForestClassifier(arguments.trees, random_state=0)
    with joblib.parallel_config(backend=arguments.backend, n_jobs=-1):
        scores = cross_val_score(forest, data, target, cv=5)
    print(f"accuracy {scores.mean():.6f} +- {scores.std():.6f}")


if __name__ == "__main__":
    main()
