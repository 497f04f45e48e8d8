"""What the backend does between joblib and its worker groups, on groups of threads."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import threading
import time
import types
import warnings

import pytest

joblib = pytest.importorskip("joblib")

from concurrent.futures.process import BrokenProcessPool  # noqa: E402

from fake_group import Killed, wait_until  # noqa: E402
from joblib import Parallel, delayed, parallel_backend, parallel_config  # noqa: E402

from clusterpool import errors  # noqa: E402
from clusterpool.joblib import register, warm_groups  # noqa: E402
from clusterpool.joblib.backend import ClusterpoolBackend, TerminatedWorkerError  # noqa: E402
from clusterpool.joblib.batch import uniform_function  # noqa: E402

register()
pytestmark = pytest.mark.usefixtures("fake")


def die():
    raise Killed


def parallel(**options):
    return Parallel(**{"n_jobs": 2, "backend": "clusterpool", **options})


def test_list_in_order():
    assert parallel()(delayed(pow)(i, 2) for i in range(200)) == [i * i for i in range(200)]
    assert parallel(batch_size=1)(delayed(pow)(i, 2) for i in range(50)) == [i * i for i in range(50)]
    assert parallel()([]) == []


@pytest.mark.parametrize("context", [parallel_backend, parallel_config])
def test_contexts_by_name(fake, context):
    with context("clusterpool", n_jobs=3):
        assert joblib.effective_n_jobs(None) == 3
        assert Parallel()(delayed(abs)(-i) for i in range(9)) == list(range(9))
    assert [group.size for group in fake] == [3]


@pytest.mark.parametrize(
    ("n_jobs", "expected"), [(1, 1), (2, 2), (9, 9), (-1, 4), (-2, 3), (-4, 1), (-9, 1), (None, 1)]
)
def test_effective_n_jobs(n_jobs, expected):
    assert ClusterpoolBackend(nesting_level=0).effective_n_jobs(n_jobs) == expected


def test_a_group_of_all_cpus_follows_the_cluster_until_it_gets_another_size(fake):
    for n_jobs, follows in ((-1, True), (-2, False), (-1, True)):
        parallel(n_jobs=n_jobs)(delayed(abs)(i) for i in range(4))
        assert fake[-1].options["follows_cluster"] is follows, n_jobs


def test_zero_jobs_is_an_error_and_one_job_needs_no_workers(fake):
    with pytest.raises(ValueError, match="no meaning"):
        parallel(n_jobs=0)(delayed(abs)(i) for i in range(2))
    assert parallel(n_jobs=1)(delayed(os.getpid)() for _ in range(2)) == [os.getpid()] * 2
    assert not fake


def test_unordered_and_ordered_generators():
    ordered = parallel(return_as="generator")(delayed(abs)(i) for i in range(100))
    assert list(ordered) == list(range(100))
    unordered = parallel(return_as="generator_unordered")(delayed(abs)(i) for i in range(100))
    assert sorted(unordered) == list(range(100))


def test_error_of_a_task_aborts_and_the_next_call_works(fake):
    seen = []

    def work(i):
        seen.append(i)
        if i == 3:
            raise LookupError("third")
        time.sleep(0.01)

    call = parallel(batch_size=1)
    with pytest.raises(LookupError, match="third"):
        call(delayed(work)(i) for i in range(1000))
    assert len(seen) < 100
    assert fake[0].terminated
    assert call(delayed(abs)(i) for i in range(5)) == list(range(5))


def test_killed_worker_raises_and_the_next_call_works(fake):
    with pytest.raises(TerminatedWorkerError, match="signal 9") as caught:
        parallel()(delayed(die)() for _ in range(4))
    assert isinstance(caught.value, BrokenProcessPool) and isinstance(caught.value, errors.WorkerDied)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert parallel()(delayed(abs)(i) for i in range(5)) == list(range(5))


def test_retries_run_a_batch_again():
    tries = []

    def work():
        tries.append(1)
        if len(tries) == 1:
            raise Killed
        return "again"

    with parallel_config("clusterpool", n_jobs=2, retries=1):
        assert Parallel()(delayed(work)() for _ in range(1)) == ["again"]


def test_timeout():
    go_on = threading.Event()
    with pytest.raises(multiprocessing.TimeoutError):
        parallel(timeout=0.1)(delayed(go_on.wait)(5) for _ in range(2))
    go_on.set()


def test_workers_are_kept_for_the_next_call(fake):
    for _ in range(3):
        parallel()(delayed(abs)(i) for i in range(4))
    assert len(fake) == 1 and not fake[0].closed
    parallel(n_jobs=3)(delayed(abs)(i) for i in range(4))
    # Another n_jobs is another share of the CPUs for each, so other workers (4 // 2 and 4 // 3 threads), ...
    assert [group.size for group in fake] == [2, 3]
    with parallel_config("clusterpool", inner_max_num_threads=1):
        Parallel(n_jobs=5)(delayed(abs)(i) for i in range(4))
    # ... but with the same limit the group grows.
    assert [group.size for group in fake] == [2, 5]


def test_two_calls_at_a_time_have_a_group_each(fake):
    barrier = threading.Barrier(2)
    threads = [
        threading.Thread(target=lambda: parallel()(delayed(barrier.wait)(10) for _ in range(1))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(fake) == 2


@pytest.mark.parametrize(
    ("inner", "environment", "expected"),
    [
        (None, {}, "2"),
        (3, {}, "3"),
        (None, {"OMP_NUM_THREADS": "7"}, "7"),
        (3, {"OMP_NUM_THREADS": "7"}, "3"),
    ],
)
def test_thread_limits_of_the_workers(fake, monkeypatch, inner, environment, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with parallel_config("clusterpool", inner_max_num_threads=inner):
        Parallel(n_jobs=2)(delayed(abs)(i) for i in range(4))
    assert fake[0].options["env"]["OMP_NUM_THREADS"] == expected


def test_nested_calls_run_in_threads_then_in_sequence():
    def leaf():
        return joblib.parallel.get_active_backend()[0].__class__.__name__

    def inner():
        name = joblib.parallel.get_active_backend()[0].__class__.__name__
        return name, Parallel(n_jobs=2)(delayed(leaf)() for _ in range(2))

    expected = ("ThreadingBackend", ["SequentialBackend"] * 2)
    # One after another: the fake's workers are threads and share the nested backend, of which real ones have copies.
    assert parallel(pre_dispatch=1)(delayed(inner)() for _ in range(3)) == [expected] * 3
    # A callable that is no plain function takes the other way to the worker, to the same end.
    assert parallel(pre_dispatch=1)(delayed(InnerCall(inner))() for _ in range(3)) == [expected] * 3


class InnerCall:
    def __init__(self, function):
        self.function = function

    def __call__(self):
        return self.function()


def test_nested_call_may_name_the_backend(fake):
    def inner(i):
        return sum(Parallel(n_jobs=2, backend="clusterpool")(delayed(pow)(i, k) for k in range(3)))

    assert parallel()(delayed(inner)(i) for i in range(4)) == [1 + i + i * i for i in range(4)]


def test_generator_dropped_early_cancels_the_rest(fake):
    seen = []

    def work(i):
        seen.append(i)
        time.sleep(0.005)
        return i

    results = parallel(return_as="generator", batch_size=1)(delayed(work)(i) for i in range(5000))
    assert next(results) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        del results
        gc.collect()
    assert fake[0].terminated
    assert parallel()(delayed(abs)(i) for i in range(3)) == [0, 1, 2]
    assert len(seen) < 200


def test_with_statement_keeps_one_group(fake):
    with parallel() as call:
        for _ in range(3):
            assert call(delayed(abs)(i) for i in range(4)) == list(range(4))
        with pytest.raises(ZeroDivisionError):
            call(delayed(divmod)(1, 0) for _ in range(3))
        assert call(delayed(abs)(i) for i in range(4)) == list(range(4))
    assert len(fake) == 2  # the second after the abort


def test_backend_can_be_pickled_and_made_with_a_nesting_level():
    backend = ClusterpoolBackend(nesting_level=2, inner_max_num_threads=3, retries=1)
    again = pickle.loads(pickle.dumps(backend))
    assert (again.nesting_level, again.inner_max_num_threads) == (2, 3)
    assert again._options == backend._options
    with pytest.raises(ValueError):
        ClusterpoolBackend(retries=-1)
    with pytest.raises(TypeError):
        ClusterpoolBackend(retrys=1)


def test_a_function_is_sent_once_a_call(fake, monkeypatch):
    sent = []

    def spy(group, function, args, kwargs, sink):
        sent.append(function)
        return type(group).submit(group, function, args, kwargs, sink)

    def function(i):
        return i

    parallel()(delayed(function)(i) for i in range(2))
    monkeypatch.setattr(fake[0], "submit", lambda *a: spy(fake[0], *a), raising=False)
    for _ in range(2):
        parallel(batch_size=1)(delayed(function)(i) for i in range(20))
    assert len(sent) == 40 and len({id(f) for f in sent}) <= 2
    assert all(isinstance(f, types.FunctionType) for f in sent)


def test_uniform_function_is_only_a_plain_function():
    def f():
        pass

    assert uniform_function([(f, (), {}), (f, (1,), {})]) is f
    assert uniform_function([(f, (), {}), (abs, (1,), {})]) is None
    assert uniform_function([(InnerCall(f), (), {})]) is None
    assert uniform_function([([].append, (1,), {})]) is None


def test_idle_groups_close_after_their_time(fake):
    clock = [0.0]
    groups = warm_groups.WarmGroups(clock=lambda: clock[0])
    opened = []

    def make():
        from fake_group import FakeWorkerGroup

        opened.append(FakeWorkerGroup(1))
        return opened[-1]

    first = groups.take("a", 1, "client", make)
    groups.give_back(first, 100)
    clock[0] = 99
    groups.close_idle(expired_only=True)
    assert not opened[0].closed and groups.take("a", 1, "client", make) is first
    groups.give_back(first, 100)
    assert groups.take("a", 1, "another client", make) is not first
    clock[0] = 200
    groups.close_idle(expired_only=True)
    assert opened[0].closed
    kept = [groups.take(key, 1, "client", make) for key in range(warm_groups.IDLE_GROUPS_MAX + 1)]
    for warm in kept:
        groups.give_back(warm, 100)
    assert [warm.group.closed for warm in kept] == [True] + [False] * warm_groups.IDLE_GROUPS_MAX
    groups.close_idle()
    assert all(warm.group.closed for warm in kept)


def test_a_group_that_is_still_at_work_is_ended_instead_of_kept(fake):
    from fake_group import FakeWorkerGroup

    groups = warm_groups.WarmGroups()
    busy = groups.take("a", 1, "client", lambda: FakeWorkerGroup(1))
    busy.group.hold()
    busy.group.submit(int, (), {}, type("Sink", (), {"task_done": lambda *_: None})())
    groups.give_back(busy, 100)
    assert busy.group.terminated


def test_idle_timer_closes_without_another_call(fake):
    with parallel_config("clusterpool", idle_worker_timeout=0.05):
        Parallel(n_jobs=2)(delayed(abs)(i) for i in range(4))
    assert wait_until(lambda: fake[0].closed, 10)
