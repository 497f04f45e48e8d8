"""Pools, executors and joblib go on elsewhere when nodes are killed under them, and count no result twice."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy
import pytest

import clusterpool
from tests.cluster import clusters
from tests.cluster.clusters import DEAD_WITHIN_S, Cluster

pytestmark = pytest.mark.cluster

SLACK_S = 5.0  # of a machine that runs other things as well, and for the start of workers


def large(number: int) -> Any:
    """A result that stays in the arena of its node until it is read."""
    time.sleep(0.03)
    return numpy.full(50_000, number)


def where(number: int) -> tuple[int, str]:
    time.sleep(0.02)
    return number, os.environ["CLUSTERPOOL_NODE_ID"]


def noted(arguments: tuple[str, int]) -> int:
    folder, number = arguments
    time.sleep(0.05)
    (Path(folder) / f"{number}-{os.getpid()}").touch()
    return number


def nested(number: int) -> int:
    from clusterpool.multiprocessing import Pool

    with Pool(2) as pool:
        return sum(pool.map(_slow_square, range(number, number + 6), chunksize=1))


def _slow_square(number: int) -> int:
    time.sleep(0.05)
    return number * number


def test_large_results_of_a_lost_node_are_made_again(mortal_nodes: Cluster, driver: None) -> None:
    with clusterpool.Pool(6) as pool:
        clusters.wait_for(lambda: len(pool._pool) == 6, what="all workers are ready")
        results = pool.imap(large, range(100))
        first = [next(results) for _ in range(10)]
        mortal_nodes.kill(mortal_nodes.second)  # with results in it that nobody has read
        arrays = first + list(results)
    assert [int(array[-1]) for array in arrays] == list(range(100))
    assert all(len(array) == 50_000 for array in arrays)


def test_an_executor_goes_on(mortal_nodes: Cluster, driver: None) -> None:
    """As it is by default: without retries after the death of a worker alone."""
    with clusterpool.Executor(6) as executor:
        futures = [executor.submit(large, number) for number in range(120)]
        assert futures[5].result(timeout=30)[0] == 5
        mortal_nodes.kill(mortal_nodes.third)
        assert [int(future.result(timeout=40)[-1]) for future in futures] == list(range(120))


@pytest.mark.alone  # it measures time
def test_two_nodes_lost_at_once(mortal_nodes: Cluster, driver: None) -> None:
    with clusterpool.Pool(6) as pool:
        clusters.wait_for(lambda: len(pool._pool) == 6, what="all workers are ready")
        results = pool.imap_unordered(where, range(400))
        got = [next(results) for _ in range(20)]
        mortal_nodes.kill(mortal_nodes.second, mortal_nodes.third)
        killed_s = time.monotonic()
        # More workers are asked for while both are dead and nobody knows.
        with clusterpool.Pool(4) as other:
            assert other.map(abs, range(-50, 0)) == list(range(50, 0, -1))
        got += list(results)
        assert sorted(number for number, _ in got) == list(range(400))
        clusters.wait_for(
            lambda: len(pool._pool) == 6 and len(clusterpool.nodes()) == 1,
            within_s=max(1.0, killed_s + DEAD_WITHIN_S + SLACK_S - time.monotonic()),
            what="the pool has its size again",
        )
        assert {node_id for _, node_id in pool.map(where, range(60), chunksize=1)} == {mortal_nodes.head}


@pytest.mark.alone  # it measures time
def test_tasks_of_a_killed_node_run_elsewhere_within_five_seconds(mortal_nodes: Cluster, driver: None) -> None:
    started = clusterpool.remote(num_cpus=0, retries=3)(os.getpid)
    clusterpool.get(started.options(scheduling=f"near:{mortal_nodes.second}").remote(), timeout=20)

    @clusterpool.remote(num_cpus=0)
    def first_time_here(folder: str) -> tuple[float, str]:
        node_id = clusterpool.node_id()
        (Path(folder) / node_id).touch()
        if len(os.listdir(folder)) == 1:
            time.sleep(60)
        return time.monotonic(), node_id

    folder = mortal_nodes.session_folder / "first"
    folder.mkdir()
    try:
        ref = first_time_here.options(scheduling=f"near:{mortal_nodes.second}").remote(str(folder))
        clusters.wait_for(lambda: len(os.listdir(folder)) == 1, what="it runs")
        mortal_nodes.kill(mortal_nodes.second)
        killed_s = time.monotonic()
        ran_s, node_id = clusterpool.get(ref, timeout=30)
        assert node_id != mortal_nodes.second
        assert ran_s - killed_s < DEAD_WITHIN_S + SLACK_S
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_results_of_a_node_that_slept_are_not_taken_twice(mortal_nodes: Cluster, driver: None, tmp_path: Path) -> None:
    pid = mortal_nodes.pids[mortal_nodes.second]
    with clusterpool.Pool(5) as pool:
        clusters.wait_for(lambda: len(pool._pool) == 5, what="all workers are ready")
        workers = [process.pid for process in pool._pool]
        frozen = [pid, *(child for child in clusters.children_of(pid) if child in workers)]
        results = pool.imap_unordered(noted, [(str(tmp_path), number) for number in range(300)])
        got = [next(results) for _ in range(20)]
        for each in frozen:
            os.kill(each, signal.SIGSTOP)
        stopped_s = time.monotonic()
        try:
            while time.monotonic() - stopped_s < 8.0:
                got += [number for number in [next(results, None)] if number is not None]
        finally:
            for each in frozen:
                if clusters.is_alive(each):
                    os.kill(each, signal.SIGCONT)
        got += list(results)
        assert sorted(got) == list(range(300))
        clusters.wait_for(lambda: len(clusterpool.nodes()) == 3, what="it joins anew")
        clusters.wait_for(lambda: len(pool._pool) == 5, what="the pool has its size")
    on_second = clusterpool.remote(clusterpool.node_id).options(scheduling=f"node:{mortal_nodes.second}", num_cpus=0)
    assert clusterpool.get(on_second.remote(), timeout=20) == mortal_nodes.second


def test_nested_pools_survive_the_loss_of_a_node(mortal_nodes: Cluster, driver: None) -> None:
    with clusterpool.Pool(4) as pool:
        results = pool.imap_unordered(nested, range(10))
        got = [next(results) for _ in range(2)]
        mortal_nodes.kill(mortal_nodes.second)
        got += list(results)
    assert sorted(got) == [sum(i * i for i in range(number, number + 6)) for number in range(10)]


def test_a_grid_search_survives_the_loss_of_a_node(mortal_nodes: Cluster, driver: None, tmp_path: Path) -> None:
    pytest.importorskip("sklearn.model_selection")
    import joblib
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.model_selection import GridSearchCV

    class Threshold(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
        """Says on which node it was fitted. Small: importing more of scikit-learn would take each worker seconds."""

        def __init__(self, level: float = 0.0) -> None:
            self.level = level

        def fit(self, points: Any, classes: Any) -> Any:
            self.classes_ = numpy.unique(classes)
            if "CLUSTERPOOL_NODE_ID" in os.environ:
                (tmp_path / os.environ["CLUSTERPOOL_NODE_ID"]).touch()
                clusters.wait_for((tmp_path / second).exists, "the second node, whose worker may start last, fits")
                time.sleep(0.02)
            return self

        def predict(self, points: Any) -> Any:
            return (points[:, 0] > self.level).astype(int)

    def kill_in_the_middle() -> None:
        clusters.wait_for((tmp_path / second).exists, within_s=40, what="the second node fits")
        mortal_nodes.kill(second)

    second = mortal_nodes.second
    points = numpy.random.default_rng(0).normal(size=(60, 3))
    classes = (points[:, 0] > 0.3).astype(int)
    grid = {"level": [0.05 * number for number in range(40)]}
    expected = GridSearchCV(Threshold(), grid, cv=3).fit(points, classes)
    killer = threading.Thread(target=kill_in_the_middle)
    killer.start()
    # One worker on each node.
    with joblib.parallel_config(backend="clusterpool", n_jobs=3):
        found = GridSearchCV(Threshold(), grid, cv=3).fit(points, classes)
    killer.join()
    assert not clusters.is_alive(mortal_nodes.pids[mortal_nodes.second])
    assert (found.cv_results_["mean_test_score"] == expected.cv_results_["mean_test_score"]).all()
    assert found.best_params_ == expected.best_params_
