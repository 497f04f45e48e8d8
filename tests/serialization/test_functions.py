"""Shipping in one process: the form of cloudpickle's reductions, what makes a shipment stale."""

from __future__ import annotations

import enum
import gc
import io
import pickle
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

import cloudpickle
import pytest

from clusterpool import errors
from clusterpool.serialization import functions, packing
from clusterpool.serialization.versions import CONTENT_CHECK_BYTES_MAX, Dependency, looks
from tests.serialization.sources import SINGLE_DISPATCH


@pytest.fixture
def plugin() -> Iterator[Any]:
    """A module that is sent by value, as `__main__` is."""
    module = types.ModuleType("plugin_of_test")
    sys.modules[module.__name__] = module
    cloudpickle.register_pickle_by_value(module)
    yield module
    cloudpickle.unregister_pickle_by_value(module)
    del sys.modules[module.__name__]


def define(module: Any, source: str) -> None:
    exec(source, module.__dict__)


class Color(enum.Enum):
    RED = 1


def test_cloudpickle_reduces_functions_and_classes_to_the_form_that_we_change() -> None:
    pickler = cloudpickle.Pickler(io.BytesIO(), protocol=5)

    class Local:
        pass

    class LocalColor(enum.Enum):
        RED = 1

    cell = 1
    assert functions.is_function_reduction(pickler.reducer_override(lambda: cell))
    assert functions.is_class_reduction(pickler.reducer_override(Local))
    assert isinstance(pickler.reducer_override(Local)[1][3], dict), "where __slots__ go"
    assert functions.is_class_reduction(pickler.reducer_override(LocalColor))


def test_another_form_of_reduction_is_left_to_cloudpickle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "is_function_reduction", lambda reduction: False)
    monkeypatch.setattr(functions, "is_class_reduction", lambda reduction: False)
    factor = 3
    payload = functions.dumps_function(lambda x: x * factor)
    assert b"make_function" not in payload.replace(b"_make_function", b"")
    assert functions.loads_function(payload)(2) == 6


def test_importable_functions_are_sent_by_name(plugin: Any) -> None:
    assert len(functions.dumps_function(io.open_code)) < 60
    assert len(packing.dumps_value([Color.RED, define]).to_bytes()) < 200


@pytest.mark.parametrize(
    ("source", "change", "is_current"),
    [
        ("x = 1\ndef f(): return x", "x = 1", True),  # the same object: a small number
        ("x = 1\ndef f(): return x", "x = 2", False),
        ("x = [1]\ndef f(): return x", "y = 2", True),
        ("x = [1]\ndef f(): return x", "x.append(2)", False),
        ("x = [1]\ndef f(): return x", "x = [1]", False),
        ("def f(): return x", "x = 1", False),
        ("x = 1\ndef f(): return x", "del x", False),
        ("def g(): return 1\ndef f(): return g()", "def g(): return 2", False),
        ("x = 1\ndef g(): return x\ndef f(): return g()", "x = 2", False),
        ("class C:\n    n = 1\ndef f(): return C", "C.n = 2", False),
        ("class C:\n    n = []\ndef f(): return C", "C.n.append(1)", False),
        ("class C:\n    n = []\ndef f(): return C", "c = C(); import pickle, copy; copy.copy(c)", True),
        ("import threading\nx = threading.Event\ndef f(): return x", "pass", True),
        ("import functools\n@functools.singledispatch\ndef f(x): return x", "f(1)", True),
        ("import functools\n@functools.singledispatch\ndef f(x): return x", "f.register(int, str)", False),
    ],
)
def test_a_shipment_knows_when_it_is_out_of_date(plugin: Any, source: str, change: str, is_current: bool) -> None:
    define(plugin, source)
    shipped = functions.ship_function(plugin.f)
    assert shipped.is_current()
    define(plugin, change)
    assert shipped.is_current() is is_current
    again = functions.dumps_function(plugin.f)
    assert (again == shipped.payload) is is_current


def test_a_single_dispatch_function_is_sent_with_all_its_kinds(plugin: Any) -> None:
    define(plugin, SINGLE_DISPATCH)
    payload = functions.dumps_function(plugin.name)
    expected = ["object", ["own"]]
    assert functions.loads_function(payload)([1, [plugin.Own()]]) == expected


def test_a_closure_is_out_of_date_when_its_variable_changed() -> None:
    count = 0

    def bump() -> int:
        nonlocal count
        count += 1
        return count

    shipped = functions.ship_function(bump)
    assert shipped.is_current()
    bump()
    assert not shipped.is_current()


def test_large_contents_are_compared_once_a_look() -> None:
    small, large = [0], [0] * CONTENT_CHECK_BYTES_MAX
    for value, expected in ((small, False), (large, True)):
        dependency = Dependency(lambda value=value: value, value)  # type: ignore[misc]
        value.append(1)
        assert dependency.is_current() is expected
        looks.look_anew()
        assert not dependency.is_current()
        assert not dependency.is_current(), "and it stays so"


def test_arrays_of_a_class_are_compared_as_well(plugin: Any) -> None:
    define(
        plugin,
        "import numpy\nclass C:\n    small = numpy.zeros(3)\n    large = numpy.zeros(100_000)\ndef f(): return C",
    )
    first = functions.ship_function(plugin.f)
    plugin.C.small[0] = 1
    assert not first.is_current()
    second = functions.ship_function(plugin.f)
    plugin.C.large[0] = 1
    assert second.is_current(), "that would take too long for each task"
    looks.look_anew()
    assert not second.is_current()
    third = functions.ship_function(plugin.f)
    looks.look_anew()
    assert third.is_current() and third.payload == functions.dumps_function(plugin.f)


def test_a_module_level_function_comes_back_as_itself(plugin: Any) -> None:
    define(plugin, "def f(): return 1\nclass C:\n    def m(self): return 2\n")
    assert functions.loads_function(functions.dumps_function(plugin.f)) is plugin.f
    value = packing.loads(packing.dumps_value([plugin.C(), plugin.C, plugin.C.m]).to_bytes())
    assert type(value[0]) is plugin.C and value[1] is plugin.C and value[2] is plugin.C.m


def test_an_instance_costs_its_class_only_once(plugin: Any) -> None:
    define(plugin, "class C:\n    def m(self): return 2\n")
    many = packing.dumps_value([plugin.C() for _ in range(100)])
    one = packing.dumps_value([plugin.C()])
    assert len(many.stream) < len(one.stream) + 100 * 20


def test_shipping_local_classes_and_functions_does_not_keep_them_alive() -> None:
    def make() -> tuple[Any, Any]:
        class Local:
            items: list[int] = []

            @property
            def half(self) -> Any:
                return __class__  # type: ignore[name-defined]

        return Local, lambda: Local

    cls, function = make()
    for thing in (cls, function):
        functions.dumps_function(thing)
    weak_class, weak_function = weakref.ref(cls), weakref.ref(function)
    del cls, function, thing
    gc.collect()
    assert weak_class() is None and weak_function() is None


def test_unpicklable_functions_raise_what_pickle_raises() -> None:
    import threading

    lock = threading.Lock()
    with pytest.raises(TypeError, match="lock"):
        functions.dumps_function(lambda: lock)
    with pytest.raises(TypeError, match="lock"):
        packing.dumps_arguments((lock,), {})


def test_a_function_of_a_missing_module_is_a_version_mismatch() -> None:
    payload = b"cno_such_module_here\nf\n."
    with pytest.raises(errors.VersionMismatch, match=r"no_such_module_here.*n7"):
        functions.loads_function(payload, node_id="n7")
    with pytest.raises(errors.VersionMismatch, match="no_such_name"):
        functions.loads_function(b"cos\nno_such_name\n.")


def test_reducers_registered_with_copyreg_are_used() -> None:
    import copyreg

    class Handle:
        pass

    packing.dumps_value([object()])
    copyreg.pickle(Handle, lambda handle: (str, ("reduced",)))  # type: ignore[arg-type]
    try:
        assert packing.loads(packing.dumps_value([Handle()]).to_bytes()) == ["reduced"]
    finally:
        del copyreg.dispatch_table[Handle]


def test_threads_may_ship_the_same_class_at_once(plugin: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    define(plugin, "x = {}\nclass C:\n    def m(self): return x\n")
    with ThreadPoolExecutor(8) as threads:
        payloads = list(threads.map(lambda _: packing.dumps_value(plugin.C()).to_bytes(), range(64)))
    assert all(type(pickle.loads(payload)) is plugin.C for payload in payloads)
