"""The joblib backend on a real, embedded cluster: joblib's contract, scikit-learn's results as with loky."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings

import pytest

joblib = pytest.importorskip("joblib")
np = pytest.importorskip("numpy")

from joblib import Parallel, delayed, parallel_backend, parallel_config  # noqa: E402

import clusterpool  # noqa: E402  (this import alone registers the backend)
from tests.waiting import pid_at_meeting  # noqa: E402

pytestmark = pytest.mark.usefixtures("cluster")


def pid_of(_):
    time.sleep(0.01)
    return os.getpid()


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def fail(i):
    if i == 3:
        raise LookupError("third")
    time.sleep(0.02)


def limits(_):
    return os.environ["OMP_NUM_THREADS"], os.environ["OPENBLAS_NUM_THREADS"]


def write_into(array):
    array[0] = 7.0
    return float(array.sum())


def nested_threads(i):
    return sum(Parallel(n_jobs=2)(delayed(pow)(i, k) for k in range(3)))


def nested_by_name(i):
    return sum(Parallel(n_jobs=2, backend="clusterpool")(delayed(pow)(i, k) for k in range(3)))


def run_both(function):
    """What `function()` gives under loky and under clusterpool."""
    results = []
    for backend in ("loky", "clusterpool"):
        with parallel_backend(backend, n_jobs=2):
            results.append(function())
    return results


def test_an_import_alone_registers_the_backend():
    code = (
        "import clusterpool, sys\nassert 'joblib' not in sys.modules\n"
        "from joblib import Parallel, delayed, parallel_backend\n"
        "with parallel_backend('clusterpool', n_jobs=2):\n"
        "    print(Parallel()(delayed(lambda x: x * x)(i) for i in range(4)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("[0, 1, 4, 9]\n", "", 0)


def test_results_come_in_order_from_the_workers(tmp_path):
    with parallel_config("clusterpool", n_jobs=2):
        assert Parallel()(delayed(pow)(i, 2) for i in range(5000)) == [i * i for i in range(5000)]
        assert Parallel(batch_size=1)(delayed(abs)(-i) for i in range(500)) == list(range(500))
        pids = set(Parallel(batch_size=1)(delayed(pid_at_meeting)(str(tmp_path), 2) for _ in range(40)))
    assert len(pids) == 2 and os.getpid() not in pids


def test_workers_stay_from_call_to_call(tmp_path):
    with parallel_config("clusterpool", n_jobs=2):
        pids = [
            frozenset(Parallel(batch_size=1)(delayed(pid_at_meeting)(str(tmp_path / str(i)), 2) for _ in range(20)))
            for i in range(3)
        ]
    assert len(frozenset.union(*pids)) == 2


def test_minus_one_is_every_cpu_of_the_cluster():
    cpus = int(clusterpool.cluster_resources()["CPU"])
    with parallel_backend("clusterpool"):
        assert joblib.effective_n_jobs(-1) == cpus
        assert joblib.effective_n_jobs(-2) == max(1, cpus - 1)


def test_generators():
    with parallel_config("clusterpool", n_jobs=2):
        assert list(Parallel(return_as="generator")(delayed(abs)(i) for i in range(300))) == list(range(300))
        unordered = Parallel(return_as="generator_unordered")(delayed(abs)(i) for i in range(300))
        assert sorted(unordered) == list(range(300))
        dropped = Parallel(return_as="generator", batch_size=1)(delayed(pid_of)(i) for i in range(5000))
        next(dropped)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            del dropped
        assert Parallel()(delayed(abs)(i) for i in range(3)) == [0, 1, 2]


def test_error_aborts_the_call_with_its_own_type():
    start = time.monotonic()
    with parallel_config("clusterpool", n_jobs=2):
        with pytest.raises(LookupError, match="third"):
            Parallel(batch_size=1)(delayed(fail)(i) for i in range(2000))
        assert time.monotonic() - start < 20, "the remaining 2000 x 20 ms were not cancelled"
        assert Parallel()(delayed(abs)(i) for i in range(3)) == [0, 1, 2]


def test_killed_worker_raises_and_the_next_call_works():
    from concurrent.futures.process import BrokenProcessPool

    with parallel_config("clusterpool", n_jobs=2):
        with pytest.raises(BrokenProcessPool, match="SIGKILL"):
            Parallel()(delayed(kill_self)() for _ in range(4))
        assert Parallel()(delayed(abs)(i) for i in range(3)) == [0, 1, 2]


def test_inner_max_num_threads_reaches_the_workers():
    with parallel_config("clusterpool", n_jobs=2, inner_max_num_threads=3):
        assert set(Parallel()(delayed(limits)(i) for i in range(4))) == {("3", "3")}


@pytest.mark.parametrize("function", [nested_threads, nested_by_name])
def test_nested_parallel(function):
    with parallel_config("clusterpool", n_jobs=2):
        assert Parallel()(delayed(function)(i) for i in range(4)) == [1 + i + i * i for i in range(4)]


def test_large_arguments_are_writable_and_the_caller_s_own_stays():
    array = np.zeros(1_000_000)
    with parallel_config("clusterpool", n_jobs=2):
        sums = Parallel(batch_size=1)(delayed(write_into)(array) for _ in range(6))
        back = Parallel()(delayed(np.full)(300_000, float(i)) for i in range(2))
    assert sums == [7.0] * 6 and array[0] == 0.0
    back[1][0] = 5.0
    assert back[0].flags.writeable and float(back[1].sum()) == 300_004.0


def stored_bytes():
    return sum(node["store_used_bytes"] for node in clusterpool.nodes())


def until(predicate, seconds=20):
    end = time.monotonic() + seconds
    while not predicate():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.01)


def test_a_large_argument_is_stored_once_for_all_tasks_and_calls():
    until(lambda: stored_bytes() == 0)
    array = np.random.default_rng(0).random(2_500_000)
    with parallel_config("clusterpool", n_jobs=2):
        for _ in range(3):
            assert Parallel(batch_size=1)(delayed(np.sum)(array) for _ in range(6)) == [array.sum()] * 6
            assert array.nbytes <= stored_bytes() < array.nbytes * 1.2
        array[:] = 0
        assert Parallel()(delayed(np.sum)(array) for _ in range(2)) == [0.0] * 2
        made = Parallel()(delayed(np.ones)(300_000) for _ in range(4))
    assert sum(part.sum() for part in made) == 1_200_000
    del array, made
    until(lambda: stored_bytes() == 0)


def test_sys_exit_of_a_task_is_raised_in_the_caller():
    with parallel_config("clusterpool", n_jobs=2):
        with pytest.raises(SystemExit):
            Parallel()(delayed(sys.exit)(3) for _ in range(2))
        assert Parallel()(delayed(abs)(i) for i in range(3)) == [0, 1, 2]


def test_a_generator_may_be_read_after_the_next_call():
    with parallel_config("clusterpool", n_jobs=2):
        first = Parallel(return_as="generator", batch_size=1)(delayed(pid_of)(i) for i in range(30))
        assert Parallel()(delayed(abs)(i) for i in range(100)) == list(range(100))
        assert len(list(first)) == 30
        assert Parallel()(delayed(abs)(i) for i in range(3)) == [0, 1, 2]


def test_functions_of_main_see_its_globals_as_they_are_at_each_call():
    code = (
        "import clusterpool\nfrom joblib import Parallel, delayed\n"
        "factor = 2\n"
        "def scaled(x): return factor * x\n"
        "run = Parallel(n_jobs=2, backend='clusterpool')\n"
        "print(run(delayed(scaled)(i) for i in range(3)))\n"
        "factor = 5\n"
        "print(run(delayed(scaled)(i) for i in range(3)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert (done.stdout, done.stderr) == ("[0, 2, 4]\n[0, 5, 10]\n", "")


# ------------------------------------------------------------------ scikit-learn


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_digits(return_X_y=True)
    return x[:400], y[:400]


@pytest.mark.timeout(180)
def test_grid_search_gives_what_it_gives_with_loky(digits):
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    def search():
        grid = GridSearchCV(SVC(random_state=0), {"C": [0.1, 1, 10], "gamma": [1e-3, 1e-4]}, cv=3)
        grid.fit(*digits)
        return grid.best_params_, grid.cv_results_["mean_test_score"].tolist()

    loky, ours = run_both(search)
    assert ours == loky


@pytest.mark.timeout(180)
def test_random_forest_gives_what_it_gives_with_loky(digits):
    from sklearn.ensemble import RandomForestClassifier

    loky, ours = run_both(lambda: RandomForestClassifier(20, random_state=0).fit(*digits).predict_proba(digits[0]))
    np.testing.assert_array_equal(ours, loky)


@pytest.mark.timeout(180)
def test_cross_val_score_gives_what_it_gives_with_loky(digits):
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import cross_val_score

    loky, ours = run_both(lambda: cross_val_score(RidgeClassifier(), *digits, cv=4))
    np.testing.assert_array_equal(ours, loky)


@pytest.mark.timeout(180)
def test_permutation_importance_gives_what_it_gives_with_loky(digits):
    from sklearn.inspection import permutation_importance
    from sklearn.linear_model import RidgeClassifier

    model = RidgeClassifier().fit(*digits)
    loky, ours = run_both(lambda: permutation_importance(model, *digits, n_repeats=2, random_state=0).importances)
    np.testing.assert_array_equal(ours, loky)


def slow_first_time(folder, i):
    path = os.path.join(folder, str(i))
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return i
    time.sleep(600 if i == 5 else 0.05)
    return i


def test_a_batch_that_is_late_is_started_again_where_that_is_safe(tmp_path):
    with parallel_config("clusterpool", n_jobs=2, safe_to_repeat=True):
        results = Parallel(batch_size=1)(delayed(slow_first_time)(str(tmp_path), i) for i in range(8))
    assert results == list(range(8))
