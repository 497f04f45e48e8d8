"""Functions and classes of `__main__` as they are sent: made once, sent with each value, loaded once.

A definition is a pickle of its own and a token. A value that holds an instance of a class of `__main__` has
the pair `(token, pickle)` in its stream: who knows the token takes what he has and never looks at the pickle.
That is what makes such instances quick, keeps a class one class in each process, and gives a driver its own
classes back.
"""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Callable
from typing import Any

import cloudpickle

from clusterpool.serialization.namespaces import MAIN, namespaces
from clusterpool.serialization.versions import Dependency


class Definition:
    """One function or class, pickled with everything of `__main__` that it uses."""

    __slots__ = ("_kept", "dependencies", "is_spent", "pickle", "references", "thing", "token")

    def __init__(self, thing: Any, token: str, pickle: bytes) -> None:
        self.thing: Callable[[], Any] = weakref.ref(thing)
        self.token = token
        self.pickle = pickle
        self.references: list[Any] = []  # of objects, pickled with it
        self.dependencies: list[Dependency] | None = None  # None: it arrived, and was not sent on yet
        self.is_spent = False  # it holds a descriptor that can be fetched once
        # Weak: this table must not keep a pipe open for whoever waits for its end.
        self._kept: list[weakref.ref[Any]] = []

    def keep(self, kept: list[Any]) -> None:
        """What must live for as long as the pickle may be loaded; whoever sends it keeps it alive."""
        self._kept = [weakref.ref(item) for item in kept]

    def kept(self) -> list[Any] | None:
        """What was to be kept; None when some of it has gone, and this must be pickled anew."""
        kept = [watch() for watch in self._kept]
        return None if self.is_spent or None in kept else kept

    def is_current(self) -> bool:
        return self.dependencies is not None and all(one.is_current() for one in self.dependencies)


class Definitions:
    """The definitions that this process has made or loaded.

    By place, so that a notebook cell that is run again replaces its old definition: this is what bounds the
    table.
    """

    def __init__(self) -> None:
        self._by_place: dict[tuple[str, str], Definition] = {}
        self._thing_by_token: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()

    def find(self, thing: Any, place: tuple[str, str]) -> Definition | None:
        """The definition of `thing`, which may be out of date."""
        definition = self._by_place.get(place)
        return definition if definition is not None and definition.thing() is thing else None

    def add(self, thing: Any, place: tuple[str, str], token: str, pickle: bytes) -> Definition:
        """Keep a new definition of `thing` in the place of an older one."""
        definition = Definition(thing, token, pickle)
        self._by_place[place] = definition
        self._thing_by_token[token] = thing
        return definition

    def load(self, token: str, pickled: bytes) -> Any:
        """What the token stands for: the thing itself where it is known, else loaded and remembered."""
        thing = self._thing_by_token.get(token)
        if thing is None:
            thing = pickle.loads(pickled)
            self._thing_by_token[token] = thing
            place = namespaces.located(thing)
            if place is not None:
                self.add(thing, place, token, pickled)
        return thing


definitions = Definitions()


def load_definition(token: str, pickled: bytes) -> Any:
    """Named in the streams of values that hold definitions."""
    return definitions.load(token, pickled)


def place_by_value(thing: Any) -> tuple[str, str] | None:
    """Module and qualified name of a module-level function or class that is sent by value; else None."""
    module = getattr(thing, "__module__", None)
    if module == MAIN or (isinstance(module, str) and _is_by_value(module)):
        return namespaces.located(thing)
    return None


def _is_by_value(module: str) -> bool:
    registered = cloudpickle.list_registry_pickle_by_value()
    if not registered:
        return namespaces.is_private(module)
    parts = module.split(".")
    return namespaces.is_private(module) or any(
        ".".join(parts[:count]) in registered for count in range(1, len(parts) + 1)
    )
