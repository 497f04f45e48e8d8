"""`put`, references in containers and closures, large values: what is kept, and that all of it goes."""

from __future__ import annotations

import gc
import pickle
import time
from typing import Any

import numpy as np
import pytest

import clusterpool
from clusterpool import errors
from tests.client.engine import MIB, objects_left, store_bytes, wait_for

pytestmark = pytest.mark.usefixtures("cluster", "nothing_left")


@clusterpool.remote
def total(values: Any) -> float:
    return float(np.sum(values))


def test_what_was_stored_of_several_results_goes_when_a_later_one_cannot_be(nothing_left: None) -> None:
    @clusterpool.remote(num_returns=3, retries=0)
    def several() -> tuple[Any, ...]:
        return np.zeros(1_000_000), [clusterpool.put("inner")], (number for number in range(3))

    for ref in several.remote():
        with pytest.raises(clusterpool.errors.SerializationFailed):
            clusterpool.get(ref, timeout=20)


def test_results_are_taken_one_by_one_as_they_come(nothing_left: None) -> None:
    def theirs() -> list[Any]:
        return [total.remote([number]) for number in range(10)]

    refs = [total.remote([number]) for number in range(300)]
    rest = refs[::-1] + clusterpool.get(clusterpool.remote(num_cpus=0)(theirs).remote(), timeout=20)
    taken: list[float] = []
    while rest:
        order = rest
        ready, rest = clusterpool.wait(order, num_returns=min(2, len(order)), timeout=20)
        assert [ref for ref in order if ref in ready] == ready and [ref for ref in order if ref in rest] == rest
        taken += clusterpool.get(ready)
    assert sorted(taken) == sorted([*range(300), *range(10)])


# --- put and get ----------------------------------------------------------------------------------------------------


def test_put_and_get() -> None:
    ref = clusterpool.put({"a": [1, 2]})
    assert clusterpool.get(ref) == {"a": [1, 2]}
    assert clusterpool.get([ref, ref]) == [{"a": [1, 2]}] * 2


def test_two_gets_are_independent() -> None:
    ref = clusterpool.put([1])
    clusterpool.get(ref).append(2)
    assert clusterpool.get(ref) == [1]


def test_put_takes_a_copy() -> None:
    array = np.zeros(1_000_000)
    ref = clusterpool.put(array)
    array[:] = 1
    assert clusterpool.get(ref).sum() == 0


def test_put_of_a_reference_is_refused() -> None:
    with pytest.raises(TypeError, match="ObjectRef"):
        clusterpool.put(clusterpool.put(1))


@pytest.mark.parametrize("size_mb", [10, 200])
def test_large_arrays_are_writable_and_copied_on_write(size_mb: int) -> None:
    ref = clusterpool.put(np.zeros(size_mb * MIB // 8))
    first, second = clusterpool.get([ref, ref], timeout=30)
    first[:100] = 1
    assert first[:100].sum() == 100
    assert second.sum() == 0
    assert clusterpool.get(ref, timeout=30).sum() == 0
    assert store_bytes() < (size_mb + 1) * MIB  # one copy


def test_an_array_outlives_its_reference() -> None:
    array = clusterpool.get(clusterpool.put(np.arange(1_000_000)), timeout=30)
    others = [clusterpool.put(np.ones(1_000_000)) for _ in range(5)]
    assert (array == np.arange(1_000_000)).all()
    del others


def test_the_memory_of_a_deleted_reference_comes_back() -> None:
    ref = clusterpool.put(np.zeros(20 * MIB, np.uint8))
    assert store_bytes() >= 20 * MIB
    del ref
    assert wait_for(lambda: store_bytes() == 0)


def test_large_results_of_tasks() -> None:
    @clusterpool.remote
    def make(size: int, value: int) -> Any:
        return np.full(size, value, np.uint8)

    refs = [make.remote(10 * MIB, value) for value in range(4)]
    arrays = clusterpool.get(refs, timeout=30)
    for value, array in enumerate(arrays):
        assert array.nbytes == 10 * MIB and (array == value).all()
        array += 1
    assert (clusterpool.get(refs[0], timeout=30) == 0).all()


def test_a_large_result_that_nobody_waits_for_is_freed() -> None:
    @clusterpool.remote
    def make() -> Any:
        return np.zeros(5 * MIB, np.uint8)

    make.remote()
    make.options(num_returns=0).remote()


def test_a_task_that_writes_to_its_argument_changes_nobody_elses() -> None:
    @clusterpool.remote
    def fill(array: Any, value: int) -> float:
        before = float(array.sum())
        array[:] = value
        return before

    array = np.zeros(1_000_000)
    ref = clusterpool.put(array)
    assert clusterpool.get([fill.remote(ref, value) for value in range(6)], timeout=30) == [0.0] * 6
    assert clusterpool.get([fill.remote(array, value) for value in range(6)], timeout=30) == [0.0] * 6
    assert clusterpool.get(ref, timeout=30).sum() == 0 and array.sum() == 0


def test_arrow_tables_and_data_frames() -> None:
    pandas = pytest.importorskip("pandas")
    pyarrow = pytest.importorskip("pyarrow")

    @clusterpool.remote
    def double(table: Any) -> Any:
        import pyarrow.compute

        return table.set_column(0, "x", pyarrow.compute.multiply(table["x"], 2))

    @clusterpool.remote
    def scale(frame: Any) -> Any:
        frame["x"] *= 2
        return frame

    table = pyarrow.table({"x": np.arange(1_000_000), "name": ["a"] * 1_000_000})
    frame = pandas.DataFrame({"x": np.arange(1_000_000), "name": ["a"] * 1_000_000})
    doubled = clusterpool.get(double.remote(table), timeout=50)
    assert doubled["x"].to_pylist()[:3] == [0, 2, 4]
    scaled = clusterpool.get(scale.remote(frame), timeout=50)
    assert scaled["x"].tolist()[:3] == [0, 2, 4] and frame["x"].tolist()[:3] == [0, 1, 2]
    scaled.loc[0, "x"] = 9  # what comes back is writable


# --- references inside values ---------------------------------------------------------------------------------------


class Box:
    """Something with an attribute."""

    def __init__(self, content: Any) -> None:
        self.content = content


def test_references_in_containers_are_passed_as_references() -> None:
    @clusterpool.remote
    def kinds(values: Any) -> list[str]:
        return [type(value).__name__ for value in values]

    ref = clusterpool.put(1)
    assert clusterpool.get(kinds.remote([ref, 2, ref]), timeout=30) == ["ObjectRef", "int", "ObjectRef"]


@pytest.mark.parametrize("size", [10, 5 * MIB])
def test_a_borrowed_reference_lives_when_the_owner_drops_its_own(size: int) -> None:
    @clusterpool.remote
    def later(refs: list[Any]) -> int:
        time.sleep(0.3)
        return len(clusterpool.get(refs[0], timeout=30))

    ref = clusterpool.put(b"x" * size)
    result = later.remote([ref])
    del ref
    assert clusterpool.get(result, timeout=20) == size


def test_a_worker_keeps_a_reference_from_one_task_to_the_next() -> None:
    @clusterpool.remote
    class Keeper:
        def __init__(self) -> None:
            self.ref: Any = None

        def keep(self, refs: list[Any]) -> None:
            self.ref = refs[0]

        def value(self) -> Any:
            return clusterpool.get(self.ref, timeout=30)

        def drop(self) -> None:
            self.ref = None

    keeper = Keeper.remote()
    ref = clusterpool.put("kept")
    number = ref.part.number
    clusterpool.get(keeper.keep.remote([ref]), timeout=30)
    del ref
    assert clusterpool.get(keeper.value.remote(), timeout=30) == "kept"
    assert clusterpool.get(keeper.value.remote(), timeout=30) == "kept"
    assert number in [owned[0] for owned in objects_left()["owned"]]
    clusterpool.get(keeper.drop.remote(), timeout=30)
    assert wait_for(lambda: number not in [owned[0] for owned in objects_left()["owned"]])


def test_what_a_dead_borrower_held_is_freed() -> None:
    @clusterpool.remote
    class Keeper:
        def keep(self, refs: list[Any]) -> None:
            self.refs = refs

    keeper = Keeper.remote()
    ref = clusterpool.put(np.zeros(MIB))
    clusterpool.get(keeper.keep.remote([ref]), timeout=30)
    del ref
    time.sleep(0.1)
    assert store_bytes() > 0
    clusterpool.kill(keeper)


def test_references_returned_inside_results() -> None:
    @clusterpool.remote
    def wrap(refs: list[Any]) -> Any:
        return {"refs": refs, "new": clusterpool.put("new")}

    ref = clusterpool.put(np.arange(500_000))
    result = wrap.remote([ref])
    del ref
    answer = clusterpool.get(result, timeout=30)
    assert clusterpool.get(answer["refs"][0], timeout=30)[-1] == 499_999
    assert clusterpool.get(answer["new"], timeout=30) == "new"
    del result
    assert clusterpool.get(answer["new"], timeout=30) == "new"


def test_put_of_references_in_containers() -> None:
    inner = clusterpool.put(np.ones(500_000))
    outer = clusterpool.put({"inner": inner, "more": [inner]})
    del inner
    loaded = clusterpool.get(outer, timeout=30)
    assert clusterpool.get(loaded["inner"], timeout=30).sum() == 500_000
    del outer
    assert clusterpool.get(loaded["more"][0], timeout=30).sum() == 500_000

    @clusterpool.remote
    def look(value: Any) -> float:
        return float(clusterpool.get(value["inner"], timeout=30).sum())

    assert clusterpool.get(look.remote(clusterpool.put(loaded)), timeout=30) == 500_000


def test_references_pass_through_several_tasks() -> None:
    @clusterpool.remote
    def pass_on(refs: list[Any], depth: int) -> Any:
        if depth == 0:
            return clusterpool.get(refs[0], timeout=20)
        return clusterpool.get(pass_on.remote(refs, depth - 1), timeout=20)

    ref = clusterpool.put("deep")
    result = pass_on.remote([ref], 4)
    del ref
    assert clusterpool.get(result, timeout=40) == "deep"


def test_a_reference_of_a_pending_task_is_passed_in_a_container() -> None:
    @clusterpool.remote
    def slow() -> int:
        time.sleep(0.3)
        return 5

    @clusterpool.remote
    def read(refs: list[Any]) -> int:
        return clusterpool.get(refs[0], timeout=20)

    ref = slow.remote()
    result = read.remote([ref])
    del ref
    assert clusterpool.get(result, timeout=20) == 5


def test_references_in_a_closure_are_borrowed() -> None:
    ref = clusterpool.put(np.arange(400_000))
    holder = [ref]

    @clusterpool.remote
    def read(wait_s: float) -> int:
        time.sleep(wait_s)
        return int(clusterpool.get(holder[0], timeout=30)[-1])

    assert clusterpool.get(read.remote(0), timeout=30) == 399_999
    result = read.remote(0.3)
    number = ref.part.number
    holder.clear()
    del ref
    assert clusterpool.get(result, timeout=20) == 399_999
    del read, result, holder
    gc.collect()
    # The workers that have the function hold its references until they end or forget the function.
    assert number is not None


def test_references_survive_plain_pickling() -> None:
    ref = clusterpool.put("escaped")
    pickled = pickle.dumps(ref)
    assert clusterpool.get(pickle.loads(pickled)) == "escaped"
    number = ref.part.number
    del ref
    assert clusterpool.get(pickle.loads(pickled)) == "escaped"
    # Nobody can know when such a pickle is gone, so the object stays; let it go by hand here.
    from clusterpool.client import current

    client = current.get().client
    client.release_reference(client.address, number)


def test_references_are_equal_and_hashable() -> None:
    ref = clusterpool.put(1)
    again = clusterpool.get(clusterpool.put([ref]))[0]
    assert ref == again and hash(ref) == hash(again) and len({ref, again}) == 1
    assert ref != clusterpool.put(1)
    assert ref.object_id in repr(ref)


# --- large parts of arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["tuple", "list", "dict", "object", "keyword", "itself"])
def test_a_large_array_anywhere_in_an_argument_is_stored_once(shape: str) -> None:
    array = np.ones(100 * MIB // 8)

    @clusterpool.remote
    def read(value: Any = None, *, keyword: Any = None) -> float:
        if isinstance(value, (tuple, list)):
            value = value[1]
        elif isinstance(value, dict):
            value = value["array"]
        elif value is not None and hasattr(value, "content"):
            value = value.content
        elif value is None:
            value = keyword
        value[0] = 2  # private to this task
        return float(value.sum())

    def call() -> Any:
        if shape == "keyword":
            return read.remote(keyword=array)
        wrap = {
            "tuple": lambda: (1, array),
            "list": lambda: [1, array],
            "dict": lambda: {"array": array},
            "object": lambda: Box(array),
            "itself": lambda: array,
        }
        return read.remote(wrap[shape]())

    refs = [call() for _ in range(8)]
    assert store_bytes() < 101 * MIB
    assert clusterpool.get(refs, timeout=50) == [array.size + 1.0] * 8
    assert array[0] == 1


def test_an_array_that_was_changed_is_stored_again() -> None:
    array = np.zeros(2 * MIB, np.uint8)
    first = total.remote(array)
    array[0] = 1
    second = total.remote(array)
    assert clusterpool.get([first, second], timeout=30) == [0.0, 1.0]


def test_large_bytes_as_arguments() -> None:
    @clusterpool.remote
    def length(*values: Any) -> list[tuple[str, int]]:
        return [(type(value).__name__, len(value)) for value in values]

    blob = b"x" * (3 * MIB)
    refs = [length.remote(blob, bytearray(blob)) for _ in range(4)]
    assert clusterpool.get(refs, timeout=20) == [[("bytes", 3 * MIB), ("bytearray", 3 * MIB)]] * 4


def test_equal_contents_of_different_arrays_are_stored_once() -> None:
    arrays = [np.full(10 * MIB, 7, np.uint8) for _ in range(4)]
    refs = [total.remote(array) for array in arrays]
    assert store_bytes() < 11 * MIB
    assert clusterpool.get(refs, timeout=20) == [70.0 * MIB] * 4


# --- loss -----------------------------------------------------------------------------------------------------------


def test_what_a_retired_worker_owns_and_has_started_is_there_while_somebody_wants_it() -> None:
    """Its group ends all the same, and the tasks get what its lease held."""

    @clusterpool.remote(num_cpus=2)
    def negative(number: int) -> int:
        return -number

    def make(number: int) -> list[clusterpool.ObjectRef]:
        return [clusterpool.put(number), negative.remote(number)]

    with clusterpool.Executor(2, max_tasks_per_child=1) as executor:
        refs = [ref for made in executor.map(make, range(3)) for ref in made]

    @clusterpool.remote(num_cpus=2)
    class Maker:
        def make(self, number: int) -> list[clusterpool.ObjectRef]:
            return make(number)

    maker = Maker.remote()
    refs += clusterpool.get(maker.make.remote(3), timeout=20)
    del maker
    assert clusterpool.get(refs, timeout=30) == [0, 0, 1, -1, 2, -2, 3, -3]
    del refs
    assert wait_for(lambda: not any(node["details"]["leases"] for node in clusterpool.nodes()), 20)


def test_the_reference_of_a_dead_owner_says_so() -> None:
    @clusterpool.remote
    class Owner:
        def make(self) -> list[Any]:
            return [clusterpool.put(1), clusterpool.put(np.ones(1_000_000))]

    owner = Owner.remote()
    refs = clusterpool.get(owner.make.remote(), timeout=30)
    clusterpool.kill(owner)
    wait_for(lambda: False, 0.5)
    for ref in refs:
        with pytest.raises(errors.OwnerDied):
            clusterpool.get(ref, timeout=30)
