"""What must live as long as a pickle that may be loaded several times, and who gets it."""

from __future__ import annotations

import gc
import pickle
import types
from typing import Any

import pytest

from clusterpool.serialization import references
from clusterpool.serialization.functions import ship_function
from clusterpool.serialization.packing import dumps_arguments, dumps_value, loads
from clusterpool.serialization.versions import content_of


class Token:
    """Something that lives in this process only."""


class Holder:
    """Its pickles are told apart, and can be loaded once, or for as long as a token lives."""

    made = 0

    def __reduce__(self) -> tuple[Any, ...]:
        kept = references.keeper()
        Holder.made += 1
        if kept is not None:
            kept.append(Token())
        return str, ("once" if kept is None else "leased",)


def test_arguments_and_functions_keep_and_values_do_not() -> None:
    holder = Holder()
    serialized = dumps_arguments((holder, [holder]), {"key": holder})
    assert loads(serialized.to_bytes()) == (("leased", ["leased"]), {"key": "leased"})
    assert [type(token) for token in serialized.kept] == [Token]
    value = dumps_value([holder])
    assert (loads(value.to_bytes()), value.kept) == (["once"], ())
    assert pickle.loads(pickle.dumps(holder)) == "once"
    shipped = ship_function(lambda: holder)
    assert pickle.loads(shipped.payload)() == "leased"
    assert len(shipped.kept) == 1


def test_a_function_that_is_a_value_and_sent_once_does_not_keep() -> None:
    holder = Holder()
    assert loads(dumps_value(lambda: holder).to_bytes())() == "once"


def test_what_is_only_compared_makes_nothing() -> None:
    before = Holder.made
    assert content_of([Holder()]) is None
    assert Holder.made == before


def test_a_closure_with_such_a_value_stays_current() -> None:
    holder = Holder()
    shipped = ship_function(lambda: holder)
    assert shipped.is_current()


@pytest.fixture
def main_module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    import sys

    module = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    return module


def test_a_definition_does_not_keep_alive_what_it_needs_and_is_made_anew(main_module: types.ModuleType) -> None:
    exec("def function(): return holder", main_module.__dict__)
    main_module.__dict__["holder"] = Holder()
    function = main_module.__dict__["function"]
    first = ship_function(function)
    second = ship_function(function)
    assert first.payload == second.payload  # one definition serves both
    assert first.kept
    assert first.kept == second.kept
    del first, second
    gc.collect()
    made = Holder.made
    third = ship_function(function)
    assert Holder.made == made + 1
    assert third.kept
    # What is sent to be loaded once cannot rely on what others keep, and others cannot rely on it.
    assert dumps_value(function).kept == ()
    assert Holder.made == made + 2
    assert ship_function(function).kept
    assert Holder.made == made + 3
