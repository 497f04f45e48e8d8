"""A store that is too small for what it is given: spilling, eviction, back-pressure, and plain words."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

import clusterpool
from clusterpool import errors
from tests.client.engine import MIB, check_nothing_left, wait_for

STORE_MIB = 64


@pytest.fixture
def small_store(fresh: None) -> None:
    clusterpool.init(num_cpus=2, object_store_bytes=STORE_MIB * MIB)


pytestmark = pytest.mark.usefixtures("small_store")


def node() -> dict[str, Any]:
    return clusterpool.nodes()[0]


def test_the_store_has_the_size_that_was_asked_for() -> None:
    assert node()["store_bytes"] == STORE_MIB * MIB


def test_more_than_fits_is_spilled_and_read_back() -> None:
    refs = [clusterpool.put(np.full(10 * MIB, value, np.uint8)) for value in range(20)]
    assert node()["spilled_bytes"] > 100 * MIB
    for value, ref in enumerate(refs):
        array = clusterpool.get(ref, timeout=30)
        assert (array == value).all()
        del array
    for value, ref in reversed(list(enumerate(refs))):
        assert clusterpool.get(ref, timeout=30)[0] == value
    del refs, ref
    gc.collect()
    check_nothing_left()


def test_tasks_produce_more_than_fits() -> None:
    @clusterpool.remote
    def make(value: int) -> Any:
        return np.full(10 * MIB, value, np.uint8)

    @clusterpool.remote
    def first(array: Any) -> int:
        return int(array[0])

    refs = [make.remote(value) for value in range(15)]
    assert clusterpool.get([first.remote(ref) for ref in refs], timeout=50) == list(range(15))
    del refs
    check_nothing_left()


def test_results_that_are_kept_do_not_block_new_ones() -> None:
    """Readers that hold much of the store are given copies, so that the store never fills with what is read."""
    refs = [clusterpool.put(np.full(10 * MIB, value, np.uint8)) for value in range(12)]
    arrays = clusterpool.get(refs, timeout=50)
    assert [int(array[0]) for array in arrays] == list(range(12))
    more = clusterpool.put(np.zeros(30 * MIB, np.uint8))
    assert clusterpool.get(more, timeout=30).nbytes == 30 * MIB


def test_what_is_larger_than_the_store_is_refused_with_the_sizes() -> None:
    with pytest.raises(errors.ObjectTooLarge, match=r"83\.9 MB .*67\.1 MB") as caught:
        clusterpool.put(np.zeros(80 * MIB, np.uint8))
    assert isinstance(caught.value, MemoryError)

    @clusterpool.remote
    def make() -> Any:
        return np.zeros(80 * MIB, np.uint8)

    with pytest.raises(errors.ObjectTooLarge):
        clusterpool.get(make.remote(), timeout=20)

    @clusterpool.remote
    def length(value: Any) -> int:
        return len(value)

    with pytest.raises(errors.ObjectTooLarge):
        length.remote(np.zeros(80 * MIB, np.uint8))
    assert clusterpool.get(length.remote([1, 2]), timeout=30) == 2


def test_a_stream_of_more_than_fits() -> None:
    @clusterpool.remote(num_returns="streaming")
    def make(count: int) -> Any:
        for value in range(count):
            yield np.full(10 * MIB, value, np.uint8)

    seen = []
    for ref in make.remote(15):
        seen.append(int(clusterpool.get(ref, timeout=30)[0]))
    assert seen == list(range(15))
    del ref
    check_nothing_left()


def test_arguments_of_many_tasks_do_not_fill_the_store() -> None:
    @clusterpool.remote
    def total(array: Any) -> int:
        return int(array[:10].sum())

    refs = [total.remote(np.full(10 * MIB, value, np.uint8)) for value in range(20)]
    assert clusterpool.get(refs, timeout=50) == [10 * value for value in range(20)]
    gc.collect()
    assert wait_for(lambda: node()["store_used_bytes"] + node()["spilled_bytes"] == 0)
