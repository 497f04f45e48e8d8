"""Functions whose module holds things that cannot be pickled: those stay behind, the functions go."""

from __future__ import annotations

import pickle
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest

from clusterpool.errors import SerializationFailed
from clusterpool.serialization.functions import dumps_function


class Unpicklable:
    def __reduce__(self) -> Any:
        raise ValueError("I stay here")


class Guarded:
    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.name = "guarded"


def arrived(module_text: str, name: str, **globals_: Any) -> Callable[..., Any]:
    """A function of a module that cannot be imported, after its journey; its globals are new ones."""
    module = types.ModuleType("module_of_this_test")
    module.__dict__.update(globals_)
    exec(module_text, module.__dict__)
    function = module.__dict__[name]
    function.__module__ = None  # so that it is found in no module, hence sent by value
    loaded: Callable[..., Any] = pickle.loads(dumps_function(function))
    assert loaded is not function
    return loaded


def test_lock_arrives_as_a_fresh_one() -> None:
    lock = threading.Lock()
    lock.acquire()
    function = arrived("def f():\n    with lock:\n        return 'in'", "f", lock=lock)
    assert function() == "in"


def test_object_with_a_lock_arrives_with_a_fresh_one() -> None:
    function = arrived("def f():\n    with guarded.lock:\n        return guarded.name", "f", guarded=Guarded())
    assert function() == "guarded"


def test_what_cannot_be_pickled_is_missed_only_when_it_is_used() -> None:
    text = "def f(use):\n    return thing.value if use else 'not used'"
    function = arrived(text, "f", thing=Unpicklable())
    assert function(False) == "not used"
    with pytest.raises(SerializationFailed, match=r"global 'thing'.*I stay here.*initializer"):
        function(True)


@pytest.mark.parametrize(
    "use", ["thing()", "thing[0]", "iter(thing)", "len(thing)", "thing.x", "setattr(thing, 'x', 1)"]
)
def test_every_use_says_why(use: str) -> None:
    function = arrived(f"def f():\n    return {use}", "f", thing=Unpicklable())
    with pytest.raises(SerializationFailed, match="I stay here"):
        function()


def test_nested_functions_and_containers() -> None:
    text = "def g():\n    return len(table)\ndef f():\n    return h()\ndef h():\n    return 5"
    function = arrived(text, "f", table={"stream": Unpicklable()})
    assert function() == 5


def test_argument_of_a_partial_is_no_global() -> None:
    import functools

    with pytest.raises(ValueError, match="I stay here"):
        dumps_function(functools.partial(print, Unpicklable()))


def test_local_function_says_at_once_that_its_variable_cannot_be_sent() -> None:
    thing = Unpicklable()

    def local() -> Any:
        return thing

    with pytest.raises(ValueError, match="I stay here"):
        dumps_function(local)
